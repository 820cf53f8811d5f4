"""`fedbus` processes of the example app in deploy/app."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.deploy.files import DEPLOY

FEDBUS: Final = Path(sys.executable).with_name("fedbus")


class FedbusProcess:
    """One process, and what it printed; `settings` are variables of its environment."""

    def __init__(self, args: list[str], folder: Path, name: str, **settings: str) -> None:
        self._how = (args, folder, name, settings)
        self._log = folder / f"{name}.log"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("FEDBUS_")}
        path = os.pathsep.join(filter(None, [str(DEPLOY / "app"), os.environ.get("PYTHONPATH")]))
        env = {**kept, "FEDBUS_METRICS": "127.0.0.1:0", "FEDBUS_PAUSE_S": "0", **settings, "PYTHONPATH": path}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([FEDBUS, *args], env=env, stdout=log, stderr=log, cwd=folder)

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def again(self) -> FedbusProcess:
        """Another one like it."""
        args, folder, name, settings = self._how
        return FedbusProcess(args, folder, name, **settings)

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; its exit code."""
        return self._process.wait(60)

    def kill(self) -> None:
        if self.is_running:
            self._process.kill()
        self._process.wait()

"""A federation across machines: a broker that others reach by TLS alone, its operator, and a fleet of members.

All of it by the commands that people type: `fedbus broker start --listen`, `provision`, `revoke`; members have nothing
but their bundles.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from tests import forked
from tests.faults.adding_app import Settings
from tests.faults.fleet import FEDBUS, SERVER, Fleet
from tests.faults.machines import Machine, Network

BROKER = "broker"
_ROOT = Path(__file__).resolve().parents[2]
_GONE_S = 10.0
_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_RABBITMQCTL = """
import sys
from fedbus.bus.node import detached_state, rabbitmqctl
sys.stdout.write(rabbitmqctl(detached_state(), *sys.argv[1:]))
"""


class Site:
    """A broker on a machine called "broker", and further machines; a context manager.

    Args:
        folder: holds the broker's data and the bundles.
        machines: names of the others.
    """

    def __init__(self, folder: Path, *machines: str) -> None:
        self.folder = folder
        self.network = Network(BROKER, *machines)
        self._env = {
            **{key: text for key, text in os.environ.items() if not key.startswith("FEDBUS_")},
            "XDG_STATE_HOME": str(folder / "state"),
        }

    def __enter__(self) -> Self:
        self.network.__enter__()
        try:
            self.start_broker()
        except BaseException:
            self.network.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.operate("broker", "stop")
        self.network.__exit__()

    @property
    def address(self) -> str:
        """Where members reach the broker, at port 5671."""
        return self.network[BROKER].address

    def operate(self, *arguments: str) -> str:
        """What a `fedbus` command of the broker's operator prints, on the broker's own machine."""
        return self._run(self.network[BROKER].command(str(FEDBUS), *arguments))

    def _run(self, command: list[str]) -> str:
        done = subprocess.run(command, env=self._env, cwd=self.folder, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def start_broker(self) -> None:
        """Start it, or start it again after its death."""
        self.operate("broker", "start", "--listen", self.address)

    def broker_state(self) -> dict[str, Any]:
        """As `fedbus broker status --json` tells it, password and all."""
        state: dict[str, Any] = json.loads(self.operate("broker", "status", "--json"))
        return state

    def rabbitmqctl(self, *arguments: str) -> str:
        """As `rabbitmqctl`, about the broker."""
        command = self.network[BROKER].command(sys.executable, "-c", _RABBITMQCTL, *arguments)
        return self._run(command)

    def kill_broker(self) -> None:
        """SIGKILL, and wait until its keeper has seen it."""
        os.kill(self.broker_state()["pid"], signal.SIGKILL)
        give_up_at = time.monotonic() + _GONE_S
        while self._is_running():
            if time.monotonic() > give_up_at:
                raise OSError("the broker that was killed still runs")
            time.sleep(0.1)

    def _is_running(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.broker_state()["running"])
        return False

    @property
    def data_dir(self) -> Path:
        """Everything of the broker: data, logs, its password, and the operator's CA."""
        return self.folder / "state" / "fedbus" / "broker" / "default"

    def provision(self, federation: str, *clients: str, login: str = "certificate") -> Path:
        """The folder with the bundles of a new federation, or of members that are added to it."""
        bundles = self.folder / f"{federation}-bundles"
        members = ("--clients", ",".join(clients), "--login", login, "--out", str(bundles))
        self.operate("broker", "provision", federation, *members)
        return bundles


class SpreadFleet(Fleet):
    """The processes of one run, each on its machine, and with its bundle.

    Args:
        folder, settings: as of any fleet.
        bundles: folder with server.json and one bundle for each client.
        places: name of a process to its machine.
    """

    def __init__(self, folder: Path, settings: Settings, *, bundles: Path, places: Mapping[str, Machine]) -> None:
        super().__init__(folder, settings, "")
        self._bundles = bundles
        self.places = places

    def launch(self, name: str, module: str, arguments: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        program = [str(FEDBUS)] if module == forked.FEDBUS else [sys.executable, "-m", module]
        return subprocess.Popen(
            self.places[name].command(*program, *arguments),
            env={**self._env, **_ENVIRONMENT},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )

    def access(self, name: str) -> list[str]:
        return ["--bundle", str(self._bundles / f"{name}.json")]


def spread(clients: tuple[str, ...], server: Machine, others: list[Machine]) -> dict[str, Machine]:
    """The server on a machine of its own, the clients in turns on the others."""
    return {SERVER: server, **{name: others[index % len(others)] for index, name in enumerate(clients)}}

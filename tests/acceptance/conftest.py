"""Real processes: the `fedbus` command as its users type it, and a check that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FEDBUS = Path(sys.executable).with_name("fedbus")


class Shell:
    """Runs `fedbus` in a folder of its own; every process that it starts carries a mark in its environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = f"FEDBUS_TEST={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        self.env = {
            **{key: text for key, text in os.environ.items() if not key.startswith("FEDBUS_")},
            name: value,
            "XDG_STATE_HOME": str(folder / "state"),
            "PYTHONUNBUFFERED": "1",
        }
        self._started: list[Terminal] = []

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [FEDBUS, *args], cwd=self.folder, env={**self.env, **env}, capture_output=True, text=True, timeout=110
        )

    def start(self, *args: str) -> Terminal:
        """Start a command that goes on, as in a terminal of its own."""
        terminal = Terminal(args, self.folder / f"terminal-{len(self._started)}.log", self)
        self._started.append(terminal)
        return terminal

    def leftovers(self) -> list[str]:
        """Command lines of the processes with our mark that still run."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if int(entry.name) != os.getpid() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120])
            except OSError:  # it ended just now, or is not ours
                continue
        return [line for line in found if line]

    def close(self) -> None:
        for terminal in self._started:
            terminal.kill()


class Terminal:
    """One running command and what it prints."""

    def __init__(self, args: tuple[str, ...], log: Path, shell: Shell) -> None:
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [FEDBUS, *args], cwd=shell.folder, env=shell.env, stdout=out, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def until(self, text: str, timeout_s: float = 30.0) -> str:
        """Wait until `text` is printed; the line with it."""
        poll(lambda: text in self.output or self.process.poll() is not None, timeout_s, lambda: self.output)
        assert text in self.output, self.output
        return next(line for line in self.output.splitlines() if text in line)

    def end(self, timeout_s: float = 30.0) -> int:
        """Wait for the command's end; its exit code."""
        return self.process.wait(timeout_s)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def poll(condition: Callable[[], bool], timeout_s: float = 15.0, show: Callable[[], object] = lambda: "") -> None:
    """Wait until `condition` holds; fail after `timeout_s`."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"still not so after {timeout_s} s: {show()}"
        time.sleep(0.02)


def last_json(text: str) -> dict[str, Any]:
    """The object in the last line."""
    found = json.loads(text.strip().splitlines()[-1])
    assert isinstance(found, dict)
    return found


@pytest.fixture
def shell(tmp_path: Path, rabbitmq_installed: None) -> Iterator[Shell]:
    """A shell whose processes are all gone at the end of the test, or the test fails."""
    its_shell = Shell(tmp_path)
    yield its_shell
    its_shell.close()
    if Path("/proc").is_dir():
        poll(lambda: not its_shell.leftovers(), 10, its_shell.leftovers)

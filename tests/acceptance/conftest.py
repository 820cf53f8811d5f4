"""Real processes: the `fedbus` command as its users type it, and a check that nothing of it is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests import forked
from tests.faults.machines import missing_for_machines
from tests.faults.site import Site

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
        log = self.folder / f"terminal-{len(self._started)}.log"
        with log.open("wb") as out:
            terminal = Terminal(self._launch(args, out), log)
        self._started.append(terminal)
        return terminal

    def _launch(self, args: tuple[str, ...], out: IO[bytes]) -> subprocess.Popen[bytes] | forked.Process:
        return subprocess.Popen([FEDBUS, *args], cwd=self.folder, env=self.env, stdout=out, stderr=subprocess.STDOUT)

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


class QuickShell(Shell):
    """Forks `fedbus` from a process that has imported it: for tests of what comes afterwards, see `tests.forked`."""

    def run(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self._fork(args, {**self.env, **env}, out, err)
            try:
                code = process.wait(110)
            finally:
                process.kill()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(["fedbus", *args], code, out.read(), err.read())

    def leftovers(self) -> list[str]:
        """The mark is not in the environment that a forked process shows, but in that of all whom it starts."""
        forks = [f"forked {terminal.process.pid}" for terminal in self._started if terminal.process.poll() is None]
        return forks + super().leftovers()

    def _launch(self, args: tuple[str, ...], out: IO[bytes]) -> forked.Process:
        return self._fork(args, self.env, out, out)

    def _fork(self, args: tuple[str, ...], env: dict[str, str], out: IO[Any], err: IO[Any]) -> forked.Process:
        return forked.start(forked.FEDBUS, *args, cwd=self.folder, env=env, out=out.fileno(), err=err.fileno())


class Terminal:
    """One running command and what it prints."""

    def __init__(self, process: subprocess.Popen[bytes] | forked.Process, log: Path) -> None:
        self.process = process
        self._log = log

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


@pytest.fixture(scope="session")
def site(rabbitmq_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A broker that three other machines reach, for all tests: take your own federation, and heal what you cut."""
    missing = missing_for_machines()
    if missing and os.environ.get("CI"):
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    with Site(tmp_path_factory.mktemp("site"), "office", "ward1", "ward2") as shared:
        yield shared


@pytest.fixture
def shell(tmp_path: Path, rabbitmq_installed: None) -> Iterator[Shell]:
    """A shell whose processes are all gone at the end of the test, or the test fails."""
    its_shell = Shell(tmp_path)
    yield its_shell
    end(its_shell)


@pytest.fixture
def quick_shell(tmp_path: Path) -> Iterator[QuickShell]:
    """The same, with commands that need not import anything first, and no RabbitMQ of their own."""
    its_shell = QuickShell(tmp_path)
    yield its_shell
    end(its_shell)


def end(shell: Shell) -> None:
    """Nothing of it may be left behind."""
    shell.close()
    if Path("/proc").is_dir():
        poll(lambda: not shell.leftovers(), 10, shell.leftovers)

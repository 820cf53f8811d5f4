"""The processes of one run: `fedbus` commands that can be killed, stopped and started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

from tests import forked
from tests.faults import adding_app
from tests.faults.adding_app import Settings
from tests.faults.checker import Verdict, check, json_lines

SERVER = "server"
APP = f"{Path(adding_app.__file__).resolve()}:app"
FEDBUS = Path(sys.executable).with_name("fedbus")
_POLL_S = 0.002
PROGRESS = frozenset({"round_opened", "update_folded", "round_closed"})


class Stalled(Exception):
    """What was waited for did not come, or a process ended that must not."""


class Log:
    """A log file as it grows: counts the events in it, line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress = 0
        self.round = 0
        self._read_to = 0
        self._rest = b""

    def read(self) -> list[dict[str, Any]]:
        """The events that came since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            new = file.read()
        self._read_to += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        return [event for line in lines if line.startswith(b"{") and (event := self._take(line))]

    def _take(self, line: bytes) -> dict[str, Any]:
        try:
            event: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # half of it died with its writer
            return {}
        self.progress += event.get("event") in PROGRESS
        self.round = max(self.round, event["round"] if event.get("event") == "round_opened" else 0)
        return event


class Fleet:
    """Server and clients of one run; a context manager that leaves none of them behind.

    Args:
        folder: holds the run folder, journals and logs.
        settings: of the app; the journal's folder is set here.
        broker: what goes behind `--broker`.
        resume: whether the server is started with `--resume`.
    """

    def __init__(self, folder: Path, settings: Settings, broker: str, *, resume: bool = True) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        journal = folder / "journal"
        journal.mkdir(parents=True, exist_ok=True)
        self.settings = Settings(**{**vars(settings), "journal": str(journal)})
        self.broker = broker
        self.log = Log(folder / "server.log")
        self._resume = resume
        self._env = {
            **{key: text for key, text in os.environ.items() if not key.startswith("FEDBUS_")},
            **self.settings.to_env(),
        }
        self.processes: dict[str, forked.Process | subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.processes:
            self.kill(name)

    # ---- start and kill ------------------------------------------------------------------------------------------

    def start(self, *, fault: str = "", faulty: str = "") -> None:
        """Start the server and all clients; `faulty` is the one that gets `fault`, see `victim`."""
        for name in (SERVER, *self.settings.client_ids):
            self.start_one(name, fault=fault if name == faulty else "")

    def start_one(self, name: str, *, fault: str = "") -> None:
        """Start a server or a client, for the first time or again; `fault` as `tests.faults.victim` reads it."""
        if name.startswith(SERVER):
            command = ["server", APP, "--run-dir", str(self.run_dir), *["--resume"] * self._resume]
        else:
            command = ["client", APP, "--id", name]
        module, *words = ["tests.faults.victim", fault] if fault else [forked.FEDBUS]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = self.launch(
                name, module, [*words, *command, *self.access(name), "--log-json", "--debug"], log
            )

    def launch(
        self, name: str, module: str, arguments: list[str], log: IO[bytes]
    ) -> forked.Process | subprocess.Popen[bytes]:
        """Call `main()` of a module, with these arguments, in a new process where the process `name` belongs: here."""
        return forked.start(module, *arguments, cwd=self.folder, env=self._env, out=log.fileno(), err=log.fileno())

    def access(self, name: str) -> list[str]:
        """The options that lead the process `name` to the broker."""
        return ["--broker", self.broker]

    def kill(self, name: str) -> None:
        """SIGKILL, and reap."""
        self.processes[name].kill()
        self.processes[name].wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def is_alive(self, name: str) -> bool:
        return self.processes[name].poll() is None

    def open_gate(self) -> None:
        """Let the fit that waits at the gate go on."""
        (Path(self.settings.journal) / "gate").touch()

    # ---- watch ---------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        """Wait until `condition` holds. Raises `Stalled`."""
        give_up_at = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > give_up_at:
                raise Stalled(f"{what}: not within {timeout_s:.0f} s; the server's last words: {self.last_words()}")
            time.sleep(_POLL_S)

    def until_event(self, name: str, event: str, timeout_s: float = 30.0, **fields: object) -> dict[str, Any]:
        """Wait until such an event is in the log of `name`; the last of them."""
        found: list[dict[str, Any]] = []

        def is_there() -> bool:
            found[:] = self.events(name, event, **fields)
            time.sleep(0.02)
            return bool(found)

        self.until(is_there, f"{event} {fields} of {name}", timeout_s)
        return found[-1]

    def events(self, name: str, event: str, **fields: object) -> list[dict[str, Any]]:
        """The events of this kind, and with these fields, in the log of `name`."""
        return [
            line
            for line in json_lines(self.folder / f"{name}.log")
            if line.get("event") == event and all(line.get(key) == value for key, value in fields.items())
        ]

    def last_words(self, name: str = SERVER) -> str:
        """The end of a log, for people."""
        path = self.folder / f"{name}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return lines[-1][-400:] if lines else "none"

    def check_alive(self) -> None:
        """Raises `Stalled` when a process has failed that nobody killed."""
        for name, process in self.processes.items():
            if process.poll() not in (None, 0):
                raise Stalled(f"{name} ended by itself with {process.returncode}: {self.last_words(name)}")

    def until_done(self, timeout_s: float = 120.0) -> list[str]:
        """Wait until the server has ended and the clients have gone home; a line for each that did otherwise."""
        give_up_at = time.monotonic() + timeout_s
        while self.is_alive(SERVER):
            self.check_alive()
            if time.monotonic() > give_up_at:
                raise Stalled(f"the run does not end; the server's last words: {self.last_words()}")
            time.sleep(0.02)
        self.check_alive()  # nobody goes home from a server that has failed
        problems = []
        for name in (SERVER, *self.settings.client_ids):
            process = self.processes[name]
            try:
                code = process.wait(20)
            except subprocess.TimeoutExpired:
                problems.append(f"{name} does not come home: {self.last_words(name)}")
            else:
                if code:
                    problems.append(f"{name} ended with {code}: {self.last_words(name)}")
        return problems

    def verdict(self, sha_expected: str) -> Verdict:
        """The checker's word on the finished run."""
        logs = [self.folder / f"{client_id}.log" for client_id in self.settings.client_ids]
        return check(self.settings, run_dir=self.run_dir, client_logs=logs, sha_expected=sha_expected)

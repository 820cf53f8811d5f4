"""A process that imports an app once and forks its clients, so that ten clients cost one import of torch.

It reads one JSON command per line from stdin and answers with JSON lines on what was its stdout (what an app prints
while it is imported goes to stderr):

    {"load": {"app": REFERENCE}}                              -> {"loaded": seconds} | {"failed": reason}
    {"spawn": {"client_id", "partition", "num_partitions", "broker", "log"}}  -> {"spawned": client_id, "pid": pid}
    a client ends                                             -> {"exited": client_id, "code": exit status or -signal}

When stdin ends, its parent is gone: it ends the clients and itself. Should it be killed, the clients see the end of a
pipe that only it holds open, and end themselves. It must stay free of threads and event loops: it forks.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import logging
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from fedbus.api import join
from fedbus.app import App, load_app
from fedbus.errors import FedbusError
from fedbus.observe.logs import log_event, set_up

_TERM_PATIENCE_S = 3.0


def main() -> None:
    """Serve commands until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides: it closes stdin
    wake_read, wake_write = os.pipe()
    for fd in (wake_read, wake_write):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    answers = os.dup(1)
    os.dup2(2, 1)
    nursery = _Nursery(answers=answers, wake=(wake_read, wake_write), alive=os.pipe())
    buffer = b""
    while True:
        ready, _, _ = select.select([0, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            nursery.reap()
        if 0 in ready:
            data = os.read(0, 65_536)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                nursery.obey(json.loads(line))
    nursery.end()


class _Nursery:
    def __init__(self, *, answers: int, wake: tuple[int, int], alive: tuple[int, int]) -> None:
        self._answers = answers
        self._wake = wake
        self._alive_read, self._alive_write = alive
        self._app: App | None = None
        self._clients: dict[int, str] = {}

    def obey(self, command: dict[str, Any]) -> None:
        if "load" in command:
            self._load(command["load"]["app"])
        else:
            self._spawn(**command["spawn"])

    def _load(self, reference: str) -> None:
        started_at = time.monotonic()
        try:
            self._app = load_app(reference)
        except FedbusError as exc:
            self._say(failed=str(exc))
            return
        if "torch" in sys.modules:
            importlib.import_module("fedbus.training.torch").warm_up()
        gc.freeze()  # what is imported stays shared between the clients: their collectors leave it alone
        self._say(loaded=time.monotonic() - started_at)

    def _spawn(self, **client: Any) -> None:
        pid = os.fork()
        if pid == 0:
            self._become_client(client)
        self._clients[pid] = client["client_id"]
        self._say(spawned=client["client_id"], pid=pid)

    def _become_client(self, client: dict[str, Any]) -> None:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to pass on
            for fd in (*self._wake, self._alive_write, self._answers):
                os.close(fd)
            _redirect(Path(client["log"]))
            _reseed()
            assert self._app is not None
            code = _run_client(self._app, client, self._alive_read)
        except BaseException:  # noqa: BLE001  # into the client's log: nobody else will tell
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # the nursery's own cleanup is not the client's

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            client_id = self._clients.pop(pid, None)
            if client_id is not None:
                self._say(exited=client_id, code=os.waitstatus_to_exitcode(status))

    def _say(self, **words: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # the parent is gone: stdin ends next
            os.write(self._answers, json.dumps(words).encode() + b"\n")

    def end(self) -> None:
        """SIGTERM to whoever is left, SIGKILL to whoever stays."""
        self._signal_all(signal.SIGTERM)
        give_up_at = time.monotonic() + _TERM_PATIENCE_S
        while self._clients and time.monotonic() < give_up_at:
            self.reap()
            time.sleep(0.02)
        self._signal_all(signal.SIGKILL)

    def _signal_all(self, number: signal.Signals) -> None:
        for pid in self._clients:
            os.kill(pid, number)


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)


def _reseed() -> None:
    """Forked clients must not share their randomness."""
    random.seed()
    if "numpy" in sys.modules:
        import numpy as np

        np.random.seed(int.from_bytes(os.urandom(4), "little"))
    if "torch" in sys.modules:
        sys.modules["torch"].seed()


def _run_client(app: App, client: dict[str, Any], alive: int) -> int:
    set_up(sys.stderr, as_json=False, level=logging.INFO)
    logging.getLogger("fedbus.client").setLevel(logging.DEBUG)  # a file: room for the user's tracebacks

    async def run() -> None:
        asyncio.get_running_loop().add_reader(alive, os._exit, 1)  # readable means closed: the nursery is gone
        await join(
            app,
            broker=client["broker"],
            client_id=client["client_id"],
            partition=client["partition"],
            num_partitions=client["num_partitions"],
            observers=[log_event],
        )

    try:
        asyncio.run(run())
    except FedbusError as exc:
        sys.stderr.write(f"{client['client_id']}: {exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    main()

"""Commands without the second that Python takes to import what they need: forked from a process that has done so.

    process = forked.start("fedbus.cli.main", "server", "app.py", cwd=folder, env=env, out=file, err=file)

Each is a process as others are, with arguments, environment, folder and output of its own, and can be waited for,
stopped and killed; only `/proc/PID/environ` and `cmdline` are those of the process that it was forked from. That one
runs this module, has neither threads nor event loops, and ends with whoever started it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FEDBUS = "fedbus.cli.main"
_ROOT = Path(__file__).resolve().parents[1]


class Process:
    """One forked command, with what `subprocess.Popen` has to watch and end it."""

    def __init__(self, parent: _Parent, pid: int) -> None:
        self._parent = parent
        self.pid = pid

    @property
    def returncode(self) -> int | Any:  # as typeshed has it for Popen: who has polled knows
        return self._parent.codes.get(self.pid)

    def poll(self) -> int | None:
        """Its exit code, -N after signal N; None while it runs."""
        if self.returncode is None:
            self._parent.listen(0)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Its exit code, once it has ended. Raises `subprocess.TimeoutExpired`."""
        give_up_at = time.monotonic() + timeout
        while (code := self.poll()) is None:
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout)
            self._parent.listen(left_s)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(module: str, *args: str, cwd: Path, env: Mapping[str, str], out: int, err: int) -> Process:
    """Fork a process that calls `main()` of a module; `out` and `err` are descriptors for what it prints."""
    return _parent().start({"module": module, "args": args, "cwd": os.fspath(cwd), "env": dict(env)}, (out, err))


# ---- on this side ----------------------------------------------------------------------------------------------------


class _Parent:
    """The process that forks, as seen from the one that asks it to."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        self._pids: list[int] = []
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines = b""
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.forked", str(theirs.fileno())],
            cwd=_ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # a fork has no threads
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C at the terminal is for whoever runs the tests
        )
        theirs.close()

    def start(self, job: dict[str, Any], fds: tuple[int, int]) -> Process:
        body = json.dumps(job).encode()
        socket.send_fds(self._socket, [len(body).to_bytes(4, "big")], fds)
        self._socket.sendall(body)
        while not self._pids:
            self.listen(60.0)
        return Process(self, self._pids.pop())

    def listen(self, timeout_s: float) -> None:
        """Take in what it has to say, waiting for a first word."""
        while select.select([self._socket], [], [], timeout_s)[0]:
            heard = self._socket.recv(65_536)
            if not heard:
                raise RuntimeError(f"the process that forks commands ended with {self._process.wait()}")
            *lines, self._lines = (self._lines + heard).split(b"\n")
            for line in lines:
                pid, code = json.loads(line)
                if code is None:
                    self._pids.append(pid)
                else:
                    self.codes[pid] = code
            timeout_s = 0

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._socket.close()
        self._process.wait()


@functools.cache
def _parent() -> _Parent:
    parent = _Parent()
    atexit.register(parent.close)
    return parent


# ---- on the other side -----------------------------------------------------------------------------------------------


def main() -> None:
    importlib.import_module(FEDBUS)
    gc.freeze()  # so that children do not copy the pages of what is there already
    requests = socket.socket(fileno=int(sys.argv[1]))
    job = _serve(requests)
    if job is not None:  # we are the child
        importlib.import_module(job["module"]).main()


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Fork, and tell pids and exit codes; returns in each child with its job, and with None when all is over."""
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready, _, _ = select.select([requests.fileno(), ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _reap(requests)
        if requests.fileno() in ready:
            size, fds, _, _ = socket.recv_fds(requests, 4, 2, socket.MSG_WAITALL)
            if not size:
                return None
            job: dict[str, Any] = json.loads(requests.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                for fd in (requests.detach(), ended, wake):
                    os.close(fd)
                _become(job, fds)
                return job
            for fd in fds:
                os.close(fd)
            _tell(requests, pid, None)


def _reap(requests: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _tell(requests, pid, os.waitstatus_to_exitcode(status))


def _tell(requests: socket.socket, pid: int, code: int | None) -> None:
    requests.sendall(json.dumps([pid, code]).encode() + b"\n")


def _become(job: dict[str, Any], fds: list[int]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, fd in enumerate(fds, start=1):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.argv = ["fedbus", *job["args"]]


if __name__ == "__main__":
    main()

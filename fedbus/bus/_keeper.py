"""The process that owns a private RabbitMQ node, and takes it down when whoever asked for it is gone.

Run as a script, never imported by fedbus: standard library only, so that it starts in tens of milliseconds
and lives on when its parent is killed. It reads one JSON line (the spec that `fedbus.bus.node` writes) from
its standard input, answers with JSON lines, and then obeys "kill" and "start" until its input ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_CONNECTION_START = b"\x00\x0a\x00\x0a"  # class 10, method 10 (AMQP 0-9-1, section 1.4.2.1)
_PROBE_S = 0.03
_PARENT_CHECK_S = 2.0
_GRACEFUL_STOP_S = 20.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
_OPEN_FILES = 65536  # an unlimited RLIMIT_NOFILE makes erl_child_setup and epmd walk a billion descriptors


class _Stop(Exception):
    """The parent is gone, or asked us to end."""


class Keeper:
    """One beam, its epmd, and the folder they live in."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.folder = Path(spec["folder"])
        self.detached = bool(spec["detached"])
        self.beam: subprocess.Popen[bytes] | None = None
        self.epmd: subprocess.Popen[bytes] | None = None
        self.keep_folder = not spec["throwaway"]
        self.released = False  # a detached keeper that nobody follows any more
        self._input = b""
        self._wakeup = _signals_to_pipe()

    def serve(self) -> None:
        """Start the node, then follow the parent's word until it ends."""
        if not self._start():
            self.keep_folder = True  # the parent reads the log, then decides
            return
        while True:
            self._obey(self._wait(_PARENT_CHECK_S))
            if self.beam is not None and self.beam.poll() is not None:
                self._note_death()

    def stop(self) -> None:
        """End beam, helpers and epmd; delete what must not stay. The order keeps epmd until its node left."""
        self._stop_beam(graceful=bool(self.spec["graceful"]))
        if self.epmd is not None:
            self.epmd.kill()
            self.epmd.wait()
        if self.detached:
            Path(self.spec["state_file"]).unlink(missing_ok=True)
        if not self.keep_folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _obey(self, command: str) -> None:
        if command == "kill":
            self._stop_beam(graceful=False)
            self._say(event="killed")
        elif command == "start":
            self._stop_beam(graceful=False)
            self._start()

    def _note_death(self) -> None:
        assert self.beam is not None
        with open(self.folder / "log" / "keeper.log", "a") as log:
            log.write(f"{time.ctime()}: the broker ended by itself with status {self.beam.returncode}\n")
        self.beam = None
        if self.detached:
            raise _Stop

    def _start(self) -> bool:
        reason = self._start_epmd() or self._start_beam()
        if reason:
            self._stop_beam(graceful=False)
            self._say(event="failed", reason=reason)
            return False
        assert self.beam is not None
        assert self.epmd is not None
        self._announce({"pid": self.beam.pid, "epmd_pid": self.epmd.pid, "keeper_pid": os.getpid()})
        return True

    def _announce(self, pids: dict[str, int]) -> None:
        state = {**self.spec["state"], **pids, "started_at": time.time()}
        if self.detached:
            _write_private(Path(self.spec["state_file"]), json.dumps(state))
        self._say(event="ready", state=state)
        if self.detached:
            self.released = True
            _redirect_to_null(0, 1)

    def _start_epmd(self) -> str:
        """Run epmd as our own child: its pid is known, and the node saves the half second of starting one."""
        if self.epmd is not None and self.epmd.poll() is None:
            return ""
        arguments = [self.spec["epmd"], "-port", str(self.spec["epmd_port"]), "-address", "127.0.0.1"]
        self.epmd = self._spawn(arguments)
        deadline = time.monotonic() + 10.0
        while not _accepts(self.spec["epmd_port"]):
            if self.epmd.poll() is not None:
                return "epmd: address in use (eaddrinuse)"
            if time.monotonic() > deadline:
                return "epmd does not answer"
            self._wait(_PROBE_S)
        return "" if self.epmd.poll() is None else "epmd: address in use (eaddrinuse)"

    def _start_beam(self) -> str:
        self.beam = self._spawn([self.spec["script"]])
        deadline = time.monotonic() + self.spec["start_timeout_s"]
        while not self._is_open():
            if self.beam.poll() is not None:
                return f"ended with status {self.beam.returncode} before it was ready"
            if time.monotonic() > deadline:
                return f"not ready after {self.spec['start_timeout_s']:g} s"
            self._wait(_PROBE_S)
        return ""

    def _is_open(self) -> bool:
        return _speaks_amqp(self.spec["port"]) and all(_accepts(port, host) for host, port in self.spec["other_doors"])

    def _spawn(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / "console.log", "ab") as log:
            return subprocess.Popen(
                arguments,
                env=self.spec["env"],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent(signal.SIGTERM if self.spec["graceful"] else signal.SIGKILL),
            )

    def _stop_beam(self, *, graceful: bool) -> None:
        beam, self.beam = self.beam, None
        if beam is None:
            return
        helpers = _descendants(beam.pid) if beam.poll() is None else []
        if graceful and beam.poll() is None:
            beam.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                beam.wait(_GRACEFUL_STOP_S)
        if beam.poll() is None:
            beam.kill()
        beam.wait()
        _await_end(helpers)

    def _wait(self, timeout_s: float) -> str:
        """Sleep until a command comes ("" when none does within `timeout_s` or a child ended)."""
        if not self.detached and os.getppid() != self.spec["parent"]:
            raise _Stop  # a fork of the parent may hold our input open although the parent is gone
        watched = [self._wakeup] if self.released else [self._wakeup, 0]
        ready = select.select(watched, [], [], timeout_s)[0]
        if self._wakeup in ready:
            if any(number != signal.SIGCHLD for number in os.read(self._wakeup, 64)):
                raise _Stop
            self._reap_adopted()
        return self._read_command() if 0 in ready else ""

    def _reap_adopted(self) -> None:
        own = {child.pid for child in (self.beam, self.epmd) if child is not None}
        while (pid := _ended_child()) and pid not in own:
            os.waitpid(pid, 0)

    def _read_command(self) -> str:
        chunk = os.read(0, 4096)
        if not chunk:
            raise _Stop
        self._input += chunk
        line, newline, rest = self._input.partition(b"\n")
        if not newline:
            return ""
        self._input = rest
        return line.decode().strip()

    def _say(self, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # a dead parent is noticed by its end of input
            sys.stdout.write(json.dumps(fields) + "\n")
            sys.stdout.flush()


def _signals_to_pipe() -> int:
    """Turn signals into bytes on a pipe, so that one select waits for children, signals and commands."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    return reading


def _die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """On Linux the kernel ends the child when the keeper itself is killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    return lambda: prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


def _adopt_orphans() -> None:
    """On Linux take in the beam's helpers when it dies: not every container has an init that reaps them."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _ended_child() -> int:
    """Return a child that has ended and is not reaped yet, or 0; always 0 where no orphans are adopted."""
    if not sys.platform.startswith("linux"):
        return 0
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return 0 if ended is None else ended.si_pid


def _speaks_amqp(port: int) -> bool:
    """Tell whether the port answers the protocol header with Connection.Start: the listener is up and booted."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as probe:
            probe.sendall(_PROTOCOL_HEADER)
            return probe.recv(11, socket.MSG_WAITALL)[7:11] == _CONNECTION_START
    except OSError:
        return False


def _accepts(port: int, host: str = "127.0.0.1") -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def _descendants(root: int) -> list[int]:
    """Return the pids below `root`: erl_child_setup and inet_gethost, which live in sessions of their own."""
    children: dict[int, list[int]] = {}
    for pid, parent in _process_table():
        children.setdefault(parent, []).append(pid)
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _process_table() -> list[tuple[int, int]]:
    if not Path("/proc/self/stat").exists():
        listing = subprocess.run(["/bin/ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
        return [(int(pid), int(parent)) for pid, parent in map(str.split, listing.stdout.splitlines())]
    table = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # ended meanwhile
                stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
                table.append((int(entry), int(stat.rpartition(")")[2].split()[1])))
    return table


def _await_end(pids: list[int]) -> None:
    """Helpers end when their pipe to the beam closes; whoever has not within a second is killed."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and any(map(_alive, pids)):
        time.sleep(0.005)
    for pid in filter(_alive, pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # an adopted one
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def _write_private(path: Path, text: str) -> None:
    """Write so that a reader sees all or nothing (the umask keeps others out)."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _redirect_to_null(*descriptors: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(null, descriptor)
    os.close(null)


def _bound_open_files() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses what its kern.maxfilesperproc does not allow
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _read_line() -> bytes:
    """Read the spec byte by byte, so that nothing of a later command is taken with it."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


def main() -> NoReturn:
    os.umask(0o077)
    _adopt_orphans()
    _bound_open_files()
    line = _read_line()
    if not line.endswith(b"\n"):  # the parent died before it said what it wanted
        sys.exit(0)
    spec = json.loads(line)
    if spec["detached"] and os.fork():
        os._exit(0)  # the parent waits for this one; the keeper itself is nobody's child
    keeper = Keeper(spec)
    with contextlib.suppress(_Stop):
        try:
            keeper.serve()
        finally:
            keeper.stop()
    sys.exit(0)


if __name__ == "__main__":
    main()

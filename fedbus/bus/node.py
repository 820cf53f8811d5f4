"""A private, unprivileged RabbitMQ node on free ports: started, stopped and never left behind.

The node belongs to a small keeper process (`_keeper.py`), which ends the broker, its helpers and its epmd as
soon as the process that asked for it is gone, however it went. A detached node (`fedbus broker start`) has
the same keeper, which then lives until `stop_detached`. Whoever holds the lock file of a data folder runs
the node in it: a pid in a file may be stale, a lock cannot be.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import glob
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Self

from fedbus.errors import BrokerMissing, NodeError, UsageError

_USER = "fedbus"
_LOOPBACK = "127.0.0.1"
_NODENAME = "fedbus@localhost"  # part of the data's path: it must not change with the port
_KEEPER = Path(__file__).with_name("_keeper.py")
_SYSTEM_FOLDERS = ("/usr/lib/rabbitmq/bin", "/usr/lib/rabbitmq/sbin")
_BREW_PREFIXES = ("/opt/homebrew", "/usr/local", "/home/linuxbrew/.linuxbrew")
_WAL_BYTES = 64 << 20
# Forward secrecy and authenticated encryption only: of OTP 25's defaults for TLS 1.2 that leaves out CBC and CCM_8.
_CIPHERS = (
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_AES_128_GCM_SHA256",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
    "ECDHE-ECDSA-CHACHA20-POLY1305",
    "ECDHE-RSA-CHACHA20-POLY1305",
    "ECDHE-ECDSA-AES128-GCM-SHA256",
    "ECDHE-RSA-AES128-GCM-SHA256",
)
_ATTEMPTS = 3  # a free port can be lost to somebody else before the broker binds it
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.05
_STATE_FILE = "node.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_INSTALL = (
    "install it (Debian, Ubuntu: apt install rabbitmq-server; macOS: brew install rabbitmq), "
    "or pass --broker URL to use a broker that runs elsewhere"
)


@dataclass(frozen=True, kw_only=True)
class NodeState:
    """A node that runs: where it is (`url` holds the password), and its processes; `started_at` in Unix seconds.

    `port` and `management_port` are on 127.0.0.1; `tls_address` and `tls_port` are where others reach it, if they may.
    """

    url: str = field(repr=False)
    port: int
    tls_address: str | None
    tls_port: int | None
    management_port: int | None
    pid: int
    epmd_pid: int
    epmd_port: int
    keeper_pid: int
    data_dir: Path
    started_at: float


@dataclass(frozen=True, kw_only=True)
class TlsListener:
    """Where other machines reach a node: by TLS 1.2 or 1.3 alone; without TLS it is reached from its own machine only.

    Args:
        address: IP address of this machine to listen at; "0.0.0.0" or "::" for all of them.
        port: None takes a free one.
        ca: PEM file of those whose certificates let users in, by their common name.
        certificate: PEM file, the node's own.
        key: PEM file that goes with it.
        require_certificate: turn away whoever shows no certificate of `ca`, before a word of AMQP is said.
    """

    address: str
    ca: Path
    certificate: Path
    key: Path
    port: int | None = 5671
    require_certificate: bool = True


class PrivateNode:
    """A RabbitMQ node that lives as long as this context manager, sync or async.

    Args:
        port: AMQP port on 127.0.0.1; None takes a free one.
        data_dir: folder that keeps the broker's data; None takes a temporary one, deleted at the end.
        start_timeout_s: seconds within which the broker must answer.
        listener: where other machines reach it, too.
        management_port: of the management API on 127.0.0.1, 0 for a free one; None leaves it out (it takes memory).

    Raises:
        BrokerMissing: RabbitMQ or Erlang is not installed.
        NodeError: the port is taken, the folder is in use, or the broker does not come up.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        data_dir: Path | None = None,
        start_timeout_s: float = _START_TIMEOUT_S,
        listener: TlsListener | None = None,
        management_port: int | None = None,
    ) -> None:
        self._doors = _Doors(port, listener, management_port)
        self._data_dir = data_dir
        self._start_timeout_s = start_timeout_s
        self._keeper: _KeeperProcess | None = None
        self._state: NodeState | None = None
        self._cancelled = False

    def __repr__(self) -> str:
        where = f"port={self._state.port} pid={self._state.pid}" if self._state else "stopped"
        return f"<PrivateNode {where}>"

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    async def __aenter__(self) -> Self:
        self._cancelled = False
        starting = asyncio.ensure_future(asyncio.to_thread(self._start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            # A thread cannot be cancelled: end its keeper, so that it returns at once.
            self._cancelled = True
            if self._keeper is not None:
                self._keeper.terminate()
            await asyncio.wait([starting])
            if starting.exception() is None:
                await asyncio.to_thread(self._stop)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        stopping = asyncio.ensure_future(asyncio.to_thread(self._stop))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            await asyncio.wait([stopping])  # bounded by the stop's own timeout
            raise

    @property
    def state(self) -> NodeState:
        """Everything about the running node; raises `NodeError` when it does not run."""
        if self._state is None:
            raise NodeError("the private node does not run: enter it with `with` or `async with` first")
        return self._state

    @property
    def url(self) -> str:
        """AMQP URL, password included."""
        return self.state.url

    @property
    def port(self) -> int:
        """AMQP port on 127.0.0.1."""
        return self.state.port

    @property
    def pid(self) -> int:
        """Process id of the broker itself (the beam); it changes at `restart`."""
        return self.state.pid

    @property
    def data_dir(self) -> Path:
        """The node's own folder: data, log and settings."""
        return self.state.data_dir

    def kill(self) -> None:
        """SIGKILL the broker (not its keeper), and return when it is gone. Blocks for milliseconds."""
        self._running_keeper().ask("kill")

    def restart(self) -> None:
        """Start the broker again on its ports and data, killing it first where it still runs. Blocks for seconds.

        Raises:
            NodeError: it does not come up again.
        """
        self._state = self._running_keeper().ask_state("start")

    def rabbitmqctl(self, *args: str) -> str:
        """As `rabbitmqctl`, about this node."""
        return rabbitmqctl(self.state, *args)

    def _running_keeper(self) -> _KeeperProcess:
        if self._keeper is None:
            raise NodeError("the private node does not run: enter it with `with` or `async with` first")
        return self._keeper

    def _start(self) -> None:
        if self._keeper is not None:
            raise NodeError("this private node runs already")
        programs = _find_programs()
        _check_doors(self._doors)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return self._start_once(programs)
            except _PortLost:
                if self._doors.are_chosen or attempt == _ATTEMPTS:
                    raise

    def _start_once(self, programs: _Programs) -> None:
        throwaway = self._data_dir is None
        folder = _make_folder(self._data_dir)
        try:
            with _held_lock(folder) as lock:
                if lock is None:
                    raise NodeError(f"another node runs in {folder}: stop it first, or take another folder")
                self._keeper = _KeeperProcess(lock)
            if self._cancelled:
                raise NodeError("cancelled while starting")
            settings = _Settings(
                folder, _choose_ports(self._doors), programs, self._start_timeout_s, self._doors.listener
            )
            self._state = self._keeper.start(settings, throwaway=throwaway)
        except BaseException as error:
            self._stop()
            if throwaway and str(folder) not in str(error):  # it stays only where the message names its log
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _stop(self) -> None:
        keeper, state = self._keeper, self._state
        self._keeper = self._state = None
        if keeper is not None:
            keeper.close()
        if state is not None and self._data_dir is None:
            shutil.rmtree(state.data_dir, ignore_errors=True)  # still there where the keeper itself was killed


def find_rabbitmq() -> Path:
    """Return the `rabbitmq-server` script that runs as any user: `FEDBUS_RABBITMQ` first, then the usual places.

    Raises:
        BrokerMissing: none is installed.
    """
    chosen = os.environ.get("FEDBUS_RABBITMQ")
    if chosen:
        script = Path(chosen) / "rabbitmq-server" if Path(chosen).is_dir() else Path(chosen)
        if not _is_server_script(script):
            raise BrokerMissing(f"FEDBUS_RABBITMQ={chosen} holds no rabbitmq-server: correct it, or unset it")
        return script
    for script in _usual_scripts():
        if _is_server_script(script):
            return script
    raise BrokerMissing(f"RabbitMQ was not found on this machine: {_INSTALL}")


_STILL_STARTS: Final = "requires the 'rabbit' app to be running"
_STARTED_WITHIN_S: Final = 30.0
_ASK_AGAIN_S: Final = 0.5


def rabbitmqctl(state: NodeState, *args: str, stdin: str = "") -> str:
    """What `rabbitmqctl ARGS` prints about a private node. Blocks for a second or two; longer while the node still
    starts, for it takes connections before it takes orders.

    Raises:
        NodeError: the command fails.
    """
    programs = _find_programs()
    command = [os.fspath(programs.script.with_name("rabbitmqctl")), "-n", _NODENAME]
    environment = _tool_environment(state.data_dir, state.epmd_port, programs.path)
    give_up_at = time.monotonic() + _STARTED_WITHIN_S
    while True:
        try:
            return run_rabbitmqctl(command, args, stdin=stdin, environment=environment)
        except NodeError as exc:
            if _STILL_STARTS not in str(exc) or time.monotonic() > give_up_at:
                raise
        time.sleep(_ASK_AGAIN_S)


def run_rabbitmqctl(
    command: Sequence[str], args: Sequence[str], *, stdin: str = "", environment: Mapping[str, str] | None = None
) -> str:
    """What `command`, some rabbitmqctl, prints when it is given `args` and, where others must not see it, `stdin`.

    Raises:
        NodeError: the command fails.
    """
    done = subprocess.run([*command, "-q", *args], env=environment, input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        raise NodeError(f"rabbitmqctl {args[0]} failed: {' '.join((done.stderr or done.stdout).split())[:300]}")
    return done.stdout


def start_detached(
    *,
    name: str = "default",
    port: int | None = None,
    listener: TlsListener | None = None,
    management_port: int | None = None,
) -> NodeState:
    """Start the node `name`, which outlives this process; return it as it is when it runs already.

    The other arguments are those of `PrivateNode`.

    Its data lies under `$XDG_STATE_HOME/fedbus/broker/<name>` and survives `stop_detached`.

    Raises:
        BrokerMissing: RabbitMQ or Erlang is not installed.
        NodeError: the port is taken, or the broker does not come up.
    """
    folder = _make_folder(detached_folder(name))
    doors = _Doors(port, listener, management_port)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        with _held_lock(folder) as lock:
            if lock is not None:
                _clear_stale(folder)
                return _start_detached_in(folder, doors, lock)
        state = _live_state(folder)
        if state is not None:
            _check_runs_as_asked(name, state, doors)
            return state
        if time.monotonic() > deadline:
            raise NodeError(f"somebody else is starting a node in {folder}, and does not come to an end")
        time.sleep(_POLL_S)


def stop_detached(name: str = "default") -> bool:
    """Stop the node `name` and wait for its end; False when it did not run. Its data stays."""
    state = detached_state(name)
    if state is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(state.keeper_pid, signal.SIGTERM)
    folder = detached_folder(name)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while _locked(folder):
        if time.monotonic() > deadline:
            raise NodeError(f"the broker {name!r} does not stop: end its keeper with kill -9 {state.keeper_pid}")
        time.sleep(_POLL_S)
    return True


def detached_state(name: str = "default") -> NodeState | None:
    """Return the running node `name`, or None; what a dead one left behind is cleared away."""
    folder = detached_folder(name)
    if not folder.is_dir():
        return None
    with _held_lock(folder) as lock:
        if lock is not None:
            _clear_stale(folder)
            return None
    return _live_state(folder)


def _check_runs_as_asked(name: str, state: NodeState, doors: _Doors) -> None:
    if doors.port not in (None, state.port):
        raise NodeError(f"the broker {name!r} runs on port {state.port} already: stop it first")
    if doors.management_port not in (None, 0, state.management_port):
        raise NodeError(f"the broker {name!r} runs without the management API on that port: stop it first")
    listener = doors.listener
    if listener is None:
        return
    if listener.address != state.tls_address or listener.port not in (None, state.tls_port):
        where = "no other machine" if state.tls_address is None else f"{state.tls_address}, port {state.tls_port}"
        raise NodeError(f"the broker {name!r} runs already and listens to {where}: stop it first")


class _PortLost(NodeError):
    """Somebody else took a port between our choice and the broker's bind."""


@dataclass(frozen=True)
class _Programs:
    script: Path
    epmd: str
    path: str


@dataclass(frozen=True)
class _Doors:
    """Where the node is to be reached, as it was asked for."""

    port: int | None = None
    listener: TlsListener | None = None
    management_port: int | None = None

    @property
    def are_chosen(self) -> bool:
        """Whether a port is not ours to change when somebody else has it."""
        return bool(self.port or self.management_port or (self.listener is not None and self.listener.port))


@dataclass(frozen=True)
class _Ports:
    amqp: int
    distribution: int
    epmd: int
    tls: int | None = None
    management: int | None = None


@dataclass(frozen=True)
class _Settings:
    folder: Path
    ports: _Ports
    programs: _Programs
    start_timeout_s: float
    listener: TlsListener | None = None


class _KeeperProcess:
    """Our end of the keeper: one JSON line out, one JSON line back."""

    def __init__(self, lock: int) -> None:
        # -I -S: nothing of the user's Python settings, no site-packages, and a start within tens of milliseconds.
        # Its own session: Ctrl-C at the terminal is for us; the keeper ends after us. It inherits the lock.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_KEEPER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            pass_fds=(lock,),
        )
        self._settings: _Settings | None = None

    def start(self, settings: _Settings, *, throwaway: bool = False, state_file: Path | None = None) -> NodeState:
        self._settings = settings
        try:
            password = _prepare(settings)
        except OSError as error:
            raise NodeError(f"the broker's folder {settings.folder} cannot be written: {error}") from error
        ports = settings.ports
        url = f"amqp://{_USER}:{password}@127.0.0.1:{ports.amqp}/"
        spec = {
            "parent": os.getpid(),
            "folder": str(settings.folder),
            "script": str(settings.programs.script),
            "epmd": settings.programs.epmd,
            "port": ports.amqp,
            "epmd_port": ports.epmd,
            "other_doors": _other_doors(settings),
            "env": _environment(settings),
            "start_timeout_s": settings.start_timeout_s,
            "throwaway": throwaway,
            "graceful": not throwaway,
            "detached": state_file is not None,
            "state_file": str(state_file),
            "state": {
                "url": url,
                "port": ports.amqp,
                "tls_address": None if settings.listener is None else settings.listener.address,
                "tls_port": ports.tls,
                "management_port": ports.management,
                "epmd_port": ports.epmd,
                "data_dir": str(settings.folder),
            },
        }
        return self.ask_state(json.dumps(spec))

    def ask_state(self, line: str) -> NodeState:
        answer = self.ask(line)
        if answer["event"] == "ready":
            return _parse_state(answer["state"])
        assert self._settings is not None
        raise _boot_error(self._settings, str(answer["reason"]))

    def ask(self, line: str) -> dict[str, Any]:
        try:
            answer = self._send(line)
        except OSError as error:
            raise NodeError("the keeper of the private node is gone") from error
        if not answer:
            raise NodeError("the keeper of the private node ended before the broker was ready")
        return dict(json.loads(answer))

    def terminate(self) -> None:
        self._process.terminate()

    def close(self) -> None:
        """End the keeper and wait until it has taken its node down."""
        self._close(self._process.stdin)
        self.terminate()  # a fork of ours may hold its input open
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._drain()

    def detach(self) -> None:
        """Let go of a keeper that is ready: it lives on without us."""
        self._close(self._process.stdin)
        self._process.wait()  # the intermediate process, see `_keeper.main`
        self._drain()

    def _drain(self) -> None:
        """Read to the end, which comes when the keeper ends or is ready and detached."""
        assert self._process.stdout is not None
        self._process.stdout.read()
        self._process.stdout.close()

    def _send(self, line: str) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    @staticmethod
    def _close(pipe: IO[bytes] | None) -> None:
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes to a keeper that is gone
                pipe.close()


def _start_detached_in(folder: Path, doors: _Doors, lock: int) -> NodeState:
    programs = _find_programs()
    _check_doors(doors)
    for attempt in range(1, _ATTEMPTS + 1):
        settings = _Settings(folder, _choose_ports(doors), programs, _START_TIMEOUT_S, doors.listener)
        try:
            return _start_keeper_of_its_own(settings, lock)
        except _PortLost:
            if doors.are_chosen or attempt == _ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def _start_keeper_of_its_own(settings: _Settings, lock: int) -> NodeState:
    keeper = _KeeperProcess(lock)
    try:
        state = keeper.start(settings, state_file=settings.folder / _STATE_FILE)
    except BaseException:
        keeper.close()
        raise
    keeper.detach()
    return state


def _find_programs() -> _Programs:
    script = find_rabbitmq()
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_erlang_folders(script)])
    erl, epmd = shutil.which("erl", path=path), shutil.which("epmd", path=path)
    if erl is None:
        raise BrokerMissing(f"{script} needs Erlang, and no `erl` is on PATH: install it with RabbitMQ's package")
    if epmd is None:
        beside = sorted(glob.glob(str(Path(erl).resolve().parents[1] / "erts-*" / "bin" / "epmd")))
        if not beside:
            raise BrokerMissing(f"Erlang's `epmd` is neither on PATH nor beside {erl}: reinstall Erlang")
        epmd = beside[-1]
    try:
        socket.gethostbyname("localhost")  # the node's own name; Erlang takes a minute to find out
    except OSError as error:
        raise NodeError(
            "this machine does not know 'localhost': add the line '127.0.0.1 localhost' to /etc/hosts"
        ) from error
    return _Programs(script, epmd, path)


def _erlang_folders(script: Path) -> list[str]:
    """Folders that a login shell has and a bare PATH may lack; Homebrew keeps versioned Erlangs out of PATH."""
    folders = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/lib/erlang/bin", str(script.parents[1] / "bin")]
    for prefix in _brew_prefixes():
        folders += [f"{prefix}/bin", *sorted(glob.glob(f"{prefix}/opt/erlang*/bin"), reverse=True)]
    return folders


def _brew_prefixes() -> list[str]:
    chosen = os.environ.get("HOMEBREW_PREFIX")
    return [chosen, *_BREW_PREFIXES] if chosen else list(_BREW_PREFIXES)


def _usual_scripts() -> Iterator[Path]:
    for folder in _SYSTEM_FOLDERS:
        yield Path(folder) / "rabbitmq-server"
    for prefix in _brew_prefixes():
        yield Path(prefix) / "opt/rabbitmq/sbin/rabbitmq-server"
    for folder in os.get_exec_path():
        yield (Path(folder) / "rabbitmq-server").resolve()


def _is_server_script(script: Path) -> bool:
    """Tell the real script from the packages' wrappers, which refuse other users: it has its settings beside it."""
    return (
        script.name == "rabbitmq-server"
        and os.access(script, os.X_OK)
        and script.is_file()
        and script.with_name("rabbitmq-env").is_file()
    )


def _make_folder(data_dir: Path | None) -> Path:
    try:
        if data_dir is None:
            return Path(tempfile.mkdtemp(prefix="fedbus-node-")).resolve()
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        data_dir.chmod(0o700)
        return data_dir.resolve()
    except OSError as error:
        raise NodeError(f"the broker's folder cannot be made: {error}") from error


@contextlib.contextmanager
def _held_lock(folder: Path) -> Iterator[int | None]:
    """Hold the folder's lock while inside, and longer where a keeper inherits it; None when it is taken."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def _locked(folder: Path) -> bool:
    with _held_lock(folder) as lock:
        return lock is None


def _check_doors(doors: _Doors) -> None:
    _check_port("--port", doors.port)
    _check_port("--management-port", doors.management_port or None)
    if doors.listener is not None:
        check_address(doors.listener.address)
        _check_port("--tls-port", doors.listener.port, doors.listener.address)
        for file in (doors.listener.ca, doors.listener.certificate, doors.listener.key):
            if not os.access(file, os.R_OK):
                raise NodeError(f"{file} cannot be read: the node needs it for TLS")


def check_address(address: str) -> None:
    """Raise `UsageError` or `NodeError` unless this machine can listen at `address`."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise UsageError(
            f"--listen {address[:80]!r} is no IP address: take one of this machine, or 0.0.0.0 for all of them"
        ) from None
    try:
        _bind(0, address).close()
    except OSError as error:
        raise NodeError(f"this machine has no address {address}: 'ip address' shows those it has") from error


def _check_port(option: str, port: int | None, address: str = _LOOPBACK) -> None:
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise UsageError(f"port {port} does not exist: take one of 1 to 65535, or none for a free one")
    try:
        _bind(port, address).close()
    except PermissionError as error:
        raise NodeError(f"port {port} needs root: take one above 1023, or none for a free one") from error
    except OSError as error:
        raise NodeError(f"port {port} on {address} is taken by another program: pass another {option}") from error


def _choose_ports(doors: _Doors) -> _Ports:
    with contextlib.ExitStack() as held:  # held together, so that they differ

        def free(address: str = _LOOPBACK) -> int:
            return int(held.enter_context(_bind(0, address)).getsockname()[1])

        tls, management = None, doors.management_port
        if doors.listener is not None:
            tls = doors.listener.port or free(doors.listener.address)
        if management is not None:
            management = management or free()
        return _Ports(amqp=doors.port or free(), distribution=free(), epmd=free(), tls=tls, management=management)


def _bind(port: int, address: str = _LOOPBACK) -> socket.socket:
    """Bind a chosen port as the broker will: connections that linger in TIME_WAIT do not count as taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(port != 0))
        listener.bind((address, port))
    except OSError:
        listener.close()
        raise
    return listener


def _prepare(settings: _Settings) -> str:
    """Write the node's settings and return its password."""
    folder = settings.folder
    (folder / "log").mkdir(exist_ok=True, mode=0o700)
    (folder / "conf.d").mkdir(exist_ok=True, mode=0o700)
    for log in _logs(folder):
        if log.exists():
            log.replace(log.with_suffix(".previous"))  # a boot error is looked for in this boot's log
    password = _secret(folder / "password")
    _secret(folder / ".erlang.cookie")  # the node's HOME: the user's own cookie is neither read nor written
    _write_private(folder / "enabled_plugins", f"[{','.join(_plugins(settings))}].\n")
    _write_private(folder / "advanced.config", "[].\n")
    _write_private(
        folder / "rabbitmq.conf",
        f"listeners.tcp.1 = 127.0.0.1:{settings.ports.amqp}\n"
        f"default_user = {_USER}\n"
        f"default_pass = {password}\n"
        # 24 h instead of 30 min: a delivery is acknowledged only when its round is committed
        "consumer_timeout = 86400000\n"
        "disk_free_limit.absolute = 50MB\n"
        "max_message_size = 16777216\n"  # what RabbitMQ 4 allows; parts are about 1 MiB
        # The log of the quorum queues lies in memory, too, and then once more while it is moved: 512 MiB by default.
        f"raft.wal_max_size_bytes = {_WAL_BYTES}\n"
        "log.console = false\n"
        "log.file.level = warning\n" + _listening(settings),
    )
    return password


def _plugins(settings: _Settings) -> list[str]:
    wanted = {
        "rabbitmq_auth_mechanism_ssl": settings.listener is not None,
        "rabbitmq_management": settings.ports.management is not None,
    }
    return [plugin for plugin, is_wanted in wanted.items() if is_wanted]


def _listening(settings: _Settings) -> str:
    """The settings of all doors but the one that is always there."""
    lines = []
    if settings.ports.management is not None:
        lines += [f"management.tcp.ip = {_LOOPBACK}", f"management.tcp.port = {settings.ports.management}"]
    if settings.listener is not None:
        lines += [
            f"listeners.ssl.1 = {settings.listener.address}:{settings.ports.tls}",
            f"ssl_options.cacertfile = {settings.listener.ca}",
            f"ssl_options.certfile = {settings.listener.certificate}",
            f"ssl_options.keyfile = {settings.listener.key}",
            "ssl_options.verify = verify_peer",
            f"ssl_options.fail_if_no_peer_cert = {str(settings.listener.require_certificate).lower()}",
            "ssl_options.versions.1 = tlsv1.3",
            "ssl_options.versions.2 = tlsv1.2",
            "ssl_options.client_renegotiation = false",
            *(f"ssl_options.ciphers.{number} = {cipher}" for number, cipher in enumerate(_CIPHERS, 1)),
            "auth_mechanisms.1 = EXTERNAL",
            "auth_mechanisms.2 = PLAIN",
            "ssl_cert_login_from = common_name",
            # The node's own administrator comes from this machine alone.
            f"loopback_users.{_USER} = true",
        ]
    return "".join(f"{line}\n" for line in lines)


def _secret(path: Path) -> str:
    """Return the secret in `path`, made at the first start: the broker's database remembers that one."""
    if not path.exists():
        _write_private(path, secrets.token_urlsafe(24))
    path.chmod(0o600)
    return path.read_text()


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _other_doors(settings: _Settings) -> list[tuple[str, int]]:
    """Host and port of the listeners that come up after the first; one at all addresses is reached at loopback."""
    doors = []
    if settings.listener is not None and settings.ports.tls is not None:
        address = settings.listener.address
        doors.append(({"0.0.0.0": _LOOPBACK, "::": "::1"}.get(address, address), settings.ports.tls))
    if settings.ports.management is not None:
        doors.append((_LOOPBACK, settings.ports.management))
    return doors


def _tool_environment(folder: Path, epmd_port: int, path: str) -> dict[str, str]:
    """Our environment without what would lead RabbitMQ's programs to another node, and with what leads to this one."""
    foreign = ("RABBITMQ_", "ERL_", "XDG_", "NOTIFY_", "LISTEN_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return {
        **inherited,
        "HOME": str(folder),
        "PATH": path,
        "ERL_CRASH_DUMP_SECONDS": "0",
        "ERL_EPMD_PORT": str(epmd_port),
        "ERL_EPMD_ADDRESS": _LOOPBACK,
        "RABBITMQ_CONF_ENV_FILE": os.devnull,
        "RABBITMQ_NODENAME": _NODENAME,
    }


def _environment(settings: _Settings) -> dict[str, str]:
    """The broker's own environment."""
    folder, ports = settings.folder, settings.ports
    return {
        **_tool_environment(folder, ports.epmd, settings.programs.path),
        "RUNNING_UNDER_SYSTEMD": "true",  # the script execs the beam: its pid is the one we started
        "RABBITMQ_DIST_PORT": str(ports.distribution),
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_CONFIG_FILES": str(folder / "conf.d"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        # -fedbus PORT does nothing but mark the process as ours, see `_clear_stale`
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (f"-kernel inet_dist_use_interface {{127,0,0,1}} -fedbus {ports.amqp}"),
    }


def _boot_error(settings: _Settings, reason: str) -> NodeError:
    """Say in one line why the broker did not come up; a lost port is an error of its own, for a retry."""
    candidates = _logs(settings.folder)
    log, line = next(((path, line) for path in candidates if (line := _telling_line(path))), (candidates[-1], ""))
    if re.search(r"eaddrinuse|in use by another", reason + line):
        return _PortLost(
            f"port {settings.ports.amqp} or its companions were taken by another program while the broker "
            "started: try again, pass another --port, or none for a free one"
        )
    return NodeError(f"the broker did not start ({reason}); {log} says: {line or 'nothing'}")


def _logs(folder: Path) -> list[Path]:
    return [folder / "log" / f"{_NODENAME}.log", folder / "log" / "console.log"]


def _telling_line(log: Path) -> str:
    """Return the first error in the log that has words of its own, else the last line."""
    if not log.exists():
        return ""
    lines = log.read_text(errors="replace").splitlines()
    errors = (line.split("[error]", 1)[1] for line in lines if "[error]" in line)
    texts = (re.sub(r"^\s*<[\d.]+>", "", error).strip() for error in errors)
    telling = (text for text in texts if re.search(r"[a-z]{3}", text))
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return next(telling, last)[:300]


def detached_folder(name: str) -> Path:
    """Where the detached node `name` keeps its data and secrets, whether it exists or not."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"broker name {name[:80]!r} cannot be used: take letters, digits, '.', '_' or '-', at most 64")
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "fedbus" / "broker" / name


def _parse_state(fields: dict[str, Any]) -> NodeState:
    return NodeState(**{**fields, "data_dir": Path(fields["data_dir"])})


def _read_state(folder: Path) -> NodeState | None:
    try:
        return _parse_state(json.loads((folder / _STATE_FILE).read_text()))
    except (FileNotFoundError, ValueError, TypeError, KeyError):  # also one that another version wrote
        return None


def _live_state(folder: Path) -> NodeState | None:
    """Return the state of a keeper that lives; None while one is still starting."""
    state = _read_state(folder)
    return state if state is not None and _command_line(state.keeper_pid) else None


def _clear_stale(folder: Path) -> None:
    """End what a killed keeper left running, and forget it. Only for the holder of the lock.

    On Linux the kernel has told the processes to end (see `_keeper._die_with_parent`), and they may be at it.
    """
    state = _read_state(folder)
    if state is None:
        return
    for pid, mark in ((state.pid, f"-fedbus {state.port} "), (state.epmd_pid, "epmd -port ")):
        _kill_marked(pid, mark)
    (folder / _STATE_FILE).unlink(missing_ok=True)


def _kill_marked(pid: int, mark: str) -> None:
    """SIGKILL the process while its command line has the mark: the pid alone may be another's by now."""
    deadline = time.monotonic() + 5.0
    while mark in _command_line(pid) and time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _command_line(pid: int) -> str:
    """Return the command line of a process, arguments ended by spaces; "" when it is gone."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    listing = subprocess.run(["/bin/ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, text=True)
    return f"{listing.stdout.strip()} ".lstrip()

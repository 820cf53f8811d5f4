"""A provisioned federation on a private node, with a server and honest clients in processes of their own."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from fedbus.bus.bundle import Bundle
from fedbus.bus.node import PrivateNode
from fedbus.provision.admin import Rabbitmqctl
from fedbus.provision.federation import Desk, provision
from fedbus.provision.records import Office
from tests.faults.fleet import Log, Stalled
from tests.hostile import field_app
from tests.hostile.field_app import HONEST

FEDERATION = "fed"
_ROOT = Path(__file__).resolve().parents[2]
_APP = f"{Path(field_app.__file__).resolve()}:app"
_FEDBUS = Path(sys.executable).with_name("fedbus")
_POLL_S = 0.01
_KILOBYTE = 1024


class Ground:
    """The place of the attacks; a context manager that leaves no process behind.

    Args:
        folder: for bundles, the run folder and logs.
        node: the broker.
        hostile: ids of the clients that attack; they are provisioned as the honest ones are.
        settings: environment of the app, see `field_app`.
    """

    def __init__(self, folder: Path, node: PrivateNode, hostile: Sequence[str], **settings: object) -> None:
        self.folder = folder
        self.node = node
        self.hostile = tuple(hostile)
        self.run_dir = folder / "run"
        self._env = {
            **{key: text for key, text in os.environ.items() if not key.startswith("FEDBUS_")},
            **{f"HOSTILE_{name.upper()}": str(value) for name, value in settings.items()},
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._urls: dict[str, str] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = Log(folder / "server.log")
        self._lock = threading.Lock()
        self.told: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self._provision()
            self.server = self._start("server", str(_FEDBUS), "server", _APP, "--run-dir", str(self.run_dir),
                                      "--log-json", "--broker", self.url("server"))  # fmt: skip
            urls = [self.url(each) for each in HONEST]
            self.honest = self._start("honest", sys.executable, "-m", "tests.hostile.field_app", *urls)
            self.until("round_closed", timeout_s=60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _provision(self) -> None:
        desk = Desk(
            admin=Rabbitmqctl.of_private_node(self.node.state),
            office=Office(self.folder / "office"),
            now=datetime.datetime.now(datetime.UTC),
        )
        clients = [*HONEST, *self.hostile]
        issue = provision(
            desk, FEDERATION, clients, hosts=["127.0.0.1"], login="password", folder=self.folder / "bundles"
        )
        for path in issue.bundles.values():
            bundle = Bundle.load(path)
            parts = urlsplit(bundle.access.urls)
            login = parts.netloc.rpartition("@")[0]
            # Over loopback in the clear: TLS would slow the attackers down.
            self._urls[bundle.client_id or bundle.role] = f"amqp://{login}@127.0.0.1:{self.node.port}{parts.path}"

    def url(self, who: str) -> str:
        """The broker URL of a member, password included."""
        return self._urls[who]

    def user(self, who: str) -> str:
        """The broker's user of a member."""
        return f"{FEDERATION}.{who}"

    def _start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self._env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)
        return process

    # ---- watch ---------------------------------------------------------------------------------------------------

    def look(self) -> list[dict[str, Any]]:
        """All that the server has told so far. Raises `Stalled` when it has died."""
        with self._lock:
            self.told += self._log.read()
        if self.server.poll() is not None:
            raise Stalled(f"the server ended: {self._log.path.read_text()[-2000:]}")
        return self.told

    def until(self, event: str, since: int = 0, timeout_s: float = 20.0, **fields: object) -> dict[str, Any]:
        """Wait for an event behind the first `since`: whose fields are these, or hold the text that is given."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            for told in self.look()[since:]:
                if told.get("event") == event and all(_fits(told.get(key), value) for key, value in fields.items()):
                    return told
            if time.monotonic() > give_up_at:
                last = [told.get("message") for told in self.told[-3:]]
                raise Stalled(f"no {event} {fields} within {timeout_s:.0f} s; the server's last words: {last}")
            time.sleep(_POLL_S)

    def rounds_go_on(self, count: int = 1, timeout_s: float = 30.0) -> None:
        """Wait until `count` more rounds are committed with the updates of all honest clients."""
        since = len(self.look())
        for _ in range(count):
            told = self.until("round_closed", since, reason="min_fit_clients", timeout_s=timeout_s)
            since = self.told.index(told) + 1

    def broker_log(self) -> str:
        """What the broker itself has written down."""
        return "".join(path.read_text(errors="replace") for path in (self.node.data_dir / "log").glob("*.log"))


def _fits(found: object, wanted: object) -> bool:
    return wanted in found if isinstance(wanted, str) and isinstance(found, str) else found == wanted


def resident_mib(pid: int) -> float:
    """Memory that a process has now, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / _KILOBYTE
    return 0.0


class PeakWatch:
    """The most memory that some processes have while it is open."""

    def __init__(self, **pids: int) -> None:
        self._pids = pids
        self.before = {name: resident_mib(pid) for name, pid in pids.items()}
        self.peak = dict(self.before)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            for name, pid in self._pids.items():
                self.peak[name] = max(self.peak[name], resident_mib(pid))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

"""Three RabbitMQ nodes on this machine, one cluster; each can be killed and started again.

The first boots alone, then the others at the same time, with the first in their settings (RabbitMQ's classic peer
discovery): nodes that form a cluster while all of them boot now and then fail to. That takes one epmd for all, which
`PrivateNode`, one node with an epmd of its own, is not made for: only its settings are taken from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from fedbus.bus import node as private
from fedbus.bus._keeper import _descendants, _speaks_amqp
from fedbus.errors import NodeError

_BOOT_S = 60.0
_POLL_S = 0.05


class Cluster:
    """A context manager for a cluster of `size` nodes; `seconds` is what the start took."""

    def __init__(self, size: int = 3) -> None:
        self._programs = private._find_programs()
        self._folder = Path(tempfile.mkdtemp(prefix="fedbus-cluster-")).resolve()
        self._epmd: subprocess.Popen[bytes] | None = None
        self._nodes = [_Node(self._folder, number, self._programs) for number in range(1, size + 1)]
        self._vhost = ""
        self.seconds = 0.0

    def __enter__(self) -> Self:
        started_at = time.monotonic()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        self.seconds = time.monotonic() - started_at
        return self

    def __exit__(self, *_: object) -> None:
        for node in self._nodes:
            node.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def url(self) -> str:
        """The URLs of all nodes, with commas between them."""
        return ",".join(map(self.url_of, range(len(self))))

    def url_of(self, index: int) -> str:
        return self._nodes[index].url + self._vhost

    def use_vhost(self, name: str) -> None:
        """Make a new vhost; from now on URLs and queues are its own."""
        rights = {"user": private._USER, "vhost": name, "configure": ".*", "write": ".*", "read": ".*"}
        definitions = self._folder / "vhost.json"
        definitions.write_text(json.dumps({"vhosts": [{"name": name}], "permissions": [rights]}))
        self.ctl("import_definitions", str(definitions))
        self._vhost = name

    @property
    def names(self) -> list[str]:
        return [node.name for node in self._nodes]

    def kill(self, index: int) -> None:
        """SIGKILL one node; returns when it is gone."""
        self._nodes[index].kill()

    def restart(self, index: int) -> None:
        """Start a killed node again, and wait until it answers and is back in the cluster."""
        self._nodes[index].spawn()
        self._nodes[index].await_amqp()
        self._await_whole()

    def await_replicas(self, *queues: str) -> list[int]:
        """Wait until each of them has a leader, and a replica that keeps up on every node: who leads them.

        Killing any node costs nothing then. Each look takes rabbitmqctl a second: ask for all queues at once.
        """
        leaders: list[str] = []

        def are_whole() -> bool:
            rows = self._queues()
            leaders[:] = [str(rows.get(queue, {}).get("leader")) for queue in queues]
            online = [len(rows.get(queue, {}).get("online") or []) for queue in queues]
            return set(leaders) <= set(self.names) and online == [len(self)] * len(queues)

        _await(are_whole, f"replicas of {', '.join(queues)} on all nodes")
        return [self.names.index(leader) for leader in leaders]

    def ctl(self, *arguments: str, index: int | None = None) -> str:
        """Run rabbitmqctl against a node (the first living one when none is named); what it printed."""
        node = self._living() if index is None else self._nodes[index]
        return node.ctl(*arguments)

    # ---- boot ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        first = self._nodes[0]
        self._epmd = subprocess.Popen(
            [self._programs.epmd, "-port", str(first.ports.epmd), "-address", "127.0.0.1"],
            env=first.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for node in self._nodes:
            node.ports = private._Ports(node.ports.amqp, node.ports.distribution, first.ports.epmd)
            node.prepare(self.names[0])
        for together in (self._nodes[:1], self._nodes[1:]):
            for node in together:
                node.spawn()
            for node in together:
                node.await_amqp()
        self._await_whole()

    def _await_whole(self) -> None:
        """Each living node must see the others, or a quorum queue that is declared now has fewer members."""
        living = [node for node in self._nodes if node.is_alive]
        names = {node.name for node in living}
        _await(lambda: self._running() >= names, f"a cluster of {sorted(names)}")

    def _running(self) -> set[str]:
        status: dict[str, Any] = json.loads(self._living().ctl("cluster_status", "--formatter", "json"))
        return set(status["running_nodes"])

    def _living(self) -> _Node:
        return next(node for node in self._nodes if node.is_alive)

    def _queues(self) -> dict[str, dict[str, Any]]:
        listing = self.ctl("list_queues", "-p", self._vhost or "/", "name", "leader", "online", "--formatter", "json")
        return {row["name"]: row for row in json.loads(listing)}


class _Node:
    """One member: its folder, its ports, its processes."""

    def __init__(self, base: Path, number: int, programs: private._Programs) -> None:
        self.name = f"fedbus{number}@localhost"
        self.folder = base / f"node-{number}"
        self.folder.mkdir(mode=0o700)
        self.ports = private._choose_ports(private._Doors())
        self.url = ""
        self._programs = programs
        self._beam: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {**private._environment(self._settings()), "RABBITMQ_NODENAME": self.name}

    @property
    def is_alive(self) -> bool:
        return self._beam is not None and self._beam.poll() is None

    def _settings(self) -> private._Settings:
        return private._Settings(self.folder, self.ports, self._programs, _BOOT_S)

    def prepare(self, first: str) -> None:
        """Write the settings of one private node, then those of the cluster; all share password and cookie."""
        for secret in ("password", ".erlang.cookie"):
            if self.name != first:
                shutil.copy(self.folder.parent / "node-1" / secret, self.folder / secret)
        password = private._prepare(self._settings())
        self.url = f"amqp://{private._USER}:{password}@127.0.0.1:{self.ports.amqp}/"
        if self.name == first:
            return
        with (self.folder / "rabbitmq.conf").open("a") as settings:
            settings.write(
                "cluster_formation.peer_discovery_backend = classic_config\n"
                f"cluster_formation.classic_config.nodes.1 = {first}\n"
                f"cluster_formation.classic_config.nodes.2 = {self.name}\n"
            )

    def spawn(self) -> None:
        with (self.folder / "log" / "console.log").open("ab") as log:
            self._beam = subprocess.Popen(
                [self._programs.script],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def await_amqp(self) -> None:
        _await(self._answers, f"{self.name} answers")

    def _answers(self) -> bool:
        if not self.is_alive:
            log = self.folder / "log" / "console.log"
            raise NodeError(f"{self.name} did not start: {log.read_text(errors='replace')[-600:]}")
        return _speaks_amqp(self.ports.amqp)

    def kill(self) -> None:
        """SIGKILL the beam and whatever it had started."""
        beam, self._beam = self._beam, None
        if beam is None:
            return
        helpers = _descendants(beam.pid) if beam.poll() is None else []
        beam.kill()
        beam.wait()
        for pid in helpers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ctl(self, *arguments: str) -> str:
        script = self._programs.script.with_name("rabbitmqctl")
        command = [str(script), "-q", "-n", self.name, *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise NodeError(f"rabbitmqctl {arguments[0]} failed: {done.stderr.strip()[-400:]}")
        return done.stdout


def _await(condition: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + _BOOT_S
    while not condition():
        if time.monotonic() > give_up_at:
            raise NodeError(f"{what}: not within {_BOOT_S:.0f} s")
        time.sleep(_POLL_S)

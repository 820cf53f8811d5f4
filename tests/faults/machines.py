"""Several machines on one host: network namespaces with addresses of their own, on a switch whose cables can be pulled.

    switch  a bridge in a namespace of its own: the host's network is not touched
    NAME    10.77.0.N on eth0, a veth pair whose other end is a port of the switch

Needs root, iproute2 and iptables. Namespaces are named after the process that made them: what a killed one left behind,
processes included, is removed by the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Self

_NAMESPACES = Path("/run/netns")
_NAME = re.compile(r"fedbus-(?P<pid>\d+)-(?P<machine>[a-z0-9]+)")
_SWITCH = "switch"
_BRIDGE = "br0"
_DEVICE = "eth0"
_QUEUED_MS = 400


def missing_for_machines() -> str:
    """What keeps this host from having machines, for people; "" when nothing does."""
    programs = [program for program in ("ip", "iptables", "tc") if shutil.which(program) is None]
    if programs:
        return f"there is no {programs[0]} on this host (iproute2, iptables)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"fedbus-{os.getpid()}-trial"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode != 0:
        return f"this host makes no network namespaces: {done.stderr.strip()}"
    _delete(name)
    return ""


class Machine:
    """One of them; made by `Network`."""

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.namespace = _namespace(name)
        self.address = f"10.77.0.{number}"
        self._port = f"port{number}"
        self._is_dropping = False

    def __repr__(self) -> str:
        return f"<Machine {self.name} {self.address}>"

    def command(self, *arguments: str) -> list[str]:
        """`arguments` as a command line that runs on this machine; it becomes that very process, with its pid."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def cut(self, *, silently: bool = False) -> None:
        """Let nothing through any more, either way: pull the cable, or drop each packet behind one that is in."""
        if silently:
            self._is_dropping = True
            self._firewall("-A")
        else:
            _ip("-n", _namespace(_SWITCH), "link", "set", self._port, "down")

    def heal(self) -> None:
        """Undo `cut`."""
        if self._is_dropping:
            self._is_dropping = False
            self._firewall("-D")
        _ip("-n", _namespace(_SWITCH), "link", "set", self._port, "up")

    def limit(self, bytes_per_s: int | None) -> None:
        """Bound what it sends; None: no bound."""
        if bytes_per_s is None:
            _run(*self.command("tc", "qdisc", "delete", "dev", _DEVICE, "root"))
            return
        bound = ("rate", f"{8 * bytes_per_s}bit", "burst", "64kb", "latency", f"{_QUEUED_MS}ms")
        _run(*self.command("tc", "qdisc", "replace", "dev", _DEVICE, "root", "tbf", *bound))

    def bytes_sent(self) -> int:
        """What has left it so far."""
        (device,) = json.loads(_run("ip", "-json", "-statistics", "-n", self.namespace, "link", "show", _DEVICE))
        return int(device["stats64"]["tx"]["bytes"])

    def _firewall(self, action: str) -> None:
        for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
            _run(*self.command("iptables", "-w", action, chain, way, _DEVICE, "-j", "DROP"))

    def _connect(self) -> None:
        switch = _namespace(_SWITCH)
        _add(self.namespace)
        _ip(
            "link", "add", _DEVICE, "netns", self.namespace, "type", "veth", "peer", "name", self._port, "netns", switch
        )
        _ip("-n", switch, "link", "set", self._port, "master", _BRIDGE, "up")
        _ip("-n", self.namespace, "address", "add", f"{self.address}/24", "dev", _DEVICE)
        for device in ("lo", _DEVICE):
            _ip("-n", self.namespace, "link", "set", device, "up")


class Network:
    """Machines called `names`, all on one switch; a context manager that leaves nothing behind."""

    def __init__(self, *names: str) -> None:
        self.machines = {name: Machine(name, number) for number, name in enumerate(names, 1)}

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]

    def __enter__(self) -> Self:
        remove_stale()
        try:
            _add(_namespace(_SWITCH))
            _ip("-n", _namespace(_SWITCH), "link", "add", _BRIDGE, "type", "bridge")
            _ip("-n", _namespace(_SWITCH), "link", "set", _BRIDGE, "up")
            for machine in self.machines.values():
                machine._connect()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (*self.machines, _SWITCH):
            _delete(_namespace(name))


def remove_stale() -> None:
    """Remove the namespaces of processes that are no more, and end what still runs in them."""
    for name in _stale():
        for pid in _run("ip", "netns", "pids", name, check=False).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _delete(name)


def _stale() -> Iterator[str]:
    for path in sorted(_NAMESPACES.glob("fedbus-*")):
        match = _NAME.fullmatch(path.name)
        if match is not None and not Path(f"/proc/{match['pid']}").exists():
            yield path.name


def _namespace(machine: str) -> str:
    return f"fedbus-{os.getpid()}-{machine}"


def _add(namespace: str) -> None:
    _delete(namespace)  # that of a dead process whose pid is ours now
    _ip("netns", "add", namespace)


def _delete(namespace: str) -> None:
    if (_NAMESPACES / namespace).exists():
        _run("ip", "netns", "delete", namespace, check=False)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout

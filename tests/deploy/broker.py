"""A RabbitMQ that runs with the files in `deploy/`, on free ports of this machine.

The settings are those of the operators, letter by letter, but for paths and ports. `PrivateNode` cannot be used for
that: it speaks plain AMQP and has no plugins. Only its surroundings are taken from there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from fedbus.bus import node as private
from fedbus.bus._keeper import _descendants
from fedbus.errors import NodeError
from tests.deploy.files import DEPLOY

_BOOT_S = 40.0
_POLL_S = 0.05


class DeployedNode:
    """A context manager.

    Args:
        tls: folder with ca.pem, broker.pem and broker.key, for the name localhost.
        definitions: folder with more definitions than those of `deploy/`.
        after: a node that is gone; this one is reached where that one was.
    """

    def __init__(self, tls: Path, definitions: Path, *, after: DeployedNode | None = None) -> None:
        self._programs = private._find_programs()
        self.folder = Path(tempfile.mkdtemp(prefix="fedbus-deployed-")).resolve()
        first, second = after.ports if after else (_free_ports(), _free_ports())
        self._settings = private._Settings(self.folder, first, self._programs, _BOOT_S)
        self.ports: tuple[private._Ports, private._Ports] = (first, second)
        self.port, self.management_port, self.prometheus_port = first.amqp, second.amqp, second.distribution
        self._tls, self._definitions = tls, definitions
        self._epmd: subprocess.Popen[bytes] | None = None
        self._beam: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._prepare()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        beam, epmd = self._beam, self._epmd
        if beam is not None:
            helpers = _descendants(beam.pid) if beam.poll() is None else []
            beam.kill()
            beam.wait()
            for pid in helpers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if epmd is not None:
            epmd.kill()
            epmd.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ctl(self, *arguments: str, script: str = "rabbitmqctl") -> str:
        """What `rabbitmqctl ARGUMENTS` (or a sibling of it) prints about this node."""
        command = [str(self._programs.script.with_name(script)), "-q", "-n", private._NODENAME, *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise NodeError(f"{script} {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-400:]}")
        return done.stdout

    @property
    def _environment(self) -> dict[str, str]:
        return private._environment(self._settings)

    def _prepare(self) -> None:
        private._prepare(self._settings)
        here: dict[str, Any] = {
            "/etc/rabbitmq/tls": self._tls,
            "/etc/rabbitmq/definitions.d": self.folder / "definitions.d",
            "= 5671\n": f"= 127.0.0.1:{self.port}\n",
            "= 15671\n": f"= {self.management_port}\n",
            "= 15692\n": f"= {self.prometheus_port}\n",
        }
        conf = (DEPLOY / "rabbitmq.conf").read_text()
        for there, instead in here.items():
            assert there in conf, there
            conf = conf.replace(there, str(instead))
        (self.folder / "rabbitmq.conf").write_text("log.console = false\n")  # instead of the private node's own
        (self.folder / "conf.d" / "90-fedbus.conf").write_text(conf)
        shutil.copytree(self._definitions, self.folder / "definitions.d")
        shutil.copy(DEPLOY / "definitions.json", self.folder / "definitions.d")
        shutil.copy(DEPLOY / "enabled_plugins", self.folder)

    def _start(self) -> None:
        ports = self._settings.ports
        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True, "env": self._environment}
        self._epmd = subprocess.Popen(
            [self._programs.epmd, "-port", str(ports.epmd), "-address", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **quiet,
        )
        console = self.folder / "log" / "console.log"
        with console.open("wb") as log:
            self._beam = subprocess.Popen([self._programs.script], cwd=self.folder, stdout=log, stderr=log, **quiet)
        give_up_at = time.monotonic() + _BOOT_S
        while not self._listens():  # the listeners are the last thing that a booting node opens
            if self._beam.poll() is not None or time.monotonic() > give_up_at:
                raise NodeError(f"the node did not start: {console.read_text(errors='replace')[-1500:]}")
            time.sleep(_POLL_S)

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False


def _free_ports() -> private._Ports:
    return private._choose_ports(private._Doors())

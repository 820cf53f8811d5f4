"""deploy/Containerfile: the image is built, its commands run, and a federation of its processes comes to its end.

As root, where buildah and debootstrap are. FEDBUS_IMAGE_ARGS are more arguments for the build: a place whose packages
come through an authority of its own mounts that one (--volume /etc/ssl/certs/ca-certificates.crt:...:ro).
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence

import pytest

from fedbus.bus.node import PrivateNode
from tests.deploy.commands import of_containerfile
from tests.deploy.files import DEPLOY
from tests.deploy.slow import asked_for

_IMAGE = "localhost/fedbus-test"
_ENV = {**os.environ, "STORAGE_DRIVER": "vfs", "FEDBUS_IMAGE": _IMAGE}

pytestmark = [
    asked_for,
    pytest.mark.skipif(
        not (shutil.which("buildah") and shutil.which("debootstrap") and os.geteuid() == 0),
        reason="needs root, buildah and debootstrap",
    ),
    pytest.mark.timeout(900),
]


class Container:
    """A root folder made from the image; every process in it is a process of this machine, with its network."""

    def __init__(self) -> None:
        self.name = f"fedbus-test-{uuid.uuid4().hex[:8]}"
        _buildah("from", "--name", self.name, _IMAGE)

    def command(self, *command: str, options: Sequence[str] = ()) -> list[str]:
        return ["buildah", "run", "--isolation", "chroot", *options, self.name, "--", *command]

    def run(self, *command: str) -> str:
        """What a command prints."""
        return _buildah(*self.command(*command)[1:])

    def succeeds(self, *command: str, options: Sequence[str] = ()) -> bool:
        done = subprocess.run(self.command(*command, options=options), env=_ENV, capture_output=True, timeout=60)
        return done.returncode == 0

    def start(self, *command: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*command, options=options),
            env=_ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def _buildah(*args: str) -> str:
    done = subprocess.run(["buildah", *args], env=_ENV, capture_output=True, text=True)
    assert done.returncode == 0, (args, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    extra = shlex.split(os.environ.get("FEDBUS_IMAGE_ARGS", ""))
    command = [str(DEPLOY / "image.sh"), "--debian", "--isolation", "chroot", *extra]
    built = subprocess.run(command, env=_ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout[-3000:]
    made = Container()
    yield made
    _buildah("rm", made.name)
    _buildah("rmi", _IMAGE)


def test_every_command_is_there(container: Container) -> None:
    assert container.run("fedbus", "--version").startswith("fedbus ")
    for command in ("server", "client", "worker", "status", "broker provision", "broker certificate"):
        assert "Usage" in container.run("fedbus", *command.split(), "--help")


def test_what_the_files_in_deploy_need_is_installed(container: Container) -> None:
    container.run("python3", "-c", "import cryptography, prometheus_client")


def test_it_is_nobody_and_can_write_in_two_places_only(container: Container) -> None:
    assert container.run("id", "-u").strip() == "10001"
    search = "find / -xdev -type d -writable -print -prune 2>/dev/null || true"
    found = {folder for folder in container.run("sh", "-c", search).split() if not folder.startswith(("/proc", "/dev"))}
    assert found - {"/run/lock", "/var/tmp"} == {"/tmp", "/var/lib/fedbus"}  # a read-only root takes the two away


def test_nothing_to_build_with_is_left(container: Container) -> None:
    there = container.run("ls", "/opt/fedbus/bin").split()
    assert "fedbus" in there
    assert not [name for name in there if name.startswith("pip")]


@pytest.mark.broker
def test_a_federation_of_containers_comes_to_its_end(container: Container, rabbitmq_installed: None) -> None:
    port = _free_port()
    with PrivateNode() as node:
        settings = {"FEDBUS_BROKER": node.url, "FEDBUS_COHORT": "2", "FEDBUS_ROUNDS": "3", "FEDBUS_PAUSE_S": "2"}
        told = [f"--volume={DEPLOY / 'app'}:/app:ro", *(f"--env={key}={value}" for key, value in settings.items())]
        metrics = f"--env=FEDBUS_METRICS=127.0.0.1:{port}"
        server = container.start("fedbus", "server", "app:app", "--run-dir=/tmp/run", options=[*told, metrics])
        other = [*told, "--env=FEDBUS_METRICS=127.0.0.1:0"]
        clients = [container.start("fedbus", "client", "app:app", f"--id={name}", options=other) for name in "ab"]
        _, health = of_containerfile()
        until = time.monotonic() + 60
        while not container.succeeds(*health, options=[metrics]):
            assert server.poll() is None, server.communicate()[0]
            assert time.monotonic() < until, "the server never became healthy"
        said, _ = server.communicate(timeout=120)
        assert server.returncode == 0, said
        assert "3 rounds, 6 updates" in said
        for client in clients:
            assert client.wait(30) == 0
            client.communicate()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

"""Every command line of the deployment files runs: a federation for compose, one for Kubernetes, one for systemd.

The broker runs with deploy/rabbitmq.conf, its keys and members come from the scripts that compose and Kubernetes run;
server, worker and client log in with the bundles from there, over mutual TLS. Only paths, ports and numbers are others.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.broker import DeployedNode
from tests.deploy.commands import (
    ROLES,
    Command,
    of_compose,
    of_containerfile,
    of_kubernetes,
    of_systemd,
    scripts,
)
from tests.deploy.conftest import script
from tests.deploy.files import DEPLOY, KUBERNETES, compose, kubernetes, pods
from tests.deploy.processes import FEDBUS, FedbusProcess

_PLACES: dict[str, Callable[[], Iterator[Command]]] = {
    "compose": of_compose,
    "kubernetes": of_kubernetes,
    "systemd": of_systemd,
}


@pytest.mark.parametrize("place", _PLACES)
def test_each_deployment_has_a_server_workers_and_a_client(place: str) -> None:
    assert sorted(command.role for command in _PLACES[place]()) == sorted(ROLES)


def test_no_script_is_forgotten() -> None:
    assert [str(path.relative_to(DEPLOY)) for path in scripts()] == [
        "compose/keys.sh",
        "compose/provision.sh",
        "kubernetes/base/provision.sh",
    ]


@pytest.fixture(scope="module")
def members(deployed: DeployedNode, home: Path) -> Path:
    """The folder of bundles after compose's `provision`."""
    command = compose(FEDBUS_HOST="localhost")["services"]["provision"]["command"]
    federation, clients, host, management = command
    assert (host, management) == ("localhost:5671", "broker:15671")
    told = script(
        DEPLOY / "compose" / "provision.sh",
        federation,
        clients,
        f"localhost:{deployed.port}",
        f"localhost:{deployed.management_port}",
        FEDBUS_HOME=str(home),
    )
    assert (home / "office" / "admin.password").read_text() not in told
    return home / "for"


@pytest.mark.broker
@pytest.mark.parametrize("place", _PLACES)
def test_the_commands_make_a_federation(place: str, members: Path, tmp_path: Path) -> None:
    running = {
        command.role: FedbusProcess(
            _placed(command, members / command.role / "bundle.json", tmp_path),
            tmp_path,
            command.role,
            FEDBUS_ROUNDS="2",
            FEDBUS_COHORT="3",
        )
        for command in _PLACES[place]()
    }
    try:
        # The cohort is the client and two of the worker's virtual ones: a round without any of them would not close.
        while running["server"].is_running:
            assert running["worker"].is_running, running["worker"].output
            time.sleep(0.05)
        assert running["server"].end() == 0, running["server"].output
        history = json.loads((tmp_path / "run" / "history.json").read_text())
        assert set(history["clients"]) == {"a", "virtual-00000-of-00002", "virtual-00001-of-00002"}
        assert running["client"].end() == 0, running["client"].output
        assert running["worker"].is_running  # for the next run
    finally:
        for process in running.values():
            process.kill()


def _placed(command: Command, bundle: Path, folder: Path) -> list[str]:
    """The command line, for this machine."""
    options = {"bundle": str(bundle)}
    if any(arg.startswith("--metrics=") for arg in command.args):
        options["metrics"] = "127.0.0.1:0"
    if command.role == "server":
        options["run_dir"] = str(folder / "run")
        options["virtual_clients"] = "2"
    return command.here(**options)


@pytest.mark.broker
def test_the_job_of_kubernetes_provisions(deployed: DeployedNode, home: Path, tmp_path: Path) -> None:
    (pod,) = (pod for name, pod in pods(kubernetes()) if name == "fedbus-provision")
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["sh", "/scripts/provision.sh"]
    federation, clients, _, _ = container["args"]
    for name in ("provision.sh", "publish.py"):
        shutil.copy(KUBERNETES / "base" / name, tmp_path)
    (tmp_path / "publish.py").write_text("")  # test_kubernetes.py has an API for it
    (tmp_path / "username").write_text("admin")
    (tmp_path / "password").write_text((home / "office" / "admin.password").read_text())
    script(
        tmp_path / "provision.sh",
        f"{federation}-of-kubernetes",
        clients,
        f"localhost:{deployed.port}",
        f"localhost:{deployed.management_port}",
        FEDBUS_HOME=str(tmp_path),
        FEDBUS_AUTHORITY=str(home / "office"),
        FEDBUS_BROKER_SECRET=str(tmp_path),
    )
    assert {path.name for path in (tmp_path / "bundles").glob("*.json")} == {"a.json", "server.json", "worker.json"}


@pytest.mark.broker
def test_keys_can_be_renewed_at_any_time(members: Path, deployed: DeployedNode, home: Path) -> None:
    before = {name: (home / "tls" / name).read_bytes() for name in ("ca.pem", "broker.pem")}
    password = (home / "office" / "admin.password").read_text()
    script(DEPLOY / "compose" / "keys.sh", "localhost", FEDBUS_HOME=str(home))
    assert (home / "tls" / "ca.pem").read_bytes() == before["ca.pem"]
    assert (home / "tls" / "broker.pem").read_bytes() != before["broker.pem"]
    assert (home / "office" / "admin.password").read_text() == password
    assert {path.stat().st_mode & 0o777 for path in (home / "tls").iterdir()} == {0o640}


def test_the_image_shows_its_commands_and_checks_its_health() -> None:
    command, health = of_containerfile()
    assert command == ["fedbus", "--help"]
    shown = subprocess.run([FEDBUS, *command[1:]], capture_output=True, text=True, timeout=30)
    assert "Usage: fedbus" in shown.stdout
    assert health[:2] == ["python3", "-c"]
    # Nobody answers at this port: what is checked is that it asks, and says no with its exit code.
    asked = subprocess.run(
        [sys.executable, *health[1:]], env={"FEDBUS_METRICS": "0.0.0.0:9"}, capture_output=True, text=True, timeout=30
    )
    assert asked.returncode == 1
    assert "Connection refused" in asked.stderr

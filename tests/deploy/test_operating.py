"""What deploy/README.md tells operators to do, done: backup and restore, a cluster with its settings, one more node.

Each command is looked up in the README first, so that the two stay one.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import signal
import sqlite3
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import aiormq
import pytest

from tests.deploy.broker import DeployedNode
from tests.deploy.conftest import script
from tests.deploy.files import DEPLOY
from tests.deploy.processes import FedbusProcess
from tests.deploy.slow import asked_for
from tests.faults.cluster import Cluster

pytestmark = [asked_for, pytest.mark.broker, pytest.mark.timeout(180)]


def documented(command: str) -> list[str]:
    """A command of the README, as words."""
    assert command in (DEPLOY / "README.md").read_text(), command
    return shlex.split(command)


def _federation(node: DeployedNode, home: Path) -> None:
    script(
        DEPLOY / "compose" / "provision.sh",
        "hospitals",
        "a,b",
        f"localhost:{node.port}",
        f"localhost:{node.management_port}",
        FEDBUS_HOME=str(home),
    )


def _members(home: Path, run: Path, logs: Path, *, rounds: int) -> dict[str, FedbusProcess]:
    logs.mkdir(exist_ok=True)
    bundles = home / "bundles"
    small = {"FEDBUS_COHORT": "2", "FEDBUS_ROUNDS": str(rounds), "FEDBUS_PAUSE_S": "0.5"}
    server = ["server", "app:app", f"--bundle={bundles / 'server.json'}", f"--run-dir={run}", "--resume", "--log-json"]
    clients = {name: ["client", "app:app", f"--bundle={bundles / name}.json", "--log-json"] for name in "ab"}
    return {name: FedbusProcess(args, logs, name, **small) for name, args in {"server": server, **clients}.items()}


def _rounds(run: Path) -> int:
    """Committed ones, from the ledger."""
    if not (run / "ledger.sqlite").exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True)) as ledger:
        try:
            return int(ledger.execute("SELECT count(*) FROM rounds").fetchone()[0])
        except sqlite3.OperationalError:  # it is being made
            return 0


def _end(members: dict[str, FedbusProcess]) -> None:
    for process in members.values():
        process.kill()


def test_a_federation_comes_back_from_its_backup_on_a_new_broker(
    rabbitmq_installed: None, home: Path, tmp_path: Path
) -> None:
    """The machines of broker and server are lost; the backup is older than what the server did last."""
    run, backup = tmp_path / "run", tmp_path / "backup"
    backup.mkdir()
    with DeployedNode(home / "tls", home / "definitions") as node:
        _federation(node, home)
        members = _members(home, run, tmp_path / "first", rounds=100)
        try:
            _until(lambda: _rounds(run) >= 2)
            members["server"].signal(signal.SIGTERM)
            for process in members.values():  # it sends its clients home; their services start them again
                process.end()
            members.update({name: members[name].again() for name in "ab"})
            with tarfile.open(backup / "run.tar", "w") as archive:
                archive.add(run, "run")
            definitions = backup / "definitions.json"
            node.ctl(*documented("rabbitmqctl export_definitions")[1:], str(definitions))
            kept = _rounds(run)
            for more in (1, 2):  # two more servers, two more epochs, which the backup does not know
                members["server"].kill()
                members["server"] = members["server"].again()
                _until(lambda: _rounds(run) >= kept + more)  # noqa: B023
        finally:
            _end(members)
    shutil.rmtree(run)
    with tarfile.open(backup / "run.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    with DeployedNode(home / "tls", home / "definitions", after=node) as fresh:
        fresh.ctl(*documented("rabbitmqctl import_definitions")[1:], str(definitions))
        members = _members(home, run, tmp_path / "second", rounds=kept + 3)
        try:
            assert members["server"].end() == 0, members["server"].output
            assert [members[name].end() for name in "ab"] == [0, 0]
        finally:
            _end(members)
    assert _rounds(run) == kept + 3


@pytest.fixture(scope="module")
def cluster(rabbitmq_installed: None) -> Iterator[Cluster]:
    """Three nodes with deploy/rabbitmq-cluster.conf, but for their names."""
    nodes = Cluster()
    conf = (DEPLOY / "rabbitmq-cluster.conf").read_text()
    for number, name in enumerate(nodes.names, 1):
        conf = conf.replace(f"rabbit@broker-{number}", name)
    assert "rabbit@" not in conf.replace("fedbus", "")
    for node in nodes._nodes:
        (node.folder / "conf.d").mkdir()
        (node.folder / "conf.d" / "91-fedbus-cluster.conf").write_text(conf)
    with nodes:
        yield nodes


def test_the_settings_of_the_cluster_are_in_force(cluster: Cluster) -> None:
    told = cluster.ctl(
        "eval", "[application:get_env(rabbit, K) || K <- [cluster_partition_handling, queue_leader_locator]]."
    )
    assert "pause_minority" in told
    assert "balanced" in told


def test_a_new_node_gets_replicas_of_what_was_there_before(cluster: Cluster) -> None:
    cluster.use_vhost("hospitals")
    asyncio.run(_make_alone(cluster.url_of(0)))
    for node in cluster.names[1:]:
        grow = documented("rabbitmq-queues grow rabbit@broker-4 all --vhost-pattern hospitals --queue-pattern '.*'")
        add = documented("rabbitmq-streams add_replica --vhost hospitals fedbus.model rabbit@broker-4")
        for command in (grow, add):
            _tool(cluster, *(node if word == "rabbit@broker-4" else word for word in command))
    for queue in ("fedbus.updates", "fedbus.model"):
        cluster.await_replicas(queue)
    _tool(cluster, *documented("rabbitmq-queues rebalance all"))
    _tool(cluster, *documented("rabbitmq-diagnostics check_if_node_is_quorum_critical"))


async def _make_alone(url: str) -> None:
    """A quorum queue and a stream with one replica each: as before there was a cluster."""
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    for name, kind, size in (
        ("fedbus.updates", "quorum", "x-quorum-initial-group-size"),
        ("fedbus.model", "stream", "x-initial-cluster-size"),
    ):
        await channel.queue_declare(name, durable=True, arguments={"x-queue-type": kind, size: 1})
    await connection.close()


def _tool(cluster: Cluster, program: str, *args: str) -> None:
    node = cluster._nodes[0]
    command = [str(node._programs.script.with_name(program)), "-q", "-n", node.name, *args]
    done = subprocess.run(command, env=node.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (command, done.stdout, done.stderr)


def _until(condition: object, timeout_s: float = 60.0) -> None:
    assert callable(condition)
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.1)

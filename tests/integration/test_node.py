"""The private node against a real RabbitMQ: it starts, it speaks AMQP, and it leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedbus.bus import node as nodes
from fedbus.bus.node import (
    NodeState,
    PrivateNode,
    TlsListener,
    detached_state,
    find_rabbitmq,
    start_detached,
    stop_detached,
)
from fedbus.bus.rabbitmq import connect
from fedbus.bus.topology import CONTROL, ingress
from fedbus.cli.broker import broker_app
from fedbus.errors import BrokerMissing, NodeError, UsageError

pytestmark = [pytest.mark.broker, pytest.mark.usefixtures("rabbitmq_installed")]


def eventually(holds: Callable[[], bool], *, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    """A zombie is gone: only its parent still owes it a glance."""
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return listing.stdout.strip()[:1] in ("", "Z")


def all_gone(state: NodeState) -> bool:
    return all(map(gone, (state.pid, state.epmd_pid, state.keeper_pid)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def speaks_amqp(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
            connection.sendall(b"AMQP\x00\x00\x09\x01")
            return connection.recv(11, socket.MSG_WAITALL)[7:11] == b"\x00\x0a\x00\x0a"
    except ConnectionRefusedError:
        return False


@pytest.fixture
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    yield tmp_path
    stop_detached()


def test_a_shared_node_speaks_amqp_on_its_port(node: PrivateNode) -> None:
    assert speaks_amqp(node.port)
    assert node.url.startswith("amqp://fedbus:")
    assert node.url.endswith(f"@127.0.0.1:{node.port}/")


def test_orders_wait_for_a_node_that_takes_connections_and_still_starts(
    node: PrivateNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, failures = nodes.run_rabbitmqctl, ["Error: this command requires the 'rabbit' app to be running"]

    def early(*args: Any, **settings: Any) -> str:
        if failures:
            raise NodeError(failures.pop())
        return original(*args, **settings)

    monkeypatch.setattr(nodes, "run_rabbitmqctl", early)
    monkeypatch.setattr(nodes, "_ASK_AGAIN_S", 0.0)
    assert node.rabbitmqctl("eval", "1 + 1.").strip() == "2"
    failures.append("another error")
    with pytest.raises(NodeError, match="another error"):
        node.rabbitmqctl("eval", "1 + 1.")


def test_a_node_keeps_its_folder_and_secrets_to_its_user(node: PrivateNode) -> None:
    assert node.data_dir.stat().st_mode & 0o777 == 0o700
    files = [path for path in node.data_dir.iterdir() if path.is_file()]
    assert {path.stat().st_mode & 0o077 for path in files} == {0}
    password = (node.data_dir / "password").read_text()
    assert password not in repr(node)


def test_a_node_listens_on_the_loopback_only(node: PrivateNode) -> None:
    if not Path("/proc/net/tcp").exists():
        pytest.skip("reads /proc/net/tcp")
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
    ours = [address for address in listening if address.endswith(f":{node.port:04X}")]
    assert ours == [f"0100007F:{node.port:04X}"]


def test_a_taken_port_is_named_with_what_to_do(node: PrivateNode) -> None:
    with (
        pytest.raises(NodeError, match=rf"port {node.port} .* is taken .* another --port"),
        PrivateNode(port=node.port),
    ):
        pass


def test_a_listener_that_cannot_be_is_refused_before_anything_starts(tmp_path: Path) -> None:
    missing, port = tmp_path / "missing.pem", free_port()
    here = TlsListener(address="127.0.0.1", port=port, ca=missing, certificate=missing, key=missing)
    with pytest.raises(NodeError, match=r"missing\.pem cannot be read"), PrivateNode(listener=here):
        pass
    elsewhere = TlsListener(address="192.0.2.1", ca=missing, certificate=missing, key=missing)  # RFC 5737: nobody's
    with pytest.raises(NodeError, match=r"no address 192\.0\.2\.1"), PrivateNode(listener=elsewhere):
        pass
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(NodeError, match=f"port {port} .* another --tls-port"),
        PrivateNode(listener=here),
    ):
        pass


def test_a_folder_in_use_is_refused(node: PrivateNode) -> None:
    with pytest.raises(NodeError, match="another node runs in"), PrivateNode(data_dir=node.data_dir):
        pass


async def test_a_throwaway_node_leaves_neither_process_nor_folder() -> None:
    async with PrivateNode() as short_lived:
        state = short_lived.state
        assert speaks_amqp(state.port)
    assert all_gone(state)
    assert not state.data_dir.exists()


async def test_a_cancelled_start_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    starting = asyncio.create_task(PrivateNode().__aenter__())
    assert await asyncio.to_thread(eventually, lambda: any(tmp_path.glob("*/pid")))  # the broker is coming up
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert os.listdir(tmp_path) == []


def test_a_killed_parent_leaves_nothing_behind() -> None:
    program = (
        "import dataclasses, json, sys; from fedbus.bus.node import PrivateNode\n"
        "with PrivateNode() as node:\n"
        "    print(json.dumps(dataclasses.asdict(node.state), default=str), flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        state = NodeState(**json.loads(parent.stdout.readline()))
        parent.kill()
    assert eventually(lambda: all_gone(state))
    assert eventually(lambda: not Path(state.data_dir).exists())


async def test_a_killed_node_comes_back_with_its_data(tmp_path: Path) -> None:
    async with PrivateNode(data_dir=tmp_path) as durable:
        before = durable.state
        async with await connect(durable.url) as bus:
            await bus.declare(ingress())
            await bus.publish("", CONTROL, b"kept")
        await asyncio.to_thread(durable.kill)
        assert gone(before.pid)
        assert not speaks_amqp(before.port)
        await asyncio.to_thread(durable.restart)
        assert durable.pid != before.pid
        assert (durable.url, durable.state.epmd_pid) == (before.url, before.epmd_pid)
        assert await first_message(durable.url) == b"kept"
    assert all_gone(before)
    async with PrivateNode(data_dir=tmp_path) as later:  # on another port, after a graceful stop
        assert await first_message(later.url) == b"kept"


async def first_message(url: str) -> bytes:
    async with await connect(url) as bus, bus.consume(CONTROL, prefetch=1) as consumer:
        return bytes((await consumer.receive()).body)  # not acknowledged: it goes back


def test_a_broker_that_cannot_boot_is_explained_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "mnesia").write_text("a file where the broker wants a folder")
    with pytest.raises(NodeError, match="did not start") as failure, PrivateNode(data_dir=tmp_path):
        pass
    assert str(tmp_path / "log") in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_missing_rabbitmq_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDBUS_RABBITMQ", str(tmp_path))
    with pytest.raises(BrokerMissing, match="FEDBUS_RABBITMQ"):
        find_rabbitmq()
    monkeypatch.delenv("FEDBUS_RABBITMQ")
    monkeypatch.setattr("fedbus.bus.node._usual_scripts", lambda: iter([tmp_path / "rabbitmq-server"]))
    with pytest.raises(BrokerMissing, match=r"apt install rabbitmq-server.*brew install rabbitmq.*--broker"):
        find_rabbitmq()


def test_a_detached_node_lives_until_it_is_stopped(state_home: Path) -> None:
    assert detached_state() is None
    with ThreadPoolExecutor(2) as pool:  # two starts at once: one node
        one, other = (future.result() for future in [pool.submit(start_detached) for _ in range(2)])
    assert one == other == detached_state()
    assert one.data_dir == state_home / "fedbus" / "broker" / "default"
    assert speaks_amqp(one.port)

    runner = CliRunner()
    again = runner.invoke(broker_app, ["start"])
    assert again.exit_code == 0
    assert "already running" in again.output
    assert one.url not in again.output
    shown = runner.invoke(broker_app, ["status", "--json"])
    assert shown.exit_code == 0
    assert json.loads(shown.output) == {
        "url": one.url, "port": one.port, "pid": one.pid, "data_dir": str(one.data_dir), "running": True,
        "tls_address": None, "tls_port": None, "management_port": None,
    }  # fmt: skip
    for late in (["--listen", "127.0.0.1"], ["--management-port", "15672"]):
        refused = runner.invoke(broker_app, ["start", *late])
        assert isinstance(refused.exception, NodeError)
        assert "stop it first" in str(refused.exception)

    assert json.loads(runner.invoke(broker_app, ["stop", "--json"]).output)["stopped"] is True
    assert all_gone(one)
    assert runner.invoke(broker_app, ["status"]).exit_code == 1
    assert stop_detached() is False


def test_a_detached_node_whose_keeper_or_broker_died_is_cleared_away(state_home: Path) -> None:
    first = start_detached()
    os.kill(first.keeper_pid, signal.SIGKILL)
    assert eventually(lambda: detached_state() is None)
    assert eventually(lambda: all_gone(first))
    port = free_port()
    reachable = ["--listen", "127.0.0.1", "--tls-port", str(port), "--management-port", "0"]
    words = f"by TLS at 127.0.0.1, port {port}"

    def start() -> str:
        output = CliRunner().invoke(broker_app, ["start", "--port", str(first.port), *reachable]).output
        return output if words in output else ""

    # Somebody else's outgoing connection may have the port for a moment.
    assert eventually(lambda: "started" in start())
    assert "already running" in start()
    second = detached_state()
    assert second is not None
    assert second.url == first.url
    assert (second.tls_address, second.tls_port) == ("127.0.0.1", port)
    assert second.management_port
    with pytest.raises(NodeError, match=r"listens to 127\.0\.0\.1"):
        start_detached(listener=TlsListener(address="0.0.0.0", ca=state_home, certificate=state_home, key=state_home))
    os.kill(second.pid, signal.SIGKILL)
    assert eventually(lambda: all_gone(second))
    assert detached_state() is None


def test_a_broker_name_cannot_leave_its_folder() -> None:
    with pytest.raises(UsageError, match="broker name"):
        detached_state("../elsewhere")

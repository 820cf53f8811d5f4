"""`fedbus status`: what the server tells whoever has its rights, and what is made of it."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rich.console import Console

from fedbus.bus.base import QueueState
from fedbus.bus.memory import MemoryBroker
from fedbus.bus.topology import CONTROL, TASKS, UPDATES, ingress
from fedbus.cli.status import Glance, render, size
from fedbus.config import RoundConfig
from fedbus.errors import BrokerDenied, BrokerError, BrokerUnreachable, ConfigError, QueueMissing
from fedbus.observe import events as o
from fedbus.observe.broker import BrokerFigures, MonitoringApi, NodeFigures, parse_ctl_status
from fedbus.observe.glance import ask_queues, ask_server
from fedbus.rounds.snapshot import EngineSnapshot, MemberSnapshot
from fedbus.server import status as status_module
from fedbus.server.status import as_json, regime
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode
from tests.kit import Federation, Gate, app_of, federation

# ---- asked over the bus ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def waiting_server(**rounds: Any) -> AsyncIterator[Federation]:
    """A server that waits for ever so many clients."""
    async with federation(app_of(rounds={"min_available_clients": 10_000, **rounds})) as story:
        story.start_server()
        await story.until(o.RunStarted)
        yield story


async def test_the_server_says_who_is_in_what_they_do_and_what_they_have() -> None:
    gate = Gate(only="c2", in_round=2)
    app = app_of(gate.client_fn, rounds={"min_fit_clients": 2, "num_rounds": 2, "fraction_evaluate": 0})
    async with federation(app) as story:
        story.start_server()
        for client_id in ("c1", "c2"):
            story.start_client(client_id)
        await story.until(o.UpdateFolded, 3)
        asker = story.connect("server")
        status = await ask_server(asker)
        assert status is not None
        members = {member["client_id"]: member for member in status["members"]}
        assert (status["round"]["open"], status["round"]["folded"], status["round"]["needed"]) == (2, 1, 2)
        assert (status["version"], status["num_rounds"], status["regime"], status["phase"]) == (
            1,
            2,
            "synchronous",
            "open",
        )
        assert 0 < status["round"]["closes_in_s"] <= 30
        assert (members["c1"]["state"], members["c1"]["version"], members["c1"]["folded"]) == ("idle", 1, 2)
        assert (members["c2"]["state"], members["c2"]["round"], members["c2"]["asked"]) == ("training", 2, 2)
        assert members["c2"]["lag"] == 0
        assert status["server"]["pid"] > 0
        assert status["server"]["resident_bytes"] > 1 << 20
        gate.open()
        assert story.serving is not None
        await story.serving


async def test_a_thousand_members_are_one_answer() -> None:
    async with waiting_server() as story:
        asker = story.connect("server")
        for number in range(1000):
            await asker.publish(CONTROL, "x", encode(m.Join(client_id=f"c{number:03}", session="s")))
        await story.until(o.MemberJoined, 1000)
        status = await ask_server(asker)
        assert status is not None
        assert (status["num_members"], status["clients_missing"]) == (1000, 9000)
        assert [member["client_id"] for member in status["members"]] == [f"c{number:03}" for number in range(1000)]


async def test_of_more_members_than_fit_the_rest_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "MOST_MEMBERS", 2)
    async with waiting_server() as story:
        asker = story.connect("server")
        for name in "abc":
            await asker.publish(CONTROL, "x", encode(m.Join(client_id=name, session="s")))
        await story.until(o.MemberJoined, 3)
        status = await ask_server(asker)
        assert status is not None
        assert (status["num_members"], len(status["members"])) == (3, 2)


async def test_a_client_of_its_own_user_is_refused_and_named() -> None:
    async with waiting_server() as story:
        asker = story.connect("hospital-a")
        assert await ask_server(asker, patience_s=0.2) is None
        rejected = await story.until(o.MessageRejected)
        assert (rejected.queue, rejected.user) == (CONTROL, "hospital-a")
        assert "only the server says" in rejected.reason


async def test_a_user_that_may_declare_nothing_is_told_whose_bundle_it_takes() -> None:
    async with waiting_server() as story:
        asker = story.broker.connect("hospital-a", may_declare=False)
        with pytest.raises(BrokerDenied, match="only the server's user may ask"):
            await ask_server(asker)
        await asker.close()


async def test_an_answer_goes_to_a_queue_of_replies_and_to_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.server.guard._TELL_EVERY_S", 0.0)  # each by itself
    async with waiting_server() as story:
        asker = story.connect("server")
        for reply_to in ("hospital-a", "", "reply.x", f"reply.{'0' * 32}x"):
            await asker.publish(CONTROL, "server", encode(m.StatusRequest(reply_to=reply_to)))
        await story.until(o.MessageRejected, 4)


async def test_a_flood_of_questions_is_answered_out_of_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def counted(status: dict[str, Any]) -> bytes:
        looks.append(status)
        return as_json(status)

    monkeypatch.setattr("fedbus.server.runtime.as_json", counted)
    monkeypatch.setattr("fedbus.server.runtime._STATUS_SHARE", 1e-9)
    async with waiting_server() as story:
        asker = story.connect("server")
        answers = await asyncio.gather(*(ask_server(asker) for _ in range(30)))
        assert all(answer == answers[0] and answer is not None for answer in answers)
        assert len(looks) == 1


async def test_where_no_server_answers_the_queues_are_still_told() -> None:
    bus = MemoryBroker().connect("server")
    assert await ask_server(bus, patience_s=0.1) is None  # not even an exchange
    assert set((await ask_queues(bus)).values()) == {None}
    await bus.declare(ingress())
    await bus.publish(UPDATES, "x", b"x")
    assert await ask_server(bus, patience_s=0.1) is None
    queues = await ask_queues(bus)
    assert queues[UPDATES] == QueueState(messages=1, consumers=0)
    assert queues["fedbus.work"] is None
    await bus.close()


async def test_a_queue_of_replies_ends_with_its_context() -> None:
    bus = MemoryBroker().connect("server")
    with pytest.raises(QueueMissing):
        async with bus.replies(TASKS, "reply.1"):
            pass
    await bus.declare(ingress())
    async with bus.replies(TASKS, "reply.1") as replies:
        await bus.publish(TASKS, "reply.1", b"one")
        assert (await replies.receive()).body == b"one"
    await bus.publish(TASKS, "reply.1", b"nobody takes it", mandatory=False)
    assert sorted(bus._broker._queues) == ["fedbus.control", "fedbus.dead", "fedbus.updates"]
    await bus.close()


def test_a_status_travels_whole() -> None:
    status = m.Status(run_id="r", payload=b'{"a":1}')
    again = decode(encode(status))
    assert isinstance(again, m.Status)
    assert bytes(again.payload) == b'{"a":1}'  # type: ignore[arg-type]


def test_the_regime_has_the_name_of_its_preset() -> None:
    assert regime(RoundConfig.synchronous(3)) == regime(RoundConfig()) == "synchronous"
    assert regime(RoundConfig.semi_synchronous(10)) == "semi-synchronous"
    assert (regime(RoundConfig.buffered()), regime(RoundConfig.asynchronous())) == ("buffered", "asynchronous")


def test_those_that_hang_or_lag_come_first() -> None:
    def member(name: str, state: Any, version: int | None) -> MemberSnapshot:
        return MemberSnapshot(client_id=name, state=state, version=version, round=1, working_s=1.0, silent_s=0.0)

    snapshot = EngineSnapshot(
        phase="open",
        version=9,
        committed_rounds=9,
        open_round=10,
        open_s=1.0,
        closes_in_s=float("inf"),
        folded=0,
        needed=2,
        clients_missing=0,
        members=(
            member("a", "idle", 9),
            member("b", "training", 9),
            member("c", "late", 8),
            member("d", "overdue", 3),
            member("e", "idle", None),
            member("f", "idle", 2),
        ),
    )
    from tests.unit.test_metrics import figures_of

    status = status_module.describe(
        run_id="r",
        epoch=1,
        rounds=RoundConfig(),
        snapshot=snapshot,
        figures=figures_of(9),
        records={},
        joined=["a", "gone", "b"],
        uptime_s=1.0,
    )
    assert [(member["client_id"], member["lag"]) for member in status["members"]] == [
        *(("d", 6), ("c", 1), ("f", 7)),
        *(("a", 0), ("b", 0), ("e", None)),
    ]
    assert status["absent"] == ["gone"]
    assert json.loads(as_json(status))["round"]["closes_in_s"] is None


# ---- what the broker says of itself ----------------------------------------------------------------------------------

NODE = {
    "name": "rabbit@one",
    "running": True,
    "mem_used": 100,
    "mem_limit": 1000,
    "mem_alarm": True,
    "disk_free": "disk_free_monitoring_disabled",
    "disk_free_limit": 50,
    "disk_free_alarm": False,
    "fd_used": 7,
    "fd_total": 70,
    "uptime": 5000,
}


@contextlib.contextmanager
def api(status: int, answers: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """A management API that gives these answers; its address, and the logins that it was shown."""
    logins: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            logins.append(self.headers["Authorization"])
            body = json.dumps(answers.get(self.path.split("?")[0])).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", logins
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_management_api_tells_of_nodes_alarms_and_connections() -> None:
    overview = {"rabbitmq_version": "4.0.5", "object_totals": {"connections": 12}}
    with api(200, {"/api/overview": overview, "/api/nodes": [NODE]}) as (where, logins):
        asked = MonitoringApi(f"http://me@{where}/", "me", "s@cret")
        assert asked.figures() == BrokerFigures(
            version="4.0.5",
            connections=12,
            nodes=(
                NodeFigures(
                    name="rabbit@one",
                    running=True,
                    memory_bytes=100,
                    memory_limit_bytes=1000,
                    disk_free_bytes=None,
                    disk_limit_bytes=50,
                    open_files=7,
                    open_files_limit=70,
                    uptime_s=5.0,
                    alarms=("memory",),
                ),
            ),
        )
        assert logins == ["Basic bWU6c0BjcmV0"] * 2
        assert "cret" not in repr(asked)


@pytest.mark.parametrize(
    ("status", "answers", "error", "words"),
    [
        (401, {}, BrokerDenied, "needs the right password and the tag 'monitoring'"),
        (404, {}, BrokerUnreachable, r"is no RabbitMQ management API \(HTTP 404\)"),
        (200, {"/api/overview": [], "/api/nodes": 7}, BrokerUnreachable, "is no RabbitMQ management API"),
    ],
)
def test_what_else_answers_is_said_in_one_line_without_the_password(
    status: int, answers: dict[str, Any], error: type[BrokerError], words: str
) -> None:
    with api(status, answers) as (where, _), pytest.raises(error, match=words) as caught:
        MonitoringApi(f"http://{where}", "me", "secret").figures()
    assert "secret" not in str(caught.value)


def test_a_management_api_that_is_not_there_is_said_in_one_line_without_the_password() -> None:
    with pytest.raises(BrokerUnreachable, match=r"no management API answers at http://127\.0\.0\.1:1: ") as caught:
        MonitoringApi("http://127.0.0.1:1", "me", "secret").figures()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("127.0.0.1:15672", "must look like"),
        ("ftp://host", "must look like"),
        ("http://u:secret@host:99999", "must look like"),
        ("https://u:secret@host:15671", "put it into FEDBUS_MANAGEMENT_PASSWORD"),
        ("http://u@broker.example:15672", "would show the password to the network"),
    ],
)
def test_a_url_of_the_management_api_that_cannot_be_used_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        MonitoringApi(url, "me", "secret")
    assert "secret" not in str(caught.value)


def test_what_rabbitmqctl_says_is_read_and_nonsense_is_an_error() -> None:
    said = {
        "rabbitmq_version": "3.10.8",
        "memory": {"strategy": "rss", "total": {"rss": 5, "allocated": 3}},
        "vm_memory_high_watermark_limit": 10,
        "disk_free": 20,
        "disk_free_limit": 2,
        "file_descriptors": {"total_used": 1, "total_limit": 2},
        "uptime": 60,
        "alarms": [{"node": "n", "resource": "disk", "type": "resource_limit"}],
        "totals": {"connection_count": 3},
    }
    found = parse_ctl_status(json.dumps(said), "n")
    assert (found.version, found.connections) == ("3.10.8", 3)
    assert (found.nodes[0].memory_bytes, found.nodes[0].alarms) == (5, ("disk",))
    with pytest.raises(BrokerError, match="cannot be read"):
        parse_ctl_status("Error: nodedown", "n")


# ---- what it looks like ----------------------------------------------------------------------------------------------


def shown(glance: Glance, width: int = 200, **options: Any) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(render(glance, width, **options))
    return capture.get()


def glance(**fields: Any) -> Glance:
    member = {"version": 3, "lag": 1, "round": 4, "working_s": 130.0, "silent_s": 0.5}
    counts = dict.fromkeys(("asked", "folded", "late", "failed", "refused", "stopped", "lost"), 0)
    names = ["[red]x[/]", "b", "c"]
    server = {
        **{"run_id": "r1", "epoch": 2, "regime": "buffered", "phase": "open", "num_rounds": 9, "rounds_committed": 3},
        **{"version": 4, "clients_missing": 0, "num_members": 3, "num_absent": 1, "absent": ["d"]},
        "round": {"open": 4, "open_s": 200.0, "closes_in_s": None, "folded": 1, "needed": 2},
        "members": [{"client_id": name, "state": "late", **member, **counts} for name in names],
        "uploads": {"granted": 1, "waiting": 2, "staged_bytes": 3 << 20},
        "server": {"host": "h", "pid": 5, "uptime_s": 3661.0, "resident_bytes": 1 << 30, "fedbus": "0.1.0"},
    }
    node = NodeFigures(
        name="n1",
        running=True,
        memory_bytes=1 << 30,
        memory_limit_bytes=2 << 30,
        disk_free_bytes=None,
        disk_limit_bytes=None,
        open_files=None,
        open_files_limit=None,
        uptime_s=None,
        alarms=("memory",),
    )
    figures = BrokerFigures(version="3.10.8", connections=None, nodes=(node,))
    queues = {UPDATES: QueueState(messages=17, consumers=1), "fedbus.work": None}
    return Glance(**{"broker": "amqp://b", "server": server, "queues": queues, "figures": figures, **fields})


def test_a_screen_tells_the_run_the_clients_the_queues_and_the_broker() -> None:
    text = shown(glance())
    assert "r1 (buffered), 3 of 9 rounds, model 4, epoch 2" in text
    assert "4 is open for 0:03:20, 1 of 2 updates" in text
    assert "3 in, 3 late, 1 gone" in text
    assert "h (pid 5, fedbus 0.1.0), up 1:01:01, memory 1.0 GiB, uploads: 1 going on, 2 waiting, 3.0 MiB staged" in text
    assert "[red]x[/]" in text  # a name is not markup
    assert "late 0:02:10" in text
    assert "memory 1.0 GiB of 2.0 GiB" in text
    assert "ALARM: memory: nobody can publish" in text
    assert "fedbus.work" not in text
    assert "gone: d" in text


def test_a_narrow_or_low_screen_shows_less_of_it() -> None:
    text = shown(glance(), 78, most_rows=1)
    assert max(map(len, text.splitlines())) <= 78
    assert "and 2 more" in text
    assert "refused" not in text


def test_what_is_not_known_is_said_with_the_way_to_know_it() -> None:
    text = shown(glance(server=None, figures=None, unknown="give --management URL to see them"))
    assert "none answers" in text
    assert "memory, disk and connections unknown: give --management URL to see them" in text
    assert "fedbus.updates" in text
    assert "cannot be asked, the broker lets nobody publish: low on disk" in shown(
        glance(server=None, alarm="low on disk")
    )
    assert "no broker answers" in shown(Glance(broker="amqp://b", trouble="no broker answers at amqp://b"))


def test_the_json_of_a_glance_is_one_object_with_everything() -> None:
    found = json.loads(glance().to_json())
    assert found["queues"] == {UPDATES: {"messages": 17, "consumers": 1}, "fedbus.work": None}
    assert found["broker"]["nodes"][0]["alarms"] == ["memory"]
    assert found["server"]["members"][1]["client_id"] == "b"
    assert json.loads(Glance(broker="b").to_json())["server"] is None


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(None, "?"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (150 << 20, "150 MiB"), (3 << 50, "3072 TiB")],
)
def test_sizes_are_for_people(nbytes: int | None, text: str) -> None:
    assert size(nbytes) == text

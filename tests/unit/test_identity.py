"""Who may speak for whom, and clients that may declare nothing: a provisioned federation, over the memory bus."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest

from fedbus.bus.base import Delivery
from fedbus.bus.memory import MemoryBroker
from fedbus.bus.topology import CONTROL, UPDATES, Topology, client_inbox, inbox, ingress
from fedbus.client.runtime import ClientRuntime
from fedbus.errors import BrokerDenied, ConfigError, DecodeError, QueueBusy
from fedbus.observe import events as o
from fedbus.server.identity import Identity
from fedbus.wire import messages as m
from fedbus.wire.codec import encode
from tests.kit import AddingClient, Federation, app_of, federation


def delivery(user: str | None, *, is_copied: bool = False) -> Delivery:
    return Delivery(body=b"", tag=1, routing_key="", redelivered=False, offset=None, user_id=user, is_copied=is_copied)


@pytest.mark.parametrize(
    ("own", "user", "client"),
    [
        ("server", "c1", "c1"),
        ("fed.server", "fed.c1", "c1"),
        ("fed.server", "fed.fed.c1", "fed.c1"),
        ("guest", "c1", "c1"),
        ("fed.server~2", "fed.c1~3", "c1"),
        ("guest", "guest", "c1"),  # one user for all: nothing can be told apart
        ("fed.server", "fed.worker", "virtual-1"),
        ("server", "worker", "virtual-1"),
        ("guest", "guest", "virtual-1"),
    ],
)
def test_a_client_speaks_as_itself(own: str, user: str, client: str) -> None:
    Identity(own, {"virtual-1"}).check(delivery(user), client)


@pytest.mark.parametrize(
    ("own", "user", "client"),
    [
        ("server", "c2", "c1"),
        ("server", None, "c1"),
        ("server", "", "c1"),
        ("fed.server", "fed.c2", "c1"),
        ("fed.server", "other.c1", "c1"),
        ("fed.server", "c1", "c1"),
        ("fed.server", "fed.c1", "fed.c1"),  # that is c1
        ("fed.server", "fed.", "c1"),
        ("fed.server~2", "fed.server", "c1"),  # that server's secret was replaced
        ("fed.server", "fed.worker", "c1"),
        ("fed.server", "fed.c1", "virtual-1"),
        ("fed.server", "virtual-1", "virtual-1"),
        ("fed.server", "fed.virtual-1", "virtual-1"),
        ("myserver", "myc1", "c1"),
        ("guest", "fed.c1", "c1"),
    ],
)
def test_nobody_else_speaks_for_it(own: str, user: str | None, client: str) -> None:
    with pytest.raises(DecodeError):
        Identity(own, {"virtual-1"}).check(delivery(user), client)


def test_further_routing_keys_and_names_that_are_none_are_refused() -> None:
    identity = Identity("server")
    with pytest.raises(DecodeError, match="CC header"):
        identity.check(delivery("c1", is_copied=True), "c1")
    with pytest.raises(ConfigError):
        identity.check(delivery("c\n1"), "c\n1")
    with pytest.raises(DecodeError, match="only the server says"):
        identity.check_ours(delivery("c1"))
    identity.check_ours(delivery("server"))


@pytest.mark.parametrize(
    "message",
    [
        m.Join(client_id="c1", session="s"),
        m.Leave(client_id="c1", session="s", run_id="r", reason="bye"),
        m.Heartbeat(client_id="c1", session="s", run_id="r", fit_task=""),
        m.TaskFailed(client_id="c1", task_id="t", run_id="r", reason="x"),
        m.EvaluateReport(client_id="c1", task_id="t", run_id="r", loss=0.0, num_examples=1, metrics={}),
        m.UploadRequest(client_id="c1", task_id="t", run_id="r", nbytes=1),
        m.Echo(run_id="r", epoch=1, sent_at=0.0),
    ],
    ids=lambda message: type(message).__name__,
)
async def test_what_is_said_in_anothers_name_is_rejected_and_the_operator_sees_who_it_was(message: m.Message) -> None:
    async with federation(app_of(rounds={"min_fit_clients": 2, "num_rounds": 1})) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.Welcomed)
        await story.broker.connect("mallory").publish(CONTROL, "mallory", encode(message))
        assert (await story.until(o.MessageRejected)).user == "mallory"
        story.start_client("c2")
        assert (await serving).updates == 2
        assert story.told(o.MemberLost) == []


async def test_an_update_in_anothers_name_is_rejected_and_set_aside(story: Federation) -> None:
    update = m.Update(
        client_id="c1", task_id="t", run_id="r", transfer="t", version=0, num_examples=1, metrics={}, schema=(),
        part_bytes=1 << 20, checksum=0, payload=b"",
    )  # fmt: skip
    serving = story.start_server()
    await story.until(o.RunStarted)
    await story.broker.connect("mallory").publish(UPDATES, "mallory", encode(update))
    rejected = await story.until(o.MessageRejected, queue=UPDATES)
    assert rejected.user == "mallory"
    assert "not the user of c1" in rejected.reason
    story.start_client("c1")
    assert (await serving).updates == 1


@pytest.fixture
async def story() -> AsyncIterator[Federation]:
    async with federation(app_of(rounds={"min_fit_clients": 1, "num_rounds": 1})) as its_story:
        yield its_story


class Confined(Federation):
    """Clients, but not the server, may declare nothing."""

    def start_confined(self, client_id: str, user: str | None = None) -> asyncio.Task[Any]:
        bus = self.broker.connect(user or client_id, may_declare=False)
        self.all_buses.append(bus)
        self.clients[client_id] = ClientRuntime(self.app, bus, client_id=client_id, observers=[self.observe])
        return self._start(self.clients[client_id].run())


@pytest.mark.parametrize("first", ["server", "client"])
async def test_a_client_that_may_declare_nothing_takes_part_whoever_comes_first(first: str) -> None:
    story = Confined(app_of(AddingClient, rounds={"min_fit_clients": 1, "num_rounds": 2}))
    if first == "server":
        serving = story.start_server()
        await story.until(o.RunStarted)
        client = story.start_confined("c1")
    else:
        client = story.start_confined("c1")
        await story.until(o.ServerAwaited)
        serving = story.start_server()
    assert (await serving).updates == 2
    assert (await client).finished
    assert story.told(o.MemberLost) == []
    assert len(story.told(o.ServerAwaited)) == (first == "client")
    for bus in story.all_buses:
        await bus.close()


async def test_a_confined_client_that_speaks_while_the_server_is_still_declaring_asks_again() -> None:
    story = Confined(app_of(rounds={"min_fit_clients": 1, "num_rounds": 1}))
    await story.broker.connect("server").declare(Topology(exchanges=ingress().exchanges))
    client = story.start_confined("c1")
    await story.until(o.ServerAwaited)
    serving = story.start_server()
    assert (await serving).updates == 1
    assert (await client).finished
    for bus in story.all_buses:
        await bus.close()


async def test_of_two_confined_clients_of_one_name_the_second_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.client.runtime._TAKEN_PATIENCE_S", 0.0)
    story = Confined(app_of(rounds={"min_fit_clients": 2, "num_rounds": 1}))
    serving = story.start_server()
    story.start_confined("c1")
    await story.until(o.Welcomed)
    with pytest.raises(QueueBusy, match="a client named c1 is connected already"):
        await story.start_confined("c1")
    story.start_confined("c2")
    assert (await serving).updates == 2
    for bus in story.all_buses:
        await bus.close()


async def test_a_confined_client_leaves_when_it_is_told_to_before_there_is_a_server() -> None:
    story = Confined(app_of())
    client = story.start_confined("c1")
    await story.until(o.ServerAwaited)
    story.clients["c1"].request_leave()
    async with asyncio.timeout(5):
        assert await client is None


async def test_an_inbox_that_was_lost_is_made_again_for_whoever_comes_back() -> None:
    story = Confined(app_of(rounds={"min_fit_clients": 1, "num_rounds": 2, "lease_s": 0.3}))
    story.broker.connect("server")._broker._declare(ingress())
    serving = story.start_server()
    await story.until(o.RunStarted)
    mute = story.broker.connect("c1", may_declare=False)
    await mute.publish(CONTROL, "c1", encode(m.Join(client_id="c1", session="s")))
    await story.until(o.MemberJoined)
    story.broker._delete(inbox("c1"))
    await story.until(o.MemberLost)
    story.start_confined("c1")
    assert (await serving).updates == 2
    for bus in story.all_buses:
        await bus.close()


async def test_the_memory_bus_refuses_who_may_not_declare_and_a_second_exclusive_consumer() -> None:
    broker = MemoryBroker()
    own, confined = broker.connect("server"), broker.connect("c1", may_declare=False)
    await own.declare(ingress())
    await own.declare(client_inbox("c1"))
    for denied in (confined.declare(client_inbox("c2")), confined.delete_queue(inbox("c1"))):
        with pytest.raises(BrokerDenied):
            await denied
    with pytest.raises(BrokerDenied):
        await confined.hold("lock").__aenter__()
    async with confined.consume(inbox("c1"), prefetch=1, exclusive=True):
        for exclusive in (True, False):
            with pytest.raises(QueueBusy):
                await own.consume(inbox("c1"), prefetch=1, exclusive=exclusive).__aenter__()
    async with own.consume(inbox("c1"), prefetch=1):
        with pytest.raises(QueueBusy):
            await confined.consume(inbox("c1"), prefetch=1, exclusive=True).__aenter__()


async def test_a_confined_client_waits_while_a_server_is_still_making_its_queues() -> None:
    story = Confined(app_of(rounds={"min_fit_clients": 1, "num_rounds": 1}))
    await story.broker.connect("server").declare(dataclasses.replace(ingress(), queues=(), bindings=()))
    client = story.start_confined("c1")
    await story.until(o.ServerAwaited)
    assert (await story.start_server()).updates == 1
    assert (await client).finished
    for bus in story.all_buses:
        await bus.close()

"""Users that send too much are shut out, and only they; what is rejected is told without a flood in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from fedbus.bus.base import Consumer, Delivery
from fedbus.bus.memory import MemoryBroker
from fedbus.bus.topology import CONTROL, QUARANTINE, UPDATES, ingress
from fedbus.errors import PublishUnconfirmed
from fedbus.observe import events as o
from fedbus.observe.logs import sentence
from fedbus.server import guard as guards
from fedbus.server.guard import Drops, Guard
from fedbus.server.identity import Identity
from fedbus.server.meter import Allowance, Meter
from fedbus.wire import messages as m
from fedbus.wire.codec import encode
from tests.kit import Gate, app_of, eventually, federation

FEW = Allowance(per_s=10, burst=100)


def delivery(user: str | None, size: int = 0) -> Delivery:
    return Delivery(body=bytes(size), tag=1, routing_key="", redelivered=False, offset=None, user_id=user)


def is_kept_out(broker: MemoryBroker, routing_key: str) -> bool:
    return QUARANTINE in broker._route(CONTROL, routing_key)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def spends(meter: Meter, user: str, cost: float) -> float:
    return meter.spend(user, cost, FEW)


def test_whoever_spends_more_than_its_allowance_is_shut_out_alone_and_longer_each_time() -> None:
    clock = Clock()
    meter = Meter(clock)
    assert [spends(meter, "mallory", 50) for _ in range(3)] == [0, 0, 60]
    assert meter.is_shut("mallory")
    assert not meter.is_shut("alice")
    clock.now += 60
    assert not meter.is_shut("mallory")
    assert spends(meter, "mallory", 50) == 0  # filled again meanwhile
    for length in (120, 240, 480, 960, 1920, 3600, 3600):
        assert spends(meter, "mallory", 10_000) == length
        clock.now += length
    clock.now += 1000
    assert spends(meter, "mallory", 10_000) == 60  # forgiven at last


def test_an_allowance_comes_back_with_time_and_no_further_than_its_burst() -> None:
    clock = Clock()
    meter = Meter(clock)
    for _ in range(100):
        assert spends(meter, "alice", 5) == 0
        clock.now += 0.5
    clock.now += 3600
    assert spends(meter, "alice", 100) == 0
    assert spends(meter, "alice", 1) == 60


@pytest.fixture
def told() -> list[object]:
    return []


@pytest.fixture
async def guard(told: list[object]) -> Guard:
    return Guard(MemoryBroker().connect("fed.server"), Identity("fed.server"), told.append)


async def test_rejections_are_told_at_once_and_then_counted(guard: Guard, told: list[object]) -> None:
    for reason in ("first", "second", "third"):
        guard.rejected(CONTROL, delivery("fed.m1"), reason)
    guard.rejected(CONTROL, delivery("fed.m2"), "another's")
    guard.rejected(UPDATES, delivery(None), "nobody's")
    guard.tell_rest()
    assert told == [
        o.MessageRejected(queue=CONTROL, reason="first", user="fed.m1"),
        o.MessageRejected(queue=CONTROL, reason="another's", user="fed.m2"),
        o.MessageRejected(queue=UPDATES, reason="nobody's"),
        o.MessageRejected(queue=CONTROL, reason="third", user="fed.m1", count=2),
    ]
    assert sentence(told[-1]) == "2 messages of fed.m1 on fedbus.control were rejected, the last one: third"


async def test_a_count_is_told_when_its_second_is_over(
    guard: Guard, told: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "_TELL_EVERY_S", 0.3)
    for _ in range(5):
        guard.rejected(CONTROL, delivery("fed.m1"), "garbage")
    await eventually(lambda: len(told) == 2)
    assert told[1] == o.MessageRejected(queue=CONTROL, reason="garbage", user="fed.m1", count=4)
    assert told[2:] == []


async def test_large_garbage_costs_more_than_small_and_the_servers_own_user_is_never_shut_out(guard: Guard) -> None:
    def sent(user: str, size: int) -> int:
        for count in range(1, 2000):
            guard.rejected(UPDATES, delivery(user, size), "garbage")
            if guard.is_shut_out(UPDATES, delivery(user)):
                return count
        return 0

    small, large = sent("fed.m1", 10), sent("fed.m2", 1 << 20)
    assert 0 < large < small < 300  # each by itself is paid for, beside what it takes of the processor
    assert sent("fed.server", 10) == 0


@pytest.mark.parametrize(
    ("user", "client_id"),
    [("fed.c1", "c1"), ("fed.c1~3", "c1"), ("fed.server", None), ("fed.worker~2", None), ("fed.a b", None), ("", None)],
)
def test_the_key_that_is_shut_is_that_of_a_client(user: str, client_id: str | None) -> None:
    assert Identity("fed.server~2").client_of(user) == client_id


def flood(message: m.Message | bytes) -> Iterator[bytes]:
    body = message if isinstance(message, bytes) else encode(message)
    while True:
        yield body


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        (CONTROL, b"garbage"),
        (CONTROL, m.Heartbeat(client_id="c1", session="s", run_id="r", fit_task="")),
        (CONTROL, m.Join(client_id="m1", session="s")),
        (UPDATES, b"garbage"),
        (UPDATES, m.Part(transfer="t", index=1, checksum=0, payload=b"")),
    ],
    ids=["garbage", "forged", "joins", "garbage for updates", "orphans"],
)
async def test_a_flood_is_kept_out_by_the_broker_and_the_run_goes_on(queue: str, message: m.Message | bytes) -> None:
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.TaskStarted)
        mallory = story.broker.connect("m1")
        refused = None
        for count, body in enumerate(flood(message)):
            try:
                await mallory.publish(queue, "m1", body)
            except PublishUnconfirmed as exc:
                refused = exc
                break
            assert count < 20_000, "nothing stops the flood"
        assert "refused" in str(refused)
        shut = await story.until(o.UserShutOut)
        assert (shut.user, shut.client_id) == ("m1", "m1")
        assert len(story.told(o.MessageRejected)) < 20
        gate.open()
        assert (await serving).updates == 1


async def test_a_server_that_died_leaves_nobody_out(told: list[object]) -> None:
    broker = MemoryBroker()
    own = broker.connect("fed.server")
    await own.declare(ingress())
    first = Guard(own, Identity("fed.server"), told.append)
    await first.begin()
    keeping = asyncio.create_task(first.keep_doors())
    while not first.is_shut_out(CONTROL, delivery("fed.m1")):
        first.rejected(CONTROL, delivery("fed.m1"), "garbage")
    mallory = broker.connect("fed.m1")
    await eventually(lambda: is_kept_out(broker, "m1"))
    with pytest.raises(PublishUnconfirmed):
        await mallory.publish(CONTROL, "m1", b"x")
    keeping.cancel()
    await Guard(own, Identity("fed.server"), told.append).begin()
    await mallory.publish(CONTROL, "m1", b"x")


async def test_a_door_opens_when_its_time_is_over(
    guard: Guard, told: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedbus.server.meter._SHUT_S", 0.05)
    broker = MemoryBroker()
    own = broker.connect("fed.server")
    await own.declare(ingress())
    guard = Guard(own, Identity("fed.server"), told.append)
    await guard.begin()
    keeping = asyncio.create_task(guard.keep_doors())
    while not guard.is_shut_out(CONTROL, delivery("fed.m1")):
        guard.rejected(CONTROL, delivery("fed.m1"), "garbage")
    mallory = broker.connect("fed.m1")
    await eventually(lambda: is_kept_out(broker, "m1"))
    await eventually(lambda: not is_kept_out(broker, "m1"))
    await mallory.publish(CONTROL, "m1", b"x")
    keeping.cancel()


class Acks(Consumer):
    """Notes what is acknowledged, call by call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    async def receive(self) -> Delivery:
        raise NotImplementedError

    async def ack(self, *deliveries: Delivery) -> None:
        self.calls.append(len(deliveries))

    async def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        raise NotImplementedError


async def test_what_is_dropped_waits_for_what_came_before_it_and_is_settled_at_once() -> None:
    older = [True]
    acks = Acks()
    drops = Drops(acks, has_older=lambda: older[0])
    for _ in range(1000):
        await drops.add(delivery("fed.m1"))
    assert acks.calls == []
    older[0] = False
    await drops.settle_if_cheap()
    assert acks.calls == [1000]
    await drops.settle_if_cheap()
    for _ in range(256):
        await drops.add(delivery("fed.m1"))
    assert acks.calls == [1000, 256]


@pytest.mark.parametrize(("size", "most"), [(0, 32_768), (1 << 20, 256)])
async def test_no_more_drops_wait_than_the_broker_may_hold(size: int, most: int) -> None:
    acks = Acks()
    drops = Drops(acks, has_older=lambda: True)
    body = delivery("fed.m1", size)
    for _ in range(most):
        await drops.add(body)
    assert acks.calls == [most]

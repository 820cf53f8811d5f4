"""The supervised bus over the broker in memory: every operation fails once, and every outage ends or is final."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from fedbus.bus.base import Body, Bus, Consumer, Delivery, Offset
from fedbus.bus.memory import MemoryBroker, MemoryBus
from fedbus.bus.supervised import LinkState, SupervisedBus, no_observer
from fedbus.bus.topology import Binding, Exchange, Queue, QueueKind, Topology
from fedbus.errors import (
    BrokerClosed,
    BrokerDenied,
    BrokerUnreachable,
    PublishUnconfirmed,
    QueueBusy,
    QueueMismatch,
    QueueMissing,
    TurnedOut,
    Unroutable,
)
from tests.faults.failing import Fault, Kind, When

Q = "q"
FAST: dict[str, Any] = {"pause_s": 0.001, "longest_pause_s": 0.01}


def topology(kind: QueueKind = "classic", name: str = Q) -> Topology:
    return Topology(
        exchanges=(Exchange(name=name, kind="fanout"),),
        queues=(Queue(name=name, kind=kind),),
        bindings=(Binding(exchange=name, queue=name),),
    )


def over(
    reconnect: Callable[[], Awaitable[Bus]], first: Bus, states: list[LinkState] | None = None, **settings: Any
) -> SupervisedBus:
    """With pauses of a test's size."""
    settings = {"on_state": no_observer if states is None else states.append, **FAST, **settings}
    return SupervisedBus(first, reconnect, **settings)


def supervised(broker: MemoryBroker, states: list[LinkState] | None = None, **settings: Any) -> SupervisedBus:
    async def reconnect() -> Bus:
        return broker.connect()

    return over(reconnect, broker.connect(), states, **settings)


def failing(broker: MemoryBroker, fault: Fault) -> SupervisedBus:
    async def reconnect() -> Bus:
        return fault.wrap(broker.connect())

    return over(reconnect, fault.wrap(broker.connect()))


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    yield
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("fedbus")]


@asynccontextmanager
async def started(operation: Awaitable[Any]) -> AsyncIterator[asyncio.Task[Any]]:
    """`operation` in a task of its own, which is under way: it waits for something."""
    task = asyncio.ensure_future(operation)
    assert isinstance(task, asyncio.Task)
    await turns()
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # of a broker that tells nobody when it comes true
            await asyncio.sleep(0.001)


async def take(consumer: Consumer) -> Delivery:
    async with asyncio.timeout(10):
        return await consumer.receive()


# ---- every operation fails once --------------------------------------------------------------------------------------


async def play(fault: Fault) -> None:
    """Publish 20 messages, and acknowledge each when it comes; then judge by what took effect at the broker."""
    broker = MemoryBroker()
    bodies = [bytes([i]) for i in range(20)]
    async with failing(broker, fault) as publisher, failing(broker, fault) as reader:
        await publisher.declare(topology())

        async def read() -> None:
            async with reader.consume(Q, prefetch=3) as consumer:
                async for delivery in consumer:
                    await consumer.ack(delivery)

        async with started(read()) as reading:
            for body in bodies:
                await publisher.publish(Q, "", body)
            await until(lambda: reading.done() or count(fault, "publish") == count(fault, "ack"))
            assert not reading.done()
    published = count(fault, "publish")
    assert set(published) == set(bodies)
    assert published.total() <= len(bodies) + 1  # twice only where its confirm was lost
    settled: Counter[bytes] = Counter()
    for kind, body in fault.effects:
        if kind == "receive":
            assert settled[body] < published[body], "acknowledged, and delivered again"
        settled[body] += kind == "ack"


def count(fault: Fault, wanted: Kind) -> Counter[bytes]:
    return Counter(body for kind, body in fault.effects if kind == wanted)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_whichever_operation_fails_nothing_is_lost_and_nothing_settled_comes_again(when: When) -> None:
    nth = 0
    while True:
        fault = Fault(nth + 1, when=when)
        async with asyncio.timeout(10):
            await play(fault)
        if not fault.happened:
            break
        nth += 1
    assert nth > 60  # 20 publishes, 20 deliveries, 20 acknowledgements


@pytest.mark.parametrize("when", ["before", "after"])
async def test_whichever_operation_fails_a_stream_is_read_once_and_in_order(when: When) -> None:
    nth = 0
    while True:
        fault = Fault(nth + 1, when=when)
        async with asyncio.timeout(10):
            assert await read_stream(fault) == list(range(2, 12))
        if not fault.happened:
            break
        nth += 1
    assert nth > 20


async def read_stream(fault: Fault) -> list[int | None]:
    """The offsets of what is behind 2 in a stream of 12."""
    broker = MemoryBroker()
    writer = broker.connect()
    await writer.declare(topology("stream"))
    for i in range(12):
        await writer.publish(Q, "", bytes([i]))
    offsets = []
    async with failing(broker, fault) as reader, reader.consume(Q, prefetch=3, offset=2) as consumer:
        for _ in range(10):
            delivery = await consumer.receive()
            offsets.append(delivery.offset)
            await consumer.ack(delivery)
    return offsets


# ---- outages ---------------------------------------------------------------------------------------------------------


async def test_an_outage_is_told_and_publishes_wait_it_out_in_their_order() -> None:
    broker, states = MemoryBroker(), list[LinkState]()
    async with supervised(broker, states) as bus:
        await bus.declare(topology())
        broker.stop()
        publishes = [asyncio.ensure_future(bus.publish(Q, "", bytes([i]))) for i in range(10)]
        await until(lambda: [state.kind for state in states] == ["lost"])
        broker.start()
        await asyncio.gather(*publishes)
        assert [state.kind for state in states] == ["lost", "restored"]
        assert states[1].outage_s > 0
        async with bus.consume(Q, prefetch=0) as consumer:
            assert [(await take(consumer)).body[0] for _ in range(10)] == list(range(10))


async def test_a_question_that_an_outage_interrupts_is_asked_again() -> None:
    broker, states = MemoryBroker(), list[LinkState]()
    async with supervised(broker, states) as bus, supervised(broker) as reader:
        await bus.declare(topology())
        async with reader.consume(Q, prefetch=1):
            broker.stop()
            async with started(bus.queue_state(Q)) as asking:
                broker.start()
                assert (await asking).consumers in (0, 1)  # the reader may be on its way
                await until(lambda: [state.kind for state in states] == ["lost", "restored"])


async def test_what_a_new_broker_has_never_seen_is_declared_again_but_not_what_was_deleted() -> None:
    brokers = [MemoryBroker(), MemoryBroker()]

    async def reconnect() -> Bus:
        return brokers[1].connect()

    async with over(reconnect, brokers[0].connect()) as bus:
        await bus.declare(topology(name="kept"))
        await bus.declare(topology(name="deleted"))
        await bus.declare(topology(name="kept"))
        await bus.delete_queue("deleted")
        brokers[0].stop()
        await bus.publish("kept", "", b"x")
        with pytest.raises(Unroutable):
            await bus.publish("deleted", "", b"x")
        with pytest.raises(QueueMissing):
            async with bus.consume("deleted", prefetch=1):
                pass
    assert brokers[1].depth("kept") == 1


async def test_a_queue_with_other_settings_after_an_outage_is_final() -> None:
    brokers = [MemoryBroker(), MemoryBroker()]
    await brokers[1].connect().declare(topology("stream"))

    async def reconnect() -> Bus:
        return brokers[1].connect()

    async with over(reconnect, brokers[0].connect()) as bus:
        await bus.declare(topology())
        async with bus.consume(Q, prefetch=1) as consumer, started(bus.closed()) as closed:
            brokers[0].stop()
            with pytest.raises(QueueMismatch):
                await take(consumer)
            with pytest.raises(QueueMismatch):
                await closed
        with pytest.raises(QueueMismatch):
            await bus.publish(Q, "", b"x")


async def test_a_refusal_passes_while_a_node_boots_but_is_final_when_it_is_all_we_hear() -> None:
    broker = MemoryBroker()
    answers: list[Exception] = [
        BrokerDenied("no vhost"),
        BrokerUnreachable("refused"),
        BrokerDenied("no vhost"),
    ]

    async def reconnect() -> Bus:
        if answers:
            raise answers.pop()
        return broker.connect()

    # Of any two refusals without another error between them the second is final.
    async with over(reconnect, broker.connect(), denied_patience_s=1e-9) as bus:
        await bus.declare(topology())
        broker.drop_connections()
        await bus.publish(Q, "", b"x")
        assert not answers
        answers += [BrokerDenied("wrong password")] * 2
        broker.drop_connections()
        for operation in (bus.publish(Q, "", b"x"), bus.closed(), bus.declare(topology())):
            with pytest.raises(BrokerDenied, match="wrong password"):
                await operation


async def test_who_was_turned_out_takes_the_first_refusal_for_final() -> None:
    async def reconnect() -> Bus:
        raise BrokerDenied("no such user")

    first = MemoryBroker().connect("a")
    async with over(reconnect, first, denied_patience_s=1e9) as bus:
        await bus.declare(topology())
        first._end(TurnedOut("user 'a' is deleted"))
        with pytest.raises(BrokerDenied, match="no such user"):
            await bus.publish(Q, "", b"x")


async def test_an_outage_may_be_declared_final() -> None:
    broker = MemoryBroker()
    async with supervised(broker, give_up_s=0.01) as bus:
        broker.stop()
        with pytest.raises(BrokerUnreachable, match="no connection for"):
            await bus.closed()
        with pytest.raises(BrokerUnreachable):
            await bus.publish(Q, "", b"x")


@pytest.mark.parametrize(("longest_pause_s", "expected"), [(10.0, [0, 1, 2, 3, 4]), (-1.0, [0, 0, 0, 0, 0])])
async def test_only_a_connection_that_lived_for_a_while_starts_the_pauses_anew(
    longest_pause_s: float, expected: list[int]
) -> None:
    broker = MemoryBroker()
    attempts: list[int] = []

    class Counting(SupervisedBus):
        def _jitter(self, attempt: int) -> float:
            attempts.append(attempt)
            return 0.0

    def flap(state: LinkState) -> None:
        if state.kind == "restored" and len(attempts) < 5:
            asyncio.get_running_loop().call_soon(broker.drop_connections)

    async def reconnect() -> Bus:
        return broker.connect()

    async with Counting(broker.connect(), reconnect, on_state=flap, longest_pause_s=longest_pause_s) as bus:
        broker.drop_connections()
        await until(lambda: len(attempts) == 5)
        await bus.declare(topology())
    assert attempts == expected


def test_the_pauses_are_full_jitter() -> None:
    async def story() -> None:
        async with supervised(MemoryBroker(), pause_s=0.2, longest_pause_s=10.0) as bus:
            for attempt, longest in ((0, 0.2), (3, 1.6), (6, 10.0), (100_000, 10.0)):
                pauses = [bus._jitter(attempt) for _ in range(200)]
                assert 0 <= min(pauses) < longest / 4
                assert longest * 3 / 4 < max(pauses) <= longest

    asyncio.run(story())


async def test_an_observer_that_fails_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    broker = MemoryBroker()

    def fail(_: LinkState) -> None:
        raise ZeroDivisionError

    async with supervised(broker, on_state=fail) as bus:
        broker.drop_connections()
        await bus.declare(topology())
    assert "observer" in caplog.text


# ---- publishing ------------------------------------------------------------------------------------------------------


class Refusing(MemoryBus):
    """Refuses the first two messages, as a full queue does."""

    refusals = 2

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: Body,
        *,
        mandatory: bool = True,
        expires_s: float | None = None,
        timeout_s: float | None = None,
    ) -> None:
        if self.refusals:
            self.refusals -= 1
            raise PublishUnconfirmed("a full queue")
        await super().publish(exchange, routing_key, body, mandatory=mandatory, expires_s=expires_s)


async def test_a_refused_message_is_sent_again() -> None:
    broker = MemoryBroker()

    async def reconnect() -> Bus:
        raise AssertionError("nothing ended")

    async with over(reconnect, Refusing(broker, "guest")) as bus:
        await bus.declare(topology())
        await bus.publish(Q, "", b"x")
    assert broker.depth(Q) == 1


async def test_patience_with_a_confirm_doubles_and_is_short_for_a_stream_and_after_a_loss() -> None:
    broker, given = MemoryBroker(), list[float | None]()

    class Impatient(Refusing):
        async def publish(self, *args: Any, timeout_s: float | None = None, **rest: Any) -> None:
            given.append(timeout_s)
            await super().publish(*args, **rest)

    async def reconnect() -> Bus:
        return Impatient(broker, "guest")

    first = Impatient(broker, "guest")
    broker._buses.add(first)
    async with over(reconnect, first) as bus:
        await bus.declare(topology())
        await bus.declare(topology("stream", "s"))
        await bus.publish(Q, "", b"x")
        assert given == [60, 120, 240]
        first.refusals = 2
        await bus.publish("s", "", b"x")
        assert given[3:] == [2, 4, 8]
        broker.drop_connections()
        await turns()
        await bus.publish(Q, "", b"y")
    assert given[-3:] == [2, 4, 8]
    assert len(given) > 6


async def test_a_publish_with_a_deadline_is_unconfirmed_in_an_outage_and_under_an_alarm() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        broker.block()
        with pytest.raises(PublishUnconfirmed):
            await bus.publish(Q, "", b"x", timeout_s=0.01)
        broker.unblock()
        broker.stop()
        with pytest.raises(PublishUnconfirmed):
            await bus.publish(Q, "", b"x", timeout_s=0.01)
        broker.start()
        await bus.publish(Q, "", b"y", timeout_s=10)
        async with bus.consume(Q, prefetch=0) as consumer:
            assert (await take(consumer)).body == b"y"


async def test_an_alarm_is_told_makes_publishers_wait_and_consumers_go_on() -> None:
    broker, states = MemoryBroker(), list[LinkState]()
    async with supervised(broker, states) as bus, supervised(broker) as other:
        await bus.declare(topology())
        await bus.publish(Q, "", b"1")
        broker.block("low on disk")
        async with started(bus.publish(Q, "", b"2")) as publish, other.consume(Q, prefetch=1) as consumer:
            delivery = await take(consumer)
            await consumer.ack(delivery)
            assert not publish.done()
            broker.unblock()
            await publish
            assert (await take(consumer)).body == b"2"
    assert [(state.kind, state.reason) for state in states] == [
        ("blocked", "low on disk"),
        ("unblocked", "the alarm is over"),
    ]


async def test_a_connection_that_is_lost_under_an_alarm_is_blocked_again_by_the_next() -> None:
    broker, states = MemoryBroker(), list[LinkState]()
    async with supervised(broker, states) as bus:
        await bus.declare(topology())
        broker.block()
        async with started(bus.publish(Q, "", b"x")) as publish:
            broker.drop_connections()
            await until(lambda: len(states) == 4)
            broker.unblock()
            await publish
    assert [state.kind for state in states] == ["blocked", "lost", "restored", "blocked", "unblocked"]


# ---- consuming -------------------------------------------------------------------------------------------------------


async def test_what_was_not_settled_comes_again_in_the_next_generation_and_the_old_delivery_settles_nothing() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        await bus.publish(Q, "", b"x")
        async with bus.consume(Q, prefetch=1) as consumer:
            old = await take(consumer)
            broker.drop_connections()
            await consumer.ack(old)
            new = await take(consumer)
            assert (old.generation, new.generation) == (0, 1)
            assert (new.body, new.redelivered) == (b"x", True)
            await consumer.ack(old)
            await consumer.reject(old, requeue=False)
        assert broker.depth(Q) == 1


async def test_deliveries_of_several_generations_are_acknowledged_as_far_as_they_live() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        for body in (b"1", b"2"):
            await bus.publish(Q, "", body)
        async with bus.consume(Q, prefetch=2) as consumer:
            old = [await take(consumer), await take(consumer)]
            broker.drop_connections()
            new = await take(consumer)
            await consumer.ack(*old, new)
        assert broker.depth(Q) == 1


async def test_a_subscription_that_is_not_read_is_made_again_all_the_same() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        async with bus.consume(Q, prefetch=1):
            broker.drop_connections()
            assert not is_consumed(broker)
            await until(lambda: is_consumed(broker))


def is_consumed(broker: MemoryBroker) -> bool:
    return bool(broker._queues[Q].consumers)


async def test_a_name_that_we_hold_is_ours_again_on_the_next_connection() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        async with bus.hold("lock"):
            for _ in range(3):
                broker.drop_connections()
                await bus.publish(Q, "", b"x")
                with pytest.raises(QueueBusy):
                    async with broker.connect().hold("lock"):
                        pass
        async with broker.connect().hold("lock"):
            pass


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", [1, 2])
async def test_whether_the_first_hold_fails_or_a_later_one_the_name_is_ours(when: When, nth: int) -> None:
    broker = MemoryBroker()
    fault = Fault(nth, kind="hold", when=when)
    async with failing(broker, fault) as bus:
        await bus.declare(topology())
        async with bus.hold("lock"):
            broker.drop_connections()
            await bus.publish(Q, "", b"x")
            with pytest.raises(QueueBusy):
                async with broker.connect().hold("lock"):
                    pass
    assert fault.happened
    async with broker.connect().hold("lock"):
        pass


async def test_a_name_that_is_let_go_of_while_there_is_no_connection_is_not_held_on_the_next() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        async with bus.hold("lock"):
            broker.stop()
            await turns()
        broker.start()
        await bus.publish(Q, "", b"x")
        async with broker.connect().hold("lock"):
            pass


@asynccontextmanager
async def taken_meanwhile(broker: MemoryBroker, **settings: Any) -> AsyncIterator[tuple[SupervisedBus, Consumer, Bus]]:
    """A bus that holds a name, consumes, and is let back on the broker when another bus, the last, holds the name."""
    gate = asyncio.Event()

    async def reconnect() -> Bus:
        await gate.wait()
        return broker.connect()

    async with over(reconnect, broker.connect(), **settings) as bus:
        await bus.declare(topology())
        async with bus.hold("lock"), bus.consume(Q, prefetch=1) as consumer:
            broker.drop_connections()
            async with broker.connect() as other, other.hold("lock"):
                gate.set()
                yield bus, consumer, other


async def test_nothing_goes_on_until_the_name_that_a_ghost_holds_is_ours_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.bus.supervised._BUSY_PAUSE_S", 0.001)
    broker = MemoryBroker()
    async with taken_meanwhile(broker) as (bus, consumer, ghost):
        await ghost.publish(Q, "", b"of the ghost")
        async with started(bus.publish(Q, "", b"ours")) as publishing, started(consumer.receive()) as receiving:
            await asyncio.sleep(0.02)
            assert broker.depth(Q) == 1
            assert not publishing.done()
            await ghost.close()
            async with asyncio.timeout(10):
                assert (await receiving).body == b"of the ghost"
                await publishing
        with pytest.raises(QueueBusy):
            async with broker.connect().hold("lock"):
                pass


async def test_whoever_was_replaced_learns_it_and_took_nothing_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.bus.supervised._BUSY_PAUSE_S", 0.001)
    broker = MemoryBroker()
    async with taken_meanwhile(broker, busy_patience_s=0.01) as (bus, consumer, other):
        await other.publish(Q, "", b"of the successor")
        for operation in (bus.closed, consumer.receive, lambda: bus.publish(Q, "", b"ours")):
            with pytest.raises(QueueBusy, match="lock is held by another connection"):
                async with asyncio.timeout(10):
                    await operation()
        assert broker.depth(Q) == 1


async def test_a_queue_that_is_deleted_ends_its_consumer_for_good() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        async with bus.consume(Q, prefetch=1) as consumer:
            await broker.connect().delete_queue(Q)
            for _ in range(2):
                with pytest.raises(QueueMissing):
                    await take(consumer)
            broker.drop_connections()
            await bus.declare(topology(name="other"))
            with pytest.raises(QueueMissing):
                await take(consumer)


class Odd(MemoryBus):
    """Begins streams two messages before the offset it is asked for."""

    def __init__(self, broker: MemoryBroker, offsets: list[Offset | None]) -> None:
        super().__init__(broker, "guest")
        broker._buses.add(self)
        self._offsets = offsets

    def consume(
        self, queue: str, *, prefetch: int, offset: Offset | None = None, exclusive: bool = False
    ) -> AbstractAsyncContextManager[Consumer]:
        self._offsets.append(offset)
        earlier = max(0, offset - 2) if isinstance(offset, int) else offset
        return super().consume(queue, prefetch=prefetch, offset=earlier)


async def test_a_stream_goes_on_behind_what_was_handed_out_even_where_the_broker_begins_before_it() -> None:
    broker, asked = MemoryBroker(), list[Offset | None]()

    async def reconnect() -> Bus:
        return Odd(broker, asked)

    async with over(reconnect, Odd(broker, asked)) as bus:
        await bus.declare(topology("stream"))
        for i in range(8):
            await bus.publish(Q, "", bytes([i]))
        async with bus.consume(Q, prefetch=1, offset="first") as consumer:
            found = []
            for i in range(8):
                if i == 5:
                    broker.drop_connections()
                delivery = await take(consumer)
                found.append(delivery.offset)
                await consumer.ack(delivery)
    assert found == list(range(8))
    assert asked == ["first", 5]


async def test_leaving_a_subscription_ends_who_still_receives_from_it_and_costs_no_connection() -> None:
    broker, states = MemoryBroker(), list[LinkState]()
    async with supervised(broker, states) as bus:
        await bus.declare(topology())
        subscription = bus.consume(Q, prefetch=1)
        consumer = await subscription.__aenter__()
        async with started(consumer.receive()) as receiving:
            await subscription.__aexit__(None, None, None)
            with pytest.raises(BrokerClosed, match="the subscription has ended"):
                await receiving
        await bus.publish(Q, "", b"x")
    assert states == []


@pytest.mark.parametrize(("offset", "first"), [("first", 0), ("last", 4), ("next", 5), (3, 3)])
async def test_a_stream_of_which_nothing_was_read_begins_again_where_it_was_to_begin(
    offset: Offset, first: int
) -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology("stream"))
        for i in range(5):
            await bus.publish(Q, "", bytes([i]))
        async with bus.consume(Q, prefetch=2, offset=offset) as consumer:
            broker.drop_connections()
            await until(lambda: is_consumed(broker))
            await bus.publish(Q, "", b"\x05")
            assert (await take(consumer)).offset == first


# ---- ends ------------------------------------------------------------------------------------------------------------


async def test_closing_while_it_reconnects_ends_everything_that_waits() -> None:
    broker, trying = MemoryBroker(), asyncio.Event()

    async def reconnect() -> Bus:
        trying.set()
        await asyncio.Event().wait()
        raise AssertionError

    bus = over(reconnect, broker.connect())
    await bus.declare(topology())
    async with bus.consume(Q, prefetch=1) as consumer:
        broker.stop()
        async with (
            started(bus.publish(Q, "", b"x")) as publish,
            started(consumer.receive()) as receive,
            started(bus.closed()) as closed,
        ):
            await trying.wait()
            await asyncio.gather(bus.close(), bus.close())
            for task in (publish, receive):
                with pytest.raises(BrokerClosed):
                    await task
            await closed
        with pytest.raises(BrokerClosed):
            await bus.publish(Q, "", b"x")


async def test_in_an_outage_a_publish_can_be_cancelled_and_a_subscription_left() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        async with bus.consume(Q, prefetch=1):
            broker.stop()
            async with started(bus.publish(Q, "", b"cancelled")) as publish:
                publish.cancel()
                await asyncio.wait([publish])
        broker.start()
        await bus.publish(Q, "", b"x")
        async with bus.consume(Q, prefetch=0) as consumer:
            assert (await take(consumer)).body == b"x"
    assert not bus._line


async def test_a_first_subscription_in_an_outage_waits_for_its_end() -> None:
    broker = MemoryBroker()
    async with supervised(broker) as bus:
        await bus.declare(topology())
        broker.stop()

        async def receive() -> bytes:
            async with bus.consume(Q, prefetch=1) as consumer:
                return (await take(consumer)).body

        async with started(receive()) as receiving:
            broker.start()
            await bus.publish(Q, "", b"x")
            assert await receiving == b"x"


async def test_receiving_from_a_subscription_that_was_left_costs_no_connection() -> None:
    broker, states = MemoryBroker(), list[LinkState]()
    async with supervised(broker, states) as bus:
        await bus.declare(topology())
        await bus.publish(Q, "", b"x")
        async with bus.consume(Q, prefetch=1) as consumer:
            delivery = await take(consumer)
        with pytest.raises(BrokerClosed):
            await consumer.receive()
        await consumer.ack(delivery)
        await bus.publish(Q, "", b"y")
    assert states == []

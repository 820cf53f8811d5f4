"""One suite for every `Bus`: what fedbus relies on holds for RabbitMQ and for its in-memory twin alike."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import TypeAlias

import pytest

from fedbus.bus.base import Bus, Consumer, Delivery, QueueState
from fedbus.bus.memory import MemoryBroker
from fedbus.bus.node import PrivateNode
from fedbus.bus.rabbitmq import connect
from fedbus.bus.supervised import SupervisedBus
from fedbus.bus.topology import (
    TASKS,
    Binding,
    Exchange,
    MessageQueueKind,
    Queue,
    QueueKind,
    Topology,
    client_inbox,
    inbox,
    ingress,
    model_stream,
)
from fedbus.errors import BrokerClosed, PublishUnconfirmed, QueueBusy, QueueMismatch, QueueMissing, Unroutable
from tests.faults.proxy import Proxy

Connect: TypeAlias = Callable[[], Awaitable[Bus]]


@pytest.fixture(
    params=[
        "memory",
        "memory supervised",
        pytest.param("rabbitmq", marks=pytest.mark.broker),
        pytest.param("rabbitmq supervised", marks=pytest.mark.broker),
    ]
)
async def open_bus(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """Opens one more connection to the broker under test; all are closed at the end."""
    kind, _, supervised = request.param.partition(" ")
    broker = MemoryBroker()
    url = request.getfixturevalue("node").url if kind == "rabbitmq" else ""

    async def connect_once() -> Bus:
        return broker.connect() if kind == "memory" else await connect(url)

    async with AsyncExitStack() as stack:

        async def open_one() -> Bus:
            bus = await connect_once()
            return await stack.enter_async_context(SupervisedBus(bus, connect_once) if supervised else bus)

        yield open_one


@pytest.fixture
async def bus(open_bus: Connect) -> Bus:
    return await open_bus()


@pytest.fixture
def name() -> Iterator[str]:
    """A name that no other test uses: the broker is shared."""
    return iter([f"test.{uuid.uuid4().hex[:8]}"])


@pytest.fixture
async def queue(bus: Bus, name: Iterator[str]) -> AsyncIterator[str]:
    """A classic queue with an exchange of the same name in front."""
    its_name = next(name)
    await declare(bus, its_name)
    yield its_name
    await bus.delete_queue(its_name)


async def declare(bus: Bus, name: str, **settings: object) -> None:
    await bus.declare(
        Topology(
            exchanges=(Exchange(name=name, kind="fanout"),),
            queues=(Queue(name=name, **settings),),  # type: ignore[arg-type]
            bindings=(Binding(exchange=name, queue=name),),
        )
    )


async def take(consumer: Consumer, count: int) -> list[Delivery]:
    async with asyncio.timeout(10):
        return [await consumer.receive() for _ in range(count)]


async def nothing_comes(consumer: Consumer) -> bool:
    try:
        async with asyncio.timeout(0.15):
            await consumer.receive()
    except TimeoutError:
        return True
    return False


async def test_messages_come_in_the_order_of_publishing(bus: Bus, queue: str) -> None:
    bodies = [bytes([i]) * i for i in range(20)]
    for body in bodies:
        await bus.publish(queue, "", body)
    async with bus.consume(queue, prefetch=0) as consumer:
        deliveries = await take(consumer, 20)
        assert [delivery.body for delivery in deliveries] == bodies
        assert not any(delivery.redelivered for delivery in deliveries)
        assert {delivery.offset for delivery in deliveries} == {None}


async def test_publishes_started_in_order_arrive_in_order(bus: Bus, queue: str) -> None:
    await asyncio.gather(*(bus.publish(queue, "", str(i).encode()) for i in range(50)))
    async with bus.consume(queue, prefetch=0) as consumer:
        assert [int(delivery.body) for delivery in await take(consumer, 50)] == list(range(50))


async def test_a_memoryview_travels_as_its_bytes(bus: Bus, queue: str) -> None:
    body = bytes(range(256)) * 4096  # more than one frame
    await bus.publish(queue, "", memoryview(body)[1:])
    async with bus.consume(queue, prefetch=1) as consumer:
        (delivery,) = await take(consumer, 1)
        assert delivery.body == body[1:]


async def test_the_sender_is_known_by_its_broker_user(bus: Bus, queue: str) -> None:
    await bus.publish(queue, "", b"x")
    async with bus.consume(queue, prefetch=1) as consumer:
        (delivery,) = await take(consumer, 1)
        assert delivery.user_id in ("guest", "fedbus")


async def test_prefetch_bounds_what_is_unsettled(bus: Bus, queue: str) -> None:
    for i in range(5):
        await bus.publish(queue, "", bytes([i]))
    async with bus.consume(queue, prefetch=2) as consumer:
        first, _ = await take(consumer, 2)
        assert await nothing_comes(consumer)
        await consumer.ack(first)
        (third,) = await take(consumer, 1)
        assert third.body == b"\x02"
        assert await nothing_comes(consumer)


async def test_without_a_prefetch_a_quorum_queue_delivers_more_than_it_would_by_itself(
    bus: Bus, name: Iterator[str]
) -> None:
    queue = next(name)
    await declare(bus, queue, kind="quorum")
    await asyncio.gather(*(bus.publish(queue, "", b"x") for _ in range(2100)))
    async with bus.consume(queue, prefetch=0) as consumer:
        await consumer.ack(*await take(consumer, 2100))
    await bus.delete_queue(queue)


async def test_what_is_not_settled_goes_back_in_its_old_place(open_bus: Connect, queue: str) -> None:
    bus = await open_bus()
    for i in range(4):
        await bus.publish(queue, "", bytes([i]))
    other = await open_bus()
    async with other.consume(queue, prefetch=3) as consumer:
        deliveries = await take(consumer, 3)
        await consumer.ack(deliveries[1])
    async with bus.consume(queue, prefetch=0) as consumer:
        again = await take(consumer, 3)
        assert [(delivery.body, delivery.redelivered) for delivery in again] == [
            (b"\x00", True),
            (b"\x02", True),
            (b"\x03", True),  # the acknowledgement had made room for it
        ]
        assert await nothing_comes(consumer)


async def test_a_closed_connection_gives_back_what_it_held(open_bus: Connect, queue: str) -> None:
    bus, dying = await open_bus(), await open_bus()
    await bus.publish(queue, "", b"x")
    async with AsyncExitStack() as stack:
        consumer = await stack.enter_async_context(dying.consume(queue, prefetch=1))
        await take(consumer, 1)
        await dying.close()
        with pytest.raises(BrokerClosed):
            await consumer.receive()
    async with bus.consume(queue, prefetch=1) as consumer:
        (delivery,) = await take(consumer, 1)
        assert delivery.redelivered


async def test_an_acknowledged_message_never_comes_again(open_bus: Connect, queue: str) -> None:
    bus, other = await open_bus(), await open_bus()
    await bus.publish(queue, "", b"x")
    async with other.consume(queue, prefetch=1) as consumer:
        (delivery,) = await take(consumer, 1)
        await consumer.ack(delivery)
    async with bus.consume(queue, prefetch=1) as consumer:
        assert await nothing_comes(consumer)


async def test_several_are_acknowledged_at_once_and_the_others_stay(open_bus: Connect, queue: str) -> None:
    bus, other = await open_bus(), await open_bus()
    for i in range(8):
        await bus.publish(queue, "", bytes([i]))
    async with other.consume(queue, prefetch=0) as consumer:
        got = await take(consumer, 8)
        await consumer.ack(got[1])
        await consumer.ack(got[6], got[3], got[0], got[2])  # with 1, settled before, everything up to 3
        await consumer.ack()
    async with bus.consume(queue, prefetch=0) as consumer:
        assert [delivery.body[0] for delivery in await take(consumer, 3)] == [4, 5, 7]
        assert await nothing_comes(consumer)


async def test_a_delivery_that_is_acknowledged_twice_does_not_settle_another(open_bus: Connect, queue: str) -> None:
    bus = await open_bus()
    for i in range(3):
        await bus.publish(queue, "", bytes([i]))
    async with (await open_bus()).consume(queue, prefetch=0) as consumer:
        got = await take(consumer, 3)
        await consumer.ack(got[0])
        with contextlib.suppress(BrokerClosed):  # a supervised one takes it as the end of the connection
            await consumer.ack(got[0], got[1])
    async with bus.consume(queue, prefetch=0) as consumer:
        assert [delivery.body[0] for delivery in await take(consumer, 2)] == [1, 2]


async def test_a_rejected_message_comes_again_when_requeued(bus: Bus, queue: str) -> None:
    await bus.publish(queue, "", b"x")
    async with bus.consume(queue, prefetch=1) as consumer:
        (delivery,) = await take(consumer, 1)
        await consumer.reject(delivery, requeue=True)
        (again,) = await take(consumer, 1)
        assert (again.body, again.redelivered) == (b"x", True)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_message_rejected_for_good_goes_to_the_dead_letters(
    bus: Bus, name: Iterator[str], kind: QueueKind
) -> None:
    queue = next(name)
    dead = f"{queue}.dead"
    await declare(bus, dead)
    await declare(bus, queue, kind=kind, dead_letter_exchange=dead)
    await bus.publish(queue, "", b"x")
    async with bus.consume(queue, prefetch=1) as consumer, bus.consume(dead, prefetch=1) as dead_letters:
        (delivery,) = await take(consumer, 1)
        await consumer.reject(delivery, requeue=False)
        (letter,) = await take(dead_letters, 1)
        assert letter.body == b"x"
        assert await nothing_comes(consumer)
    for each in (queue, dead):
        await bus.delete_queue(each)


async def test_a_delivery_limit_ends_in_the_dead_letters(bus: Bus, name: Iterator[str]) -> None:
    queue = next(name)
    dead = f"{queue}.dead"
    await declare(bus, dead)
    await declare(bus, queue, kind="quorum", dead_letter_exchange=dead, delivery_limit=2)
    await bus.publish(queue, "", b"x")
    async with bus.consume(queue, prefetch=1) as consumer, bus.consume(dead, prefetch=1) as dead_letters:
        for _ in range(3):
            (delivery,) = await take(consumer, 1)
            await consumer.reject(delivery, requeue=True)
        (letter,) = await take(dead_letters, 1)
        assert letter.body == b"x"
    for each in (queue, dead):
        await bus.delete_queue(each)


async def test_a_mandatory_message_that_no_queue_takes_comes_back(bus: Bus, name: Iterator[str]) -> None:
    exchange = next(name)
    await bus.declare(Topology(exchanges=(Exchange(name=exchange, kind="direct"),)))
    with pytest.raises(Unroutable):
        await bus.publish(exchange, "nobody", b"x")
    await bus.publish(exchange, "nobody", b"x", mandatory=False)


async def test_a_direct_exchange_goes_by_the_routing_key(bus: Bus, name: Iterator[str]) -> None:
    exchange = next(name)
    a, b = f"{exchange}.a", f"{exchange}.b"
    await bus.declare(
        Topology(
            exchanges=(Exchange(name=exchange, kind="direct"),),
            queues=(Queue(name=a), Queue(name=b)),
            bindings=(
                Binding(exchange=exchange, queue=a, routing_key="a"),
                Binding(exchange=exchange, queue=b, routing_key="b"),
            ),
        )
    )
    await bus.publish(exchange, "b", b"x")
    async with bus.consume(a, prefetch=1) as at_a, bus.consume(b, prefetch=1) as at_b:
        (delivery,) = await take(at_b, 1)
        assert (delivery.body, delivery.routing_key) == (b"x", "b")
        assert await nothing_comes(at_a)
    for each in (a, b):
        await bus.delete_queue(each)


async def test_what_no_binding_is_for_goes_to_the_alternate_and_a_queue_may_refuse_everything(
    open_bus: Connect, name: Iterator[str]
) -> None:
    bus = await open_bus()
    exchange = next(name)
    rest, closed = f"{exchange}.any", f"{exchange}.closed"
    shut = Topology(
        queues=(Queue(name=closed, refuses_all=True),),
        bindings=(Binding(exchange=exchange, queue=closed, routing_key="mallory"),),
    )
    await bus.declare(
        Topology(
            exchanges=(Exchange(name=rest, kind="fanout"), Exchange(name=exchange, kind="topic", alternate=rest)),
            queues=(Queue(name=rest),),
            bindings=(Binding(exchange=rest, queue=rest),),
        )
    )
    await bus.declare(shut, remember=False)
    with pytest.raises(PublishUnconfirmed):
        await bus.publish(exchange, "mallory", b"no", timeout_s=1.0)
    await bus.publish(exchange, "alice", b"yes")
    await bus.delete_queue(closed)
    await bus.publish(exchange, "mallory", b"now")
    async with bus.consume(rest, prefetch=0) as consumer:
        assert [delivery.body for delivery in await take(consumer, 2)] == [b"yes", b"now"]
    await bus.delete_queue(rest)


async def test_an_expired_message_is_not_delivered(bus: Bus, queue: str) -> None:
    await bus.publish(queue, "", b"old", expires_s=0.001)
    await bus.publish(queue, "", b"young", expires_s=60)
    await asyncio.to_thread(time.sleep, 0.002)  # its time to live, on the broker's own clock
    async with bus.consume(queue, prefetch=0) as consumer:
        (delivery,) = await take(consumer, 1)
        assert delivery.body == b"young"
        assert await nothing_comes(consumer)


@pytest.mark.parametrize("seconds", [86_400.0, 1e9, 1e15])
async def test_a_message_may_live_for_ages(bus: Bus, queue: str, seconds: float) -> None:
    await bus.publish(queue, "", b"old", expires_s=seconds)
    async with bus.consume(queue, prefetch=0) as consumer:
        (delivery,) = await take(consumer, 1)
        assert delivery.body == b"old"


async def test_several_consumers_share_a_queue(open_bus: Connect, queue: str) -> None:
    bus = await open_bus()
    async with bus.consume(queue, prefetch=1) as one, bus.consume(queue, prefetch=1) as two:
        await bus.publish(queue, "", b"1")
        await bus.publish(queue, "", b"2")
        assert {(await take(one, 1))[0].body, (await take(two, 1))[0].body} == {b"1", b"2"}


async def test_a_name_is_held_by_one_connection_at_a_time(open_bus: Connect, name: Iterator[str]) -> None:
    bus, other = await open_bus(), await open_bus()
    lock = next(name)
    async with bus.hold(lock):
        for _ in range(2):
            with pytest.raises(QueueBusy):
                async with other.hold(lock):
                    pass
        async with other.hold(f"{lock}.2"):
            pass
    for each in (other, bus):
        async with each.hold(lock):
            pass


async def test_a_closed_connection_holds_nothing(open_bus: Connect, name: Iterator[str]) -> None:
    bus, dying = await open_bus(), await open_bus()
    lock = next(name)
    async with dying.hold(lock):
        await dying.close()
        async with bus.hold(lock):
            pass


async def test_replies_reach_the_one_who_asked_and_end_with_its_question(
    open_bus: Connect, name: Iterator[str]
) -> None:
    asker, other, answerer = await open_bus(), await open_bus(), await open_bus()
    await answerer.declare(ingress())
    with pytest.raises(QueueMissing):
        async with asker.replies(next(name), "reply.1"):
            pass
    async with asker.replies(TASKS, "reply.1") as replies, other.replies(TASKS, "reply.2") as others:
        await answerer.publish(TASKS, "reply.1", b"one")
        await answerer.publish(TASKS, "reply.2", b"two")
        for consumer, body in ((replies, b"one"), (others, b"two")):
            (delivery,) = await take(consumer, 1)
            assert delivery.body == body
            await consumer.ack(delivery)
    with pytest.raises(Unroutable):
        await answerer.publish(TASKS, "reply.1", b"too late")
    async with other.replies(TASKS, "reply.3"):
        await other.close()
    await until_unroutable(answerer, "reply.3")
    for queue in ingress().queues:  # another test wants them otherwise
        await answerer.delete_queue(queue.name)


async def until_unroutable(bus: Bus, routing_key: str) -> None:
    """The broker may take a moment to note the end of a connection."""
    async with asyncio.timeout(10):
        while True:
            try:
                await bus.publish(TASKS, routing_key, b"x")
            except Unroutable:
                return


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_purge_drops_what_waits_and_leaves_what_is_out(bus: Bus, name: Iterator[str], kind: QueueKind) -> None:
    queue = next(name)
    await declare(bus, queue, kind=kind)
    async with bus.consume(queue, prefetch=1) as consumer:
        for body in (b"out", b"waits", b"waits too"):
            await bus.publish(queue, "", body)
        (out,) = await take(consumer, 1)
        await bus.purge(queue)
        await consumer.ack(out)
        await bus.publish(queue, "", b"next")
        assert [delivery.body for delivery in await take(consumer, 1)] == [b"next"]
    with pytest.raises(QueueMissing):
        await bus.purge("test.no.such.queue")
    await bus.delete_queue(queue)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_the_consumers_of_a_queue_are_counted(open_bus: Connect, name: Iterator[str], kind: QueueKind) -> None:
    bus, one, two = await open_bus(), await open_bus(), await open_bus()
    queue = next(name)
    await declare(bus, queue, kind=kind)
    assert (await bus.queue_state(queue)).consumers == 0
    async with one.consume(queue, prefetch=1):
        assert (await bus.queue_state(queue)).consumers == 1
        async with two.consume(queue, prefetch=1):
            assert (await bus.queue_state(queue)).consumers == 2
        await counts_down_to(1, bus, queue)
    await counts_down_to(0, bus, queue)
    await bus.delete_queue(queue)


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_whoever_closed_the_connection_counts_no_more(
    open_bus: Connect, name: Iterator[str], kind: QueueKind
) -> None:
    bus, dying = await open_bus(), await open_bus()
    queue = next(name)
    await declare(bus, queue, kind=kind)
    async with AsyncExitStack() as stack:
        consumer = await stack.enter_async_context(dying.consume(queue, prefetch=1))
        await bus.publish(queue, "", b"x")
        await take(consumer, 1)  # and does not settle it
        assert (await bus.queue_state(queue)).consumers == 1
        await dying.close()
        await counts_down_to(0, bus, queue)
    await bus.delete_queue(queue)


async def counts_down_to(count: int, bus: Bus, queue: str) -> None:
    """A quorum queue takes a moment to note the end of a consumer."""
    async with asyncio.timeout(10):
        while (await bus.queue_state(queue)).consumers != count:
            pass


@pytest.mark.broker
@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_whoever_died_counts_no_more(node: PrivateNode, name: Iterator[str], kind: QueueKind) -> None:
    queue = next(name)
    async with Proxy(node.port) as proxy, await connect(node.url) as bus:
        await declare(bus, queue, kind=kind)
        async with await connect(proxy.through(node.url)) as dying, dying.consume(queue, prefetch=1):
            assert (await bus.queue_state(queue)).consumers == 1
            proxy.reset()  # what the broker sees of the death of a process
            await counts_down_to(0, bus, queue)
        await bus.delete_queue(queue)


async def test_the_twin_counts_nobody_whose_connection_ended() -> None:
    broker = MemoryBroker()
    bus, dying = broker.connect(), broker.connect()
    await declare(bus, "q")
    async with dying.consume("q", prefetch=1):
        dying.drop()
        assert (await bus.queue_state("q")).consumers == 0


async def test_counting_what_is_not_there_is_an_error_that_harms_nothing_else(bus: Bus, queue: str) -> None:
    async with bus.consume(queue, prefetch=1) as consumer:
        assert (await bus.queue_state(queue)).consumers == 1
        counts = await asyncio.gather(
            *(bus.queue_state(name) for name in (queue, "test.no.such.queue") * 3), return_exceptions=True
        )
        assert [type(count) for count in counts] == [QueueState, QueueMissing] * 3
        await bus.publish(queue, "", b"x")
        await take(consumer, 1)


async def test_consuming_what_is_not_there_is_an_error_that_harms_nothing_else(bus: Bus, queue: str) -> None:
    with pytest.raises(QueueMissing):
        async with bus.consume("test.no.such.queue", prefetch=1):
            pass
    with pytest.raises(QueueMissing):
        await bus.publish("test.no.such.exchange", "", b"x")
    await bus.publish(queue, "", b"x")
    async with bus.consume(queue, prefetch=1) as consumer:
        await take(consumer, 1)


async def test_a_deleted_queue_ends_its_consumers(bus: Bus, name: Iterator[str]) -> None:
    queue = next(name)
    await declare(bus, queue)
    async with bus.consume(queue, prefetch=1) as consumer:
        await bus.delete_queue(queue)
        with pytest.raises(QueueMissing):
            await take(consumer, 1)
    await bus.delete_queue(queue)  # not there any more: nothing happens


async def test_declaring_again_is_nothing_and_declaring_otherwise_an_error(bus: Bus, queue: str) -> None:
    await declare(bus, queue)
    with pytest.raises(QueueMismatch):
        await declare(bus, queue, kind="quorum")
    await bus.publish(queue, "", b"x")


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_the_topology_of_a_federation_is_accepted(bus: Bus, name: Iterator[str], kind: MessageQueueKind) -> None:
    client_id = next(name)
    topologies = (ingress(message_queues=kind), client_inbox(client_id, kind), model_stream(1000))
    for topology in topologies:
        await bus.declare(topology)
        await bus.declare(topology)
    await bus.publish(TASKS, client_id, b"old", expires_s=0.001)
    await bus.publish(TASKS, client_id, b"young", expires_s=60)
    await asyncio.to_thread(time.sleep, 0.002)  # its time to live, on the broker's own clock
    async with bus.consume(inbox(client_id), prefetch=0) as consumer:
        assert [delivery.body for delivery in await take(consumer, 1)] == [b"young"]
    for queue in (queue for topology in topologies for queue in topology.queues):
        await bus.delete_queue(queue.name)


async def test_closed_returns_when_we_close(open_bus: Connect) -> None:
    bus = await open_bus()
    waiting = asyncio.create_task(bus.closed())
    await asyncio.sleep(0)
    await bus.close()
    async with asyncio.timeout(10):
        await waiting
    with pytest.raises(BrokerClosed):
        await bus.publish("test", "", b"x")


async def test_cancelled_in_the_middle_of_closing_a_consumer_the_task_ends_and_the_bus_works_on(
    bus: Bus, queue: str
) -> None:
    async def consume_once() -> None:
        async with bus.consume(queue, prefetch=1):
            pass
        await asyncio.Event().wait()  # a cancellation that is swallowed would leave us here for ever

    for turns in range(40):
        task = asyncio.create_task(consume_once())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(10):
            await asyncio.wait([task])
        assert task.cancelled()
    await bus.publish(queue, "", b"x")
    async with bus.consume(queue, prefetch=1) as consumer:
        await take(consumer, 1)


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture
async def stream(bus: Bus, name: Iterator[str]) -> AsyncIterator[str]:
    its_name = next(name)
    await declare(bus, its_name, kind="stream", max_bytes=1 << 26, segment_bytes=1 << 20)
    yield its_name
    await bus.delete_queue(its_name)


async def publish_numbers(bus: Bus, stream: str, count: int) -> None:
    for i in range(count):
        await bus.publish(stream, "", str(i).encode())


async def read(bus: Bus, stream: str, offset: object, count: int) -> list[tuple[int | None, int]]:
    async with bus.consume(stream, prefetch=2, offset=offset) as consumer:  # type: ignore[arg-type]
        found = []
        for _ in range(count):
            (delivery,) = await take(consumer, 1)
            await consumer.ack(delivery)
            found.append((delivery.offset, int(delivery.body)))
        return found


async def test_a_stream_is_read_from_any_offset_and_by_many(open_bus: Connect, stream: str) -> None:
    bus, other = await open_bus(), await open_bus()
    await publish_numbers(bus, stream, 6)
    assert await read(bus, stream, "first", 6) == [(i, i) for i in range(6)]
    assert await read(other, stream, 4, 2) == [(4, 4), (5, 5)]
    assert await read(other, stream, 4, 2) == [(4, 4), (5, 5)]


async def test_the_last_of_a_stream_is_exactly_the_last_message(bus: Bus, stream: str) -> None:
    await publish_numbers(bus, stream, 5)
    assert await read(bus, stream, "last", 1) == [(4, 4)]


async def test_the_offsets_of_a_stream_grow_but_may_leave_gaps_where_a_segment_ends(
    bus: Bus, name: Iterator[str]
) -> None:
    stream = next(name)
    await declare(bus, stream, kind="stream", max_bytes=1 << 26, segment_bytes=1 << 20)
    for i in range(12):
        await bus.publish(stream, "", bytes([i]) * 300_000)
    async with bus.consume(stream, prefetch=3, offset="first") as consumer:
        found = []
        for _ in range(12):
            (delivery,) = await take(consumer, 1)
            await consumer.ack(delivery)
            found.append((delivery.body[0], delivery.offset))
    assert [body for body, _ in found] == list(range(12))
    offsets = [offset for _, offset in found if offset is not None]
    assert offsets == sorted(set(offsets))
    for gap in set(range(offsets[-1])) - set(offsets):  # a gap holds nothing: whoever begins there gets the next one
        assert await read_offsets(bus, stream, gap) == [min(offset for offset in offsets if offset > gap)]
    assert await read_offsets(bus, stream, "last") == offsets[-1:]
    await bus.delete_queue(stream)


async def read_offsets(bus: Bus, stream: str, offset: object) -> list[int | None]:
    async with bus.consume(stream, prefetch=1, offset=offset) as consumer:  # type: ignore[arg-type]
        return [delivery.offset for delivery in await take(consumer, 1)]


async def test_a_stream_waits_for_what_is_to_come(open_bus: Connect, stream: str) -> None:
    bus, other = await open_bus(), await open_bus()
    await publish_numbers(bus, stream, 2)
    async with other.consume(stream, prefetch=2, offset="next") as consumer:
        assert await nothing_comes(consumer)
        await bus.publish(stream, "", b"2")
        (delivery,) = await take(consumer, 1)
        assert (delivery.offset, delivery.body) == (2, b"2")


def test_the_twin_forgets_the_old_end_of_a_stream_and_clamps_the_offset() -> None:
    async def story() -> None:
        bus = MemoryBroker().connect()
        await declare(bus, "s", kind="stream", max_bytes=30)
        for i in range(10):
            await bus.publish("s", "", bytes([i]) * 10)
        async with bus.consume("s", prefetch=3, offset=0) as consumer:
            assert [delivery.offset for delivery in await take(consumer, 3)] == [7, 8, 9]

    asyncio.run(story())

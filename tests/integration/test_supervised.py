"""The supervised bus on RabbitMQ: a broker that is killed, a road that breaks off or falls silent, an alarm."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import aiormq
import pytest
from aiormq import spec
from aiormq.abc import ChannelFrame
from aiormq.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed, DeliveryError, PublishError

from fedbus.bus.access import redacted
from fedbus.bus.base import Consumer, Delivery
from fedbus.bus.node import PrivateNode
from fedbus.bus.rabbitmq import _Lane, _mapped, connect, connect_supervised
from fedbus.bus.supervised import LinkState, SupervisedBus, no_observer
from fedbus.bus.topology import Binding, Exchange, Queue, Topology
from fedbus.errors import (
    BrokerClosed,
    BrokerDenied,
    BrokerError,
    BrokerUnreachable,
    ConfigError,
    PublishUnconfirmed,
    QueueBusy,
    QueueMismatch,
    QueueMissing,
)
from tests.faults.proxy import Proxy

NOBODY = "amqp://u:secret@127.0.0.1:1/v"


@pytest.fixture
def name() -> str:
    return f"test.{uuid.uuid4().hex[:8]}"


@pytest.fixture
def states() -> list[LinkState]:
    return []


def test_what_aiormq_gives_without_a_reason_is_the_end_of_the_connection() -> None:
    with pytest.raises(BrokerClosed, match="waiting"), _mapped("waiting"):
        raise Exception  # noqa: TRY002  # as aiormq does
    with pytest.raises(KeyError), _mapped("waiting"):
        raise KeyError  # a mistake of our own stays one


@asynccontextmanager
async def supervised(url: str, states: list[LinkState] | None = None) -> AsyncIterator[SupervisedBus]:
    async with await connect_supervised(url, on_state=no_observer if states is None else states.append) as bus:
        yield bus


def topology(name: str, **settings: Any) -> Topology:
    return Topology(
        exchanges=(Exchange(name=name, kind="fanout"),),
        queues=(Queue(name=name, **settings),),
        bindings=(Binding(exchange=name, queue=name),),
    )


async def take(consumer: Consumer) -> Delivery:
    async with asyncio.timeout(20):
        return await consumer.receive()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # of a broker that tells nobody when it comes true
            await asyncio.sleep(0.01)


def kinds(states: list[LinkState]) -> list[str]:
    return [state.kind for state in states]


@pytest.mark.broker
async def test_every_confirmed_message_outlives_the_broker(
    breakable_node: PrivateNode, name: str, states: list[LinkState]
) -> None:
    confirmed: list[int] = []
    received: set[int] = set()
    followed: dict[int, int] = {}
    stream = f"{name}.stream"
    async with supervised(breakable_node.url, states) as publisher, supervised(breakable_node.url) as reader:
        await publisher.declare(topology(name, kind="quorum"))
        await publisher.declare(
            Topology(queues=(Queue(name=stream, kind="stream"),), bindings=(Binding(exchange=name, queue=stream),))
        )
        await asyncio.sleep(1.2)  # a quorum queue younger than a second may come back empty

        async def publish() -> None:
            for number in range(100_000):
                await publisher.publish(name, "", str(number).encode())
                confirmed.append(number)

        async def read() -> None:
            async with reader.consume(name, prefetch=10) as consumer:
                async for delivery in consumer:
                    received.add(int(delivery.body))
                    await consumer.ack(delivery)

        async def follow() -> None:
            async with reader.consume(stream, prefetch=10, offset="first") as consumer:
                async for delivery in consumer:
                    assert delivery.offset is not None
                    followed[delivery.offset] = int(delivery.body)
                    await consumer.ack(delivery)

        publishing = asyncio.create_task(publish())
        reading = asyncio.gather(read(), follow())
        await until(lambda: len(confirmed) > 50 and len(received) > 20)
        await asyncio.to_thread(breakable_node.kill)
        before = len(confirmed)
        await asyncio.to_thread(breakable_node.restart)
        await until(lambda: len(confirmed) > before + 20)
        publishing.cancel()
        await asyncio.wait([publishing])
        await until(
            lambda: reading.done() or (received.issuperset(confirmed) and set(followed.values()) >= set(confirmed))
        )
        assert not reading.done()
        reading.cancel()
        await asyncio.wait([reading])
        await publisher.delete_queue(name)
        await publisher.delete_queue(stream)
    assert list(followed) == sorted(followed)  # read on behind the last, not from the beginning
    assert kinds(states) == ["lost", "restored"]
    assert states[1].outage_s > 0
    assert "secret" not in states[0].broker


@pytest.mark.broker
async def test_an_alarm_makes_publishers_wait_and_nobody_else(
    breakable_node: PrivateNode, name: str, states: list[LinkState]
) -> None:
    url = f"{breakable_node.url}?heartbeat=1"  # it must not end the blocked connection
    async with supervised(url, states) as bus, supervised(url) as reader:
        await bus.declare(topology(name))
        for body in (b"1", b"2"):
            await bus.publish(name, "", body)
        async with reader.consume(name, prefetch=1) as consumer:
            await asyncio.to_thread(breakable_node.rabbitmqctl, "set_vm_memory_high_watermark", "absolute", "1")
            try:
                publish = asyncio.create_task(bus.publish(name, "", bytes(1 << 20)))
                async with supervised(url) as closing:
                    waiting = asyncio.create_task(closing.publish(name, "", b"never confirmed"))
                    await until(lambda: bool(states))
                await asyncio.wait([waiting])  # closed under the alarm
                for body in (b"1", b"2"):
                    delivery = await take(consumer)
                    await consumer.ack(delivery)
                    assert delivery.body == body
                assert not publish.done()
            finally:
                await asyncio.to_thread(breakable_node.rabbitmqctl, "set_vm_memory_high_watermark", "0.4")
            await publish
        await bus.delete_queue(name)
    assert waiting.exception() is not None
    assert kinds(states) == ["blocked", "unblocked"]
    assert states[0].reason == "low on memory"
    assert states[1].outage_s > 0


@pytest.mark.broker
async def test_a_stream_that_breaks_off_is_read_on_where_it_was(
    node: PrivateNode, name: str, states: list[LinkState]
) -> None:
    async with await connect(node.url) as writer, Proxy(node.port) as proxy:
        await writer.declare(topology(name, kind="stream", max_bytes=1 << 26, segment_bytes=1 << 20))
        await asyncio.gather(*(writer.publish(name, "", bytes([i]) * 50_000) for i in range(60)))
        async with supervised(proxy.through(node.url), states) as reader:
            async with reader.consume(name, prefetch=3, offset="first") as consumer:
                found: list[int] = []
                while len(found) < 60:
                    if len(found) in (7, 31) and len(states) < len(found) / 5:
                        proxy.reset()
                    delivery = await take(consumer)
                    found.append(delivery.body[0])
                    await consumer.ack(delivery)
            assert found == list(range(60))
            assert kinds(states) == ["lost", "restored"] * 2
        await writer.delete_queue(name)


@pytest.mark.broker
async def test_a_road_that_falls_silent_is_left_for_another(
    node: PrivateNode, name: str, states: list[LinkState]
) -> None:
    async with Proxy(node.port) as proxy, await connect(node.url) as other:
        async with supervised(f"{proxy.through(node.url)}?heartbeat=1", states) as bus:
            await bus.declare(topology(name))
            async with bus.hold(f"{name}.lock"), bus.consume(name, prefetch=1) as consumer:
                proxy.half_open()
                await bus.publish(name, "", b"x")  # confirmed over the next connection
                assert (await take(consumer)).body == b"x"
                with pytest.raises(QueueBusy):
                    async with other.hold(f"{name}.lock"):
                        pass
            assert kinds(states) == ["lost", "restored"]
        await other.delete_queue(name)


@pytest.mark.broker
async def test_an_outage_of_the_road_is_waited_out(node: PrivateNode, name: str, states: list[LinkState]) -> None:
    async with Proxy(node.port) as proxy, supervised(proxy.through(node.url), states) as bus:
        await bus.declare(topology(name))
        proxy.refuse()
        proxy.reset()
        publishes = [asyncio.ensure_future(bus.publish(name, "", str(i).encode())) for i in range(20)]
        await until(lambda: kinds(states) == ["lost"])
        await proxy.accept()
        await asyncio.gather(*publishes)
        async with bus.consume(name, prefetch=0) as consumer:
            numbers = [int((await take(consumer)).body) for _ in range(20)]
            assert list(dict.fromkeys(numbers)) == list(range(20))
        await bus.delete_queue(name)


@pytest.mark.broker
async def test_what_is_acknowledged_together_goes_in_one_frame(
    node: PrivateNode, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    acked: list[tuple[int | None, bool | None]] = []
    async with await connect(node.url) as bus:
        await bus.declare(topology(name))
        for i in range(9):
            await bus.publish(name, "", bytes([i]))
        async with bus.consume(name, prefetch=0) as consumer:
            marshall = ChannelFrame.marshall

            def record(channel_number: int, frames: Iterable[Any], **rest: Any) -> ChannelFrame:
                given = list(frames)
                acked.extend((ack.delivery_tag, ack.multiple) for ack in given if isinstance(ack, spec.Basic.Ack))
                return marshall(channel_number, given, **rest)

            monkeypatch.setattr(ChannelFrame, "marshall", record)
            got = [await take(consumer) for _ in range(9)]
            await consumer.ack(got[3])
            await consumer.ack(got[7], got[0], got[2], got[1], got[5], got[4])
            await consumer.ack(got[8])
            await consumer.ack(got[6])
            state = await bus.queue_state(name)
            assert (state.messages, state.consumers) == (0, 1)  # the channel lives: the broker took them
        await bus.delete_queue(name)
    assert acked == [(4, False), (6, True), (8, False), (9, False), (7, False)]


@pytest.mark.broker
async def test_a_connect_that_is_cancelled_leaves_no_task_behind(node: PrivateNode) -> None:
    before = asyncio.all_tasks()
    for milliseconds in range(40):
        task = asyncio.create_task(connect(node.url))
        await asyncio.sleep(milliseconds / 1000)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).close()
    await until(lambda: asyncio.all_tasks() <= before)


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("PRECONDITION_FAILED - queue 's' in vhost '/' does not have a replica on the local node", BrokerClosed),
        ("PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 's' in vhost '/'", QueueMismatch),
    ],
)
def test_a_node_that_cannot_serve_a_queue_now_is_no_error_of_the_queue(reason: str, error: type[BrokerError]) -> None:
    with pytest.raises(error), _mapped("consuming s"):
        raise ChannelPreconditionFailed(reason)


class Refusing:
    """A channel that closes with the same reason whenever a queue is asked about."""

    is_closed = False

    def __init__(self, reason: str) -> None:
        self._reason = reason

    async def queue_declare(self, queue: str, *, passive: bool) -> None:
        raise ChannelNotFoundEntity(self._reason)


@pytest.mark.broker
@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("NOT_FOUND - no queue 'q' in vhost '/'", QueueMissing),
        ("NOT_FOUND - home node 'b@h' of durable queue 'q' in vhost '/' is down or inaccessible", BrokerUnreachable),
        ("NOT_FOUND - queue 'q' in vhost '/' process is stopped by supervisor", BrokerUnreachable),
    ],
)
async def test_a_queue_whose_node_is_away_is_not_missing_and_costs_no_connection(
    node: PrivateNode, states: list[LinkState], reason: str, error: type[BrokerError]
) -> None:
    async with supervised(node.url, states) as bus:
        link: Any = bus._link
        link.bus._asking = Refusing(reason)
        with pytest.raises(error):
            await bus.queue_state("q")
    assert states == []


@pytest.mark.broker
async def test_a_channel_in_doubt_is_left_at_once_and_closed_after_its_last_publish(
    node: PrivateNode, name: str
) -> None:
    async with await connect(node.url) as bus:
        await bus.declare(topology(name))
        await bus.publish(name, "", b"1")
        first = bus._lane
        assert first is not None
        async with asyncio.TaskGroup() as group:
            group.create_task(bus.publish(name, "", bytes(8 << 20)))
            with pytest.raises(PublishUnconfirmed):
                await bus.publish(name, "", b"2", timeout_s=1e-6)
            await bus.publish(name, "", b"3")
            assert bus._lane is not first
            assert first._users == 0 or not first._channel.is_closed  # its last publish may have ended just now
        await until(lambda: first._channel.is_closed)
        await bus.publish(name, "", b"4")
        await bus.delete_queue(name)


class Silent:
    """A channel that can only be closed."""

    is_closed = False

    async def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("error", "is_left"),
    [
        (DeliveryError(None, aiormq.spec.Basic.Nack()), True),
        (asyncio.CancelledError(), True),
        (PublishError.__new__(PublishError), False),
        (ChannelPreconditionFailed("x"), False),
    ],
)
async def test_what_makes_a_channel_doubtful(error: BaseException, is_left: bool) -> None:
    unblocked, channel = asyncio.Event(), Silent()
    lane = _Lane(channel, unblocked)  # type: ignore[arg-type]  # no more of it is used
    with pytest.raises(type(error)), lane:
        raise error
    assert lane.is_open is not is_left
    await asyncio.sleep(0)
    assert not channel.is_closed  # the broker has an alarm
    unblocked.set()
    if is_left:
        await until(lambda: channel.is_closed)


# ---- several URLs ----------------------------------------------------------------------------------------------------


@pytest.mark.broker
async def test_of_several_urls_the_first_that_answers_is_taken(node: PrivateNode) -> None:
    async with await connect(f"{NOBODY}, {node.url}") as bus:
        assert bus.broker == redacted(node.url)


async def test_when_none_answers_the_error_names_each_and_no_password() -> None:
    with pytest.raises(BrokerUnreachable, match=r"127\.0\.0\.1:1/v: .*; .*127\.0\.0\.1:2/w: ") as caught:
        await connect_supervised(f"{NOBODY},amqp://u:secret@127.0.0.1:2/w")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.broker
async def test_when_all_refuse_us_that_is_what_the_error_says(node: PrivateNode) -> None:
    wrong = f"amqp://fedbus:wrong@127.0.0.1:{node.port}/"
    with pytest.raises(BrokerDenied):
        await connect(f"{wrong},{wrong}")
    with pytest.raises(BrokerUnreachable):
        await connect(f"{wrong},{NOBODY}")


@pytest.mark.parametrize(
    "urls", ["", f"{NOBODY},", f"{NOBODY},http://b/v", f"{NOBODY},b:5672/v", f"amqp://a:x,{NOBODY}"]
)
async def test_all_urls_are_checked_before_one_is_tried(urls: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await connect(urls)
    assert "secret" not in str(caught.value)


def test_several_urls_are_shown_without_their_passwords() -> None:
    shown = redacted("amqp://u:a,b@one:5672/v,amqps://u:secret@two/w?cafile=x, amqp://three")
    assert shown == "amqp://one:5672/v, amqps://two/w, amqp://three"

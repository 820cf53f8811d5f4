"""The `Bus` in memory: the verified twin of RabbitMQ, for tests and simulations in one process.

It keeps to what the contract suite proves of the real one: prefetch, redelivery in the old order, mandatory returns,
dead letters, expiry, held names, streams with offsets, alarms.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

from fedbus.bus.base import Body, Bus, Consumer, Delivery, Offset, QueueState
from fedbus.bus.topology import Binding, Exchange, Queue, Topology
from fedbus.errors import (
    BrokerClosed,
    BrokerDenied,
    BrokerError,
    BrokerUnreachable,
    PublishUnconfirmed,
    QueueBusy,
    QueueMismatch,
    QueueMissing,
    Unroutable,
)


@dataclass(slots=True)
class _Stored:
    body: bytes
    routing_key: str
    user_id: str
    expires_at: float | None
    place: int  # in a stream: its offset
    deliveries: int = 0


@dataclass(slots=True, eq=False)
class _Kept:
    spec: Queue
    ready: list[_Stored] = field(default_factory=list)  # a stream: everything that is kept
    next_offset: int = 0
    segment_filled: int = 0
    kept_bytes: int = 0  # of a stream
    consumers: deque[_MemoryConsumer] = field(default_factory=deque)
    hungry: dict[_MemoryConsumer, None] = field(default_factory=dict)  # of a stream: at its end, with room for more

    @property
    def is_stream(self) -> bool:
        return self.spec.kind == "stream"


@dataclass(slots=True)
class _ExchangeState:
    spec: Exchange
    bindings: dict[str, dict[str, None]] = field(default_factory=dict)  # routing_key -> queues, in order of binding

    def bind(self, queue: str, routing_key: str) -> None:
        self.bindings.setdefault(routing_key, {})[queue] = None

    def queues(self, routing_key: str) -> dict[str, None]:
        """The queues that take a message with that key: each once."""
        match self.spec.kind:
            case "direct":
                return self.bindings.get(routing_key, {})
            case "fanout":
                taking = list(self.bindings.values())
            case "topic":
                key = routing_key.split(".")
                taking = [queues for pattern, queues in self.bindings.items() if _matches(pattern.split("."), key)]
        return {name: None for queues in taking for name in queues}


def _matches(pattern: Sequence[str], key: Sequence[str]) -> bool:
    """The rule of topic exchanges: * stands for one word, # for any number."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return len(pattern) == 1 or any(_matches(pattern[1:], key[skipped:]) for skipped in range(len(key) + 1))
    return bool(key) and pattern[0] in ("*", key[0]) and _matches(pattern[1:], key[1:])


class MemoryBroker:
    """The broker that `MemoryBus`es connect to; lives in one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._exchanges: dict[str, _ExchangeState] = {}
        self._queues: dict[str, _Kept] = {}
        self._holders: dict[str, MemoryBus] = {}
        self._places = itertools.count()
        self._buses: set[MemoryBus] = set()
        self._is_stopped = False
        self._alarm: str | None = None

    def connect(self, user: str = "guest", *, may_declare: bool = True) -> MemoryBus:
        """A new connection of `user`. Raises `BrokerUnreachable` while the broker is stopped."""
        if self._is_stopped:
            raise BrokerUnreachable("no broker answers: it was stopped")
        bus = MemoryBus(self, user, may_declare=may_declare)
        self._buses.add(bus)
        return bus

    def drop_connections(self) -> None:
        """End every connection from the broker's side, as a restart does."""
        for bus in list(self._buses):
            bus.drop()

    def stop(self) -> None:
        """Go away, with all that is durable, until `start`."""
        self._is_stopped = True
        self.drop_connections()

    def start(self) -> None:
        """Be there again."""
        self._is_stopped = False

    def block(self, reason: str = "low on memory") -> None:
        """Raise an alarm: whoever publishes waits, and is told so, until `unblock`."""
        self._alarm = reason

    def unblock(self) -> None:
        """End the alarm."""
        self._alarm = None
        for bus in list(self._buses):
            bus._go_on()

    def depth(self, queue: str) -> int:
        """Messages that wait in `queue`, those out with consumers not counted."""
        return len(self._queue(queue).ready)

    def purge(self, queue: str) -> None:
        """Lose what waits in `queue`."""
        state = self._queue(queue)
        state.ready.clear()
        state.kept_bytes = 0

    # ---- what buses ask for --------------------------------------------------------------------------------------

    def _declare(self, topology: Topology) -> None:
        for exchange in topology.exchanges:
            known = self._exchanges.setdefault(exchange.name, _ExchangeState(exchange))
            if known.spec != exchange:
                raise QueueMismatch(f"exchange {exchange.name} exists with other settings")
        for queue in topology.queues:
            state = self._queues.setdefault(queue.name, _Kept(queue))
            if state.spec != queue:
                raise QueueMismatch(f"queue {queue.name} exists with other settings")
        for binding in topology.bindings:
            self._queue(binding.queue)
            self._exchange(binding.exchange).bind(binding.queue, binding.routing_key)

    def _exchange(self, name: str) -> _ExchangeState:
        if name not in self._exchanges:
            raise QueueMissing(f"there is no exchange {name}")
        return self._exchanges[name]

    def _queue(self, name: str) -> _Kept:
        if name not in self._queues:
            raise QueueMissing(f"there is no queue {name}")
        return self._queues[name]

    def _delete(self, name: str) -> None:
        state = self._queues.pop(name, None)
        for exchange in self._exchanges.values():
            for queues in exchange.bindings.values():
                queues.pop(name, None)
        for consumer in list(state.consumers) if state else []:
            consumer._stop(QueueMissing(f"consuming {name}: the queue was deleted"), give_back=False)

    def _publish(self, exchange: str, routing_key: str, body: bytes, user: str, expires_at: float | None) -> int:
        """Store the message in every queue that takes it; how many do."""
        queues = [self._queues[name] for name in self._route(exchange, routing_key)]
        if any(queue.spec.refuses_all for queue in queues):
            raise PublishUnconfirmed(f"publishing to {exchange}: the broker refused the message")
        for queue in queues:
            place = self._next_offset(queue, len(body)) if queue.is_stream else next(self._places)
            queue.ready.append(_Stored(body, routing_key, user, expires_at, place))
            if queue.is_stream:
                self._trim_stream(queue, len(body))
            self._dispatch(queue)
        return len(queues)

    def _route(self, exchange: str, routing_key: str) -> dict[str, None]:
        state = self._exchange(exchange)
        found = dict.fromkeys(state.queues(routing_key))
        return found or (self._route(state.spec.alternate, routing_key) if state.spec.alternate is not None else {})

    def _next_offset(self, queue: _Kept, size: int) -> int:
        """Offsets grow, but not by one: RabbitMQ writes a chunk of its own at the head of each new segment."""
        if queue.spec.segment_bytes is not None and queue.segment_filled >= queue.spec.segment_bytes:
            queue.segment_filled = 0
            queue.next_offset += 1
        queue.segment_filled += size
        queue.next_offset += 1
        return queue.next_offset - 1

    def _trim_stream(self, queue: _Kept, added_bytes: int) -> None:
        queue.kept_bytes += added_bytes
        while queue.spec.max_bytes is not None and queue.kept_bytes > queue.spec.max_bytes and len(queue.ready) > 1:
            queue.kept_bytes -= len(queue.ready.pop(0).body)

    def _dispatch(self, queue: _Kept) -> None:
        if queue.is_stream:
            hungry, queue.hungry = queue.hungry, {}
            for consumer in hungry:
                consumer._pull_stream()
            return
        while queue.ready and (free := self._next_free(queue)) is not None:
            stored = queue.ready.pop(0)
            if stored.expires_at is not None and stored.expires_at <= self._clock():
                self._dead_letter(queue, stored)
            else:
                free._hand_over(stored)

    def _next_free(self, queue: _Kept) -> _MemoryConsumer | None:
        """Round robin over the consumers that have room."""
        for _ in range(len(queue.consumers)):
            consumer = queue.consumers[0]
            queue.consumers.rotate(-1)
            if consumer._has_room:
                return consumer
        return None

    def _give_back(self, queue: _Kept, stored: list[_Stored]) -> None:
        limit = queue.spec.delivery_limit
        for message in stored:
            if limit is not None and message.deliveries > limit:
                self._dead_letter(queue, message)
            else:
                queue.ready.append(message)
        queue.ready.sort(key=lambda message: message.place)
        self._dispatch(queue)

    def _release(self, bus: MemoryBus, name: str) -> None:
        if self._holders.get(name) is bus:
            del self._holders[name]

    def _dead_letter(self, queue: _Kept, stored: _Stored) -> None:
        if queue.spec.dead_letter_exchange in self._exchanges:
            self._publish(queue.spec.dead_letter_exchange, stored.routing_key, stored.body, stored.user_id, None)


class MemoryBus(Bus):
    """One connection to a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker, user: str, *, may_declare: bool = True) -> None:
        self._broker = broker
        self.user = user
        self._may_declare = may_declare
        self._consumers: set[_MemoryConsumer] = set()
        self._ended: asyncio.Future[BrokerError | None] = asyncio.get_running_loop().create_future()
        self._blocked: list[asyncio.Future[None]] = []  # publishes that wait for the end of an alarm
        self._is_blocked = False

    def __repr__(self) -> str:
        return f"<MemoryBus {self.user}{' closed' if self._ended.done() else ''}>"

    def drop(self) -> None:
        """End this connection from the broker's side."""
        self._end(BrokerClosed("the connection to the broker ended"))

    async def _turn(self) -> None:
        """Every operation lets others run, as one over a socket does."""
        self._check_open()
        await asyncio.sleep(0)
        self._check_open()

    def _check_open(self) -> None:
        if self._ended.done():
            raise BrokerClosed("the connection to the broker ended")

    def _check_may_declare(self, what: str) -> None:
        if not self._may_declare:
            raise BrokerDenied(f"{what}: the broker says no: {self.user} may not configure anything")

    async def declare(self, topology: Topology, *, remember: bool = True) -> None:
        await self._turn()
        if topology != Topology():
            self._check_may_declare("declaring")
        self._broker._declare(topology)

    async def delete_queue(self, name: str) -> None:
        await self._turn()
        self._check_may_declare(f"deleting queue {name}")
        self._broker._delete(name)

    async def purge(self, queue: str) -> None:
        await self._turn()
        self._broker.purge(queue)

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
        await self._turn()
        try:
            async with asyncio.timeout(timeout_s):
                await self._until_unblocked()
        except TimeoutError:
            raise PublishUnconfirmed(f"publishing to {exchange}: no word of the broker in time") from None
        expires_at = None if expires_s is None else self._broker._clock() + expires_s
        taken = self._broker._publish(exchange, routing_key, bytes(body), self.user, expires_at)
        if mandatory and not taken:
            raise Unroutable(f"publishing to {exchange}: no queue takes it")

    async def _until_unblocked(self) -> None:
        """As RabbitMQ does, tell of the alarm when something is published."""
        while (alarm := self._broker._alarm) is not None:
            self._check_open()
            if not self._is_blocked:
                self._is_blocked = True
                if self.on_blocked is not None:
                    self.on_blocked(alarm)
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._blocked.append(waiting)
            await waiting
        self._check_open()

    def _go_on(self) -> None:
        waiting, self._blocked = self._blocked, []
        for publish in waiting:
            if not publish.done():
                publish.set_result(None)
        if self._is_blocked and not self._ended.done():
            self._is_blocked = False
            if self.on_blocked is not None:
                self.on_blocked(None)

    def consume(
        self, queue: str, *, prefetch: int, offset: Offset | None = None, exclusive: bool = False
    ) -> AbstractAsyncContextManager[Consumer]:
        return self._consume(queue, prefetch, offset, exclusive)

    @asynccontextmanager
    async def _consume(
        self, queue: str, prefetch: int, offset: Offset | None, exclusive: bool
    ) -> AsyncIterator[Consumer]:
        await self._turn()
        state = self._broker._queue(queue)
        # A quorum queue does not mind: RabbitMQ knows no exclusive consumers of it.
        if state.spec.kind == "classic" and (
            (exclusive and state.consumers) or any(other.is_exclusive for other in state.consumers)
        ):
            raise QueueBusy(f"consuming {queue}: another connection does")
        consumer = _MemoryConsumer(self._broker, state, prefetch, offset, is_exclusive=exclusive)
        state.consumers.append(consumer)
        self._consumers.add(consumer)
        consumer._pull()
        try:
            yield consumer
        finally:
            self._consumers.discard(consumer)
            consumer._stop(BrokerClosed(f"consuming {queue}: the subscription has ended"), give_back=True)

    @asynccontextmanager
    async def replies(self, exchange: str, routing_key: str) -> AsyncIterator[Consumer]:
        await self._turn()
        self._check_may_declare(f"waiting for replies of {exchange}")
        self._broker._exchange(exchange)
        queue = Queue(name=f"fedbus.reply.{uuid.uuid4().hex}")
        binding = Binding(exchange=exchange, queue=queue.name, routing_key=routing_key)
        self._broker._declare(Topology(queues=(queue,), bindings=(binding,)))
        try:
            async with self._consume(queue.name, 0, None, True) as consumer:
                yield consumer
        finally:
            self._broker._delete(queue.name)

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        await self._turn()
        self._check_may_declare(f"holding {name}")
        if self._broker._holders.setdefault(name, self) is not self:
            raise QueueBusy(f"holding {name}: another connection does")
        try:
            yield
        finally:
            self._broker._release(self, name)

    async def queue_state(self, queue: str) -> QueueState:
        await self._turn()
        state = self._broker._queue(queue)
        return QueueState(messages=len(state.ready), consumers=len(state.consumers))

    def _end(self, reason: BrokerError | None) -> None:
        if self._ended.done():
            return
        self._ended.set_result(reason)
        self._broker._buses.discard(self)
        self._go_on()
        for consumer in list(self._consumers):
            consumer._stop(reason or BrokerClosed("the connection was closed"), give_back=True)
        for name in list(self._broker._holders):
            self._broker._release(self, name)

    async def closed(self) -> None:
        reason = await asyncio.shield(self._ended)
        if reason is not None:
            raise reason

    async def close(self) -> None:
        self._end(None)


class _MemoryConsumer(Consumer):
    def __init__(
        self, broker: MemoryBroker, queue: _Kept, prefetch: int, offset: Offset | None, *, is_exclusive: bool
    ) -> None:
        self.is_exclusive = is_exclusive
        self._broker = broker
        self._queue = queue
        self._prefetch = prefetch
        self._unsettled: dict[int, _Stored] = {}
        self._tags = itertools.count(1)
        self._arrived: asyncio.Queue[Delivery | BrokerError] = asyncio.Queue()
        self._is_stopped = False
        self._position = self._start(offset)

    def _start(self, offset: Offset | None) -> int:
        kept = self._queue.ready if self._queue.is_stream else []
        if isinstance(offset, int):
            return offset
        if offset == "first":
            return 0
        return kept[-1].place if offset == "last" and kept else self._queue.next_offset

    @property
    def _has_room(self) -> bool:
        return not self._is_stopped and (self._prefetch == 0 or len(self._unsettled) < self._prefetch)

    def _pull(self) -> None:
        """Take what there is room for now."""
        if self._queue.is_stream:
            self._pull_stream()
        else:
            self._broker._dispatch(self._queue)

    def _pull_stream(self) -> None:
        # An offset that retention has dropped is clamped silently, as RabbitMQ does.
        start = bisect.bisect_left(self._queue.ready, self._position, key=lambda stored: stored.place)
        for index in range(start, len(self._queue.ready)):
            if not self._has_room:
                return
            stored = self._queue.ready[index]
            self._hand_over(stored, stored.place)
            self._position = stored.place + 1
        if self._has_room:
            self._queue.hungry[self] = None

    def _hand_over(self, stored: _Stored, offset: int | None = None) -> None:
        tag = next(self._tags)
        self._unsettled[tag] = stored
        self._arrived.put_nowait(
            Delivery(
                body=stored.body,
                tag=tag,
                routing_key=stored.routing_key,
                redelivered=offset is None and stored.deliveries > 0,
                offset=offset,
                user_id=stored.user_id,
            )
        )
        if offset is None:
            stored.deliveries += 1

    def _stop(self, reason: BrokerError, *, give_back: bool) -> None:
        if self._is_stopped:
            return
        self._is_stopped = True
        self._queue.hungry.pop(self, None)
        if self in self._queue.consumers:
            self._queue.consumers.remove(self)
        unsettled, self._unsettled = list(self._unsettled.values()), {}
        while not self._arrived.empty():
            self._arrived.get_nowait()
        self._arrived.put_nowait(reason)
        if give_back and not self._queue.is_stream:
            self._broker._give_back(self._queue, unsettled)

    async def receive(self) -> Delivery:
        item = await self._arrived.get()
        if isinstance(item, BrokerError):
            self._arrived.put_nowait(item)
            raise item
        return item

    async def ack(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            self._check_unsettled(delivery)
        for delivery in deliveries:
            self._take(delivery)
        self._pull()

    async def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        stored = self._take(delivery)
        if requeue and not self._queue.is_stream:
            self._broker._give_back(self._queue, [stored])
        elif not self._queue.is_stream:
            self._broker._dead_letter(self._queue, stored)
        self._pull()

    def _take(self, delivery: Delivery) -> _Stored:
        self._check_unsettled(delivery)
        return self._unsettled.pop(delivery.tag)

    def _check_unsettled(self, delivery: Delivery) -> None:
        if self._is_stopped:
            raise BrokerClosed("settling a delivery: its subscription has ended")
        if delivery.tag not in self._unsettled:
            raise BrokerClosed(f"delivery {delivery.tag} was settled already")  # RabbitMQ closes the channel

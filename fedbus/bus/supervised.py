"""A `Bus` that outlives its connections: made anew, declared again, consumed again, and sent again what is unconfirmed.

Three parts. The supervisor, a task, waits for the end of a connection and makes the next one. Operations wait for a
connection, try, and when it ends under them say so and wait for the next. Each consumer has a keeper, a task that
subscribes again on every connection; deliveries go straight from that subscription to whoever receives.

A name that is held is held again on each new connection before anything else goes over it: somebody else may have
taken our place, and what we would do then is not ours to do.

What the caller must know: a message may arrive twice (its confirm was lost), and what was delivered and not settled
comes again. Both are true of any broker connection; here nobody has to start anew for it.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal, NoReturn, TypeVar

from fedbus.bus.base import Body, Bus, Consumer, Delivery, Offset, QueueState
from fedbus.bus.topology import Binding, Exchange, Queue, Topology
from fedbus.errors import (
    BrokerClosed,
    BrokerDenied,
    BrokerError,
    BrokerUnreachable,
    PublishUnconfirmed,
    QueueBusy,
    TurnedOut,
)

T = TypeVar("T")

_LOGGER = logging.getLogger("fedbus.bus")
_BUSY_PAUSE_S = 0.2
_PATIENCE_S = 60.0
_SHORT_PATIENCE_S = 2.0
_AFTERMATH_S = 30.0
_REASON_S = 0.1


@dataclass(frozen=True, kw_only=True)
class LinkState:
    """What became of the connection to `broker` (shown without its password), and why.

    `outage_s`: for "restored" the seconds without a connection, for "unblocked" those of the alarm, else 0. "lost" also
    ends a "blocked": no "unblocked" follows.
    """

    kind: Literal["lost", "restored", "blocked", "unblocked"]
    reason: str
    broker: str
    outage_s: float = 0.0


def no_observer(_: LinkState) -> None:
    """Whoever does not want to know."""


class _Link:
    """One connection, and the news of its end."""

    def __init__(self, bus: Bus, generation: int) -> None:
        self.bus = bus
        self.generation = generation
        self.made_at = time.monotonic()
        self.blocked_at: float | None = None
        self.lost = asyncio.Event()
        self._holds: dict[str, AbstractAsyncContextManager[None]] = {}

    async def hold(self, name: str) -> None:
        holding = self.bus.hold(name)
        await holding.__aenter__()
        self._holds[name] = holding

    async def release(self, name: str) -> None:
        holding = self._holds.pop(name, None)
        if holding is not None:
            await holding.__aexit__(None, None, None)

    async def close(self) -> None:
        await self.bus.close()
        for name in list(self._holds):
            await self.release(name)


class _KnownTopology:
    """Everything that was declared, each thing once."""

    def __init__(self) -> None:
        self._exchanges: dict[str, Exchange] = {}
        self._queues: dict[str, Queue] = {}
        self._bindings: dict[Binding, None] = {}

    def add(self, topology: Topology) -> None:
        self._exchanges |= {exchange.name: exchange for exchange in topology.exchanges}
        self._queues |= {queue.name: queue for queue in topology.queues}
        self._bindings |= dict.fromkeys(topology.bindings)

    def leads_to_stream(self, exchange: str) -> bool:
        return any(
            binding.exchange == exchange and self._queues[binding.queue].kind == "stream"
            for binding in self._bindings
            if binding.queue in self._queues
        )

    def forget_queue(self, name: str) -> None:
        self._queues.pop(name, None)
        self._bindings = {binding: None for binding in self._bindings if binding.queue != name}

    def all(self) -> Topology:
        return Topology(
            exchanges=tuple(self._exchanges.values()),
            queues=tuple(self._queues.values()),
            bindings=tuple(self._bindings),
        )


class SupervisedBus(Bus):
    """A `Bus` over connections that come and go.

    Args:
        first: the connection to begin with; closed with this one, as all that follow.
        reconnect: makes the next one, or raises `BrokerUnreachable` or `BrokerDenied`.
        on_state: is told, in the event loop, what becomes of the connection.
        give_up_s: length of an outage after which its last error is final; None: never.
        denied_patience_s: a node that boots refuses users for a moment; when refusals are all we hear for so long, they
            are final. The first one is, when the connection ended because we were turned out.
        busy_patience_s: how long to ask again for a name that was ours and is held by another after a reconnect: our
            own ghost may hold it until the broker misses its heartbeats. Then `QueueBusy` is final.
        pause_s, longest_pause_s: before attempt n (0, 1, ...) to connect it sleeps uniform(0, min(longest_pause_s,
            pause_s * 2**n)), "full jitter" (M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog, 2015).
    """

    def __init__(
        self,
        first: Bus,
        reconnect: Callable[[], Awaitable[Bus]],
        *,
        on_state: Callable[[LinkState], None] = no_observer,
        give_up_s: float | None = None,
        denied_patience_s: float = 30.0,
        busy_patience_s: float = 90.0,
        pause_s: float = 0.2,
        longest_pause_s: float = 10.0,
    ) -> None:
        self._reconnect = reconnect
        self._on_state = on_state
        self._give_up_s = give_up_s
        self._denied_patience_s = denied_patience_s
        self._busy_patience_s = busy_patience_s
        self._pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._random = random.Random()  # of its own: a seed in the app must not make all clients come at once
        self._attempts = 0
        self._lost_at = 0.0
        self._is_turned_out = False
        self._generations = itertools.count()
        self._turns = itertools.count()
        self._line: dict[int, asyncio.Future[None]] = {}  # who waits for a connection, by the turn it was started in
        self._known = _KnownTopology()
        self._consumers: set[_SupervisedConsumer] = set()
        self._holds: set[str] = set()
        self._failure: BrokerError | None = None  # why nothing goes any more
        self._ended: asyncio.Future[BrokerError | None] = asyncio.get_running_loop().create_future()
        self._closing: asyncio.Task[None] | None = None
        self._link: _Link | None = None
        self._supervisor = asyncio.create_task(
            self._supervise(self._adopt(self._link_over(first))), name="fedbus bus supervisor"
        )

    def __repr__(self) -> str:
        state = "ended" if self._failure else "connected" if self._link else "reconnecting"
        return f"<SupervisedBus {self.broker} {state}>"

    # ---- operations ----------------------------------------------------------------------------------------------

    async def declare(self, topology: Topology, *, remember: bool = True) -> None:
        await self._carry_out(lambda bus: bus.declare(topology, remember=remember))
        if remember:
            self._known.add(topology)

    async def delete_queue(self, name: str) -> None:
        self._known.forget_queue(name)
        await self._carry_out(lambda bus: bus.delete_queue(name))

    async def purge(self, queue: str) -> None:
        await self._carry_out(lambda bus: bus.purge(queue))

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
        """As any bus, except that what is refused, or unconfirmed for long, is sent again."""

        async def send(bus: Bus, patience_s: float) -> None:
            await bus.publish(
                exchange, routing_key, body, mandatory=mandatory, expires_s=expires_s, timeout_s=patience_s
            )

        try:
            async with asyncio.timeout(timeout_s):
                await self._send(exchange, send)
        except TimeoutError:
            raise PublishUnconfirmed(f"publishing to {exchange}: not confirmed in time") from None

    async def _send(self, exchange: str, send: Callable[[Bus, float], Awaitable[None]]) -> None:
        for attempt in itertools.count():
            asked_at, patience_s = time.monotonic(), self._patience_s(exchange, attempt)
            try:
                return await self._carry_out(lambda bus: send(bus, patience_s))  # noqa: B023  # called at once
            except PublishUnconfirmed:
                # Refused: a full queue, or a cluster that chooses another node to lead it. Unconfirmed: waited enough.
                if time.monotonic() < asked_at + patience_s:
                    await asyncio.sleep(self._jitter(attempt))

    def _patience_s(self, exchange: str, attempt: int) -> float:
        """How long a confirm may take.

        Short where it may never come: when we have just lost a node of a cluster, and always for a stream, which loses
        what is on its way to a leader that dies elsewhere in the cluster (seen with RabbitMQ 3.10). It doubles: a
        broker that is only slow must not be buried under copies.
        """
        has_just_lost = 0.0 < self._lost_at > time.monotonic() - _AFTERMATH_S
        is_short = has_just_lost or self._known.leads_to_stream(exchange)
        return float((_SHORT_PATIENCE_S if is_short else _PATIENCE_S) * 2 ** min(attempt, 30))

    def consume(
        self, queue: str, *, prefetch: int, offset: Offset | None = None, exclusive: bool = False
    ) -> AbstractAsyncContextManager[Consumer]:
        """As any bus, except that the consumer survives reconnects; each delivery's generation counts them.

        To settle a delivery of an older generation does nothing: it comes again. A stream goes on behind the last
        offset that was handed out; "next" and "last" apply anew as long as nothing was.

        `receive` raises `QueueMissing` when the queue is gone for good, and `QueueBusy` when another consumer has taken
        the place of an exclusive one and keeps it.
        """
        return self._consume(queue, _SupervisedConsumer(self, queue, prefetch, offset, exclusive))

    @asynccontextmanager
    async def _consume(self, queue: str, consumer: _SupervisedConsumer) -> AsyncIterator[Consumer]:
        self._check_open()
        self._consumers.add(consumer)
        try:
            await consumer.begin()
            yield consumer
        finally:
            await consumer.leave()
            self._consumers.discard(consumer)

    @asynccontextmanager
    async def replies(self, exchange: str, routing_key: str) -> AsyncIterator[Consumer]:
        link = await self._linked(next(self._turns))
        async with link.bus.replies(exchange, routing_key) as consumer:
            yield consumer

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """As any bus, except that it is held over reconnects: nothing goes on until it is ours again.

        When another connection keeps it from us the bus ends, and every operation raises `QueueBusy`.
        """
        await self._hold(name)
        try:
            yield
        finally:
            self._holds.discard(name)
            if self._link is not None:
                await self._link.release(name)

    async def queue_state(self, queue: str) -> QueueState:
        return await self._carry_out(lambda bus: bus.queue_state(queue))

    async def _hold(self, name: str) -> None:
        turn = next(self._turns)
        while True:
            link = await self._linked(turn)
            try:
                await link.hold(name)
            except BrokerClosed as exc:
                self._lose(link, exc)
            else:
                if self._link is link:
                    self._holds.add(name)
                    return
                await link.release(name)  # the next connection was made without it

    async def closed(self) -> None:
        """Wait for `close`, or raise why there will be no connection any more."""
        failure = await asyncio.shield(self._ended)
        if failure is not None:
            _raise_anew(failure)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        try:
            await asyncio.shield(self._closing)
        except asyncio.CancelledError:
            await asyncio.wait([self._closing])  # bounded: so is each connection's close
            raise

    async def _close(self) -> None:
        """First whatever could connect again, then the connection, then what it leaves of the subscriptions."""
        link = self._link
        self._end(None)
        await _end_task(self._supervisor)
        if link is not None:
            link.lost.set()
            await link.close()
        for consumer in list(self._consumers):
            await consumer.leave()

    # ---- the connection ------------------------------------------------------------------------------------------

    async def _carry_out(self, operation: Callable[[Bus], Awaitable[T]]) -> T:
        turn = next(self._turns)
        while True:
            link = await self._linked(turn)
            try:
                return await operation(link.bus)
            except BrokerClosed as exc:
                self._lose(link, exc)

    async def _linked(self, turn: int) -> _Link:
        """The connection, as soon as there is one; those who wait go on in the order of their turns."""
        while True:
            self._check_open()
            if self._link is not None:
                return self._link
            self._line[turn] = waiting = asyncio.get_running_loop().create_future()
            try:
                await waiting
            finally:
                del self._line[turn]

    def _wake_line(self) -> None:
        for turn in sorted(self._line):
            if not self._line[turn].done():
                self._line[turn].set_result(None)

    def _check_open(self) -> None:
        if self._failure is not None:
            _raise_anew(self._failure)

    def _link_over(self, bus: Bus) -> _Link:
        return _Link(bus, next(self._generations))

    def _adopt(self, link: _Link) -> _Link:
        self._link = link
        self.broker, self.user = link.bus.broker, link.bus.user
        link.bus.on_blocked = functools.partial(self._note_alarm, link)
        self._wake_line()
        return link

    def _lose(self, link: _Link, reason: BrokerError) -> None:
        """Whoever notices first says so; nothing goes over `link` any more."""
        if self._link is not link or self._failure is not None:
            return
        self._link = None
        self._lost_at = time.monotonic()
        self._is_turned_out = isinstance(reason, TurnedOut)
        if self._lost_at - link.made_at > self._longest_pause_s:
            self._attempts = 0  # one that ends at once counts as one more attempt: no loop without pauses
        self._tell("lost", str(reason))
        link.lost.set()

    def _note_alarm(self, link: _Link, reason: str | None) -> None:
        if self._link is not link:
            return
        if reason is not None:
            link.blocked_at = time.monotonic()
            self._tell("blocked", reason)
        elif link.blocked_at is not None:
            blocked_s, link.blocked_at = time.monotonic() - link.blocked_at, None
            self._tell("unblocked", "the alarm is over", blocked_s)

    def _tell(self, kind: Literal["lost", "restored", "blocked", "unblocked"], reason: str, s: float = 0.0) -> None:
        try:
            self._on_state(LinkState(kind=kind, reason=reason, broker=self.broker, outage_s=s))
        except Exception:
            _LOGGER.exception("an observer of the broker connection failed")

    def _end(self, failure: BrokerError | None) -> None:
        """Nothing goes any more: because of `failure`, or because we were closed (None)."""
        if self._failure is not None:
            return
        self._failure = failure or BrokerClosed("the connection to the broker was closed")
        self._link = None
        self._wake_line()
        for consumer in list(self._consumers):
            consumer.end(self._failure)
        self._ended.set_result(failure)

    # ---- the supervisor ------------------------------------------------------------------------------------------

    async def _supervise(self, link: _Link) -> None:
        try:
            while self._failure is None:
                await self._until_lost(link)
                link = await self._connect_again()
        except BrokerError as exc:
            self._end(exc)
        except Exception as exc:
            _LOGGER.exception("the supervision of the broker connection failed")
            self._end(BrokerClosed(f"the supervision of the broker connection failed: {exc!r}"))

    async def _until_lost(self, link: _Link) -> None:
        """Wait for the end of `link`, then take down what is left of it."""
        watching = asyncio.create_task(self._watch(link), name="fedbus bus watch")
        try:
            await link.lost.wait()
            await asyncio.wait([watching], timeout=_REASON_S)  # whoever noticed first may not know why
        finally:
            await _end_task(watching)
            await link.close()

    async def _watch(self, link: _Link) -> None:
        try:
            await link.bus.closed()
            self._lose(link, BrokerClosed("the connection to the broker ended"))
        except BrokerError as exc:
            self._lose(link, exc)
            self._is_turned_out |= isinstance(exc, TurnedOut)

    async def _connect_again(self) -> _Link:
        """Make the next connection, and put it in its place. Raises the error that is final."""
        denied_since: float | None = None
        while True:
            self._check_open()
            await asyncio.sleep(self._jitter(self._attempts))
            self._attempts += 1
            try:
                link = await self._prepared(self._link_over(await self._reconnect()))
            except (BrokerUnreachable, BrokerDenied, BrokerClosed, PublishUnconfirmed) as exc:
                now = time.monotonic()
                denied_since = (denied_since or now) if isinstance(exc, BrokerDenied) else None
                patience_s = 0.0 if self._is_turned_out else self._denied_patience_s
                if denied_since is not None and now - denied_since >= patience_s:
                    raise
                if self._give_up_s is not None and now - self._lost_at >= self._give_up_s:
                    raise BrokerUnreachable(f"no connection for {now - self._lost_at:.0f} s: {exc}") from exc
                continue
            self._adopt(link)
            self._tell("restored", "connected again", time.monotonic() - self._lost_at)
            return link

    async def _prepared(self, link: _Link) -> _Link:
        """`link`, where all that we held is ours and everything as it was declared; closed when that cannot be."""
        try:
            for name in list(self._holds):
                await self._hold_again(link, name)
            await link.bus.declare(self._known.all())
        except BaseException:
            await link.close()
            raise
        return link

    async def _hold_again(self, link: _Link, name: str) -> None:
        give_up_at = time.monotonic() + self._busy_patience_s
        while name in self._holds:
            try:
                return await link.hold(name)
            except QueueBusy as exc:
                if time.monotonic() > give_up_at:
                    raise QueueBusy(f"{name} is held by another connection since ours was lost") from exc
            await asyncio.sleep(_BUSY_PAUSE_S)

    def _jitter(self, attempt: int) -> float:
        return self._random.uniform(0, min(self._longest_pause_s, self._pause_s * 2 ** min(attempt, 30)))


@dataclass(frozen=True, slots=True)
class _Subscription:
    consumer: Consumer
    link: _Link


class _SupervisedConsumer(Consumer):
    def __init__(self, bus: SupervisedBus, queue: str, prefetch: int, offset: Offset | None, exclusive: bool) -> None:
        self._bus = bus
        self._queue = queue
        self._prefetch = prefetch
        self._exclusive = exclusive
        self._offset = offset  # where to subscribe the next time
        self._last_offset: int | None = None  # in a stream: of what was handed out
        self._has_begun = False
        self._current: _Subscription | None = None
        self._failure: BrokerError | None = None
        self._news = asyncio.Event()  # of the next change in the two above
        self._keeper: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Subscribe for the first time: what is wrong now is raised at once."""
        self._keeper = asyncio.create_task(self._keep(), name=f"fedbus bus keeper of {self._queue}")
        while not self._has_begun:
            self._check_failure()
            await self._news.wait()

    async def leave(self) -> None:
        """End the subscription, even when we are cancelled meanwhile."""
        self.end(BrokerClosed(f"consuming {self._queue}: the subscription has ended"))
        if self._keeper is not None:
            await _end_task(self._keeper)

    def end(self, failure: BrokerError) -> None:
        if self._failure is None:
            self._failure = failure
            self._tell_news()

    def _tell_news(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _check_failure(self) -> None:
        if self._failure is not None:
            _raise_anew(self._failure)

    # ---- the keeper ----------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        turn = next(self._bus._turns)
        try:
            while self._failure is None:
                link = await self._bus._linked(turn)
                try:
                    await self._stay_subscribed(link)
                except BrokerClosed as exc:
                    if self._failure is None:
                        self._bus._lose(link, exc)
        except BrokerError as exc:
            self.end(exc)
        except Exception as exc:
            _LOGGER.exception("a subscription could not be kept up")
            self.end(BrokerClosed(f"consuming {self._queue}: the subscription could not be kept up: {exc!r}"))

    async def _stay_subscribed(self, link: _Link) -> None:
        """Subscribe over `link`, and return when it is lost."""
        async with self._subscribed(link) as consumer:
            self._has_begun = True
            self._current = _Subscription(consumer, link)
            self._tell_news()
            try:
                await link.lost.wait()
            finally:
                self._current = None

    @asynccontextmanager
    async def _subscribed(self, link: _Link) -> AsyncIterator[Consumer]:
        """A subscription over `link`; a ghost of ours may stand in the way until the broker misses its heartbeats."""
        give_up_at = time.monotonic() + (self._bus._busy_patience_s if self._has_begun else 0.0)
        async with AsyncExitStack() as stack:
            while True:
                subscription = link.bus.consume(
                    self._queue, prefetch=self._prefetch, offset=self._offset, exclusive=self._exclusive
                )
                try:
                    consumer = await stack.enter_async_context(subscription)
                    break
                except QueueBusy:
                    if time.monotonic() > give_up_at:
                        raise
                await asyncio.sleep(_BUSY_PAUSE_S)
            yield consumer

    # ---- deliveries ----------------------------------------------------------------------------------------------

    async def receive(self) -> Delivery:
        while True:
            current = await self._subscription()
            try:
                delivery = await current.consumer.receive()
            except BrokerClosed as exc:
                self._check_failure()
                self._bus._lose(current.link, exc)
            except BrokerError as exc:
                self.end(exc)
                raise
            else:
                delivery = replace(delivery, generation=current.link.generation)
                if self._take(delivery):
                    return delivery
                await self.ack(delivery)  # makes room for more

    async def _subscription(self) -> _Subscription:
        while True:
            self._check_failure()
            current = self._current
            if current is not None and not current.link.lost.is_set():
                return current
            await self._news.wait()

    def _take(self, delivery: Delivery) -> bool:
        """Note how far we are in a stream; False for what was handed out already."""
        if delivery.offset is None:
            return True
        if self._last_offset is not None and delivery.offset <= self._last_offset:
            return False
        self._last_offset = delivery.offset
        self._offset = delivery.offset + 1
        return True

    async def ack(self, *deliveries: Delivery) -> None:
        current = self._current
        if current is None or current.link.lost.is_set() or self._failure is not None:
            return
        ours = [delivery for delivery in deliveries if delivery.generation == current.link.generation]
        if ours:
            await self._settle(current, current.consumer.ack(*ours))

    async def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        current = self._current
        if current is None or current.link.lost.is_set() or self._failure is not None:
            return
        if delivery.generation == current.link.generation:
            await self._settle(current, current.consumer.reject(delivery, requeue=requeue))

    async def _settle(self, current: _Subscription, settling: Awaitable[None]) -> None:
        try:
            await settling
        except BrokerClosed as exc:  # it comes again
            if self._failure is None:
                self._bus._lose(current.link, exc)


async def _end_task(task: asyncio.Task[None]) -> None:
    """Cancel it, and wait for its end even when we are cancelled meanwhile."""
    task.cancel()
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _raise_anew(failure: BrokerError) -> NoReturn:
    """Raise the like of `failure`: one exception object must not be raised in several tasks."""
    raise type(failure)(*failure.args) from failure

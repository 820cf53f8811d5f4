"""A `Bus` in memory whose Nth operation fails, and takes its connection with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal, TypeAlias, TypeVar

from fedbus.bus.base import Body, Bus, Consumer, Delivery, Offset, QueueState
from fedbus.bus.memory import MemoryBus
from fedbus.bus.topology import Topology
from fedbus.errors import BrokerClosed

Kind: TypeAlias = Literal[
    "declare", "delete_queue", "purge", "publish", "consume", "hold", "queue_state", "receive", "ack", "reject"
]
When: TypeAlias = Literal["before", "after"]
T = TypeVar("T")


class Fault:
    """Fails the `nth` (1, 2, ...) operation of `kind` (None: of any) over all the buses that it wraps, once.

    "before": nothing has happened. "after": it has happened, and its caller does not hear of it. Either way the
    connection that it went over is dropped, and the caller gets `BrokerClosed`.

    `happened` tells whether that many operations were ever asked for; `effects` is what took effect, in order: for
    publishes, receives and acknowledgements with the body, for others with b"".
    """

    def __init__(self, nth: int, *, kind: Kind | None = None, when: When = "before") -> None:
        self._left = nth
        self._kind = kind
        self._when = when
        self.effects: list[tuple[Kind, bytes]] = []

    def __repr__(self) -> str:
        return f"<Fault {self._when} {self._kind or 'any'}, {self._left} to go>"

    @property
    def happened(self) -> bool:
        return self._left <= 0

    def wrap(self, bus: MemoryBus) -> FailingBus:
        return FailingBus(bus, self)

    async def apply(self, kind: Kind, bus: MemoryBus, operation: Callable[[], Awaitable[T]], *bodies: bytes) -> T:
        is_now = self._is_now(kind)
        if is_now and self._when == "before":
            _drop(bus, kind)
        result = await operation()
        if isinstance(result, Delivery):
            bodies = (result.body,)
        self.effects += [(kind, body) for body in bodies or (b"",)]
        if is_now:
            _drop(bus, kind)
        return result

    def _is_now(self, kind: Kind) -> bool:
        if self._kind not in (None, kind):
            return False
        self._left -= 1
        return self._left == 0


def _drop(bus: MemoryBus, kind: Kind) -> None:
    bus.drop()
    raise BrokerClosed(f"{kind}: the connection to the broker ended, on purpose")


class FailingBus(Bus):
    """A `MemoryBus` under a `Fault`; made by `Fault.wrap`."""

    def __init__(self, bus: MemoryBus, fault: Fault) -> None:
        self._bus = bus
        self.user = bus.user
        self._fault = fault
        bus.on_blocked = lambda reason: None if self.on_blocked is None else self.on_blocked(reason)

    async def declare(self, topology: Topology, *, remember: bool = True) -> None:
        await self._fault.apply("declare", self._bus, lambda: self._bus.declare(topology))

    async def delete_queue(self, name: str) -> None:
        await self._fault.apply("delete_queue", self._bus, lambda: self._bus.delete_queue(name))

    async def purge(self, queue: str) -> None:
        await self._fault.apply("purge", self._bus, lambda: self._bus.purge(queue))

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
        async def send() -> None:
            await self._bus.publish(
                exchange, routing_key, body, mandatory=mandatory, expires_s=expires_s, timeout_s=timeout_s
            )

        await self._fault.apply("publish", self._bus, send, bytes(body))

    def consume(
        self, queue: str, *, prefetch: int, offset: Offset | None = None, exclusive: bool = False
    ) -> AbstractAsyncContextManager[Consumer]:
        return self._consume(self._bus.consume(queue, prefetch=prefetch, offset=offset, exclusive=exclusive))

    @asynccontextmanager
    async def _consume(self, subscription: AbstractAsyncContextManager[Consumer]) -> AsyncIterator[Consumer]:
        consumer = await self._fault.apply("consume", self._bus, subscription.__aenter__)
        try:
            yield _FailingConsumer(consumer, self._bus, self._fault)
        finally:
            await subscription.__aexit__(None, None, None)

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        holding = self._bus.hold(name)
        await self._fault.apply("hold", self._bus, holding.__aenter__)
        try:
            yield
        finally:
            await holding.__aexit__(None, None, None)

    def replies(self, exchange: str, routing_key: str) -> AbstractAsyncContextManager[Consumer]:
        return self._bus.replies(exchange, routing_key)

    async def queue_state(self, queue: str) -> QueueState:
        return await self._fault.apply("queue_state", self._bus, lambda: self._bus.queue_state(queue))

    async def closed(self) -> None:
        await self._bus.closed()

    async def close(self) -> None:
        await self._bus.close()


class _FailingConsumer(Consumer):
    def __init__(self, consumer: Consumer, bus: MemoryBus, fault: Fault) -> None:
        self._consumer = consumer
        self._bus = bus
        self._fault = fault

    async def receive(self) -> Delivery:
        return await self._fault.apply("receive", self._bus, self._consumer.receive)

    async def ack(self, *deliveries: Delivery) -> None:
        bodies = [delivery.body for delivery in deliveries]
        await self._fault.apply("ack", self._bus, lambda: self._consumer.ack(*deliveries), *bodies)

    async def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        await self._fault.apply("reject", self._bus, lambda: self._consumer.reject(delivery, requeue=requeue))

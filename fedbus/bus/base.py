"""The `Bus` contract: what fedbus asks of a broker, and what it may rely on.

- `publish` returns once the broker has taken responsibility for the message, and raises when it has not. A timeout
  means unknown, not failed: the message may still arrive, so receivers recognise duplicates.
- A delivery stays the consumer's until it is acknowledged or rejected. When its consumer or connection ends, it goes
  back to its queue, in its old place, and comes again with `redelivered` set. Streams keep everything: there an
  acknowledgement only makes room for more.
- Deliveries come in the order of publishing, as long as nothing is redelivered.
- Whoever must be alone holds a name: queues give to every consumer that asks. Who may not declare anything, and so not
  hold a name, consumes a classic queue exclusively.
- Who lacks the right to do something is told so: `BrokerDenied`.
- Every failure is a `BrokerError`.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self, TypeAlias

from fedbus.bus.topology import Topology
from fedbus.errors import QueueBusy

Body: TypeAlias = bytes | bytearray | memoryview
Offset: TypeAlias = int | Literal["first", "last", "next"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One message as it was delivered.

    `tag` belongs to the consumer that received it; `offset` is the place in a stream, None elsewhere; `user_id` is
    the sender's broker user, checked by the broker, where the sender gave it; `is_copied` tells that the sender named
    further routing keys (CC), which the broker did not check; `generation` counts the incarnations of a subscription
    that outlives its connections: what came through an older one can no longer be settled.
    """

    body: bytes
    tag: int
    routing_key: str
    redelivered: bool
    offset: int | None
    user_id: str | None
    is_copied: bool = False
    generation: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueState:
    """`messages` that wait in a queue (in a stream: that it keeps), and its `consumers`, of all connections that the
    broker does not know to have ended."""

    messages: int
    consumers: int


class Consumer(ABC):
    """One subscription to one queue."""

    @abstractmethod
    async def receive(self) -> Delivery:
        """The next delivery.

        Raises `BrokerClosed` when the connection has ended, `QueueMissing` when the queue was deleted.
        """

    @abstractmethod
    async def ack(self, *deliveries: Delivery) -> None:
        """Settle: the broker may forget them."""

    @abstractmethod
    async def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        """Settle: back into the queue, or to its dead-letter exchange."""

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        while True:
            yield await self.receive()


async def hold_patiently(bus: Bus, stack: AsyncExitStack, name: str, *, patience_s: float = 5.0) -> None:
    """Hold `name` until `stack` closes.

    A predecessor that was killed may hold it for a moment longer: raises `QueueBusy` only after `patience_s`.
    """
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            return await stack.enter_async_context(bus.hold(name))
        except QueueBusy:
            if time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(0.2)


class Bus(ABC):
    """One party's connection to a broker; an async context manager that closes it.

    `broker` is where it leads, as it may be shown, and `user` whom the broker takes us for. `on_blocked` is called with
    the reason when an alarm on the broker makes publishes wait, and with None when they go on.
    """

    broker: str = "memory"
    user: str
    on_blocked: Callable[[str | None], None] | None = None

    @abstractmethod
    async def declare(self, topology: Topology, *, remember: bool = True) -> None:
        """Make what is not there yet; what is to be remembered also after each loss of the connection.

        Raises `QueueMismatch` for what is there with other settings.
        """

    @abstractmethod
    async def delete_queue(self, name: str) -> None:
        """Delete the queue with all it holds; nothing happens when it is not there."""

    @abstractmethod
    async def purge(self, queue: str) -> None:
        """Drop what waits in the queue; what consumers hold unsettled stays theirs. Raises `QueueMissing`.

        Not for streams: RabbitMQ ends the connection of whoever tries.
        """

    @abstractmethod
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
        """Hand a persistent message over and wait for the broker's confirm.

        Without `timeout_s` it waits as long as the connection lives: an alarm on the broker makes publishers wait.

        Raises `Unroutable` when it is mandatory and no queue takes it, `PublishUnconfirmed` when the broker refuses
        it or says nothing within `timeout_s`, `QueueMissing` when there is no such exchange, `BrokerClosed`.
        """

    @abstractmethod
    def consume(
        self, queue: str, *, prefetch: int, offset: Offset | None = None, exclusive: bool = False
    ) -> AbstractAsyncContextManager[Consumer]:
        """Subscribe to `queue` for the time of the context; what is not settled by its end goes back.

        `prefetch` bounds the unsettled deliveries (0: by no more than RabbitMQ can count, 65535; a stream needs one);
        `offset` is where to begin in a stream; `exclusive` asks to be the only consumer of a classic queue. Raises
        `QueueMissing`, and `QueueBusy` when somebody else consumes exclusively, or at all where we want to.
        """

    @abstractmethod
    def replies(self, exchange: str, routing_key: str) -> AbstractAsyncContextManager[Consumer]:
        """A queue of our own that takes what is published with `routing_key`, for the time of the context.

        It ends with its connection, and so does its consumer, also where others are kept up. Raises `QueueMissing` when
        there is no such exchange, `BrokerDenied` when we may not.
        """

    @abstractmethod
    def hold(self, name: str) -> AbstractAsyncContextManager[None]:
        """Hold `name` for the time of the context, as the only connection that does; once at a time over one bus.

        It is free again as soon as the broker knows that the connection has ended. Raises `QueueBusy` when another
        connection holds it.
        """

    @abstractmethod
    async def queue_state(self, queue: str) -> QueueState:
        """What waits in the queue, and how many consume it.

        Raises `QueueMissing`, and `BrokerUnreachable` when the broker cannot tell now: the queue's own node is away.
        """

    @abstractmethod
    async def closed(self) -> None:
        """Wait for the end of the connection, then raise `BrokerClosed`; returns only after `close`."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connection; unsettled deliveries go back to their queues."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

"""The `Bus` on RabbitMQ, 3.10 to 4.x: the only place that knows aiormq.

Two connections, one to publish and one to consume: an alarm on the broker blocks publishing connections only, and
large uploads do not stand in the way of acknowledgements. Each consumer has a channel of its own, so that an error of
one does not end the others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import aiormq
from aiormq import exceptions as amqp
from aiormq.abc import AbstractChannel, DeliveredMessage

from fedbus.bus.base import CONFIRM_TIMEOUT_S, Body, Bus, Consumer, Delivery, Offset
from fedbus.bus.topology import Queue, Topology
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
    Unroutable,
)

_HEARTBEAT_S: Final = 20
_CONNECT_TIMEOUT_S: Final = 15.0
_PERSISTENT: Final = 2
_BLOCKED_POLL_S: Final = 5.0


def redacted(url: str) -> str:
    """`url` as it may be shown: without user and password."""
    parts = urlsplit(url)
    host = parts.hostname or "?"
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path if parts.path != '/' else ''}"


def _check_url(url: str) -> str:
    example = "amqp://user:password@host:5672/vhost"
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError(f"the broker URL cannot be read; it looks like {example}") from None
    if parts.scheme not in ("amqp", "amqps") or not parts.hostname or not has_port:
        raise ConfigError(f"the broker URL must look like {example} (or amqps://...)")
    if "heartbeat=" in parts.query:
        return url
    return parts._replace(query="&".join(filter(None, (parts.query, f"heartbeat={_HEARTBEAT_S}")))).geturl()


@contextmanager
def _mapped(doing: str) -> Iterator[None]:
    """The one map from aiormq's exceptions to ours."""
    try:
        yield
    except amqp.ChannelNotFoundEntity as exc:
        raise QueueMissing(f"{doing}: {_reason(exc)}") from exc
    except (amqp.ChannelLockedResource, amqp.ChannelAccessRefused) as exc:
        if "exclusive" in _reason(exc):
            raise QueueBusy(f"{doing}: another consumer holds it exclusively") from exc
        raise BrokerDenied(f"{doing}: the broker says no: {_reason(exc)}") from exc
    except amqp.ChannelPreconditionFailed as exc:
        raise QueueMismatch(f"{doing}: {_reason(exc)}") from exc
    except amqp.PublishError as exc:
        raise Unroutable(f"{doing}: no queue takes it") from exc
    except amqp.DeliveryError as exc:
        raise PublishUnconfirmed(f"{doing}: the broker refused the message (a full queue?)") from exc
    except TimeoutError as exc:
        raise PublishUnconfirmed(f"{doing}: no word of the broker in time; it may have happened or not") from exc
    except (amqp.AMQPError, RuntimeError, OSError) as exc:  # RuntimeError: used after its end
        raise BrokerClosed(f"{doing}: the connection to the broker ended: {_reason(exc)}") from exc
    except asyncio.CancelledError as exc:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # aiormq cancels its own futures when heartbeats stay out: nobody asked us to stop.
        raise BrokerClosed(f"{doing}: the connection to the broker ended") from exc


def _reason(exc: BaseException) -> str:
    text = str(exc.args[-1]) if exc.args else ""
    return " ".join(text.split()) or type(exc).__name__


async def connect(url: str, *, name: str = "fedbus") -> RabbitMQBus:
    """Connect to the broker at `url` (amqp:// or amqps://); `name` shows in the broker's list of connections.

    Raises `ConfigError` for a URL that is none, `BrokerUnreachable`, `BrokerDenied`.
    """
    full_url = _check_url(url)
    consuming = await _connect(full_url, f"{name} consume")
    try:
        publishing = await _connect(full_url, f"{name} publish")
    except BaseException:
        await consuming.close()
        raise
    user = urlsplit(url).username
    # A user that comes out of a certificate is the broker's to know.
    return RabbitMQBus(consuming, publishing, user=unquote(user) if user else None)


async def _connect(url: str, name: str) -> aiormq.Connection:
    where = redacted(url.split("?")[0])
    connection = aiormq.Connection(url, client_properties={"connection_name": name, "product": "fedbus"})
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await connection.connect()
    except (amqp.ProbableAuthenticationError, amqp.AuthenticationError) as exc:
        raise BrokerDenied(f"the broker at {where} refuses the user or the password: check the broker URL") from exc
    except (TimeoutError, amqp.AMQPError, OSError) as exc:
        # aiormq drops the broker's reason when Connection.Open is answered by Connection.Close.
        if isinstance(exc, amqp.ConnectionClosed | amqp.InvalidFrameError) and "OpenOk" in str(exc):
            vhost = unquote(urlsplit(url).path.removeprefix("/")) or "/"
            raise BrokerDenied(
                f"the broker at {where} refuses the vhost {vhost!r}: check the end of the broker URL, create the "
                "vhost, or give the user rights in it (its limit of connections may be reached, too)"
            ) from exc
        reason = "no answer in time" if isinstance(exc, TimeoutError) else _reason(exc)
        raise BrokerUnreachable(
            f"no broker answers at {where}: {reason}. Start one with 'fedbus broker start', or check the broker URL"
        ) from exc
    return connection


class RabbitMQBus(Bus):
    """A pair of connections to one RabbitMQ vhost; made by `connect`."""

    def __init__(self, consuming: aiormq.Connection, publishing: aiormq.Connection, *, user: str | None) -> None:
        self._consuming = consuming
        self._publishing = publishing
        self._user = user
        self._publish_channel: AbstractChannel | None = None
        self._publish_lock = asyncio.Lock()
        self._is_closing = False

    def __repr__(self) -> str:
        return f"<RabbitMQBus {redacted(str(self._consuming.url))}>"

    async def declare(self, topology: Topology) -> None:
        for exchange in topology.exchanges:
            async with self._channel(f"declaring exchange {exchange.name}") as channel:
                await channel.exchange_declare(exchange.name, exchange_type=exchange.kind, durable=True)
        for queue in topology.queues:
            async with self._channel(f"declaring queue {queue.name}") as channel:
                await channel.queue_declare(queue.name, durable=True, arguments=_queue_arguments(queue))
        for binding in topology.bindings:
            async with self._channel(f"binding {binding.queue} to {binding.exchange}") as channel:
                await channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)

    async def delete_queue(self, name: str) -> None:
        async with self._channel(f"deleting queue {name}") as channel:
            with contextlib.suppress(amqp.ChannelNotFoundEntity):
                await channel.queue_delete(name)

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: Body,
        *,
        mandatory: bool = True,
        expires_s: float | None = None,
        timeout_s: float = CONFIRM_TIMEOUT_S,
    ) -> None:
        properties = aiormq.spec.Basic.Properties(
            delivery_mode=_PERSISTENT,
            user_id=self._user,
            expiration=None if expires_s is None else str(max(1, round(expires_s * 1000))),
        )
        with _mapped(f"publishing to {exchange}"):
            await self._until_unblocked()
            async with asyncio.timeout(timeout_s):
                channel = await self._open_publish_channel()
                await channel.basic_publish(
                    body,  # type: ignore[arg-type]  # annotated bytes; a flat memoryview serves as well
                    exchange=exchange,
                    routing_key=routing_key,
                    properties=properties,
                    mandatory=mandatory,
                )

    async def _until_unblocked(self) -> None:
        """An alarm on the broker (memory, disk) blocks publishers: wait, do not fail."""
        while not self._publishing.is_closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BLOCKED_POLL_S):  # ready() does not notice the connection's end
                    return await self._publishing.ready()
        raise BrokerClosed("the connection to the broker ended")

    async def _open_publish_channel(self) -> AbstractChannel:
        """One channel for all publishes, made anew after an error (a missing exchange) has closed it."""
        async with self._publish_lock:
            if self._publish_channel is None or self._publish_channel.is_closed:
                self._publish_channel = await self._publishing.channel(publisher_confirms=True)
            return self._publish_channel

    def consume(
        self, queue: str, *, prefetch: int, offset: Offset | None = None, exclusive: bool = False
    ) -> AbstractAsyncContextManager[Consumer]:
        return self._consume(queue, prefetch, offset, exclusive)

    @asynccontextmanager
    async def _consume(
        self, queue: str, prefetch: int, offset: Offset | None, exclusive: bool
    ) -> AsyncIterator[Consumer]:
        arguments: dict[str, Any] = {} if offset is None else {"x-stream-offset": offset}
        with _mapped(f"consuming {queue}"):
            channel = await self._consuming.channel(publisher_confirms=False)
        try:
            consumer = _RabbitMQConsumer(channel, queue)
            with _mapped(f"consuming {queue}"):
                await channel.basic_qos(prefetch_count=prefetch)
                await channel.basic_consume(queue, consumer.on_message, arguments=arguments, exclusive=exclusive)
            yield consumer
        finally:
            await _close_channel(channel)

    @asynccontextmanager
    async def _channel(self, doing: str) -> AsyncIterator[AbstractChannel]:
        """A channel for one operation: the broker closes it on an error, and nothing else is lost."""
        with _mapped(doing):
            channel = await self._consuming.channel(publisher_confirms=False)
            try:
                yield channel
            finally:
                await _close_channel(channel)

    async def closed(self) -> None:
        await asyncio.wait(
            {asyncio.ensure_future(self._consuming.closing), asyncio.ensure_future(self._publishing.closing)},
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not self._is_closing:
            raise BrokerClosed("the connection to the broker ended")

    async def close(self) -> None:
        self._is_closing = True
        for connection in (self._publishing, self._consuming):
            with contextlib.suppress(amqp.AMQPError, OSError, TimeoutError, RuntimeError):
                async with asyncio.timeout(5):
                    await connection.close()


async def _close_channel(channel: AbstractChannel) -> None:
    """Close it to the end, even when we are cancelled meanwhile.

    A close that is cut short makes aiormq send Channel.Close twice, and the broker ends the connection for it; one that
    is cancelled while CloseOk comes in swallows the cancellation.
    """
    closing = asyncio.ensure_future(_close_in_time(channel))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await asyncio.wait([closing])  # bounded by its own timeout
        raise


async def _close_in_time(channel: AbstractChannel) -> None:
    with contextlib.suppress(amqp.AMQPError, amqp.ChannelInvalidStateError, OSError, TimeoutError):
        async with asyncio.timeout(5):
            await channel.close()


def _queue_arguments(queue: Queue) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "x-queue-type": queue.kind,
        "x-dead-letter-exchange": queue.dead_letter_exchange,
        "x-delivery-limit": queue.delivery_limit,
        "x-expires": None if queue.expires_s is None else round(queue.expires_s * 1000),
        "x-max-length-bytes": queue.max_bytes,
        "x-stream-max-segment-size-bytes": queue.segment_bytes,
    }
    return {name: value for name, value in arguments.items() if value is not None}


class _RabbitMQConsumer(Consumer):
    def __init__(self, channel: AbstractChannel, queue: str) -> None:
        self._channel = channel
        self._queue = queue
        self._arrived: asyncio.Queue[Delivery | BrokerError] = asyncio.Queue()  # bounded by the prefetch
        channel.closing.add_done_callback(self._on_closed)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled)

    async def on_message(self, message: DeliveredMessage) -> None:
        # aiormq starts a task for each message: they stay in order because this one never waits.
        properties = message.header.properties
        assert isinstance(message.delivery, aiormq.spec.Basic.Deliver)
        self._arrived.put_nowait(
            Delivery(
                body=message.body,
                tag=message.delivery.delivery_tag or 0,
                routing_key=message.delivery.routing_key or "",
                redelivered=bool(message.delivery.redelivered),
                offset=_stream_offset(properties.headers),
                user_id=properties.user_id,
            )
        )

    def _on_closed(self, _: object) -> None:
        self._arrived.put_nowait(BrokerClosed(f"consuming {self._queue}: the connection to the broker ended"))

    def _on_cancelled(self, _: object) -> None:
        self._arrived.put_nowait(QueueMissing(f"consuming {self._queue}: the queue was deleted"))

    async def receive(self) -> Delivery:
        item = await self._arrived.get()
        if isinstance(item, BrokerError):
            self._arrived.put_nowait(item)  # for whoever asks again
            raise item
        return item

    async def ack(self, delivery: Delivery) -> None:
        with _mapped(f"acknowledging to {self._queue}"):
            await self._channel.basic_ack(delivery.tag, wait=False)

    async def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        with _mapped(f"rejecting to {self._queue}"):
            await self._channel.basic_reject(delivery.tag, requeue=requeue, wait=False)


def _stream_offset(headers: Any) -> int | None:
    offset = (headers or {}).get("x-stream-offset")
    return offset if isinstance(offset, int) else None

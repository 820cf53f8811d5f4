"""The `Bus` on RabbitMQ, 3.10 to 4.x: the only place that knows aiormq.

Two connections, one to publish and one to consume: an alarm on the broker blocks publishing connections only, and
large uploads do not stand in the way of acknowledgements. Each consumer has a channel of its own, so that an error of
one does not end the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import ssl
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import aiormq
from aiormq import exceptions as amqp
from aiormq.abc import AbstractChannel, ChannelFrame, DeliveredMessage

from fedbus.bus.access import Access, access_to, redacted, user_of
from fedbus.bus.base import Body, Bus, Consumer, Delivery, Offset, QueueState
from fedbus.bus.supervised import LinkState, SupervisedBus, no_observer
from fedbus.bus.topology import Queue, Topology
from fedbus.errors import (
    BrokerClosed,
    BrokerDenied,
    BrokerError,
    BrokerUnreachable,
    PublishUnconfirmed,
    QueueBusy,
    QueueMismatch,
    QueueMissing,
    TurnedOut,
    Unroutable,
)

_CONNECT_TIMEOUT_S: Final = 15.0
_ALERT_S: Final = 3.0
_PERSISTENT: Final = 2
_MOST_UNSETTLED: Final = 65_535  # a quorum queue takes AMQP's "no bound" (0) for 2000, and falls silent behind them
_LONGEST_MS: Final = 2**32 - 1  # 49 days: RabbitMQ closes the channel of whoever wants a message to live for ages
# In a cluster: the queue is there, and another node (or this one, later) will serve it. RabbitMQ says so with the codes
# of a queue that is missing or has other settings.
_OF_THIS_NODE: Final = ("is down or inaccessible", "replica on the local node")
_TAKEN: Final = ("in exclusive use", "exclusive access to locked queue")
# What RabbitMQ says to the connections of a user that is deleted, and what our provisioning says to those left over.
_MEANT_FOR_US: Final = ("' is deleted", "its rights were revoked", "its secret was replaced")
# Any other 404 for a queue is about one that is there, and cannot be served now.
_NO_SUCH_QUEUE: Final = "no queue '"
_HUNG_UP: Final = ("connection unexpectedly closed", "connection reset", "connection error")


@contextmanager
def _mapped(doing: str) -> Iterator[None]:
    """The one map from aiormq's exceptions to ours."""
    try:
        yield
    except (amqp.ChannelNotFoundEntity, amqp.ChannelPreconditionFailed) as exc:
        reason = _reason(exc)
        if "user_id property" in reason:
            raise BrokerDenied(f"{doing}: the broker takes us for somebody else: {reason}") from exc
        if any(words in reason for words in _OF_THIS_NODE):
            raise BrokerClosed(f"{doing}: this node of the broker cannot do it now: {reason}") from exc
        raise (QueueMissing if isinstance(exc, amqp.ChannelNotFoundEntity) else QueueMismatch)(
            f"{doing}: {reason}"
        ) from exc
    except (amqp.ChannelLockedResource, amqp.ChannelAccessRefused) as exc:
        if any(words in _reason(exc) for words in _TAKEN):
            raise QueueBusy(f"{doing}: another connection does") from exc
        raise BrokerDenied(f"{doing}: the broker says no: {_reason(exc)}") from exc
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
    except Exception as exc:
        if type(exc) is not Exception:
            raise
        # What aiormq gives to those who wait when a connection is reset and it has no better reason at hand.
        raise BrokerClosed(f"{doing}: the connection to the broker ended") from exc


def _reason(exc: BaseException) -> str:
    text = str(exc.args[-1]) if exc.args else ""
    return " ".join(text.split()) or type(exc).__name__


def _reason_of_end(closing: asyncio.Future[Any]) -> str:
    exc = None if closing.cancelled() else closing.exception()
    if exc is None or isinstance(exc, asyncio.CancelledError):  # that is how aiormq ends a silent connection
        return "its heartbeats stayed out"
    return _reason(exc)


async def connect(broker: str | Access, *, name: str = "fedbus") -> RabbitMQBus:
    """Connect to `broker`; `name` shows in the broker's list of connections.

    Of several URLs the first that lets us in is taken.

    Raises `ConfigError` for a URL that is none, `BrokerUnreachable`, `BrokerDenied`.
    """
    access = access_to(broker)
    return await _connect_to_any(access, access.each_url, name)


async def connect_supervised(
    broker: str | Access, *, name: str = "fedbus", on_state: Callable[[LinkState], None] = no_observer
) -> SupervisedBus:
    """Connect as `connect` does, once; from then on lost connections are made anew, at any of its URLs.

    Raises `ConfigError` for a URL that is none, `BrokerUnreachable`, `BrokerDenied`.
    """
    access = access_to(broker)

    async def reconnect() -> Bus:
        urls = random.sample(access.each_url, len(access.each_url))  # not all clients to the same node
        bus = await _connect_to_any(access, urls, name)
        # What aiormq leaves of a lost connection is a knot of cycles around a megabyte of buffers, and a client makes
        # so little garbage otherwise that the collector would not come by for long.
        gc.collect()
        return bus

    return SupervisedBus(await _connect_to_any(access, access.each_url, name), reconnect, on_state=on_state)


async def _connect_to_any(access: Access, urls: Sequence[str], name: str) -> RabbitMQBus:
    """The first that lets us in; the error, when none does, says why for each."""
    failures: list[BrokerUnreachable | BrokerDenied] = []
    for url in urls:
        try:
            return await _connect_to(access, url, name)
        except (BrokerUnreachable, BrokerDenied) as exc:
            failures.append(exc)
    if len(failures) == 1:
        raise failures[0]
    all_deny = all(isinstance(failure, BrokerDenied) for failure in failures)
    raise (BrokerDenied if all_deny else BrokerUnreachable)("; ".join(map(str, failures))) from failures[0]


async def _connect_to(access: Access, url: str, name: str) -> RabbitMQBus:
    tls = access.tls_context(url)
    consuming = await _connect(url, tls, f"{name} consume")
    try:
        publishing = await _connect(url, tls, f"{name} publish")
    except BaseException:
        await consuming.close()
        raise
    return RabbitMQBus(consuming, publishing, user=user_of(url))


class _Link(aiormq.Connection):
    """A connection that tells of alarms: aiormq keeps them to itself, behind `ready()`."""

    # Unbounded: whoever waits for room while the connection ends would wait for ever, and the heartbeats of a blocked
    # connection must find room. What is large is bounded elsewhere: one publish at a time waits for the socket.
    FRAME_BUFFER_SIZE = 0
    READER_CLOSE_TIMEOUT = 1  # a broker with an alarm does not read our Connection.Close

    on_blocked: Callable[[str | None], None] | None = None

    def __init__(self, url: str, tls: ssl.SSLContext | None, name: str) -> None:
        super().__init__(url, context=tls, client_properties={"connection_name": name, "product": "fedbus"})
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        self.closing.add_done_callback(lambda _: self.unblocked.set())

    # aiormq 7.2 has no public hook; the test of the alarm fails where these names change.
    async def _Connection__handle_connection_blocked(self, frame: aiormq.spec.Connection.Blocked) -> None:
        self.unblocked.clear()
        if self.on_blocked is not None:
            self.on_blocked(frame.reason or "an alarm")

    async def _Connection__handle_connection_unblocked(self, _: object) -> None:
        self.unblocked.set()
        if self.on_blocked is not None:
            self.on_blocked(None)


async def _connect(url: str, tls: ssl.SSLContext | None, name: str) -> _Link:
    where = redacted(url)
    connection = _Link(url, tls, name)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            await connection.connect()
    except (amqp.ProbableAuthenticationError, amqp.AuthenticationError) as exc:
        raise BrokerDenied(f"the broker at {where} {_refused_login(url)}") from exc
    except (TimeoutError, amqp.AMQPError, OSError) as exc:
        # aiormq drops the broker's reason when Connection.Open is answered by Connection.Close.
        if isinstance(exc, amqp.ConnectionClosed | amqp.InvalidFrameError) and "OpenOk" in str(exc):
            vhost = unquote(urlsplit(url).path.removeprefix("/")) or "/"
            raise BrokerDenied(
                f"the broker at {where} refuses the vhost {vhost!r} to the user {user_of(url)!r}: check the end of the "
                "broker URL, create the vhost, or give the user rights in it (its limit of connections may be reached, "
                "too); the bundle of one federation opens no other"
            ) from exc
        if tls is not None:
            await _explain_tls(url, tls, where, exc)
        reason = "no answer in time" if isinstance(exc, TimeoutError) else _reason(exc)
        if tls is None and any(words in reason for words in _HUNG_UP):
            raise BrokerUnreachable(
                f"what answers at {where} hangs up before a word is said: if that port speaks TLS, as 5671 does, the "
                "URL begins with amqps://"
            ) from exc
        raise BrokerUnreachable(
            f"no broker answers at {where}: {reason}. Start one with 'fedbus broker start', or check the broker URL"
        ) from exc
    except asyncio.CancelledError:
        if connection.is_opened:  # cancelled in the moment it was ready
            await connection.close()
        raise
    return connection


def _refused_login(url: str) -> str:
    parts = urlsplit(url)
    if "auth=external" not in parts.query.lower():
        return "refuses the user or the password: check the broker URL"
    return (
        f"does not let the user {user_of(url)!r} in by this certificate: it was revoked or replaced, or belongs to "
        "another broker; ask its operator for a new bundle"
    )


_ALERTS: Final = {
    "UNKNOWN_CA": "it does not know the authority that signed our certificate: take the bundle that was made for it",
    "CERTIFICATE_EXPIRED": "our certificate has expired: ask its operator for a new bundle (fedbus broker rotate)",
    "CERTIFICATE_REVOKED": "our certificate was revoked",
    "CERTIFICATE_REQUIRED": "it asks for a certificate, and we showed none: use --bundle FILE",
    "HANDSHAKE_FAILURE": "it asks for a client's certificate, and ours is none, or not of that kind: use --bundle FILE",
}
"""What a broker says of our certificate: TLS alerts (RFC 8446, section 6), as OpenSSL names them."""


async def _explain_tls(url: str, tls: ssl.SSLContext, where: str, exc: BaseException) -> None:
    """Raise what tells the user what to do, where TLS is the matter.

    A broker that refuses our certificate says so when our handshake is over already, and hangs up: what aiormq had sent
    by then turns its word into a reset. So it is asked once more, by somebody who only listens.
    """
    error = _ssl_error_in(exc) or await _ask_for_alert(url, tls)
    if error is None:
        return
    if isinstance(error, ssl.SSLCertVerificationError):
        raise BrokerUnreachable(
            f"the broker at {where} cannot be trusted: {error.verify_message.rstrip('.')}. Its certificate must be for "
            "this host, and signed by the authority (CA) in your bundle, or by one that this machine trusts"
        ) from exc
    reason = error.reason or str(error)
    if "WRONG_VERSION_NUMBER" in reason:
        raise BrokerUnreachable(
            f"the broker at {where} does not speak TLS on this port: 5671 is the usual one"
        ) from exc
    for alert, words in _ALERTS.items():
        if alert in reason:
            raise BrokerDenied(f"the broker at {where} turns us away: {words}") from exc
    raise BrokerUnreachable(f"no TLS with the broker at {where}: {reason}") from exc


def _ssl_error_in(exc: BaseException | None) -> ssl.SSLError | None:
    seen = set[int]()
    while exc is not None and id(exc) not in seen:
        if isinstance(exc, ssl.SSLError):
            return exc
        seen.add(id(exc))  # aiormq's chains run in circles
        exc = exc.__cause__ or exc.__context__
    return None


async def _ask_for_alert(url: str, tls: ssl.SSLContext) -> ssl.SSLError | None:
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_ALERT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 5671, ssl=tls)
            try:
                await reader.read(1)
            finally:
                writer.close()
    except ssl.SSLError as exc:
        return exc
    except (OSError, TimeoutError):
        pass
    return None


class RabbitMQBus(Bus):
    """A pair of connections to one RabbitMQ vhost; made by `connect`."""

    def __init__(self, consuming: _Link, publishing: _Link, *, user: str) -> None:
        self.broker = redacted(str(consuming.url))
        self._consuming = consuming
        publishing.on_blocked = self._tell_blocked
        self._publishing = publishing
        self.user = user
        self._lane: _Lane | None = None
        self._publish_lock = asyncio.Lock()
        self._aside: AbstractChannel | None = None
        self._aside_lock = asyncio.Lock()
        self._asking: AbstractChannel | None = None
        self._asking_lock = asyncio.Lock()
        self._is_closing = False

    def __repr__(self) -> str:
        return f"<RabbitMQBus {self.broker}>"

    def _tell_blocked(self, reason: str | None) -> None:
        if self.on_blocked is not None:
            self.on_blocked(reason)

    async def declare(self, topology: Topology, *, remember: bool = True) -> None:
        if not remember:
            return await self._declare_aside(topology)
        for exchange in topology.exchanges:
            async with self._channel(f"declaring exchange {exchange.name}") as channel:
                arguments: dict[str, Any] = (
                    {} if exchange.alternate is None else {"alternate-exchange": exchange.alternate}
                )
                try:
                    await channel.exchange_declare(
                        exchange.name, exchange_type=exchange.kind, durable=True, arguments=arguments
                    )
                except amqp.ChannelPreconditionFailed as exc:
                    raise QueueMismatch(
                        f"the broker holds an exchange of another version of fedbus ({_reason(exc)}): delete the "
                        "vhost, or take a fresh one"
                    ) from exc
        for queue in topology.queues:
            async with self._channel(f"declaring queue {queue.name}") as channel:
                await channel.queue_declare(queue.name, durable=True, arguments=_queue_arguments(queue))
        for binding in topology.bindings:
            async with self._channel(f"binding {binding.queue} to {binding.exchange}") as channel:
                await channel.queue_bind(binding.queue, binding.exchange, binding.routing_key)

    async def _declare_aside(self, topology: Topology) -> None:
        """Queues and bindings of the moment, over a channel that is kept for them, where no deliveries come in.

        Whoever keeps a flood out cannot wait for answers that come behind it.
        """
        assert not topology.exchanges, "what is of the moment has no exchanges"
        async with self._aside_lock:
            with _mapped("declaring queues and bindings"):
                if self._aside is None or self._aside.is_closed:
                    self._aside = await self._publishing.channel(publisher_confirms=False)
                for queue in topology.queues:
                    await self._aside.queue_declare(queue.name, durable=True, arguments=_queue_arguments(queue))
                for binding in topology.bindings:
                    await self._aside.queue_bind(binding.queue, binding.exchange, binding.routing_key)

    async def delete_queue(self, name: str) -> None:
        async with self._channel(f"deleting queue {name}") as channel:
            with contextlib.suppress(amqp.ChannelNotFoundEntity):
                await channel.queue_delete(name)

    async def purge(self, queue: str) -> None:
        async with self._channel(f"purging queue {queue}") as channel:
            await channel.queue_purge(queue)

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
        properties = aiormq.spec.Basic.Properties(
            delivery_mode=_PERSISTENT,
            user_id=self.user,
            expiration=None if expires_s is None else str(min(max(1, round(expires_s * 1000)), _LONGEST_MS)),
        )
        with _mapped(f"publishing to {exchange}"):
            async with asyncio.timeout(timeout_s):
                await self._publishing.unblocked.wait()  # an alarm on the broker: wait, do not fail
                with await self._open_lane() as channel:
                    await channel.basic_publish(
                        body,  # type: ignore[arg-type]  # annotated bytes; a flat memoryview serves as well
                        exchange=exchange,
                        routing_key=routing_key,
                        properties=properties,
                        mandatory=mandatory,
                    )

    async def _open_lane(self) -> _Lane:
        """One channel for all publishes, made anew when an error (a missing exchange) has closed it, or in doubt."""
        async with self._publish_lock:
            if self._lane is None or not self._lane.is_open:
                self._lane = _Lane(await self._publishing.channel(publisher_confirms=True), self._publishing.unblocked)
            return self._lane

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
        assert isinstance(channel, aiormq.Channel)
        try:
            consumer = _RabbitMQConsumer(channel, queue)
            with _mapped(f"consuming {queue}"):
                await channel.basic_qos(prefetch_count=prefetch or _MOST_UNSETTLED)
                await channel.basic_consume(queue, consumer.on_message, exclusive=exclusive, arguments=arguments)
            yield consumer
        finally:
            await _close_channel(channel)

    @asynccontextmanager
    async def replies(self, exchange: str, routing_key: str) -> AsyncIterator[Consumer]:
        name = f"fedbus.reply.{uuid.uuid4().hex}"
        async with self._channel(f"waiting for replies of {exchange}") as channel:
            await channel.queue_declare(name, exclusive=True, arguments={"x-queue-type": "classic"})
            await channel.queue_bind(name, exchange, routing_key)
        try:
            async with self._consume(name, 0, None, True) as consumer:
                yield consumer
        finally:
            with contextlib.suppress(BrokerError):  # it ends with the connection at the latest
                await self.delete_queue(name)

    @asynccontextmanager
    async def hold(self, name: str) -> AsyncIterator[None]:
        """As an exclusive queue: it is known to the whole cluster, and ends with the connection that consumes.

        An exclusive consumer would not do: a quorum queue accepts a second one.
        """
        async with self._channel(f"holding {name}") as channel:
            await channel.queue_declare(name, exclusive=True, arguments={"x-queue-type": "classic"})
        try:
            yield
        finally:
            with contextlib.suppress(BrokerError):  # it ends with the connection at the latest
                await self.delete_queue(name)

    async def queue_state(self, queue: str) -> QueueState:
        """Over a channel that is kept for it: asked often, and a queue that is missing closes only that one.

        One question at a time, so that the error of one is not that of another.
        """
        doing = f"looking at {queue}"
        async with self._asking_lock:
            with _mapped(doing):
                if self._asking is None or self._asking.is_closed:
                    self._asking = await self._consuming.channel(publisher_confirms=False)
                try:
                    answer = await self._asking.queue_declare(queue, passive=True)
                except amqp.ChannelNotFoundEntity as exc:
                    if _NO_SUCH_QUEUE in _reason(exc):
                        raise
                    raise BrokerUnreachable(f"{doing}: the broker cannot tell now: {_reason(exc)}") from exc
        return QueueState(messages=answer.message_count or 0, consumers=answer.consumer_count or 0)

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
        ends = {self._consuming.closing, self._publishing.closing}
        ended, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not self._is_closing:
            reason = _reason_of_end(ended.pop())
            is_meant = any(words in reason for words in _MEANT_FOR_US)
            raise (TurnedOut if is_meant else BrokerClosed)(f"the connection to the broker ended: {reason}")

    async def close(self) -> None:
        self._is_closing = True
        await asyncio.gather(_close_link(self._publishing), _close_link(self._consuming))


class _Lane:
    """A channel that publishes, until one is refused or stays unconfirmed; closed when its last user is done.

    A channel that first published to a queue of a cluster while the node that led the queue was dying asks the dead one
    for ever: a quorum queue refuses all that it sends, a stream takes it and says nothing (seen with RabbitMQ 3.10).
    """

    def __init__(self, channel: AbstractChannel, unblocked: asyncio.Event) -> None:
        self._channel = channel
        self._unblocked = unblocked
        self._users = 0
        self._is_in_doubt = False
        self._closing: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        return not (self._is_in_doubt or self._channel.is_closed)

    def __enter__(self) -> AbstractChannel:
        self._users += 1
        return self._channel

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: object) -> None:
        self._users -= 1
        is_refused = isinstance(exc, amqp.DeliveryError) and not isinstance(exc, amqp.PublishError)
        self._is_in_doubt |= is_refused or isinstance(exc, asyncio.CancelledError)
        if self._is_in_doubt and not self._users and self._closing is None:
            self._closing = asyncio.ensure_future(self._close())

    async def _close(self) -> None:
        await self._unblocked.wait()  # under an alarm the broker does not read what we say
        await _close_channel(self._channel)


async def _close_link(link: _Link) -> None:
    with contextlib.suppress(amqp.AMQPError, OSError, TimeoutError, RuntimeError):
        async with asyncio.timeout(5):
            await link.close()


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
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # aiormq cancels its own futures when the connection ends: nobody asked us to stop.


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
        "x-max-length": 0 if queue.refuses_all else None,
        "x-overflow": "reject-publish" if queue.refuses_all else None,
    }
    return {name: value for name, value in arguments.items() if value is not None}


class _RabbitMQConsumer(Consumer):
    def __init__(self, channel: aiormq.Channel, queue: str) -> None:
        self._channel = channel
        self._queue = queue
        self._arrived: asyncio.Queue[Delivery | BrokerError] = asyncio.Queue()  # bounded by the prefetch
        self._unsettled: dict[int, None] = {}  # tags, in the order of delivery
        channel.closing.add_done_callback(self._on_closed)
        channel.on_consumer_cancel_callbacks.add(self._on_cancelled)

    async def on_message(self, message: DeliveredMessage) -> None:
        # aiormq starts a task for each message: they stay in order because this one never waits.
        properties = message.header.properties
        assert isinstance(message.delivery, aiormq.spec.Basic.Deliver)
        tag = message.delivery.delivery_tag or 0
        self._unsettled[tag] = None
        self._arrived.put_nowait(
            Delivery(
                body=message.body,
                tag=tag,
                routing_key=message.delivery.routing_key or "",
                redelivered=bool(message.delivery.redelivered),
                offset=_stream_offset(properties.headers),
                user_id=properties.user_id,
                is_copied="CC" in (properties.headers or ()),  # BCC is never shown to who receives
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

    async def ack(self, *deliveries: Delivery) -> None:
        """One frame for all that were delivered up to some tag, where all of these are among the given ones.

        The frames go out together: aiormq would give each to the socket by itself, which costs more than all the rest.
        """
        up_to, rest = self._split([delivery.tag for delivery in deliveries])
        frames = [aiormq.spec.Basic.Ack(delivery_tag=tag) for tag in rest]
        if up_to is not None:
            frames.insert(0, aiormq.spec.Basic.Ack(delivery_tag=up_to, multiple=True))
        with _mapped(f"acknowledging to {self._queue}"):
            if self._channel.is_closed:
                raise amqp.ChannelInvalidStateError("the channel is closed")
            if frames:
                await self._channel.write_queue.put(ChannelFrame.marshall(self._channel.number, frames))

    def _split(self, tags: list[int]) -> tuple[int | None, list[int]]:
        """Settle `tags`: the last of those that one frame covers, and the others."""
        given = dict.fromkeys(tags)
        if len(given) < len(tags) or not given.keys() <= self._unsettled.keys():
            raise BrokerClosed(f"acknowledging to {self._queue}: a delivery was settled already")
        covered: list[int] = [] if len(given) < 2 else list(itertools.takewhile(given.__contains__, self._unsettled))
        for tag in given:
            del self._unsettled[tag]
        if len(covered) < 2:
            return None, list(given)
        for tag in covered:
            del given[tag]
        return covered[-1], list(given)

    async def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        with _mapped(f"rejecting to {self._queue}"):
            await self._channel.basic_reject(delivery.tag, requeue=requeue, wait=False)
        self._unsettled.pop(delivery.tag, None)


def _stream_offset(headers: Any) -> int | None:
    offset = (headers or {}).get("x-stream-offset")
    return offset if isinstance(offset, int) else None

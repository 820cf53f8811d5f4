"""Every exchange, queue and binding of a federation, as data.

    server ──> fedbus.broadcast (fanout) ──> fedbus.model        stream: each model version once
    server ──> fedbus.tasks     (direct) ──> fedbus.inbox.CLIENT tasks, receipts
    server ──> fedbus.jobs      (fanout) ──> fedbus.work         tasks of all virtual clients, for any worker
    client ──> fedbus.control   (topic)  ──> .any ──> fedbus.control   joins, heartbeats, evaluation results
    client ──> fedbus.updates   (topic)  ──> .any ──> fedbus.updates   updates, in parts; quorum
                                         ──> fedbus.quarantine   refuses everything of those who flood
                                             fedbus.dead         what could not be processed
    server ──> fedbus.lock.server, client ──> fedbus.lock.client.CLIENT: held, so that there is only one of each

A federation is a vhost: the names need no prefix of their own. Clients publish with their id as the routing key: the
queues take them all, but a broker can be told (topic permissions) which keys a user may use. The routing key of a task
is the client that it is for, in an inbox as in the queue of work. What nothing else is bound for goes to an exchange's
alternate: so that one client is kept out by one binding, whoever the others are. No exchange is called like a queue
that others read: RabbitMQ's rights are for both, and whoever may read an exchange may bind another one to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

BROADCAST = "fedbus.broadcast"
MODEL = "fedbus.model"
TASKS = "fedbus.tasks"
JOBS = "fedbus.jobs"
WORK = "fedbus.work"
CONTROL = "fedbus.control"
UPDATES = "fedbus.updates"
DEAD = "fedbus.dead"
SERVER_LOCK = "fedbus.lock.server"

QUARANTINE = "fedbus.quarantine"

QueueKind: TypeAlias = Literal["classic", "quorum", "stream"]
MessageQueueKind: TypeAlias = Literal["classic", "quorum"]

_DAY_S = 86_400


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A durable exchange; what none of its bindings is for goes to the one named `alternate`."""

    name: str
    kind: Literal["direct", "fanout", "topic"]
    alternate: str | None = None


@dataclass(frozen=True, kw_only=True)
class Queue:
    """A durable queue.

    `expires_s`: deleted after so long without a consumer. `max_bytes`: what is beyond is dropped from the old end; a
    stream drops whole segments of `segment_bytes`. `refuses_all`: every publish is refused, and its sender knows.
    """

    name: str
    kind: QueueKind = "classic"
    dead_letter_exchange: str | None = None
    delivery_limit: int | None = None
    expires_s: float | None = None
    max_bytes: int | None = None
    segment_bytes: int | None = None
    refuses_all: bool = False


@dataclass(frozen=True, kw_only=True)
class Binding:
    exchange: str
    queue: str
    routing_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Declared in this order: exchanges, queues, bindings."""

    exchanges: tuple[Exchange, ...] = ()
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()


def inbox(client_id: str) -> str:
    """The queue that only this client reads."""
    return f"fedbus.inbox.{client_id}"


def client_lock(client_id: str) -> str:
    """The name that this client holds while it is connected."""
    return f"fedbus.lock.client.{client_id}"


def _limit(kind: MessageQueueKind) -> int | None:
    """From RabbitMQ 4.0 the default of 20 would drop an update after 20 crashes of the server; -1 drops the first
    redelivery on 3.x. Classic queues have none.
    """
    return 1_000_000 if kind == "quorum" else None


def ingress(update_queue: MessageQueueKind = "quorum", message_queues: MessageQueueKind = "classic") -> Topology:
    """What must be there before a client can say anything, whoever comes first."""
    return Topology(
        exchanges=(
            Exchange(name=TASKS, kind="direct"),
            *(Exchange(name=_any(name), kind="fanout") for name in (CONTROL, UPDATES)),
            *(Exchange(name=name, kind="topic", alternate=_any(name)) for name in (CONTROL, UPDATES)),
            Exchange(name=DEAD, kind="fanout"),
        ),
        queues=(
            Queue(name=CONTROL, kind=message_queues, delivery_limit=_limit(message_queues)),
            Queue(name=UPDATES, kind=update_queue, dead_letter_exchange=DEAD, delivery_limit=_limit(update_queue)),
            Queue(name=DEAD, kind=message_queues, delivery_limit=_limit(message_queues), max_bytes=64 << 20),
        ),
        bindings=(
            Binding(exchange=_any(CONTROL), queue=CONTROL),
            Binding(exchange=_any(UPDATES), queue=UPDATES),
            Binding(exchange=DEAD, queue=DEAD),
        ),
    )


def _any(exchange: str) -> str:
    """The exchange for all that nothing else is bound for."""
    return f"{exchange}.any"


def quarantine() -> Topology:
    """The queue that refuses everything; nothing leads to it yet."""
    return Topology(queues=(Queue(name=QUARANTINE, refuses_all=True),))


def kept_out(routing_keys: Iterable[str]) -> Topology:
    """What is published under these keys is refused, once there is the queue that does it."""
    return Topology(
        bindings=tuple(
            Binding(exchange=exchange, queue=QUARANTINE, routing_key=key)
            for key in sorted(routing_keys)
            for exchange in (UPDATES, CONTROL)
        )
    )


def client_inbox(client_id: str, message_queues: MessageQueueKind = "classic") -> Topology:
    """The inbox of one client; it outlives the client's process, and a client that never comes back by a week."""
    queue = Queue(
        name=inbox(client_id),
        kind=message_queues,
        delivery_limit=_limit(message_queues),
        expires_s=7 * _DAY_S,
    )
    return Topology(
        queues=(queue,),
        bindings=(Binding(exchange=TASKS, queue=inbox(client_id), routing_key=client_id),),
    )


def work_queue(message_queues: MessageQueueKind = "classic") -> Topology:
    """The queue from which workers take the tasks of virtual clients; one binding, however many clients there are."""
    return Topology(
        exchanges=(Exchange(name=JOBS, kind="fanout"),),
        queues=(Queue(name=WORK, kind=message_queues, delivery_limit=_limit(message_queues)),),
        bindings=(Binding(exchange=JOBS, queue=WORK),),
    )


_MANY_VERSIONS_BYTES: Final = 8 << 30


def model_stream(model_bytes: int, *, versions: int = 4) -> Topology:
    """The stream of model versions, kept for at least `versions` of `model_bytes`; of more than four, up to 8 GiB.

    The bound is a power of two, so that models of about the same size find the stream of the run before usable.
    """
    kept_bytes = max(4 * model_bytes, min(versions * model_bytes, _MANY_VERSIONS_BYTES))
    max_bytes = 1 << max(28, (kept_bytes - 1).bit_length())
    return Topology(
        exchanges=(Exchange(name=BROADCAST, kind="fanout"),),
        queues=(Queue(name=MODEL, kind="stream", max_bytes=max_bytes, segment_bytes=max_bytes // 4),),
        bindings=(Binding(exchange=BROADCAST, queue=MODEL),),
    )

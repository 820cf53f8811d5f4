"""What has happened: the engine's input, past tense.

`delivery` is the runtime's own token for the bytes behind an update; the engine hands it back in commands and
settles each one exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, kw_only=True)
class ClientJoined:
    client_id: str
    session: str


@dataclass(frozen=True, kw_only=True)
class ClientHeard:
    """A heartbeat of a client that believes to be a member; `fit_task` is what it has in hand, "" for nothing."""

    client_id: str
    session: str
    fit_task: str = ""


@dataclass(frozen=True, kw_only=True)
class VirtualClientsHeard:
    """The queue from which workers take these clients' tasks is there, and so are they, for another lease.

    They keep nothing between two tasks and cannot be gone; who is not a member yet joins.
    """

    client_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ClientLeft:
    client_id: str
    session: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ModelReady:
    """The initial model, version 0, can be fetched by clients."""


@dataclass(frozen=True, kw_only=True)
class UpdateReceived:
    """A whole update is here and verified: `nbytes` of payload, `utility` what it taught if its client told."""

    client_id: str
    task_id: str
    delivery: int
    nbytes: int = 0
    utility: float | None = None


@dataclass(frozen=True, kw_only=True)
class UpdateInvalid:
    """A whole update is here and must not be folded."""

    client_id: str
    task_id: str
    delivery: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class TaskFailed:
    """A client ended a task without a result."""

    client_id: str
    task_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClientLost:
    """The client is gone without a word, and not for a moment: its inbox is gone, or its lease is known to be over."""

    client_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClientExpelled:
    """The client was turned out: nothing counts of what it has under way, whatever of it may still come."""

    client_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ClientUnreachable:
    """The connection of this client has been gone for a while; it may be back before its lease ends.

    `seen_at`: when it was there the last time, None while that is not known.
    """

    client_id: str
    reason: str
    seen_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateReported:
    client_id: str
    task_id: str


@dataclass(frozen=True, kw_only=True)
class RoundCommitted:
    """The round is durable, and the model that it led to (`version`) can be fetched."""

    round: int
    version: int


@dataclass(frozen=True, kw_only=True)
class EchoHeard:
    """A word to ourselves came back the way that the clients' heartbeats come.

    Whatever was said before `sent_at` has been heard by now, so silence until then was silence. After the first echo
    no lease ends on any other ground: a broker that is gone or blocked, or our own long sleep, costs nobody a place.
    """

    sent_at: float


@dataclass(frozen=True, kw_only=True)
class Reconnected:
    """There was no way to hear anybody; clients may take `grace_s` longer than we did to find the broker again."""

    grace_s: float


@dataclass(frozen=True, kw_only=True)
class TasksInDoubt:
    """What was asked, or answered, may be lost: by all, or by one client."""

    client_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class StopRequested:
    reason: str


@dataclass(frozen=True, kw_only=True)
class GoalReached:
    """The run has what it was for before its last round: it ends here, and has done its work."""

    reason: str


Event: TypeAlias = (
    ClientJoined
    | ClientHeard
    | VirtualClientsHeard
    | ClientLeft
    | ModelReady
    | UpdateReceived
    | UpdateInvalid
    | TaskFailed
    | ClientLost
    | ClientExpelled
    | ClientUnreachable
    | EvaluateReported
    | RoundCommitted
    | EchoHeard
    | Reconnected
    | TasksInDoubt
    | StopRequested
    | GoalReached
)

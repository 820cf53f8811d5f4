"""Everything that a server or client tells, as frozen dataclasses; the engine's notices are among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedbus.rounds.commands import (
    CohortGrew,
    EvaluateFailed,
    FitCancelled,
    FitFailed,
    MemberJoined,
    MemberLost,
    RoundOpened,
)

__all__ = [
    "AggregateDiscarded",
    "AggregationProgressed",
    "Announcement",
    "BrokerBlocked",
    "BrokerLost",
    "BrokerRestored",
    "BrokerUnblocked",
    "ClientDone",
    "CohortGrew",
    "ConnectedToBroker",
    "EvaluateFailed",
    "Evaluated",
    "EvaluationFailed",
    "FitCancelled",
    "FitFailed",
    "MemberJoined",
    "MemberLost",
    "MessageRejected",
    "MetricsExposed",
    "MetricsFailed",
    "ModelKept",
    "ModelPublished",
    "Observe",
    "ReceiptArrived",
    "RefusalArrived",
    "RoundClosed",
    "RoundOpened",
    "RunClosing",
    "RunFinished",
    "RunResumed",
    "RunStarted",
    "ServerAwaited",
    "TaskCancelled",
    "TaskCompleted",
    "TaskErred",
    "TaskStarted",
    "UpdateFolded",
    "UpdateRefused",
    "UpdateRepeated",
    "UserShutOut",
    "VirtualClientsEnrolled",
    "Welcomed",
    "WorkAwaited",
    "WorkerDone",
    "WorkersCounted",
]

Observe: TypeAlias = Callable[[object], None]
"""Called with each event, in order, on the event loop: it must not block."""


# ---- either side -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Announcement:
    """A line of the command's own."""

    text: str


@dataclass(frozen=True, kw_only=True)
class MetricsExposed:
    """Prometheus may scrape `url` from now on."""

    url: str


@dataclass(frozen=True, kw_only=True)
class ConnectedToBroker:
    broker: str
    role: Literal["server", "client", "worker"]


@dataclass(frozen=True, kw_only=True)
class BrokerLost:
    """The connection to the broker ended; the next one is being made."""

    broker: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BrokerRestored:
    """There is a connection again, after `outage_s` seconds without."""

    broker: str
    outage_s: float


@dataclass(frozen=True, kw_only=True)
class BrokerBlocked:
    """An alarm on the broker (memory, disk) makes everybody's publishes wait."""

    broker: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class BrokerUnblocked:
    """The alarm is over, after `outage_s` seconds."""

    broker: str
    outage_s: float


# ---- server ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunStarted:
    run_id: str
    num_rounds: int
    min_fit_clients: int
    start_clients: int
    is_asynchronous: bool = False


@dataclass(frozen=True, kw_only=True)
class RunResumed:
    """This server goes on where another had to stop: `rounds` are committed, in `seconds` so far."""

    run_id: str
    epoch: int
    rounds: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class VirtualClientsEnrolled:
    """So many clients are members from the begin; workers play them."""

    clients: int


@dataclass(frozen=True, kw_only=True)
class WorkersCounted:
    """So many workers take tasks now; told whenever that changes."""

    workers: int


@dataclass(frozen=True, kw_only=True)
class ModelPublished:
    """`raw_bytes`: what the payload would be without a codec."""

    version: int
    payload_bytes: int
    parts: int
    seconds: float
    raw_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class UpdateFolded:
    """`nbytes`: of the payload as it came. `raw_bytes`: what it would be without a codec."""

    client_id: str
    round: int
    staleness: int
    num_examples: int
    nbytes: int = 0
    raw_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class UpdateRefused:
    client_id: str
    task_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class UpdateRepeated:
    """An update that counts already came once more; it changes nothing."""

    client_id: str
    task_id: str


@dataclass(frozen=True, kw_only=True)
class AggregationProgressed:
    """A `finish` that takes long has done this share, 0 to 1, of its work."""

    round: int
    share: float


@dataclass(frozen=True, kw_only=True)
class RoundClosed:
    """`reason`: min_fit_clients, cohort_done or timeout. `seconds`: from the first task to the published model.

    `turnaround_s`: from the last part of the last update to the first part of the next version at the broker; None
    when something else closed the round.
    """

    round: int
    version: int
    reason: str
    folded: int
    cohort: int
    unfinished: tuple[str, ...]
    fit_metrics: Mapping[str, object]
    seconds: float
    turnaround_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """The model that `round` led to; `clients` is None for the central evaluation."""

    round: int
    where: Literal["central", "federated"]
    loss: float
    metrics: Mapping[str, object]
    clients: int | None


@dataclass(frozen=True, kw_only=True)
class EvaluationFailed:
    """The app's own evaluate_fn raised or returned what it must not; the run goes on."""

    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class MetricsFailed:
    """The app's own aggregate_fit_metrics or aggregate_evaluate_metrics raised or returned what it must not; the round
    goes on without."""

    round: int
    of: Literal["fit", "evaluate"]
    reason: str


@dataclass(frozen=True, kw_only=True)
class ModelKept:
    """The model that `round` led to is the best so far, by `metric`, and was kept under `name`."""

    name: str
    round: int
    version: int
    metric: str
    value: float


@dataclass(frozen=True, kw_only=True)
class AggregateDiscarded:
    """Finite updates added up to something that is not; the model stays as it was."""

    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class MessageRejected:
    """Bytes on a queue that are none of our messages, or not its sender's to send; those from the updates queue go to
    the dead letters. `user` is the broker user who sent them, None where that is the server's own, or not known.

    `count` of them since the last word, `reason` that of the last: one word in a second about each user.
    """

    queue: str
    reason: str
    user: str | None = None
    count: int = 1


@dataclass(frozen=True, kw_only=True)
class UserShutOut:
    """What this broker user has sent was too much: for so many seconds nothing of it is read, and the broker takes
    nothing more from `client_id`."""

    user: str
    client_id: str | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RunClosing:
    """The last round is behind us: the clients are being sent home, the last central evaluations go on."""

    finished: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunFinished:
    finished: bool
    reason: str
    rounds: int
    seconds: float


# ---- client ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServerAwaited:
    """No server has answered yet."""

    client_id: str


@dataclass(frozen=True, kw_only=True)
class Welcomed:
    client_id: str
    run_id: str


@dataclass(frozen=True, kw_only=True)
class ClientDone:
    """The client's last word: the run ended, or it was asked to leave (then `reason` says so)."""

    client_id: str
    finished: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class WorkAwaited:
    """The worker finds no queue of work: no server has enrolled virtual clients on this broker yet."""


@dataclass(frozen=True, kw_only=True)
class WorkerDone:
    """The worker's last word: how many tasks it has answered, why it ends, and how many it gave back unfinished."""

    tasks: int
    reason: str
    given_back: int


@dataclass(frozen=True, kw_only=True)
class TaskStarted:
    client_id: str
    kind: str
    round: int


@dataclass(frozen=True, kw_only=True)
class TaskCompleted:
    client_id: str
    kind: str
    round: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TaskErred:
    """The client's own code failed; the client lives on."""

    client_id: str
    kind: str
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class TaskCancelled:
    """The server does not want the result any more; long training may look at `ClientContext.cancelled`."""

    client_id: str
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ReceiptArrived:
    client_id: str
    round: int
    staleness: int


@dataclass(frozen=True, kw_only=True)
class RefusalArrived:
    client_id: str
    reason: str

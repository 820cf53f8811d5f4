"""What is to be done: the engine's output, imperative; and `Notice`s, which only tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeAlias


class Outcome(Enum):
    """How the delivery of an update is settled."""

    COMMITTED = "committed"
    """Folded into a round that is durable: acknowledge, send the receipt."""
    REFUSED = "refused"
    """Will never be folded: acknowledge, send the refusal."""
    SURPLUS = "surplus"
    """Came after the last round: acknowledge, say nothing; its sender did nothing wrong."""
    DUPLICATE = "duplicate"
    """The same update is folded already: acknowledge, say nothing."""
    RELEASED = "released"
    """Not taken into any round that is durable: leave it unacknowledged, so that the broker keeps it."""


class CloseReason(Enum):
    """Why a round closed."""

    MIN_FIT_CLIENTS = "min_fit_clients"
    COHORT_DONE = "cohort_done"
    TIMEOUT = "timeout"


@dataclass(frozen=True, kw_only=True)
class WelcomeClient:
    client_id: str
    session: str


@dataclass(frozen=True, kw_only=True)
class RequestParameters:
    """Ask this client for the initial model."""

    client_id: str
    task_id: str


@dataclass(frozen=True, kw_only=True)
class SendFitTask:
    """`repeat`: how many tasks the client was given in this round before, which asynchronous rounds do."""

    client_id: str
    task_id: str
    round: int
    version: int
    timeout_s: float
    repeat: int = 0


@dataclass(frozen=True, kw_only=True)
class CancelTask:
    """Tell the client that nobody waits for this task any more."""

    client_id: str
    task_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class GiveUpUploads:
    """Refuse, because of `reason`, what of this client's updates is on its way."""

    client_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SendEvaluateTask:
    client_id: str
    task_id: str
    round: int
    version: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class AdoptParameters:
    """Make this delivery the initial model, version 0, and answer with `ModelReady`."""

    client_id: str
    task_id: str
    delivery: int


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Add this update to the open round, its weight multiplied by `discount`.

    `version`: the model that it is an update of. `seconds`: from its task to here, None when that is not known.
    """

    client_id: str
    task_id: str
    delivery: int
    round: int
    version: int
    staleness: int
    discount: float
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Settle:
    """Acknowledge or release the delivery and tell its sender; each delivery gets exactly one."""

    client_id: str
    task_id: str
    delivery: int
    outcome: Outcome
    reason: str = ""
    round: int = 0
    staleness: int = 0


@dataclass(frozen=True, kw_only=True)
class Folded:
    """One update of a closed round."""

    client_id: str
    task_id: str
    delivery: int
    staleness: int


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Close the round: finish the aggregation, make it durable, publish, then answer with `RoundCommitted`.

    With nothing in `folded` the model stays as it is: version `version` again.
    """

    round: int
    version: int
    reason: CloseReason
    cohort: tuple[str, ...]
    folded: tuple[Folded, ...]
    unfinished: tuple[str, ...]
    lost: tuple[str, ...]
    failed: Mapping[str, str]
    opened_at: float


@dataclass(frozen=True, kw_only=True)
class CloseEvaluation:
    """The federated evaluation of `version`, the model that `round` led to, is complete."""

    round: int
    version: int
    reported: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EndRun:
    """Tell every member, and stop. The last command of a run."""

    finished: bool
    reason: str


LossCause: TypeAlias = Literal["left", "lease", "unreachable", "expelled"]
"""Why a member is one no more: it said goodbye; was silent for its lease; the broker knows that nobody is there; its
rights were revoked."""


# ---- notices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MemberJoined:
    client_id: str
    members: int
    needed: int
    """Clients that the first round still waits for; 0 once it may open."""
    round: int


@dataclass(frozen=True, kw_only=True)
class MemberLost:
    """The client's lease ran out, or it left, or its connection is gone."""

    client_id: str
    reason: str
    cause: LossCause
    members: int
    round: int

    @property
    def left(self) -> bool:
        """True when it said goodbye."""
        return self.cause == "left"


@dataclass(frozen=True, kw_only=True)
class RoundOpened:
    round: int
    version: int
    cohort: tuple[str, ...]
    min_fit_clients: int
    timeout_s: float


@dataclass(frozen=True, kw_only=True)
class CohortGrew:
    """Clients that were tasked after the round had opened."""

    round: int
    clients: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FitFailed:
    client_id: str
    task_id: str
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class FitCancelled:
    """A task so late that its update would be refused; its client is told to stop."""

    client_id: str
    task_id: str
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class EvaluateFailed:
    client_id: str
    round: int
    reason: str


Notice: TypeAlias = MemberJoined | MemberLost | RoundOpened | CohortGrew | FitFailed | FitCancelled | EvaluateFailed
Command: TypeAlias = (
    WelcomeClient
    | RequestParameters
    | AdoptParameters
    | SendFitTask
    | CancelTask
    | GiveUpUploads
    | SendEvaluateTask
    | Fold
    | Settle
    | Commit
    | CloseEvaluation
    | EndRun
    | Notice
)

"""The engine as of one moment, for people who ask how it goes: nothing in it changes, and nothing leads back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

MemberState: TypeAlias = Literal["idle", "training", "late", "overdue"]
"""late: it still trains on a version that is not the newest. overdue: it has had all the time that its task gave it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemberSnapshot:
    """One living client.

    `version`: the newest that it was asked to train or to evaluate, None when it was asked for nothing yet. `round`: of
    the task that it owes. `working_s`: for how long it has had that task; None also when another server gave it.
    `silent_s`: since it was heard of last.
    """

    client_id: str
    state: MemberState
    version: int | None
    round: int | None
    working_s: float | None
    silent_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSnapshot:
    """The run's rounds, and who is in.

    `open_round`: None while none is open, `open_s` for how long it has been and `closes_in_s` when it closes at the
    latest. `folded` of `needed` updates are in it. `clients_missing`: for how many more the first round waits.
    """

    phase: str
    version: int
    committed_rounds: int
    open_round: int | None
    open_s: float | None
    closes_in_s: float | None
    folded: int
    needed: int
    clients_missing: int
    members: tuple[MemberSnapshot, ...]

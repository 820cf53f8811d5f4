"""What a resumed engine must know of the run that it goes on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RestoredTask:
    """A fit task of the run so far; `folded_in` is the committed round that its update is in, 0 for none."""

    task_id: str
    client_id: str
    round: int
    version: int
    state: Literal["working", "folded", "failed"]
    folded_in: int = 0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Restored:
    """The run as of its last commit.

    `rounds` of it are committed and led to model `version`. `clients` were members: each is given a fresh lease, for
    nobody could listen to it meanwhile. `tasks` of round `rounds` + 1, if there are any, are its cohort: it had been
    open. `evaluation_due`: the federated evaluation of the last model was not complete.
    """

    rounds: int
    version: int
    clients: tuple[str, ...] = ()
    tasks: tuple[RestoredTask, ...] = ()
    evaluation_due: bool = False

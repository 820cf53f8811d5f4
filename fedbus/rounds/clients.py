"""What each client has done so far: what selection learns from, and what people are shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(slots=True, kw_only=True)
class ClientRecord:
    """One client's past in this run.

    `asked`: fit tasks given; `folded`: updates that count, `late` of them late; `failed`: tasks that ended without one,
    `refused` of them because of what the update was; `stopped`: tasks whose update would have come too late; `lost`:
    tasks during which it went away. `last_round`: in which it was asked last. `seconds`: how long it took from the task
    to the whole update the last time, `mean_seconds` on average over `timed` of them, None while that is not known.
    `staleness`: versions late, summed over `folded`. `nbytes`: payload bytes of the updates that count. `utility`: what
    its last update taught, num_examples times its loss; None if it told none.
    """

    client_id: str
    asked: int = 0
    folded: int = 0
    late: int = 0
    failed: int = 0
    refused: int = 0
    stopped: int = 0
    lost: int = 0
    last_round: int = 0
    timed: int = 0
    seconds: float | None = None
    mean_seconds: float | None = None
    staleness: int = 0
    max_staleness: int = 0
    nbytes: int = 0
    utility: float | None = None

    def note_asked(self, round: int) -> None:
        self.asked += 1
        self.last_round = max(self.last_round, round)

    def note_folded(self, *, staleness: int, seconds: float | None, nbytes: int, utility: float | None) -> None:
        self.folded += 1
        self.late += staleness > 0
        self.staleness += staleness
        self.max_staleness = max(self.max_staleness, staleness)
        self.nbytes += nbytes
        if seconds is not None:
            self.timed += 1
            self.seconds = seconds
            self.mean_seconds = (self.mean_seconds or 0.0) + (seconds - (self.mean_seconds or 0.0)) / self.timed
        if utility is not None:
            self.utility = utility

    def to_json(self) -> str:
        """One object of all fields."""
        return json.dumps({name: getattr(self, name) for name in _FIELDS})

    @classmethod
    def from_json(cls, text: str) -> ClientRecord:
        """The record that `to_json` gave."""
        return cls(**json.loads(text))


_FIELDS = tuple(field.name for field in dataclasses.fields(ClientRecord))

ClientRecords: TypeAlias = Mapping[str, ClientRecord]

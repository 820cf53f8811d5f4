"""What became of each round, as data that goes into history.json."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedbus.rounds.clients import ClientRecord


@dataclass(kw_only=True)
class Evaluation:
    """Loss and metrics of one model version; `clients` and `num_examples` are those of a federated evaluation.

    `number`: they are recorded in this order, counted from 1.
    """

    loss: float
    metrics: dict[str, Any]
    clients: int | None = None
    num_examples: int | None = None
    number: int = 0


@dataclass(kw_only=True)
class Best:
    """A model that was kept because it was the best so far, by `metric`."""

    round: int
    version: int
    metric: str
    value: float


@dataclass(kw_only=True)
class FoldedUpdate:
    """One update in a round, `staleness` versions late. A client may have two in one: a late one and a fresh one.

    `seconds`: from its task to the whole update, None when another server sent the task. `nbytes`: of its payload as
    it came. `raw_bytes`: what that would be without a codec.
    """

    client_id: str
    staleness: int
    num_examples: int
    metrics: dict[str, Any]
    seconds: float | None = None
    nbytes: int = 0
    raw_bytes: int = 0


@dataclass(kw_only=True)
class RoundRecord:
    """One round. Times are seconds, `opened_s` from the start of the run.

    `cohort`: the clients tasked in it; `unfinished`: those of them that still worked when it closed; `failed` and
    `refused`: client to reason; `evaluate_failed`: who could not evaluate the model that this round led to;
    `metrics_failed`: what was wrong with the app's own aggregation of metrics, "fit" or "evaluate" to reason.
    """

    round: int
    version: int
    reason: str
    opened_s: float
    seconds: float
    cohort: list[str]
    folded: list[FoldedUpdate]
    unfinished: list[str]
    lost: list[str]
    failed: dict[str, str]
    refused: dict[str, str]
    fit_metrics: dict[str, Any]
    central: Evaluation | None = None
    federated: Evaluation | None = None
    central_failed: str | None = None
    evaluate_failed: dict[str, str] = field(default_factory=dict)
    metrics_failed: dict[str, str] = field(default_factory=dict)

    @property
    def clients(self) -> set[str]:
        """Whose updates are in the round."""
        return {update.client_id for update in self.folded}


@dataclass(kw_only=True)
class History:
    """A whole run: written to history.json as it goes on. `settings` is what it was run with.

    `best`: the models that were kept, by the name of their file. `clients`: what each has done so far. `rounds`: all of
    them once the run has ended; while a server keeps a ledger on disk, the last ones.
    """

    run_id: str
    started_at: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    reason: str = ""
    seconds: float = 0.0
    clients_joined: list[str] = field(default_factory=list)
    clients_lost: list[str] = field(default_factory=list)
    clients_left: list[str] = field(default_factory=list)
    initial: Evaluation | None = None
    best: dict[str, Best] = field(default_factory=dict)
    clients: dict[str, ClientRecord] = field(default_factory=dict)
    rounds: list[RoundRecord] = field(default_factory=list)

    def record(self, round: int) -> RoundRecord | None:
        """The record of `round`, counted from 1; None when it is not closed."""
        return next((record for record in reversed(self.rounds) if record.round == round), None)

    @property
    def central(self) -> Evaluation | None:
        """The last central evaluation."""
        return next((record.central for record in reversed(self.rounds) if record.central), self.initial)

    @property
    def federated(self) -> Evaluation | None:
        """The last federated evaluation."""
        return next((record.federated for record in reversed(self.rounds) if record.federated), None)

    @property
    def updates(self) -> int:
        """Updates folded in all rounds together."""
        return sum(len(record.folded) for record in self.rounds)

    @property
    def num_rounds(self) -> int:
        """How many rounds are closed."""
        return self.rounds[-1].round if self.rounds else 0

    def forget_rounds(self, *, keep: int) -> None:
        """Let go of all rounds but the last `keep`; now and then, so that it costs nothing."""
        if len(self.rounds) > 2 * keep:
            del self.rounds[:-keep]

    def snapshot(self) -> History:
        """It as of now, for another thread: what is added or noted later does not show."""
        return dataclasses.replace(
            self,
            clients_joined=list(self.clients_joined),
            clients_lost=list(self.clients_lost),
            clients_left=list(self.clients_left),
            best=dict(self.best),
            clients={name: dataclasses.replace(record) for name, record in self.clients.items()},
            rounds=[
                dataclasses.replace(
                    record,
                    evaluate_failed=dict(record.evaluate_failed),
                    metrics_failed=dict(record.metrics_failed),
                )
                for record in self.rounds
            ],
        )

    def head(self) -> dict[str, Any]:
        """All but the rounds and the clients."""
        return {
            field.name: _as_data(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("rounds", "clients")
        }

    @classmethod
    def from_head(cls, head: Mapping[str, Any], rounds: list[RoundRecord], clients: dict[str, ClientRecord]) -> History:
        """The history that `head` and the records were taken from."""
        best = {name: Best(**fields) for name, fields in head.get("best", {}).items()}
        initial = _evaluation(head["initial"])
        return cls(**{**head, "initial": initial, "best": best}, rounds=rounds, clients=clients)

    def to_json(self) -> str:
        """As history.json holds it."""
        return "".join(self.json_pieces(map(record_text, self.rounds)))

    def json_pieces(self, records: Iterable[str]) -> Iterator[str]:
        """The text of history.json, piece by piece: a line for each round, from `records`, which are their texts."""
        clients = {name: dataclasses.asdict(record) for name, record in self.clients.items()}
        head = json.dumps(plain({**self.head(), "clients": clients}), indent=2, allow_nan=False)
        yield head.removesuffix("\n}") + ',\n  "rounds": ['
        separator = "\n"
        for record in records:
            yield f"{separator}    {record}"
            separator = ",\n"
        yield "\n  ]\n}\n"


def record_text(record: RoundRecord) -> str:
    """A record as JSON, in one line."""
    return json.dumps(plain(dataclasses.asdict(record)), allow_nan=False)


def record_from_json(fields: Mapping[str, Any]) -> RoundRecord:
    """The record that was saved as `fields`."""
    return RoundRecord(
        **{
            **fields,
            "folded": [FoldedUpdate(**update) for update in fields["folded"]],
            "central": _evaluation(fields["central"]),
            "federated": _evaluation(fields["federated"]),
        }
    )


def _evaluation(fields: Mapping[str, Any] | None) -> Evaluation | None:
    return None if fields is None else Evaluation(**fields)


def _as_data(value: Any) -> Any:
    if isinstance(value, Evaluation):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: dataclasses.asdict(item) if isinstance(item, Best) else item for key, item in value.items()}
    return value


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinity become null, bytes become hex, numpy scalars their values."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)

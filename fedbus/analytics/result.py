"""What a query found: a `Summary` for each column."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedbus.analytics.question import Kind


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Records between `edges`: `counts` has one bin less than there are edges; `below` and `above` are outside."""

    edges: list[float]
    counts: list[int]
    below: int
    above: int


@dataclass(frozen=True, kw_only=True)
class Top:
    """The most frequent values, the largest count first, equal ones by their names.

    `is_exact`: no other value can belong here. Else a value may be missing, or a count be too low, by `off_by` at most.
    """

    values: list[tuple[bool | int | float | str, int]]
    off_by: int = 0

    @property
    def is_exact(self) -> bool:
        return self.off_by == 0


@dataclass(kw_only=True)
class Summary:
    """What is known of a column, or of one group of its records; None is what was not asked, or cannot be told.

    Attributes:
        clients: how many clients have records of it.
        count, missing: records with a value, and without.
        not_at: clients without such a column.
        hidden: why there is nothing but `clients`, "" where nothing is hidden.
        notes: what cannot be told, and why.
    """

    kind: Kind
    clients: int = 0
    count: int | None = None
    missing: int | None = None
    sum: float | None = None
    mean: float | None = None
    variance: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    quantiles: dict[float, float] | None = None
    histogram: Bins | None = None
    top: Top | None = None
    groups: dict[bool | int | float | str, Summary] | None = None
    not_at: list[str] = field(default_factory=list)
    hidden: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it: what is None or empty is left out; infinite numbers and NaN are strings."""
        shown: dict[str, Any] = {"kind": self.kind, "clients": self.clients}
        for name in ("count", "missing", "sum", "mean", "variance", "std", "min", "max"):
            if (value := getattr(self, name)) is not None:
                shown[name] = _plain(value)
        if self.quantiles is not None:
            shown["quantiles"] = {f"{q:g}": _plain(value) for q, value in self.quantiles.items()}
        if self.histogram is not None:
            shown["histogram"] = dataclasses.asdict(self.histogram)
        if self.top is not None:
            shown["top"] = [[_plain(value), count] for value, count in self.top.values]
            shown["top_off_by"] = self.top.off_by
        if self.groups is not None:
            shown["groups"] = [[_plain(value), group.to_dict()] for value, group in self.groups.items()]
        for name in ("not_at", "hidden", "notes"):
            if value := getattr(self, name):
                shown[name] = value
        return shown


@dataclass(kw_only=True)
class QueryResult(Mapping[str, Summary]):
    """What a query found: column -> `Summary`.

    Attributes:
        clients: those whose records are in it, all of them in every figure.
        left_out: those who are not, with the reason.
        by: the column that the groups are those of, None without groups.
        min_clients, min_count: what the query was asked with.
        rounds: how many rounds of questions it took.
        seconds: how long it took, from the first question.
    """

    columns: dict[str, Summary] = field(default_factory=dict)
    clients: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    by: str | None = None
    min_clients: int = 0
    min_count: int = 0
    rounds: int = 0
    seconds: float = 0.0

    def __getitem__(self, column: str) -> Summary:
        return self.columns[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        shown = {name: getattr(self, name) for name in ("clients", "left_out", "min_clients", "min_count", "rounds")}
        shown["seconds"] = round(self.seconds, 3)
        if self.by is not None:
            shown["by"] = self.by
        return {**shown, "columns": {name: summary.to_dict() for name, summary in self.columns.items()}}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

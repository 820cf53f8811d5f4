"""The server's half of a query, without any bus: question -> sums of the answers -> next question, or the result.

Each figure is a generator that yields its asks and is sent their totals, so that it reads from top to bottom however
many rounds it takes; `_together` has any number of them ask in the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from fedbus.analytics import question as q
from fedbus.analytics.figures import UNIT_BITS, key_limits, number_of, quotient, root
from fedbus.analytics.result import Bins, QueryResult, Summary, Top
from fedbus.analytics.statistics import QUARTILES, Statistic, Wanted, rank_of
from fedbus.errors import ConfigError, RunFailed, one_line
from fedbus.types import Tensors

T = TypeVar("T")

_FIRST_BUCKETS: Final = 16
_MOST_VALUES: Final = 1000
_MOST_GROUPS: Final = 32
_MOST_CELLS: Final = 4000
_MOST_DROPPED: Final = 1
"""How often a client may drop out and come back within a query."""
_DESCRIBED: Final = 10


@dataclass
class Total:
    """The answers of all clients to one ask. `support`: how many have a first number, the count of records, above 0."""

    numbers: list[int]
    ends: list[int]
    support: int = 0
    words: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ask: q.Ask) -> Total:
        """That of no answers."""
        return cls(numbers=[0] * ask.size, ends=[q.NO_END] * ask.ends)

    def add(self, client_id: str, part: q.Part) -> None:
        """Add a client's part: integers, in whatever order."""
        self.numbers = [one + other for one, other in zip(self.numbers, part.numbers, strict=True)]
        self.ends = [min(one, other) for one, other in zip(self.ends, part.ends, strict=True)]
        self.support += bool(part.numbers and part.numbers[0])
        if part.words is not None:
            self.words[client_id] = part.words


Study: TypeAlias = Generator[list[q.Ask], list[Total], T]


class Inquiry:
    """One query, from its first question to its result.

    All figures are those of one and the same set of clients: those who answered the first question. Where one of them
    is missing later, all begins anew, with those who are there then; who was missing twice stays out.

    Args:
        statistics: what to find out.
        by: a column by whose values the records are grouped, the 32 most frequent ones.
        min_clients: figures to which fewer clients contribute are not shown.
        min_count: a client leaves out cells with fewer records than this.

    Raises:
        ConfigError: for what cannot be asked.
    """

    def __init__(
        self, statistics: Sequence[Statistic], *, by: str | None = None, min_clients: int = 2, min_count: int = 5
    ) -> None:
        for name, value, least in (("min_clients", min_clients, 1), ("min_count", min_count, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} must be a whole number, {least} or more, not {value!r}")
        self._wanted = _wanted(statistics)
        self._by = by
        self.min_clients = min_clients
        self._min_count = min_count
        self._dropped: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._rounds = 0
        self.result: QueryResult | None = None
        self.failure: RunFailed | None = None
        self._begin()

    def __repr__(self) -> str:
        return f"Inquiry({', '.join(map(repr, self._wanted))})"

    @property
    def is_done(self) -> bool:
        """Whether there is a result, or a failure."""
        return self.result is not None or self.failure is not None

    def _begin(self) -> None:
        self._members: frozenset[str] | None = None
        self._columns: dict[str, dict[str, str]] = {}  # of each client
        self._study = self._all_of_it()
        self._ask(next(self._study))

    def _ask(self, asks: list[q.Ask]) -> None:
        self._asks = asks
        self.question = q.Question(asks=tuple(asks), min_count=self._min_count)
        self._totals = [Total.of(ask) for ask in asks]
        self._answered: set[str] = set()

    def note(self, client_id: str, reason: str) -> None:
        """Say why this client did not answer: to be told if it has no part in the result."""
        self._reasons[client_id] = one_line(reason, 300)

    def fail(self, reason: str) -> None:
        """End without a result, saying so and why the clients did not answer."""
        reasons = "".join(f"; {client}: {why}" for client, why in sorted(self._reasons.items()))
        self.failure = RunFailed(reason + reasons)

    def check(self, answer: Tensors) -> None:
        """Raise `UpdateRefused` for an answer to `question` that no honest client gives."""
        self.question.unpack(answer)

    def take(self, client_id: str, answer: Tensors) -> None:
        """Take in an answer to `question`, each client's once, after `check`."""
        is_new = self._members is not None and client_id not in self._members  # it came in the middle
        if is_new or client_id in self._answered or self._dropped.get(client_id, 0) > _MOST_DROPPED:
            return
        self._answered.add(client_id)
        for total, part in zip(self._totals, self.question.unpack(answer), strict=True):
            total.add(client_id, part)

    def close(self) -> None:
        """Go on with the answers that came: to the next question, to the result, or to the begin when some are missing.

        Without any the question stays.
        """
        self._rounds += 1
        if not self._answered:
            return
        missing = (self._members or frozenset()) - self._answered
        if missing:
            for client_id in missing:
                self._dropped[client_id] = self._dropped.get(client_id, 0) + 1
                self._reasons.setdefault(client_id, "it dropped out")
            self._begin()
            return
        self._members = frozenset(self._answered)
        try:
            self._ask(self._study.send(self._totals))
        except StopIteration as done:
            self.result = done.value
        except (RunFailed, ConfigError) as exc:
            self.failure = RunFailed(str(exc))

    # ---- what is asked, from begin to end ------------------------------------------------------------------------

    def _all_of_it(self) -> Study[QueryResult]:
        [schema] = yield [q.Schema()]
        self._columns = {client: dict(words) for client, words in sorted(schema.words.items())}
        self._check_enough()
        wanted = self._described()
        by = None if self._by is None else self._cell(self._by)
        groups: list[str] = []
        if by is not None:
            top = yield from _top(by, _MOST_GROUPS)
            groups = [q.word_of(value) for value, _ in top.values]
        if len(wanted) * (1 + len(groups)) > _MOST_CELLS:
            raise RunFailed(f"{len(wanted)} columns in {len(groups)} groups are too many: ask for fewer at a time")
        summaries = yield from _together([self._column(name, each, groups) for name, each in wanted.items()])
        return QueryResult(
            columns=dict(zip(wanted, summaries, strict=True)),
            clients=list(self._columns),
            left_out={name: why for name, why in sorted(self._reasons.items()) if name not in self._columns},
            by=self._by,
            min_clients=self.min_clients,
            min_count=self._min_count,
            rounds=self._rounds,
        )

    def _check_enough(self) -> None:
        count = len(self._columns)
        if count < self.min_clients:
            who = "one client has" if count == 1 else f"{count} clients have"
            reasons = "".join(f"; {client}: {why}" for client, why in sorted(self._reasons.items()))
            raise RunFailed(f"{who} answered, min_clients is {self.min_clients}{reasons}")

    def _described(self) -> dict[str, Wanted]:
        """What is wanted of each column, now that it is known which there are."""
        wanted = dict(self._wanted)
        everything = wanted.pop(None, None)
        if everything is not None:
            names = dict.fromkeys(name for columns in self._columns.values() for name in columns)
            for name in names:
                if name != self._by:
                    wanted.setdefault(name, Wanted()).describe = True
        return {name: self._suited(name, each) for name, each in wanted.items() if name is not None}

    def _suited(self, name: str, wanted: Wanted) -> Wanted:
        kind = self._cell(name).kind
        if kind == "text" and wanted.needs_numbers:
            raise RunFailed(f"column {name!r} is text: ask for its count or its top values")
        if not wanted.describe:
            return wanted
        if kind in ("text", "bool"):
            wanted.top = max(wanted.top, _DESCRIBED)
        if kind == "bool":
            wanted.order = max(wanted.order, 1)
        if kind in ("int", "float"):
            wanted.order, wanted.extremes = 2, True
            wanted.quantiles = sorted({*wanted.quantiles, *QUARTILES})
        return wanted

    def _cell(self, name: str) -> q.Cell:
        """All records of a column, as a kind that all clients' values can be."""
        kinds = {client: columns[name] for client, columns in self._columns.items() if name in columns}
        if not kinds:
            client, columns = next(iter(self._columns.items()))
            known = ", ".join(list(columns)[:20]) or "none"
            raise RunFailed(f"no client has a column {name!r}: {client} has {known}")
        if len(kinds) < self.min_clients:
            lacking = ", ".join(self._lacking(name))
            raise RunFailed(f"{lacking} has no column {name!r}, and {self.min_clients} clients must have it")
        return q.Cell(column=name, kind=_common_kind(name, kinds))

    def _lacking(self, name: str) -> list[str]:
        return [client for client, columns in self._columns.items() if name not in columns]

    def _column(self, name: str, wanted: Wanted, groups: list[str]) -> Study[Summary]:
        cell = self._cell(name)
        if groups:
            wanted = yield from _with_common_edges(cell, wanted)
        cells = [cell, *(q.Cell(column=name, kind=cell.kind, by=self._by, value=group) for group in groups)]
        whole, *parts = yield from _together([_summary(each, wanted, self.min_clients) for each in cells])
        whole.not_at = self._lacking(name)
        if self._by is not None:
            whole.groups = {q.value_of(group): part for group, part in zip(groups, parts, strict=True)}
        return whole


def _wanted(statistics: Sequence[Statistic]) -> dict[str | None, Wanted]:
    wanted: dict[str | None, Wanted] = {}
    for statistic in statistics:
        if not isinstance(statistic, Statistic):
            raise ConfigError(f"a query asks for Count, Mean, Quantiles and the like, not for {statistic!r}")
        wanted.setdefault(statistic.column, Wanted()).add(statistic)
    if not wanted:
        raise ConfigError("say what to ask for: Mean(column), Quantiles(column), Describe(), ...")
    return wanted


def _common_kind(name: str, kinds: dict[str, str]) -> q.Kind:
    known = {kind for kind in kinds.values() if kind != "none"}
    if "text" in known and len(known) > 1:
        told = ", ".join(f"{kind} at {client}" for client, kind in kinds.items())
        raise RunFailed(f"column {name!r} is of several kinds: {told}")
    for kind in ("text", "float", "int", "bool"):
        if kind in known:
            return kind
    return "none"


# ---- figures ---------------------------------------------------------------------------------------------------------


def _together(studies: Sequence[Study[T]]) -> Study[list[T]]:
    """The results of several studies that ask in the same rounds."""
    results: dict[int, T] = {}
    open_: dict[int, list[q.Ask]] = {}
    answers: dict[int, list[Total] | None] = dict.fromkeys(range(len(studies)))
    while answers:
        open_ = {}
        for index, totals in answers.items():
            try:
                open_[index] = next(studies[index]) if totals is None else studies[index].send(totals)
            except StopIteration as done:
                results[index] = done.value
        if not open_:
            break
        flat = iter((yield [ask for asks in open_.values() for ask in asks]))
        answers = {index: [next(flat) for _ in asks] for index, asks in open_.items()}
    return [results[index] for index in range(len(studies))]


def _summary(cell: q.Cell, wanted: Wanted, min_clients: int) -> Study[Summary]:
    """Everything that is wanted of a cell."""
    numeric = _numeric(cell)
    moments = q.Moments(cell=numeric, order=wanted.order)
    range_ = [q.Range(cell=numeric)] if wanted.needs_extremes else []
    counted, *ranged = yield [moments, *range_]
    summary = Summary(kind=cell.kind, clients=counted.support)
    if counted.support < min_clients:
        summary.hidden = f"it takes records of {min_clients} client{'s' * (min_clients > 1)}, {counted.support} had any"
        return summary
    _fill_in_moments(summary, moments, counted.numbers, wanted)
    ends: tuple[int, int] | None = None
    if ranged and summary.count:
        ends = ranged[0].ends[0], ~ranged[0].ends[1]
    if wanted.extremes and ends is not None:
        summary.min, summary.max = (number_of(end, is_float=numeric.kind == "float") for end in ends)
    more: list[Study[Any]] = [
        _histogram(numeric, wanted, summary, ends),
        _quantiles(numeric, wanted.quantiles if summary.count else [], ends),
        _top_if(cell, wanted.top),
    ]
    summary.histogram, summary.quantiles, summary.top = yield from _together(more)
    return summary


def _with_common_edges(cell: q.Cell, wanted: Wanted) -> Study[Wanted]:
    """Groups are compared: their histograms have the edges of all records together."""
    histogram = wanted.histogram
    if histogram is None or not isinstance(histogram.bins, int) or histogram.range is not None:
        return wanted
    numeric = _numeric(cell)
    [total] = yield [q.Range(cell=numeric)]
    ends = [float(number_of(end, is_float=numeric.kind == "float")) for end in (total.ends[0], ~total.ends[1])]
    if total.ends[0] == q.NO_END or not all(map(math.isfinite, ends)):
        return wanted
    edges = _even_edges(ends[0], ends[1], histogram.bins)
    return replace(wanted, histogram=replace(histogram, bins=edges))


def _numeric(cell: q.Cell) -> q.Cell:
    """Bools as 0 and 1."""
    return replace(cell, kind="int") if cell.kind == "bool" else cell


def _fill_in_moments(summary: Summary, moments: q.Moments, numbers: list[int], wanted: Wanted) -> None:
    finite, total, squares = moments.of(numbers)
    summary.count, summary.missing, *infinite = numbers[:4]
    if not summary.count or not wanted.order:
        return
    if any(infinite):
        ends = [end for end, count in zip((math.inf, -math.inf), infinite, strict=True) if count]
        summary.sum = summary.mean = sum(ends)  # both of them are nan together
        summary.variance = summary.std = math.nan if wanted.order == 2 else None
        return
    summary.sum = quotient(total, 1 << UNIT_BITS) if summary.kind == "float" else total >> UNIT_BITS
    summary.mean = quotient(total, finite << UNIT_BITS)
    if wanted.order == 2:
        above, below = finite * squares - total * total, finite * (finite - wanted.ddof) << 2 * UNIT_BITS
        summary.variance = quotient(above, below) if below else math.nan
        summary.std = root(above, below) if below else math.nan


def _histogram(cell: q.Cell, wanted: Wanted, summary: Summary, ends: tuple[int, int] | None) -> Study[Bins | None]:
    if wanted.histogram is None:
        return None
    if isinstance(wanted.histogram.bins, int):
        limits = wanted.histogram.range
        if limits is None and ends is None:
            return None
        if limits is None and ends is not None:
            low, high = (float(number_of(end, is_float=cell.kind == "float")) for end in ends)
            if math.isinf(low) or math.isinf(high):
                summary.notes.append("it has infinite values, and so no bins of one width: give the range")
                return None
            limits = low, high
        assert limits is not None
        edges = _even_edges(*limits, wanted.histogram.bins)
    else:
        edges = tuple(wanted.histogram.bins)
    [total] = yield [q.Bins(cell=cell, edges=edges)]
    below, *counts, above = total.numbers
    return Bins(edges=list(edges), counts=counts, below=below, above=above)


def _even_edges(low: float, high: float, bins: int) -> tuple[float, ...]:
    """As numpy's, who gives a single value a bin of width 1."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    if math.isinf(high - low):
        return tuple((np.linspace(low / 2, high / 2, bins + 1) * 2).tolist())
    return tuple(np.linspace(low, high, bins + 1).tolist())


def _quantiles(cell: q.Cell, qs: Sequence[float], ends: tuple[int, int] | None) -> Study[dict[float, float] | None]:
    """Halve, for each q, the numbers among which its quantile is, until there is one: 64 times at the most.

    The least that there is to tell: each round says of one number how many records are at most that.
    """
    if not qs:
        return None
    is_float = cell.kind == "float"
    low, high = ends or key_limits(is_float=is_float)
    brackets = dict.fromkeys(qs, (low - 1, high))  # F(left) < q <= F(right)
    while middles := sorted({(left + right) // 2 for left, right in brackets.values() if right - left > 1}):
        [total] = yield [q.Below(cell=cell, keys=tuple(middles))]
        records, *counts = total.numbers
        for share, (left, right) in brackets.items():
            rank = rank_of(share, records)
            left = max([left, *(key for key, count in zip(middles, counts, strict=True) if count < rank)])
            right = min([right, *(key for key, count in zip(middles, counts, strict=True) if count >= rank)])
            brackets[share] = left, right
    return {share: number_of(right, is_float=is_float) for share, (_, right) in brackets.items()}


def _top_if(cell: q.Cell, k: int) -> Study[Top | None]:
    if not k:
        return None
    return (yield from _top(cell, k))


def _top(cell: q.Cell, k: int) -> Study[Top]:
    """First how many records fall into each bucket of values; then the values of the heaviest buckets, until no other
    bucket holds as many records as the k-th value has: so no value in it can.

    A client that has no room for a value says how many records such a value has at most.
    """
    [buckets] = yield [q.Buckets(cell=cell)]
    heavy = [
        bucket for bucket in sorted(range(q.BUCKETS), key=lambda b: -buckets.numbers[b]) if buckets.numbers[bucket]
    ]
    counts: dict[str, int] = {}
    off_by, asked, more = 0, 0, _FIRST_BUCKETS
    while asked < len(heavy):
        [named] = yield [q.Values(cell=cell, buckets=tuple(heavy[asked : asked + more]), most=_MOST_VALUES)]
        for words in named.words.values():
            for word, count in words:
                counts[word] = counts.get(word, 0) + count
        off_by += named.numbers[0]
        asked, more = asked + more, 2 * more
        enough = sorted(counts.values(), reverse=True)[k - 1 : k]
        if asked < len(heavy) and enough and buckets.numbers[heavy[asked]] < enough[0]:
            break
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Top(values=[(q.value_of(word), count) for word, count in ordered[:k]], off_by=off_by)

"""A client's half of a query: its columns are summed up here, and nothing but the sums goes out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedbus.analytics import question as q
from fedbus.analytics.figures import (
    SQUARES_LIMBS,
    SUM_LIMBS,
    exact_squares,
    exact_sum,
    key_limits,
    keys_of,
    number_of,
    to_limbs,
)
from fedbus.errors import ClientCodeError
from fedbus.types import Array, Config, Tensors

_FEW: Final = 32


class Columns(dict[str, Any]):
    """Columns with the client's own limit: what `Client.query` may return in place of a plain dict.

    Args:
        columns: name -> 1-d array of numbers, bools or strings, all of one length; None and NaN are missing.
        min_count: cells with fewer records than this are left out, however low the limit is that a query asks for.
    """

    def __init__(self, columns: Mapping[str, Any], *, min_count: int) -> None:
        super().__init__(columns)
        self.min_count = min_count


def answer(columns: Mapping[str, Any], question: Tensors, config: Config) -> dict[str, Array]:
    """The sums of `columns` that `question` asks for.

    Raises:
        ClientCodeError: for columns that cannot be used, or a question that is not understood.
    """
    try:
        asked = q.Question.of(question)
    except ValueError as exc:
        raise ClientCodeError(str(exc)) from exc
    return asked.pack(list(_Answering(columns, asked).parts()))


class _Answering:
    """One question to the columns of one client; each column is looked at once, when it is asked for first."""

    def __init__(self, columns: Mapping[str, Any], question: q.Question) -> None:
        self._columns = _checked(columns)
        self._question = question
        self._floor = max(question.min_count, getattr(columns, "min_count", 0))
        self._looked_at: dict[str, _Column] = {}
        self._records: tuple[q.Cell | None, _Records] = None, _Records(np.zeros(0), 0)

    def parts(self) -> Iterator[q.Part]:
        for ask in self._question.asks:
            if isinstance(ask, q.Schema):
                yield q.Part(numbers=[], ends=[], words=self._schema())
            else:
                yield self._part(ask, self._records_of(ask.cell))

    def _schema(self) -> list[list[str]]:
        schema = [[name, self._column(name).kind] for name in self._columns]
        if sum(len(q.word_of(name)) + 16 for name in self._columns) > self._question.words_bytes:
            raise ClientCodeError(f"{len(schema)} columns are too many to be named: return fewer from query")
        return schema

    def _part(self, ask: q.Ask, records: _Records) -> q.Part:
        match ask:
            case q.Moments():
                return q.Part(numbers=self._moments(ask, records), ends=[])
            case q.Range():
                return q.Part(numbers=[], ends=_ends(records.values))
            case q.Bins():
                return q.Part(numbers=self._bins(ask, records), ends=[])
            case q.Below():
                return q.Part(numbers=_below(ask, records.values), ends=[])
            case q.Buckets():
                return q.Part(numbers=self._buckets(ask, records), ends=[])
            case q.Values():
                return self._values(ask, records)
            case _:
                raise AssertionError(f"nothing answers {ask}")

    # ---- records -------------------------------------------------------------------------------------------------

    def _column(self, name: str) -> _Column:
        if name not in self._looked_at:
            self._looked_at[name] = _look_at(name, self._columns[name])
        return self._looked_at[name]

    def _records_of(self, cell: q.Cell) -> _Records:
        """What a cell holds, which is nothing when it is less than the limit; asks for one cell come in a row."""
        if self._records[0] != cell:
            self._records = cell, self._select(cell)
        return self._records[1]

    def _select(self, cell: q.Cell) -> _Records:
        if cell.column not in self._columns or (cell.by is not None and cell.by not in self._columns):
            return _Records(np.zeros(0, _DTYPES[cell.kind]), 0)
        column = self._column(cell.column)
        if cell.by is None:
            values, missing = column.values, column.is_there.size - column.values.size
        else:
            inside = self._column(cell.by).equals(q.value_of(cell.value))
            values = column.values[inside[column.is_there]]
            missing = int(np.count_nonzero(inside)) - values.size
        values = _as_kind(cell, column.kind, values)
        return _Records(values if values.size >= self._floor else values[:0], self._cell(missing))

    def _cell(self, count: int) -> int:
        return count if count >= self._floor else 0

    def _cells(self, counts: NDArray[np.int64]) -> list[int]:
        cells: list[int] = np.where(counts >= self._floor, counts, 0).tolist()
        return cells

    # ---- answers -------------------------------------------------------------------------------------------------

    def _moments(self, ask: q.Moments, records: _Records) -> list[int]:
        values, infinite = records.values, [0, 0]
        count = values.size
        if values.dtype.kind == "f":
            infinite = [int(np.count_nonzero(values == end)) for end in (math.inf, -math.inf)]
            values = values[np.isfinite(values)]
        numbers = [count, records.missing, *infinite]
        if ask.order >= 1:
            numbers += to_limbs(exact_sum(values), SUM_LIMBS).tolist()
        if ask.order >= 2:
            numbers += to_limbs(exact_squares(values), SQUARES_LIMBS).tolist()
        return numbers

    def _bins(self, ask: q.Bins, records: _Records) -> list[int]:
        edges, values = np.array(ask.edges), records.values.astype(np.float64)
        index = np.searchsorted(edges, values, side="right")
        index[values == edges[-1]] -= 1
        return self._cells(np.bincount(index, minlength=ask.size))

    def _buckets(self, ask: q.Buckets, records: _Records) -> list[int]:
        counts = np.zeros(ask.size, np.int64)
        for word, count in records.words.items():
            counts[q.bucket_of(word)] += count
        return self._cells(counts)

    def _values(self, ask: q.Values, records: _Records) -> q.Part:
        wanted = frozenset(ask.buckets)
        found = [
            (word, count)
            for word, count in records.words.items()
            if count >= max(1, self._floor) and q.bucket_of(word) in wanted
        ]
        found.sort(key=lambda item: (-item[1], item[0]))
        named: list[list[Any]] = []
        room, cut = self._question.words_bytes, 0
        for word, count in found:
            room -= len(q.word_of(word)) + len(str(count)) + 5  # brackets, commas and quotes
            if room < 0 or len(named) == ask.most or len(word) > q.MOST_WORD_BYTES:
                cut = max(cut, count)
            else:
                named.append([word, count])
        return q.Part(numbers=[cut], ends=[], words=named)


def _ends(values: Array) -> list[int]:
    keys = keys_of(values)
    return [int(keys.min()), ~int(keys.max())] if keys.size else [q.NO_END, q.NO_END]


def _below(ask: q.Below, values: Array) -> list[int]:
    """A value has a key of at most k when it is less than the number of the next key; -0.0 is 0.0 there as well."""
    is_float = values.dtype.kind == "f"
    last = key_limits(is_float=is_float)[1]
    thresholds = [number_of(key + 1, is_float=is_float) if key < last else None for key in ask.keys]
    if len(thresholds) > _FEW:  # then it is quicker to sort them once
        values = np.sort(values)
        return [values.size, *(values.size if t is None else int(np.searchsorted(values, t)) for t in thresholds)]
    return [values.size, *(values.size if t is None else int(np.count_nonzero(values < t)) for t in thresholds)]


# ---- columns ---------------------------------------------------------------------------------------------------------


class _Records:
    """The values of a cell and how many of its records have none."""

    def __init__(self, values: Array, missing: int) -> None:
        self.values = values
        self.missing = missing
        self._words: Counter[str] | None = None

    @property
    def words(self) -> Counter[str]:
        """How often each value comes."""
        if self._words is None:
            self._words = Counter()
            for value, count in Counter(self.values.tolist()).items():
                self._words[q.word_of(value)] += count
        return self._words


@dataclass(frozen=True)
class _Column:
    """`values` are those of the records that `is_there` says have one: bool, int64, float64 or object (str)."""

    kind: q.Kind
    values: Array
    is_there: NDArray[np.bool_]

    def equals(self, value: bool | int | float | str) -> NDArray[np.bool_]:
        """Which records have this value; whatever is missing has none."""
        same = np.zeros(self.is_there.size, np.bool_)
        if isinstance(value, str) == (self.kind == "text"):
            same[self.is_there] = self.values == value
        return same


def _checked(columns: object) -> Mapping[str, Any]:
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns):
        raise ClientCodeError("query must return its columns: {name: 1-d array}")
    lengths: dict[int, str] = {}
    for name, value in columns.items():
        shape = np.shape(value) if not isinstance(value, str | bytes) else ()
        if len(shape) != 1:
            raise ClientCodeError(f"query returned shape {shape} for column {name!r}, a 1-d array is due")
        lengths.setdefault(shape[0], name)
    if len(lengths) > 1:
        (one, first), (other, second), *_ = lengths.items()
        raise ClientCodeError(f"query returned {one} records in column {first!r}, and {other} in {second!r}")
    return columns


def _look_at(name: str, given: Any) -> _Column:
    is_there = ~np.ma.getmaskarray(given) if isinstance(given, np.ma.MaskedArray) else None
    values = np.array(given, object) if isinstance(given, list | tuple) else np.asarray(given)
    if is_there is None:
        is_there = np.ones(values.size, np.bool_)
    if values.dtype.kind in "OTU":
        return _look_at_objects(name, values.astype(object), is_there)
    if values.dtype.kind == "b":
        return _Column("bool", values[is_there], is_there)
    if values.dtype.kind in "iu":
        return _Column("int", _as_int64(name, values[is_there]), is_there)
    if values.dtype.kind == "f" or values.dtype.name == "bfloat16":
        numbers = values.astype(np.float64, copy=False)
        is_there &= ~np.isnan(numbers)
        return _Column("float", numbers if is_there.all() else numbers[is_there], is_there)
    raise ClientCodeError(f"column {name!r} has dtype {values.dtype}: return numbers, bools or strings")


def _look_at_objects(name: str, values: Array, is_there: NDArray[np.bool_]) -> _Column:
    """Strings, or numbers among which some are None."""
    is_there &= np.array([value is not None and value == value for value in values], np.bool_)
    present = values[is_there].tolist()
    kinds = {_kind_of(value) for value in present}
    if not kinds:
        return _Column("none", np.zeros(0), is_there)
    if kinds == {"text"}:
        return _Column("text", values[is_there], is_there)
    if kinds == {"bool"}:
        return _Column("bool", np.array(present, np.bool_), is_there)
    if kinds <= {"bool", "int"}:
        return _Column("int", _as_int64(name, np.array([int(value) for value in present], object)), is_there)
    if kinds <= {"bool", "int", "float"}:
        return _Column("float", np.array(present, np.float64), is_there)
    raise ClientCodeError(f"column {name!r} is a mixture of kinds: return numbers, bools or strings")


def _kind_of(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return "bool"
    if isinstance(value, int | np.integer):
        return "int"
    if isinstance(value, float | np.floating):
        return "float"
    return "text" if isinstance(value, str) else "other"


def _as_int64(name: str, values: Array) -> Array:
    if values.size and not -(2**63) <= int(values.min()) <= int(values.max()) < 2**63:
        raise ClientCodeError(f"column {name!r} holds integers beyond 64 bits: return them as floats or strings")
    return values.astype(np.int64)


def _as_kind(cell: q.Cell, kind: q.Kind, values: Array) -> Array:
    """The values as what the column is over all clients: 4 is 4.0 where another client has 4.5."""
    if kind in (cell.kind, "none") or (kind, cell.kind) in (("bool", "int"), ("bool", "float"), ("int", "float")):
        return values.astype(_DTYPES[cell.kind], copy=False)
    raise ClientCodeError(f"column {cell.column!r} is {kind} here, and is asked for as {cell.kind}")


_DTYPES: dict[str, Any] = {"bool": np.bool_, "int": np.int64, "float": np.float64, "text": object, "none": np.float64}

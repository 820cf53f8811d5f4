"""What is asked in one round, and how an answer to it looks: three arrays, whatever is asked.

A question is a list of asks. Each says how many numbers answer it: "sums" holds those that are added up over the
clients, "ends" those of which the least counts, both int64, one ask after the other; "words" is JSON text with one item
for each ask that wants names. The question itself travels as JSON in the bytes of a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar, Final, Literal, TypeAlias

import numpy as np

from fedbus.analytics.figures import LIMB_END, SQUARES_LIMBS, SUM_LIMBS, from_limbs, key_limits
from fedbus.errors import ConfigError, UpdateRefused
from fedbus.types import Array, Tensors

Kind: TypeAlias = Literal["bool", "int", "float", "text", "none"]
"""Of a column's values; "none" has no values."""
KINDS: Final = frozenset(("bool", "int", "float", "text", "none"))

QUESTION: Final = "question"
SUMS, ENDS, WORDS = "sums", "ends", "words"
WORDS_BYTES: Final = 1 << 20
"""What one client may say in names at a time."""
MOST_WORD_BYTES: Final = 1 << 10
MOST_QUESTION_BYTES: Final = 8 << 20
BUCKETS: Final = 1024
NO_END: Final = 2**63 - 1
"""The end of a range without numbers."""
_MOST_RECORDS: Final = 2**53


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Records of a column, as values of `kind`: all of them, or those whose column `by` is the JSON scalar `value`."""

    column: str
    kind: Kind
    by: str | None = None
    value: str = ""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A client's answer to one ask."""

    numbers: list[int]
    ends: list[int]
    words: Any = None


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Which columns there are: words are [name, kind] of each."""

    op: ClassVar = "schema"
    size: ClassVar = 0
    ends: ClassVar = 0

    def check(self, part: Part) -> None:
        pairs = _list("columns", part.words)
        for pair in pairs:
            name, kind = _pair("a column", pair)
            if not isinstance(name, str) or kind not in KINDS:
                raise UpdateRefused("a column without a name, or of no known kind")
        if len({name for name, _ in pairs}) < len(pairs):
            raise UpdateRefused("a column comes twice")


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Counts of records that have a value and that miss it, of inf and of -inf; then, as limbs, the sum of the finite
    values (order 1), and that of their squares (2)."""

    cell: Cell
    order: int
    op: ClassVar = "moments"
    ends: ClassVar = 0

    @property
    def size(self) -> int:
        return 4 + (0, SUM_LIMBS, SUM_LIMBS + SQUARES_LIMBS)[self.order]

    def check(self, part: Part) -> None:
        _check_counts(part.numbers[:4])
        if any(abs(limb) >= LIMB_END for limb in part.numbers[4:]):
            raise UpdateRefused("a sum beyond all numbers")
        count, total, squares = self.of(part.numbers)
        if count < 0:
            raise UpdateRefused("more infinite values than records")
        # Cauchy and Schwarz: no numbers have another sum of squares.
        if self.order and (squares < 0 or (count == 0 and (total or squares))):
            raise UpdateRefused("a sum without records")
        if self.order == 2 and count * squares < total * total:
            raise UpdateRefused("sums that no records have")

    def of(self, numbers: Sequence[int]) -> tuple[int, int, int]:
        """(finite values, their sum, that of their squares), the sums in their units."""
        ends = 4 + SUM_LIMBS
        return numbers[0] - numbers[2] - numbers[3], from_limbs(list(numbers[4:ends])), from_limbs(list(numbers[ends:]))


@dataclass(frozen=True, kw_only=True)
class Range:
    """Ends are the lowest key, and the complement of the highest; `NO_END` without records."""

    cell: Cell
    op: ClassVar = "range"
    size: ClassVar = 0
    ends: ClassVar = 2

    def check(self, part: Part) -> None:
        low, high = part.ends[0], ~part.ends[1]
        first, last = key_limits(is_float=self.cell.kind == "float")
        if part.ends != [NO_END, NO_END] and not first <= low <= high <= last:
            raise UpdateRefused("a range that no numbers have")


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Records below `edges`, between each and the next (the last one included), and above them."""

    cell: Cell
    edges: tuple[float, ...]
    op: ClassVar = "bins"
    ends: ClassVar = 0

    @property
    def size(self) -> int:
        return len(self.edges) + 1

    def check(self, part: Part) -> None:
        _check_counts(part.numbers)


@dataclass(frozen=True, kw_only=True)
class Below:
    """All records, and those whose key is at most each of `keys`, which rise."""

    cell: Cell
    keys: tuple[int, ...]
    op: ClassVar = "below"
    ends: ClassVar = 0

    @property
    def size(self) -> int:
        return 1 + len(self.keys)

    def check(self, part: Part) -> None:
        _check_counts(part.numbers)
        total, *counts = part.numbers
        if sorted(counts) != counts or (counts and counts[-1] > total):
            raise UpdateRefused("counts below rising values that do not rise")


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Records whose value falls into each bucket."""

    cell: Cell
    op: ClassVar = "buckets"
    size: ClassVar = BUCKETS
    ends: ClassVar = 0

    def check(self, part: Part) -> None:
        _check_counts(part.numbers)


@dataclass(frozen=True, kw_only=True)
class Values:
    """Words are [value as JSON, records] for values of `buckets`, at most `most`; the number is what the most frequent
    value counts that is not named for want of room."""

    cell: Cell
    buckets: tuple[int, ...]
    most: int
    op: ClassVar = "values"
    size: ClassVar = 1
    ends: ClassVar = 0

    def check(self, part: Part) -> None:
        _check_counts(part.numbers)
        named = [_pair("a value", pair) for pair in _list("values", part.words)]
        if len(named) > self.most:
            raise UpdateRefused(f"{len(named)} values, {self.most} at most")
        for word, count in named:
            if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_RECORDS:
                raise UpdateRefused("a value without records")
            if not isinstance(word, str) or not _is_word(word) or bucket_of(word) not in self.buckets:
                raise UpdateRefused("a value that was not asked for")
        if len({word for word, _ in named}) < len(named):
            raise UpdateRefused("a value comes twice")


Ask: TypeAlias = Schema | Moments | Range | Bins | Below | Buckets | Values
_ASKS: Final[Mapping[str, type[Ask]]] = {
    kind.op: kind for kind in (Schema, Moments, Range, Bins, Below, Buckets, Values)
}
_WITH_WORDS: Final = (Schema, Values)


@dataclass(frozen=True, kw_only=True)
class Question:
    """The asks of one round. `min_count`: cells with fewer records than that, and more than none, count as none."""

    asks: tuple[Ask, ...]
    min_count: int

    @property
    def size(self) -> int:
        """How many sums answer it."""
        return sum(ask.size for ask in self.asks)

    @property
    def ends(self) -> int:
        """How many ends answer it."""
        return sum(ask.ends for ask in self.asks)

    @property
    def words_bytes(self) -> int:
        """What the names for one ask may take."""
        return WORDS_BYTES // max(1, sum(isinstance(ask, _WITH_WORDS) for ask in self.asks)) - 2

    def tensors(self) -> dict[str, Array]:
        """It as a model: one tensor of bytes."""
        asks = [{"op": ask.op, **asdict(ask)} for ask in self.asks]
        text = json.dumps({"min_count": self.min_count, "asks": asks}).encode()
        if len(text) > MOST_QUESTION_BYTES:
            raise ConfigError(f"a question of {len(text)} bytes: ask for fewer columns, or groups, at a time")
        return {QUESTION: np.frombuffer(text, np.uint8).copy()}

    @classmethod
    def of(cls, tensors: Tensors) -> Question:
        """The question in a model. Raises `ValueError` for what is none."""
        try:
            known = json.loads(tensors[QUESTION].tobytes())
            return cls(asks=tuple(_ask_of(item) for item in known["asks"]), min_count=int(known["min_count"]))
        except (KeyError, TypeError, RecursionError) as exc:
            raise ValueError("a question that this version of fedbus does not know") from exc

    def pack(self, parts: Sequence[Part]) -> dict[str, Array]:
        """An answer, of one part for each ask."""
        words = [part.words for ask, part in zip(self.asks, parts, strict=True) if isinstance(ask, _WITH_WORDS)]
        text = json.dumps(words, separators=(",", ":")).encode() if words else b""
        return {
            SUMS: np.array([number for part in parts for number in part.numbers], np.int64),
            ENDS: np.array([end for part in parts for end in part.ends], np.int64),
            WORDS: np.frombuffer(text, np.uint8).copy(),
        }

    def unpack(self, answer: Tensors) -> list[Part]:
        """A client's answer, part by part. Raises `UpdateRefused` for one that no honest client gives."""
        sums = iter(self._integers(answer, SUMS, self.size))
        ends = iter(self._integers(answer, ENDS, self.ends))
        words = iter(self._words(answer))
        parts: list[Part] = []
        for ask in self.asks:
            part = Part(
                numbers=list(islice(sums, ask.size)),
                ends=list(islice(ends, ask.ends)),
                words=next(words) if isinstance(ask, _WITH_WORDS) else None,
            )
            ask.check(part)
            parts.append(part)
        return parts

    def _integers(self, answer: Tensors, name: str, size: int) -> list[int]:
        value = answer.get(name)
        if value is None or value.dtype != np.int64 or value.shape != (size,):
            raise UpdateRefused(f"{name!r} must be {size} int64")
        numbers: list[int] = value.tolist()
        return numbers

    def _words(self, answer: Tensors) -> list[Any]:
        due = sum(isinstance(ask, _WITH_WORDS) for ask in self.asks)
        value = answer.get(WORDS)
        if value is None or value.dtype != np.uint8 or value.nbytes > WORDS_BYTES:
            raise UpdateRefused(f"{WORDS!r} must be {WORDS_BYTES} bytes at most")
        try:
            words = json.loads(value.tobytes()) if due else []
        except (ValueError, RecursionError) as exc:
            raise UpdateRefused(f"{WORDS!r} must be JSON") from exc
        if not isinstance(words, list) or len(words) != due:
            raise UpdateRefused(f"{WORDS!r} must be {due} lists")
        return words


def word_of(value: bool | int | float | str) -> str:
    """A value as JSON, the same for 4 and 4.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value)


def value_of(word: str) -> bool | int | float | str:
    """The value of a word."""
    value: bool | int | float | str = json.loads(word)
    return value


def bucket_of(word: str) -> int:
    """The same at every client: a hash of its text."""
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") % BUCKETS


def _is_word(word: str) -> bool:
    try:
        value = json.loads(word) if len(word) <= MOST_WORD_BYTES else None
    except (ValueError, RecursionError):
        return False
    return isinstance(value, bool | int | float | str) and word_of(value) == word


def _ask_of(item: dict[str, Any]) -> Ask:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in item.items() if name != "op"
    }
    if "cell" in fields:
        fields["cell"] = Cell(**fields["cell"])
    return _ASKS[item["op"]](**fields)


def _check_counts(numbers: Sequence[int]) -> None:
    if any(not 0 <= number <= _MOST_RECORDS for number in numbers):
        raise UpdateRefused("a count that is none")


def _list(what: str, words: Any) -> list[Any]:
    if not isinstance(words, list):
        raise UpdateRefused(f"{what} must be a list")
    return words


def _pair(what: str, pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(item, str | int) for item in pair):
        raise UpdateRefused(f"{what} must be a pair")
    return pair[0], pair[1]

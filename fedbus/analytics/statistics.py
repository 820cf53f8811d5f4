"""What people ask for: counts, means, variances, ranges, histograms, quantiles, top values, of a column each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, TypeAlias

from fedbus.errors import ConfigError

_MOST_BINS: Final = 10_000
_MOST_TOP: Final = 1000
QUARTILES: Final = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Count:
    """How many records of a column have a value, and how many miss one (None or NaN)."""

    column: str


@dataclass(frozen=True)
class Mean:
    """Sum and mean over the records that have a value: the exact sum, divided once."""

    column: str


@dataclass(frozen=True)
class Variance:
    """Mean, variance and standard deviation, from exact sums of x and x^2: no rounding is lost to cancellation.

    Args:
        ddof: the divisor is the number of records minus this: 0, as in numpy, or 1 for a sample's.
    """

    column: str
    ddof: int = 0

    def __post_init__(self) -> None:
        if self.ddof not in (0, 1):
            raise ConfigError(f"Variance({self.column!r}): ddof must be 0 or 1, not {self.ddof!r}")


@dataclass(frozen=True)
class Extremes:
    """The lowest and the highest value, as they are: each is that of a single record."""

    column: str


@dataclass(frozen=True)
class Histogram:
    """Counts of records between edges: each bin has its left edge, the last one both, as in numpy.

    Args:
        bins: so many bins of one width between the lowest and the highest value; or their edges, which rise.
        range: (lowest, highest) edge, in place of the values' own, which are those of single records.
    """

    column: str
    bins: int | Sequence[float] = 10
    range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        name = f"Histogram({self.column!r})"
        if isinstance(self.bins, int):
            if isinstance(self.bins, bool) or not 1 <= self.bins <= _MOST_BINS:
                raise ConfigError(f"{name}: 1 to {_MOST_BINS} bins, not {self.bins}")
            if self.range is not None and not _rises(self.range):
                raise ConfigError(f"{name}: range must be (lowest, highest), not {self.range}")
            return
        if self.range is not None:
            raise ConfigError(f"{name}: edges are a range already, leave range out")
        edges = tuple(self.bins)
        if not 2 <= len(edges) <= _MOST_BINS + 1 or not _rises(edges):
            raise ConfigError(f"{name}: edges must be two or more finite numbers that rise")
        object.__setattr__(self, "bins", tuple(map(float, edges)))


@dataclass(frozen=True)
class Quantiles:
    """For each q the smallest value x of a record such that a share of q of the records, or more, has at most x.

    Found by bisection over all numbers that there are, and so exact: numpy's method "inverted_cdf". q = 0 is the
    lowest value. A q counts as the decimal that it is written as: 0.1 of ten records is one of them.
    """

    column: str
    qs: Sequence[float] = QUARTILES

    def __post_init__(self) -> None:
        qs = tuple(self.qs) if isinstance(self.qs, Sequence) else (self.qs,)
        if not qs or any(not isinstance(q, int | float) or not 0 <= q <= 1 for q in qs):
            raise ConfigError(f"Quantiles({self.column!r}): give shares from 0 to 1, not {self.qs!r}")
        object.__setattr__(self, "qs", tuple(map(float, qs)))


@dataclass(frozen=True)
class TopValues:
    """The `k` most frequent values of a column of strings, bools or integers, with their counts."""

    column: str
    k: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or not 1 <= self.k <= _MOST_TOP:
            raise ConfigError(f"TopValues({self.column!r}): k must be 1 to {_MOST_TOP}, not {self.k!r}")


@dataclass(frozen=True)
class Describe:
    """What suits the kind of a column: counts, mean, standard deviation, extremes and quartiles of numbers, the ten top
    values of strings and bools, and the share of True. None: of all columns."""

    column: str | None = None


Statistic: TypeAlias = Count | Mean | Variance | Extremes | Histogram | Quantiles | TopValues | Describe


@dataclass
class Wanted:
    """All that is asked of one column."""

    order: int = 0
    ddof: int = 0
    extremes: bool = False
    histogram: Histogram | None = None
    quantiles: list[float] = field(default_factory=list)
    top: int = 0
    describe: bool = False

    @property
    def needs_numbers(self) -> bool:
        """Whether text would not do."""
        return bool(self.order or self.extremes or self.histogram or self.quantiles)

    @property
    def needs_extremes(self) -> bool:
        """Whether the lowest and the highest value must be known."""
        histogram = self.histogram
        is_even = histogram is not None and isinstance(histogram.bins, int) and histogram.range is None
        return self.extremes or is_even

    def add(self, statistic: Statistic) -> None:
        """Take in what is asked. Raises `ConfigError` for what can be asked once only."""
        match statistic:
            case Mean():
                self.order = max(self.order, 1)
            case Variance():
                if self.order == 2 and self.ddof != statistic.ddof:
                    raise ConfigError(
                        f"Variance({statistic.column!r}) is asked for with ddof 0 and 1: take one of them"
                    )
                self.order, self.ddof = 2, statistic.ddof
            case Extremes():
                self.extremes = True
            case Histogram():
                if self.histogram not in (None, statistic):
                    raise ConfigError(f"two histograms of {statistic.column!r}: ask for one at a time")
                self.histogram = statistic
            case Quantiles():
                self.quantiles = sorted({*self.quantiles, *statistic.qs})
            case TopValues():
                self.top = max(self.top, statistic.k)
            case Describe():
                self.describe = True
            case _:
                pass


def rank_of(q: float, count: int) -> int:
    """Which of `count` records in rising order is the quantile: the smallest rank >= q count, 1 at least."""
    return max(1, math.ceil(Fraction(repr(q)) * count))


def _rises(edges: Sequence[float]) -> bool:
    if any(isinstance(edge, bool) or not isinstance(edge, int | float) or not math.isfinite(edge) for edge in edges):
        return False
    return all(low < high for low, high in itertools.pairwise(edges))

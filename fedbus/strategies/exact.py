"""Sums that do not depend on the order of what is added: fixed point on grids that are known beforehand.

Floating-point addition is commutative but not associative, so a plain running sum has other last bits when the same
terms come in another order. Integer addition is associative. So each term is rounded, by itself, to a multiple of a
fixed power of two, and the multiples are added as int64. The idea is that of reproducible summation (Demmel and
Nguyen 2015, Parallel Reproducible Summation); a grid given beforehand takes one integer for most elements, where a
grid found on the way takes two or more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedbus.types import Array

BLOCK: Final = 1 << 17
"""Elements added at a time: the block, widened to float64, stays in the cache. One thread adds them: a second one was
measured to be of little use (1.0 to 1.2 times as quick), for both need the interpreter after each short call."""
_SCRATCH = threading.local()
"""The widened block's memory, one for each thread: fresh pages for every block would cost more than the sums."""

_DIGIT_BITS: Final = 50
"""Each level counts units of 2**50 times those of the level below it."""
_DIGIT_MASK: Final = 2**_DIGIT_BITS - 1
_REACH: Final = 2.0**51
"""A level takes terms below this many of its units; _MAGIC then rounds them."""
_MAGIC: Final = 1.5 * 2.0**52
"""x + _MAGIC is _MAGIC plus x rounded to an integer (ties to even) for |x| < 2**51, where float64 has steps of 1; and
there the bits of neighbouring float64 are neighbouring integers, so that they can be added as they are. 2**-50 times
it does the same in steps of 2**-50."""
_SETTLE_EVERY: Final = 2**11
_SETTLED: Final = 2**61
"""Levels are looked at each 2**11 rounds, when they are below 2**61 + 2**11 * 2**51 < 2**63: they never wrap."""
_LOWEST_UNIT: Final = -900
_HEADROOM_BITS: Final = 64
"""Powers of two that keep scaled float64 clear of both ends: nothing underflows, and rounding up cannot overflow."""
_SMALLEST_UNITS: Final = 1 << 1074


class ExactSum:
    """Element by element, the sum of weight * values over rounds of `add`, the same bits in whatever order they come.

    Each product, one float64, is rounded to a multiple of 2**`unit_exponent`, or with `is_fine` of
    2**(`unit_exponent` - 50), and that sum is exact. Products of 2**(`unit_exponent` + 51) and more go to further,
    coarser levels, which take memory only where such products are. A product that is not finite makes the element nan.

    Memory: 8 bytes an element, 16 with `is_fine`.
    """

    def __init__(self, size: int, unit_exponent: int, *, is_fine: bool) -> None:
        self.size = size
        self._filled = size  # of the present round
        self._unsettled = 0  # rounds whose _MAGIC is still in the dense levels
        self._exponent = max(unit_exponent, _LOWEST_UNIT)
        self._per_unit = 2.0**-self._exponent
        self._main = 1 if is_fine else 0
        self._dense = self._main + 1
        self._magics = [np.float64(self._magic(level)) for level in range(self._dense)]
        # Filled, not np.zeros: their pages are there before the first update is, not one by one while it waits.
        self._levels = {level: np.full(size, 0, np.int64) for level in range(self._dense)}
        self._spoiled: NDArray[np.bool_] | None = None

    def begin(self) -> None:
        """Begin a round, in which each element gets one term."""
        assert self._filled == self.size, "the round before is not complete"
        if self._unsettled == _SETTLE_EVERY:
            self._settle()
        self._filled = 0
        self._unsettled += 1

    def add(self, start: int, values: Array, weight: float) -> None:
        """Add weight * values to the elements from `start` on; `values` is flat, real, of any dtype."""
        assert start == self._filled, "the elements of a round come in order"
        assert start + values.size <= self.size
        self._filled += values.size
        rows = _scratch(self._dense)
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, values.size, BLOCK):
                self._add_block(start + first, values[first : first + BLOCK], weight, rows)

    def totals(self) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """The sum, block by block: the float64 nearest to it, or within some units in the last place for sums whose
        bits span more than two levels; a function of the exact sum alone."""
        assert self._filled == self.size, "the last round is not complete"
        for block in blocks(self.size, BLOCK // 4):  # it takes several blocks' worth of memory to put one together
            yield block, self._total(block)

    # ---- adding --------------------------------------------------------------------------------------------------

    def _add_block(self, start: int, part: Array, weight: float, rows: list[NDArray[np.float64]]) -> None:
        wide, scale = rows[0][: part.size], weight * self._per_unit
        if part.dtype == np.float64:
            np.multiply(part, scale, wide)
        else:
            np.copyto(wide, part, casting="unsafe")  # bfloat16 has no arithmetic with float64; ufuncs cast more slowly
            np.multiply(wide, scale, wide)
        # Narrow values are read faster, and the largest of them makes the largest product.
        peak = _peak(part) * scale if part.dtype == np.float32 else _peak(wide)
        if not peak < _REACH:  # nan is not
            self._take_large(start, part, weight, wide)
        at = slice(start, start + part.size)
        if self._main:
            self._take_rest(at, wide, rows[1][: part.size])
        np.add(wide, self._magics[0], wide)
        total = self._levels[0][at]
        np.add(total, wide.view(np.int64), total)

    def _take_rest(self, at: slice, wide: NDArray[np.float64], rounded: NDArray[np.float64]) -> None:
        """Add what the main level takes of `wide`, and leave there what is finer."""
        magic, total = self._magics[1], self._levels[1][at]
        np.add(wide, magic, rounded)
        np.add(total, rounded.view(np.int64), total)
        np.subtract(rounded, magic, rounded)
        np.subtract(wide, rounded, wide)

    def _take_large(self, start: int, part: Array, weight: float, wide: NDArray[np.float64]) -> None:
        """Move what the main level cannot take from `wide` to the levels above, and leave the rest of it there.

        Each step is exact: subtracting the nearest multiple of a coarser power of two loses no bit.
        """
        at: Any = np.flatnonzero(~(np.abs(wide) < _REACH))  # nan is large as well
        if at.size > wide.size // 8:
            at = slice(None)  # the same for all of them is faster than picking so many
        product = part[at].astype(np.float64) * weight
        is_finite = np.isfinite(product)
        if not is_finite.all():
            self._spoil(slice(start, start + wide.size), at, ~is_finite)
            product[~is_finite] = 0
        product *= 2.0**-_HEADROOM_BITS
        for level in range(self._level_of(_peak(product)), self._main, -1):
            unit = self._headroom_unit(level)
            count = np.rint(product / unit)
            if count.any():
                product -= count * unit
                self._level(level)[start : start + wide.size][at] += count.astype(np.int64)
        wide[at] = product / self._headroom_unit(self._main)

    def _level_of(self, peak: float) -> int:
        """The lowest level that takes `peak`."""
        level = self._main
        while peak / self._headroom_unit(level) >= _REACH:
            level += 1
        return level

    def _headroom_unit(self, level: int) -> float:
        """The unit of a level, times 2**-64."""
        return 2.0 ** (self._exponent + _DIGIT_BITS * (level - self._main) - _HEADROOM_BITS)

    def _level(self, level: int) -> NDArray[np.int64]:
        """A level, made if it is missing: zeros cost no memory before they are written to."""
        for missing in range(len(self._levels), level + 1):
            self._levels[missing] = np.zeros(self.size, np.int64)
        return self._levels[level]

    def _spoil(self, block: slice, at: Any, is_spoiled: NDArray[np.bool_]) -> None:
        if self._spoiled is None:
            self._spoiled = np.zeros(self.size, np.bool_)
        self._spoiled[block][at] |= is_spoiled

    # ---- carrying ------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Take the _MAGIC of the rounds so far off, and carry where a level has become large."""
        for block in blocks(self.size):
            for level in range(len(self._levels)):
                self._settle_block(level, block)
        self._unsettled = 0

    def _settle_block(self, level: int, block: slice) -> None:
        count = self._levels[level][block]
        if level < self._dense:
            np.subtract(count, self._magic_so_far(level), out=count)
        if int(count.min()) > -_SETTLED and int(count.max()) < _SETTLED:
            return
        above = self._level(level + 1)[block]
        np.add(above, count >> _DIGIT_BITS, out=above)
        np.bitwise_and(count, _DIGIT_MASK, out=count)

    def _magic(self, level: int) -> float:
        """The _MAGIC of a dense level, in units of the main level."""
        return _MAGIC * 2.0 ** (_DIGIT_BITS * (level - self._main))

    def _magic_so_far(self, level: int) -> int:
        """What the bits of _MAGIC add up to since they were last taken off, modulo 2**64 as the levels do."""
        bits = int(np.float64(self._magic(level)).view(np.int64))
        return (self._unsettled * bits + 2**63) % 2**64 - 2**63

    def _total(self, block: slice) -> NDArray[np.float64]:
        """A block of the sum, from its digits: they are the same however the sum is spread over the levels."""
        if len(self._levels) == 1 and self._spoiled is None:
            # The quick way to the same: two digits at the most, so rounded once.
            exact: NDArray[np.float64] = (self._levels[0][block] - self._magic_so_far(0)).astype(np.float64)
            exact *= 2.0**self._exponent
            return exact
        digits, carry = [], np.zeros(block.stop - block.start, np.int64)
        for level in range(len(self._levels)):
            count = self._levels[level][block] + carry
            if level < self._dense:
                count -= self._magic_so_far(level)
            carry = count >> _DIGIT_BITS
            digits.append(count & _DIGIT_MASK)
        digits.append(carry)
        total = np.zeros(carry.size)
        for level in range(len(digits) - 1, -1, -1):
            total += digits[level] * self._headroom_unit(level)
        with np.errstate(over="ignore"):
            total *= 2.0**_HEADROOM_BITS
        if self._spoiled is not None:
            total[self._spoiled[block]] = np.nan
        return total


def _scratch(levels: int) -> list[NDArray[np.float64]]:
    """So many rows of a block, of no particular content; the next call in this thread gives the same memory."""
    rows: list[NDArray[np.float64]] = _SCRATCH.__dict__.setdefault("rows", [])
    rows += (np.empty(BLOCK) for _ in range(levels - len(rows)))
    return rows


def blocks(size: int, most: int = BLOCK) -> Iterator[slice]:
    """Cut `size` elements into slices of at most `most`."""
    return (slice(start, min(start + most, size)) for start in range(0, size, most))


def smallest_units(value: float) -> int:
    """A finite number in units of 2**-1074, the smallest float64: such integers add up exactly, in any order."""
    numerator, denominator = value.as_integer_ratio()
    return numerator * (_SMALLEST_UNITS // denominator)


def from_smallest_units(units: int) -> float:
    """The float64 nearest to that many units of 2**-1074."""
    return units / _SMALLEST_UNITS


def _peak(values: NDArray[Any]) -> float:
    """The largest absolute value; nan if there is one."""
    return max(float(np.maximum.reduce(values)), -float(np.minimum.reduce(values)))

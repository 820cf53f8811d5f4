"""A mean of updates, taken as they come, and the model moved by it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.exact import ExactSum, from_smallest_units, smallest_units
from fedbus.types import Array, Tensors

_LARGEST_INT64: Final = float(np.nextafter(2.0**63, 0))
_GRID_BITS: Final = 34
"""A mean is exact to 2**-35 of the tensor's largest element, or of 1 where that is larger: ten bits beyond float32's
own for that element. What weight * delta has room for in the first level is 2**17 times that element."""


@dataclass(slots=True)
class _Mean:
    total: ExactSum  # over real numbers: two for each element of a complex tensor
    weight_units: int = 0  # of 2**-1074, which is exact

    def begin(self, weight: float) -> None:
        self.total.begin()
        self.weight_units += smallest_units(weight)


class StreamingMean:
    """For each tensor sum_i(factor_i d_i) / sum_i(weight_i), with d_i the deltas of those updates that hold it.

    The same updates give the same bits in whatever order they come: each factor_i d_i is rounded to a grid that the
    model alone decides, and the sums are exact from there on (`ExactSum`).

    Memory: two models of float32 for the sums, whatever the number of clients, and as much again for those memory
    pages of a tensor where some factor_i d_i is more than 2**17 times the tensor's largest element.
    """

    def __init__(self, model: Tensors) -> None:
        self._bools = {name: value.reshape(-1) for name, value in model.items() if value.dtype.kind == "b"}
        self._means = {name: _Mean(_sum_for(value)) for name, value in model.items()}

    def add(self, update: ClientUpdate, *, factor: float, weight: float) -> None:
        """Take in one update, whose arrays are not needed afterwards."""
        begun = set()
        for name, start, values in update.pieces():
            mean = self._means[name]
            if name not in begun:
                begun.add(name)
                mean.begin(factor if name in self._bools else weight)
            if values.dtype.kind == "c":
                start, values = 2 * start, _as_real(values)
            elif name in self._bools:
                values = _votes(self._bools[name][start : start + values.size], values)
            mean.total.add(start, values, factor)

    def moved(self, model: Tensors, rate: float = 1.0) -> dict[str, Array]:
        """`model` + `rate` times the mean, in new arrays; to be called once, for the sums go on the way.

        A tensor that nobody sent stays. Integer tensors take the step rounded to the nearest integer (ties to even),
        within the limits of their dtype. A bool cannot go part of the way: it takes what most say, each update with
        factor_i votes, whatever weight_i and `rate` are, and stays on a tie.
        """
        return {
            name: _moved(value, self._means.pop(name), 1.0 if name in self._bools else rate)
            for name, value in model.items()
        }


def _sum_for(value: Array) -> ExactSum:
    if value.dtype.kind in "iub":
        return ExactSum(value.size, 0, is_fine=True)
    parts = [value.real, value.imag] if value.dtype.kind == "c" else [value]
    is_double = value.dtype.itemsize == 8 * len(parts)
    return ExactSum(value.size * len(parts), _exponent_of(parts) - _GRID_BITS, is_fine=is_double)


def _exponent_of(parts: list[Array]) -> int:
    """The smallest power of two above all elements, at most 0; 0 if all are zero, for they will not stay so."""
    peak = max((abs(float(end)) for part in parts if part.size for end in (part.min(), part.max())), default=0.0)
    return min(math.frexp(peak)[1], 0) if 0 < peak < math.inf else 0


def _as_real(values: Array) -> Array:
    """Complex values as twice as many real ones."""
    return np.ascontiguousarray(values).view(values.real.dtype)


def _votes(value: Array, delta: Array) -> Array:
    """What an update adds to a bool as 0 or 1: nothing where a late one asks for what is there already."""
    now = value.astype(np.int8)
    return np.clip(delta, -now, 1 - now)


def _moved(value: Array, mean: _Mean, rate: float) -> Array:
    if mean.weight_units == 0:
        return value.copy()
    divisor = from_smallest_units(mean.weight_units) / rate
    new = np.empty(value.size, value.dtype)
    before, is_complex = value.reshape(-1), value.dtype.kind == "c"
    for block, total in mean.total.totals():
        with np.errstate(over="ignore", invalid="ignore"):  # whoever takes the result looks at it
            step = total / divisor
        if is_complex:
            block, step = slice(block.start // 2, block.stop // 2), step.view(np.complex128)
        new[block] = _stepped(before[block], step)
    return new.reshape(value.shape)


def _stepped(value: Array, step: NDArray[Any]) -> Array:
    if value.dtype.kind == "b":
        return _majority(value, step)
    if value.dtype.kind in "iu":
        return rounded(value, step)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.asarray(value, step.dtype) + step, dtype=value.dtype)


def rounded(value: Array, step: NDArray[np.float64]) -> Array:
    """Integers plus a step rounded to the nearest integer (ties to even), within the limits of their dtype; a step is
    2**63 long at most."""
    limits, kind = np.iinfo(value.dtype), value.dtype.type
    longest = min(2.0**limits.bits - 1, _LARGEST_INT64)
    whole = np.clip(np.rint(step), -longest, longest).astype(np.int64)
    moved = (value.astype(np.int64) + whole).astype(value.dtype)  # wraps round once at most, in 64 bits too
    moved = np.where((whole > 0) & (moved < value), kind(limits.max), moved)
    return np.where((whole < 0) & (moved > value), kind(limits.min), moved)


def _majority(value: Array, step: NDArray[np.float64]) -> Array:
    share = value.astype(np.float64) + step
    return np.where(np.isclose(share, 0.5, rtol=0, atol=1e-12), value, share > 0.5)

"""A mean of updates, taken as they come."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.exact import ExactSum, from_smallest_units, smallest_units
from fedbus.strategies.step import Step
from fedbus.types import Array, Piece, Tensors

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

    Args:
        is_fine: for factors that may be far below 1, whose products would be lost between the grid's points: another
            50 bits, for two models of float32 more.
    """

    def __init__(self, model: Tensors, *, is_fine: bool = False) -> None:
        self._bools = {name: value.reshape(-1) for name, value in model.items() if value.dtype.kind == "b"}
        self._means = {name: _Mean(_sum_for(value, is_fine=is_fine)) for name, value in model.items()}

    def add(self, update: ClientUpdate, *, factor: float, weight: float, whole_factor: float | None = None) -> None:
        """Take in one update, whose arrays are not needed afterwards.

        `whole_factor`: factor_i for integers and bools, where it is another one.
        """
        self.add_pieces(update.pieces(), factor=factor, weight=weight, whole_factor=whole_factor)

    def add_pieces(
        self, pieces: Iterator[Piece], *, factor: float, weight: float, whole_factor: float | None = None
    ) -> None:
        """Take in tensors of one update, its delta or others."""
        begun = set()
        for name, start, values in pieces:
            mean = self._means[name]
            own = factor if whole_factor is None or values.dtype.kind not in "iub" else whole_factor
            if name not in begun:
                begun.add(name)
                mean.begin(own if name in self._bools else weight)
            if values.dtype.kind == "c":
                start, values = 2 * start, _as_real(values)
            elif name in self._bools:
                values = _votes(self._bools[name][start : start + values.size], values)
            mean.total.add(start, values, own)

    def steps(self, model: Tensors) -> Iterator[Step]:
        """The mean of each tensor that somebody sent, block by block; to be called once, for the sums go on the way.

        That of a bool is what most say: each update has factor_i votes, whatever weight_i is.
        """
        for name, value in model.items():
            mean = self._means.pop(name)
            if mean.weight_units:
                yield from _blocks_of(name, mean, is_complex=value.dtype.kind == "c")


def _sum_for(value: Array, *, is_fine: bool) -> ExactSum:
    if value.dtype.kind in "iub":
        return ExactSum(value.size, 0, is_fine=True)
    parts = [value.real, value.imag] if value.dtype.kind == "c" else [value]
    is_double = value.dtype.itemsize == 8 * len(parts)
    return ExactSum(value.size * len(parts), _exponent_of(parts) - _GRID_BITS, is_fine=is_fine or is_double)


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


def _blocks_of(name: str, mean: _Mean, *, is_complex: bool) -> Iterator[Step]:
    divisor = from_smallest_units(mean.weight_units)
    for block, total in mean.total.totals():
        with np.errstate(over="ignore", invalid="ignore"):  # whoever takes the result looks at it
            total /= divisor
        if is_complex:
            yield name, slice(block.start // 2, block.stop // 2), total.view(np.complex128)
        else:
            yield name, block, total

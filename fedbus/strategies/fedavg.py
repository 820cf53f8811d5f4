"""Federated averaging, as a streaming weighted mean of deltas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.base import ClientUpdate, Strategy
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


class FedAvg(Strategy):
    """w <- w + sum_k(n_k d_k) / sum_k(n_k), with d_k the delta of client k and n_k its number of examples.

    McMahan et al. 2017 (Communication-Efficient Learning of Deep Networks from Decentralized Data), algorithm 1,
    with the mean over those clients that sent the tensor, and each n_k multiplied by the update's staleness
    discount. Integer tensors take the mean rounded to the nearest integer (ties to even); bool tensors take the
    weighted majority, and stay as they are on a tie.

    The same updates give the same bits in whatever order they come: each n_k d_k is rounded to a grid that the
    model alone decides, and the sums are exact from there on (`ExactSum`).

    Memory: two models of float32 for the sums, whatever the number of clients, and as much again for those memory
    pages of a tensor where some n_k d_k is more than 2**17 times the tensor's largest element.
    """

    def __repr__(self) -> str:
        return "FedAvg()"

    def init(self, model: Tensors) -> dict[str, _Mean]:
        return {name: _Mean(_sum_for(value)) for name, value in model.items()}

    def fold(self, state: dict[str, _Mean], update: ClientUpdate) -> None:
        weight = update.num_examples * update.discount
        begun = set()
        for name, start, values in update.pieces():
            mean = state[name]
            if name not in begun:
                begun.add(name)
                mean.begin(weight)
            if values.dtype.kind == "c":
                start, values = 2 * start, _as_real(values)
            mean.total.add(start, values, weight)

    def finish(self, state: dict[str, _Mean], model: Tensors) -> dict[str, Array]:
        return {name: _moved(value, state.pop(name)) for name, value in model.items()}  # a sum in memory ends here


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


def _moved(value: Array, mean: _Mean) -> Array:
    weight = from_smallest_units(mean.weight_units)
    if weight == 0:
        return value.copy()
    new = np.empty(value.size, value.dtype)
    before, is_complex = value.reshape(-1), value.dtype.kind == "c"
    for block, total in mean.total.totals():
        with np.errstate(over="ignore", invalid="ignore"):  # whoever takes the result looks at it
            step = total / weight
        if is_complex:
            block, step = slice(block.start // 2, block.stop // 2), step.view(np.complex128)
        new[block] = _stepped(before[block], step)
    return new.reshape(value.shape)


def _stepped(value: Array, step: NDArray[Any]) -> Array:
    if value.dtype.kind == "b":
        return _majority(value, step)
    if value.dtype.kind in "iu":
        return _rounded(value, step)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.asarray(value, step.dtype) + step, dtype=value.dtype)


def _rounded(value: Array, step: NDArray[np.float64]) -> Array:
    whole = np.clip(np.rint(step), -(2.0**63), _LARGEST_INT64).astype(np.int64)
    moved = (value.astype(np.int64) + whole).astype(value.dtype)  # modulo 2**64, so that uint64 works alike
    # The mean lies between values of the dtype, but float64 rounds near the ends of 64 bits.
    limits, kind = np.iinfo(value.dtype), value.dtype.type
    moved = np.where((whole > 0) & (moved < value), kind(limits.max), moved)
    return np.where((whole < 0) & (moved > value), kind(limits.min), moved)


def _majority(value: Array, step: NDArray[np.float64]) -> Array:
    share = value.astype(np.float64) + step
    return np.where(np.isclose(share, 0.5, rtol=0, atol=1e-12), value, share > 0.5)

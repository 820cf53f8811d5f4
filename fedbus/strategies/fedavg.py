"""Federated averaging, as a streaming weighted mean of deltas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.types import Array, Tensors

_LARGEST_INT64: Final = float(np.nextafter(2.0**63, 0))
_BLOCK: Final = 1 << 15
"""Elements folded at a time: the block, widened to float64, stays in the cache."""


@dataclass(slots=True)
class _Mean:
    total: NDArray[Any]  # flat; float64, complex128 for complex tensors
    weight: float = 0.0


class FedAvg(Strategy):
    """w <- w + sum_k(n_k d_k) / sum_k(n_k), with d_k the delta of client k and n_k its number of examples.

    McMahan et al. 2017 (Communication-Efficient Learning of Deep Networks from Decentralized Data), algorithm 1,
    with the mean over those clients that sent the tensor, and each n_k multiplied by the update's staleness
    discount. Sums are kept in float64. Integer tensors take the mean rounded to the nearest integer (ties to
    even); bool tensors take the weighted majority, and stay as they are on a tie.

    Memory: two models of float32 for the sums, whatever the number of clients.
    """

    def __repr__(self) -> str:
        return "FedAvg()"

    def init(self, model: Tensors) -> dict[str, _Mean]:
        return {name: _Mean(np.zeros(value.size, _sum_dtype(value))) for name, value in model.items()}

    def fold(self, state: dict[str, _Mean], update: ClientUpdate) -> None:
        weight = update.num_examples * update.discount
        for name, delta in update.delta.items():
            mean = state[name]
            mean.weight += weight
            _add_weighted(mean.total, delta.reshape(-1), weight)

    def finish(self, state: dict[str, _Mean], model: Tensors) -> dict[str, Array]:
        return {name: _moved(value, state[name]) for name, value in model.items()}


def _sum_dtype(value: Array) -> np.dtype[Any]:
    return np.dtype(np.complex128 if value.dtype.kind == "c" else np.float64)


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))


def _add_weighted(total: NDArray[Any], delta: NDArray[Any], weight: float) -> None:
    """total += weight * delta, in the precision of `total` throughout."""
    scratch = np.empty(min(_BLOCK, delta.size), total.dtype)
    for block in _blocks(delta.size):
        part = delta[block]
        wide = scratch[: part.size]
        np.copyto(wide, part, casting="unsafe")  # bfloat16 has no arithmetic with float64 of its own
        with np.errstate(over="ignore", invalid="ignore"):  # whoever takes the result looks at it
            np.multiply(wide, weight, out=wide)
            np.add(total[block], wide, out=total[block])


def _moved(value: Array, mean: _Mean) -> Array:
    if mean.weight == 0:
        return value.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        step = (mean.total / mean.weight).reshape(value.shape)
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

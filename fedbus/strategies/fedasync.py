"""Asynchronous mixing."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.exact import BLOCK, blocks
from fedbus.strategies.step import rounded
from fedbus.types import Array, Tensors


class FedAsync(Strategy):
    """w_t <- (1 - a_t) w_{t-1} + a_t w_i, with w_i what the client trained, and a_t = alpha s(tau).

    Xie et al. 2019 (Asynchronous Federated Optimization), algorithm 1. w_i is the client's delta on the version that
    it began from: late, it pulls back towards there, which w + a_t d_i would not. alpha is `RoundConfig.mixing`, and
    a_t comes as the update's discount. Updates of one round are folded one after the other.

    Floating tensors are mixed in float64 and rounded once; those at rest (d_i = 0 on the same base) keep their bits.
    Integer tensors take the step a_t (w_i - w) rounded to the nearest integer (ties to even), bool tensors the
    heavier of w and w_i, w on a tie. A tensor that the client did not send stays.

    Memory: the next model.
    """

    needs_base: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "FedAsync()"

    @property
    def is_quick(self) -> bool:
        return type(self) is FedAsync

    def check(self, rounds: RoundConfig) -> None:
        if not (rounds.is_asynchronous and rounds.min_fit_clients == 1):
            raise ConfigError("FedAsync makes a version of each update: set rounds=RoundConfig.asynchronous()")

    def init(self, model: Tensors) -> dict[str, Array]:
        return {name: value.copy() for name, value in model.items()}

    def fold(self, state: dict[str, Array], update: ClientUpdate) -> None:
        assert update.base is not None, "needs_base"
        for name, start, delta in update.pieces():
            mixed, base = state[name].reshape(-1), update.base[name].reshape(-1)
            for block in blocks(delta.size, BLOCK // 4):  # it takes several blocks' worth of memory to mix one
                at = slice(start + block.start, start + block.stop)
                mixed[at] = _mixed(mixed[at], base[at], delta[block], update.discount)

    def finish(self, state: dict[str, Array], model: Tensors) -> dict[str, Array]:
        return state


def _mixed(value: Array, base: Array, delta: Array, a: float) -> Array:
    """(1 - a) value + a (base + delta)."""
    if value.dtype.kind == "b":
        return np.asarray(base.astype(np.int64) + delta > 0) if a > 0.5 else value
    if value.dtype.kind in "iu":
        trained = (base.astype(np.int64) + delta).astype(value.dtype)  # modulo 2**64, as the delta was taken
        return rounded(value, a * _difference(trained, value))
    wide: np.dtype[Any] = np.dtype(np.complex128 if value.dtype.kind == "c" else np.float64)
    now = value.astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever takes the result looks at it
        # The formula as now + a (base - now + delta), which is now to the last bit where nothing moved.
        new = base.astype(wide)
        new -= now
        new += delta.astype(wide)
        new *= a
        new += now
        return np.asarray(new.astype(value.dtype))


def _difference(one: Array, other: Array) -> NDArray[np.float64]:
    """one - other for integers, exact before it is rounded to float64 unless it needs more than 64 bits."""
    exact = one.astype(np.int64) - other.astype(np.int64)
    has_wrapped = (exact > 0) != (one > other)
    return np.where(has_wrapped, one.astype(np.float64) - other.astype(np.float64), exact.astype(np.float64))

"""The step that a round's updates add up to, and the model moved by it."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import Strategy
from fedbus.strategies.optimizers import SGD, ServerOptimizer
from fedbus.types import Array, Tensors

Step: TypeAlias = tuple[str, slice, Array]
"""A tensor's name, a run of its flat elements, and by how much they are to move: float64, complex128 for complex."""

_LARGEST_INT64: Final = float(np.nextafter(2.0**63, 0))
_FLOAT32: Final = np.dtype(np.float32)


class StepStrategy(Strategy):
    """A strategy whose updates add up to one step, which a server optimizer takes.

    Integer tensors take the step rounded to the nearest integer (ties to even), within the limits of their dtype: as
    it is, or times the learning rate of `SGD`. A bool cannot go part of the way: it takes whichever of 0 and 1 is
    nearer to where the whole step leads, and stays in the middle. All others move as the optimizer says, in float64
    (complex ones as pairs of reals), and are rounded once. A tensor that nobody sent stays.

    The optimizer's slots are kept as "SLOT/TENSOR" in `memory`: float32 for tensors of 16 and 32 bits, float64 for
    float64, and complex where the tensor is, for its pairs. What their dtype cannot hold is kept as its largest number.
    """

    optimizer: ServerOptimizer = SGD()  # of those whose own __init__ does not set another

    def __init__(self, *, optimizer: ServerOptimizer | None = None) -> None:
        if not (optimizer is None or isinstance(optimizer, ServerOptimizer)):
            raise ConfigError(f"optimizer must be a fedbus server optimizer such as Adam(), not {optimizer!r}")
        self.optimizer = SGD() if optimizer is None else optimizer

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._settings())})"

    def _settings(self) -> list[str]:
        """What it was made with, as far as that is not as usual; the optimizer last."""
        return [] if self.optimizer == SGD() else [f"optimizer={self.optimizer}"]

    def check(self, rounds: RoundConfig) -> None:
        if rounds.mixing is not None:
            raise ConfigError(
                "RoundConfig.asynchronous() is for FedAsync: leave the strategy out, or use RoundConfig.buffered(k) "
                f"with {type(self).__name__}"
            )

    @property
    def is_quick(self) -> bool:
        return type(self).__module__.startswith("fedbus.")  # nobody knows what a subclass does

    @abstractmethod
    def steps(self, state: Any, model: Tensors) -> Iterator[Step]:
        """The step of each tensor that was sent, in the model's order, its elements in order and without gaps.

        The arrays are the taker's to write to. Walked once, at the end of a round.
        """

    def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
        moved: dict[str, Array] = {}
        kept: dict[str, Array] = {}
        for name, steps in itertools.groupby(self.steps(state, model), key=itemgetter(0)):
            value = model[name]
            if value.dtype.kind in "iub":
                moved[name] = _whole(value, steps, self.optimizer.whole_rate)
            else:
                moved[name] = self._floating(name, value, steps, kept)
        self.memory.update(kept)
        return {name: moved[name] if name in moved else value.copy() for name, value in model.items()}

    def _floating(self, name: str, value: Array, steps: Iterable[Step], kept: dict[str, Array]) -> Array:
        before, new = _flat_reals(value), np.empty(value.shape, value.dtype)
        after = _flat_reals(new)
        slots = {slot: _Slot(value, self.memory.get(f"{slot}/{name}"), at) for slot, at in self.optimizer.slots.items()}
        done = 0
        for _, block, step in steps:
            assert block.start * before.size == done * value.size, "the elements of a tensor come in order"
            step = step.view(np.float64)
            at = slice(done, done + step.size)
            held = {slot: kind.read(at) for slot, kind in slots.items()}
            with np.errstate(all="ignore"):  # whoever takes the result looks at it
                after[at] = self.optimizer.moved(before[at].astype(np.float64), step, held)
            for slot, values in held.items():
                slots[slot].write(at, values)
            done = at.stop
        assert done == before.size, "a tensor comes whole"
        kept |= {f"{slot}/{name}": slots[slot].tensor for slot in slots}
        return new


class _Slot:
    """What an optimizer remembers of one tensor, from the last round to this one."""

    def __init__(self, value: Array, last: Array | None, start: float) -> None:
        self.tensor: Array = np.empty(value.shape, _slot_dtype(value.dtype))
        self._flat = _flat_reals(self.tensor)
        self._last = None if last is None else _flat_reals(last)
        self._start = start
        self._most = float(np.finfo(self._flat.dtype).max)

    def read(self, at: slice) -> NDArray[np.float64]:
        """Some elements, as they were after the last round; a copy."""
        if self._last is None:
            return np.full(at.stop - at.start, self._start, np.float64)
        return self._last[at].astype(np.float64)

    def write(self, at: slice, values: NDArray[np.float64]) -> None:
        """Some elements, as they are from now on; uses up `values`."""
        self._flat[at] = np.clip(values, -self._most, self._most, out=values)


def _slot_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype if dtype.kind == "c" else max(dtype, _FLOAT32, key=lambda one: one.itemsize)


def _flat_reals(value: Array) -> Array:
    """The elements in order, complex ones as pairs of reals; a view where they lie in order."""
    flat = value.reshape(-1)
    return np.ascontiguousarray(flat).view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _whole(value: Array, steps: Iterable[Step], rate: float) -> Array:
    before, new = value.reshape(-1), np.empty(value.size, value.dtype)
    done = 0
    for _, block, step in steps:
        assert block.start == done, "the elements of a tensor come in order"
        now, done = before[block], block.stop
        new[block] = _majority(now, step) if value.dtype.kind == "b" else rounded(now, step * rate)
    assert done == value.size, "a tensor comes whole"
    return new.reshape(value.shape)


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

"""Centred clipping: what is too far from where the others went last time is drawn nearer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.exact import from_smallest_units, smallest_units
from fedbus.strategies.mean import StreamingMean
from fedbus.strategies.norms import runs
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.settings import positive, whole
from fedbus.strategies.spool import Spool
from fedbus.strategies.step import Step, StepStrategy
from fedbus.types import Array, Tensors

_SLOT = "centre"


class CentredClipping(StepStrategy):
    """v <- v + (1/n) sum_i((d_i - v) min(1, tau / ||d_i - v||)); w <- w + v, with v at first what it was last round.

    Karimireddy et al. 2021 (Learning from History for Byzantine Robust Optimization), centered clipping. Each client
    counts alike, however many examples it has, and moves v by tau / n at most. Which tau is right goes with the length
    of honest updates: somewhat more than their distance from one another.

    Floating and complex tensors make the distance, those that the update holds; each tensor takes the mean over the
    updates that hold it. Integers and bools take their plain mean. The d_i of a late update is multiplied by its
    discount. v begins as zero, and is kept as "centre/TENSOR" in `memory`.

    Memory: the sums of `StreamingMean`, exact in whatever order the updates come. With more than one iteration updates
    go to a file (`Spool`), and are read once for each.

    Args:
        radius: tau, in the unit of ||d_i||.
        iterations: how often v is moved in a round.
        optimizer: takes the step.

    Raises:
        ConfigError: when a setting is out of its range.
    """

    def __init__(self, radius: float, iterations: int = 1, *, optimizer: ServerOptimizer | None = None) -> None:
        super().__init__(optimizer=optimizer)
        self.radius = positive("radius", radius)
        self.iterations = whole("iterations", iterations, least=1)

    def _settings(self) -> list[str]:
        return [f"radius={self.radius}", f"iterations={self.iterations}", *super()._settings()]

    @property
    def is_quick(self) -> bool:
        return super().is_quick and self.iterations == 1

    def init(self, model: Tensors) -> _Clipped | Spool:
        if self.iterations > 1:
            return Spool(model, self.folder, self.report)
        return _Clipped(StreamingMean(model), self.radius, self._centre(model))

    def fold(self, state: _Clipped | Spool, update: ClientUpdate) -> None:
        state.add(update)

    def steps(self, state: _Clipped | Spool, model: Tensors) -> Iterator[Step]:
        last = self._last_pass(state, model) if isinstance(state, Spool) else state
        centre: dict[str, Array] = {}
        for name, at, step in last.steps(model):
            value = model[name]
            if value.dtype.kind not in "iub":
                kept = centre.setdefault(f"{_SLOT}/{name}", np.empty(value.shape, _kept_dtype(value.dtype)))
                kept.reshape(-1)[at] = step
            yield name, at, step
        self.memory.update(centre)

    def _centre(self, model: Tensors) -> dict[str, Array]:
        """v, as flat reals; without the tensors where it is zero."""
        kept = {name: self.memory[f"{_SLOT}/{name}"] for name in model if f"{_SLOT}/{name}" in self.memory}
        return {name: value.reshape(-1).view(value.real.dtype) for name, value in kept.items()}

    def _last_pass(self, spool: Spool, model: Tensors) -> _Clipped:
        with closing(spool):
            centre = self._centre(model)
            for done in range(self.iterations):
                clipped = _Clipped(StreamingMean(model), self.radius, centre)
                for update in spool.updates():
                    clipped.add(update)
                self.report(done + 1, self.iterations)
                if done + 1 < self.iterations:
                    centre = centre | clipped.centre(model)
            return clipped


@dataclass(slots=True)
class _Clipped:
    """One pass over the updates, with v in `centre`."""

    mean: StreamingMean
    radius: float
    before: Mapping[str, Array]
    _came: dict[str, int] = field(default_factory=dict)
    _kept_units: dict[str, int] = field(default_factory=dict)  # sums of min(1, tau / ||d_i - v||), exact

    def add(self, update: ClientUpdate) -> None:
        far = self._distance(update)
        kept = min(1.0, self.radius / far) if far else 1.0
        for name in update.delta:
            self._came[name] = self._came.get(name, 0) + 1
            self._kept_units[name] = self._kept_units.get(name, 0) + smallest_units(kept)
        self.mean.add(update, factor=kept * update.discount, weight=1, whole_factor=update.discount)

    def _distance(self, update: ClientUpdate) -> float:
        squares = []
        for name, start, values in runs(update.peek()):
            wide = values.astype(np.float64)
            wide *= update.discount
            if name in self.before:
                wide -= self.before[name][start : start + wide.size]
            squares.append(float(np.add.reduce(np.multiply(wide, wide, out=wide))))
        return math.sqrt(math.fsum(squares))

    def steps(self, model: Tensors) -> Iterator[Step]:
        """The next v: v + (1/n) (sum_i(c_i d_i) - v sum_i(c_i)), block by block; the plain mean of the others."""
        for name, at, mean in self.mean.steps(model):
            if name in self.before:
                left = 1 - from_smallest_units(self._kept_units[name]) / self._came[name]
                reals: NDArray[np.float64] = mean.view(np.float64)
                per = reals.size // (at.stop - at.start) if reals.size else 1
                reals += left * self.before[name][at.start * per : at.stop * per].astype(np.float64)
            yield name, at, mean

    def centre(self, model: Tensors) -> dict[str, Array]:
        """The next v of the tensors that somebody sent, as flat reals."""
        found: dict[str, list[Array]] = {}
        for name, _, step in self.steps(model):
            if model[name].dtype.kind not in "iub":
                found.setdefault(name, []).append(step.view(np.float64))
        return {name: np.concatenate(parts) for name, parts in found.items()}


def _kept_dtype(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    """float32 for 16 bits; else the tensor's own."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype

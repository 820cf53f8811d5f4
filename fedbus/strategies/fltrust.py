"""FLTrust: the server trains a little itself, and trusts those who go its way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fedbus.errors import AggregateRefused, ClientCodeError
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.mean import StreamingMean
from fedbus.strategies.norms import runs
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.step import Step, StepStrategy
from fedbus.types import Array, Tensors


@dataclass(slots=True)
class _Trusting:
    root: dict[str, Array]  # flat, as reals
    root_norm: float
    mean: StreamingMean
    came: int = 0
    trusted: int = 0


class FLTrust(StepStrategy):
    """w <- w + sum_i(t_i ||g|| d_i / ||d_i||) / sum_i(t_i), with t_i = ReLU(cos(d_i, g)), and g the server's own step.

    Cao et al. 2021 (FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping): trust scores, lengths
    brought to g's, and their mean. g comes from a small clean data set that the server has, about 100 examples in the
    paper, trained on as the clients do. It bears any number of hostile updates; where nobody goes the way of g, the
    round is discarded.

    Floating and complex tensors make lengths and angles. Integers and bools take the mean weighted with t_i. The d_i of
    a late update is multiplied by its discount, after it was brought to g's length.

    Memory: g, and the sums of `StreamingMean`; exact, in whatever order the updates come.

    Args:
        root_update: called with the model when a round begins, off the event loop, while the clients train: g, as
            {tensor name: trained minus model}. Must be the same for the same model.
        optimizer: takes the step.

    Raises:
        ClientCodeError: when `root_update` returns what is no step of the model.
    """

    def __init__(
        self, root_update: Callable[[dict[str, Array]], Tensors], *, optimizer: ServerOptimizer | None = None
    ) -> None:
        super().__init__(optimizer=optimizer)
        self.root_update = root_update

    def _settings(self) -> list[str]:
        return [getattr(self.root_update, "__name__", "..."), *super()._settings()]

    @property
    def is_quick(self) -> bool:
        return False  # nobody knows how long root_update takes

    def init(self, model: Tensors) -> _Trusting:
        step = self.root_update(dict(model))
        for name, value in step.items():
            if name not in model or np.shape(value) != model[name].shape:
                raise ClientCodeError(f"root_update returned {name!r} {np.shape(value)}: the model has no such tensor")
        root = {name: _reals(step[name], model[name]) for name in step if model[name].dtype.kind not in "iub"}
        norm = math.sqrt(math.fsum(float(np.sum(np.square(value, dtype=np.float64))) for value in root.values()))
        if not (math.isfinite(norm) and norm > 0):
            raise ClientCodeError(f"root_update returned a step of length {norm}: it must move the model")
        return _Trusting(root=root, root_norm=norm, mean=StreamingMean(model))

    def fold(self, state: _Trusting, update: ClientUpdate) -> None:
        trust, norm = _cosine(state, update)
        state.came += 1
        if trust > 0:  # ReLU
            state.trusted += 1
            counts = trust * update.discount
            state.mean.add(update, factor=counts * state.root_norm / norm, weight=trust, whole_factor=counts)

    def steps(self, state: _Trusting, model: Tensors) -> Iterator[Step]:
        if not state.trusted:
            raise AggregateRefused(f"FLTrust trusts none of the {state.came} updates: none goes the server's way")
        return state.mean.steps(model)


def _reals(value: Array, like: Array) -> Array:
    """A tensor of g, flat, as precise as the model's."""
    flat = np.ascontiguousarray(np.reshape(value, -1), np.complex128 if like.dtype.kind == "c" else np.float64)
    return flat.view(np.float64).astype(np.float64 if like.dtype in (np.float64, np.complex128) else np.float32)


def _cosine(state: _Trusting, update: ClientUpdate) -> tuple[float, float]:
    """cos(d_i, g), and the length of d_i."""
    squares, products = [], []
    for name, start, values in runs(update.peek()):
        wide = values.astype(np.float64)
        squares.append(float(np.add.reduce(wide * wide)))
        if name in state.root:
            wide *= state.root[name][start : start + wide.size]
            products.append(float(np.add.reduce(wide)))
    norm = math.sqrt(math.fsum(squares))
    return (math.fsum(products) / norm / state.root_norm, norm) if norm else (0.0, 0.0)

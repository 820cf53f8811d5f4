"""Averaging with a regulariser that moves, so that the clients' optima come to be the federation's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fedbus.config import RoundConfig
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.mean import StreamingMean
from fedbus.strategies.settings import check_none_is_too_late, count, positive
from fedbus.strategies.step import Step, StepStrategy
from fedbus.types import Array, Config, Piece, Tensors, kept_dtype

_H = "h/"


@dataclass
class _Sum:
    mean: StreamingMean
    holders: Counter[str] = field(default_factory=Counter)

    def add(self, pieces: Iterator[Piece], factor: float) -> None:
        self.mean.add_pieces(self._counted(pieces), factor=factor, weight=1)

    def _counted(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for name, start, values in pieces:
            self.holders[name] += start == 0
            yield name, start, values

    def steps(self, model: Tensors) -> Iterator[Step]:
        return self.mean.steps({name: value for name, value in model.items() if name in self.holders})


@dataclass
class _Round:
    model: Tensors
    whole: _Sum
    """Of all deltas, as they came."""
    late: _Sum | None = None
    """Of what their discounts take off; none while nothing is late."""


class FedDyn(StepStrategy):
    """h <- h - alpha/m sum_k(th_k - th); th <- mean_k(th_k) - h/alpha.

    Acar et al. 2021 (Federated Learning Based on Dynamic Regularization), algorithm 1: clients minimise
    f_k(th_k) - <g_k, th_k> + alpha/2 ||th_k - th||^2 and set g_k <- g_k - alpha (th_k - th); their half is in
    `fedbus.training.local` and `fedbus.training.torch`. Each client counts alike, however many examples it has, in the
    mean over those that took part, and h is the mean of all m clients' g_k.

    A late update counts less for the mean by its staleness discount, and in full for h, as for its client's g_k. A
    client that is started anew must know its g_k, for h does: give it a state folder (`fedbus client --state DIR`).

    Args:
        alpha: how near clients stay to the model, 0.01 to 0.1 in the paper. The step of a round grows with 1/alpha,
            where few of the clients take part.
        num_clients: m; None takes the members that the federation has when the round is opened.

    Raises:
        ConfigError: when an argument is out of its range.
    """

    needs_client_memory: ClassVar[bool] = True
    needs_exact_updates: ClassVar[bool] = True  # h is the mean of the clients' g_k, which come of what they trained

    def __init__(self, alpha: float = 0.01, *, num_clients: int | None = None) -> None:
        super().__init__()
        self.alpha = positive("alpha", alpha)
        self.num_clients = None if num_clients is None else count("num_clients", num_clients)

    def _settings(self) -> list[str]:
        num_clients = [] if self.num_clients is None else [f"num_clients={self.num_clients}"]
        return [f"alpha={self.alpha:g}", *num_clients, *super()._settings()]

    def check(self, rounds: RoundConfig) -> None:
        super().check(rounds)
        check_none_is_too_late(self, rounds)

    def fit_config(self, round: int) -> Config:
        return {"feddyn_alpha": self.alpha}

    def init(self, model: Tensors) -> _Round:
        return _Round(model, _Sum(StreamingMean(model)))

    def fold(self, state: _Round, update: ClientUpdate) -> None:
        if update.discount != 1:
            state.late = state.late or _Sum(StreamingMean(state.model))
            state.late.add(_without_bools(state.model, update.peek()), update.discount - 1)
        state.whole.add(update.pieces(), 1)

    def steps(self, state: _Round, model: Tensors) -> Iterator[Step]:
        late = state.late or _Sum(StreamingMean({}))
        taken_off = late.steps(model)
        kept: dict[str, Array] = {}
        for name, block, step in state.whole.steps(model):
            holders = state.whole.holders[name]
            mean = step if name not in late.holders else step + next(taken_off)[2] * (late.holders[name] / holders)
            dtype = kept_dtype(model[name].dtype)
            if dtype is not None:
                if _H + name not in kept:
                    kept[_H + name] = self._h(name, model[name].shape, dtype).copy()
                h = kept[_H + name].reshape(-1)
                h[block] -= self.alpha / (self.num_clients or self.round.num_clients) * holders * step
                mean = mean - h[block] / self.alpha
            yield name, block, mean
        self.memory.update(kept)

    def _h(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        h: Array | None = self.memory.get(_H + name)
        return np.zeros(shape, dtype) if h is None else h


def _without_bools(model: Tensors, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """A vote is not late in part."""
    return (piece for piece in pieces if model[piece[0]].dtype.kind != "b")

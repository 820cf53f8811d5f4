"""Averaging with control variates, which take the clients' drift out of their steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from fedbus.config import RoundConfig
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.mean import StreamingMean
from fedbus.strategies.optimizers import SGD
from fedbus.strategies.settings import check_none_is_too_late, count, positive
from fedbus.strategies.step import Step
from fedbus.strategies.weighting import WeightedStrategy, Weighting
from fedbus.types import Array, Config, ExtraSpec, Tensors, kept_dtype

_C = "c/"


@dataclass(kw_only=True)
class _Round:
    deltas: StreamingMean
    controls: StreamingMean
    num_updates: int = 0


class Scaffold(WeightedStrategy):
    """x <- x + eta_g mean(y_i - x); c <- c + |S|/N mean(c_i+ - c_i): clients step along g_i(y) - c_i + c.

    Karimireddy et al. 2020 (SCAFFOLD: Stochastic Controlled Averaging for Federated Learning), algorithm 1, equations 3
    to 5. c travels with each model, c_i stays with its client, and each update holds c_i+ - c_i, so that it is twice as
    large; the clients' half is in `fedbus.training.local` and `fedbus.training.torch`. Clients must take steps of SGD.

    A late update counts less for x by its staleness discount, and in full for c, which is to be the mean of the c_i. A
    client that is started anew must know its c_i, for c does: give it a state folder (`fedbus client --state DIR`).

    Args:
        server_learning_rate: eta_g; the paper's is 1.
        num_clients: N; None takes the members that the federation has when the round is opened.
        weighting: of the means, both of them, for otherwise the corrections would not cancel out. The paper's is
            "uniform": each client counts alike. "examples" minimises what FedAvg does, the loss over all examples.
            FLamby (Ogier du Terrail et al. 2022) has it that way, and its published figures need it; the c is then the
            weighted mean of the c_i where all clients are in each round.

    Raises:
        ConfigError: when an argument is out of its range.
    """

    needs_client_memory: ClassVar[bool] = True
    usual_weighting: ClassVar[Literal["examples", "uniform"]] = "uniform"

    def __init__(
        self,
        server_learning_rate: float = 1.0,
        *,
        num_clients: int | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        super().__init__(weighting=weighting, optimizer=SGD(positive("server_learning_rate", server_learning_rate)))
        self.num_clients = None if num_clients is None else count("num_clients", num_clients)

    def _settings(self) -> list[str]:
        num_clients = [] if self.num_clients is None else [f"num_clients={self.num_clients}"]
        return [*num_clients, *super()._settings()]

    def check(self, rounds: RoundConfig) -> None:
        super().check(rounds)
        check_none_is_too_late(self, rounds)

    def fit_config(self, round: int) -> Config:
        return {"scaffold": True}

    def broadcast(self, model: Tensors) -> Tensors:
        return {name: value for name, value in self.memory.items() if name.startswith(_C)}

    def extras(self, model: Tensors) -> Mapping[str, ExtraSpec]:
        return {_C + name: ExtraSpec(dtype=value.dtype, shape=value.shape) for name, value in self._controls(model)}

    def init(self, model: Tensors) -> _Round:
        controls = {_C + name: value for name, value in self._controls(model)}
        is_fine = callable(self.weighting)
        return _Round(deltas=StreamingMean(model, is_fine=is_fine), controls=StreamingMean(controls, is_fine=is_fine))

    def fold(self, state: _Round, update: ClientUpdate) -> None:
        weight = self.weight_of(update)
        state.num_updates += 1
        state.deltas.add_pieces(update.pieces(), factor=weight * update.discount, weight=weight)
        state.controls.add_pieces(update.extra_pieces(), factor=weight, weight=weight)

    def steps(self, state: _Round, model: Tensors) -> Iterator[Step]:
        self._move_controls(state, model)
        return state.deltas.steps(model)

    def _move_controls(self, state: _Round, model: Tensors) -> None:
        controls = {_C + name: value for name, value in self._controls(model)}
        share = state.num_updates / (self.num_clients or self.round.num_clients)
        moved = {name: value.copy() for name, value in controls.items()}
        for name, block, step in state.controls.steps(controls):
            moved[name].reshape(-1)[block] += share * step
        self.memory.update(moved)

    def _controls(self, model: Tensors) -> Iterator[tuple[str, Array]]:
        """Each tensor's name, and its c."""
        for name, value in model.items():
            dtype = kept_dtype(value.dtype)
            if dtype is not None:
                yield name, self.memory.get(_C + name, np.zeros(value.shape, dtype))

"""Federated averaging."""

from __future__ import annotations

from collections.abc import Iterator

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.mean import StreamingMean
from fedbus.strategies.step import Step
from fedbus.strategies.weighting import WeightedStrategy
from fedbus.types import Tensors


class FedAvg(WeightedStrategy):
    """w <- w + sum_k(n_k d_k) / sum_k(n_k), with d_k the delta of client k and n_k its number of examples.

    McMahan et al. 2017 (Communication-Efficient Learning of Deep Networks from Decentralized Data), algorithm 1,
    with the mean over those clients that sent the tensor. The d_k of a late update is multiplied by its staleness
    discount, which is not normalised away: where all updates are late, the model moves less. Exact, in whatever order
    the updates come, in the memory of a few models: `StreamingMean`. `StepStrategy` says what becomes of integer and
    bool tensors.

    Args:
        weighting: n_k: "examples", as is usual, "uniform" (each client alike), or a function of the update that gives a
            number of 0 or more.
        optimizer: how the server takes the mean as a step; None adds it to the model.

    Raises:
        ConfigError: when an argument is none of these.
    """

    def check(self, rounds: RoundConfig) -> None:
        if rounds.mixing is not None:
            raise ConfigError(
                "RoundConfig.asynchronous() is for FedAsync: leave the strategy out, or use RoundConfig.buffered(k)"
            )

    def init(self, model: Tensors) -> StreamingMean:
        return StreamingMean(model, is_fine=callable(self.weighting))

    def fold(self, state: StreamingMean, update: ClientUpdate) -> None:
        weight = self.weight_of(update)
        state.add(update, factor=weight * update.discount, weight=weight)

    def steps(self, state: StreamingMean, model: Tensors) -> Iterator[Step]:
        return state.steps(model)

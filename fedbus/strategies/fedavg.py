"""Federated averaging."""

from __future__ import annotations

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.mean import StreamingMean
from fedbus.types import Array, Tensors


class FedAvg(Strategy):
    """w <- w + sum_k(n_k d_k) / sum_k(n_k), with d_k the delta of client k and n_k its number of examples.

    McMahan et al. 2017 (Communication-Efficient Learning of Deep Networks from Decentralized Data), algorithm 1,
    with the mean over those clients that sent the tensor, and each n_k multiplied by the update's staleness
    discount. Exact, in whatever order the updates come, in the memory of a few models: `StreamingMean`, which also
    says what becomes of integer and bool tensors.
    """

    def __repr__(self) -> str:
        return "FedAvg()"

    def check(self, rounds: RoundConfig) -> None:
        if rounds.is_asynchronous and rounds.min_fit_clients == 1:
            raise ConfigError(
                "with one update a round FedAvg's weights cancel, and staleness would not count: leave the strategy "
                "out, or use RoundConfig.buffered(k)"
            )

    def init(self, model: Tensors) -> StreamingMean:
        return StreamingMean(model)

    def fold(self, state: StreamingMean, update: ClientUpdate) -> None:
        weight = update.num_examples * update.discount
        state.add(update, factor=weight, weight=weight)

    def finish(self, state: StreamingMean, model: Tensors) -> dict[str, Array]:
        return state.moved(model)

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
    with the mean over those clients that sent the tensor. The d_k of a late update is multiplied by its staleness
    discount, which is not normalised away: where all updates are late, the model moves less. Exact, in whatever order
    the updates come, in the memory of a few models: `StreamingMean`, which also says what becomes of integer and bool
    tensors.
    """

    def __repr__(self) -> str:
        return "FedAvg()"

    def check(self, rounds: RoundConfig) -> None:
        if rounds.mixing is not None:
            raise ConfigError(
                "RoundConfig.asynchronous() is for FedAsync: leave the strategy out, or use RoundConfig.buffered(k)"
            )

    def init(self, model: Tensors) -> StreamingMean:
        return StreamingMean(model)

    def fold(self, state: StreamingMean, update: ClientUpdate) -> None:
        state.add(update, factor=update.num_examples * update.discount, weight=update.num_examples)

    def finish(self, state: StreamingMean, model: Tensors) -> dict[str, Array]:
        return state.moved(model)

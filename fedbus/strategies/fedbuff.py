"""Buffered asynchronous aggregation."""

from __future__ import annotations

import math

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.mean import StreamingMean
from fedbus.types import Array, Tensors


class FedBuff(Strategy):
    """w <- w + eta_g (1/K) sum_i(s(tau_i) d_i), over the K updates of a round.

    Nguyen et al. 2022 (Federated Learning with Buffered Asynchronous Aggregation), algorithm 1, with d_i trained minus
    base, so that the sign is a plus, and with the staleness s(tau) of its section 5. Each client counts alike, however
    many examples it has, and a discount is not normalised away: where all updates are late, the model moves less. K
    is the number of those updates that hold the tensor.

    Exact, in whatever order the updates come, in the memory of a few models: `StreamingMean`, which also says what
    becomes of integer tensors, and that a bool takes the majority, each update with s(tau_i) votes.

    Args:
        server_learning_rate: eta_g.

    Raises:
        ConfigError: when `server_learning_rate` is not a positive number.
    """

    def __init__(self, server_learning_rate: float = 1.0) -> None:
        is_number = isinstance(server_learning_rate, int | float) and not isinstance(server_learning_rate, bool)
        if not (is_number and math.isfinite(server_learning_rate) and server_learning_rate > 0):
            raise ConfigError(f"server_learning_rate must be a positive number, not {server_learning_rate!r}")
        self.server_learning_rate = server_learning_rate

    def __repr__(self) -> str:
        return f"FedBuff(server_learning_rate={self.server_learning_rate})"

    def check(self, rounds: RoundConfig) -> None:
        if rounds.mixing is not None:
            raise ConfigError(
                "RoundConfig.asynchronous() is for FedAsync: leave the strategy out, or use RoundConfig.buffered(k) "
                "with FedBuff"
            )

    def init(self, model: Tensors) -> StreamingMean:
        return StreamingMean(model)

    def fold(self, state: StreamingMean, update: ClientUpdate) -> None:
        state.add(update, factor=update.discount, weight=1)

    def finish(self, state: StreamingMean, model: Tensors) -> dict[str, Array]:
        return state.moved(model, self.server_learning_rate)

"""Buffered asynchronous aggregation."""

from __future__ import annotations

from collections.abc import Iterator

from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.mean import StreamingMean
from fedbus.strategies.optimizers import SGD
from fedbus.strategies.settings import positive
from fedbus.strategies.step import Step, StepStrategy
from fedbus.types import Tensors


class FedBuff(StepStrategy):
    """w <- w + eta_g (1/K) sum_i(s(tau_i) d_i), over the K updates of a round.

    Nguyen et al. 2022 (Federated Learning with Buffered Asynchronous Aggregation), algorithm 1, with d_i trained minus
    base, so that the sign is a plus, and with the staleness s(tau) of its section 5. Each client counts alike, however
    many examples it has, and a discount is not normalised away: where all updates are late, the model moves less. K
    is the number of those updates that hold the tensor.

    Exact, in whatever order the updates come, in the memory of a few models: `StreamingMean`. `StepStrategy` says
    what becomes of integers, and that a bool takes the majority, here each update with s(tau_i) votes.

    Args:
        server_learning_rate: eta_g.

    Raises:
        ConfigError: when `server_learning_rate` is not a positive number.
    """

    def __init__(self, server_learning_rate: float = 1.0) -> None:
        super().__init__(optimizer=SGD(positive("server_learning_rate", server_learning_rate)))
        self.server_learning_rate = server_learning_rate

    def __repr__(self) -> str:
        return f"FedBuff(server_learning_rate={self.server_learning_rate})"

    def init(self, model: Tensors) -> StreamingMean:
        return StreamingMean(model)

    def fold(self, state: StreamingMean, update: ClientUpdate) -> None:
        state.add(update, factor=update.discount, weight=1)

    def steps(self, state: StreamingMean, model: Tensors) -> Iterator[Step]:
        return state.steps(model)

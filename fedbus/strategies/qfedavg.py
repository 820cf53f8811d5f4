"""Fair averaging: who has the larger loss pulls harder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final, Literal

from fedbus.errors import UpdateRefused
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.mean import StreamingMean
from fedbus.strategies.metrics import reported
from fedbus.strategies.norms import squared_norm
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.settings import not_negative, positive
from fedbus.strategies.step import Step
from fedbus.strategies.weighting import WeightedStrategy, Weighting
from fedbus.types import Tensors

METRIC: Final = "loss"
"""Under which a client reports F_k(w)."""

LEAST_LOSS: Final = 1e-10
"""Added to each loss, as the authors' code does: F^(q-1) is to be finite."""

MAX_PULL: Final = 2.0**64
"""F^q beyond this is a mistake or an attack."""


class QFedAvg(WeightedStrategy):
    """w <- w + sum_k(F_k^q d_k) / sum_k(F_k^q + q F_k^(q-1) L ||d_k||^2), with d_k the delta of client k, F_k its loss
    at the model that it received, and L = 1 / `client_learning_rate`.

    Li et al. 2020 (Fair Resource Allocation in Federated Learning), algorithm 2 (q-FedAvg), with both sums divided by
    L: its Delta_k is -L F_k^q d_k, its h_k is q F_k^(q-1) ||L d_k||^2 + L F_k^q. The larger q, the more uniform the
    clients' losses; q = 0 is the plain mean.

    Each fit must report F_k as the metric "loss", a float of 0 or more: the loss of the received model on the
    client's training data, before it trains. An update without it is refused, and its sender told why.

    ||d_k|| is over all floating tensors that the client sent, the sums over those clients that sent the tensor. A
    late update's d_k is multiplied by its discount in the upper sum. Exact in whatever order the updates come.

    Args:
        q: 0 or more.
        client_learning_rate: with which the clients train.
        weighting: "uniform" is the paper's; others multiply both F_k^q and h_k.
        optimizer: how the server takes the step; None adds it to the model.
    """

    usual_weighting: ClassVar[Literal["examples", "uniform"]] = "uniform"

    def __init__(
        self,
        q: float = 0.2,
        client_learning_rate: float = 0.1,
        *,
        weighting: Weighting | None = None,
        optimizer: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(weighting=weighting, optimizer=optimizer)
        self.q = not_negative("q", q)
        self.client_learning_rate = positive("client_learning_rate", client_learning_rate)

    def _settings(self) -> list[str]:
        return [f"q={self.q}", f"client_learning_rate={self.client_learning_rate}", *super()._settings()]

    def verify(self, update: ClientUpdate) -> None:
        super().verify(update)
        loss = reported(update.metrics, METRIC)
        if loss is None or not 0 <= loss <= MAX_PULL ** (1 / max(self.q, 1)):
            raise UpdateRefused(f"QFedAvg needs the metric {METRIC!r}: what the received model lost before training")

    def init(self, model: Tensors) -> StreamingMean:
        return StreamingMean(model, is_fine=True)

    def fold(self, state: StreamingMean, update: ClientUpdate) -> None:
        weight, loss = self.weight_of(update), float(update.metrics[METRIC]) + LEAST_LOSS
        pull = weight * loss**self.q
        curvature = self.q * pull / loss * squared_norm(update) / self.client_learning_rate if self.q else 0.0
        state.add(update, factor=pull * update.discount, weight=pull + curvature)

    def steps(self, state: StreamingMean, model: Tensors) -> Iterator[Step]:
        return state.steps(model)

"""Federated averaging of what was trained with a proximal term, for as long as there was time."""

from __future__ import annotations

from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.settings import not_negative, positive
from fedbus.strategies.weighting import Weighting
from fedbus.types import Config


class FedProx(FedAvg):
    """Each client minimises f_k(w) + mu/2 ||w - w_t||^2, as far as it comes; the server averages as in `FedAvg`.

    Li et al. 2020 (Federated Optimization in Heterogeneous Networks), algorithm 2 and eq. 2. The clients' half is in
    `fedbus.training.local` and `fedbus.training.torch`, which find "proximal_mu" and "budget_s" in the fit config.

    Args:
        mu: the proximal term's strength; the paper tries 0.001, 0.01, 0.1, 0.5 and 1. With 0 it is FedAvg.
        budget_s: seconds after which a client sends what it has trained by then, instead of making the round wait;
            None for no such limit.
        weighting, optimizer: as in `FedAvg`.

    Raises:
        ConfigError: when `mu` is negative, or `budget_s` not a positive number.
    """

    def __init__(
        self,
        mu: float = 0.1,
        *,
        budget_s: float | None = None,
        weighting: Weighting | None = None,
        optimizer: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(weighting=weighting, optimizer=optimizer)
        self.mu = not_negative("mu", mu)
        self.budget_s = None if budget_s is None else positive("budget_s", budget_s)

    def _settings(self) -> list[str]:
        budget = [] if self.budget_s is None else [f"budget_s={self.budget_s:g}"]
        return [f"mu={self.mu:g}", *budget, *super()._settings()]

    def fit_config(self, round: int) -> Config:
        budget: Config = {} if self.budget_s is None else {"budget_s": self.budget_s}
        return {"proximal_mu": self.mu, **budget}

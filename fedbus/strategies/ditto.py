"""Federated averaging beside which every client trains a model of its own."""

from __future__ import annotations

from typing import ClassVar

from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.settings import not_negative
from fedbus.strategies.weighting import Weighting
from fedbus.types import Config


class Ditto(FedAvg):
    """Each client also minimises f_k(v_k) + lambda/2 ||v_k - w||^2 for a v_k of its own, which stays with it.

    Li et al. 2021 (Ditto: Fair and Robust Federated Learning Through Personalization), algorithm 1. The server averages
    as in `FedAvg`; the clients' half, `PersonalTraining` in `fedbus.training.local` and `fedbus.training.torch`, finds
    "ditto_lambda" in the fit config.

    Args:
        lambda_: how near v_k stays to w: with 0 each client trains alone, and the larger it is the nearer.
        weighting, optimizer: as in `FedAvg`.

    Raises:
        ConfigError: when `lambda_` is negative.
    """

    needs_client_memory: ClassVar[bool] = True

    def __init__(
        self,
        lambda_: float = 0.1,
        *,
        weighting: Weighting | None = None,
        optimizer: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(weighting=weighting, optimizer=optimizer)
        self.lambda_ = not_negative("lambda_", lambda_)

    def _settings(self) -> list[str]:
        return [f"lambda_={self.lambda_:g}", *super()._settings()]

    def fit_config(self, round: int) -> Config:
        return {"ditto_lambda": self.lambda_}

"""Federated XGBoost in turn: one client after the other goes on with the same booster."""

from __future__ import annotations

from fedbus.config import Cyclic, RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.xgboost_bagging import TreeStrategy


class XGBCyclic(TreeStrategy):
    """F <- F + f_k, with k the client whose turn it is: sequential training, which moves to other data in each round.

    As the cyclic mode of NVIDIA FLARE's tree-based XGBoost and of Flower's FedXgbCyclic, after cyclic weight transfer
    (Chang et al. 2018, Distributed deep learning networks among institutions for medical imaging). Clients use the
    learning rate as it is. It needs `RoundConfig.cyclic`, in which one client at a time is asked. The leaves of a late
    update are multiplied with its staleness discount.

    Args:
        local_rounds, max_bytes: as in `TreeStrategy`.
    """

    def __repr__(self) -> str:
        return f"XGBCyclic(local_rounds={self.local_rounds})"

    def check(self, rounds: RoundConfig) -> None:
        if not isinstance(rounds.selection, Cyclic) or rounds.min_fit_clients != 1 or rounds.is_asynchronous:
            raise ConfigError("XGBCyclic asks one client after the other: set rounds=RoundConfig.cyclic(num_clients)")

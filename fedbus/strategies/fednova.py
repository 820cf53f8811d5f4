"""Normalised averaging."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from fedbus.errors import ConfigError, UpdateRefused
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.exact import smallest_units
from fedbus.strategies.mean import StreamingMean
from fedbus.strategies.metrics import reported
from fedbus.strategies.settings import decay
from fedbus.strategies.step import Step
from fedbus.strategies.weighting import WeightedStrategy
from fedbus.types import Config, Tensors

METRIC: Final = "a_norm"
"""Under which a client reports ||a_k||_1."""

MAX_NORM: Final = 2.0**40
"""Nobody takes so many local steps between two rounds."""


@dataclass
class _Sums:
    mean: StreamingMean
    norms: dict[str, int] = field(default_factory=dict)  # sum_k(n_k ||a_k||_1) of a tensor, in smallest units
    weights: dict[str, int] = field(default_factory=dict)

    def tau_eff(self, name: str) -> float:
        return self.norms[name] / self.weights[name]


class FedNova(WeightedStrategy):
    """w <- w + tau_eff sum_k(p_k d_k / ||a_k||_1), tau_eff = sum_k(p_k ||a_k||_1), p_k = n_k / sum(n).

    Wang et al. 2020 (Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization), FedNova:
    the paper's update rule with w_k = p_k. d_k is the delta of client k, -eta_l ||a_k||_1 times what the paper calls
    d_k. Clients that take more local steps than others then pull no harder.

    Each fit must report ||a_k||_1 as the metric "a_norm", a float: the number of its local steps for plain SGD, and
    what `a_norm` computes with momentum or a proximal term. An update without it is refused, and its sender told why.

    p_k and tau_eff are taken over those that sent the tensor; late updates, order, integers and bools are as in
    `FedAvg`. The paper's slow momentum on the server is optimizer=Momentum(1.0, beta).

    Args:
        weighting: n_k, as in `FedAvg`.
        optimizer: how the server takes the step; None adds it to the model.
    """

    def fit_config(self, round: int) -> Config:
        return {"fednova": True}

    def verify(self, update: ClientUpdate) -> None:
        super().verify(update)
        norm = reported(update.metrics, METRIC)
        if norm is None or not 0 < norm <= MAX_NORM:
            raise UpdateRefused(
                f"FedNova needs the metric {METRIC!r}: ||a||_1 of the local steps, their number for plain SGD"
            )

    def init(self, model: Tensors) -> _Sums:
        return _Sums(StreamingMean(model, is_fine=self.weighting != "examples"))

    def fold(self, state: _Sums, update: ClientUpdate) -> None:
        norm, weight = float(update.metrics[METRIC]), self.weight_of(update)
        if weight == 0:
            return
        for name in update.delta:
            state.norms[name] = state.norms.get(name, 0) + smallest_units(weight * norm)
            state.weights[name] = state.weights.get(name, 0) + smallest_units(weight)
        state.mean.add(update, factor=weight * update.discount / norm, weight=weight)

    def steps(self, state: _Sums, model: Tensors) -> Iterator[Step]:
        for name, block, step in state.mean.steps(model):
            if model[name].dtype.kind != "b":  # votes are as many as they are
                step *= state.tau_eff(name)
            yield name, block, step


def a_norm(steps: int, *, momentum: float = 0.0, proximal: float = 0.0) -> float:
    """||a||_1 after so many local steps of SGD: the weights with which their gradients went into the delta, summed.

    Wang et al. 2020, in the paper's examples of local solvers: with `momentum` rho it is
    (steps - rho (1 - rho^steps) / (1 - rho)) / (1 - rho); with a proximal term, `proximal` = eta_l mu,
    (1 - (1 - proximal)^steps) / proximal; with neither, `steps`.

    Raises:
        ConfigError: when one of the two is not in [0, 1), or both are above 0.
    """
    rho, alpha = decay("momentum", momentum), decay("proximal", proximal)
    if rho and alpha:
        raise ConfigError("a_norm knows momentum, or a proximal term, not both at a time")
    if alpha:
        return -math.expm1(steps * math.log1p(-alpha)) / alpha
    return (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)

"""Federated averaging whose mean is a step that a server optimizer takes."""

from __future__ import annotations

from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.optimizers import Adagrad, Adam, Momentum, ServerOptimizer, Yogi
from fedbus.strategies.settings import positive
from fedbus.strategies.weighting import Weighting


class FedOpt(FedAvg):
    """w <- ServerOpt(w, D), with D the mean of the deltas that FedAvg takes.

    Reddi et al. 2021 (Adaptive Federated Optimization), algorithm 1. What the optimizer remembers is in each
    checkpoint. Late updates and order are as in `FedAvg`, integers and bools as in `StepStrategy`.

    Args:
        optimizer: `SGD`, `Momentum`, `Adagrad`, `Adam`, `Yogi`, or one's own `ServerOptimizer`.
        weighting: as in `FedAvg`.
    """

    def __init__(self, optimizer: ServerOptimizer, *, weighting: Weighting | None = None) -> None:
        super().__init__(weighting=weighting, optimizer=optimizer)


class FedAvgM(FedOpt):
    """m <- beta m + D; w <- w + eta m, with D the mean of the deltas.

    Hsu et al. 2019 (Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification),
    whose beta is 0.9.

    Args:
        server_learning_rate: eta.
        server_momentum: beta, in [0, 1).
        weighting: as in `FedAvg`.
    """

    def __init__(
        self,
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.9,
        *,
        weighting: Weighting | None = None,
    ) -> None:
        eta = positive("server_learning_rate", server_learning_rate)
        super().__init__(Momentum(eta, server_momentum), weighting=weighting)


class FedAdagrad(FedOpt):
    """v <- v + D^2; m <- beta_1 m + (1 - beta_1) D; w <- w + eta m / (sqrt(v) + tau), with D the mean of the deltas.

    Reddi et al. 2021, algorithm 2. There beta_1 is 0 for Adagrad, v begins at tau**2 or above, and eta and tau are
    tuned for each task: 0.1 and 0.001 are places to begin at. Other implementations (FLamby: beta_1 0.9, tau 1e-8)
    begin with v = 0: initial_v=0.

    Args:
        server_learning_rate: eta.
        beta_1: the decay of m, in [0, 1).
        tau: how adaptive it is: the less, the more.
        initial_v: what v is before the first round; None means tau**2.
        weighting: as in `FedAvg`.
    """

    def __init__(
        self,
        server_learning_rate: float = 0.1,
        *,
        beta_1: float = 0.0,
        tau: float = 1e-3,
        initial_v: float | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        eta = positive("server_learning_rate", server_learning_rate)
        super().__init__(Adagrad(eta, beta_1=beta_1, tau=tau, initial_v=initial_v), weighting=weighting)


class FedAdam(FedOpt):
    """v <- beta_2 v + (1 - beta_2) D^2; m <- beta_1 m + (1 - beta_1) D; w <- w + eta m / (sqrt(v) + tau), with D the
    mean of the deltas.

    Reddi et al. 2021, algorithm 2: without a correction of the start. There beta_1 is 0.9 and beta_2 0.99, v begins
    at tau**2 or above, and eta and tau are tuned for each task: 0.1 and 0.001 are places to begin at. Other
    implementations (FLamby: beta_2 0.999, tau 1e-8) begin with v = 0: initial_v=0.

    Args:
        server_learning_rate: eta.
        beta_1: the decay of m, in [0, 1).
        beta_2: the decay of v, in [0, 1).
        tau: how adaptive it is: the less, the more.
        initial_v: what v is before the first round; None means tau**2.
        weighting: as in `FedAvg`.
    """

    def __init__(
        self,
        server_learning_rate: float = 0.1,
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        initial_v: float | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        eta = positive("server_learning_rate", server_learning_rate)
        adam = Adam(eta, beta_1=beta_1, beta_2=beta_2, tau=tau, initial_v=initial_v)
        super().__init__(adam, weighting=weighting)


class FedYogi(FedOpt):
    """v <- v - (1 - beta_2) D^2 sign(v - D^2); m <- beta_1 m + (1 - beta_1) D; w <- w + eta m / (sqrt(v) + tau), with
    D the mean of the deltas.

    Reddi et al. 2021, algorithm 2. There beta_1 is 0.9 and beta_2 0.99, v begins at tau**2 or above, and eta and tau
    are tuned for each task: 0.01 and 0.001 are places to begin at. Other implementations (FLamby: beta_2 0.999, tau
    1e-8) begin with v = 0: initial_v=0.

    Args:
        server_learning_rate: eta.
        beta_1: the decay of m, in [0, 1).
        beta_2: how little v follows D^2 in one round, in [0, 1).
        tau: how adaptive it is: the less, the more.
        initial_v: what v is before the first round; None means tau**2.
        weighting: as in `FedAvg`.
    """

    def __init__(
        self,
        server_learning_rate: float = 0.01,
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        initial_v: float | None = None,
        weighting: Weighting | None = None,
    ) -> None:
        eta = positive("server_learning_rate", server_learning_rate)
        yogi = Yogi(eta, beta_1=beta_1, beta_2=beta_2, tau=tau, initial_v=initial_v)
        super().__init__(yogi, weighting=weighting)

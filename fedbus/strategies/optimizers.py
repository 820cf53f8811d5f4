"""How a server takes a step: plainly, with momentum, or with a rate for each element."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.settings import decay, not_negative, positive

Block: TypeAlias = NDArray[np.float64]
"""Some elements of a tensor, 1-d; a complex tensor's are pairs of reals."""


class ServerOptimizer(ABC):
    """Takes the step of a round, element by element, in float64.

    What it remembers of an element is in slots: tensors like the model's, which the strategy keeps from round to
    round. A tensor that nobody sent in a round rests, its slots too.
    """

    @property
    def slots(self) -> Mapping[str, float]:
        """The name of each slot, and what its elements are before the first round."""
        return {}

    @property
    def whole_rate(self) -> float:
        """What integers take of the step before it is rounded: a counter has no use for momentum or a scale."""
        return 1.0

    @abstractmethod
    def moved(self, values: Block, step: Block, slots: Mapping[str, Block]) -> Block:
        """`values` of the model after `step`; writes the elements' new `slots` in place, and may use up the others."""


@dataclass(frozen=True)
class SGD(ServerOptimizer):
    """w <- w + eta d: Reddi et al. 2021, algorithm 1, with SGD on the server.

    Args:
        learning_rate: eta.
    """

    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)

    @property
    def whole_rate(self) -> float:
        return self.learning_rate

    def moved(self, values: Block, step: Block, slots: Mapping[str, Block]) -> Block:
        step *= self.learning_rate
        step += values
        return step


@dataclass(frozen=True)
class Momentum(ServerOptimizer):
    """m <- beta m + d; w <- w + eta m.

    Hsu et al. 2019 (Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification),
    section 4.3. The first round finds m = 0.

    Args:
        learning_rate: eta.
        beta: in [0, 1).
    """

    learning_rate: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        decay("beta", self.beta)

    @property
    def slots(self) -> Mapping[str, float]:
        return {"m": 0.0}

    def moved(self, values: Block, step: Block, slots: Mapping[str, Block]) -> Block:
        m = slots["m"]
        m *= self.beta
        m += step
        return values + self.learning_rate * m


@dataclass(frozen=True)
class _Adaptive(ServerOptimizer):
    """m <- beta_1 m + (1 - beta_1) d; v as `_second`; w <- w + eta m / (sqrt(v) + tau).

    The first round finds m = 0 and v = `initial_v`. Nothing is corrected for that start.
    """

    learning_rate: float = 0.1
    _: KW_ONLY
    beta_1: float = 0.9
    tau: float = 1e-3
    initial_v: float | None = None

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)
        decay("beta_1", self.beta_1)
        positive("tau", self.tau)
        if self.initial_v is not None:
            not_negative("initial_v", self.initial_v)

    @property
    def slots(self) -> Mapping[str, float]:
        return {"m": 0.0, "v": self.tau**2 if self.initial_v is None else self.initial_v}

    def moved(self, values: Block, step: Block, slots: Mapping[str, Block]) -> Block:
        m, v = slots["m"], slots["v"]
        self._take_second(v, step * step)
        m *= self.beta_1
        step *= 1 - self.beta_1
        m += step
        return values + self.learning_rate * m / (np.sqrt(v) + self.tau)

    @abstractmethod
    def _take_second(self, v: Block, square: Block) -> None:
        """Make v that of this round, in place; `square` is d**2."""


@dataclass(frozen=True)
class Adagrad(_Adaptive):
    """v <- v + d^2: FedAdagrad's server half. Reddi et al. 2021 (Adaptive Federated Optimization), algorithm 2.

    m <- beta_1 m + (1 - beta_1) d; w <- w + eta m / (sqrt(v) + tau), all element by element, without a correction of
    the start.

    Args:
        learning_rate: eta.
        beta_1: the decay of m, in [0, 1); 0 is the Adagrad without momentum.
        tau: how adaptive it is: the less, the more.
        initial_v: what v is before the first round; None means tau**2, the least that the paper allows. Some
            implementations begin at 0.
    """

    _: KW_ONLY
    beta_1: float = 0.0

    def _take_second(self, v: Block, square: Block) -> None:
        v += square


@dataclass(frozen=True)
class _Forgetful(_Adaptive):
    """v follows d^2 with the decay `beta_2`, in place of adding it up."""

    _: KW_ONLY
    beta_2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        decay("beta_2", self.beta_2)


@dataclass(frozen=True)
class Adam(_Forgetful):
    """v <- beta_2 v + (1 - beta_2) d^2: FedAdam's server half. Reddi et al. 2021, algorithm 2.

    m <- beta_1 m + (1 - beta_1) d; w <- w + eta m / (sqrt(v) + tau), all element by element, without a correction of
    the start.

    Args:
        learning_rate: eta.
        beta_1: the decay of m, in [0, 1).
        beta_2: the decay of v, in [0, 1).
        tau: how adaptive it is: the less, the more.
        initial_v: what v is before the first round; None means tau**2, the least that the paper allows. Some
            implementations begin at 0.
    """

    def _take_second(self, v: Block, square: Block) -> None:
        v *= self.beta_2
        square *= 1 - self.beta_2
        v += square


@dataclass(frozen=True)
class Yogi(_Forgetful):
    """v <- v - (1 - beta_2) d^2 sign(v - d^2): FedYogi's server half. Reddi et al. 2021, algorithm 2.

    m <- beta_1 m + (1 - beta_1) d; w <- w + eta m / (sqrt(v) + tau), all element by element, without a correction of
    the start.

    Args:
        learning_rate: eta.
        beta_1: the decay of m, in [0, 1).
        beta_2: how little v follows d^2 in one round, in [0, 1).
        tau: how adaptive it is: the less, the more.
        initial_v: what v is before the first round; None means tau**2, the least that the paper allows. Some
            implementations begin at 0.
    """

    learning_rate: float = 0.01

    def _take_second(self, v: Block, square: Block) -> None:
        direction = np.sign(v - square)
        square *= 1 - self.beta_2
        square *= direction
        v -= square

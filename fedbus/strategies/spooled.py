"""What strategies have in common that see all updates of a round before they take a step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedbus.config import RoundConfig
from fedbus.errors import AggregateRefused, ConfigError
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.blas import calls_in_one_thread
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.settings import whole
from fedbus.strategies.spool import Block, Spool
from fedbus.strategies.step import Step, StepStrategy
from fedbus.types import Tensors


class SpooledStrategy(StepStrategy):
    """Updates go to a file as they come and are read block by block: memory does not grow with their number.

    The file is in `folder`, takes the model's size for each update, and is gone when the round is.
    """

    reads: ClassVar[int] = 1
    """How often an update is read, at most."""

    @property
    def needed(self) -> tuple[int, str]:
        """The fewest updates that it can work with, and in which words."""
        return 1, "an update"

    @property
    def is_quick(self) -> bool:
        return False  # all updates are sorted, or multiplied with one another

    def check(self, rounds: RoundConfig) -> None:
        super().check(rounds)
        check_needed(self, *self.needed, rounds)

    def init(self, model: Tensors) -> Spool:
        return Spool(model, self.folder, self.report)

    def fold(self, state: Spool, update: ClientUpdate) -> None:
        state.add(update)

    def steps(self, state: Spool, model: Tensors) -> Iterator[Step]:
        with closing(state):
            require(self, *self.needed, len(state))
            state.expect(self.reads * len(state))
            yield from self.reduced(state, model)

    @abstractmethod
    def reduced(self, spool: Spool, model: Tensors) -> Iterator[Step]:
        """What `steps` is to yield; the spool is closed afterwards."""


class ByzantineStrategy(SpooledStrategy):
    """One that bears `f` hostile updates in a round, and reads them twice: for their distances, and for their mean."""

    reads = 2

    def __init__(self, f: int, *, optimizer: ServerOptimizer | None = None) -> None:
        super().__init__(optimizer=optimizer)
        self.f = whole("f", f, least=0)

    def _settings(self) -> list[str]:
        return [f"f={self.f}", *super()._settings()]


def check_needed(strategy: object, least: int, words: str, rounds: RoundConfig) -> None:
    """Raise `ConfigError` where rounds close before enough updates can have come; with `grace_s` more may."""
    if rounds.grace_s == 0 and rounds.min_fit_clients < least:
        raise ConfigError(
            f"{strategy!r} needs {words} in a round, and rounds close with min_fit_clients={rounds.min_fit_clients}: "
            "raise that, or set the strategy for so few (a larger beta, a smaller f)"
        )


def require(strategy: object, least: int, words: str, came: int) -> None:
    """Raise `AggregateRefused` unless as many updates came as it needs."""
    if came < least:
        raise AggregateRefused(f"{strategy!r} needs {words}, {came} came")


def discounts_of(updates: Sequence[ClientUpdate]) -> NDArray[np.float64]:
    """What each update still counts."""
    return np.array([update.discount for update in updates], np.float64)


def stepped(
    spool: Spool,
    model: Tensors,
    work: Callable[[Block], NDArray[np.float64]],
    *,
    rows: Sequence[int] | None = None,
    is_wide: bool = False,
) -> Iterator[Step]:
    """The step that `work` makes of each block, as reals."""
    with calls_in_one_thread(), closing(spool.reduce(work, rows=rows, is_wide=is_wide)) as results:
        for name, at, reals in results:
            yield name, at, reals.view(np.complex128) if model[name].dtype.kind == "c" else reals


def weighted_mean(spool: Spool, model: Tensors, weights: NDArray[np.float64]) -> Iterator[Step]:
    """sum_i(w_i s_i d_i) / sum_i(w_i) over the updates that hold the tensor, with s_i the discount of d_i.

    `weights` has those of all updates; those that weigh nothing are not read.
    """
    mean = mean_of(weights, discounts_of(spool.updates()))
    return stepped(spool, model, mean, rows=np.flatnonzero(weights).tolist(), is_wide=True)


def mean_of(weights: NDArray[np.float64], discounts: NDArray[np.float64]) -> Callable[[Block], NDArray[np.float64]]:
    """The mean of `weighted_mean`, of one block of float64."""

    def mean(block: Block) -> NDArray[np.float64]:
        weight = weights[block.rows]
        total: NDArray[np.float64] = np.dot(weight * discounts[block.rows], block.values)
        total /= weight.sum()
        return total

    return mean

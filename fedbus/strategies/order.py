"""Coordinate-wise order statistics: the median and the trimmed mean."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbus.errors import ConfigError
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.spool import Block, Spool
from fedbus.strategies.spooled import SpooledStrategy, discounts_of, stepped
from fedbus.strategies.step import Step
from fedbus.types import Array, Tensors

_SLACK: Final = 1e-9
"""What float64 may take from a whole number of updates."""
_MOST: Final = 2.0**53
"""More updates than anybody has: a beta below its inverse cuts off none of any number."""


class Median(SpooledStrategy):
    """w_j <- w_j + med_i(d_ij), for each coordinate j on its own.

    Yin et al. 2018 (Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates), definition 1 and
    algorithm 1, option I; of an even number the mean of the two in the middle. While fewer than half of the updates
    are hostile, each coordinate stays within the range of the honest ones. Each client counts alike, however many
    examples it has. Over the updates that hold the tensor; the d_i of a late update is multiplied by its discount.
    The real and the imaginary part of a complex number are two coordinates.

    Args:
        optimizer: takes the step.
    """

    def reduced(self, spool: Spool, model: Tensors) -> Iterator[Step]:
        discounts = discounts_of(spool.updates())

        def work(block: Block) -> NDArray[np.float64]:
            block.discount(discounts)
            return middle(block.columns_sorted())

        return stepped(spool, model, work)


class TrimmedMean(SpooledStrategy):
    """w_j <- w_j + the mean of the d_ij without the b largest and the b smallest, for each coordinate j on its own.

    Yin et al. 2018 (Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates), definition 2 and
    algorithm 1, option II: b = beta n, rounded down, of the n updates that hold the tensor. While at most b of them
    are hostile, each coordinate stays within the range of the honest ones. Each client counts alike, however many
    examples it has. The d_i of a late update is multiplied by its discount. The real and the imaginary part of a
    complex number are two coordinates.

    Args:
        beta: share that is cut off at each end, in [0, 1/2); it must be no less than the share of hostile clients.
        optimizer: takes the step.

    Raises:
        ConfigError: when `beta` is out of its range.
    """

    def __init__(self, beta: float = 0.2, *, optimizer: ServerOptimizer | None = None) -> None:
        if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 <= beta < 0.5:
            raise ConfigError(f"beta must be a number from 0 to less than 0.5, not {beta!r}")
        super().__init__(optimizer=optimizer)
        self.beta = beta

    def _settings(self) -> list[str]:
        return [f"beta={self.beta}", *super()._settings()]

    @property
    def needed(self) -> tuple[int, str]:
        least = math.ceil(min((1 - _SLACK) / self.beta, _MOST)) if self.beta else 1
        return least, f"{least} updates to cut off any"

    def reduced(self, spool: Spool, model: Tensors) -> Iterator[Step]:
        discounts = discounts_of(spool.updates())

        def work(block: Block) -> NDArray[np.float64]:
            block.discount(discounts)
            columns = block.columns_sorted()
            cut = cut_of(self.beta, columns.shape[1])
            return row_means(columns[:, cut : columns.shape[1] - cut])

        return stepped(spool, model, work)


def cut_of(beta: float, count: int) -> int:
    """beta times `count`, rounded down; 0.29 times 100 is 29, whatever float64 makes of it."""
    return math.floor(beta * count + _SLACK)


def middle(columns: Array) -> NDArray[np.float64]:
    """The median of each row, whose values ascend."""
    count = columns.shape[1]
    return row_means(columns[:, (count - 1) // 2 : count // 2 + 1])


def row_means(columns: Array) -> NDArray[np.float64]:
    """The mean of each row, summed in float64."""
    means: NDArray[np.float64] = np.einsum("ij->i", columns, dtype=np.float64)  # twice as fast as np.sum
    means /= columns.shape[1]
    return means

"""Bulyan: Krum, and then a trimmed mean of what it selects."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.gram import gram_matrix, squared_distances
from fedbus.strategies.krum import krum_scores
from fedbus.strategies.order import middle, row_means
from fedbus.strategies.spool import Block, Spool
from fedbus.strategies.spooled import ByzantineStrategy, discounts_of, stepped
from fedbus.strategies.step import Step
from fedbus.types import Array, Tensors


class Bulyan(ByzantineStrategy):
    """Krum selects n - 2f updates, one after the other; each coordinate takes the mean of the n - 4f of them that are
    nearest to their median.

    El Mhamdi et al. 2018 (The Hidden Vulnerability of Distributed Learning in Byzantium), with Krum; it bears f hostile
    updates of n >= 4f + 3. After each selection scores are taken anew among those that remain, of the n' - f - 2
    nearest of n' (of one at least). Ties go to the first by (client_id, task_id), and to the smaller values. Of the
    selected only those that hold a tensor count for it, and 2f of them are left out there, too. For distances and
    discounts see `Krum`.

    Args:
        f: hostile updates in a round, at most.
        optimizer: takes the step.

    Raises:
        ConfigError: when `f` is no whole number of 0 or more.
    """

    @property
    def needed(self) -> tuple[int, str]:
        return 4 * self.f + 3, f"4f + 3 = {4 * self.f + 3} updates"

    def reduced(self, spool: Spool, model: Tensors) -> Iterator[Step]:
        chosen = bulyan_selection(squared_distances(gram_matrix(spool)), self.f)
        spool.expect(len(spool) + len(chosen))
        discounts = discounts_of(spool.updates())

        def work(block: Block) -> NDArray[np.float64]:
            block.discount(discounts)
            columns = block.columns_sorted()
            return near_median(columns, max(columns.shape[1] - 2 * self.f, 1))

        return stepped(spool, model, work, rows=chosen)


def bulyan_selection(distances: NDArray[np.float64], f: int) -> list[int]:
    """The n - 2f rows that Krum takes one after the other, in ascending order."""
    remaining, chosen = list(range(len(distances))), []
    for _ in range(len(distances) - 2 * f):
        scores = krum_scores(distances[np.ix_(remaining, remaining)], f)
        chosen.append(remaining.pop(int(np.argmin(scores))))
    return sorted(chosen)


def near_median(columns: Array, count: int) -> NDArray[np.float64]:
    """The mean of the `count` values of each row that are nearest to its median; the rows ascend."""
    median = middle(columns)
    # The nearest lie side by side; the further end of such a run says how near it is as a whole.
    rows = np.ascontiguousarray(columns.T)
    nearest, reach = np.zeros(len(columns), np.intp), np.full(len(columns), np.inf)
    for first in range(columns.shape[1] - count + 1):
        further = np.maximum(median - rows[first], rows[first + count - 1] - median)
        np.copyto(nearest, first, where=further < reach)
        np.minimum(reach, further, out=reach)
    runs = np.lib.stride_tricks.sliding_window_view(columns, count, axis=1)
    return row_means(runs[np.arange(len(columns)), nearest])

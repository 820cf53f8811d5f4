"""Krum and Multi-Krum: the updates that have the most others near them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.gram import gram_matrix, squared_distances
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.settings import whole
from fedbus.strategies.spool import Spool
from fedbus.strategies.spooled import ByzantineStrategy, weighted_mean
from fedbus.strategies.step import Step
from fedbus.types import Tensors


class Krum(ByzantineStrategy):
    """w <- w + d_i, with i the update whose n - f - 2 nearest others are nearest, in squared distance.

    Blanchard et al. 2017 (Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent), the Krum function;
    it bears f hostile updates of n >= 2f + 3. Of several with one score the first by (client_id, task_id) is taken.
    Floating and complex tensors make the distance, where a tensor that an update does not hold is a step of zero; the
    others come along. The d_i of a late update is multiplied by its discount beforehand.

    Args:
        f: hostile updates in a round, at most.
        optimizer: takes the step.

    Raises:
        ConfigError: when `f` is no whole number of 0 or more.
    """

    @property
    def needed(self) -> tuple[int, str]:
        return 2 * self.f + 3, f"2f + 3 = {2 * self.f + 3} updates"

    def reduced(self, spool: Spool, model: Tensors) -> Iterator[Step]:
        chosen = self._chosen(krum_scores(squared_distances(gram_matrix(spool)), self.f))
        spool.expect(len(spool) + len(chosen))
        weights = np.zeros(len(spool))
        weights[chosen] = 1
        return weighted_mean(spool, model, weights)

    def _chosen(self, scores: NDArray[np.float64]) -> list[int]:
        return [int(np.argmin(scores))]


class MultiKrum(Krum):
    """w <- w + the mean of the m updates that `Krum` prefers.

    Blanchard et al. 2017 (Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent), Multi-Krum. Each of
    them counts alike, however many examples it has; a tensor takes the mean of those that hold it.

    Args:
        f: hostile updates in a round, at most; n >= 2f + 3.
        m: how many are averaged, at most n - f; None: n - f, all but as many as may be hostile.
        optimizer: takes the step.

    Raises:
        ConfigError: when `f` or `m` is out of its range.
    """

    def __init__(self, f: int, m: int | None = None, *, optimizer: ServerOptimizer | None = None) -> None:
        super().__init__(f, optimizer=optimizer)
        self.m = None if m is None else whole("m", m, least=1)

    def _settings(self) -> list[str]:
        f, *others = super()._settings()
        return [f, *([] if self.m is None else [f"m={self.m}"]), *others]

    @property
    def needed(self) -> tuple[int, str]:
        least, words = super().needed
        if self.m is None or self.m + self.f <= least:
            return least, words
        return self.m + self.f, f"m + f = {self.m + self.f} updates"

    def _chosen(self, scores: NDArray[np.float64]) -> list[int]:
        count = len(scores) - self.f if self.m is None else self.m
        return sorted(np.argsort(scores, kind="stable")[:count].tolist())


def krum_scores(distances: NDArray[np.float64], f: int) -> NDArray[np.float64]:
    """The sum of the n - f - 2 smallest squared distances of each update to others; of one at least."""
    count = len(distances)
    others = np.sort(distances[~np.eye(count, dtype=bool)].reshape(count, count - 1), axis=1)
    scores: NDArray[np.float64] = others[:, : max(count - f - 2, 1)].sum(axis=1)
    return scores

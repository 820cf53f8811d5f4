"""The geometric median."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.gram import gram_matrix, squared_distances
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.order import middle
from fedbus.strategies.settings import positive, whole
from fedbus.strategies.spool import Block, Spool
from fedbus.strategies.spooled import SpooledStrategy, discounts_of, mean_of, stepped
from fedbus.strategies.step import Step
from fedbus.strategies.weighting import WeightedStrategy, Weighting
from fedbus.types import Tensors

_HALF = 0.5 + 1e-12


class GeometricMedian(SpooledStrategy, WeightedStrategy):
    """w <- w + v, with v next to all updates: about the minimum of sum_i(p_i ||v - d_i||), p_i = n_i / sum(n).

    Pillutla et al. 2022 (Robust Aggregation for Federated Learning; RFA), the smoothed Weiszfeld algorithm: b_i = p_i /
    max(nu, ||v - d_i||), v <- sum_i(b_i d_i) / sum_i(b_i), three times. While hostile updates have less than half of
    the weight, v stays near the honest ones, however far away the hostile are.

    v begins as the mean of those updates that are nearest to their medoid and have half of the weight between them. The
    mean of all, which huge updates carry away, would need more than three steps to come back.

    Floating and complex tensors make the distance, where a tensor that an update does not hold is a step of zero; what
    a tensor takes is the mean, weighted with b_i, over the updates that hold it. Integers and bools, of which no
    distance tells, take the coordinate-wise median. The d_i of a late update is multiplied by its discount.

    v is never made before it is wanted: all that the iterations need are the inner products of the updates.

    Args:
        iterations: how often v is moved.
        nu: distances below it count as this.
        weighting: what p_i goes by. A client says itself how many examples it has: where that cannot be trusted, take
            "uniform".
        optimizer: takes the step.

    Raises:
        ConfigError: when a setting is out of its range.
    """

    reads = 2

    def __init__(
        self,
        *,
        iterations: int = 3,
        nu: float = 1e-6,
        weighting: Weighting | None = None,
        optimizer: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(weighting=weighting, optimizer=optimizer)
        self.iterations = whole("iterations", iterations, least=1)
        self.nu = positive("nu", nu)

    def _settings(self) -> list[str]:
        return [f"iterations={self.iterations}", f"nu={self.nu}", *super()._settings()]

    def reduced(self, spool: Spool, model: Tensors) -> Iterator[Step]:
        updates = spool.updates()
        weights = np.array([self.weight_of(update) for update in updates], np.float64)
        if not weights.any():
            return iter(())  # nobody says anything: the model stays
        weights /= weights.sum()
        shares = weiszfeld(gram_matrix(spool), weights, self.iterations, self.nu)
        discounts = discounts_of(updates)
        mean = mean_of(shares, discounts)

        def work(block: Block) -> NDArray[np.float64]:
            if block.kind in "fc":
                return mean(block)
            block.discount(discounts)
            return middle(block.columns_sorted())

        return stepped(spool, model, work, rows=np.flatnonzero(weights).tolist(), is_wide=True)


def weiszfeld(
    gram: NDArray[np.float64], weights: NDArray[np.float64], iterations: int, nu: float
) -> NDArray[np.float64]:
    """What each update counts in the geometric median of all, from their inner products; `weights` add up to 1.

    ||v - d_i||^2 is <v, v> - 2 <v, d_i> + <d_i, d_i>, with v = sum_j(b_j d_j).
    """
    shares = _central_half(np.sqrt(squared_distances(gram)), weights)
    for _ in range(iterations):
        along = gram @ shares
        squares = shares @ along - 2 * along + np.diagonal(gram)
        shares = weights / np.maximum(np.sqrt(np.maximum(squares, 0)), nu)
        shares /= shares.sum()
    return shares


def _central_half(distances: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weights of the updates nearest to the medoid, until they have more than half of all, as shares."""
    medoid = int(np.argmin(distances @ weights))
    nearest = np.argsort(distances[medoid], kind="stable")
    before = np.cumsum(weights[nearest]) - weights[nearest]
    shares = np.zeros_like(weights)
    inner = nearest[before < _HALF]
    shares[inner] = weights[inner]
    shares /= shares.sum()
    return shares

"""Distances between updates that are too large to be in memory: from their inner products, summed block by block."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from fedbus.strategies.blas import calls_in_one_thread
from fedbus.strategies.spool import Block, Spool
from fedbus.strategies.spooled import discounts_of


def gram_matrix(spool: Spool) -> NDArray[np.float64]:
    """G_ij = <s_i d_i, s_j d_j>, with s_i the discount of d_i, over the floating and complex tensors.

    A tensor that an update does not hold is a step of zero. Summed in float64 and in one order.

    The origin is the model, from which all updates are steps. Another one, say the first update, would take a few
    digits less from updates that are nearly the same; but if that update were hostile and huge, all distances between
    the honest ones would be its rounding errors.
    """
    updates = spool.updates()
    gram = np.zeros((len(updates), len(updates)))

    def work(block: Block) -> tuple[list[int], NDArray[np.float64]]:
        return block.rows, block.values @ block.values.T

    with calls_in_one_thread(), closing(spool.reduce(work, kinds="fc", is_wide=True)) as results:
        for _, _, (rows, part) in results:
            gram[np.ix_(rows, rows)] += part
    discounts = discounts_of(updates)
    gram *= discounts[:, None]
    gram *= discounts
    return gram


def squared_distances(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """||d_i - d_j||^2 of each pair of updates; those that are the same have 0."""
    norms = np.diagonal(gram)
    distances: NDArray[np.float64] = norms[:, None] + norms - 2 * gram
    np.maximum(distances, 0, out=distances)
    np.fill_diagonal(distances, 0)
    return distances

"""Who takes part in a round: sampling as a function of (seed, round) and nothing else."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from hashlib import blake2b


def rank(seed: int, round: int, purpose: str, client_id: str) -> bytes:
    """The client's place in the draw: uniform, and the same whoever else is eligible or when it was asked."""
    return blake2b(f"{seed}/{round}/{purpose}/{client_id}".encode(), digest_size=8).digest()


def uniform(seed: int, round: int, purpose: str, client_id: str = "") -> float:
    """The same place as a number in (0, 1]."""
    return (int.from_bytes(rank(seed, round, purpose, client_id)) + 0.5) / 2**64


def sample(seed: int, round: int, purpose: str, eligible: Iterable[str], size: int) -> tuple[str, ...]:
    """`size` of the eligible clients, each set equally likely; a longer list of them extends the draw."""
    ranked = [(rank(seed, round, purpose, client_id), client_id) for client_id in eligible]
    return tuple(client_id for _, client_id in heapq.nsmallest(size, ranked))


def sample_weighted(seed: int, round: int, purpose: str, weights: Mapping[str, float], size: int) -> tuple[str, ...]:
    """`size` of the clients without replacement, each draw in proportion to the weights (0 or more) that are left.

    Efraimidis and Spirakis 2006: the largest u^(1/w), here as the smallest -ln(u) / w. Those of weight 0 come last,
    each equally likely.
    """
    ranked = []
    for client_id, weight in weights.items():
        waits = -math.log(uniform(seed, round, purpose, client_id))
        ranked.append((waits / weight if weight else math.inf, waits, client_id))
    return tuple(client_id for _, _, client_id in heapq.nsmallest(size, ranked))

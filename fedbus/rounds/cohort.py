"""Who takes part in a round: sampling as a function of (seed, round) and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def rank(seed: int, round: int, purpose: str, client_id: str) -> bytes:
    """The client's place in the draw: uniform, and the same whoever else is eligible or when it was asked."""
    key = f"{seed}/{round}/{purpose}/{client_id}".encode()
    return hashlib.blake2b(key, digest_size=8).digest()


def sample(seed: int, round: int, purpose: str, eligible: Iterable[str], size: int) -> tuple[str, ...]:
    """`size` of the eligible clients, each set equally likely; a longer list of them extends the draw."""
    ranked = sorted(eligible, key=lambda client_id: (rank(seed, round, purpose, client_id), client_id))
    return tuple(ranked[: max(0, size)])

"""Who is asked: a pure function of the policy, the seed, the round and what each client has done so far."""

from __future__ import annotations

from collections.abc import Iterable

from fedbus.config import Selection
from fedbus.rounds.clients import ClientRecords
from fedbus.rounds.cohort import sample


def select(
    policy: Selection,
    *,
    seed: int,
    round: int,
    draw: int,
    eligible: Iterable[str],
    size: int,
    records: ClientRecords,
) -> tuple[str, ...]:
    """`size` of the `eligible` clients, fewer when there are fewer.

    `draw` counts the draws of one round that must not favour the same clients: 0 in all draws of a synchronous round,
    which extend one another. A client without a record was never tried.
    """
    return sample(seed, round, "fit" if draw == 0 else f"fit/{draw}", eligible, size)

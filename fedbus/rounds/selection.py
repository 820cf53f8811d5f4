"""Who is asked: a pure function of the policy, the seed, the round and what each client has done so far."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedbus.config import Cyclic, Oort, Selection, Tiers, Uniform
from fedbus.rounds.clients import ClientRecord, ClientRecords
from fedbus.rounds.cohort import sample, sample_weighted, uniform

CUT_OFF = 0.95
"""Share of the last chosen one's utility above which others may be drawn in its place: c of Lai et al. 2021."""

CLIPPED_ABOVE = 0.95
"""Quantile above which utilities count as this quantile, so that one outlier does not take every round."""

OVERDUE = 10
"""Who was not asked for so many times as long as an even share takes is explored again, as if it was never tried."""


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
    chance = _Chance(seed, round, "fit" if draw == 0 else f"fit/{draw}")
    match policy:
        case Uniform():
            return chance.sample(eligible, size)
        case Oort():
            return _by_utility(policy, chance, list(eligible), size, records)
        case Tiers():
            return _by_tier(policy, chance, list(eligible), size, records)
        case Cyclic():
            return _in_turn(eligible, size, records)


@dataclass(frozen=True, slots=True)
class _Chance:
    """All that is random in one draw."""

    seed: int
    round: int
    purpose: str

    def sample(self, clients: Iterable[str], size: int) -> tuple[str, ...]:
        return sample(self.seed, self.round, self.purpose, clients, size)

    def sample_weighted(self, weights: Mapping[str, float], size: int) -> tuple[str, ...]:
        return sample_weighted(self.seed, self.round, self.purpose, weights, size)

    def round_off(self, value: float) -> int:
        """The whole number below or above `value`, with that mean."""
        return math.floor(value + 1 - uniform(self.seed, self.round, f"{self.purpose}/explore"))


def _tried(eligible: Iterable[str], records: ClientRecords) -> dict[str, ClientRecord]:
    found = ((client_id, records.get(client_id)) for client_id in eligible)
    return {client_id: record for client_id, record in found if record is not None and record.asked}


# ---- in turn ---------------------------------------------------------------------------------------------------------


def _in_turn(eligible: Iterable[str], size: int, records: ClientRecords) -> tuple[str, ...]:
    def last_round(client_id: str) -> int:
        record = records.get(client_id)
        return 0 if record is None else record.last_round

    return tuple(heapq.nsmallest(size, eligible, key=lambda client_id: (last_round(client_id), client_id)))


# ---- Oort ------------------------------------------------------------------------------------------------------------


def _by_utility(
    policy: Oort, chance: _Chance, eligible: list[str], size: int, records: ClientRecords
) -> tuple[str, ...]:
    """Algorithm 1 of Lai et al. 2021: most places to the best of those that were tried, some to the others.

    Where there are too few of the ones, the others get more.
    """
    if size <= 0:
        return ()
    tried = _tried(eligible, records)
    untried = [client_id for client_id in eligible if client_id not in tried]
    overdue_from = chance.round - OVERDUE * len(eligible) / size
    overdue = [client_id for client_id, record in tried.items() if record.last_round < overdue_from]
    explored = chance.sample(untried + overdue, _places_to_explore(policy, chance, size))
    for client_id in explored:
        tried.pop(client_id, None)
    exploited = _exploit(_scores(policy, chance.round, tried, records), chance, size - len(explored))
    more = set(untried).difference(explored)
    return exploited + explored + chance.sample(more, size - len(exploited) - len(explored))


def _places_to_explore(policy: Oort, chance: _Chance, size: int) -> int:
    share = policy.exploration * policy.exploration_decay ** (chance.round - 1)
    return chance.round_off(size * max(policy.min_exploration, share))


def _scores(policy: Oort, round: int, clients: Mapping[str, ClientRecord], records: ClientRecords) -> dict[str, float]:
    """Util(i) of algorithm 1: (U(i) + sqrt(0.1 ln R / L(i))) (T / D(i))^[T < D(i)] alpha, R this round, L(i) its last.

    U(i) is scaled to [0, 1], as in the authors' code, without which the second term would have no meaning.
    """
    gains = {client_id: _gain(record) for client_id, record in clients.items()}
    most = _quantile(sorted(gains.values()), CLIPPED_ABOVE)
    target = _quantile(sorted(r.seconds for r in records.values() if r.seconds is not None), policy.duration_quantile)
    unsure = 0.1 * math.log(max(1, round))
    scores = {}
    for client_id, record in clients.items():
        gain = min(gains[client_id], most) / most if most else 1.0
        score = gain + math.sqrt(unsure / max(1, record.last_round))
        if record.seconds is not None and record.seconds > target:
            score *= (target / record.seconds) ** policy.alpha
        scores[client_id] = score
    return scores


def _gain(record: ClientRecord) -> float:
    """What there is to gain from a client that was asked: nothing, where nothing sound ever came back."""
    utility = record.utility
    return utility if utility is not None and 0 < utility < math.inf else 0.0


def _quantile(ascending: list[float], share: float) -> float:
    """The least value that `share` of the values do not exceed; 0 when there are none."""
    if not ascending:
        return 0.0
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)]


def _exploit(scores: Mapping[str, float], chance: _Chance, size: int) -> tuple[str, ...]:
    """Drawn in proportion to the scores among all that come near the `size` best."""
    if size <= 0 or not scores:
        return ()
    least = CUT_OFF * heapq.nlargest(size, scores.values())[-1]
    return chance.sample_weighted({client: score for client, score in scores.items() if score >= least}, size)


# ---- tiers -----------------------------------------------------------------------------------------------------------


def _by_tier(policy: Tiers, chance: _Chance, eligible: list[str], size: int, records: ClientRecords) -> tuple[str, ...]:
    """Who was never tried, then the tier whose turn it is, then those next to it."""
    tried = _tried(eligible, records)
    chosen = chance.sample((client_id for client_id in eligible if client_id not in tried), size)
    tiers: list[list[str]] = [[] for _ in range(policy.num_tiers)]
    first = _slower_tiers_begin(policy, records)
    for client_id, record in tried.items():
        seconds = math.inf if record.mean_seconds is None else record.mean_seconds
        tiers[bisect_right(first, seconds)].append(client_id)
    turn = math.ceil(policy.num_tiers * uniform(chance.seed, chance.round, "tier")) - 1
    for tier in sorted(range(policy.num_tiers), key=lambda tier: (abs(tier - turn), tier)):
        chosen += chance.sample(tiers[tier], size - len(chosen))
    return chosen


def _slower_tiers_begin(policy: Tiers, records: ClientRecords) -> list[float]:
    """The duration with which each tier but the first begins, from all clients: who is idle now does not move it."""
    ascending = sorted(record.mean_seconds for record in records.values() if record.mean_seconds is not None)
    if not ascending:
        return []
    return [ascending[len(ascending) * tier // policy.num_tiers] for tier in range(1, policy.num_tiers)]

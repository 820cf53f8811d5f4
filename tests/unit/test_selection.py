"""Who is asked: statistics of many rounds under fixed seeds, and what holds for any records."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.config import Cyclic, Oort, Selection, Tiers, Uniform
from fedbus.rounds.clients import ClientRecord
from fedbus.rounds.cohort import rank, sample, sample_weighted
from fedbus.rounds.selection import select

NAMES = tuple(f"c{i:02}" for i in range(20))
POLICIES = (Uniform(), Oort(), Oort(alpha=0.0, exploration=0.0, min_exploration=0.0), Tiers(num_tiers=4))
EXPLOIT = Oort(exploration=0.0, min_exploration=0.0)


def record(client: str, **known: object) -> ClientRecord:
    """A client that was asked once and answered after a second, unless told otherwise."""
    seconds = known.get("seconds", 1.0)
    return ClientRecord(
        **{  # type: ignore[arg-type]
            "client_id": client,
            "asked": 1,
            "last_round": 1,
            "seconds": seconds,
            "mean_seconds": seconds,
            "utility": 1.0,
            **known,
        }
    )


def records(clients: Iterable[str] = NAMES, **known: object) -> dict[str, ClientRecord]:
    return {client: record(client, **known) for client in clients}


def choose(
    policy: Selection,
    past: Mapping[str, ClientRecord],
    size: int = 5,
    *,
    eligible: Iterable[str] = NAMES,
    round: int = 2,
    seed: int = 0,
    draw: int = 0,
) -> tuple[str, ...]:
    return select(policy, seed=seed, round=round, draw=draw, eligible=eligible, size=size, records=past)


class Run:
    """Rounds in which everybody who is asked answers, in a time and with a loss that are its own."""

    def __init__(
        self,
        policy: Selection,
        *,
        seconds: Callable[[str], float] = lambda client: 1.0,
        loss: Callable[[str], float] = lambda client: 1.0,
        clients: Iterable[str] = NAMES,
    ) -> None:
        self.policy, self.seconds, self.loss = policy, seconds, loss
        self.clients = tuple(clients)
        self.records: dict[str, ClientRecord] = {}
        self.cohorts: list[tuple[str, ...]] = []

    def play(self, rounds: int, size: int = 5, seed: int = 0) -> Counter[str]:
        for round_ in range(1, rounds + 1):
            cohort = choose(self.policy, self.records, size, eligible=self.clients, round=round_, seed=seed)
            self.cohorts.append(cohort)
            for client in cohort:
                past = self.records.setdefault(client, ClientRecord(client_id=client))
                past.note_asked(round_)
                past.note_folded(staleness=0, seconds=self.seconds(client), nbytes=1, utility=100 * self.loss(client))
        return Counter(client for cohort in self.cohorts for client in cohort)


SLOW = set(NAMES[15:])


def speed(client: str) -> float:
    return 10.0 if client in SLOW else 1.0


# ---- all policies ----------------------------------------------------------------------------------------------------

pasts = st.dictionaries(
    st.sampled_from(NAMES),
    st.builds(
        lambda asked, last_round, seconds, utility: record(
            "", asked=asked, last_round=last_round, seconds=seconds, utility=utility
        ),
        st.integers(0, 3),
        st.integers(0, 60),
        st.none() | st.floats(0, 1e6),
        st.none() | st.floats(allow_nan=True, allow_infinity=True),
    ),
)


@given(
    st.sampled_from([*POLICIES, Cyclic()]),
    pasts,
    st.sets(st.sampled_from(NAMES)),
    st.integers(-1, 25),
    st.integers(0, 60),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_whatever_is_known_the_right_number_is_chosen_and_no_order_matters(
    policy: Selection,
    past: dict[str, ClientRecord],
    eligible: set[str],
    size: int,
    round_: int,
    draw: int,
    rng: random.Random,
) -> None:
    chosen = choose(policy, past, size, eligible=eligible, round=round_, draw=draw)
    assert set(chosen) <= eligible
    assert len(chosen) == len(set(chosen)) == min(max(0, size), len(eligible))
    shuffled, items = sorted(eligible), sorted(past.items())
    rng.shuffle(shuffled)
    rng.shuffle(items)
    assert choose(policy, dict(items), size, eligible=iter(shuffled), round=round_, draw=draw) == chosen


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_seed_round_and_draw_each_make_another_choice(policy: Selection) -> None:
    past = records()
    assert len({frozenset(choose(policy, past, seed=seed)) for seed in range(10)}) > 5
    assert len({frozenset(choose(policy, past, round=round_)) for round_ in range(2, 12)}) > 5
    assert len({frozenset(choose(policy, past, draw=draw)) for draw in range(10)}) > 5


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_while_nobody_was_tried_the_choice_is_uniform(policy: Selection) -> None:
    assert set(choose(policy, {})) == set(sample(0, 2, "fit", NAMES, 5))
    assert set(choose(policy, records(asked=0))) == set(sample(0, 2, "fit", NAMES, 5))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_clients_that_are_all_alike_are_equally_likely(policy: Selection) -> None:
    past = records()
    counts = Counter(client for seed in range(800) for client in choose(policy, past, seed=seed))
    assert all(140 < counts[client] < 260 for client in NAMES)  # 200 expected, 4.9 standard deviations


def test_uniform_selection_is_the_plain_draw() -> None:
    assert choose(Uniform(), records()) == sample(0, 2, "fit", NAMES, 5)
    assert choose(Uniform(), records(), draw=3) == sample(0, 2, "fit/3", NAMES, 5)


def test_the_plain_draw_is_by_rank() -> None:
    by_rank = sorted(NAMES, key=lambda client: rank(1, 2, "fit", client))
    assert sample(1, 2, "fit", NAMES, 20) == tuple(by_rank)
    assert sample(1, 2, "fit", NAMES, 3) == tuple(by_rank[:3])


def test_a_weighted_draw_follows_the_weights_without_replacement() -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 5.0}
    pairs = Counter(frozenset(sample_weighted(seed, 0, "", weights, 2)) for seed in range(4000))
    for left, right in combinations("abc", 2):
        w, v = weights[left] / 8, weights[right] / 8
        expected = 4000 * (w * v / (1 - w) + v * w / (1 - v))
        assert abs(pairs[frozenset((left, right))] - expected) < 160  # 5 standard deviations


def test_weight_nought_is_drawn_last() -> None:
    weights = dict.fromkeys(NAMES, 0.0) | {"z": 1e-9}
    drawn = [sample_weighted(seed, 0, "", weights, 2) for seed in range(100)]
    assert {first for first, _ in drawn} == {"z"}
    assert len({second for _, second in drawn}) > 10


# ---- Oort ------------------------------------------------------------------------------------------------------------


def test_the_quick_are_asked_more_often_and_rounds_are_shorter_for_it() -> None:
    uniform, oort = Run(Uniform(), seconds=speed), Run(Oort(), seconds=speed)
    even, counts = uniform.play(200), oort.play(200)
    assert min(counts[client] for client in NAMES if client not in SLOW) > 3 * max(counts[client] for client in SLOW)
    assert min(even[client] for client in SLOW) > 30  # 50 expected
    lasted = {run: sum(max(map(speed, cohort)) for cohort in run.cohorts) for run in (uniform, oort)}
    assert lasted[oort] < lasted[uniform] / 3


def test_slowness_costs_nothing_with_alpha_nought() -> None:
    counts = Run(Oort(alpha=0.0), seconds=speed).play(200)
    assert sum(counts[client] for client in SLOW) == pytest.approx(250, abs=50)


def test_the_slowest_client_is_asked_again_and_again() -> None:
    run = Run(Oort(), seconds=lambda client: 1e6 if client == "c07" else 1.0)
    run.play(400)
    asked_in = [round_ for round_, cohort in enumerate(run.cohorts) if "c07" in cohort]
    gaps = [later - earlier for earlier, later in zip([0, *asked_in], [*asked_in, 400], strict=True)]
    assert len(asked_in) < 20  # an even share would be 100
    assert max(gaps) < 60


def test_who_has_not_been_asked_for_long_comes_before_its_equals() -> None:
    past = records(last_round=50) | records(NAMES[:5], last_round=12)
    assert set(choose(EXPLOIT, past, 5, round=51)) == set(NAMES[:5])  # 1.18 against 1.09


def test_everybody_is_tried_while_exploration_lasts() -> None:
    run = Run(Oort())
    run.play(8)
    assert set(run.records) == set(NAMES)


@pytest.mark.parametrize(("round_", "share"), [(1, 0.9), (2, 0.882), (50, 0.334), (500, 0.2)])
def test_the_share_of_explorers_falls_to_its_least(round_: int, share: float) -> None:
    tried = set(NAMES[:10])
    past = records(tried, last_round=round_)
    explored = [len(set(choose(Oort(), past, 5, round=round_, seed=seed)) - tried) for seed in range(400)]
    assert sum(explored) / (400 * 5) == pytest.approx(share, abs=0.02)


def test_a_single_place_is_explored_with_the_same_share() -> None:
    tried = set(NAMES[:10])
    past = records(tried, last_round=500)
    explored = sum(choose(Oort(), past, 1, round=500, draw=draw)[0] not in tried for draw in range(1, 1001))
    assert explored == pytest.approx(200, abs=60)


def test_without_exploration_the_untried_come_only_when_there_is_nobody_else() -> None:
    past = records(NAMES[:10])
    assert set(choose(EXPLOIT, past, 5)) <= set(NAMES[:10])
    assert set(choose(EXPLOIT, past, 12)) > set(NAMES[:10])


def test_clients_with_much_to_learn_from_are_preferred() -> None:
    counts = Run(Oort(), loss=lambda client: 3.0 if client < "c05" else 1.0).play(200)
    assert min(counts[client] for client in NAMES[:5]) > 2 * max(counts[client] for client in NAMES[5:])


def test_the_unit_of_the_loss_does_not_matter() -> None:
    def past(unit: float) -> dict[str, ClientRecord]:
        return {client: record(client, utility=unit * (i + 1), last_round=i + 1) for i, client in enumerate(NAMES)}

    for seed in range(20):
        assert choose(Oort(), past(1.0), round=30, seed=seed) == choose(Oort(), past(2.0**20), round=30, seed=seed)


def test_one_outlier_counts_no_more_than_the_next_best() -> None:
    past = records() | records(["c00"], utility=1e12)
    counts = Counter(client for seed in range(400) for client in choose(EXPLOIT, past, 5, seed=seed))
    assert counts["c00"] == pytest.approx(100, abs=45)


@pytest.mark.parametrize("utility", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_who_has_taught_nothing_sound_comes_after_those_who_have(utility: float | None) -> None:
    past = records(utility=utility) | records(NAMES[:5])
    assert set(choose(EXPLOIT, past, 5)) == set(NAMES[:5])


def test_those_near_the_last_chosen_may_be_drawn_and_those_below_may_not() -> None:
    past = records(NAMES[:5]) | records(NAMES[5:10], utility=0.96) | records(NAMES[10:], utility=0.9)
    drawn = {client for seed in range(50) for client in choose(EXPLOIT, past, 5, round=1, seed=seed)}
    assert drawn == set(NAMES[:10])


def test_a_client_is_slow_by_its_last_duration_and_the_quantile_says_from_where() -> None:
    past = {client: record(client, seconds=float(i + 1), mean_seconds=1.0) for i, client in enumerate(NAMES)}
    drawn = {client for seed in range(200) for client in choose(EXPLOIT, past, 5, round=1, seed=seed)}
    assert drawn == set(NAMES[:10])  # (10 / 11)^2 < 0.95
    patient = Oort(exploration=0.0, min_exploration=0.0, duration_quantile=1.0)
    drawn = {client for seed in range(200) for client in choose(patient, past, 5, round=1, seed=seed)}
    assert drawn == set(NAMES)


def test_clients_that_are_busy_count_for_what_is_slow() -> None:
    past = records(NAMES[:10], seconds=1.0) | records(NAMES[10:], seconds=3.0) | records(["c09"], seconds=2.0)
    idle = NAMES[9:]
    assert choose(EXPLOIT, past, 1, eligible=idle, round=1) == ("c09",)


# ---- tiers -----------------------------------------------------------------------------------------------------------


def tier_of(client: str) -> int:
    return NAMES.index(client) // 5


PACES = {client: record(client, seconds=float(i + 1)) for i, client in enumerate(NAMES)}


def test_a_cohort_comes_from_one_tier_and_every_tier_has_its_turn() -> None:
    turns: Counter[int] = Counter()
    for round_ in range(1, 401):
        (tier,) = {tier_of(client) for client in choose(Tiers(num_tiers=4), PACES, 5, round=round_)}
        turns[tier] += 1
    assert all(60 < turns[tier] < 140 for tier in range(4))  # 100 expected, 4.6 standard deviations


def test_a_place_that_gets_free_goes_to_the_same_tier() -> None:
    policy = Tiers(num_tiers=4)
    for round_ in range(1, 30):
        first = choose(policy, PACES, 3, round=round_)
        rest = [client for client in NAMES if client not in first]
        for draw in (0, 1):
            (other,) = choose(policy, PACES, 1, eligible=rest, round=round_, draw=draw)
            assert tier_of(other) == tier_of(first[0])


def test_a_cohort_larger_than_its_tier_fills_up_from_those_next_to_it() -> None:
    for round_ in range(1, 60):
        tiers = Counter(tier_of(client) for client in choose(Tiers(num_tiers=4), PACES, 8, round=round_))
        (full, five), (other, three) = tiers.most_common()
        assert (five, three, abs(full - other)) == (5, 3, 1)


def test_all_of_a_tier_are_equally_likely() -> None:
    counts = Counter(client for round_ in range(1200) for client in choose(Tiers(num_tiers=4), PACES, 1, round=round_))
    assert all(30 < counts[client] < 100 for client in NAMES)  # 60 expected, 4 standard deviations


def test_whoever_was_never_tried_comes_before_any_tier() -> None:
    past = {client: PACES[client] for client in NAMES[2:]}
    for round_ in range(20):
        assert {"c00", "c01"} < set(choose(Tiers(), past, 5, round=round_))


def test_who_was_asked_and_never_answered_is_in_the_slowest_tier() -> None:
    past = PACES | records(["mute"], seconds=None)
    for round_ in range(100):
        cohort = choose(Tiers(num_tiers=4), past, 3, eligible=[*NAMES, "mute"], round=round_)
        assert "mute" not in cohort or {tier_of(client) for client in cohort if client != "mute"} == {3}


def test_tiers_without_any_duration_are_one() -> None:
    past = records(seconds=None)
    assert choose(Tiers(), past, 5) == sample(0, 2, "fit", NAMES, 5)


# ---- in turn ---------------------------------------------------------------------------------------------------------


def test_clients_are_asked_in_turn_and_who_joins_is_next() -> None:
    past: dict[str, ClientRecord] = {}
    clients = ["b", "a", "c"]
    asked = []
    for round_ in range(1, 12):
        if round_ == 5:
            clients.append("aa")
        if round_ == 9:
            clients.remove("b")
        (client,) = choose(Cyclic(), past, 1, eligible=clients, round=round_)
        past.setdefault(client, ClientRecord(client_id=client)).note_asked(round_)
        asked.append(client)
    assert "".join(client[-1] if client != "aa" else "A" for client in asked) == "abcaAbcaAca"


def test_somebody_in_turn_who_cannot_is_replaced_by_the_next() -> None:
    past = {name: record(name, last_round=round_) for name, round_ in (("a", 1), ("b", 2), ("c", 3))}
    assert choose(Cyclic(), past, 2, eligible="cba", round=4) == ("a", "b")
    assert choose(Cyclic(), past, 1, eligible="cb", round=4) == ("b",)

"""RoundConfig: what its presets set, what it refuses and why, and the staleness functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from fedbus.config import (
    Constant,
    Cyclic,
    Hinge,
    Oort,
    Polynomial,
    RoundConfig,
    Tiers,
    Uniform,
    check_client_id,
)
from fedbus.errors import ConfigError

DEFAULTS = {
    "num_rounds": 10,
    "min_fit_clients": 2,
    "min_available_clients": None,
    "fraction_fit": 1.0,
    "over_selection": None,
    "is_asynchronous": False,
    "concurrency": None,
    "fraction_evaluate": 1.0,
    "timeout_s": 600.0,
    "grace_s": 0.0,
    "evaluate_timeout_s": None,
    "heartbeat_s": 5.0,
    "lease_s": 20.0,
    "staleness": Polynomial(0.5),
    "max_staleness": 20,
    "mixing": None,
    "selection": Uniform(),
}


def fields(rounds: RoundConfig) -> dict[str, Any]:
    return {name: getattr(rounds, name) for name in asdict(rounds)}


# ---- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "differs"),
    [
        (RoundConfig(), {}),
        (RoundConfig.synchronous(7), {"min_fit_clients": 7, "over_selection": 1.0}),
        (
            RoundConfig.cyclic(4),
            {"min_fit_clients": 1, "min_available_clients": 4, "over_selection": 1.0, "selection": Cyclic()},
        ),
        (RoundConfig.semi_synchronous(10), {"min_fit_clients": 10, "over_selection": 1.3}),
        (RoundConfig.semi_synchronous(10, 2), {"min_fit_clients": 10, "over_selection": 2}),
        (
            RoundConfig.buffered(),
            {
                "min_fit_clients": 10,
                "is_asynchronous": True,
                "timeout_s": 86_400.0,
                "max_staleness": 1000,
                "fraction_evaluate": 0.0,
            },
        ),
        (
            RoundConfig.asynchronous(),
            {
                "min_fit_clients": 1,
                "is_asynchronous": True,
                "timeout_s": 86_400.0,
                "max_staleness": 1000,
                "mixing": 0.6,
                "fraction_evaluate": 0.0,
            },
        ),
        (
            RoundConfig.asynchronous(0.9, staleness=Hinge(), fraction_evaluate=0.5, concurrency=4),
            {
                "min_fit_clients": 1,
                "is_asynchronous": True,
                "timeout_s": 86_400.0,
                "max_staleness": 1000,
                "mixing": 0.9,
                "staleness": Hinge(10, 4),
                "fraction_evaluate": 0.5,
                "concurrency": 4,
            },
        ),
        (
            RoundConfig.semi_synchronous(3, num_rounds=5, grace_s=math.inf, max_staleness=0),
            {
                "min_fit_clients": 3,
                "over_selection": 1.3,
                "num_rounds": 5,
                "grace_s": math.inf,
                "max_staleness": 0,
            },
        ),
    ],
    ids=lambda value: "" if isinstance(value, dict) else None,
)
def test_a_preset_sets_this_and_leaves_the_rest(rounds: RoundConfig, differs: dict[str, Any]) -> None:
    assert fields(rounds) == {**DEFAULTS, **differs}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: RoundConfig.buffered(5, min_fit_clients=3),
            "RoundConfig.buffered sets min_fit_clients itself: leave it out, or use RoundConfig(...)",
        ),
        (
            lambda: RoundConfig.asynchronous(mixing=0.3),
            "RoundConfig.asynchronous sets mixing itself: leave it out, or use RoundConfig(...)",
        ),
        (
            lambda: RoundConfig.synchronous(5, over_selection=2),
            "RoundConfig.synchronous sets over_selection itself: leave it out, or use RoundConfig(...)",
        ),
        (
            lambda: RoundConfig.semi_synchronous(5, rounds=3),
            "RoundConfig.semi_synchronous knows no setting 'rounds': did you mean num_rounds?",
        ),
        (lambda: RoundConfig.buffered(K=3), "RoundConfig.buffered knows no setting 'K'"),
        (
            lambda: RoundConfig.synchronous(5, fraction_fit=0.5),
            "RoundConfig.synchronous says itself how many clients are asked: leave fraction_fit out",
        ),
    ],
)
def test_a_preset_refuses_what_it_sets_itself_and_what_nobody_knows(
    make: Callable[[], RoundConfig], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value) == message


# ---- refusals --------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf

REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"num_rounds": 0}, "num_rounds must be 1 or more, not 0"),
    ({"num_rounds": 2.0}, "num_rounds must be a whole number, not 2.0"),
    ({"num_rounds": True}, "num_rounds must be a whole number, not True"),
    ({"min_fit_clients": 0}, "min_fit_clients must be 1 or more, not 0"),
    ({"min_fit_clients": "3"}, "min_fit_clients must be a whole number, not '3'"),
    ({"min_available_clients": 0}, "min_available_clients must be 1 or more, not 0"),
    ({"max_staleness": -1}, "max_staleness must be 0 or more, not -1"),
    ({"max_staleness": 1.5}, "max_staleness must be a whole number, not 1.5"),
    ({"fraction_fit": 0.0}, "fraction_fit must be in (0, 1], not 0.0"),
    ({"fraction_fit": 1.5}, "fraction_fit must be in (0, 1], not 1.5"),
    ({"fraction_fit": NAN}, "fraction_fit must be in (0, 1], not nan"),
    ({"fraction_evaluate": -0.1}, "fraction_evaluate must be in [0, 1], not -0.1"),
    ({"fraction_evaluate": 1.1}, "fraction_evaluate must be in [0, 1], not 1.1"),
    ({"timeout_s": 0.0}, "timeout_s must be a positive number of seconds, not 0.0"),
    ({"timeout_s": INF}, "timeout_s must be a positive number of seconds, not inf"),
    ({"evaluate_timeout_s": -1.0}, "evaluate_timeout_s must be a positive number of seconds, not -1.0"),
    ({"heartbeat_s": 0.0}, "heartbeat_s must be a positive number of seconds, not 0.0"),
    ({"lease_s": NAN}, "lease_s must be a positive number of seconds, not nan"),
    (
        {"lease_s": 9.0},
        "lease_s (9.0) must be at least twice heartbeat_s (5.0), or one late heartbeat costs a client its place",
    ),
    ({"grace_s": -1.0}, "grace_s must be 0 or more, not -1.0"),
    ({"grace_s": NAN}, "grace_s must be 0 or more, not nan"),
    (
        {"mixing": 0.5},
        "mixing=0.5 (alpha) is FedAsync's, which makes a version of each update: use RoundConfig.asynchronous(alpha)",
    ),
    ({"mixing": "x"}, "mixing (alpha) must be a number, not 'x'"),
    ({"over_selection": "x"}, "over_selection must be a number, not 'x'"),
    ({"over_selection": True}, "over_selection must be a number, not True"),
    ({"is_asynchronous": "no"}, "is_asynchronous must be True or False, not 'no'"),
    ({"timeout_s": "x"}, "timeout_s must be a number, not 'x'"),
    ({"grace_s": None}, "grace_s must be a number, not None"),
    ({"mixing": 0.0}, "mixing (alpha) must be in (0, 1], not 0.0"),
    ({"mixing": 1.1}, "mixing (alpha) must be in (0, 1], not 1.1"),
    ({"mixing": NAN}, "mixing (alpha) must be in (0, 1], not nan"),
    ({"staleness": 0.5}, "staleness must be Constant(), Polynomial(a) or Hinge(a, b), not 0.5"),
    ({"selection": "oort"}, "selection must be Uniform(), Oort(...), Tiers(...) or Cyclic(), not 'oort'"),
    ({"over_selection": 0.9}, "over_selection must be 1 or more, not 0.9"),
    ({"over_selection": INF}, "over_selection must be 1 or more, not inf"),
    ({"over_selection": NAN}, "over_selection must be 1 or more, not nan"),
    (
        {"over_selection": 1.3, "fraction_fit": 0.5},
        "over_selection and fraction_fit both say how many clients are asked in a round: set one of them",
    ),
    (
        {"concurrency": 4},
        "concurrency limits asynchronous rounds; in others over_selection or fraction_fit says how many clients train "
        "at a time",
    ),
    ({"is_asynchronous": True, "concurrency": 0}, "concurrency must be 1 or more, not 0"),
    (
        {"is_asynchronous": True, "over_selection": 1.3},
        "asynchronous rounds have no cohort for over_selection to size, every idle client trains: limit that with "
        "concurrency",
    ),
    (
        {"is_asynchronous": True, "fraction_fit": 0.5},
        "asynchronous rounds have no cohort for fraction_fit to size, every idle client trains: limit that with "
        "concurrency",
    ),
    (
        {"is_asynchronous": True, "grace_s": 1.0},
        "grace_s waits for the rest of a cohort, and asynchronous rounds have none: raise min_fit_clients (k) to fold "
        "more updates into each",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS, ids=[repr(settings) for settings, _ in REFUSALS])
def test_what_cannot_work_is_refused_with_its_reason(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RoundConfig(**settings)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "settings",
    [
        {"num_rounds": 1, "min_fit_clients": 1, "min_available_clients": 1, "max_staleness": 0},
        {"fraction_fit": 1e-9, "fraction_evaluate": 0.0},
        {"heartbeat_s": 5.0, "lease_s": 10.0, "grace_s": INF},
        {"over_selection": 1.0, "fraction_fit": 1.0},
        {"is_asynchronous": True, "concurrency": 1, "min_fit_clients": 10},
        {"min_available_clients": 3, "min_fit_clients": 10},
    ],
)
def test_what_lies_on_the_border_is_taken(settings: dict[str, Any]) -> None:
    assert fields(RoundConfig(**settings)) == {**DEFAULTS, **settings}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Polynomial(-0.5), "a must be 0 or more, not -0.5"),
        (lambda: Polynomial(NAN), "a must be 0 or more, not nan"),
        (lambda: Hinge(a=-1), "a must be 0 or more, not -1"),
        (lambda: Hinge(b=INF), "b must be 0 or more, not inf"),
        (lambda: Oort(alpha=-1), "alpha must be 0 or more, not -1"),
        (lambda: Oort(duration_quantile=1.5), "duration_quantile must be in [0, 1], not 1.5"),
        (lambda: Oort(exploration=-0.5), "exploration must be in [0, 1], not -0.5"),
        (lambda: Oort(exploration_decay=NAN), "exploration_decay must be in [0, 1], not nan"),
        (lambda: Oort(min_exploration=2), "min_exploration must be in [0, 1], not 2"),
        (lambda: Tiers(num_tiers=1), "num_tiers must be 2 or more, not 1"),
        (lambda: Tiers(num_tiers=2.5), "num_tiers must be a whole number, not 2.5"),  # type: ignore[arg-type]
    ],
)
def test_a_staleness_or_a_selection_that_cannot_work_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value) == message


# ---- how many clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rounds", "living", "asked"),
    [
        (RoundConfig(min_fit_clients=3), 10, 10),
        (RoundConfig(min_fit_clients=3), 2, 3),
        (RoundConfig(min_fit_clients=3, fraction_fit=0.5), 10, 5),
        (RoundConfig(min_fit_clients=3, fraction_fit=0.5), 9, 5),
        (RoundConfig(min_fit_clients=3, fraction_fit=0.1), 10, 3),
        (RoundConfig(min_fit_clients=1, fraction_fit=0.07), 100, 7),  # 0.07 * 100 is more than 7 in float64
        (RoundConfig.synchronous(4), 10, 4),
        (RoundConfig.semi_synchronous(10), 30, 13),
        (RoundConfig.semi_synchronous(10), 5, 13),
        (RoundConfig.semi_synchronous(3), 30, 4),
        (RoundConfig.semi_synchronous(100, 1.1), 200, 110),  # 1.1 * 100 is more than 110 in float64
        (RoundConfig.buffered(10), 30, 30),
        (RoundConfig.buffered(10, concurrency=12), 30, 12),
        (RoundConfig.asynchronous(), 7, 7),
    ],
)
def test_the_size_of_a_cohort(rounds: RoundConfig, living: int, asked: int) -> None:
    assert rounds.cohort_size(living) == asked


@pytest.mark.parametrize(
    ("rounds", "clients"),
    [
        (RoundConfig(min_fit_clients=3), 3),
        (RoundConfig(min_fit_clients=3, min_available_clients=8), 8),
        (RoundConfig.synchronous(5), 5),
        (RoundConfig.semi_synchronous(5), 5),
        (RoundConfig.buffered(10), 1),
        (RoundConfig.asynchronous(), 1),
        (RoundConfig.buffered(10, min_available_clients=4), 4),
    ],
)
def test_the_clients_that_must_be_there_before_round_1(rounds: RoundConfig, clients: int) -> None:
    assert rounds.start_clients == clients


# ---- staleness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [Constant(), Polynomial(), Polynomial(2.0), Hinge(), Hinge(a=0.1, b=0)])
def test_a_fresh_update_counts_in_full_and_none_counts_more_than_an_earlier_one(
    s: Constant | Polynomial | Hinge,
) -> None:
    counts = [s(tau) for tau in range(100)]
    assert counts[0] == 1.0
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] > 0


def test_the_defaults_are_those_of_the_papers() -> None:
    assert (Polynomial(), Hinge()) == (Polynomial(a=0.5), Hinge(a=10, b=4))


@pytest.mark.parametrize("client_id", ["", ".a", "a b", "a/b", "é", "a" * 65])
def test_a_client_id_that_can_name_no_queue_is_refused(client_id: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used: take 1 to 64 letters, digits"):
        check_client_id(client_id)


def test_a_client_id_that_can_name_a_queue_is_given_back() -> None:
    assert check_client_id("hospital-a_1.x") == "hospital-a_1.x"

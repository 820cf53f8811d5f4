"""The App: which strategy it takes, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import fedbus as fb
from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import Strategy


def client_fn(context: fb.ClientContext) -> fb.NumPyClient:
    return fb.NumPyClient()


def app_of(**settings: Any) -> fb.App:
    return fb.App(client_fn=client_fn, **settings)


@pytest.mark.parametrize(
    ("rounds", "strategy"),
    [
        (RoundConfig(), fb.FedAvg),
        (RoundConfig(min_fit_clients=1), fb.FedAvg),
        (RoundConfig.synchronous(5), fb.FedAvg),
        (RoundConfig.semi_synchronous(5), fb.FedAvg),
        (RoundConfig.buffered(5), fb.FedBuff),
        (RoundConfig.buffered(1), fb.FedBuff),
        (RoundConfig.asynchronous(), fb.FedAsync),
    ],
)
def test_an_app_without_a_strategy_takes_what_suits_its_rounds(rounds: RoundConfig, strategy: type[Strategy]) -> None:
    assert type(app_of(rounds=rounds).strategy) is strategy
    assert type(app_of(rounds=rounds, strategy=None).strategy) is strategy


def test_an_app_given_other_rounds_takes_what_suits_those() -> None:
    app = app_of()
    for rounds, strategy in (
        (RoundConfig.asynchronous(), "FedAsync()"),
        (RoundConfig.buffered(), "FedBuff(server_learning_rate=1.0)"),
        (RoundConfig(), "FedAvg()"),
    ):
        app = replace(app, rounds=rounds)
        assert repr(app.strategy) == strategy


def test_a_strategy_of_ones_own_stays_whatever_the_rounds() -> None:
    mine = fb.FedBuff(server_learning_rate=0.5)
    app = replace(app_of(strategy=mine, rounds=RoundConfig.buffered(5)), rounds=RoundConfig.synchronous(3))
    assert app.strategy is mine


@pytest.mark.parametrize(
    ("strategy", "rounds", "message"),
    [
        (
            fb.FedAsync(),
            RoundConfig(),
            "FedAsync makes a version of each update: set rounds=RoundConfig.asynchronous()",
        ),
        (
            fb.FedAsync(),
            RoundConfig.buffered(4),
            "FedAsync makes a version of each update: set rounds=RoundConfig.asynchronous()",
        ),
        (
            fb.FedAvg(),
            RoundConfig.asynchronous(),
            "RoundConfig.asynchronous() is for FedAsync: leave the strategy out, or use RoundConfig.buffered(k)",
        ),
        (
            fb.FedBuff(),
            RoundConfig.asynchronous(),
            "RoundConfig.asynchronous() is for FedAsync: leave the strategy out, or use RoundConfig.buffered(k) with "
            "FedBuff",
        ),
    ],
)
def test_a_strategy_that_makes_no_sense_with_the_rounds_is_refused(
    strategy: Strategy | None, rounds: RoundConfig, message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        app_of(strategy=strategy, rounds=rounds)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    "rounds", [RoundConfig(min_fit_clients=1), RoundConfig.buffered(1), RoundConfig.synchronous(1)]
)
def test_fedavg_is_taken_with_all_other_rounds(rounds: RoundConfig) -> None:
    assert repr(app_of(strategy=fb.FedAvg(), rounds=rounds).strategy) == "FedAvg()"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "fedavg"}, "strategy must be a fedbus Strategy such as FedAvg(), not 'fedavg'"),
        ({"strategy": fb.FedAvg}, "strategy must be a fedbus Strategy such as FedAvg(), not <class"),
        ({"rounds": 5}, "rounds must be a RoundConfig, not 5"),
        ({"update_queue": "stream"}, "update_queue must be 'quorum' or 'classic', not 'stream'"),
        ({"evaluate_fn": 3}, "evaluate_fn must be a function, not 3"),
        ({"evaluate_fn": lambda model: None}, "evaluate_fn must take (round, model): <lambda> does not"),
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        app_of(**settings)
    assert str(refused.value).startswith(message)


def test_every_name_of_the_package_can_be_had() -> None:
    assert {"FedAsync", "FedAvg", "FedBuff", "RoundConfig"} <= set(fb.__all__)
    for name in fb.__all__:
        assert getattr(fb, name).__name__ == name


def test_a_strategy_whose_halves_would_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="FedDyn needs updates as they are, and 'int8' rounds them"):
        app_of(strategy=fb.FedDyn(), compression="int8")
    app_of(strategy=fb.FedDyn(), compression="zstd")
    with pytest.raises(ConfigError, match=r"Scaffold needs updates .* set max_staleness to 1000, not 3"):
        app_of(strategy=fb.Scaffold(), rounds=RoundConfig.buffered(2, max_staleness=3))
    app_of(strategy=fb.Scaffold(), rounds=RoundConfig.buffered(2))

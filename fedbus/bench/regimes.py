"""The regimes side by side, in virtual time: how long until a model is good, and how good it gets.

FedProx's synthetic(1, 1) with logistic regression (`fedbus.examples.synthetic`) on 30 clients of lognormal speed; every
regime gets the same number of trainings.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.examples.synthetic import NUM_USERS, make_app
from fedbus.server.history import History
from fedbus.simulation.virtual import simulate
from fedbus.simulation.virtual_time import VirtualTime

_LAST: Final = 10
"""Rounds, or as many updates as ten rounds of a cohort have, whose mean accuracy is the final one."""
_COHORT: Final = 10


@dataclass(frozen=True)
class Regime:
    """One row of the table: `preset(**settings)`; `trainings_per_round` fits go into a round or come in vain."""

    name: str
    trainings_per_round: int
    preset: Callable[..., RoundConfig]
    settings: Mapping[str, Any]

    def rounds(self, trainings: int) -> RoundConfig:
        """Its settings, for about so many trainings in all."""
        num_rounds = max(1, round(trainings / self.trainings_per_round))
        return self.preset(num_rounds=num_rounds, min_available_clients=NUM_USERS, **self.settings)


def _cohorts(name: str, trainings: int, preset: Callable[..., RoundConfig], **settings: Any) -> Regime:
    return Regime(name, trainings, preset, {"clients": _COHORT, "fraction_evaluate": 0.0, "timeout_s": 1e6, **settings})


def _asynchronous(name: str, trainings: int, preset: Callable[..., RoundConfig], **settings: Any) -> list[Regime]:
    """As many at a time as the synchronous regimes, and all."""
    return [
        Regime(f"{name}, {_COHORT} at a time", trainings, preset, {"concurrency": _COHORT, **settings}),
        Regime(f"{name}, all {NUM_USERS}", trainings, preset, settings),
    ]


REGIMES: Final = (
    _cohorts("synchronous 10", 10, RoundConfig.synchronous),
    _cohorts("over-selection 13 -> 10, late ones stopped", 13, RoundConfig.semi_synchronous, max_staleness=0),
    _cohorts("over-selection 13 -> 10, late ones count", 10, RoundConfig.semi_synchronous),
    *_asynchronous("FedBuff K = 10", 10, RoundConfig.buffered, k=10),
    *_asynchronous("FedBuff K = 5", 5, RoundConfig.buffered, k=5),
    *_asynchronous("FedAsync alpha 0.6", 1, RoundConfig.asynchronous, alpha=0.6),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run. Seconds are virtual; `seconds_to_target` is None when the accuracy was never reached."""

    regime: str
    seed: int
    seconds_to_target: float | None
    final_accuracy: float
    seconds: float
    updates: int
    mean_staleness: float


def bench_regimes(*, seeds: int, trainings: int, target: float, speeds: str, data_seed: int) -> Iterator[Outcome]:
    """Run each regime with each seed (of cohorts, speeds and batches), one after the other.

    Raises:
        ConfigError: when a setting cannot work.
    """
    if seeds < 1 or trainings < 1 or not 0 < target <= 1:
        raise ConfigError("--seeds and --trainings must be 1 or more, --target in (0, 1]")
    virtual = VirtualTime(fit_s=1.0, speeds=speeds)
    for regime in REGIMES:
        for seed in range(seeds):
            app = make_app(regime.rounds(trainings), seed=seed, data_seed=data_seed)
            history = simulate(app, num_clients=NUM_USERS, virtual=dataclasses.replace(virtual, seed=seed))
            yield _outcome(regime, seed, history, target)


def _outcome(regime: Regime, seed: int, history: History, target: float) -> Outcome:
    curve = [
        (record.opened_s + record.seconds, record.central.metrics["accuracy"])
        for record in history.rounds
        if record.central is not None
    ]
    began_s = history.rounds[0].opened_s
    last = math.ceil(_LAST * _COHORT / min(_COHORT, regime.trainings_per_round))
    late = [update.staleness for record in history.rounds for update in record.folded]
    return Outcome(
        regime=regime.name,
        seed=seed,
        seconds_to_target=next((at_s - began_s for at_s, accuracy in curve if accuracy >= target), None),
        final_accuracy=statistics.fmean(accuracy for _, accuracy in curve[-last:]),
        seconds=curve[-1][0] - began_s,
        updates=history.updates,
        mean_staleness=statistics.fmean(late),
    )

"""Stragglers whose partial work counts, and stragglers that are dropped: FedProx's figure 1, in virtual time.

Li et al. 2020 (Federated Optimization in Heterogeneous Networks), section 5.2, on synthetic(1, 1): 30 users, 10 in each
round, 20 local epochs in batches of 10 with a learning rate of 0.01, and 90 % of stragglers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.examples.synthetic import NUM_USERS, make_app
from fedbus.simulation.virtual import simulate
from fedbus.simulation.virtual_time import VirtualTime
from fedbus.strategies.base import Strategy
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fedprox import FedProx

_COHORT: Final = 10
_EPOCHS: Final = 20
_STRAGGLERS: Final = 0.9
_LAST: Final = 10
"""Rounds whose mean accuracy and loss are told."""


@dataclass(frozen=True)
class Method:
    """One row of the table.

    `stragglers`: the share of tasks that come to fewer epochs, from 1 to 20. `kept`: how many of a cohort's ten updates
    count: with 1, those of the nine that take longest are dropped.
    """

    name: str
    strategy: Callable[[], Strategy]
    stragglers: float = 0.0
    kept: int = _COHORT

    def rounds(self, num_rounds: int) -> RoundConfig:
        """Ten are asked in each round, and those beyond `kept` are told to stop."""
        settings: dict[str, Any] = {"num_rounds": num_rounds, "min_available_clients": NUM_USERS}
        settings |= {"fraction_evaluate": 0.0, "timeout_s": 1e6, "max_staleness": 0}
        return RoundConfig.semi_synchronous(self.kept, over_selection=_COHORT / self.kept, **settings)


METHODS: Final = (
    Method("FedAvg, no stragglers", FedAvg),
    Method("FedAvg, 90 % dropped", FedAvg, kept=1),
    Method("FedProx mu 1, 90 % stragglers", lambda: FedProx(1.0), stragglers=_STRAGGLERS),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: means over its last ten rounds, on all users' test examples."""

    method: str
    data_seed: int
    accuracy: float
    loss: float
    updates: int


def bench_fedprox(*, rounds: int, data_seeds: Sequence[int], methods: Sequence[Method] = METHODS) -> Iterator[Outcome]:
    """Run each method on the data of each seed, one after the other.

    Raises:
        ConfigError: when there are fewer than ten rounds.
    """
    if rounds < _LAST:
        raise ConfigError(f"--rounds must be {_LAST} or more: the last {_LAST} are averaged")
    # Each fit's duration is drawn anew, so that it is chance who is first.
    virtual = VirtualTime(fit_s=1.0, speeds="lognormal:0:1")
    for data_seed in data_seeds:
        for method in methods:
            app = make_app(
                method.rounds(rounds),
                strategy=method.strategy(),
                data_seed=data_seed,
                epochs=_EPOCHS,
                stragglers=method.stragglers,
            )
            history = simulate(app, num_clients=NUM_USERS, virtual=virtual)
            last = [record.central for record in history.rounds[-_LAST:] if record.central is not None]
            yield Outcome(
                method=method.name,
                data_seed=data_seed,
                accuracy=statistics.fmean(float(central.metrics["accuracy"]) for central in last),
                loss=statistics.fmean(central.loss for central in last),
                updates=history.updates,
            )

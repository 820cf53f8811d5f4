"""FLamby's Fed-Heart-Disease, trained over a real bus by four client processes, beside the published figures.

The same four processes serve all runs, one after the other: each run's tasks bring seed, learning rate and method.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.api import serve
from fedbus.bench.measure import environment, last_words, run_folder
from fedbus.config import RoundConfig
from fedbus.data.heart_disease import FOLDER, HOSPITALS, data_folder
from fedbus.errors import ConfigError, RunFailed
from fedbus.examples.heart_disease import NUM_ROUNDS, make_app
from fedbus.simulation.processes import ClientProcesses, broker_or_private, client_processes
from fedbus.strategies.base import Strategy
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedbus.strategies.fedprox import FedProx
from fedbus.strategies.scaffold import Scaffold

_APP: Final = "fedbus.examples.heart_disease:app"
SEEDS: Final = (42, 43, 44, 45, 46)
"""FLamby's own."""


@dataclass(frozen=True)
class Method:
    """One row of the table. `published`: FLamby's mean accuracy on the pooled test over its five seeds, with `lr` and
    the strategy's settings as in its configuration; nothing is tuned here."""

    name: str
    published: float
    lr: float
    strategy: Callable[[], Strategy]


METHODS: Final = (
    Method("FedAvg", 0.7480, 0.001, FedAvg),
    Method("FedProx", 0.7480, 0.001, lambda: FedProx(0.01)),
    Method("SCAFFOLD", 0.7480, 0.001, lambda: Scaffold(weighting="examples")),
    Method("FedAdagrad", 0.7787, 0.003162, lambda: FedAdagrad(0.316228, beta_1=0.9, tau=1e-8, initial_v=0)),
    Method("FedAdam", 0.7787, 0.01, lambda: FedAdam(0.01, beta_2=0.999, tau=1e-8, initial_v=0)),
    Method("FedYogi", 0.7787, 0.003162, lambda: FedYogi(0.01, beta_2=0.999, tau=1e-8, initial_v=0)),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One method's accuracies on the 254 pooled test patients, by seed, and how far their mean is from the published
    one."""

    method: str
    published: float
    accuracies: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies.values())

    @property
    def difference(self) -> float:
        return self.mean - self.published

    def to_json(self) -> dict[str, object]:
        """With mean and difference, rounded to what 254 patients can tell."""
        return {
            **dataclasses.asdict(self),
            "accuracies": {str(seed): round(value, 4) for seed, value in self.accuracies.items()},
            "mean": round(self.mean, 4),
            "difference": round(self.difference, 4),
        }


async def bench_heart_disease(
    *,
    data: Path | None,
    seeds: Sequence[int] = SEEDS,
    broker: str | None = None,
    run_dir: Path | None = None,
    tell: Callable[[str, int, float], None] = lambda method, seed, accuracy: None,
) -> list[Outcome]:
    """Run each method with each seed; `tell` is called after each run.

    Raises:
        ConfigError: when there are no seeds, or `data` (None: FEDBUS_HEART_DISEASE) is not the folder of the files.
        BrokerError: when there is no broker, or it goes away.
        RunFailed: when a run fails, or a client process ends.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError("the heart-disease runs need seeds, each of them once")
    folder = data_folder(data).absolute()
    accuracies: dict[str, dict[int, float]] = {method.name: {} for method in METHODS}
    with run_folder(run_dir) as place, environment({FOLDER: str(folder)}):
        logs = place / "logs"
        async with broker_or_private(broker) as url, client_processes(_APP, log_dir=logs) as clients:
            await clients.load()
            for number, hospital in enumerate(HOSPITALS):
                await clients.spawn(hospital, broker=url, partition=number, num_partitions=len(HOSPITALS))
            jobs = [(method, seed) for method in METHODS for seed in seeds]
            for method, seed in jobs:
                accuracy = await _accuracy(clients, logs, url, method, seed, is_last=(method, seed) == jobs[-1])
                accuracies[method.name][seed] = accuracy
                tell(method.name, seed, accuracy)
            await clients.all_exited()
    return [
        Outcome(method=method.name, published=method.published, accuracies=accuracies[method.name])
        for method in METHODS
    ]


async def _accuracy(
    clients: ClientProcesses, logs: Path, url: str, method: Method, seed: int, *, is_last: bool
) -> float:
    """That of the last model of one run."""
    rounds = RoundConfig.synchronous(len(HOSPITALS), num_rounds=NUM_ROUNDS, fraction_evaluate=0)
    app = make_app(method.strategy(), seed=seed, lr=method.lr, rounds=rounds)
    serving = asyncio.ensure_future(serve(app, broker=url, keeps_clients=not is_last))
    deserted = asyncio.ensure_future(clients.any_exited())
    try:
        await asyncio.wait({serving, *([] if is_last else [deserted])}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            raise RunFailed(f"a hospital's process ended: {last_words(logs)}")
        history = serving.result()
    finally:
        for task in (serving, deserted):
            task.cancel()
        await asyncio.wait([serving, deserted])
    central = history.rounds[-1].central
    assert central is not None
    return float(central.metrics["accuracy"])

"""A federation with slow clients in it, by the wall clock: how long it takes, and what becomes of their updates.

Server and clients import `fedbus.bench.stragglers:app`; the environment tells them what to build.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.app import App
from fedbus.bench.measure import environment, run_folder
from fedbus.bench.noop import model
from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.server.history import History
from fedbus.simulation.processes import run_federation
from fedbus.training.base import Client, ClientContext
from fedbus.types import Config, FitResult, Tensors

_APP: Final = "fedbus.bench.stragglers:app"
_SPEC: Final = "FEDBUS_BENCH_STRAGGLERS"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """`fast` clients whose fit takes `fast_s` seconds, `slow` ones of `slow_s`; a round waits for `fast` updates."""

    fast: int = 8
    slow: int = 2
    fast_s: float = 0.5
    slow_s: float = 5.0
    model_mib: float = 1.0
    rounds: int = 10

    def __post_init__(self) -> None:
        if self.fast < 1 or self.slow < 0 or self.rounds < 1:
            raise ConfigError("--fast and --rounds must be 1 or more, --slow 0 or more")
        if not (self.fast_s >= 0 and self.slow_s >= 0 and self.model_mib > 0):
            raise ConfigError("--fast-s and --slow-s must be 0 or more, --model-mib more than 0")


@dataclass(frozen=True, kw_only=True)
class StragglersBench:
    """`seconds`: from the first task to the last commit. `at_best_s`: what the fast clients' own fits take.

    `slow_updates` of the `updates` are those of slow clients; `staleness`: how many versions late each of them was.
    """

    spec: Spec
    seconds: float
    at_best_s: float
    updates: int
    slow_updates: int
    staleness: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


class _Sleeping(Client):
    def __init__(self, context: ClientContext, seconds: float) -> None:
        self._context = context
        self._seconds = seconds

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        ends_at = time.monotonic() + self._seconds
        while (left_s := ends_at - time.monotonic()) > 0 and not self._context.cancelled:
            time.sleep(min(left_s, 0.05))
        return FitResult(parameters=parameters, num_examples=1)


def _app() -> App:
    spec = Spec(**json.loads(os.environ.get(_SPEC, "{}")))
    return App(
        client_fn=lambda context: _Sleeping(context, spec.fast_s if context.partition < spec.fast else spec.slow_s),
        initial_parameters=lambda: model(spec.model_mib),
        rounds=RoundConfig(
            num_rounds=spec.rounds,
            min_fit_clients=spec.fast,
            min_available_clients=spec.fast + spec.slow,
            fraction_evaluate=0,
        ),
    )


app = _app()


async def bench_stragglers(spec: Spec, *, broker: str | None, run_dir: Path | None) -> StragglersBench:
    """Measure. Without `broker` on a private node; without `run_dir` in a folder that is deleted at the end.

    Raises:
        BrokerError: when there is no broker, or it goes away.
        RunFailed: when a process of the measurement fails.
    """
    with run_folder(run_dir) as folder, environment({_SPEC: json.dumps(dataclasses.asdict(spec))}):
        history = await run_federation(
            _APP,
            _app,  # the module may have been imported with other settings
            num_clients=spec.fast + spec.slow,
            broker=broker,
            run_dir=folder / "run",
            observers=(),
        )
    return _result(spec, history)


def _result(spec: Spec, history: History) -> StragglersBench:
    slow = set(sorted(history.clients)[spec.fast :])  # names go with partitions
    of_slow = [update for record in history.rounds for update in record.folded if update.client_id in slow]
    first, last = history.rounds[0], history.rounds[-1]
    return StragglersBench(
        spec=spec,
        seconds=round(last.opened_s + last.seconds - first.opened_s, 3),
        at_best_s=spec.rounds * spec.fast_s,
        updates=history.updates,
        slow_updates=len(of_slow),
        staleness=tuple(update.staleness for update in of_slow),
    )

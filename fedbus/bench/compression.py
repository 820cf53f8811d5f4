"""What compression saves and costs: the digits of the demo trained over a real broker, once with each codec."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.app import App
from fedbus.bench.measure import run_folder
from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.server.history import History
from fedbus.simulation.processes import broker_or_private, run_federation
from fedbus.wire.compression import Codec

_APP: Final = "fedbus.examples.digits:app"

CODECS: Final = (
    "",
    "zstd",
    "float16",
    "bfloat16",
    "int8",
    "int8+zstd",
    "qsgd:7",
    "topk:0.01",
    "topk:0.01+int8",
    "topk:0.1+int8",
)
"""The first is what the others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run. Bytes are of the payload of updates; `ratio`: what they would be without a codec over what they are.

    `accuracy`: of the last model on the 20 % of the digits that no client has. `best`: the highest of any round.
    """

    codec: str
    rounds: int
    bytes_per_update: float
    bytes_per_round: float
    ratio: float
    accuracy: float
    best: float


async def bench_compression(
    *, clients: int, rounds: int, seed: int, codecs: tuple[str, ...], broker: str | None, run_dir: Path | None
) -> AsyncIterator[Outcome]:
    """Train with each codec: every client is in every round, and all else is the same.

    Without `broker` on a private node; without `run_dir` in a folder that is deleted at the end.

    Raises:
        BrokerError: when there is no broker, or it goes away.
        ConfigError: for a codec that makes no sense, or a missing package.
        RunFailed: when a process of the measurement fails.
    """
    if clients < 1 or rounds < 1:
        raise ConfigError("--clients and --rounds must be 1 or more")
    for text in codecs:
        Codec.parse(text).check_installed()
    with run_folder(run_dir) as folder:
        async with broker_or_private(broker) as url:
            for number, text in enumerate(codecs):
                history = await run_federation(
                    _APP,
                    lambda text=text: _app(text, clients, rounds, seed),  # type: ignore[misc]
                    num_clients=clients,
                    broker=url,
                    run_dir=folder / f"{number}",
                    observers=(),
                )
                yield _outcome(text, history)


def _app(text: str, clients: int, rounds: int, seed: int) -> App:
    from fedbus.examples.digits import app  # it needs torch

    every = RoundConfig(
        num_rounds=rounds, min_fit_clients=clients, min_available_clients=clients, fraction_evaluate=0, timeout_s=600
    )
    return dataclasses.replace(app, rounds=every, compression=text, seed=seed)


def _outcome(text: str, history: History) -> Outcome:
    updates = [update for record in history.rounds for update in record.folded]
    nbytes, raw_bytes = (sum(getattr(update, name) for update in updates) for name in ("nbytes", "raw_bytes"))
    curve = [float(record.central.metrics["accuracy"]) for record in history.rounds if record.central is not None]
    return Outcome(
        codec=text,
        rounds=history.num_rounds,
        bytes_per_update=round(nbytes / len(updates), 1),
        bytes_per_round=round(nbytes / history.num_rounds, 1),
        ratio=round(raw_bytes / nbytes, 2),
        accuracy=round(curve[-1], 4),
        best=round(max(curve), 4),
    )

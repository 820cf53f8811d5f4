"""A federation whose clients return the model at once: what remains is fedbus and the broker.

Server and clients import `fedbus.bench.noop:app` in processes of their own; the environment tells them what to build.
In the first and in the last round clients wait at a gate, a file in `GATES`, so that whoever measures can look at
processes and connections while nothing moves.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

import numpy as np

from fedbus.app import App
from fedbus.config import RoundConfig
from fedbus.training.base import Client, ClientContext
from fedbus.types import Array, Config, FitResult, Tensors

MODEL_MIB: Final = "FEDBUS_BENCH_MODEL_MIB"
CLIENTS: Final = "FEDBUS_BENCH_CLIENTS"
ROUNDS: Final = "FEDBUS_BENCH_ROUNDS"
GATES: Final = "FEDBUS_BENCH_GATES"

_LAYERS: Final = (0.4, 0.3, 0.2)
"""Shares of the large tensors, each followed by a small one; what remains is the last tensor."""
_LARGEST_BIAS: Final = 1024
_GATE_POLL_S: Final = 0.01


def model(mib: float) -> dict[str, Array]:
    """Float32 tensors, a few large and some small, together `mib` MiB (to 4 bytes); always the same values."""
    total = max(1, round(mib * (1 << 18)))
    bias = _whole(min(_LARGEST_BIAS, total // 64))
    sizes = [size for share in _LAYERS for size in (_whole(total * share) - bias, bias)]
    sizes.append(total - sum(sizes))
    random = np.random.default_rng(0)
    return {f"tensor-{i}": random.standard_normal(size, np.float32) for i, size in enumerate(sizes)}


def _whole(size: float) -> int:
    """`size` elements, rounded down to what fills 64 bytes: no padding between tensors, 1 MiB is one part."""
    return int(size) // 16 * 16


def gate(folder: Path, round: int) -> Path:
    """The file that lets the clients of `round` go on."""
    return folder / f"go.{round}"


def arrivals(folder: Path, round: int) -> list[Path]:
    """The files of the clients that wait at the gate of `round`; each holds the client's process id."""
    return [path for path in folder.glob(f"waiting.{round}.*") if path.read_text().endswith("\n")]


class NoOpClient(Client):
    """Returns the model as it got it, without a copy. Waits at the gates of the `gated` rounds."""

    def __init__(self, context: ClientContext, gates: Path | None, gated: tuple[int, ...]) -> None:
        self._context = context
        self._gates = gates
        self._gated = gated

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        if self._gates is not None and config["round"] in self._gated:
            self._wait(self._gates, int(config["round"]))
        return FitResult(parameters=parameters, num_examples=1)

    def _wait(self, folder: Path, round: int) -> None:
        (folder / f"waiting.{round}.{self._context.client_id}").write_text(f"{os.getpid()}\n")
        while not gate(folder, round).exists() and not self._context.cancelled:
            time.sleep(_GATE_POLL_S)


def _app() -> App:
    mib, clients = float(os.environ.get(MODEL_MIB, "1")), int(os.environ.get(CLIENTS, "2"))
    rounds = int(os.environ.get(ROUNDS, "3"))
    gates = Path(os.environ[GATES]) if GATES in os.environ else None
    return App(
        client_fn=lambda context: NoOpClient(context, gates, (1, rounds)),
        initial_parameters=lambda: model(mib),
        rounds=RoundConfig(
            num_rounds=rounds,
            min_fit_clients=clients,
            min_available_clients=clients,
            fraction_evaluate=0,
            timeout_s=3600,
            lease_s=60,
        ),
    )


app = _app()

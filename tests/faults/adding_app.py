"""An app whose every update is known beforehand, and journals of which of them were attempted.

A delta is a function of (seed, round, client) alone, in steps of 2**-10: sums of them in float64 are exact, so that
the final model does not depend on the order of arrival, and a run with crashes must end with the very bytes of a
run without. All clients are needed in each round.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

import fedbus as fb
from fedbus.training.base import Client, ClientContext
from fedbus.types import Array

_PREFIX = "FAULTS_"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the processes of one run agree on, through their environment.

    Args:
        clients: c1 .. cN; all must be there before round 1.
        needed: as many of them are asked in a round, and needed; 0: all.
        rounds: rounds of the run.
        model_bytes: size of the model's large tensor.
        fit_s: seconds that a fit takes.
        journal: folder of the journals and of the gate's file; "" keeps none.
        gate: "CLIENT/ROUND": that fit lasts until the file "gate" is in the journal folder.
        seed: of the deltas.
        heartbeat_s, lease_s: of the clients; the lease must outlast whatever is down in between.
        timeout_s: of a round.
        message_queues: as the app has it.
    """

    clients: int = 8
    needed: int = 0
    rounds: int = 50
    model_bytes: int = 4096
    fit_s: float = 0.05
    journal: str = ""
    gate: str = ""
    seed: int = 0
    heartbeat_s: float = 0.5
    lease_s: float = 60.0
    timeout_s: float = 300.0
    message_queues: str = "classic"

    @property
    def client_ids(self) -> tuple[str, ...]:
        return tuple(f"c{number}" for number in range(1, self.clients + 1))

    def to_env(self) -> dict[str, str]:
        return {_PREFIX + name.upper(): str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_env(cls) -> Self:
        """The settings in the environment; the defaults for what is not there."""
        given: dict[str, Any] = {}
        for name, default in asdict(cls()).items():
            if (text := os.environ.get(_PREFIX + name.upper())) is not None:
                given[name] = type(default)(text)
        return cls(**given)


def initial_model(settings: Settings) -> dict[str, Array]:
    """Zeros, float32: "w" of model_bytes, and "b" of three numbers."""
    return {"w": np.zeros(settings.model_bytes // 4, np.float32), "b": np.zeros(3, np.float32)}


def delta_of(settings: Settings, client_id: str, round: int) -> dict[str, Array]:
    """What this client adds to the model in this round: multiples of 2**-10 in [-1/2, 1/2], float32."""
    rng = np.random.default_rng([settings.seed, round, *client_id.encode()])
    return {
        name: rng.integers(-512, 513, value.shape).astype(np.float32) / np.float32(1024)
        for name, value in initial_model(settings).items()
    }


def digest(tensors: dict[str, Array]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    hashed = hashlib.sha256()
    for name, value in tensors.items():
        hashed.update(f"{name} {value.dtype} {value.shape} ".encode())
        hashed.update(np.ascontiguousarray(value).tobytes())
    return hashed.hexdigest()


class Adding(Client):
    """Adds its delta, and writes down what it is about to send before it does."""

    def __init__(self, context: ClientContext, settings: Settings) -> None:
        self._id = context.client_id
        self._settings = settings

    def fit(self, parameters: Any, config: Any) -> fb.FitResult:
        round = int(config["round"])
        time.sleep(self._settings.fit_s)
        self._wait_at_gate(round)
        delta = delta_of(self._settings, self._id, round)
        self._note(round, digest(delta))
        return fb.FitResult(
            parameters={name: value + delta[name] for name, value in parameters.items()},
            num_examples=int(self._id[1:]),
        )

    def _wait_at_gate(self, round: int) -> None:
        if self._settings.gate == f"{self._id}/{round}":
            while not (Path(self._settings.journal) / "gate").exists():
                time.sleep(0.01)

    def _note(self, round: int, sha: str) -> None:
        """One write to the end of the journal: it is there whole, or not at all, whenever we are killed."""
        if not self._settings.journal:
            return
        line = json.dumps({"client_id": self._id, "round": round, "sha": sha}) + "\n"
        path = Path(self._settings.journal) / f"{self._id}.jsonl"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)


def make_app(settings: Settings) -> fb.App:
    """The app that these settings describe."""
    return fb.App(
        client_fn=lambda context: Adding(context, settings),
        initial_parameters=lambda: initial_model(settings),
        seed=settings.seed,
        message_queues="quorum" if settings.message_queues == "quorum" else "classic",
        rounds=fb.RoundConfig(
            num_rounds=settings.rounds,
            min_fit_clients=settings.needed or settings.clients,
            min_available_clients=settings.clients,
            over_selection=1.0 if settings.needed else None,
            fraction_evaluate=0,
            heartbeat_s=settings.heartbeat_s,
            lease_s=settings.lease_s,
            timeout_s=settings.timeout_s,
        ),
    )


app = make_app(Settings.from_env())

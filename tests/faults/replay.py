"""The model that a ledger tells: each update is known beforehand, so a run can be computed again, whoever was in it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.fedavg import FedAvg
from fedbus.training.delta import update_delta
from fedbus.types import Array
from tests.faults.adding_app import Settings, delta_of, digest, initial_model, make_app

_KEPT_VERSIONS = 64


def replayed_sha(settings: Settings, run_dir: Path) -> str:
    """SHA-256 of the model that the committed rounds lead to, update by update, in this process."""
    with closing(sqlite3.connect(run_dir / "ledger.sqlite")) as db:
        rounds = db.execute("SELECT round, version FROM rounds WHERE round > 0 ORDER BY round").fetchall()
        folded: dict[int, list[tuple[str, str, int]]] = {}
        for task_id, client_id, round_, staleness in db.execute("SELECT * FROM folded"):
            folded.setdefault(round_, []).append((task_id, client_id, staleness))
    config, strategy = make_app(settings).rounds, FedAvg()
    models: dict[int, dict[str, Array]] = {0: initial_model(settings)}
    version_after = {0: 0}
    for round_, version in rounds:
        model = models[version_after[round_ - 1]]
        if version != version_after[round_ - 1]:
            sums = strategy.init(model)
            for task_id, client_id, staleness in folded[round_]:
                tasked = int(task_id.split("/")[2])
                base = models[version_after[tasked - 1]]
                delta = delta_of(settings, client_id, tasked)
                strategy.fold(
                    sums,
                    ClientUpdate(
                        client_id=client_id,
                        delta=update_delta(base, {name: value + delta[name] for name, value in base.items()}),
                        num_examples=int(client_id[1:]),
                        staleness=staleness,
                        discount=config.discount(staleness),
                        metrics={},
                        base=None,
                    ),
                )
            models[version] = strategy.finish(sums, model)
            models.pop(version - _KEPT_VERSIONS, None)
        version_after[round_] = version
    return digest(models[version_after[len(rounds)]])

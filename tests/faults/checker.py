"""Jepsen's checker for sets, over a finished run: attempted, acknowledged, folded.

An element is (client, round): the update of that client for its fit task of that round. What clients attempted is in
their journals, what the server acknowledged in the receipts of their logs, what it folded in the ledger, and once
more, independently, in history.json.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedbus.tensorfile import load_model
from tests.faults.adding_app import Settings, delta_of, digest

Element: TypeAlias = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of every update; the run is sound when `problems` is empty."""

    rounds: int
    rounds_expected: int
    attempts: int  # more than attempted: a fit that was killed is done again
    attempted: int
    acknowledged: int
    folded: int
    lost: tuple[Element, ...]
    missing: tuple[Element, ...]
    duplicated: tuple[Element, ...]
    unexpected: tuple[Element, ...]
    altered: tuple[Element, ...]
    disagreeing: tuple[Element, ...]
    sha: str
    sha_expected: str

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each thing that is wrong."""
        found = [
            _listed("acknowledged, but not folded", self.lost),
            _listed("not folded", self.missing),
            _listed("folded more than once", self.duplicated),
            _listed("folded, but never attempted", self.unexpected),
            _listed("attempted with other bytes than planned", self.altered),
            _listed("in only one of ledger and history", self.disagreeing),
        ]
        if self.rounds != self.rounds_expected:
            found.append(f"{self.rounds} of {self.rounds_expected} rounds are complete")
        if self.sha != self.sha_expected:
            found.append(f"the model is {self.sha[:12]}, without faults it is {self.sha_expected[:12]}")
        return tuple(filter(None, found))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "problems": self.problems}

    def __str__(self) -> str:
        return (
            f"rounds {self.rounds}/{self.rounds_expected}, attempted {self.attempted} (in {self.attempts} attempts), "
            f"acknowledged {self.acknowledged}, folded {self.folded}, lost {len(self.lost)}, "
            f"missing {len(self.missing)}, duplicated {len(self.duplicated)}, unexpected {len(self.unexpected)}, "
            f"model {'equal' if self.sha == self.sha_expected else 'DIFFERENT'} ({self.sha[:12]})"
        )


def check(settings: Settings, *, run_dir: Path, client_logs: list[Path], sha_expected: str) -> Verdict:
    """Compare what the clients did and heard with what is in the run folder."""
    attempts = _attempts(Path(settings.journal))
    attempted = {element for element, _ in attempts}
    acknowledged = {element for log in client_logs for element in _receipts(log)}
    ledger = folded_in_ledger(run_dir)
    history = _in_history(run_dir)
    everybody = () if settings.needed else settings.client_ids  # else nobody can tell who had to be in a round
    due = {(client_id, round) for client_id in everybody for round in range(1, settings.rounds + 1)}
    return Verdict(
        rounds=rounds_in_ledger(run_dir),
        rounds_expected=settings.rounds,
        attempts=len(attempts),
        attempted=len(attempted),
        acknowledged=len(acknowledged),
        folded=len(ledger),
        lost=_sorted(acknowledged - set(ledger)),
        missing=_sorted(due - (set(ledger) & set(history))),
        duplicated=_sorted({element for element in ledger | history if max(ledger[element], history[element]) > 1}),
        unexpected=_sorted(set(ledger | history) - attempted),
        altered=_sorted({element for element, sha in attempts if sha != digest(delta_of(settings, *element))}),
        disagreeing=_sorted(set(ledger) ^ set(history)),
        sha=model_sha(run_dir),
        sha_expected=sha_expected,
    )


def model_sha(run_dir: Path) -> str:
    """SHA-256 of the final model's tensors; "" when there is none."""
    path = run_dir / "model.safetensors"
    return digest(load_model(path)) if path.exists() else ""


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects among the lines of a log; a process that is killed may leave half a line."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def _attempts(journal: Path) -> list[tuple[Element, str]]:
    return [
        ((line["client_id"], line["round"]), line["sha"])
        for path in sorted(journal.glob("*.jsonl"))
        for line in json_lines(path)
    ]


def _receipts(log: Path) -> Iterator[Element]:
    for line in json_lines(log):
        if line.get("event") == "receipt_arrived":
            yield line["client_id"], line["round"] - line["staleness"]


def folded_in_ledger(run_dir: Path) -> Counter[Element]:
    """How often each update is in the ledger."""
    rows = _query(run_dir, "SELECT task_id, client_id FROM folded")
    return Counter((client_id, int(task_id.split("/")[2])) for task_id, client_id in rows)


def rounds_in_ledger(run_dir: Path) -> int:
    """How many rounds are committed."""
    return len({round for (round,) in _query(run_dir, "SELECT round FROM rounds") if round > 0})


def _query(run_dir: Path, statement: str) -> list[tuple[Any, ...]]:
    path = run_dir / "ledger.sqlite"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(statement).fetchall()


def _in_history(run_dir: Path) -> Counter[Element]:
    path = run_dir / "history.json"
    rounds = json.loads(path.read_text())["rounds"] if path.exists() else []
    return Counter(
        (update["client_id"], record["round"] - update["staleness"]) for record in rounds for update in record["folded"]
    )


def _sorted(elements: set[Element]) -> tuple[Element, ...]:
    return tuple(sorted(elements, key=lambda element: (element[1], element[0])))


def _listed(what: str, elements: tuple[Element, ...]) -> str:
    shown = ", ".join(f"{client_id} of round {round}" for client_id, round in elements[:8])
    more = f" and {len(elements) - 8} more" if len(elements) > 8 else ""
    return f"{len(elements)} updates {what}: {shown}{more}" if elements else ""

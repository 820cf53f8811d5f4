"""The checker of the fault campaigns finds what it is there to find."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from fedbus.tensorfile import save_model
from tests.faults.adding_app import Settings, delta_of, digest, initial_model
from tests.faults.checker import Element, Verdict, check
from tests.faults.expected import expected_sha

ALL = [("c1", 1), ("c2", 1), ("c1", 2), ("c2", 2)]


class Story:
    """A run of two clients and two rounds, made up: by default a sound one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = Settings(clients=2, rounds=2, journal=str(folder))
        self.attempted: Sequence[Element] = ALL
        self.acknowledged: Sequence[Element] = ALL
        self.ledger: Sequence[Element] = ALL
        self.history: Sequence[Element] = ALL
        self.rounds = [0, 1, 2]
        self.sha_of_delta: str | None = None
        self.sha_expected = digest(initial_model(self.settings))

    def verdict(self) -> Verdict:
        run_dir, log = self.folder / "run", self.folder / "c.log"
        run_dir.mkdir()
        save_model(run_dir / "model.safetensors", initial_model(self.settings), {})
        self._write_journal()
        log.write_text("".join(_receipt(*element) for element in self.acknowledged) + '{"half a li')
        self._write_ledger(run_dir / "ledger.sqlite")
        records = [{"round": n, "folded": [_folded(*u) for u in self.history if u[1] == n]} for n in (1, 2)]
        (run_dir / "history.json").write_text(json.dumps({"rounds": records}))
        return check(self.settings, run_dir=run_dir, client_logs=[log], sha_expected=self.sha_expected)

    def _write_journal(self) -> None:
        for client_id, round in self.attempted:
            sha = self.sha_of_delta or digest(delta_of(self.settings, client_id, round))
            with (self.folder / f"{client_id}.jsonl").open("a") as journal:
                journal.write(json.dumps({"client_id": client_id, "round": round, "sha": sha}) + "\n")

    def _write_ledger(self, path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE rounds(round INTEGER PRIMARY KEY, version INTEGER, record TEXT)")
            connection.execute("CREATE TABLE folded(task_id TEXT PRIMARY KEY, client_id TEXT, round INTEGER)")
            connection.executemany("INSERT INTO rounds VALUES (?, ?, '{}')", [(n, n) for n in self.rounds])
            rows = [(f"r/fit/{round}/{client_id}", client_id, round) for client_id, round in self.ledger]
            connection.executemany("INSERT INTO folded VALUES (?, ?, ?)", rows)


def _receipt(client_id: str, round: int) -> str:
    event = {"event": "receipt_arrived", "client_id": client_id, "round": round, "staleness": 0}
    return json.dumps(event) + "\n"


def _folded(client_id: str, round: int) -> dict[str, object]:
    return {"client_id": client_id, "staleness": 0}


@pytest.fixture
def story(tmp_path: Path) -> Story:
    return Story(tmp_path)


def test_a_sound_run_has_no_problems(story: Story) -> None:
    assert story.verdict().problems == ()


def test_an_update_with_a_receipt_that_is_not_folded_is_lost(story: Story) -> None:
    story.ledger = story.history = ALL[:3]
    verdict = story.verdict()
    assert verdict.lost == verdict.missing == (("c2", 2),)


def test_a_receipt_that_was_never_heard_is_no_loss(story: Story) -> None:
    story.acknowledged = ALL[:1]
    assert story.verdict().problems == ()


def test_an_update_that_is_twice_in_the_history_is_duplicated(story: Story) -> None:
    story.history = [*ALL, ("c1", 2)]
    assert story.verdict().duplicated == (("c1", 2),)


def test_an_update_that_nobody_attempted_is_unexpected(story: Story) -> None:
    story.attempted = ALL[1:]
    assert story.verdict().unexpected == (("c1", 1),)


def test_ledger_and_history_must_agree(story: Story) -> None:
    story.history = ALL[:3]
    verdict = story.verdict()
    assert (verdict.disagreeing, verdict.missing) == ((("c2", 2),), (("c2", 2),))


def test_a_delta_of_other_bytes_than_planned_is_seen(story: Story) -> None:
    story.sha_of_delta = "0" * 64
    assert len(story.verdict().altered) == 4


def test_a_round_that_is_not_in_the_ledger_is_seen(story: Story) -> None:
    story.rounds = [0, 1]
    assert story.verdict().problems == ("1 of 2 rounds are complete",)


def test_another_model_is_seen(story: Story) -> None:
    story.sha_expected = expected_sha(story.settings)
    (problem,) = story.verdict().problems
    assert problem.startswith("the model is")

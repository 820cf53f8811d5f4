"""What is committed stays so, and only the newest server may say more."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedbus.errors import ConfigError, RunFailed
from fedbus.rounds.restored import RestoredTask
from fedbus.server.history import Evaluation, FoldedUpdate, History, RoundRecord
from fedbus.server.ledger import Fenced, Ledger


def record(number: int, *, version: int | None = None) -> RoundRecord:
    return RoundRecord(
        round=number,
        version=number if version is None else version,
        reason="min_fit_clients",
        opened_s=number / 10,
        seconds=number / 10 + 0.05,
        cohort=["a", "b"],
        folded=[FoldedUpdate(client_id="a", staleness=0, num_examples=3, metrics={"loss": 0.5})],
        unfinished=["b"],
        lost=[],
        failed={"c": "no data"},
        refused={},
        fit_metrics={"loss": 0.5},
    )


def begun(path: Path | None) -> Ledger:
    ledger = Ledger(path)
    ledger.begin(History(run_id="r", started_at="today", settings={"seed": 3}))
    ledger.commit_model(0)
    return ledger


def commit(ledger: Ledger, number: int, *folded: str, version: int | None = None, max_staleness: int = 10) -> None:
    rows = [(f"r/fit/{number}/{client}", client, 0) for client in folded]
    ledger.commit_round(record(number, version=version), rows, seconds=float(number), max_staleness=max_staleness)


def task(number: int, client: str, version: int | None = None) -> tuple[str, str, int, int]:
    return f"r/fit/{number}/{client}", client, number, number - 1 if version is None else version


def test_a_run_comes_back_as_it_was_committed(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    assert ledger.holds_a_run
    commit(ledger, 1, "a")
    commit(ledger, 2, "a", "b")
    history = History(run_id="r", started_at="today", settings={"seed": 3}, clients_joined=["a", "b"])
    history.initial = Evaluation(loss=0.25, metrics={"accuracy": 0.5})
    ledger.note_members(["b"], history)
    ledger.close()
    last = Ledger(tmp_path / "l").take_over(max_staleness=10)
    assert last.history == History(
        run_id="r",
        started_at="today",
        settings={"seed": 3},
        clients_joined=["a", "b"],
        initial=history.initial,
        rounds=[record(1), record(2)],
    )
    assert (last.epoch, last.version, last.seconds, last.members, last.tasks) == (2, 2, 2.0, ("b",), ())


def test_a_run_without_a_model_has_no_version(tmp_path: Path) -> None:
    Ledger(tmp_path / "l").begin(History(run_id="r"))
    last = Ledger(tmp_path / "l").take_over(max_staleness=10)
    assert (last.version, last.history.rounds, last.epoch) == (None, [], 2)


def test_a_begin_that_dies_half_way_leaves_no_run(tmp_path: Path) -> None:
    class Dying(sqlite3.Connection):
        def execute(self, sql: str, *rest: Any) -> sqlite3.Cursor:
            if sql.startswith("INSERT"):
                raise KeyboardInterrupt
            return super().execute(sql, *rest)

    ledger = Ledger(tmp_path / "l")
    ledger._db = sqlite3.connect(tmp_path / "l", isolation_level=None, factory=Dying)
    with pytest.raises(KeyboardInterrupt):
        ledger.begin(History(run_id="r"))
    ledger.close()
    assert not Ledger(tmp_path / "l").holds_a_run


def test_a_run_without_a_folder_is_kept_in_memory() -> None:
    ledger = begun(None)
    commit(ledger, 1, "a")
    assert ledger.folded_in(1) == [("r/fit/1/a", "a", 0)]


def test_an_update_cannot_be_committed_twice_and_its_round_is_not_there_either(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    commit(ledger, 1, "a")
    again = [("r/fit/1/a", "a", 1)]
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit_round(record(2), again, seconds=2.0, max_staleness=10)
    assert ledger.folded_in(2) == []
    last = Ledger(tmp_path / "l").take_over(max_staleness=10)
    assert ([record.round for record in last.history.rounds], last.version, last.seconds) == ([1], 1, 1.0)


def test_a_receipt_can_be_given_again_to_its_owner_alone(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    ledger.commit_round(record(4), [("r/fit/2/a", "a", 2)], seconds=4.0, max_staleness=10)
    assert ledger.receipt_of("r/fit/2/a", "a") == (4, 2)
    assert ledger.receipt_of("r/fit/2/a", "b") is None
    assert ledger.receipt_of("r/fit/3/a", "a") is None


def test_tasks_are_working_failed_or_folded(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    ledger.note_tasks([task(1, client) for client in "abc"])
    ledger.note_failed("r/fit/1/b", "b", "no data")
    ledger.note_failed("r/fit/1/c", "b", "a stranger's word")
    commit(ledger, 1, "a")
    tasks = Ledger(tmp_path / "l").take_over(max_staleness=10).tasks
    fields: dict[str, Any] = {"round": 1, "version": 0}
    assert tasks == (
        RestoredTask(task_id="r/fit/1/a", client_id="a", state="folded", folded_in=1, **fields),
        RestoredTask(task_id="r/fit/1/b", client_id="b", state="failed", reason="no data", **fields),
        RestoredTask(task_id="r/fit/1/c", client_id="c", state="working", **fields),
    )


def test_a_task_that_is_sent_again_is_noted_once_and_stays_failed(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    ledger.note_tasks([task(1, "a")])
    ledger.note_failed("r/fit/1/a", "a", "no data")
    ledger.note_tasks([task(1, "a")])
    (only,) = Ledger(tmp_path / "l").take_over(max_staleness=10).tasks
    assert (only.state, only.reason) == ("failed", "no data")


def test_tasks_of_versions_beyond_the_window_are_forgotten_but_not_what_was_folded(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    for number in range(1, 6):
        ledger.note_tasks([task(number, "a")])
        commit(ledger, number, "a", max_staleness=2)
    last = Ledger(tmp_path / "l").take_over(max_staleness=2)
    assert [task.version for task in last.tasks] == [3, 4]
    assert ledger.receipt_of("r/fit/1/a", "a") == (1, 0)


def test_what_becomes_known_of_a_round_later_is_in_its_record(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    commit(ledger, 1, "a")
    changed = record(1)
    changed.central = Evaluation(loss=float("nan"), metrics={})
    changed.federated = Evaluation(loss=0.5, metrics={"half": 0.5}, clients=2, num_examples=7)
    ledger.note_record(changed)
    (read,) = Ledger(tmp_path / "l").take_over(max_staleness=10).history.rounds
    assert read.federated == changed.federated
    assert read.central == Evaluation(loss=None, metrics={})  # type: ignore[arg-type]  # JSON has no NaN


def test_the_end_of_a_run_is_noted(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    ledger.save_end(History(run_id="r", finished=True, reason="all rounds are done", seconds=9.5))
    last = Ledger(tmp_path / "l").take_over(max_staleness=10)
    assert (last.history.finished, last.history.reason, last.seconds) == (True, "all rounds are done", 9.5)


def test_a_server_that_was_replaced_can_write_nothing_more_and_can_still_read(tmp_path: Path) -> None:
    old = begun(tmp_path / "l")
    commit(old, 1, "a")
    new = Ledger(tmp_path / "l")
    new.take_over(max_staleness=10)
    history = History(run_id="r", finished=True)
    writes: list[Callable[[], None]] = [
        lambda: old.note_tasks([task(2, "a")]),
        lambda: old.note_failed("r/fit/1/a", "a", "late"),
        lambda: old.note_members(["x"], history),
        lambda: old.note_record(record(1, version=9)),
        lambda: old.commit_model(7),
        lambda: commit(old, 2, "a"),
        lambda: old.save_end(history),
    ]
    for write in writes:
        with pytest.raises(Fenced, match=r"another server has taken this run over \(epoch 2, this one is 1\)"):
            write()
    assert old.receipt_of("r/fit/1/a", "a") == (1, 0)
    last = new.take_over(max_staleness=10)
    assert (last.version, last.members, last.tasks, last.history.finished) == (1, (), (), False)
    assert last.history.rounds == [record(1)]


def test_the_next_server_goes_on_writing_after_a_transaction_that_was_fenced(tmp_path: Path) -> None:
    old = begun(tmp_path / "l")
    new = Ledger(tmp_path / "l")
    new.take_over(max_staleness=10)
    with pytest.raises(Fenced):
        commit(old, 1, "a")
    commit(new, 1, "b")
    assert new.folded_in(1) == [("r/fit/1/b", "b", 0)]


def test_commits_are_synced_and_notes_are_not(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    said: list[str] = []
    ledger._db.set_trace_callback(said.append)
    ledger.note_tasks([task(1, "a")])
    assert not any("synchronous" in text for text in said)
    commit(ledger, 1, "a")
    pragmas = [text for text in said if "synchronous" in text or text in ("BEGIN IMMEDIATE", "COMMIT")]
    assert pragmas[-4:] == ["PRAGMA synchronous=FULL", "BEGIN IMMEDIATE", "COMMIT", "PRAGMA synchronous=NORMAL"]


_DIES = """
import os, sys
from pathlib import Path
from tests.unit.test_ledger import begun, commit, task
ledger = begun(Path(sys.argv[1]))
commit(ledger, 1, "a")
ledger.note_tasks([task(2, "a")])
ledger._db.execute("BEGIN IMMEDIATE")
ledger._db.execute("UPDATE run SET version = 99")
os.kill(os.getpid(), 9)
"""


def test_a_process_that_is_killed_in_a_transaction_leaves_all_that_was_before_it(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ended = subprocess.run([sys.executable, "-c", _DIES, str(tmp_path / "l")], cwd=root, env=environment, check=False)
    assert ended.returncode == -9
    last = Ledger(tmp_path / "l").take_over(max_staleness=10)
    assert (last.version, [task.task_id for task in last.tasks]) == (1, ["r/fit/2/a"])


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + bytes(200)])
def test_a_file_that_is_no_ledger_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "l").write_bytes(content)
    with pytest.raises(ConfigError, match="l is not the ledger of a run"):
        Ledger(tmp_path / "l")


def test_the_ledger_of_another_format_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "l")
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(ConfigError, match="written by another version of fedbus"):
        Ledger(tmp_path / "l")


@pytest.mark.parametrize("table", ["run", "rounds", "tasks", "folded"])
def test_a_ledger_that_lacks_a_table_is_one_clear_error(tmp_path: Path, table: str) -> None:
    begun(tmp_path / "l").close()
    db = sqlite3.connect(tmp_path / "l")
    db.execute(f"DROP TABLE {table}")
    db.close()
    with pytest.raises((ConfigError, RunFailed), match="ledger"):
        Ledger(tmp_path / "l").take_over(max_staleness=10)


@pytest.mark.parametrize(
    "damage",
    ["UPDATE run SET head = '{'", "UPDATE run SET head = '{}'", "UPDATE rounds SET record = '{}'", "DELETE FROM run"],
)
def test_a_ledger_whose_content_cannot_be_read_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    ledger = begun(tmp_path / "l")
    commit(ledger, 1, "a")
    ledger.close()
    db = sqlite3.connect(tmp_path / "l")
    with db:
        db.execute(damage)
    db.close()
    with pytest.raises(ConfigError, match="l is not the ledger of a run"):
        Ledger(tmp_path / "l").take_over(max_staleness=10)


def test_a_disk_that_cannot_be_written_ends_the_run_with_one_clear_error(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    ledger._db.execute("PRAGMA query_only=1")
    with pytest.raises(RunFailed, match="the ledger cannot be written: attempt to write a readonly database"):
        ledger.note_tasks([task(1, "a")])


def test_closing_waits_for_a_commit_in_another_thread(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    entered, go_on = threading.Event(), threading.Event()

    def rows() -> Iterator[tuple[str, str, int]]:
        entered.set()
        assert go_on.wait(10)
        yield ("r/fit/1/a", "a", 0)

    with ThreadPoolExecutor(2) as pool:
        commit = pool.submit(ledger.commit_round, record(1), rows(), seconds=1.0, max_staleness=10)
        assert entered.wait(10)
        closing = pool.submit(ledger.close)
        go_on.set()
        closing.result()
        commit.result()
    assert Ledger(tmp_path / "l").take_over(max_staleness=10).version == 1


def test_a_commit_that_hangs_does_not_keep_the_server_from_ending(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "l")
    entered, go_on = threading.Event(), threading.Event()

    def rows() -> Iterator[tuple[str, str, int]]:
        entered.set()
        assert go_on.wait(20)
        yield ("r/fit/1/a", "a", 0)

    with ThreadPoolExecutor(1) as pool:
        commit = pool.submit(ledger.commit_round, record(1), rows(), seconds=1.0, max_staleness=10)
        assert entered.wait(10)
        ledger.close()
        go_on.set()
        commit.result()
    assert Ledger(tmp_path / "l").take_over(max_staleness=10).version == 1

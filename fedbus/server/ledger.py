"""What is committed, in SQLite: the rounds, the updates that are in them, the tasks that are out, the epoch.

One transaction per commit makes a round durable (write-ahead log, fsync). Small notes between commits survive the death
of the process at once, and that of the machine with the next commit. Every transaction looks at the epoch first: once
a later server has taken the run over, an earlier one that still lives can write nothing any more.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedbus.errors import ConfigError, RunFailed
from fedbus.rounds.clients import ClientRecord
from fedbus.rounds.restored import RestoredTask
from fedbus.server.history import History, RoundRecord, plain, record_from_json, record_text

_FORMAT: Final = 2
_CLOSE_PATIENCE_S: Final = 1.0
_MANY: Final = 2**63 - 1

_SCHEMA: Final = """
CREATE TABLE run (
    run_id TEXT NOT NULL, epoch INTEGER NOT NULL, version INTEGER, seconds REAL NOT NULL, head TEXT NOT NULL,
    members TEXT NOT NULL
);
CREATE TABLE rounds (round INTEGER PRIMARY KEY, version INTEGER NOT NULL, record TEXT NOT NULL);
CREATE TABLE folded (
    task_id TEXT PRIMARY KEY, client_id TEXT NOT NULL, round INTEGER NOT NULL, staleness INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE tasks (
    task_id TEXT PRIMARY KEY, client_id TEXT NOT NULL, round INTEGER NOT NULL, version INTEGER NOT NULL, failed TEXT
) WITHOUT ROWID;
CREATE TABLE clients (client_id TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID;
"""


class Fenced(RunFailed):
    """Another server has taken the run over: this one must not say another word to the clients."""


@dataclass(frozen=True, kw_only=True)
class LastCommit:
    """Where a run can go on. `version` is None when it never had a model; `seconds`: how long it has run."""

    history: History
    epoch: int
    version: int | None
    seconds: float
    members: tuple[str, ...]
    tasks: tuple[RestoredTask, ...]


class Ledger:
    """One run's ledger, in the file `path` (or in memory, for a run that keeps nothing).

    Raises `ConfigError` for a file that is none, `RunFailed` when it cannot be written, `Fenced`.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._epoch = 0
        self._lock = threading.Lock()
        try:
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            found = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if found not in (0, _FORMAT):
                raise ConfigError(f"{path} was written by another version of fedbus: resume the run with that one")
        except (sqlite3.Error, UnicodeDecodeError) as exc:  # the latter from words about damaged names
            raise ConfigError(f"{path} is not the ledger of a run: {exc}") from exc
        self.holds_a_run = found == _FORMAT

    def __repr__(self) -> str:
        return f"<Ledger {self._path} epoch={self._epoch}>"

    def close(self) -> None:
        """Close the file, once a commit that is under way in another thread has ended; one that hangs keeps it open.

        SQLite's memory would be freed under the feet of that thread.
        """
        if not self._lock.acquire(timeout=_CLOSE_PATIENCE_S):
            return
        try:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
        finally:
            self._lock.release()

    def begin(self, history: History) -> None:
        """Begin a run, in its first epoch."""
        head = json.dumps(plain(history.head()))
        with self._lock, _writing():
            self._db.execute("BEGIN IMMEDIATE")  # all of it, or none
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute("INSERT INTO run VALUES (?, 1, NULL, 0, ?, '[]')", (history.run_id, head))
            self._db.execute(f"PRAGMA user_version={_FORMAT}")
            self._db.execute("COMMIT")
        self._epoch = 1
        self.holds_a_run = True

    def take_over(self, *, max_staleness: int, recent_rounds: int = _MANY) -> LastCommit:
        """Go on with the run, in the next epoch; whoever served it before is fenced out from now on.

        `recent_rounds`: so many of the last rounds are in the history that is returned.

        Raises `ConfigError` for what cannot be read.
        """
        try:
            return self._take_over(max_staleness, recent_rounds)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, sqlite3.IntegrityError) as exc:
            raise ConfigError(f"{self._path} is not the ledger of a run, or is damaged: {exc!r}") from exc

    def _take_over(self, max_staleness: int, recent_rounds: int) -> LastCommit:
        with self._lock, _writing():
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("UPDATE run SET epoch = epoch + 1")
            self._db.execute("PRAGMA synchronous=NORMAL")
            epoch, version, seconds, head, members = self._db.execute(
                "SELECT epoch, version, seconds, head, members FROM run"
            ).fetchone()
            query = "SELECT record FROM rounds ORDER BY round DESC LIMIT ?"
            newest_first = self._db.execute(query, (recent_rounds,)).fetchall()
            records = [record_from_json(json.loads(text)) for (text,) in reversed(newest_first)]
            oldest = (version or 0) - max_staleness
            tasks = self._db.execute(
                "SELECT t.task_id, t.client_id, t.round, t.version, t.failed, f.round FROM tasks t"
                " LEFT JOIN folded f USING (task_id) WHERE t.version >= ?"
                " ORDER BY t.round, t.client_id, length(t.task_id), t.task_id",  # in the order in which they were given
                (oldest,),
            ).fetchall()
            clients = {
                client_id: ClientRecord.from_json(text)
                for client_id, text in self._db.execute("SELECT client_id, record FROM clients ORDER BY client_id")
            }
        self._epoch = epoch
        return LastCommit(
            history=History.from_head(json.loads(head), records, clients),
            epoch=epoch,
            version=version,
            seconds=seconds,
            members=tuple(json.loads(members)),
            tasks=tuple(_restored_task(*row) for row in tasks),
        )

    # ---- notes between commits -----------------------------------------------------------------------------------

    def note_tasks(self, tasks: Iterable[tuple[str, str, int, int]]) -> None:
        """Note (task_id, client_id, round, version) before it is sent: its update will be known for what it is."""
        with self._transaction():
            self._db.executemany("INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?, NULL)", tasks)

    def note_failed(self, task_id: str, client_id: str, reason: str) -> None:
        """Note that the task of this client will have no update."""
        with self._transaction():
            query = "UPDATE tasks SET failed = ? WHERE task_id = ? AND client_id = ?"
            self._db.execute(query, (reason, task_id, client_id))

    def note_members(self, members: Sequence[str], history: History) -> None:
        """Note who is in: they are waited for after a resume."""
        with self._transaction():
            self._db.execute(
                "UPDATE run SET members = ?, head = ?", (json.dumps(members), json.dumps(plain(history.head())))
            )

    def note_record(self, record: RoundRecord) -> None:
        """Note what became known of a committed round: its evaluations."""
        with self._transaction():
            self._db.execute("UPDATE rounds SET record = ? WHERE round = ?", (record_text(record), record.round))

    # ---- commits -------------------------------------------------------------------------------------------------

    def commit_model(self, version: int) -> None:
        """Make the initial model, whose checkpoint is durable, the run's."""
        with self._transaction(durable=True):
            self._db.execute("UPDATE run SET version = ?", (version,))

    def commit_round(
        self,
        record: RoundRecord,
        folded: Iterable[tuple[str, str, int]],
        *,
        seconds: float,
        max_staleness: int,
        clients: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Make a round durable: its record, its updates (task_id, client_id, staleness), and what `clients`
        have done (client_id, a `ClientRecord` as JSON).

        Its checkpoint must be durable already. Raises `sqlite3.IntegrityError` for an update that is in the ledger.
        """
        with self._transaction(durable=True):
            self._db.execute("UPDATE run SET version = ?, seconds = ?", (record.version, seconds))
            self._db.execute("INSERT INTO rounds VALUES (?, ?, ?)", (record.round, record.version, record_text(record)))
            rows = ((task_id, client_id, record.round, staleness) for task_id, client_id, staleness in folded)
            self._db.executemany("INSERT INTO folded VALUES (?, ?, ?, ?)", rows)
            self._db.executemany("INSERT OR REPLACE INTO clients VALUES (?, ?)", clients)
            self._db.execute("DELETE FROM tasks WHERE version < ?", (record.version - max_staleness,))

    def save_end(self, history: History) -> None:
        """Note how the run ended."""
        with self._transaction(durable=True):
            self._db.execute(
                "UPDATE run SET head = ?, seconds = ?", (json.dumps(plain(history.head())), history.seconds)
            )

    def check_not_fenced(self) -> None:
        """Raise `Fenced` when a later server has taken the run over."""
        with self._lock, _writing():
            self._check_epoch()

    def receipt_of(self, task_id: str, client_id: str) -> tuple[int, int] | None:
        """(round, staleness) with which this client's update is committed, however long ago; None when it is not."""
        query = "SELECT round, staleness FROM folded WHERE task_id = ? AND client_id = ?"
        with self._lock:
            row: tuple[int, int] | None = self._db.execute(query, (task_id, client_id)).fetchone()
        return row

    def folded_in(self, round: int) -> list[tuple[str, str, int]]:
        """(task_id, client_id, staleness) of the updates in a committed round."""
        with self._lock:
            return self._db.execute(
                "SELECT task_id, client_id, staleness FROM folded WHERE round = ? ORDER BY task_id", (round,)
            ).fetchall()

    def record(self, round: int) -> RoundRecord | None:
        """The record of a committed round; None when it is not."""
        with self._lock:
            row = self._db.execute("SELECT record FROM rounds WHERE round = ?", (round,)).fetchone()
        return None if row is None else record_from_json(json.loads(row[0]))

    def record_texts(self, *, through: int) -> Iterator[str]:
        """The records up to round `through` as JSON, one after the other, in their order; for any thread.

        Over a connection of its own, so that commits need not wait for whoever reads.
        """
        assert self._path is not None, "only a ledger on disk can be read beside its writer"
        with contextlib.closing(sqlite3.connect(self._path)) as db:
            for (text,) in db.execute("SELECT record FROM rounds WHERE round <= ? ORDER BY round", (through,)):
                yield text

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        with self._lock, _writing():
            if durable:
                self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                self._check_epoch()
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            else:
                self._db.execute("COMMIT")
            finally:
                if durable:
                    self._db.execute("PRAGMA synchronous=NORMAL")

    def _check_epoch(self) -> None:
        (epoch,) = self._db.execute("SELECT epoch FROM run").fetchone()
        if epoch != self._epoch:
            raise Fenced(
                f"another server has taken this run over (epoch {epoch}, this one is {self._epoch}): it ends here"
            )


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.Error as exc:
        raise RunFailed(f"the ledger cannot be written: {exc}") from exc


def _restored_task(
    task_id: str, client_id: str, round: int, version: int, failed: str | None, folded_in: int | None
) -> RestoredTask:
    return RestoredTask(
        task_id=task_id,
        client_id=client_id,
        round=round,
        version=version,
        state="folded" if folded_in else "working" if failed is None else "failed",
        folded_in=folded_in or 0,
        reason=failed or "",
    )

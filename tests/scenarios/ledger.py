"""What a server has on disk of a run, for the next one to go on with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fedbus.rounds import commands as c
from fedbus.rounds.commands import Command, Outcome
from fedbus.rounds.restored import Restored, RestoredTask


@dataclass
class Ledger:
    """Tasks are noted before they are sent, and forgotten with the commit that makes them too late for any round."""

    max_staleness: int
    rounds: int = 0
    version: int = 0
    evaluation_due: bool = False
    tasks: dict[str, RestoredTask] = field(default_factory=dict)

    def note(self, command: Command) -> None:
        """Keep what the engine says, where a server does."""
        match command:
            case c.SendFitTask() if command.task_id not in self.tasks:
                self.tasks[command.task_id] = RestoredTask(
                    task_id=command.task_id,
                    client_id=command.client_id,
                    round=command.round,
                    version=command.version,
                    state="working",
                )
            case c.FitFailed() | c.FitCancelled() | c.Settle(outcome=Outcome.REFUSED):
                task = self.tasks.get(command.task_id)
                if task is not None and task.client_id == command.client_id:
                    self.tasks[command.task_id] = replace(task, state="failed", reason=command.reason)
            case c.CloseEvaluation():
                self.evaluation_due = False

    def note_commit(self, commit: c.Commit, version: int, *, is_evaluated: bool) -> None:
        """Make the round durable: it led to model `version`."""
        self.rounds, self.version = commit.round, version
        self.evaluation_due = is_evaluated and bool(commit.folded)
        for folded in commit.folded:
            self.tasks[folded.task_id] = replace(self.tasks[folded.task_id], state="folded", folded_in=commit.round)
        oldest = version - self.max_staleness
        self.tasks = {task_id: task for task_id, task in self.tasks.items() if task.version >= oldest}

    def restored(self, clients: Iterable[str]) -> Restored:
        """The run as the next server takes it over; `clients` were members."""
        return Restored(
            rounds=self.rounds,
            version=self.version,
            clients=tuple(clients),
            tasks=tuple(self.tasks.values()),
            evaluation_due=self.evaluation_due,
        )

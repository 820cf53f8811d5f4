"""What the engine says, in words: one line for each command."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from fedbus.rounds import commands as c
from fedbus.rounds.commands import Command, Outcome


class Tasks:
    """The tasks by the names that transcripts have for them: "round 1", and "round 1 #2" for a client's second."""

    def __init__(self) -> None:
        self._fits: dict[tuple[str, int], list[str]] = defaultdict(list)
        self._known: dict[str, tuple[str, str, int]] = {}  # task_id -> name, owner, round

    def note(self, command: Command) -> None:
        """Learn of the tasks that are given."""
        match command:
            case c.SendFitTask() if command.task_id not in self._known:
                fits = self._fits[command.client_id, command.round]
                fits.append(command.task_id)
                number = f" #{len(fits)}" if len(fits) > 1 else ""
                self._known[command.task_id] = (f"round {command.round}{number}", command.client_id, command.round)
            case c.RequestParameters():
                self._known[command.task_id] = ("the initial model", command.client_id, 0)

    def find(self, client: str, round: int, number: int) -> str | None:
        """The task_id of a client's `number`-th task of a round, counted from 1."""
        fits = self._fits[client, round]
        return fits[number - 1] if number <= len(fits) else None

    def name(self, task_id: str, client: str) -> str:
        """With its owner's name, unless that is `client`; a task that nobody was given has its task_id."""
        if task_id not in self._known:
            return task_id
        name, owner, _ = self._known[task_id]
        return name if owner == client else f"{owner}'s {name}"

    def round(self, task_id: str) -> int:
        """The round that a task belongs to; 0 for none."""
        return self._known[task_id][2] if task_id in self._known else 0


def say(command: Command, tasks: Tasks, alpha: float = 1.0) -> str:
    """The command in words; one that there are no words for yet as it is, so that nothing goes unseen.

    `alpha`: the mixing of the run, which is part of every discount.
    """
    match command:
        case c.WelcomeClient():
            return f"welcome {command.client_id}"
        case c.RequestParameters():
            return f"ask {command.client_id} for the initial model"
        case c.AdoptParameters():
            return f"adopt {command.client_id}'s model as version 0"
        case c.SendFitTask():
            name = tasks.name(command.task_id, command.client_id)
            return f"task {command.client_id}: fit version {command.version} in {name} ({command.timeout_s:g} s)"
        case c.CancelTask():
            return f"tell {command.client_id} to stop its task of {tasks.name(command.task_id, command.client_id)}"
        case c.GiveUpUploads():
            return f"give up what {command.client_id} uploads: {command.reason}"
        case c.SendEvaluateTask():
            return f"task {command.client_id}: evaluate version {command.version} ({command.timeout_s:g} s)"
        case c.Fold():
            return _fold(command, tasks, alpha)
        case c.Settle():
            return _settle(command, tasks)
        case c.Commit():
            return _commit(command)
        case c.CloseEvaluation():
            return f"version {command.version} is evaluated: {_who(command.reported)}" + _but(missing=command.missing)
        case c.EndRun():
            return f"the run ends{'' if command.finished else ' unfinished'}: {command.reason}"
        case _:
            return _notice(command, tasks)


def _fold(fold: c.Fold, tasks: Tasks, alpha: float) -> str:
    text = f"fold {fold.client_id}'s update for {tasks.name(fold.task_id, fold.client_id)}"
    if fold.round != tasks.round(fold.task_id):
        text += f" into round {fold.round}"
    if fold.staleness:
        text += f", {fold.staleness} late"
    if fold.discount == 1:
        return text
    is_mixed = alpha != 1 and fold.discount != alpha
    return text + f", counts {fold.discount:.2g}" + (f" = {alpha:g} * {fold.discount / alpha:.2g}" if is_mixed else "")


def _settle(settle: c.Settle, tasks: Tasks) -> str:
    update = f"{settle.client_id}'s update for {tasks.name(settle.task_id, settle.client_id)}"
    elsewhere = f" is in round {settle.round}" if settle.round not in (0, tasks.round(settle.task_id)) else ""
    where = f"in round {settle.round}" if settle.round else "here"
    texts = {
        Outcome.COMMITTED: f"receipt: {update}{elsewhere}",
        Outcome.REFUSED: f"refuse {update}: {settle.reason}",
        Outcome.DUPLICATE: f"drop {update}: it is {where} already",
        Outcome.SURPLUS: f"drop {update}: all rounds are done",
        Outcome.RELEASED: f"leave {update} to the broker",
    }
    return texts.get(settle.outcome, repr(settle))


def _commit(commit: c.Commit) -> str:
    folded = [folded.client_id for folded in commit.folded]
    count = f"{len(folded)} update{'' if len(folded) == 1 else 's'}: {_who(folded)}" if folded else "empty"
    failed = [f"{client} ({reason})" for client, reason in commit.failed.items()]
    return (
        f"round {commit.round} closes on {commit.reason.value}, {count}"
        + _but(unfinished=commit.unfinished, lost=commit.lost)
        + _but(failed=failed)
    )


def _notice(command: Command, tasks: Tasks) -> str:
    match command:
        case c.MemberJoined():
            needed = f", {command.needed} more needed" if command.needed else ""
            return f"{command.client_id} is in, {_members(command.members)}{needed}"
        case c.MemberLost():
            how = "has left" if command.left else "is lost"
            return f"{command.client_id} {how} ({command.reason}), {_members(command.members)}"
        case c.RoundOpened():
            return f"round {command.round} opens on version {command.version}: {_who(command.cohort)}"
        case c.CohortGrew():
            return f"round {command.round} takes in {_who(command.clients)}"
        case c.FitFailed():
            return (
                f"{command.client_id} has failed in {tasks.name(command.task_id, command.client_id)}: {command.reason}"
            )
        case c.FitCancelled():
            name = tasks.name(command.task_id, command.client_id)
            return f"{command.client_id}'s task of {name} is given up: {command.reason}"
        case c.EvaluateFailed():
            return f"{command.client_id} has failed to evaluate: {command.reason}"
        case _:
            return repr(command)


def _members(count: int) -> str:
    return f"{count} member{'' if count == 1 else 's'}"


def _who(clients: Iterable[str]) -> str:
    return ", ".join(clients) or "nobody"


def _but(**groups: Collection[str]) -> str:
    return "".join(f"; {what} {', '.join(clients)}" for what, clients in groups.items() if clients)

"""Plays a scenario through a real engine, and writes down what happened and what it said."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import IntEnum
from typing import Final

from fedbus.rounds import commands as c
from fedbus.rounds import events as e
from fedbus.rounds.commands import Command
from fedbus.rounds.engine import Engine
from fedbus.rounds.restored import Restored
from tests.scenarios.ledger import Ledger
from tests.scenarios.script import BadScenario, Scenario
from tests.scenarios.words import Tasks, say

RUN_ID: Final = "run"
_INDENT: Final = " " * 13


def play(scenario: Scenario) -> str:
    """The scenario's file as it must be: its head, its steps, and every answer of the engine."""
    player = _Player(scenario)
    for step in scenario.steps:
        try:
            player.wait_until(step.time)
            player.happens(step.text)
        except BadScenario as exc:
            raise BadScenario(f"{scenario.name}, line {step.line}: {exc}") from None
    player.finish_commits()
    return "\n".join([scenario.head, "", *player.transcript]) + "\n"


class _Kind(IntEnum):
    """What happens by itself, in its order at one and the same time."""

    DEADLINE = 0
    COMMIT = 1
    BEAT = 2


class _Player:
    """An engine, the clients' heartbeats, and commits that take their time."""

    def __init__(self, scenario: Scenario) -> None:
        self.transcript: list[str] = []
        self._scenario = scenario
        self._now = 0.0
        self._engine: Engine | None = self._new_engine(None)
        self._members: tuple[str, ...] = ()
        self._ledger = Ledger(scenario.config.max_staleness)
        self._tasks = Tasks()
        self._beats: dict[str, float] = {}  # client -> when it is heard next
        self._lives: dict[str, int] = {}
        self._in_hand: dict[str, str] = {}  # client -> the task that it says it is at work on
        self._committing: tuple[float, c.Commit] | None = None
        self._commit_s = scenario.commit_s
        self._deliveries = 0

    def _new_engine(self, restored: Restored | None) -> Engine:
        return Engine(
            self._scenario.config,
            seed=self._scenario.seed,
            run_id=RUN_ID,
            has_model=self._scenario.has_model,
            restored=restored,
            now=self._now,
        )

    # ---- time ----------------------------------------------------------------------------------------------------

    def wait_until(self, end: float) -> None:
        """Let everything happen that happens by itself: heartbeats, commits, the engine's own deadlines."""
        while (following := min(self._following(), default=None)) is not None and following[0] <= end:
            time, kind, client = following
            self._now = max(self._now, time)
            if kind is _Kind.BEAT:
                self._beats[client] += self._scenario.config.heartbeat_s
                self._tell(f"{client} beats", [self._heartbeat(client)])
            elif kind is _Kind.COMMIT:
                self._commit()
            elif self._engine is not None:
                self._write("time is up", self._engine.advance(self._now))
        self._now = max(self._now, end)

    def finish_commits(self) -> None:
        while self._committing is not None:
            self.wait_until(self._committing[0])

    def _following(self) -> Iterable[tuple[float, _Kind, str]]:
        deadline = self._engine.next_deadline() if self._engine is not None else None
        if deadline is not None:
            yield deadline, _Kind.DEADLINE, ""
        if self._committing is not None:
            yield self._committing[0], _Kind.COMMIT, ""
        for client, time in self._beats.items():
            yield time, _Kind.BEAT, client

    def _commit(self) -> None:
        assert self._committing is not None
        _, commit = self._committing
        self._committing = None
        version = commit.version + bool(commit.folded)
        is_evaluated = self._scenario.config.fraction_evaluate > 0
        self._ledger.note_commit(commit, version, is_evaluated=is_evaluated)
        text = f"round {commit.round} is committed: version {version}"
        self._tell(text, [e.RoundCommitted(round=commit.round, version=version)])

    # ---- what happens --------------------------------------------------------------------------------------------

    def happens(self, text: str) -> None:
        for pattern, happening in _HAPPENINGS:
            match = pattern.fullmatch(text)
            if match is not None:
                self._tell(text, happening(self, **match.groupdict()), is_written=True)
                return
        raise BadScenario(f"there is no such event: {text!r}")

    def _tell(self, text: str, events: Iterable[e.Event], *, is_written: bool = False) -> None:
        said = [command for event in events for command in self._handle(event)]
        self._write(text, said, is_written=is_written)

    def _handle(self, event: e.Event) -> list[Command]:
        """A server that is not there hears nothing; what it was sent waits at the broker until it comes again."""
        if self._engine is None:
            return []
        return self._engine.handle(event, self._now)

    def _write(self, text: str, said: list[Command], *, is_written: bool = False) -> None:
        for command in said:
            self._ledger.note(command)
            self._tasks.note(command)
            if isinstance(command, c.Commit):
                self._committing = (self._now + self._commit_s, command)
        if said or is_written:
            self.transcript.append(f"{self._now:7g}  {text}")
            self.transcript += [
                _INDENT + say(command, self._tasks, self._scenario.config.mixing or 1.0) for command in said
            ]

    def _session(self, client: str, life: int | None = None) -> str:
        return f"{client}/{self._lives.get(client, 1) if life is None else life}"

    def join(self, who: str) -> list[e.Event]:
        """Each in a process of its own; whoever was there before comes back as a new one."""
        clients = who.split(", ")
        for client in clients:
            self._lives[client] = self._lives.get(client, 0) + 1
            self._in_hand.pop(client, None)
        return [e.ClientJoined(client_id=client, session=self._beating(client)) for client in clients]

    def hear_again(self, who: str) -> list[e.Event]:
        """Heartbeats begin again; they name the task in hand, where the client had named one."""
        for client in who.split(", "):
            self._beating(client)
        return [self._heartbeat(client) for client in who.split(", ")]

    def say_at_work(self, who: str, round: str, number: str | None) -> list[e.Event]:
        """What it says now every heartbeat of it repeats until the task is answered."""
        self._in_hand[who] = self._fit(who, round, number)
        return [self._heartbeat(who)]

    def say_idle(self, who: str) -> list[e.Event]:
        self._in_hand.pop(who, None)
        return [self._heartbeat(who)]

    def _heartbeat(self, client: str) -> e.Event:
        return e.ClientHeard(client_id=client, session=self._session(client), fit_task=self._in_hand.get(client, ""))

    def lose_inbox(self, who: str) -> list[e.Event]:
        return [e.ClientLost(client_id=who, reason="its inbox is gone")]

    def expel(self, who: str) -> list[e.Event]:
        self._beats.pop(who, None)
        return [e.ClientExpelled(client_id=who, reason="revoked")]

    def lose_connection(self, who: str) -> list[e.Event]:
        return [e.ClientUnreachable(client_id=who, reason="its connection is gone")]

    def _beating(self, client: str) -> str:
        self._beats[client] = self._now + self._scenario.config.heartbeat_s
        return self._session(client)

    def fall_silent(self, who: str) -> list[e.Event]:
        for client in who.split(", "):
            if self._beats.pop(client, None) is None:
                raise BadScenario(f"{client} is silent already")
        return []

    def leave(self, who: str, reason: str | None) -> list[e.Event]:
        self.fall_silent(who)
        return [e.ClientLeft(client_id=who, session=self._session(who), reason=reason or "bye")]

    def leave_life(self, who: str) -> list[e.Event]:
        return [e.ClientLeft(client_id=who, session=self._session(who, self._lives[who] - 1), reason="bye")]

    def update(self, who: str, round: str, number: str | None, owner: str | None = None) -> list[e.Event]:
        task_id = self._answered(owner or who, round, number)
        return [e.UpdateReceived(client_id=who, task_id=task_id, delivery=self._delivery())]

    def invalid(self, who: str, round: str, number: str | None, reason: str) -> list[e.Event]:
        task_id = self._answered(who, round, number)
        return [e.UpdateInvalid(client_id=who, task_id=task_id, delivery=self._delivery(), reason=reason)]

    def fail(self, who: str, round: str, number: str | None, reason: str) -> list[e.Event]:
        return [e.TaskFailed(client_id=who, task_id=self._answered(who, round, number), reason=reason)]

    def stop_fit(self, who: str, round: str, number: str | None) -> list[e.Event]:
        """As a client answers that was told to stop."""
        return self.fail(who, round, number, "it was told to stop")

    def _answered(self, client: str, round: str, number: str | None) -> str:
        task_id = self._fit(client, round, number)
        if self._in_hand.get(client) == task_id:
            del self._in_hand[client]
        return task_id

    def _fit(self, client: str, round: str, number: str | None) -> str:
        task_id = self._tasks.find(client, int(round), int(number or 1))
        if task_id is None:
            raise BadScenario(f"{client} has no such task in round {round}")
        return task_id

    def _delivery(self) -> int:
        self._deliveries += 1
        return self._deliveries

    def give_model(self, who: str) -> list[e.Event]:
        task_id = f"{RUN_ID}/parameters/0/{who}"
        return [e.UpdateReceived(client_id=who, task_id=task_id, delivery=self._delivery())]

    def give_no_model(self, who: str, reason: str) -> list[e.Event]:
        return [e.TaskFailed(client_id=who, task_id=f"{RUN_ID}/parameters/0/{who}", reason=reason)]

    def evaluate(self, who: str, round: str) -> list[e.Event]:
        return [e.EvaluateReported(client_id=who, task_id=f"{RUN_ID}/evaluate/{round}/{who}")]

    def evaluate_not(self, who: str, round: str, reason: str) -> list[e.Event]:
        return [e.TaskFailed(client_id=who, task_id=f"{RUN_ID}/evaluate/{round}/{who}", reason=reason)]

    def kill_server(self) -> list[e.Event]:
        if self._engine is None:
            raise BadScenario("there is no server")
        self._members = self._engine.members
        self._engine = self._committing = None
        return []

    def resume(self) -> list[e.Event]:
        """As the server does: from the last commit, and the tasks and members that it had noted by then."""
        self._engine = self._new_engine(self._ledger.restored(self._members))
        return []

    def commits_take(self, seconds: str) -> list[e.Event]:
        self._commit_s = float(seconds)
        return []

    def verbatim(self, event: str) -> list[e.Event]:
        """An event that there are no words for, as its constructor."""
        try:
            return [eval(event, {"__builtins__": {}, **vars(e)})]
        except Exception as exc:
            raise BadScenario(str(exc)) from exc


_WHO = r"(?P<who>[\w.-]+)"
_ALL = r"(?P<who>[\w.-]+(?:, [\w.-]+)*)"
_ROUND = r"round (?P<round>\d+)(?: #(?P<number>\d+))?"
_REASON = r"(?P<reason>.+)"

_WORDS: Final[list[tuple[str, Callable[..., list[e.Event]]]]] = [
    (r"the model is ready", lambda player: [e.ModelReady()]),
    (rf"{_ALL} joins?", _Player.join),
    (rf"{_ALL} restarts?", _Player.join),
    (rf"{_ALL} (?:is|are) heard again", _Player.hear_again),
    (rf"{_ALL} falls? silent", _Player.fall_silent),
    (rf"{_WHO} says it is at work on its task of {_ROUND}", _Player.say_at_work),
    (rf"{_WHO} says it has nothing in hand", _Player.say_idle),
    (rf"{_WHO}'s inbox is gone", _Player.lose_inbox),
    (rf"{_WHO} is turned out", _Player.expel),
    (rf"the connection of {_WHO} is gone", _Player.lose_connection),
    (rf"{_WHO} leaves(?:: {_REASON})?", _Player.leave),
    (rf"{_WHO}'s former process leaves", _Player.leave_life),
    (rf"{_WHO}'s update for {_ROUND} arrives(?: again)?", _Player.update),
    (rf"{_WHO}'s update for (?P<owner>[\w.-]+)'s {_ROUND} arrives", _Player.update),
    (rf"{_WHO}'s update for {_ROUND} is invalid: {_REASON}", _Player.invalid),
    (rf"{_WHO} fails in {_ROUND}: {_REASON}", _Player.fail),
    (rf"{_WHO} stops its task of {_ROUND}", _Player.stop_fit),
    (rf"{_WHO}'s initial model arrives", _Player.give_model),
    (rf"{_WHO} has no initial model: {_REASON}", _Player.give_no_model),
    (rf"{_WHO}'s evaluation of round (?P<round>\d+) arrives", _Player.evaluate),
    (rf"{_WHO} fails to evaluate round (?P<round>\d+): {_REASON}", _Player.evaluate_not),
    (
        r"the echo of (?P<sent_at>[\d.]+) is heard",
        lambda player, sent_at: [e.EchoHeard(sent_at=float(sent_at))],
    ),
    (
        r"the broker is back, (?P<grace_s>[\d.]+) s of grace",
        lambda player, grace_s: [e.Reconnected(grace_s=float(grace_s))],
    ),
    (r"tasks are in doubt", lambda player: [e.TasksInDoubt()]),
    (rf"{_WHO}'s tasks are in doubt", lambda player, who: [e.TasksInDoubt(client_id=who)]),
    (rf"somebody stops the run: {_REASON}", lambda player, reason: [e.StopRequested(reason=reason)]),
    (r"the server is killed", _Player.kill_server),
    (r"the server is back", _Player.resume),
    (r"commits take (?P<seconds>[\d.]+) s from now on", _Player.commits_take),
    (r"nothing more happens", lambda player: []),
    (r"(?P<event>[A-Z]\w+\(.*\))", _Player.verbatim),
]
_HAPPENINGS: Final = [(re.compile(pattern), happening) for pattern, happening in _WORDS]

"""Random walks through the engine, in every regime: whatever happens, and in whatever order, what it promises holds.

Clients join, restart, leave, get out of reach, train too long, fail, answer twice or for others; commits take their
time; servers die and others go on. After every step the engine is held to what it said before (`_Watch`); at the end
everybody behaves, and the run must come to its end without a round's timeout, for all that is needed is there.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from fedbus.config import Constant, Hinge, Oort, Polynomial, RoundConfig, Tiers, Uniform
from fedbus.rounds import commands as c
from fedbus.rounds import events as e
from fedbus.rounds.clients import ClientRecord
from fedbus.rounds.commands import CloseReason, Command, Outcome
from fedbus.rounds.engine import Engine, Phase
from tests.scenarios.ledger import Ledger

CLIENTS = "abcdef"
TIMEOUT_S = 30.0


@st.composite
def configs(draw: st.DrawFn) -> RoundConfig:
    """Every regime, through its preset, with settings that belong to it."""
    shared: dict[str, Any] = {
        "num_rounds": draw(st.integers(1, 5)),
        "max_staleness": draw(st.integers(0, 3)),
        "staleness": draw(st.sampled_from([Constant(), Polynomial(), Hinge(2, 1)])),
        "selection": draw(st.sampled_from([Uniform(), Oort(), Tiers(num_tiers=2)])),
        "fraction_evaluate": draw(st.sampled_from([0.0, 0.0, 0.5, 1.0])),
        "min_available_clients": draw(st.none() | st.integers(1, 4)),
        "timeout_s": TIMEOUT_S,
        "lease_s": draw(st.sampled_from([20.0, 200.0])),
    }
    k = draw(st.integers(1, 4))
    regime = draw(st.sampled_from(["plain", "synchronous", "semi_synchronous", "buffered", "asynchronous"]))
    grace_s = draw(st.sampled_from([0.0, 3.0, float("inf")]))
    concurrency = draw(st.none() | st.integers(1, 4))
    match regime:
        case "synchronous":
            return RoundConfig.synchronous(k, grace_s=grace_s, **shared)
        case "semi_synchronous":
            return RoundConfig.semi_synchronous(k, draw(st.sampled_from([1.0, 1.3, 2.0])), grace_s=grace_s, **shared)
        case "buffered":
            return RoundConfig.buffered(k, concurrency=concurrency, **shared)
        case "asynchronous":
            return RoundConfig.asynchronous(0.6, concurrency=concurrency, **shared)
        case _:
            fraction = draw(st.sampled_from([0.3, 0.5, 1.0]))
            return RoundConfig(min_fit_clients=k, fraction_fit=fraction, grace_s=grace_s, **shared)


GOAL_REACHED = e.GoalReached(reason="it is good enough")


@dataclass
class _Sent:
    """A fit task as its client got it. `excused`: why its client may have another one all the same."""

    client: str
    round: int
    version: int
    due_at: float
    excused: str = ""


@dataclass
class _Watch:
    """What the engine has said, and whether it keeps to it. It outlives servers: `forget_server` tells of their end."""

    config: RoundConfig
    version: int = 0
    rounds: int = 0
    sent: dict[str, _Sent] = field(default_factory=dict)
    committed: set[str] = field(default_factory=set)
    folds: list[c.Fold] = field(default_factory=list)  # of the round that is not committed yet
    unsettled: dict[int, e.UpdateReceived | e.UpdateInvalid] = field(default_factory=dict)
    settled: dict[int, Outcome] = field(default_factory=dict)
    opened: c.RoundOpened | None = None
    commit: c.Commit | None = None
    evaluating: set[int] = field(default_factory=set)
    ended: int = 0
    is_stopped: bool = False
    is_at_goal: bool = False
    words: dict[str, str] = field(default_factory=dict)  # client -> the task that its last heartbeat named
    asked: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    committed_folds: list[c.Fold] = field(default_factory=list)

    def forget_server(self) -> list[e.UpdateReceived | e.UpdateInvalid]:
        """A server has died: what it had not settled, the broker will deliver again."""
        again = list(self.unsettled.values())
        self.unsettled, self.folds, self.opened, self.commit = {}, [], None, None
        self.evaluating.clear()
        return again

    def hear(self, commands: list[Command], now: float) -> None:
        for command in commands:
            is_news = isinstance(command, c.Settle | c.MemberLost | c.FitFailed)
            assert is_news or not self.ended, "nobody is asked for anything after the end"
            match command:
                case c.SendFitTask():
                    self._sent(command, now)
                case c.Fold():
                    self._folded(command)
                case c.Settle():
                    self._settled(command)
                case c.RoundOpened():
                    assert command.round == self.rounds + 1
                    assert command.version == self.version
                    assert self.opened is None
                    self.opened = command
                case c.Commit():
                    self._closed(command, now)
                case c.MemberLost():
                    self.excuse(command.client_id, "it was lost")
                case c.FitFailed() | c.FitCancelled():
                    self.failed[command.client_id] += 1
                case c.SendEvaluateTask():
                    self.evaluating.add(command.round)
                case c.CloseEvaluation():
                    self.evaluating.remove(command.round)
                case c.EndRun():
                    self.ended += 1
                    assert command.finished == (self.is_at_goal or self.rounds == self.config.num_rounds)
                    assert not self.evaluating

    def excuse(self, client: str, why: str) -> None:
        for task in self.sent.values():
            if task.client == client:
                task.excused = task.excused or why

    def _sent(self, command: c.SendFitTask, now: float) -> None:
        assert self.opened is not None or self.rounds < self.config.num_rounds
        assert command.version == self.version, "everybody gets the newest version"
        assert 0 <= command.timeout_s <= TIMEOUT_S + 1e-6
        if command.task_id in self.sent:
            assert self.sent[command.task_id].client == command.client_id
            return
        for task_id, task in self.sent.items():
            if task.client == command.client_id and not task.excused:
                is_overdue = now >= task.due_at and self.words.get(task.client) != task_id
                assert is_overdue, f"{task.client} works on {task_id} and is given {command.task_id}"
                task.excused = "its time was up"
        self.sent[command.task_id] = _Sent(command.client_id, command.round, command.version, now + TIMEOUT_S)
        self.asked[command.client_id] += 1

    def _folded(self, fold: c.Fold) -> None:
        assert self.opened is not None
        assert self.commit is None
        assert fold.round == self.opened.round
        assert fold.delivery in self.unsettled
        task = self.sent[fold.task_id]
        assert (task.client, task.version) == (fold.client_id, fold.version)
        assert fold.task_id not in self.committed | {earlier.task_id for earlier in self.folds}, "folded twice"
        assert fold.staleness == self.version - task.version
        assert 0 <= fold.staleness <= self.config.max_staleness
        assert fold.discount == self.config.discount(fold.staleness)
        assert 0 < fold.discount <= 1
        self.folds.append(fold)

    def _settled(self, settle: c.Settle) -> None:
        event = self.unsettled.pop(settle.delivery)  # once, and none that was never delivered
        assert (event.client_id, event.task_id) == (settle.client_id, settle.task_id)
        self.settled[settle.delivery] = settle.outcome
        if settle.outcome is Outcome.COMMITTED and settle.task_id in self.sent:
            assert settle.round == self.rounds
            assert settle.task_id not in self.committed
            self.committed.add(settle.task_id)
        if settle.outcome is Outcome.DUPLICATE and settle.round:
            assert settle.round <= self.rounds

    def _closed(self, commit: c.Commit, now: float) -> None:
        assert self.opened is not None
        assert self.commit is None
        assert (commit.round, commit.version) == (self.opened.round, self.version)
        assert [folded.delivery for folded in commit.folded] == [fold.delivery for fold in self.folds]
        k = self.config.min_fit_clients
        match commit.reason:
            case CloseReason.MIN_FIT_CLIENTS:
                assert len(commit.folded) >= k
            case CloseReason.TIMEOUT:
                assert now >= commit.opened_at + TIMEOUT_S
                assert len(commit.folded) < k
            case CloseReason.COHORT_DONE:
                assert len(commit.folded) < k
                assert commit.folded or commit.failed
        if self.config.is_asynchronous:
            assert len(commit.folded) <= k
        given = {task.client: task_id for task_id, task in self.sent.items() if task.round == commit.round}
        assert not {given[client] for client in commit.lost} & {folded.task_id for folded in commit.folded}
        groups = [*commit.lost, *commit.unfinished, *commit.failed]
        assert len(groups) == len(set(groups)) <= len(commit.cohort)
        assert set(groups) <= set(commit.cohort)
        self.commit = commit

    def committed_round(self) -> tuple[c.Commit, int]:
        """The commit is durable: from here on its updates may be settled."""
        assert self.commit is not None
        commit = self.commit
        self.version += bool(commit.folded)
        self.rounds = commit.round
        self.committed_folds += self.folds
        self.opened, self.commit, self.folds = None, None, []
        return commit, self.version

    def check_records(self, records: dict[str, ClientRecord], *, is_first_server: bool) -> None:
        folds = self.committed_folds + self.folds
        for client, record in records.items():
            mine = [fold for fold in folds if fold.client_id == client]
            assert record.folded == len(mine)
            assert record.staleness == sum(fold.staleness for fold in mine)
            assert record.max_staleness == max((fold.staleness for fold in mine), default=0)
            assert record.nbytes == len(mine)
            assert record.asked == self.asked[client]
            assert record.timed == sum(fold.seconds is not None for fold in mine)
            assert record.folded + record.failed + record.stopped <= record.asked
            if is_first_server:
                assert record.failed + record.stopped >= self.failed[client]
        assert all(records[client].asked for client, times in self.asked.items() if times)


class Walk(RuleBasedStateMachine):
    """The world around the engine, as random as can be."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.deliveries = 0
        self.lives: Counter[str] = Counter()
        self.inbox: dict[str, list[str]] = {client: [] for client in CLIENTS}
        self.answers: dict[str, str] = {}  # task_id -> what its client answered
        self.redelivered: list[e.UpdateReceived | e.UpdateInvalid] = []
        self.parameters: list[c.RequestParameters] = []
        self.evaluations: list[c.SendEvaluateTask] = []
        self.adopted = False
        self.is_ready = False
        self.servers = 1
        self.in_doubt = False  # the server has not asked yet for what may be lost
        self.doubted: set[str] = set()  # clients whose next word tells

    @initialize(config=configs(), seed=st.integers(0, 4), has_model=st.sampled_from([True, True, False]))
    def begin(self, config: RoundConfig, seed: int, has_model: bool) -> None:
        self.config, self.seed = config, seed
        self.has_model = has_model
        self.watch = _Watch(config)
        self.ledger = Ledger(config.max_staleness)
        self.records: dict[str, ClientRecord] = {}  # as of the last commit
        self.engine = Engine(
            config, seed=seed, run_id="run", has_model=has_model, records=copy.deepcopy(self.records), now=0.0
        )
        if has_model:
            self.model_is_ready()

    # ---- the server ----------------------------------------------------------------------------------------------

    def tell(self, event: e.Event) -> None:
        self.take(self.engine.handle(event, self.now))

    def take(self, said: list[Command]) -> None:
        for command in said:
            self.ledger.note(command)
            match command:
                case c.SendFitTask():
                    if command.task_id not in self.inbox[command.client_id]:
                        self.inbox[command.client_id].append(command.task_id)
                case c.RequestParameters():
                    self.parameters.append(command)
                case c.SendEvaluateTask():
                    self.evaluations.append(command)
                case c.AdoptParameters():
                    self.adopted = self.has_model = True
        self.watch.hear(said, self.now)
        self.check_state()

    def check_state(self) -> None:
        """What the engine keeps of a round agrees with itself: nobody is waited for in vain, no place is left empty."""
        engine, round_ = self.engine, self.engine._round
        self.watch.check_records(engine._records, is_first_server=self.servers == 1)
        if round_ is None or engine.phase is not Phase.OPEN:
            return
        tasks = {client: engine._tasks[task_id] for client, task_id in round_.cohort.items()}
        assert round_.working == {client for client, task in tasks.items() if task.state.value == "working"}
        for client in round_.working:
            member = engine._members.get(client)
            assert member is not None
            assert member.fit_task == round_.cohort[client]
        assert not engine._is_enough(round_) or round_.working, "it should have closed"
        if self.now < round_.closes_at and not engine._is_enough(round_):
            assert engine._places(round_) <= 0 or not engine._eligible(round_), "a place is free, and somebody idle"

    @rule()
    @precondition(lambda self: not self.is_ready and self.has_model)
    def model_is_ready(self) -> None:
        self.is_ready = True
        self.tell(e.ModelReady())

    @rule()
    @precondition(lambda self: self.watch.commit is not None)
    def commit(self) -> None:
        self.make_durable()
        self.tell(e.RoundCommitted(round=self.watch.rounds, version=self.watch.version))

    def make_durable(self) -> None:
        commit, version = self.watch.committed_round()
        self.ledger.note_commit(commit, version, is_evaluated=self.config.fraction_evaluate > 0)
        self.records = copy.deepcopy(self.engine._records)

    @rule(is_durable=st.booleans(), gap_s=st.sampled_from([0.0, 5.0, 60.0]), loses_inboxes=st.booleans())
    @precondition(lambda self: not self.watch.ended and self.servers < 4 and self.has_model)
    def server_dies_and_another_goes_on(self, is_durable: bool, gap_s: float, loses_inboxes: bool) -> None:
        """With it, it may be, what the broker had for the clients."""
        for tasks in self.inbox.values():
            if loses_inboxes:
                tasks.clear()
        members = self.engine.members
        if self.watch.commit is not None and is_durable:
            self.make_durable()
        self.redelivered += self.watch.forget_server()
        self.now += gap_s
        self.servers += 1
        self.is_ready, self.in_doubt = False, True
        self.evaluations, self.parameters, self.adopted = [], [], False
        restored = self.ledger.restored(members)
        for task_id, task in self.watch.sent.items():
            task.due_at = self.now + TIMEOUT_S
            if task.client not in members or self.ledger_state(task_id) != "working":
                task.excused = task.excused or "no server knows that it works on it"
        self.watch.words.clear()
        self.engine = Engine(
            self.config,
            seed=self.seed,
            run_id="run",
            has_model=True,
            restored=restored,
            now=self.now,
            records=copy.deepcopy(self.records),
        )
        if self.watch.is_at_goal:  # the evaluations say so again
            self.tell(GOAL_REACHED)

    def ledger_state(self, task_id: str) -> str:
        return self.ledger.tasks[task_id].state if task_id in self.ledger.tasks else "forgotten"

    @rule(index=st.integers(0, 20))
    @precondition(lambda self: self.redelivered)
    def broker_delivers_again(self, index: int) -> None:
        event = self.redelivered.pop(index % len(self.redelivered))
        self.deliver(replace(event, delivery=self.new_delivery()))

    @rule(client=st.none() | st.sampled_from(CLIENTS))
    def tasks_are_in_doubt(self, client: str | None) -> None:
        self.in_doubt = self.in_doubt and client is not None
        for member in self.engine._members:
            if client in (None, member.client_id):
                self.doubted.add(member.client_id)
        self.tell(e.TasksInDoubt(client_id=client))

    @rule()
    @precondition(lambda self: self.servers == 1 and not self.watch.ended)
    def broker_is_back(self) -> None:
        self.tell(e.Reconnected(grace_s=5.0))

    # ---- time ----------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 1.0, 8.0, 25.0]))
    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while (deadline := self.engine.next_deadline()) is not None and deadline <= end:
            self.to_the_deadline()
        self.now = end

    @rule()
    def to_the_deadline(self) -> None:
        deadline = self.engine.next_deadline()
        if deadline is None:
            return
        self.now = max(self.now, deadline)
        self.take(self.engine.advance(self.now))
        following = self.engine.next_deadline()
        assert following is None or following > self.now, "it asks to be called again at once"

    # ---- clients -------------------------------------------------------------------------------------------------

    @rule(client=st.sampled_from(CLIENTS))
    def join(self, client: str) -> None:
        """In a new process; what its former one had in hand is gone, unless nobody heard of that one."""
        member = self.engine._members.get(client)
        if member is not None and member.session:
            self.inbox[client].clear()
            self.watch.excuse(client, "it has restarted")
        if client in self.doubted:
            self.watch.excuse(client, "its new process had nothing in hand")
        self.lives[client] += 1
        self.say(client, "")
        self.tell(e.ClientJoined(client_id=client, session=self.session(client)))

    def session(self, client: str) -> str:
        return f"{client}/{self.lives[client]}"

    def say(self, client: str, task_id: str) -> None:
        self.watch.words[client] = task_id
        if client in self.doubted:
            self.doubted.discard(client)
            for other, task in self.watch.sent.items():
                if task.client == client and other != task_id:
                    task.excused = task.excused or "it does not have it in hand"

    @rule(client=st.sampled_from(CLIENTS), index=st.integers(-1, 40))
    @precondition(lambda self: self.lives)
    def beat(self, client: str, index: int) -> None:
        """It names nothing, or some task, its own or not."""
        if self.lives[client]:
            tasks = [task_id for task_id in self.watch.sent if f"/{client}" in task_id or index > 30]
            named = tasks[index % len(tasks)] if tasks and index >= 0 else ""
            if client in self.doubted and named in self.watch.sent:  # the engine must take its word for it
                self.inbox[client] = [task_id for task_id in tasks if task_id in {named, *self.inbox[client]}]
            self.heartbeat(client, named)

    @rule()
    def all_beat(self) -> None:
        for client in CLIENTS:
            if self.lives[client]:
                self.heartbeat(client, self.in_hand(client))

    def in_hand(self, client: str) -> str:
        """What an honest client says: the newest task that is here and not answered."""
        tasks = [task_id for task_id in self.inbox[client] if task_id not in self.answers]
        return tasks[-1] if tasks else ""

    def heartbeat(self, client: str, task_id: str) -> None:
        self.say(client, task_id)
        self.tell(e.ClientHeard(client_id=client, session=self.session(client), fit_task=task_id))

    @rule(client=st.sampled_from(CLIENTS), is_former=st.booleans())
    def leave(self, client: str, is_former: bool) -> None:
        life = self.lives[client] - is_former
        if not is_former:
            self.inbox[client].clear()
        self.tell(e.ClientLeft(client_id=client, session=f"{client}/{life}", reason="bye"))

    @rule(client=st.sampled_from(CLIENTS))
    def is_out_of_reach(self, client: str) -> None:
        self.inbox[client].clear()
        self.tell(e.ClientUnreachable(client_id=client, reason="its inbox is gone"))

    # ---- answers -------------------------------------------------------------------------------------------------

    def new_delivery(self) -> int:
        self.deliveries += 1
        return self.deliveries

    def deliver(self, event: e.UpdateReceived | e.UpdateInvalid) -> None:
        self.watch.unsettled[event.delivery] = event
        self.answered(event.client_id, event.task_id, "update")
        self.tell(event)

    def answered(self, client: str, task_id: str, how: str) -> None:
        task = self.watch.sent.get(task_id)
        if task is None or task.client != client:
            return
        task.excused = task.excused or "it has answered"
        self.answers.setdefault(task_id, how)
        if task_id in self.inbox[client]:
            self.inbox[client].remove(task_id)

    def pick(self, index: int) -> str | None:
        """A task, more likely one of the last."""
        tasks = list(self.watch.sent)
        return tasks[-1 - index % len(tasks)] if tasks else None

    @rule(index=st.integers(0, 12))
    @precondition(lambda self: self.watch.sent)
    def update_arrives(self, index: int) -> None:
        self.update(self.pick(index))

    @rule(order=st.permutations(CLIENTS))
    def everybody_answers(self, order: list[str]) -> None:
        """Each the newest task in its inbox, in any order."""
        for client in order:
            self.answer_newest(client)

    def update(self, task_id: str | None) -> None:
        if task_id is not None:
            client = self.watch.sent[task_id].client
            self.deliver(e.UpdateReceived(client_id=client, task_id=task_id, delivery=self.new_delivery(), nbytes=1))

    @rule(index=st.integers(0, 12), client=st.sampled_from(CLIENTS))
    @precondition(lambda self: self.watch.sent)
    def strangers_update_arrives(self, index: int, client: str) -> None:
        task_id = self.pick(index) or ""
        if self.watch.sent[task_id].client != client:
            self.deliver(e.UpdateReceived(client_id=client, task_id=task_id, delivery=self.new_delivery(), nbytes=1))

    @rule(client=st.sampled_from(CLIENTS))
    def unknown_update_arrives(self, client: str) -> None:
        self.deliver(e.UpdateReceived(client_id=client, task_id="other/fit/1/a", delivery=self.new_delivery()))

    @rule(index=st.integers(0, 12))
    @precondition(lambda self: self.watch.sent)
    def update_is_invalid(self, index: int) -> None:
        task_id = self.pick(index) or ""
        client = self.watch.sent[task_id].client
        self.deliver(e.UpdateInvalid(client_id=client, task_id=task_id, delivery=self.new_delivery(), reason="NaN"))

    @rule(index=st.integers(0, 12))
    @precondition(lambda self: self.watch.sent)
    def fit_fails(self, index: int) -> None:
        task_id = self.pick(index) or ""
        self.fail(task_id)

    def fail(self, task_id: str) -> None:
        client = self.watch.sent[task_id].client
        self.answered(client, task_id, "failure")
        self.tell(e.TaskFailed(client_id=client, task_id=task_id, reason="boom"))

    @rule()
    @precondition(lambda self: self.parameters and not self.adopted)
    def initial_model_arrives(self) -> None:
        request = self.parameters[-1]
        event = e.UpdateReceived(
            client_id=request.client_id, task_id=request.task_id, delivery=self.new_delivery(), nbytes=1
        )
        self.deliver(event)

    @rule(index=st.integers(0, 12), fails=st.booleans())
    @precondition(lambda self: self.evaluations)
    def evaluation_arrives(self, index: int, fails: bool) -> None:
        task = self.evaluations[index % len(self.evaluations)]
        if fails:
            self.tell(e.TaskFailed(client_id=task.client_id, task_id=task.task_id, reason="boom"))
        else:
            self.tell(e.EvaluateReported(client_id=task.client_id, task_id=task.task_id))

    @rule(certainty=st.integers(0, 7))
    def somebody_stops_the_run(self, certainty: int) -> None:
        if certainty == 7:
            self.watch.is_stopped = True
            self.tell(e.StopRequested(reason="enough"))

    @rule(certainty=st.integers(0, 7))
    @precondition(lambda self: self.is_ready and not self.watch.is_stopped)
    def the_goal_is_reached(self, certainty: int) -> None:
        if certainty == 7:
            self.watch.is_at_goal = True
            self.tell(GOAL_REACHED)

    # ---- the end -------------------------------------------------------------------------------------------------

    def answer_newest(self, client: str) -> None:
        """As a client does: the newest task only, and to one that comes again the same answer again."""
        tasks, self.inbox[client] = self.inbox[client], []
        if not tasks:
            return
        if self.answers.get(tasks[-1]) == "failure":
            self.fail(tasks[-1])
        else:
            self.update(tasks[-1])

    def teardown(self) -> None:
        """From here on everybody behaves: the run ends, without a timeout, and nothing is left unsettled."""
        if not hasattr(self, "engine"):
            return
        for _ in range(60):  # no time passes
            self.behave()
            if self.watch.ended and not self.redelivered:
                break
        assert self.watch.ended == 1, f"the run does not end: {self.engine!r}"
        assert self.watch.unsettled == {}

    def behave(self) -> None:
        while self.redelivered:
            self.broker_delivers_again(0)
        for client in CLIENTS:
            if client not in self.engine.members and not self.watch.ended:
                self.join(client)
        if self.parameters and not self.adopted:
            self.initial_model_arrives()
        if not self.is_ready and self.has_model:
            self.model_is_ready()
        if self.in_doubt:
            self.tasks_are_in_doubt(None)
        self.all_beat()
        if self.watch.commit is not None:
            self.commit()
        for task in self.evaluations:
            self.tell(e.EvaluateReported(client_id=task.client_id, task_id=task.task_id))
        self.everybody_answers(list(CLIENTS))


TestWalk = pytest.mark.timeout(120)(Walk.TestCase)
TestWalk.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)


def test_a_client_that_is_lost_while_it_stops_a_task_that_failed_has_failed_once() -> None:
    walk = Walk()
    rounds = RoundConfig.buffered(1, num_rounds=1, timeout_s=30.0, fraction_evaluate=0.5, max_staleness=1)
    walk.begin(has_model=True, seed=1, config=rounds)
    walk.join(client="a")
    walk.update_is_invalid(index=0)
    walk.server_dies_and_another_goes_on(gap_s=0.0, is_durable=False, loses_inboxes=False)
    walk.beat(client="a", index=0)
    walk.model_is_ready()
    walk.to_the_deadline()
    walk.teardown()

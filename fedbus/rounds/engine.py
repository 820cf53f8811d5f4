"""The round engine: every decision of a run, as (event, now) -> commands.

Nothing in here waits, reads a clock or touches a byte of a model. The runtime calls `handle` for what has happened
and `advance` when `next_deadline` has come, and carries out the commands in their order.

    WAITING ──enough clients, model ready──> OPEN ──closed──> CLOSING ──committed──> OPEN ... DRAINING ──> ENDED

WAITING   for clients, or for the initial model
OPEN      a round takes updates
CLOSING   its commit is under way; updates that come meanwhile wait for the next round
DRAINING  all rounds are committed; federated evaluations are still out
ENDED     every further update is refused

Rounds are one machine in every regime. A synchronous round asks a cohort and replaces who leaves it. In asynchronous
ones a round is what lies between two versions: whoever is idle is asked at once, again in the same round if need be,
and the round closes on exactly `min_fit_clients` updates, of whatever version they are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from fedbus.config import RoundConfig
from fedbus.rounds import commands as c
from fedbus.rounds import events as e
from fedbus.rounds.clients import ClientRecord, ClientRecords
from fedbus.rounds.cohort import sample
from fedbus.rounds.commands import CloseReason, Command, Outcome
from fedbus.rounds.evaluation import Evaluations
from fedbus.rounds.membership import Member, Membership
from fedbus.rounds.restored import Restored, RestoredTask
from fedbus.rounds.selection import select
from fedbus.rounds.snapshot import EngineSnapshot, MemberSnapshot, MemberState

_VIRTUAL_SESSION: Final = "virtual"
"""The session of all virtual clients: whatever process works on their tasks, they are never restarted."""

DISCARDED: Final = "its round was discarded"

_REMEMBERED_ROUNDS: Final = 20
"""How long the engine itself knows what became of a task that has ended."""


class Phase(Enum):
    WAITING = "waiting"
    OPEN = "open"
    CLOSING = "closing"
    DRAINING = "draining"
    ENDED = "ended"


class TaskState(Enum):
    WORKING = "working"
    LOST = "lost"  # its client went away; an update may still come
    HELD = "held"  # its update came while no round was open
    FOLDED = "folded"
    FAILED = "failed"


class Fate(Enum):
    """What has become of the update of a task."""

    AWAITED = "awaited"
    HERE = "here"  # held, or folded into a round that is not committed yet
    COMMITTED = "committed"
    UNWANTED = "unwanted"


@dataclass(slots=True)
class _Task:
    client_id: str
    round: int
    version: int
    sent_at: float | None = None  # None when another server sent it
    repeat: int = 0
    state: TaskState = TaskState.WORKING
    folded_in: int = 0  # the round that its update is in
    failure: str = ""  # what went wrong with it
    refusal: str = "its task has ended already"  # what its update is told then


@dataclass(slots=True)
class _Round:
    number: int
    version: int
    opened_at: float
    closes_at: float
    cohort: dict[str, str] = field(default_factory=dict)  # client_id -> its last task_id
    asked: dict[str, int] = field(default_factory=dict)  # client_id -> tasks in this round
    draws: int = 0
    working: set[str] = field(default_factory=set)  # those of the cohort that are neither done nor gone
    folded: list[c.Folded] = field(default_factory=list)
    lost: dict[str, None] = field(default_factory=dict)  # in the order in which they went
    failed: dict[str, str] = field(default_factory=dict)  # client_id -> reason
    may_return: dict[str, float] = field(default_factory=dict)  # those without a connection -> end of their lease
    is_in_grace: bool = False
    recheck_at: float = math.inf  # when somebody who is busy now may be asked after all


_RESTORED_STATES: Final[Mapping[str, TaskState]] = {
    "working": TaskState.WORKING,
    "folded": TaskState.FOLDED,
    "failed": TaskState.FAILED,
}


class Engine:
    """One run's rounds.

    Args:
        config: how rounds open and close.
        seed: of the cohorts.
        run_id: goes into every task_id.
        has_model: False when the initial model must come from a client.
        restored: the run so far, when it goes on where another server had to stop. Rounds go on with `ModelReady`.
        now: the time, when there is something to restore.
        records: what each client had done by the last commit; the engine goes on with it.
    """

    def __init__(
        self,
        config: RoundConfig,
        *,
        seed: int,
        run_id: str,
        has_model: bool = True,
        restored: Restored | None = None,
        now: float = -math.inf,
        records: dict[str, ClientRecord] | None = None,
    ) -> None:
        self._config = config
        self._records = {} if records is None else records
        self._seed = seed
        self._run_id = run_id
        self._members = Membership(config.lease_s)
        self._phase = Phase.WAITING
        self._has_model = has_model
        self._model_ready = False
        self._parameters_task: tuple[str, str] | None = None  # (task_id, client_id)
        self._parameters_asked: set[str] = set()
        self._parameters_due_at = math.inf
        self._adopting: e.UpdateReceived | None = None
        self._version = 0
        self._number = 0
        self._round: _Round | None = None
        self._tasks: dict[str, _Task] = {}
        self._held: deque[e.UpdateReceived] = deque()
        self._evaluations = Evaluations()
        self._follow_up: list[Command] = []  # goes out once the next round's tasks have
        self._committed_rounds = 0
        self._stop: str | None = None
        self._num_rounds = config.num_rounds  # fewer once the run has reached its goal
        self._finish = "all rounds are done"
        self._now = now
        self._out: list[Command] = []
        self._restored_cohort: tuple[RestoredTask, ...] = ()
        self._evaluation_due = False
        self._is_resumed = restored is not None
        if restored is not None:
            self._restore(restored)

    def _restore(self, restored: Restored) -> None:
        self._version = restored.version
        self._number = self._committed_rounds = restored.rounds
        self._evaluation_due = restored.evaluation_due
        for task in restored.tasks:
            self._tasks[task.task_id] = _Task(
                client_id=task.client_id,
                round=task.round,
                version=task.version,
                state=_RESTORED_STATES[task.state],
                folded_in=task.folded_in,
                failure=task.reason,
            )
        self._restored_cohort = tuple(task for task in restored.tasks if task.round == restored.rounds + 1)
        for task in self._restored_cohort:  # they were given after the last commit
            self._record(task.client_id).note_asked(task.round)
            self._record(task.client_id).failed += task.state == "failed"
        newest = {task.client_id: task for task in sorted(restored.tasks, key=lambda task: task.round)}
        working = {client_id: task.task_id for client_id, task in newest.items() if task.state == "working"}
        for client_id in (*restored.clients, *(task.client_id for task in self._restored_cohort)):
            member = self._members.presume(client_id, self._now)
            if client_id in working:
                self._give(member, working[client_id])

    def __repr__(self) -> str:
        return (
            f"<Engine {self._phase.value} round={self._number} version={self._version} "
            f"members={len(self._members)} held={len(self._held)} evaluations={len(self._evaluations)}>"
        )

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def members(self) -> tuple[str, ...]:
        """The living clients, sorted."""
        return tuple(sorted(member.client_id for member in self._members))

    @property
    def at_work(self) -> dict[str, str]:
        """The fit task that each living client owes; nobody owes any once the rounds are over."""
        if self._phase in (Phase.DRAINING, Phase.ENDED):
            return {}
        return {member.client_id: member.fit_task for member in self._members if member.fit_task is not None}

    @property
    def versions_in_use(self) -> set[int]:
        """The versions that an update may still come of."""
        states = (TaskState.WORKING, TaskState.LOST, TaskState.HELD)
        return {task.version for task in self._tasks.values() if task.state in states or self._is_uncommitted(task)}

    def _is_uncommitted(self, task: _Task) -> bool:
        return task.state is TaskState.FOLDED and task.folded_in > self._committed_rounds

    @property
    def heard_through(self) -> float:
        """Whatever clients had said by then has been taken in."""
        return self._members.heard_through

    @property
    def records(self) -> ClientRecords:
        """What each client has done so far."""
        return self._records

    @property
    def num_members(self) -> int:
        return len(self._members)

    def is_member(self, client_id: str) -> bool:
        """Whether this client is among the living."""
        return client_id in self._members

    def session_of(self, client_id: str) -> str | None:
        """The session of a living client; None of others."""
        member = self._members.get(client_id)
        return None if member is None else member.session

    def awaits(self, task_id: str, client_id: str) -> bool:
        """Whether an update for this task could still be taken: nothing else is worth any memory."""
        if task_id == self._task_id("parameters", 0, client_id):
            return not self._has_model and self._may_give_model(client_id)
        task = self._tasks.get(task_id)
        return task is not None and task.client_id == client_id and task.state in (TaskState.WORKING, TaskState.LOST)

    def fate(self, task_id: str, client_id: str) -> Fate:
        """What has become of this client's update for this task."""
        if self.awaits(task_id, client_id):
            return Fate.AWAITED
        task = self._tasks.get(task_id)
        if task is None or task.client_id != client_id:
            return Fate.UNWANTED
        if task.state is TaskState.FOLDED:
            return Fate.COMMITTED if task.folded_in <= self._committed_rounds else Fate.HERE
        return Fate.HERE if task.state is TaskState.HELD else Fate.UNWANTED

    def awaits_report(self, task_id: str, client_id: str) -> bool:
        """Whether an evaluation of this client is due."""
        return self._evaluations.awaits(task_id, client_id)

    # ---- for those who watch -----------------------------------------------------------------------------------------

    def counts(self, now: float) -> tuple[int, int, int]:
        """How many members are idle, are at work with time for it, and are overdue."""
        return self._members.counts(now)

    @property
    def open_round(self) -> tuple[int, float] | None:
        """The number of the round that is open, and since when; None between two rounds."""
        return None if self._round is None else (self._round.number, self._round.opened_at)

    def snapshot(self, now: float) -> EngineSnapshot:
        """Everything as of now; takes microseconds for each member."""
        round_ = self._round
        has_begun = bool(self._number or self._restored_cohort)
        return EngineSnapshot(
            phase=self._phase.value,
            version=self._version,
            committed_rounds=self._committed_rounds,
            open_round=None if round_ is None else round_.number,
            open_s=None if round_ is None else max(0.0, now - round_.opened_at),
            closes_in_s=None if round_ is None else max(0.0, round_.closes_at - now),
            folded=0 if round_ is None else len(round_.folded),
            needed=self._config.min_fit_clients,
            clients_missing=0 if has_begun else max(0, self._config.start_clients - len(self._members)),
            members=tuple(self._member_snapshot(member, now) for member in self._members),
        )

    def _member_snapshot(self, member: Member, now: float) -> MemberSnapshot:
        task = self._tasks.get(member.fit_task or "")
        state: MemberState = "idle"
        if member.fit_task is not None:
            is_late = task is not None and task.version < self._version
            state = "overdue" if now >= member.due_at else "late" if is_late else "training"
        sent_at = None if task is None else task.sent_at
        return MemberSnapshot(
            client_id=member.client_id,
            state=state,
            version=member.version,
            round=None if task is None else task.round,
            working_s=None if sent_at is None else max(0.0, now - sent_at),
            silent_s=max(0.0, now - member.heard_at),
        )

    # ---- input ---------------------------------------------------------------------------------------------------

    def handle(self, event: e.Event, now: float) -> list[Command]:
        """Take in what has happened; what is to be done about it, in order."""
        self._now = max(self._now, now)
        match event:
            case e.ClientJoined() | e.ClientHeard():
                self._heard(event)
            case e.VirtualClientsHeard():
                self._virtual_heard(event)
            case e.ClientLeft():
                self._left(event)
            case e.ModelReady():
                self._model_ready = self._has_model = True
                if self._adopting is not None:
                    self._settle(self._adopting, Outcome.COMMITTED)
                    self._adopting = None
            case e.UpdateReceived():
                self._received(event)
            case e.UpdateInvalid():
                self._invalid(event)
            case e.TaskFailed():
                self._failed(event)
            case e.ClientLost():
                member = self._members.get(event.client_id)
                if member is not None:
                    self._lose(member, event.reason, "unreachable")
            case e.ClientExpelled():
                self._expel(event)
            case e.ClientUnreachable():
                self._unreachable(event)
            case e.EvaluateReported():
                self._evaluations.answered(event.task_id, event.client_id, reported=True)
            case e.RoundCommitted():
                self._committed(event)
            case e.Reconnected():
                self._members.renew_all(self._now + event.grace_s)
            case e.EchoHeard():
                self._members.heard_through = event.sent_at
            case e.TasksInDoubt():
                self._send_again(event.client_id)
            case e.StopRequested():
                self._stop = self._stop or event.reason
            case e.GoalReached():
                self._reached(event)
        return self._settle_down()

    def advance(self, now: float) -> list[Command]:
        """Let time pass: expire leases, close what is due."""
        self._now = max(self._now, now)
        expired = self._members.expired(self._now)
        for member in expired:
            self._lose(member, f"silent for {self._now - member.heard_at:.1f} s", "lease", refill=False)
        if expired and self._phase is Phase.OPEN:  # only now: the next one in line may have expired, too
            self._grow_cohort()
        if self._parameters_task is not None and self._now >= self._parameters_due_at:
            self._parameters_failed(self._parameters_task[0], f"{self._parameters_task[1]} did not answer in time")
        return self._settle_down()

    def next_deadline(self) -> float | None:
        """When `advance` has something to do; None while only an event can change anything."""
        if self._phase is Phase.ENDED:
            return None
        times = [self._members.next_expiry()]
        if self._round is not None and self._phase is Phase.OPEN:
            times += [self._round.closes_at, self._round.recheck_at, *self._returns(self._round)]
        times += self._evaluations.deadlines()
        if self._parameters_task is not None:
            times.append(self._parameters_due_at)
        return min((time for time in times if time is not None and time < math.inf), default=None)

    def _settle_down(self) -> list[Command]:
        """Draw every consequence of the state as it is now, and hand out the commands."""
        self._request_parameters()
        if self._phase is Phase.WAITING:
            self._open_if_possible()
        self._out += self._follow_up
        self._follow_up = []
        if self._phase is Phase.OPEN:
            if self._round is not None and self._round.recheck_at <= self._now < self._round.closes_at:
                self._grow_cohort()
            self._close_if_due()
        self._out += self._evaluations.close_due(self._now, is_stopped=self._stop is not None)
        self._end_if_due()
        out, self._out = self._out, []
        return out

    # ---- clients come and go -------------------------------------------------------------------------------------

    def _heard(self, event: e.ClientJoined | e.ClientHeard) -> None:
        if self._phase is Phase.ENDED:
            return
        known = self._members.get(event.client_id)
        former_session = known.session if known is not None else event.session
        is_new = self._members.renew(event.client_id, event.session, self._now)
        member = self._members.get(event.client_id)
        assert member is not None
        before, member.at_work_on = member.at_work_on, event.fit_task if isinstance(event, e.ClientHeard) else ""
        self._adopt_task_in_hand(member)
        if is_new or not former_session or isinstance(event, e.ClientJoined):
            self._out.append(c.WelcomeClient(client_id=event.client_id, session=event.session))
        if known is not None and former_session not in ("", event.session):
            self._restarted(known)
        elif member.is_in_doubt and member.at_work_on != member.fit_task:
            self._give_up_task(member)
        member.is_in_doubt = False
        if not is_new:
            if self._phase is Phase.OPEN and before != member.at_work_on:  # it may be idle after all
                self._grow_cohort()
            return
        self._note_joined(member)
        if self._phase is Phase.OPEN:
            self._grow_cohort()

    def _virtual_heard(self, event: e.VirtualClientsHeard) -> None:
        """As if each of them had said that it has nothing in hand, in one go: there may be many thousands."""
        if self._phase is Phase.ENDED:
            return
        has_changed = False
        for client_id in event.client_ids:
            is_new = self._members.renew(client_id, _VIRTUAL_SESSION, self._now)
            member = self._members.get(client_id)
            assert member is not None
            if is_new:
                self._note_joined(member)
            elif member.is_in_doubt:  # of an earlier round: it was not given again, and may be nowhere
                self._let_task_go(member)
                member.is_in_doubt = False
            else:
                continue
            has_changed = True
        if has_changed and self._phase is Phase.OPEN:
            self._grow_cohort()

    def _note_joined(self, member: Member) -> None:
        needed = 0 if self._number else max(0, self._config.start_clients - len(self._members))
        self._out.append(
            c.MemberJoined(client_id=member.client_id, members=len(self._members), needed=needed, round=self._number)
        )
        if self._phase is Phase.OPEN:
            self._take_place_again(member)

    def _adopt_task_in_hand(self, member: Member) -> None:
        """Somebody who was given up is back, still at work: it need not be given another task."""
        task_id = member.at_work_on
        task = self._tasks.get(task_id)
        if member.fit_task is not None or task is None or task.client_id != member.client_id:
            return
        is_of_round = self._round is not None and self._round.cohort.get(member.client_id) == task_id
        if task.state is TaskState.LOST and not is_of_round:  # else it takes its place again
            task.state = TaskState.WORKING
            self._give(member, task_id)
        elif task.state is TaskState.FAILED:  # it was told to stop, by a server that died with the word unsaid
            self._give(member, task_id)
            reason = task.failure or task.refusal
            self._out.append(c.CancelTask(client_id=member.client_id, task_id=task_id, reason=reason))

    def _take_place_again(self, member: Member) -> None:
        """Somebody who was lost in this round is back: its task is still its own."""
        assert self._round is not None
        task_id = self._round.cohort.get(member.client_id, "")
        task = self._tasks.get(task_id)
        if task is None or task.state is not TaskState.LOST or member.client_id not in self._round.lost:
            return
        task.state = TaskState.WORKING
        self._give(member, task_id)
        self._round.lost.pop(member.client_id)
        self._round.working.add(member.client_id)
        self._out.append(self._send(self._round, member.client_id, task_id))

    def _unreachable(self, event: e.ClientUnreachable) -> None:
        member = self._members.get(event.client_id)
        if member is not None:
            seen_at = member.heard_at if event.seen_at is None else max(member.heard_at, event.seen_at)
            noticed_s = max(0.0, self._now - seen_at)
            if self._round is not None:
                self._round.may_return[event.client_id] = member.heard_at + self._config.lease_s
            reason = f"{event.reason} (noticed {noticed_s:.1f} s after its last sign of life)"
            self._lose(member, reason, "unreachable")

    def _restarted(self, member: Member) -> None:
        """A new process of a known client: what the old one worked on is gone, and is given again while it counts."""
        round_ = self._round
        if member.fit_task is None:
            return
        if round_ is not None and self._phase is Phase.OPEN and self._is_of_cohort(round_, member):
            self._out.append(self._send(round_, member.client_id, member.fit_task))
        else:
            self._give_up_task(member)

    def _give_up_task(self, member: Member) -> None:
        """Its client does not work on this task of an earlier round; should an update come all the same, it counts."""
        self._let_task_go(member)
        if self._phase is Phase.OPEN:
            self._grow_cohort()

    def _let_task_go(self, member: Member) -> None:
        task = self._tasks.get(member.fit_task or "")
        self._members.free(member)
        if task is not None and task.state is TaskState.WORKING:
            task.state = TaskState.LOST

    def _is_of_cohort(self, round_: _Round, member: Member) -> bool:
        """Whether it works on its task of this round."""
        return member.fit_task is not None and round_.cohort.get(member.client_id) == member.fit_task

    def _send_again(self, only: str | None) -> None:
        """Repeat the tasks that are still unanswered: a client that has its answer ready sends that again.

        The models of earlier rounds' tasks may be no more, so those are not repeated: the clients will say whether they
        work on them.
        """
        if self._parameters_task is not None and only in (None, self._parameters_task[1]):
            task_id, client_id = self._parameters_task
            self._out.append(c.RequestParameters(client_id=client_id, task_id=task_id))
        open_round = self._round if self._phase is Phase.OPEN else None
        if open_round is not None:
            for client_id, task_id in open_round.cohort.items():
                if client_id in open_round.working and client_id in self._members and only in (None, client_id):
                    self._out.append(self._send(open_round, client_id, task_id))
        for member in self._members:
            is_repeated = open_round is not None and self._is_of_cohort(open_round, member)
            if member.fit_task is not None and not is_repeated and only in (None, member.client_id):
                member.is_in_doubt = True
        # Those about earlier versions were asked for long ago: what is left of them is in the inboxes.
        self._out += self._evaluations.tasks(self._version, self._now, only=only)

    def _left(self, event: e.ClientLeft) -> None:
        member = self._members.get(event.client_id)
        if member is not None and member.session in ("", event.session):  # a word of its former life changes nothing
            self._lose(member, event.reason, "left")

    def _lose(self, member: Member, reason: str, cause: c.LossCause, *, refill: bool = True) -> None:
        self._members.remove(member.client_id)
        self._out.append(
            c.MemberLost(
                client_id=member.client_id,
                reason=reason,
                cause=cause,
                members=len(self._members),
                round=self._number,
            )
        )
        if self._parameters_task is not None and self._parameters_task[1] == member.client_id:
            self._parameters_task = None
        self._evaluations.forget_client(member.client_id)
        task = self._tasks.get(member.fit_task or "")
        if task is None:
            return
        if task.state is TaskState.WORKING:
            task.state = TaskState.LOST
            self._record(member.client_id).lost += 1
        if self._round is None or self._phase is not Phase.OPEN:
            return
        if self._is_of_cohort(self._round, member) and task.state is TaskState.LOST:  # else it has failed already
            self._round.lost[member.client_id] = None
            self._round.working.discard(member.client_id)
        if refill:
            self._grow_cohort()

    def _expel(self, event: e.ClientExpelled) -> None:
        """Its updates that are folded stay in: they came whole from somebody who was let in then."""
        client_id, reason = event.client_id, event.reason
        member = self._members.get(client_id)
        if member is not None:
            self._lose(member, reason, "expelled", refill=False)
        for held in [held for held in self._held if held.client_id == client_id]:
            self._held.remove(held)
            self._settle(held, Outcome.REFUSED, reason)
        open_states = (TaskState.WORKING, TaskState.LOST, TaskState.HELD)
        for task_id, task in self._tasks.items():
            if task.client_id == client_id and task.state in open_states:
                task.state, task.failure, task.refusal = TaskState.FAILED, reason, reason
                self._out.append(c.FitFailed(client_id=client_id, task_id=task_id, round=task.round, reason=reason))
                self._note_failed_in_round(task_id, task)
        self._out.append(c.GiveUpUploads(client_id=client_id, reason=reason))
        if self._phase is Phase.OPEN:
            self._grow_cohort()

    # ---- the initial model ---------------------------------------------------------------------------------------

    def _request_parameters(self) -> None:
        if self._has_model or self._parameters_task is not None or self._stop is not None:
            return
        untried = {member.client_id for member in self._members} - self._parameters_asked
        for client_id in sample(self._seed, 0, "parameters", untried, 1):
            task_id = self._task_id("parameters", 0, client_id)
            self._parameters_task = (task_id, client_id)
            self._parameters_asked.add(client_id)
            self._parameters_due_at = self._now + self._config.timeout_s
            self._out.append(c.RequestParameters(client_id=client_id, task_id=task_id))

    def _may_give_model(self, client_id: str) -> bool:
        """Those that were asked for it; after a resume anybody, for the last server may have asked."""
        return self._is_resumed or client_id in self._parameters_asked

    def _adopt(self, event: e.UpdateReceived) -> None:
        if self._has_model or not self._may_give_model(event.client_id):
            self._settle(event, Outcome.REFUSED, "the run has its initial model already, or asked somebody else for it")
            return
        self._has_model = True
        self._parameters_task = None
        self._out.append(c.AdoptParameters(client_id=event.client_id, task_id=event.task_id, delivery=event.delivery))
        self._adopting = event

    # ---- a round opens -------------------------------------------------------------------------------------------

    def _open_if_possible(self) -> None:
        needed = 1 if self._number or self._restored_cohort else self._config.start_clients
        is_over = self._number >= self._num_rounds  # resumed after its last commit: nobody need be there
        if not self._model_ready or self._stop is not None or (len(self._members) < needed and not is_over):
            return
        if self._evaluation_due:  # before the round takes its clients
            self._evaluation_due = False
            self._open_evaluation(self._number)
        if is_over:
            self._phase = Phase.DRAINING
            self._let_go_of_held()
            return
        self._number += 1
        self._phase = Phase.OPEN
        self._round = _Round(
            number=self._number,
            version=self._version,
            opened_at=self._now,
            closes_at=self._now + self._config.timeout_s,
        )
        self._forget_old_tasks()
        tasks = self._reopened(self._round) if self._restored_cohort else self._new_tasks(self._round)
        self._out.append(
            c.RoundOpened(
                round=self._number,
                version=self._version,
                cohort=tuple(self._round.cohort),
                min_fit_clients=self._config.min_fit_clients,
                timeout_s=self._config.timeout_s,
            )
        )
        self._out += tasks
        while self._held and not (self._config.is_asynchronous and self._is_enough(self._round)):
            event = self._held.popleft()
            self._tasks[event.task_id].state = TaskState.WORKING
            self._received(event)

    def _reopened(self, round_: _Round) -> list[c.SendFitTask]:
        """The cohort that was drawn before the interruption.

        What is not answered is not sent again here: the answers may be on their way, so `TasksInDoubt` comes later. But
        clients were heard while the model was not ready: a task counts as what has become of it by now, and is sent
        again to a new process, or where it was in doubt already.
        """
        cohort, self._restored_cohort = self._restored_cohort, ()
        for restored in cohort:
            task = self._tasks[restored.task_id]
            task.repeat = round_.asked.get(restored.client_id, 0)
            round_.asked[restored.client_id] = task.repeat + 1
            round_.cohort[restored.client_id] = restored.task_id  # the last one of a client counts
        again = []
        for client_id, task_id in round_.cohort.items():
            task, member = self._tasks[task_id], self._members.get(client_id)
            is_doubtful = member is not None and (member.fit_task != task_id or member.is_in_doubt)
            if member is not None and is_doubtful and task.state in (TaskState.WORKING, TaskState.LOST):
                task.state, member.is_in_doubt = TaskState.WORKING, False
                self._give(member, task_id)
                again.append(self._send(round_, client_id, task_id))
            if task.state is TaskState.WORKING:
                round_.working.add(client_id)
            elif task.state is TaskState.LOST:
                round_.lost[client_id] = None
            elif task.state is TaskState.FAILED:
                round_.failed[client_id] = task.failure
        return again + self._new_tasks(round_)

    def _grow_cohort(self) -> None:
        """Fill the places that a late joiner brings, a lost client leaves or a straggler can take again."""
        assert self._round is not None
        tasks = self._new_tasks(self._round)
        if tasks:
            clients = tuple(task.client_id for task in tasks)
            self._out.append(c.CohortGrew(round=self._round.number, clients=clients))
            self._out += tasks

    def _new_tasks(self, round_: _Round) -> list[c.SendFitTask]:
        places = self._places(round_)
        round_.recheck_at = math.inf
        if places <= 0 and not self._config.is_asynchronous:  # the usual case, once per update: no look at every member
            return []
        chosen: tuple[str, ...] = ()
        if places > 0:
            chosen = select(
                self._config.selection,
                seed=self._seed,
                round=round_.number,
                draw=round_.draws,
                eligible=self._eligible(round_),
                size=places,
                records=self._records,
            )
        if self._config.is_asynchronous:
            round_.draws += bool(chosen)
        tasks = [self._new_task(round_, client_id) for client_id in chosen]
        if self._config.is_asynchronous or len(chosen) < places:  # who is overdue may be asked, or frees a place
            round_.recheck_at = self._members.next_due(self._now)
        return tasks

    def _places(self, round_: _Round) -> int:
        """How many more clients the round would take."""
        size = self._config.cohort_size(len(self._members))
        if self._config.is_asynchronous:
            return size - self._members.num_in_time(self._now)  # one that hangs must not hold a place for ever
        return size - (len(round_.cohort) - len(round_.lost) - len(round_.failed))

    def _eligible(self, round_: _Round) -> list[str]:
        """Members that are idle: nobody gets a backlog of tasks.

        They have not been asked in this round; in asynchronous rounds, they have not failed in it.
        """
        out = round_.failed if self._config.is_asynchronous else round_.cohort
        return [member.client_id for member in self._members.idle(self._now) if member.client_id not in out]

    def _give(self, member: Member, task_id: str) -> None:
        self._members.give(member, task_id, self._now + self._config.timeout_s, self._tasks[task_id].version)

    def _new_task(self, round_: _Round, client_id: str) -> c.SendFitTask:
        repeat = round_.asked.get(client_id, 0)
        task_id = self._task_id("fit", round_.number, client_id) + (f"/{repeat}" if repeat else "")
        self._tasks[task_id] = _Task(client_id, round_.number, round_.version, self._now, repeat)
        self._record(client_id).note_asked(round_.number)
        round_.asked[client_id] = repeat + 1
        round_.cohort[client_id] = task_id
        round_.working.add(client_id)
        round_.lost.pop(client_id, None)
        member = self._members.get(client_id)
        assert member is not None
        self._give(member, task_id)
        return self._send(round_, client_id, task_id)

    def _send(self, round_: _Round, client_id: str, task_id: str) -> c.SendFitTask:
        return c.SendFitTask(
            client_id=client_id,
            task_id=task_id,
            round=round_.number,
            version=round_.version,
            timeout_s=self._time_for(round_),
            repeat=self._tasks[task_id].repeat,
        )

    def _time_for(self, round_: _Round) -> float:
        """How long an answer is of use: in asynchronous rounds it does not matter when the round closes."""
        if self._config.is_asynchronous:
            return self._config.timeout_s
        return max(0.0, round_.closes_at - self._now)

    def _record(self, client_id: str) -> ClientRecord:
        return self._records.setdefault(client_id, ClientRecord(client_id=client_id))

    def _task_id(self, kind: str, round_: int, client_id: str) -> str:
        return f"{self._run_id}/{kind}/{round_}/{client_id}"

    def _forget_old_tasks(self) -> None:
        """Drop what would be refused as too stale, and what has long ended: the ledger knows those that are folded."""
        oldest = self._version - self._config.max_staleness
        recent = self._number - _REMEMBERED_ROUNDS
        working = {member.fit_task for member in self._members}
        ended = (TaskState.FOLDED, TaskState.FAILED)
        self._tasks = {
            task_id: task
            for task_id, task in self._tasks.items()
            if (task.version >= oldest and (task.state not in ended or task.round >= recent))
            or task_id in working
            or task.state is TaskState.HELD
            or self._is_uncommitted(task)
        }

    # ---- updates -------------------------------------------------------------------------------------------------

    def _received(self, event: e.UpdateReceived) -> None:
        if self._is_given_up():
            self._settle(event, Outcome.RELEASED)
            return
        if event.task_id == self._task_id("parameters", 0, event.client_id):
            self._adopt(event)
            return
        task = self._own_task(event)
        if task is None or self._already_settled(event, task):
            return
        if self._phase is Phase.OPEN:
            self._fold_or_refuse(event, task)
        elif self._phase in (Phase.DRAINING, Phase.ENDED):
            task.state = TaskState.FAILED
            self._idle(event)
            self._settle(event, Outcome.SURPLUS)
        else:
            task.state = TaskState.HELD
            self._idle(event)
            self._held.append(event)

    def _own_task(self, event: e.UpdateReceived | e.UpdateInvalid) -> _Task | None:
        """The task that this update answers; a stranger's update is refused and costs its true owner nothing."""
        task = self._tasks.get(event.task_id)
        if task is None:
            self._settle(event, Outcome.REFUSED, "its task is not one of this run, or too old")
        elif task.client_id != event.client_id:
            self._settle(event, Outcome.REFUSED, f"its task was given to {task.client_id}")
            return None
        return task

    def _already_settled(self, event: e.UpdateReceived | e.UpdateInvalid, task: _Task) -> bool:
        if task.state in (TaskState.FOLDED, TaskState.HELD):
            is_durable = 0 < task.folded_in <= self._committed_rounds
            self._settle(event, Outcome.DUPLICATE, round_=task.folded_in if is_durable else 0)
        elif task.state is TaskState.FAILED:
            self._settle(event, Outcome.REFUSED, task.refusal)
            self._idle(event)
            if self._phase is Phase.OPEN:
                self._grow_cohort()
        else:
            return False
        return True

    def _fold_or_refuse(self, event: e.UpdateReceived, task: _Task) -> None:
        assert self._round is not None
        self._idle(event)
        if self._round.cohort.get(event.client_id) == event.task_id:
            self._round.working.discard(event.client_id)
        staleness = self._version - task.version
        if staleness > self._config.max_staleness:
            self._give_up_as_too_late(task)
            self._settle(event, Outcome.REFUSED, task.refusal)
        else:
            task.state, task.folded_in = TaskState.FOLDED, self._round.number
            seconds = None if task.sent_at is None else self._now - task.sent_at
            self._record(event.client_id).note_folded(
                staleness=staleness, seconds=seconds, nbytes=event.nbytes, utility=event.utility
            )
            if self._round.cohort.get(event.client_id) == event.task_id:
                self._round.lost.pop(event.client_id, None)  # it went, but its update had been on its way
            self._round.folded.append(
                c.Folded(
                    client_id=event.client_id,
                    task_id=event.task_id,
                    delivery=event.delivery,
                    staleness=staleness,
                )
            )
            self._out.append(
                c.Fold(
                    client_id=event.client_id,
                    task_id=event.task_id,
                    delivery=event.delivery,
                    round=self._round.number,
                    version=task.version,
                    staleness=staleness,
                    seconds=seconds,
                    discount=self._config.discount(staleness),
                )
            )
        if not self._is_enough(self._round):
            self._grow_cohort()

    def _give_up_as_too_late(self, task: _Task) -> None:
        late = self._version - task.version
        reason = f"{late} version{'s' * (late != 1)} late, max_staleness is {self._config.max_staleness}"
        task.state, task.failure, task.refusal = TaskState.FAILED, reason, reason
        self._record(task.client_id).stopped += 1

    def _is_given_up(self) -> bool:
        """The run was stopped before its last round: what comes now is for whoever takes it up again."""
        return self._phase in (Phase.DRAINING, Phase.ENDED) and self._committed_rounds < self._num_rounds

    def _invalid(self, event: e.UpdateInvalid) -> None:
        if self._is_given_up():
            self._settle(event, Outcome.RELEASED)
            return
        if event.task_id == self._task_id("parameters", 0, event.client_id):
            self._settle(event, Outcome.REFUSED, event.reason)
            self._parameters_failed(event.task_id, event.reason)
            return
        task = self._own_task(event)
        if task is None or self._already_settled(event, task):
            return
        self._settle(event, Outcome.REFUSED, event.reason)
        self._record(event.client_id).refused += 1
        self._fail(event.task_id, task, event.reason)

    def _settle(
        self, event: e.UpdateReceived | e.UpdateInvalid, outcome: Outcome, reason: str = "", round_: int = 0
    ) -> None:
        self._out.append(
            c.Settle(
                client_id=event.client_id,
                task_id=event.task_id,
                delivery=event.delivery,
                outcome=outcome,
                reason=reason,
                round=round_,
            )
        )

    def _idle(self, event: e.UpdateReceived | e.UpdateInvalid | e.TaskFailed) -> None:
        member = self._members.get(event.client_id)
        if member is not None and member.fit_task == event.task_id:
            self._members.free(member)

    # ---- tasks that fail -----------------------------------------------------------------------------------------

    def _failed(self, event: e.TaskFailed) -> None:
        if self._parameters_task is not None and self._parameters_task[0] == event.task_id:
            self._parameters_failed(event.task_id, event.reason)
            return
        round_ = self._evaluations.answered(event.task_id, event.client_id, reported=False)
        if round_ is not None:
            self._out.append(c.EvaluateFailed(client_id=event.client_id, round=round_, reason=event.reason))
            return
        task = self._tasks.get(event.task_id)
        if self._phase in (Phase.DRAINING, Phase.ENDED):
            self._idle(event)  # what became of it is of no interest any more
        elif task is not None and task.client_id == event.client_id and task.state is TaskState.WORKING:
            self._out.append(
                c.FitFailed(client_id=event.client_id, task_id=event.task_id, round=task.round, reason=event.reason)
            )
            self._fail(event.task_id, task, event.reason)
        elif task is not None and task.client_id == event.client_id:  # it was told to stop, and has
            self._idle(event)
            if self._phase is Phase.OPEN:
                self._grow_cohort()

    def _parameters_failed(self, task_id: str, reason: str) -> None:
        if self._parameters_task is None or self._parameters_task[0] != task_id:
            return
        self._parameters_task = None
        enough = len(self._members) >= self._config.start_clients  # else somebody who can may still come
        if enough and all(member.client_id in self._parameters_asked for member in self._members):
            self._stop = f"no client could give the initial model: {reason}"

    def _fail(self, task_id: str, task: _Task, reason: str) -> None:
        task.state, task.failure = TaskState.FAILED, reason
        self._record(task.client_id).failed += 1
        member = self._members.get(task.client_id)
        if member is not None and member.fit_task == task_id:
            self._members.free(member)
        if self._phase is Phase.OPEN:
            self._note_failed_in_round(task_id, task)
            self._grow_cohort()

    def _note_failed_in_round(self, task_id: str, task: _Task) -> None:
        if self._round is None or self._phase is not Phase.OPEN:
            return
        if self._round.cohort.get(task.client_id) == task_id:
            self._round.lost.pop(task.client_id, None)
            self._round.working.discard(task.client_id)
            self._round.failed[task.client_id] = task.failure

    # ---- a round closes ------------------------------------------------------------------------------------------

    def _is_enough(self, round_: _Round) -> bool:
        return len(round_.folded) >= self._config.min_fit_clients

    def _close_if_due(self) -> None:
        round_ = self._round
        assert round_ is not None
        if self._stop is not None:
            self._abandon(round_, Outcome.RELEASED)
            return
        if self._is_enough(round_):
            if not round_.working or self._config.grace_s == 0:
                self._close(round_, CloseReason.MIN_FIT_CLIENTS)
                return
            if not round_.is_in_grace:  # a fold within the grace must not prolong it
                round_.is_in_grace = True
                round_.closes_at = min(round_.closes_at, self._now + self._config.grace_s)
        elif not round_.working and (round_.folded or round_.failed) and not self._awaits_stragglers(round_):
            self._close(round_, CloseReason.COHORT_DONE)
            return
        if self._now >= round_.closes_at:
            self._close(round_, CloseReason.MIN_FIT_CLIENTS if self._is_enough(round_) else CloseReason.TIMEOUT)

    def _awaits_stragglers(self, round_: _Round) -> bool:
        """Somebody will bring an update, and take a free place.

        A living client that still trains for an earlier round; or one that lost its connection and may be back before
        its lease ends: its place is given to another at once, but if there is no other the round waits for it.
        """
        has_room = self._config.is_asynchronous or self._places(round_) > 0
        return has_room and (bool(self._returns(round_)) or self._members.is_anybody_busy(self._now))

    def _returns(self, round_: _Round) -> list[float]:
        """Until when those of the cohort who lost their connection may still be back."""
        return [end for client, end in round_.may_return.items() if client in round_.lost and self._now < end]

    def _close(self, round_: _Round, reason: CloseReason) -> None:
        self._phase = Phase.CLOSING
        self._out.append(
            c.Commit(
                round=round_.number,
                version=round_.version,
                reason=reason,
                cohort=tuple(round_.cohort),
                folded=tuple(round_.folded),
                unfinished=self._unfinished(round_),
                lost=tuple(round_.lost),
                failed=dict(round_.failed),
                opened_at=round_.opened_at,
            )
        )

    def _unfinished(self, round_: _Round) -> tuple[str, ...]:
        """Those of the cohort who were still at work; in asynchronous rounds somebody always is."""
        if self._config.is_asynchronous:
            return ()
        return tuple(client for client in round_.cohort if client in round_.working)

    def _abandon(self, round_: _Round, outcome: Outcome) -> None:
        """Stop in the middle of a round: its updates go back to the broker, uncommitted, or are of no use."""
        for folded in round_.folded:
            self._settle_folded(folded, outcome, 0)
        self._round = None
        self._phase = Phase.DRAINING

    def _settle_folded(self, folded: c.Folded, outcome: Outcome, round_: int) -> None:
        self._out.append(
            c.Settle(
                client_id=folded.client_id,
                task_id=folded.task_id,
                delivery=folded.delivery,
                outcome=outcome,
                round=round_,
                staleness=folded.staleness,
            )
        )

    def _refuse_folded(self, folded: c.Folded) -> None:
        """No model was made of its round: its client must not believe that it counts."""
        task = self._tasks.get(folded.task_id)
        if task is not None:
            task.state, task.failure = TaskState.FAILED, DISCARDED
        self._out.append(
            c.Settle(
                client_id=folded.client_id,
                task_id=folded.task_id,
                delivery=folded.delivery,
                outcome=Outcome.REFUSED,
                reason=DISCARDED,
            )
        )

    def _committed(self, commit: e.RoundCommitted) -> None:
        round_ = self._round
        assert round_ is not None, "a commit that was not asked for"
        assert (self._phase, round_.number) == (Phase.CLOSING, commit.round), "a commit that was not asked for"
        is_new_model = commit.version != self._version
        self._version = commit.version
        self._committed_rounds += 1
        self._round = None
        for folded in round_.folded:
            if is_new_model:
                self._settle_folded(folded, Outcome.COMMITTED, round_.number)
            else:
                self._refuse_folded(folded)
        is_last = round_.number >= self._num_rounds
        self._phase = Phase.DRAINING if is_last or self._stop is not None else Phase.WAITING
        if self._phase is Phase.DRAINING:
            self._let_go_of_held()
        elif is_new_model:
            self._cancel_hopeless()
        if is_new_model and self._stop is None:
            self._open_evaluation(round_.number)
        if is_last:
            self._stop_training()

    def _stop_training(self) -> None:
        """The rounds are over: whoever is asked to evaluate need not finish a fit first that nobody wants."""
        asked = self._evaluations.outstanding()
        for client_id, task_id in [(m.client_id, m.fit_task) for m in self._members if m.client_id in asked]:
            if task_id is not None:
                self._out.append(c.CancelTask(client_id=client_id, task_id=task_id, reason="the last round is over"))

    def _let_go_of_held(self) -> None:
        """No round will open for the updates that waited for one."""
        while self._held:
            event = self._held.popleft()
            self._tasks[event.task_id].state = TaskState.WORKING
            self._received(event)

    def _cancel_hopeless(self) -> None:
        """Whoever is so late that the update would be refused need not go on; it stays busy until it has heard so."""
        oldest = self._version - self._config.max_staleness
        for member in self._members:
            task_id = member.fit_task or ""
            task = self._tasks.get(task_id)
            if task is None or task.version >= oldest or task.state is not TaskState.WORKING:
                continue
            self._give_up_as_too_late(task)
            cancelled, round_ = member.client_id, self._committed_rounds
            self._out += [
                c.CancelTask(client_id=cancelled, task_id=task_id, reason=task.failure),
                c.FitCancelled(client_id=cancelled, task_id=task_id, round=round_, reason=task.failure),
            ]

    # ---- federated evaluation ------------------------------------------------------------------------------------

    def _open_evaluation(self, round_: int) -> None:
        """Clients that still train for an earlier round are not asked: they would hold the result up."""
        idle = [member.client_id for member in self._members if not self._holds_up(member, round_)]
        size = math.ceil(self._config.fraction_evaluate * len(self._members) - 1e-9)
        chosen = sample(self._seed, round_, "evaluate", idle, size)
        if not chosen:
            return
        asked = {self._task_id("evaluate", round_, client_id): client_id for client_id in chosen}
        self._evaluations.begin(round_, self._version, self._now + self._config.evaluation_s, asked)
        for member in map(self._members.get, chosen):
            assert member is not None
            self._members.show(member, self._version)
        self._follow_up += self._evaluations.tasks(self._version, self._now)

    def _holds_up(self, member: Member, round_: int) -> bool:
        """Whether it still works on a task of this round, or of one before."""
        task = self._tasks.get(member.fit_task or "")
        return task is not None and task.round <= round_ and member.is_busy(self._now)

    # ---- the end -------------------------------------------------------------------------------------------------

    def _reached(self, event: e.GoalReached) -> None:
        """The round whose commit is under way is the last one; one that is open is given up, for good."""
        last = self._committed_rounds + (self._phase is Phase.CLOSING)
        if last >= self._num_rounds or self._stop is not None:
            return
        self._num_rounds, self._finish = last, event.reason
        if self._phase is Phase.OPEN and self._round is not None:
            self._abandon(self._round, Outcome.SURPLUS)
            self._let_go_of_held()
            self._stop_training()

    def _end_if_due(self) -> None:
        if self._phase is Phase.WAITING and self._stop is not None:
            self._phase = Phase.DRAINING
            for held in self._held:
                self._settle(held, Outcome.RELEASED)
            self._held.clear()
        if self._phase is not Phase.DRAINING or self._evaluations:
            return
        self._phase = Phase.ENDED
        self._parameters_task = None
        finished = self._committed_rounds >= self._num_rounds
        reason = self._finish if finished else self._stop
        self._out.append(c.EndRun(finished=finished, reason=reason or ""))

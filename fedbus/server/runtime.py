"""The server's asyncio shell: it feeds the engine with what comes in and carries out what the engine says.

    control queue ──┐                    ┌──> sender      tasks, receipts (pipelined, in order)
    updates queue ──┼─> events ─> engine ┼──> aggregator  fold, fold, ..., commit: strictly in order
    deadlines     ──┘                    └──> evaluator   evaluate_fn, in the user's thread

Order of a commit: checkpoint and ledger, then the engine's word and the tasks of the next round, then acknowledgements,
then receipts. Whatever dies in between, the broker still has the updates, and the ledger knows which of them count
already. The new version goes into the stream meanwhile, but no task names it before it is durable.

A server that goes on where another had to stop takes the next epoch, publishes the last version again, takes in what
the broker gives again, and repeats the tasks that are still unanswered.

Order of the end: the engine's last command, then the aggregator and the evaluator run dry, then the members are
told, then everything is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import json
import logging
import math
import re
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from fedbus.app import App
from fedbus.bus.base import Bus, Consumer, Delivery, hold_patiently
from fedbus.bus.topology import CONTROL, SERVER_LOCK, TASKS, UPDATES, client_inbox, inbox, ingress
from fedbus.clock import now
from fedbus.errors import (
    AggregateRefused,
    BrokerDenied,
    BrokerUnreachable,
    ClientCodeError,
    ConfigError,
    DecodeError,
    FedbusError,
    PublishUnconfirmed,
    QueueBusy,
    QueueMismatch,
    QueueMissing,
    RunFailed,
    Unroutable,
    UpdateRefused,
    leaf,
    one_line,
    place_of,
)
from fedbus.observe import events as o
from fedbus.observe.figures import ServerFigures
from fedbus.rounds import commands as c
from fedbus.rounds import events as e
from fedbus.rounds.commands import Outcome
from fedbus.rounds.engine import DISCARDED, Engine, Fate
from fedbus.rounds.restored import Restored, RestoredTask
from fedbus.server.after import AfterEvaluations
from fedbus.server.bases import Bases
from fedbus.server.checkpoint import RunFolder
from fedbus.server.guard import JOIN, MESSAGE, Drops, Guard
from fedbus.server.history import Evaluation, FoldedUpdate, History, RoundRecord, record_from_json
from fedbus.server.identity import Identity
from fedbus.server.intake import UpdateIntake
from fedbus.server.ledger import Fenced, LastCommit, Ledger
from fedbus.server.presence import Presence
from fedbus.server.publisher import ModelPublisher
from fedbus.server.slots import eager_share
from fedbus.server.staging import (
    MAX_EXAMPLES,
    MAX_METRICS_BYTES,
    StagedUpdate,
    check_finite,
    check_names,
    metrics_bytes,
)
from fedbus.server.status import as_json, describe
from fedbus.server.virtual import VirtualClients
from fedbus.strategies.base import ClientUpdate, RoundInfo, Strategy
from fedbus.strategies.metrics import weighted_mean
from fedbus.training.base import check_evaluate_result, check_metrics
from fedbus.training.thread import Caller, UserThread
from fedbus.types import EXTRA, Array, Config, EvaluateResult, Metrics, Tensors
from fedbus.wire import messages as m
from fedbus.wire.codec import MAX_CONTROL_BYTES, decode, encode

_LOGGER = logging.getLogger("fedbus.server")

_CONTROL_PREFETCH = 256
_SENDS_AT_ONCE = 64
_MOST_REPLIES = 4096
_MOST_MENTIONS = 100
"""How often a client that comes and goes is noted to be gone."""
_GOODBYE_S = 3600.0
_REDELIVERY_PAUSE_S = 0.2
"""The broker has given again what it had once nothing has come for so long."""
_REDELIVERY_MOST_S = 30.0
_RECONNECT_S = 10.0
"""The longest pause between two attempts to connect, of clients as of ourselves."""
_TIDY_EVERY_S = 2.0
"""Of real time, whatever clock the run has: it is about the disk's work."""
_HISTORY_SHARE = 0.05
"""Of the time: history.json is written as a whole, and a run of many short rounds would do little else."""
_ROUNDS_IN_MEMORY = 32
"""Where there is a run folder; all others are read from the ledger when they are needed."""
_SMALL_BYTES = 4 << 20
"""Models up to here are folded and checked on the event loop, in a few milliseconds."""
_FEW_TENSORS = 500
"""Unless they have more than this: each takes some ten microseconds, however small it is."""
_NOTES_EVERY_S = 0.2
_PROGRESS_EVERY_S = 0.5
_STATUS_S = 10.0
"""How long an answer to `fedbus status` is of use."""
_STATUS_SHARE = 0.05
"""Of the time: an answer serves all who ask until it has cost no more, however many ask and however many are in."""
_REPLY_TO = re.compile(r"reply\.[0-9a-f]{32}")
_ASYNCHRONOUS_VERSIONS = 32
"""What the stream keeps where a version may be made of each update: so many come while somebody fetches one."""


class _Events:
    """What waits for the engine. Our own tasks never wait to put something in: the engine may be waiting for them."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[e.Event, bool]] = asyncio.Queue()
        self._room_outside = asyncio.Semaphore(1024)

    def put(self, event: e.Event) -> None:
        self._queue.put_nowait((event, False))

    async def put_from_outside(self, event: e.Event) -> None:
        """Wait for room: a flood stays in the broker."""
        await self._room_outside.acquire()
        self._queue.put_nowait((event, True))

    async def get(self) -> e.Event:
        event, is_from_outside = await self._queue.get()
        if is_from_outside:
            self._room_outside.release()
        return event

    def empty(self) -> bool:
        return self._queue.empty()


@dataclass(frozen=True, kw_only=True)
class _FoldJob:
    command: c.Fold
    update: StagedUpdate


@dataclass(frozen=True, kw_only=True)
class _AdoptJob:
    update: StagedUpdate


_Job: TypeAlias = c.RoundOpened | _FoldJob | _AdoptJob | c.Commit


class Server:
    """One run of `app` over `bus`.

    Args:
        app: what to run.
        bus: an open connection; the caller closes it.
        run_dir: where the ledger, the checkpoints, history.json and model.safetensors go; None keeps nothing.
        resume: go on with the run in `run_dir` where its last server had to stop; begin one when there is none.
        observers: called with each event of `fedbus.observe.events`.
        look_every_s: seconds between two looks whether a client at work is still connected; one that is not for three
            times as long is lost. With a huge value its lease alone tells.
        stalled_after_s: seconds of silence after which an upload is asked for again, or given up if its sender is gone.
        run_id: the name of a new run; None makes one up.
        caller: runs the app's own code; None: a thread does.
        settings: what the history shows beside the app's own settings, or in their place.
        virtual_clients: how many clients the server enrols itself, for workers to play (see `fedbus.server.virtual`).
        keeps_clients: at the end of the run tell clients to wait for the next one, in place of sending them home.
        before_first_round: awaited once a new run has its model, while clients join; then the rounds begin.
    """

    def __init__(
        self,
        app: App,
        bus: Bus,
        *,
        run_dir: Path | None = None,
        resume: bool = False,
        observers: Sequence[o.Observe] = (),
        look_every_s: float = 1.0,
        stalled_after_s: float = 60.0,
        run_id: str | None = None,
        caller: Caller | None = None,
        settings: Mapping[str, Any] | None = None,
        virtual_clients: int = 0,
        keeps_clients: bool = False,
        before_first_round: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        if virtual_clients and app.strategy.needs_client_memory:
            raise ConfigError(
                f"{type(app.strategy).__name__} needs clients that remember: virtual ones on workers do not, so start "
                "clients of their own (fedbus client, fedbus run)"
            )
        for codec in (app.update_codec, app.model_codec):
            codec.check_installed()
        if virtual_clients and app.update_codec.needs_memory:
            raise ConfigError(
                f"compression={app.compression!r} needs clients that remember what they left out: virtual ones on "
                "workers do not, so start clients of their own (fedbus client, fedbus run), or take another codec"
            )
        self._app = app
        if virtual_clients and app.personal:
            raise ConfigError(
                f"personal={list(app.personal)} needs clients that remember: virtual ones on workers do not, so start "
                "clients of their own (fedbus client, fedbus run)"
            )
        self._bus = bus
        self._observers = tuple(observers)
        self._folder = None if run_dir is None else RunFolder(run_dir, resume=resume)
        self._strategy = copy.copy(app.strategy)  # what it remembers is this run's
        self._strategy.attach(
            memory={}, folder=None if self._folder is None else self._folder.path, tell=self._aggregation_progressed
        )
        self._progress_due_at = -math.inf
        self._bases = Bases(self._folder)
        self._after = AfterEvaluations(app, self._folder, stop=self._goal_reached, tell=self._tell)
        self._ledger = Ledger(None)
        self._run_id = run_id or uuid.uuid4().hex[:12]
        self._epoch = 1
        self._keeps_clients = keeps_clients
        self._before_first_round = before_first_round
        self._look_every_s = look_every_s
        self._stalled_after_s = stalled_after_s
        self._settings = _settings(app) | dict(settings or {})
        self._history = History(
            run_id=self._run_id,
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=self._settings,
        )
        self._last_commit: LastCommit | None = None
        self._tidied_at = self._history_due_at = -math.inf
        self._publisher = self._make_publisher()
        self._events = _Events()
        self._replies: asyncio.Queue[tuple[str, m.InboxMessage]] = asyncio.Queue(_MOST_REPLIES)  # to upload requests
        self._outbound: asyncio.Queue[tuple[str, m.InboxMessage, float | None]] = asyncio.Queue(1024)
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        # At most one evaluation waits: a slow evaluate_fn slows the rounds down instead of piling up models.
        self._central: asyncio.Queue[tuple[int, dict[str, Array]]] = asyncio.Queue(1)
        self._questions: asyncio.Queue[str] = asyncio.Queue(64)  # where their answers go
        self._last_status = -math.inf, b""  # until when it serves, and what it is
        self._made_at = now()
        self._sending: set[asyncio.Task[None]] = set()
        self._user_thread: Caller = caller or UserThread("fedbus-evaluate")
        self._ended = asyncio.Event()
        self._stopping = asyncio.Event()
        self._in_question = asyncio.Event()
        self._in_doubt = asyncio.Event()
        self._echo_due = asyncio.Event()
        self._members_changed = asyncio.Event()
        self._started_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._model: dict[str, Array] | None = None
        self._model_bytes = 0
        self._version = 0
        self._durable_version: int | None = None  # what the ledger names
        self._offsets: dict[int, int] = {}  # version -> offset of its head, for the last two versions
        self._fold_state: Any = None
        self._folded: list[tuple[str, FoldedUpdate]] = []  # with their task ids
        self._evaluate_reports: dict[str, m.EvaluateReport] = {}
        self._joined: set[str] = set()  # what the history lists: it may be very long
        self._refused: dict[str, str] = {}
        self._receipted: set[int] = set()  # updates whose receipt goes with their client's next task
        self._last_failure = ""
        self._head_out_at = 0.0
        self._closed_by: float | None = None  # when the last part of the update came that closed the round
        self._intake: UpdateIntake | None = None
        self._virtual = VirtualClients(
            bus,
            virtual_clients,
            message_queues=app.message_queues,
            put=self._events.put,
            tell=self._tell,
            doubt=self._in_doubt.set,
            every_s=app.rounds.lease_s / 4,
        )
        self._identity = Identity(bus.user, self._virtual)
        self._guard = Guard(bus, self._identity, self._tell)
        self._with_inbox: set[str] = set()  # those that we made
        self._engine: Engine | None = None
        self._presence: Presence | None = None

    def _make_publisher(self) -> ModelPublisher:
        versions = _ASYNCHRONOUS_VERSIONS if self._app.rounds.is_asynchronous else 4
        return ModelPublisher(
            self._bus,
            run_id=self._run_id,
            epoch=self._epoch,
            versions=versions,
            codec=self._app.model_codec,
            seed=self._app.seed,
        )

    @property
    def history(self) -> History:
        """What has happened so far."""
        return self._history

    @property
    def model(self) -> Mapping[str, Array] | None:
        """The current global model, read-only; None before there is one."""
        return self._model

    def figures(self) -> ServerFigures | None:
        """It as of now, in numbers; None before the run has begun. On its event loop only."""
        engine, intake = self._engine, self._intake
        if engine is None or intake is None:
            return None
        idle, busy, overdue = engine.counts(now())
        number, opened_at = engine.open_round or (0, now())
        return ServerFigures(
            version=self._version,
            open_round=number,
            open_s=max(0.0, now() - opened_at),
            idle=idle,
            busy=busy,
            overdue=overdue,
            uploads_granted=intake.slots.granted,
            uploads_waiting=intake.slots.waiting,
            staged_bytes=intake.staged_bytes,
            received_bytes=intake.received_bytes,
        )

    def request_stop(self, reason: str) -> None:
        """End the run early: a commit that is under way is finished, an open round is given up."""
        self._stopping.set()
        self._events.put(e.StopRequested(reason=reason))

    def _goal_reached(self, reason: str) -> None:
        self._events.put(e.GoalReached(reason=reason))

    def client_lost(self, client_id: str, reason: str) -> None:
        """Say that this client is gone without a word: a simulation knows, and has no heartbeats to tell it by."""
        self._events.put(e.ClientLost(client_id=client_id, reason=reason))

    def _inbox_gone(self, client_id: str) -> None:
        """In a provisioned federation no client can delete one: that is how its operator says who was turned out."""
        self._with_inbox.discard(client_id)
        if self._identity.is_provisioned:
            self._events.put(e.ClientExpelled(client_id=client_id, reason="its rights were revoked"))
        else:
            self._events.put(e.ClientLost(client_id=client_id, reason="its inbox is gone"))

    def connection_lost(self) -> None:
        """Say that the connection is gone: a server that was held up for long may have been replaced meanwhile."""
        self._in_question.set()

    def connection_restored(self) -> None:
        """Say, after a loss of the connection, that there is one again: what was under way may come again, or never."""
        if self._presence is not None:
            self._presence.disturbed()
        if self._intake is not None:
            self._intake.disturbed()
            self._events.put(e.Reconnected(grace_s=_RECONNECT_S))
            self._in_question.set()  # the broker may have been away for us alone, and another server gone on
            self._in_doubt.set()

    async def run(self) -> History:
        """Run to the end.

        Raises `RunFailed` when the run was stopped or no update was ever accepted, `BrokerError` when the
        broker goes away, and whatever the strategy raises.
        """
        try:
            await self._run()
        except ExceptionGroup as group:
            exc = leaf(group)
            if not isinstance(exc, Fenced | QueueBusy):  # then the run is another server's now
                reason = one_line(str(exc))
                with contextlib.suppress(RunFailed):  # the disk may be what failed
                    await self._note_end(finished=False, reason=reason)
                await self._send_home(reason)
            raise exc from exc.__cause__ or group
        finally:
            self._guard.tell_rest()
            self._user_thread.close()
            self._complete_history()
            self._ledger.close()
            if self._folder is not None:
                self._folder.close()
        if not self._history.finished:
            rounds = self._history.num_rounds
            raise RunFailed(f"the run ended after {rounds} round{'s' * (rounds != 1)}: {self._history.reason}")
        if self._history.updates == 0 and self._history.num_rounds > 0:
            raise RunFailed(f"no update was accepted in any round; {self._why_empty()}")
        return self._history

    def _complete_history(self) -> None:
        """Nobody else may need it: while the run goes on the rounds lie on the disk, however many there are."""
        rounds = self._history.rounds
        if self._keeps_rounds_on_disk and rounds and rounds[0].round > 1:
            texts = self._ledger.record_texts(through=rounds[0].round - 1)
            try:
                rounds[:0] = [record_from_json(json.loads(text)) for text in texts]
            except sqlite3.Error as exc:
                _LOGGER.warning("the history that is returned lacks its first rounds: the ledger gives %s", exc)

    @property
    def _keeps_rounds_on_disk(self) -> bool:
        return self._folder is not None

    def _record_of(self, round: int) -> RoundRecord | None:
        """The record of a closed round, wherever it is."""
        return self._history.record(round) or self._ledger.record(round)

    def _why_empty(self) -> str:
        if self._last_failure:
            return f"the last failure: {self._last_failure}"
        if all(record.reason == c.CloseReason.TIMEOUT.value for record in self._history.rounds):
            timeout_s = self._app.rounds.timeout_s
            return f"each closed at timeout_s={timeout_s:g} before one came: raise it, if training takes longer"
        return "none came"

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._folder is not None:
            self._folder.hold()
        async with contextlib.AsyncExitStack() as stack:
            await self._be_alone(stack)
            await self._declare()
            control = await stack.enter_async_context(self._bus.consume(CONTROL, prefetch=_CONTROL_PREFETCH))
            # No bound: the parts of all updates that a round needs stay unacknowledged until its commit.
            updates = await stack.enter_async_context(self._bus.consume(UPDATES, prefetch=0))
            await self._open_run()  # only now: nobody else serves it
            if self._history.finished:
                return
            engine = self._engine = self._make_engine(has_model=self._model is not None)
            self._intake = UpdateIntake(
                updates,
                engine,
                self._identity,
                self._guard,
                run_id=self._run_id,
                put=self._events.put,
                verify=self._verify,
                grant=self._grant,
                stalled_after_s=self._stalled_after_s,
            )
            self._presence = Presence(
                self._bus,
                engine,
                put=self._events.put,
                inbox_gone=self._inbox_gone,
                ask_for_echo=self._echo_due.set,
                every_s=self._look_every_s,
                grace_s=2 * _RECONNECT_S,  # a broker that starts may turn the first attempt down
                without_inbox=self._virtual,
            )
            await self._work(engine, self._intake, self._presence, control)

    async def _declare(self) -> None:
        update_queue, message_queues = self._app.update_queue, self._app.message_queues
        await self._guard.begin()
        try:
            await self._bus.declare(ingress(update_queue, message_queues))
            await self._virtual.declare()
        except QueueMismatch as exc:
            if "exchange" in str(exc):
                raise
            raise QueueMismatch(
                f"{exc} (the app says update_queue={update_queue!r}, the kind of {UPDATES}, and message_queues="
                f"{message_queues!r}, that of the others: set them to what is there, or delete the queue)"
            ) from exc

    async def _be_alone(self, stack: contextlib.AsyncExitStack) -> None:
        """Two servers on one queue would each see half of what the clients say."""
        try:
            await hold_patiently(self._bus, stack, SERVER_LOCK)
        except QueueBusy:
            raise QueueBusy(
                "another server runs on this broker: stop it first, or give each run a vhost of its own"
            ) from None

    # ---- the run, from its begin or its last commit --------------------------------------------------------------

    async def _open_run(self) -> None:
        """Begin the run, or take it over, with the model to go on with, unless a client is to give it."""
        self._ledger = Ledger(None if self._folder is None else self._folder.ledger)
        if self._ledger.holds_a_run:
            last = self._last_commit = self._ledger.take_over(
                max_staleness=self._app.rounds.max_staleness, recent_rounds=_ROUNDS_IN_MEMORY
            )
            self._history = last.history
            self._run_id, self._epoch = last.history.run_id, last.epoch
            self._started_at = now() - last.seconds
            # Who had joined just before the end may be missing from the notes, and must be sent home like the others.
            tasked = [task.client_id for task in last.tasks]
            self._history.clients_joined = list(dict.fromkeys([*self._history.clients_joined, *last.members, *tasked]))
            self._joined.update(self._history.clients_joined)
        else:
            self._ledger.begin(self._history)
            self._started_at = now()
        self._publisher = self._make_publisher()
        if self._history.finished:
            assert self._folder is not None
            await asyncio.to_thread(self._save_history, self._folder, self._history)
            return
        self._history.settings, self._history.reason = self._settings, ""
        self._after.begin(self._run_id, self._history, self._all_records())
        self._tell_start()
        if self._last_commit is None or self._last_commit.version is None:
            self._model = await self._initial_model()
            return
        assert self._folder is not None
        self._version = self._durable_version = self._last_commit.version
        self._model = _frozen(self._folder.load_checkpoint(self._version, run_id=self._run_id))
        self._strategy.attach(memory=self._remembered(self._folder))

    def _all_records(self) -> Iterator[RoundRecord]:
        if self._history.num_rounds:
            for text in self._ledger.record_texts(through=self._history.num_rounds):
                yield record_from_json(json.loads(text))

    def _remembered(self, folder: RunFolder) -> dict[str, Array]:
        name = type(self._strategy).__name__
        return folder.load_memory(self._version, run_id=self._run_id, strategy=name)

    def _tell_start(self) -> None:
        rounds = self._app.rounds
        self._tell(
            o.RunStarted(
                run_id=self._run_id,
                num_rounds=rounds.num_rounds,
                min_fit_clients=rounds.min_fit_clients,
                start_clients=rounds.start_clients,
                is_asynchronous=rounds.is_asynchronous,
            )
        )
        if self._virtual:
            self._tell(o.VirtualClientsEnrolled(clients=len(self._virtual)))
        if self._last_commit is not None:
            done = self._history.num_rounds
            self._tell(o.RunResumed(run_id=self._run_id, epoch=self._epoch, rounds=done, seconds=self._seconds()))

    def _make_engine(self, *, has_model: bool) -> Engine:
        last, restored = self._last_commit, None
        if last is not None:
            restored = Restored(
                rounds=self._history.num_rounds,
                version=last.version or 0,
                clients=last.members,
                tasks=tuple(task for task in last.tasks if self._may_fold(task)),
                evaluation_due=self._evaluation_is_due(),
            )
        return Engine(
            self._app.rounds,
            seed=self._app.seed,
            run_id=self._run_id,
            has_model=has_model,
            restored=restored,
            now=now(),
            records=self._history.clients,
        )

    def _may_fold(self, task: RestoredTask) -> bool:
        """An update without its base could not be folded: its task must not be waited for."""
        needs_base = self._strategy.needs_base and task.state == "working"
        return not needs_base or self._bases.get(task.version, run_id=self._run_id) is not None

    def _evaluation_is_due(self) -> bool:
        records = self._history.rounds
        if not records or records[-1].federated is not None:
            return False
        return records[-1].version > (records[-2].version if len(records) > 1 else 0)

    async def _work(self, engine: Engine, intake: UpdateIntake, presence: Presence, control: Consumer) -> None:
        async with asyncio.TaskGroup() as group:
            work: list[Coroutine[Any, Any, None]] = [
                self._bus.closed(),
                self._receive_control(control),
                intake.receive(),
                self._send(group),
                self._send_replies(),
                self._aggregate(),
                self._evaluate(),
                self._after.work(),
                self._drive(engine),
                self._listen_to_ourselves(),
                self._look_for_successor(),
                self._answer_questions(engine),
                self._clear_doubts(intake),
                self._keep_notes(),
                intake.look_after_stalled(),
                presence.watch(),
                self._virtual.stay_present(),
                self._virtual.watch_workers(),
                self._guard.keep_doors(),
            ]
            if self._last_commit is None:
                await self._virtual.take_back()  # what a run left behind that nobody goes on with
            tasks = [group.create_task(coroutine) for coroutine in work]
            if self._last_commit is not None:
                presence.disturbed()  # whatever ended our predecessor may have cut the clients off, too
            if self._last_commit is not None and self._last_commit.version is not None:
                await self._go_on(intake)
            elif self._model is not None:
                await self._begin_with(self._model)
            await self._ended.wait()
            for task in (*tasks, *self._sending):
                task.cancel()

    async def _initial_model(self) -> dict[str, Array] | None:
        """A copy: the app's own arrays may change."""
        try:
            model = await self._user_thread.call("initial_parameters", self._app.initial_model)
        except Exception as exc:  # the user's own code
            raise ConfigError(f"initial_parameters raised {_describe(exc)}") from exc
        if model is None:
            return None
        try:
            check_names(model)
        except UpdateRefused as exc:
            raise ConfigError(str(exc)) from None
        return _frozen({name: value.copy() for name, value in model.items()})

    def _tell(self, event: object) -> None:
        for observe in self._observers:
            observe(event)

    def _seconds(self) -> float:
        return now() - self._started_at

    # ---- in: control messages ------------------------------------------------------------------------------------

    async def _receive_control(self, consumer: Consumer) -> None:
        dropped = Drops(consumer)
        async for delivery in consumer:
            if self._guard.is_shut_out(CONTROL, delivery):
                await dropped.add(delivery)
                continue
            await dropped.settle_if_cheap()
            self._guard.watch()
            try:
                message = decode(delivery.body, most_bytes=MAX_CONTROL_BYTES)
                self._check_sender(delivery, message)
                self._guard.spend(delivery, self._cost_of(message))
                if isinstance(message, m.Join) and self._identity.has_own_user(delivery):
                    await self._make_inbox(message.client_id)
                event = self._control_event(message)
            except (DecodeError, ConfigError) as exc:
                self._guard.rejected(CONTROL, delivery, str(exc))
                event = None
            if event is not None:
                await self._events.put_from_outside(event)
            # Signs of life and small results are told again or time out: nothing depends on this one copy.
            await consumer.ack(delivery)

    def _cost_of(self, message: m.Message) -> int:
        """What a control message costs its sender."""
        if isinstance(message, m.Heartbeat) and self._engine is not None and message.run_id == self._run_id:
            is_usual = self._engine.session_of(message.client_id) == message.session
            return MESSAGE if is_usual else JOIN
        return JOIN if isinstance(message, m.Join | m.Heartbeat | m.Leave) else MESSAGE

    async def _make_inbox(self, client_id: str) -> None:
        """Whoever has a user of its own may not be allowed to make it itself."""
        if client_id in self._with_inbox:
            return
        try:
            await self._bus.declare(client_inbox(client_id, self._app.message_queues), remember=False)
        except (QueueMismatch, PublishUnconfirmed, BrokerDenied) as exc:
            _LOGGER.warning("the inbox of %s cannot be made: %s", client_id, exc)
        else:
            self._with_inbox.add(client_id)

    def _check_sender(self, delivery: Delivery, message: m.Message) -> None:
        if isinstance(message, m.Echo | m.StatusRequest):
            self._identity.check_ours(delivery)
        elif isinstance(message, m.ClientMessage):
            self._identity.check(delivery, message.client_id)
            if isinstance(message, m.Join | m.Heartbeat | m.Leave) and message.client_id in self._virtual:
                raise DecodeError(f"{message.client_id} is a virtual client, for workers: a client needs another id")

    def _control_event(self, message: m.Message) -> e.Event | None:
        match message:
            case m.Join():
                if self._intake is not None:  # a new process: the upload of the old one will not go on
                    self._intake.slots.release_client(message.client_id)
                return e.ClientJoined(client_id=message.client_id, session=message.session)
            case m.Heartbeat():
                client_id = message.client_id
                if message.run_id != self._run_id:  # it outlived another server: welcome it to this run
                    return e.ClientJoined(client_id=client_id, session=message.session)
                return e.ClientHeard(client_id=client_id, session=message.session, fit_task=message.fit_task)
            case m.Leave():
                return e.ClientLeft(
                    client_id=message.client_id, session=message.session, reason=one_line(message.reason, 200)
                )
            case m.TaskFailed():
                return e.TaskFailed(
                    client_id=message.client_id, task_id=message.task_id, reason=one_line(message.reason)
                )
            case m.EvaluateReport():
                return self._evaluate_event(message)
            case m.UploadRequest():
                self._upload_requested(message)
                return None
            case m.StatusRequest():
                self._status_requested(message)
                return None
            case m.Echo():
                is_ours = (message.run_id, message.epoch) == (self._run_id, self._epoch)
                return e.EchoHeard(sent_at=min(message.sent_at, now())) if is_ours else None
            case _:
                raise DecodeError(f"a {type(message).__name__} does not belong here")

    def _upload_requested(self, request: m.UploadRequest) -> None:
        """Queue it up; or say what has become of an update that was announced again because our word was lost."""
        client_id = request.client_id
        assert self._engine is not None
        assert self._intake is not None
        fate = self._engine.fate(request.task_id, client_id)
        if fate is Fate.AWAITED:
            self._intake.request_upload(client_id, request.task_id, request.nbytes)
        elif fate in (Fate.COMMITTED, Fate.UNWANTED):
            self._reply(client_id, self._verdict(request.task_id, client_id))

    def _status_requested(self, request: m.StatusRequest) -> None:
        """Answer in turn; of too many questions at once some are dropped, and asked again."""
        if not _REPLY_TO.fullmatch(request.reply_to):
            raise DecodeError("a status goes to a queue of replies, and to nobody else")
        with contextlib.suppress(asyncio.QueueFull):
            self._questions.put_nowait(request.reply_to)

    async def _answer_questions(self, engine: Engine) -> None:
        while True:
            reply_to = await self._questions.get()
            body = await self._status(engine)
            with contextlib.suppress(Unroutable, PublishUnconfirmed):  # whoever asked is gone, or asks again
                await self._bus.publish(TASKS, reply_to, body, expires_s=_STATUS_S, timeout_s=_STATUS_S)

    async def _status(self, engine: Engine) -> bytes:
        """A `Status` as of a moment ago."""
        serves_until, body = self._last_status
        if (began_at := now()) < serves_until:
            return body
        figures = self.figures()
        assert figures is not None, "who answers has an engine"
        status = describe(
            run_id=self._run_id,
            epoch=self._epoch,
            rounds=self._app.rounds,
            snapshot=engine.snapshot(now()),
            figures=figures,
            records=engine.records,
            joined=self._history.clients_joined,
            uptime_s=round(now() - self._made_at, 3),
        )
        payload = await asyncio.to_thread(as_json, status)
        body = encode(m.Status(run_id=self._run_id, payload=payload))
        self._last_status = now() + (now() - began_at) / _STATUS_SHARE, body
        return body

    def _grant(self, client_id: str, task_id: str) -> None:
        grant = m.UploadGrant(task_id=task_id, run_id=self._run_id, epoch=self._epoch)
        self._reply(client_id, grant)

    def _reply(self, client_id: str, reply: m.InboxMessage) -> None:
        """What finds no room is asked for again."""
        with contextlib.suppress(asyncio.QueueFull):
            self._replies.put_nowait((client_id, reply))

    def _verdict(self, task_id: str, client_id: str) -> m.Receipt | m.Refusal:
        """Of an update that is not waited for."""
        committed = self._ledger.receipt_of(task_id, client_id)
        if committed is None:
            return m.Refusal(task_id=task_id, run_id=self._run_id, reason="nobody waits for it")
        round_, staleness = committed
        return m.Receipt(task_id=task_id, run_id=self._run_id, round=round_, staleness=staleness)

    async def _listen_to_ourselves(self) -> None:
        """Prove, now and then and when it is asked for, that what clients say is heard.

        Silence while it is not proves nothing.
        """
        lease_s = self._app.rounds.lease_s
        self._events.put(e.EchoHeard(sent_at=now()))
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.05, lease_s / 8)):
                    await self._echo_due.wait()
            self._echo_due.clear()
            echo = m.Echo(run_id=self._run_id, epoch=self._epoch, sent_at=now())
            with contextlib.suppress(PublishUnconfirmed):
                await self._bus.publish(CONTROL, "server", encode(echo), expires_s=lease_s)

    async def _look_for_successor(self) -> None:
        """End at once where the ledger tells of a successor: asking the broker for our place back would take long."""
        while True:
            await self._in_question.wait()
            self._in_question.clear()
            self._ledger.check_not_fenced()

    async def _clear_doubts(self, intake: UpdateIntake) -> None:
        """After a loss of the connection: once all that the broker still had is here, ask for what is missing."""
        while True:
            await self._in_doubt.wait()
            self._in_doubt.clear()
            await intake.quiet(_REDELIVERY_PAUSE_S, _REDELIVERY_MOST_S)
            await self._virtual.take_back()
            self._events.put(e.TasksInDoubt())

    def _evaluate_event(self, report: m.EvaluateReport) -> e.Event:
        if metrics_bytes(report.metrics) > MAX_METRICS_BYTES:
            reason = f"metrics of {metrics_bytes(report.metrics)} bytes, {MAX_METRICS_BYTES} at most"
            return e.TaskFailed(client_id=report.client_id, task_id=report.task_id, reason=reason)
        if not 1 <= report.num_examples <= MAX_EXAMPLES or not math.isfinite(report.loss):
            reason = f"loss {report.loss} over {report.num_examples} examples cannot be averaged"
            return e.TaskFailed(client_id=report.client_id, task_id=report.task_id, reason=reason)
        if self._engine is not None and self._engine.awaits_report(report.task_id, report.client_id):
            self._evaluate_reports[report.task_id] = report
        return e.EvaluateReported(client_id=report.client_id, task_id=report.task_id)

    # ---- the engine ----------------------------------------------------------------------------------------------

    async def _drive(self, engine: Engine) -> None:
        while True:
            commands: list[c.Command] = []
            event = await self._next_event(engine.next_deadline())
            if event is not None:
                commands += engine.handle(event, now())
            # Only when nothing waits: a client must not be taken for silent while its heartbeat is in the queue.
            deadline = engine.next_deadline()
            if deadline is not None and deadline <= now() and self._events.empty():
                commands += engine.advance(now())
            await self._carry_out_all(commands)

    async def _carry_out_all(self, commands: list[c.Command]) -> None:
        """What the clients wait for goes first; acknowledgements and receipts can wait for it, and the end for all.

        Refusals cannot: the next task of their client must not find what it remembers of a fit that does not count.
        """
        tasks = [command for command in commands if isinstance(command, c.SendFitTask)]
        if tasks:  # before it is sent: its update must be known for what it is, whoever serves the run then
            self._ledger.note_tasks((task.task_id, task.client_id, task.round, task.version) for task in tasks)
        committed = [command for command in commands if isinstance(command, c.Settle) and _is_committed(command)]
        with_task = {command.client_id: command for command in committed} if tasks else {}
        later: list[c.Command] = []
        for command in commands:
            if isinstance(command, c.SendFitTask):
                await self._send_fit_task(command, with_task.pop(command.client_id, None))
            elif isinstance(command, c.EndRun) or (isinstance(command, c.Settle) and not _is_refused(command)):
                later.append(command)
            else:
                await self._carry_out(command)
        if committed:
            await self._settle_committed(committed)
        for command in later:
            if not (isinstance(command, c.Settle) and _is_committed(command)):
                await self._carry_out(command)

    async def _next_event(self, deadline: float | None) -> e.Event | None:
        timeout_s = None if deadline is None else max(0.0, deadline - now())
        try:
            async with asyncio.timeout(timeout_s):
                return await self._events.get()
        except TimeoutError:
            return None

    async def _carry_out(self, command: c.Command) -> None:
        match command:
            case c.WelcomeClient():
                rounds = self._app.rounds
                welcome = m.Welcome(
                    run_id=self._run_id,
                    session=command.session,
                    epoch=self._epoch,
                    heartbeat_s=rounds.heartbeat_s,
                    lease_s=rounds.lease_s,
                    codec=self._app.update_codec.text,
                    model_codec=self._app.model_codec.text,
                )
                await self._outbound.put((command.client_id, welcome, rounds.lease_s))
            case c.RequestParameters():
                task = m.ParametersTask(task_id=command.task_id, run_id=self._run_id, epoch=self._epoch)
                await self._outbound.put((command.client_id, task, self._app.rounds.timeout_s))
            case c.SendFitTask():
                await self._send_fit_task(command, None)
            case c.SendEvaluateTask():
                self._after.expect("federated", command.version)
                await self._outbound.put((command.client_id, self._evaluate_task(command), command.timeout_s))
            case c.Fold():
                self._jobs.put_nowait(_FoldJob(command=command, update=self._staged(command.delivery)))
            case c.AdoptParameters():
                self._jobs.put_nowait(_AdoptJob(update=self._staged(command.delivery)))
            case c.CancelTask() if command.client_id in self._virtual:
                # No worker could be told; it sees for itself what is too late. The client is free.
                self._events.put(
                    e.TaskFailed(client_id=command.client_id, task_id=command.task_id, reason=command.reason)
                )
            case c.CancelTask():
                cancel = m.CancelTask(task_id=command.task_id, run_id=self._run_id, reason=command.reason)
                await self._outbound.put((command.client_id, cancel, self._app.rounds.timeout_s))
            case c.GiveUpUploads():
                assert self._intake is not None
                self._intake.give_up_client(command.client_id, command.reason)
            case c.Commit():
                self._closed_by = self._staged(command.folded[-1].delivery).arrived_at if command.folded else None
                self._jobs.put_nowait(command)
            case c.Settle():
                await self._settle(command)
            case c.CloseEvaluation():
                await self._close_evaluation(command)
            case c.EndRun():
                await self._end(command)
            case _:
                self._note(command)

    async def _send_fit_task(self, command: c.SendFitTask, receipt: c.Settle | None) -> None:
        await self._outbound.put((command.client_id, self._fit_task(command, receipt), command.timeout_s))
        if receipt is not None:
            self._receipted.add(receipt.delivery)

    def _fit_task(self, command: c.SendFitTask, receipt: c.Settle | None) -> m.FitTask:
        return m.FitTask(
            task_id=command.task_id,
            run_id=self._run_id,
            epoch=self._epoch,
            round=command.round,
            version=command.version,
            offset=self._offsets[command.version],
            timeout_s=command.timeout_s,
            eager_bytes=eager_share(self._num_real_clients()),
            config=self._app.fit_config_of(command.round, command.repeat, of_strategy=self._config_of(command.round)),
            receipt_task_id=receipt.task_id if receipt else "",
            receipt_round=receipt.round if receipt else 0,
            receipt_staleness=receipt.staleness if receipt else 0,
            codec=self._app.update_codec.text,
            purpose=self._strategy.asks,
        )

    def _config_of(self, round: int) -> Config:
        config: Config = _call_strategy(self._strategy.fit_config, round)
        return config

    def _num_real_clients(self) -> int:
        return self._engine.num_members - len(self._virtual) if self._engine else 1

    def _evaluate_task(self, command: c.SendEvaluateTask) -> m.EvaluateTask:
        return m.EvaluateTask(
            task_id=command.task_id,
            run_id=self._run_id,
            epoch=self._epoch,
            round=command.round,
            version=command.version,
            offset=self._offsets[command.version],
            config=self._app.evaluate_config_of(command.round),
        )

    def _staged(self, token: int) -> StagedUpdate:
        assert self._intake is not None
        return self._intake.get(token)

    def _note(self, notice: c.Notice) -> None:
        match notice:
            case c.MemberJoined():
                if notice.client_id not in self._joined:
                    self._joined.add(notice.client_id)
                    self._history.clients_joined.append(notice.client_id)
                self._members_changed.set()
            case c.MemberLost():
                gone = self._history.clients_left if notice.left else self._history.clients_lost
                if gone.count(notice.client_id) < _MOST_MENTIONS:
                    gone.append(notice.client_id)
                self._members_changed.set()
                if self._intake is not None:
                    self._intake.slots.release_client(notice.client_id)
            case c.RoundOpened():
                self._jobs.put_nowait(notice)
            case c.FitFailed():
                self._last_failure = f"{notice.client_id}: {notice.reason}"
                self._ledger.note_failed(notice.task_id, notice.client_id, notice.reason)
                if self._intake is not None:
                    self._intake.slots.release(notice.task_id)
            case c.FitCancelled():
                self._ledger.note_failed(notice.task_id, notice.client_id, notice.reason)
                self._refused[notice.client_id] = notice.reason
                if self._intake is not None:
                    self._intake.slots.release(notice.task_id)
            case c.EvaluateFailed():
                record = self._record_of(notice.round)
                if record is not None:
                    record.evaluate_failed[notice.client_id] = notice.reason
                    self._ledger.note_record(record)
            case _:
                pass
        self._tell(notice)

    async def _keep_notes(self) -> None:
        """Note who is in, soon after it changed: a flood of joins must not become a flood of transactions."""
        while True:
            await self._members_changed.wait()
            self._members_changed.clear()
            self._note_head()
            await asyncio.sleep(_NOTES_EVERY_S)

    def _note_head(self) -> None:
        assert self._engine is not None
        self._ledger.note_members(self._engine.members, self._history)

    # ---- settling ------------------------------------------------------------------------------------------------

    async def _settle(self, command: c.Settle) -> None:
        """Acknowledge only now: the effect is durable, or there will be none."""
        assert self._intake is not None
        # What means nothing to us may be an update that a successor waits for, and is lost once we acknowledge it: a
        # server that was held up does not know yet that it has lost its connection, and its place.
        self._ledger.check_not_fenced()
        await self._intake.settle(command.delivery, keep_in_broker=command.outcome is Outcome.RELEASED)
        if command.outcome is Outcome.DUPLICATE:
            self._tell(o.UpdateRepeated(client_id=command.client_id, task_id=command.task_id))
        if command.outcome is Outcome.DUPLICATE and command.round:
            await self._send_receipt(command)  # the first one may be lost
        elif command.outcome is Outcome.REFUSED:
            committed = self._ledger.receipt_of(command.task_id, command.client_id)
            if committed is not None:  # so long ago that the engine has forgotten it
                round_, staleness = committed
                await self._send_receipt(dataclasses.replace(command, round=round_, staleness=staleness))
                return
            self._ledger.note_failed(command.task_id, command.client_id, command.reason)
            self._refused[command.client_id] = command.reason
            if command.reason != DISCARDED:  # then more is known of why
                self._last_failure = f"{command.client_id}: {command.reason}"
            self._tell(o.UpdateRefused(client_id=command.client_id, task_id=command.task_id, reason=command.reason))
            refusal = m.Refusal(task_id=command.task_id, run_id=self._run_id, reason=command.reason)
            await self._outbound.put((command.client_id, refusal, self._app.rounds.timeout_s))

    async def _settle_committed(self, commands: list[c.Settle]) -> None:
        assert self._intake is not None
        await self._intake.settle_all([command.delivery for command in commands])
        for command in commands:
            if command.delivery not in self._receipted:
                await self._send_receipt(command)
        self._receipted.clear()

    async def _send_receipt(self, command: c.Settle) -> None:
        receipt = m.Receipt(
            task_id=command.task_id, run_id=self._run_id, round=command.round, staleness=command.staleness
        )
        await self._outbound.put((command.client_id, receipt, self._app.rounds.timeout_s))

    # ---- out: the sender -----------------------------------------------------------------------------------------

    async def _send(self, group: asyncio.TaskGroup) -> None:
        """Publish what is due without waiting for each confirm; started in order, so sent in order."""
        slots = asyncio.Semaphore(_SENDS_AT_ONCE)
        while True:
            client_id, message, expires_s = await self._outbound.get()
            if client_id in self._virtual and not isinstance(message, m.Task):
                self._outbound.task_done()  # of no use to any worker
                continue
            await slots.acquire()
            task = group.create_task(self._send_one(client_id, message, expires_s))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
            task.add_done_callback(lambda _: slots.release())

    async def _send_replies(self) -> None:
        while True:
            client_id, reply = await self._replies.get()
            await self._outbound.put((client_id, reply, self._app.rounds.lease_s))

    async def _send_one(self, client_id: str, message: m.InboxMessage, expires_s: float | None) -> None:
        try:
            if client_id in self._virtual and isinstance(message, m.Task):
                await self._virtual.send(client_id, message, expires_s)
            else:
                await self._bus.publish(TASKS, client_id, encode(message), expires_s=expires_s)
        except PublishUnconfirmed as exc:
            _LOGGER.debug("a message to %s was not confirmed", client_id, exc_info=exc)
        except Unroutable:
            self._with_inbox.discard(client_id)
            if isinstance(message, m.ParametersTask | m.FitTask | m.EvaluateTask):
                await self._look_for_inbox(client_id)
        finally:
            self._outbound.task_done()

    async def _look_for_inbox(self, client_id: str) -> None:
        """Nothing leads to it: it is gone, or on a node of the broker that is away. Then nobody was turned out."""
        with contextlib.suppress(BrokerUnreachable):
            try:
                await self._bus.queue_state(inbox(client_id))
            except QueueMissing:
                self._inbox_gone(client_id)
                return
        self._events.put(e.ClientLost(client_id=client_id, reason="its inbox is out of reach"))

    @property
    def _is_small(self) -> bool:
        """Whether the model is nothing for a thread."""
        return self._model_bytes <= _SMALL_BYTES and len(self._model or ()) <= _FEW_TENSORS

    async def _aside(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call into the strategy, in a thread where it may take long: a thread costs more than a small model's sums."""
        if self._strategy.is_quick and self._is_small:
            return _call_strategy(function, *args)
        return await asyncio.to_thread(_call_strategy, function, *args)

    def _overrides(self, method: str) -> bool:
        """Whether the strategy does more there than nothing."""
        return getattr(type(self._strategy), method) is not getattr(Strategy, method)

    def _aggregation_progressed(self, done: int, total: int) -> None:
        """From any thread, as often as it likes."""
        if time.monotonic() >= self._progress_due_at and self._loop is not None:
            self._progress_due_at = time.monotonic() + _PROGRESS_EVERY_S
            event = o.AggregationProgressed(round=self._strategy.round.number, share=done / max(1, total))
            self._loop.call_soon_threadsafe(self._tell, event)

    # ---- the aggregator ------------------------------------------------------------------------------------------

    async def _aggregate(self) -> None:
        while True:
            job = await self._jobs.get()
            match job:
                case c.RoundOpened():
                    await self._begin_round(job.round)
                case _FoldJob():
                    await self._fold(job)
                case _AdoptJob():
                    await self._adopt(job.update)
                case c.Commit():
                    await self._commit(job)
            self._jobs.task_done()

    async def _begin_round(self, number: int) -> None:
        """Make the sums ready while the clients are at work; those of a round that had no update serve again."""
        assert self._model is not None
        assert self._engine is not None
        self._strategy.attach(
            round=RoundInfo(number=number, version=self._version, num_clients=max(1, self._engine.num_members))
        )
        if self._fold_state is None:
            self._fold_state = await self._aside(self._strategy.init, self._model)
            self._release_pages()

    async def _verify(self, staged: StagedUpdate) -> None:
        """Raise `UpdateRefused` for what the strategy cannot use."""
        if self._overrides("verify"):
            await self._aside(self._strategy.verify, _client_update(staged))

    async def _fold(self, job: _FoldJob) -> None:
        staged, command = job.update, job.command
        update = dataclasses.replace(
            _client_update(staged),
            staleness=command.staleness,
            discount=command.discount,
            base=self._base(command),
        )
        try:
            await self._aside(self._strategy.fold, self._fold_state, update)
        except (AggregateRefused, UpdateRefused) as exc:
            name = type(self._strategy).__name__
            raise RunFailed(f"{name}.fold raised {_describe(exc)}: refuse updates in verify") from exc
        staged.drop()
        assert self._intake is not None
        self._intake.slots.pump()
        folded = FoldedUpdate(
            client_id=staged.client_id,
            staleness=command.staleness,
            num_examples=staged.num_examples,
            metrics=dict(staged.metrics),
            seconds=None if command.seconds is None else round(command.seconds, 6),
            nbytes=staged.nbytes,
            raw_bytes=staged.raw_bytes,
        )
        self._folded.append((staged.task_id, folded))
        self._tell(
            o.UpdateFolded(
                client_id=staged.client_id,
                round=command.round,
                staleness=command.staleness,
                num_examples=staged.num_examples,
                nbytes=staged.nbytes,
                raw_bytes=staged.raw_bytes,
            )
        )

    def _base(self, command: c.Fold) -> Tensors | None:
        if not self._strategy.needs_base:
            return None
        if command.staleness == 0:
            return self._model
        base = self._bases.get(command.version, run_id=self._run_id)
        if base is None:
            raise RunFailed(f"the checkpoint of version {command.version} is gone, and the strategy needs it")
        return base

    def _keep_base(self) -> None:
        """The current version is one that updates will be based on."""
        if self._strategy.needs_base and self._model is not None:
            self._bases.add(self._version, self._model, in_use=self._bases_in_use())

    async def _adopt(self, update: StagedUpdate) -> None:
        """Begin with the model that a client gave."""
        assert update.tensors is not None
        self._model = _frozen({name: value.copy() for name, value in update.tensors.items()})
        update.drop()
        await self._begin_with(self._model)

    async def _begin_with(self, model: Tensors) -> None:
        """Publish version 0."""
        assert self._intake is not None
        self._app.check_personal(model)
        self._model_bytes = sum(value.nbytes for value in model.values())
        self._expect(model)
        self._keep_base()
        del model
        publishing = await self._publish(self._make_initial_durable())
        if self._before_first_round is not None:
            await self._before_first_round()
        self._events.put(e.ModelReady())
        await publishing
        self._let_go_of_memory()
        await self._evaluate_centrally(0)

    def _expect(self, model: Tensors) -> None:
        """From now on updates are deltas of `model`."""
        assert self._intake is not None
        # Where sizes change there is nothing to subtract from: what clients have to say comes beside the delta.
        # And what each client keeps to itself stays as it began, for those who come later, whoever sends it.
        shared = {name: value for name, value in model.items() if not self._app.is_personal(name)}
        deltas = {} if self._strategy.may_resize else shared
        self._intake.expect(deltas, _call_strategy(self._strategy.extras, model), self._app.update_codec)

    async def _make_initial_durable(self) -> None:
        await asyncio.to_thread(self._persist_model, lambda: self._ledger.commit_model(self._version))
        await self._tidy()

    def _persist_model(self, commit: Callable[[], None]) -> None:
        """Checkpoint, then ledger: only what is there may be named. In a thread: it waits for the disk."""
        with _disk():
            if self._folder is not None:
                assert self._model is not None
                self._folder.save_checkpoint(
                    self._model,
                    run_id=self._run_id,
                    version=self._version,
                    memory=self._strategy.memory,
                    strategy=type(self._strategy).__name__,
                )
            commit()
        self._durable_version = self._version

    async def _go_on(self, intake: UpdateIntake) -> None:
        """Go on from the last commit. What the broker gives again is folded as it comes; then tasks are repeated."""
        assert self._model is not None
        self._model_bytes = sum(value.nbytes for value in self._model.values())
        self._expect(self._model)
        self._keep_base()
        passed_over = self._passed_over()
        await self._tidy()
        publishing = await self._publish(asyncio.sleep(0))
        rounds = self._history.rounds
        last = self._history.num_rounds
        for task_id, client_id, staleness in self._ledger.folded_in(last):  # the first receipt may be lost
            receipt = m.Receipt(task_id=task_id, run_id=self._run_id, round=last, staleness=staleness)
            await self._outbound.put((client_id, receipt, self._app.rounds.timeout_s))
        for round_, model in passed_over:
            await self._unless_stopped(self._central.put((round_, model)))
        if (rounds[-1].central if rounds else self._history.initial) is None:
            await self._evaluate_centrally(last)
        intake.disturbed()
        self._events.put(e.ModelReady())
        self._in_doubt.set()
        await publishing
        self._release_pages()

    async def _commit(self, command: c.Commit) -> None:
        assert self._model is not None
        if command.folded:
            await self._finish(command)
        folded, self._folded = self._folded, []
        record = await self._record(command, [update for _, update in folded])
        if command.folded and self._version == command.version:
            record.reason = "discarded"
        durable = self._make_durable(record, folded)
        publishing = None
        if self._version == command.version:
            await durable
        else:
            publishing = await self._publish(durable)
        self._events.put(e.RoundCommitted(round=command.round, version=self._version))
        self._tell(
            o.RoundClosed(
                round=command.round,
                version=self._version,
                reason=record.reason,
                folded=len(record.folded),
                cohort=len(command.cohort),
                unfinished=command.unfinished,
                fit_metrics=record.fit_metrics,
                seconds=record.seconds,
                turnaround_s=self._turnaround_s(command) if publishing is not None else None,
            )
        )
        self._history.seconds = round(self._seconds(), 3)
        if publishing is not None:
            await publishing
            self._let_go_of_memory()
            await self._publisher.find_end()  # while the clients fetch it
            await self._evaluate_centrally(command.round)
        if time.monotonic() - self._tidied_at > _TIDY_EVERY_S:
            await self._tidy(with_history=time.monotonic() > self._history_due_at)

    async def _finish(self, command: c.Commit) -> None:
        """Make the next version of what was folded; where none can be made, all is as before, and the round empty."""
        assert self._model is not None
        remembered = dict(self._strategy.memory)
        state, self._fold_state = self._fold_state, None
        try:
            model = await self._aside(self._strategy.finish, state, self._model)
            del state
            _check_same_kind(self._strategy, self._model, model)
            _check_memory(self._strategy)
            await self._check_finite(model)
            await self._check_finite(self._strategy.memory)
        except (AggregateRefused, UpdateRefused) as exc:
            self._strategy.attach(memory=remembered)
            self._discard(command, str(exc))
            return
        self._model = _frozen(model)
        _frozen(self._strategy.memory)
        self._version += 1
        self._keep_base()
        if self._strategy.may_resize:
            self._model_bytes = sum(value.nbytes for value in model.values())
            self._expect(model)

    async def _make_durable(self, record: RoundRecord, folded: list[tuple[str, FoldedUpdate]]) -> None:
        """Checkpoint, then ledger: from then on the round is committed."""
        record.seconds = round(self._seconds() - record.opened_s, 6)
        rows = [(task_id, update.client_id, update.staleness) for task_id, update in folded]

        seconds, max_staleness, clients = self._seconds(), self._app.rounds.max_staleness, self._concerned(record)

        def commit() -> None:
            self._ledger.commit_round(record, rows, seconds=seconds, max_staleness=max_staleness, clients=clients)

        if record.version == (self._history.rounds[-1].version if self._history.rounds else 0):
            with _disk():
                await asyncio.to_thread(commit)
        else:
            await asyncio.to_thread(self._persist_model, commit)
        self._history.rounds.append(record)
        if self._keeps_rounds_on_disk:
            self._history.forget_rounds(keep=_ROUNDS_IN_MEMORY)

    def _concerned(self, record: RoundRecord) -> list[tuple[str, str]]:
        """What those have done so far who had a part in the round; as of now, for it goes into another thread."""
        names = {*record.cohort, *record.clients, *record.lost, *record.failed, *record.refused}
        known = self._history.clients
        return [(name, known[name].to_json()) for name in names if name in known]

    async def _check_finite(self, tensors: dict[str, Array]) -> None:
        """Finite updates can add up to more than the dtype holds."""
        if self._is_small:
            check_finite(tensors)
        else:
            await asyncio.to_thread(check_finite, tensors)

    def _discard(self, command: c.Commit, reason: str) -> None:
        self._tell(o.AggregateDiscarded(round=command.round, reason=reason))
        for task_id, update in self._folded:
            self._ledger.note_failed(task_id, update.client_id, DISCARDED)
        self._folded = []
        self._last_failure = f"the aggregate of round {command.round}: {reason}"

    async def _publish(self, durable: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Publish the model while it is made durable; returns when both clients may begin to read and it is durable.

        The returned task ends when its last part is in the stream.
        """
        head: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        head.add_done_callback(self._note_head_out)
        publishing = asyncio.create_task(self._publish_parts(head))
        try:
            await durable
            waits: set[asyncio.Future[Any]] = {publishing, head}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not head.done():
                publishing.result()  # raises
        except BaseException:
            publishing.cancel()
            raise
        self._offsets = {version: known for version, known in self._offsets.items() if version == self._version - 1} | {
            self._version: head.result()
        }
        return publishing

    def _turnaround_s(self, command: c.Commit) -> float | None:
        if command.reason is not c.CloseReason.MIN_FIT_CLIENTS or self._closed_by is None:
            return None
        began_at = max(self._closed_by, command.opened_at)  # it may have waited for another commit
        return round(self._head_out_at - began_at, 6)

    def _note_head_out(self, _: asyncio.Future[int]) -> None:
        self._head_out_at = now()

    async def _publish_parts(self, head: asyncio.Future[int]) -> None:
        assert self._model is not None
        started_at = now()
        tensors = self._model
        if self._overrides("broadcast"):
            beside = await self._aside(self._strategy.broadcast, self._model)
            tensors = tensors | {EXTRA + name: value for name, value in beside.items()}
        published = await self._publisher.publish(tensors, self._version, head)
        self._tell(
            o.ModelPublished(
                version=self._version,
                payload_bytes=published.payload_bytes,
                raw_bytes=published.raw_bytes,
                parts=published.parts,
                seconds=now() - started_at,
            )
        )

    def _let_go_of_memory(self) -> None:
        """Read the model from its checkpoint from now on: it is needed again only when the round closes."""
        if self._folder is not None and self._model_bytes > _SMALL_BYTES:
            self._model = _frozen(self._folder.load_checkpoint(self._version, run_id=self._run_id))
            self._strategy.attach(memory=self._remembered(self._folder))

    def _release_pages(self) -> None:
        if self._folder is not None:
            self._folder.release_pages()

    async def _tidy(self, *, with_history: bool = True) -> None:
        """What may lag behind the ledger: history.json, model.safetensors, and the end of older checkpoints."""
        began_at = self._tidied_at = time.monotonic()
        if self._folder is None:
            return
        # What goes into the thread must not change under it.
        history = self._history.snapshot() if with_history else None
        in_use = self._bases_in_use() | self._after.versions

        def tidy(folder: RunFolder) -> None:
            with _disk():
                if history is not None:
                    self._save_history(folder, history)
                    self._history_due_at = time.monotonic() + (time.monotonic() - began_at) / _HISTORY_SHARE
                if self._durable_version is not None:
                    folder.settle_checkpoint(self._durable_version, keep=in_use)

        await asyncio.to_thread(tidy, self._folder)

    def _save_history(self, folder: RunFolder, history: History) -> None:
        folder.save_history(history, self._ledger.record_texts(through=history.num_rounds))

    def _bases_in_use(self) -> set[int]:
        """The versions that somebody still works on, where the strategy needs them."""
        if self._engine is None or self._history.finished or not self._strategy.needs_base:
            return set()
        return self._engine.versions_in_use

    async def _record(self, command: c.Commit, folded: list[FoldedUpdate]) -> RoundRecord:
        refused, self._refused = self._refused, {}
        record = RoundRecord(
            round=command.round,
            version=self._version,
            reason=command.reason.value,
            opened_s=round(command.opened_at - self._started_at, 6),
            seconds=0.0,
            cohort=list(command.cohort),
            folded=folded,
            unfinished=list(command.unfinished),
            lost=list(command.lost),
            failed=dict(command.failed),
            refused=refused,
            fit_metrics={},
        )
        in_order = sorted(folded, key=lambda update: (update.client_id, -update.staleness))
        reports = [(update.num_examples, update.metrics) for update in in_order]
        record.fit_metrics, failed = await self._together("fit", command.round, reports)
        record.metrics_failed |= failed
        return record

    async def _together(
        self, of: Literal["fit", "evaluate"], round: int, reports: Sequence[tuple[int, Metrics]]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What the app's function makes of the metrics of these clients, and what was wrong with it."""
        if not reports:
            return {}, {}
        function = self._app.aggregate_fit_metrics if of == "fit" else self._app.aggregate_evaluate_metrics
        is_ours = getattr(function, "__module__", "").startswith("fedbus.")
        try:
            result = function(reports) if is_ours else await asyncio.to_thread(function, reports)
            return dict(check_metrics("it", result)), {}
        except Exception as exc:  # the user's own code
            _LOGGER.debug("aggregate_%s_metrics failed", of, exc_info=exc)
            reason = str(exc) if isinstance(exc, ClientCodeError) else _describe(exc)
            self._tell(o.MetricsFailed(round=round, of=of, reason=reason))
            return {}, {of: reason}

    # ---- evaluation ----------------------------------------------------------------------------------------------

    async def _evaluate_centrally(self, round: int) -> None:
        if self._app.evaluate_fn is not None and self._model is not None:
            self._after.expect("central", self._version)
            await self._unless_stopped(self._central.put((round, self._model)))

    def _passed_over(self) -> list[tuple[int, dict[str, Array]]]:
        """Earlier versions, with their rounds, that the last server did not come to evaluate, and kept."""
        if self._app.evaluate_fn is None or not self._app.after_evaluation or self._folder is None:
            return []
        initial = (0, 0, self._history.initial is None)
        others = [(r.round, r.version, r.central is None and r.central_failed is None) for r in self._history.rounds]
        found, last = [], -1
        for round_, number, is_missing in (initial, *others):
            is_new, last = number > last, number
            model = None
            if is_new and is_missing and number < self._version:
                model = self._folder.earlier_checkpoint(number, run_id=self._run_id)
            if model is not None:
                self._after.expect("central", number)
                found.append((round_, model))
        return found

    def _version_of(self, round: int) -> int:
        record = self._record_of(round)
        return 0 if record is None else record.version

    async def _evaluate(self) -> None:
        while True:
            round, model = await self._central.get()
            try:
                evaluation = await self._call_evaluate_fn(round, model)
            except ClientCodeError as exc:
                self._tell(o.EvaluationFailed(round=round, reason=str(exc)))
                record, evaluation = self._record_of(round), None
                if record is not None:
                    record.central_failed = str(exc)
                    self._ledger.note_record(record)
            if evaluation is not None:
                self._keep_central(round, evaluation)
            else:
                self._after.give_up("central", self._version_of(round))
            del model
            self._central.task_done()

    async def _call_evaluate_fn(self, round: int, model: dict[str, Array]) -> Evaluation | None:
        assert self._app.evaluate_fn is not None
        try:
            result: Any = await self._user_thread.call("evaluate_fn", self._app.evaluate_fn, round, dict(model))
        except Exception as exc:  # the user's own code
            _LOGGER.debug("evaluate_fn failed", exc_info=exc)
            raise ClientCodeError(_describe(exc)) from exc
        if result is None:
            return None
        if not isinstance(result, tuple) or len(result) != 2:
            raise ClientCodeError(f"it returned {type(result).__name__}, (loss, metrics) is due")
        checked = check_evaluate_result(EvaluateResult(loss=result[0], num_examples=1, metrics=result[1]))
        return Evaluation(loss=checked.loss, metrics=dict(checked.metrics))

    def _keep_central(self, round: int, evaluation: Evaluation) -> None:
        record = self._record_of(round)
        evaluation.number = self._after.number()
        if record is None:
            self._history.initial = evaluation
            self._note_head()
        else:
            record.central = evaluation
            self._ledger.note_record(record)
        self._after.show(round, self._version_of(round), "central", evaluation)
        self._tell(
            o.Evaluated(round=round, where="central", loss=evaluation.loss, metrics=evaluation.metrics, clients=0)
        )

    async def _close_evaluation(self, command: c.CloseEvaluation) -> None:
        suffix = f"/evaluate/{command.round}/"
        reports = [
            self._evaluate_reports.pop(task_id)
            for task_id in [task_id for task_id in self._evaluate_reports if suffix in task_id]
        ]
        reports = [report for report in reports if report.client_id in command.reported]
        if not reports:
            self._after.give_up("federated", command.version)
            return
        reports.sort(key=lambda report: report.client_id)
        without_loss = [(report.num_examples, _without_loss(report.metrics)) for report in reports]
        metrics, failed = await self._together("evaluate", command.round, without_loss)
        evaluation = Evaluation(
            loss=weighted_mean((report.num_examples, {"loss": report.loss}) for report in reports)["loss"],
            metrics=metrics,
            clients=len(reports),
            num_examples=sum(report.num_examples for report in reports),
            number=self._after.number(),
        )
        record = self._record_of(command.round)
        assert record is not None
        record.federated = evaluation
        record.metrics_failed |= failed
        self._ledger.note_record(record)
        self._after.show(command.round, command.version, "federated", evaluation)
        self._tell(
            o.Evaluated(
                round=command.round,
                where="federated",
                loss=evaluation.loss,
                metrics=evaluation.metrics,
                clients=evaluation.clients,
            )
        )

    # ---- the end -------------------------------------------------------------------------------------------------

    async def _end(self, command: c.EndRun) -> None:
        await self._jobs.join()
        self._tell(o.RunClosing(finished=command.finished, reason=command.reason))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                # To everybody who was ever in: one whose lease ran out may be there all the same.
                for client_id in self._history.clients_joined:
                    await self._outbound.put((client_id, self._goodbye(command.finished, command.reason), _GOODBYE_S))
                await self._outbound.join()
                await self._virtual.take_back()
        await self._note_end(finished=command.finished, reason=command.reason)
        if command.finished:  # the clients need not wait for this
            await self._unless_stopped(self._central.join())
            await self._unless_stopped(self._after.join())
            await self._note_end(finished=True, reason=command.reason)
        self._tell(
            o.RunFinished(
                finished=command.finished,
                reason=command.reason,
                rounds=self._history.num_rounds,
                seconds=self._history.seconds,
            )
        )
        self._ended.set()

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait, but not for a slow evaluate_fn once we were asked to stop."""
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._stopping.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _goodbye(self, finished: bool, reason: str) -> m.RunEnded:
        return m.RunEnded(
            run_id=self._run_id, epoch=self._epoch, finished=finished, reason=reason, another=self._keeps_clients
        )

    async def _send_home(self, reason: str) -> None:
        """After a failure of ours the clients need not wait for us, if the broker is still there to tell them."""
        goodbye = encode(self._goodbye(finished=False, reason=reason))
        sends = [
            self._bus.publish(TASKS, client_id, goodbye, mandatory=False, expires_s=_GOODBYE_S)
            for client_id in self._history.clients_joined
            if client_id not in self._virtual
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.gather(*sends, self._virtual.take_back(), return_exceptions=True)

    async def _note_end(self, *, finished: bool, reason: str) -> None:
        self._history.finished, self._history.reason = finished, reason
        self._history.seconds = round(self._seconds(), 3)
        if self._ledger.holds_a_run:
            await asyncio.to_thread(self._ledger.save_end, self._history)
            await self._tidy()


def _settings(app: App) -> dict[str, Any]:
    return {
        "fedbus": version("fedbus"),
        "seed": app.seed,
        "strategy": _name_of(app.strategy),
        "compression": app.compression,
        "model_compression": app.model_compression,
        **{name: repr(value) if dataclasses.is_dataclass(value) else value for name, value in vars(app.rounds).items()},
    }


def _name_of(strategy: Strategy) -> str:
    """As it shows itself; without an address, which no two runs share."""
    has_words = type(strategy).__repr__ is not object.__repr__
    return repr(strategy) if has_words else f"{type(strategy).__name__}()"


def _without_loss(metrics: Metrics) -> Metrics:
    """The loss is no metric beside itself."""
    return {name: value for name, value in metrics.items() if name != "loss"}


def _is_committed(command: c.Settle) -> bool:
    return command.outcome is Outcome.COMMITTED


def _is_refused(command: c.Settle) -> bool:
    return command.outcome is Outcome.REFUSED


def _frozen(model: dict[str, Array]) -> dict[str, Array]:
    """Nobody writes to a version that others may be reading."""
    for value in model.values():
        value.flags.writeable = False
    return model


def _call_strategy(function: Callable[..., Any], *args: Any) -> Any:
    """Call into the strategy. Raises `RunFailed` when it raises: no round can be trusted then."""
    try:
        return function(*args)
    except FedbusError:
        raise  # its words are for people already
    except Exception as exc:
        owner = type(getattr(function, "__self__", None)).__name__
        raise RunFailed(f"{owner}.{function.__name__} raised {_describe(exc)}{place_of(exc)}") from exc


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise RunFailed(f"the run folder cannot be written: {exc.strerror or exc}") from exc


def _client_update(staged: StagedUpdate) -> ClientUpdate:
    """As the strategy sees it, before anything is known of how late it is."""
    assert staged.tensors is not None
    assert staged.extra is not None
    return ClientUpdate(
        client_id=staged.client_id,
        task_id=staged.task_id,
        delta=staged.tensors,
        num_examples=staged.num_examples,
        metrics=staged.metrics,
        extra=staged.extra,
    )


def _check_same_kind(strategy: Strategy, old: dict[str, Array], new: Any) -> None:
    name = type(strategy).__name__
    if not isinstance(new, dict) or not all(isinstance(value, np.ndarray) for value in new.values()):
        raise RunFailed(f"{name}.finish must return {{tensor name: array}}, the next model, not {type(new).__name__}")

    if list(old) != list(new):
        wrong = sorted(old.keys() ^ new.keys())
        what = f"gave or lacks {wrong[0]!r}" if wrong else "changed the order of the tensors"
        raise RunFailed(f"{name}.finish {what}: it must return the model's tensors, in their order")
    for tensor, value in old.items():
        found = new[tensor]
        has_shape = found.ndim == value.ndim if strategy.may_resize else found.shape == value.shape
        if not has_shape or found.dtype != value.dtype:
            wanted = f"the model has {value.dtype} {value.shape}"
            raise RunFailed(f"{name}.finish returned {tensor!r} as {found.dtype} {found.shape}, {wanted}")


def _check_memory(strategy: Strategy) -> None:
    kept: Mapping[str, object] = strategy.memory
    for key, value in kept.items():
        if not isinstance(value, np.ndarray):
            name = type(strategy).__name__
            raise RunFailed(
                f"{name}.finish left memory[{key!r}] = {type(value).__name__}: only arrays can be kept there"
            )


def _describe(exc: BaseException) -> str:
    return one_line(f"{type(exc).__name__}: {exc}")

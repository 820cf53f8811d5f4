"""The client's asyncio shell: it answers tasks until the run ends or it is asked to leave.

A task is acknowledged once its result is with the broker: a client that dies half-way finds the task again in its
inbox. The update stays in the outbox until the server's receipt; the same task again asks for it again. Of several fit
tasks the newest is worked on and the others are dropped; one whose update would be refused is cancelled by the server.
Order of leaving: say goodbye first, then close; training that is under way is told through `ClientContext.cancelled`
and not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbus.app import App
from fedbus.bus.base import Bus, Consumer, Delivery, hold_patiently
from fedbus.bus.topology import CONTROL, client_inbox, client_lock, inbox, ingress
from fedbus.client.code import Trained, UserCode
from fedbus.client.memory import ClientMemory
from fedbus.client.outbox import Entry, Outbox
from fedbus.client.reader import ModelReader
from fedbus.client.tasks import kind_of, place_of, report_of, round_of
from fedbus.clock import now
from fedbus.config import check_client_id
from fedbus.errors import (
    BrokerClosed,
    BrokerDenied,
    BrokerError,
    ClientCodeError,
    ConfigError,
    DecodeError,
    PublishUnconfirmed,
    QueueBusy,
    QueueMismatch,
    QueueMissing,
    RunFailed,
    Unroutable,
    leaf,
    one_line,
)
from fedbus.observe import events as o
from fedbus.observe.figures import ClientFigures
from fedbus.training.base import ClientContext
from fedbus.training.thread import Caller, UserThread
from fedbus.types import Tensors
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode
from fedbus.wire.compression import Codec

_JOIN_EVERY_S = (0.5, 5.0)
_JOIN_AGAIN_S = 0.05
"""The server of a run that follows another one is about to come."""
_GOODBYE_PATIENCE_S = 3.0
_TAKEN_PATIENCE_S = 5.0
_INBOX_PREFETCH = 1000
_PRIORITY = {m.ParametersTask: 0, m.FitTask: 1, m.EvaluateTask: 2}
"""Training first: an evaluation must not hold a round up."""


_REMEMBERED = 64
"""Tasks whose end is remembered: one of them may be asked for again."""


@dataclass(kw_only=True, eq=False)
class _Pending:
    """A task, with every delivery that it came in: the broker or the server may repeat it.

    `came_in`: the run that we were in by then.
    """

    task: m.Task
    came_in: str | None
    deliveries: list[Delivery] = field(default_factory=list)

    def merge(self, task: m.Task, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        if task.epoch >= self.task.epoch:
            self.task = task


def _urgency(pending: _Pending) -> tuple[int, int]:
    """The newest of the most urgent kind."""
    return _PRIORITY[type(pending.task)], -round_of(pending.task)


class ClientRuntime:
    """One client of `app` over `bus`.

    Args:
        app: whose `client_fn` makes the client's code, in the client's own thread.
        bus: an open connection; the caller closes it.
        client_id: the client's stable name.
        partition, num_partitions: which part of the data is this client's, where fedbus starts the clients itself.
        observers: called with each event of `fedbus.observe.events`.
        context: what `client_fn` is given; None makes one.
        caller: runs the user's code; None: a thread does.
        memory: what the client remembers; None begins with nothing and keeps it no longer than the process.
        jitter: keeps clients from speaking all at once.
    """

    def __init__(
        self,
        app: App,
        bus: Bus,
        *,
        client_id: str,
        partition: int = 0,
        num_partitions: int = 1,
        observers: Sequence[o.Observe] = (),
        context: ClientContext | None = None,
        caller: Caller | None = None,
        memory: ClientMemory | None = None,
        jitter: random.Random | None = None,
    ) -> None:
        self._app = app
        self._bus = bus
        self._client_id = check_client_id(client_id)
        self._context = context or ClientContext(
            client_id=client_id, partition=partition, num_partitions=num_partitions
        )
        self._observers = tuple(observers)
        self._session = uuid.uuid4().hex[:12]
        self._run_id: str | None = None
        self._heartbeat_s = _JOIN_EVERY_S[1]
        self._lease_s = 4 * _JOIN_EVERY_S[1]
        self._welcomed = asyncio.Event()
        self._welcomed_at = 0.0
        self._epoch = 0
        self._pending: list[_Pending] = []
        self._current: _Pending | None = None
        self._work = asyncio.Event()
        self._heartbeat_due = asyncio.Event()
        self._cancelled: dict[str, str] = {}  # task_id -> reason, while the task is being worked on
        self._reader = ModelReader(bus)
        self._jitter = jitter or random.Random()
        self._outbox = Outbox(bus, client_id, self._jitter)
        self._caller: Caller = caller or UserThread(f"fedbus-{client_id}")
        self._memory = ClientMemory() if memory is None else memory
        self._met_with: dict[tuple[str, int], Tensors] = {}  # (run, version) -> what was remembered; the last two
        self._code = UserCode(app, self._context, self._caller)
        self._inbox: Consumer | None = None
        self._has_told_of_waiting = False
        self._over = asyncio.Event()
        self._result: m.RunEnded | None = None
        self._unfit = ""  # why it cannot take part
        self._ended_tasks: OrderedDict[str, str] = OrderedDict()  # task_id -> why it failed, "" when it was settled
        self._newest_fit = 0

    def figures(self) -> ClientFigures:
        """It as of now, in numbers. On its event loop only."""
        return ClientFigures(
            is_member=self._welcomed.is_set(),
            lease_s=self._lease_s if self._welcomed.is_set() else 0.0,
            welcomed_at=self._welcomed_at,
            outbox_updates=len(self._outbox),
            outbox_bytes=self._outbox.nbytes,
            uploaded_bytes=self._outbox.uploaded_bytes,
            downloaded_bytes=self._reader.downloaded_bytes,
        )

    def request_leave(self) -> None:
        """Leave the run: `run` returns None soon after."""
        self._context.cancel()
        self._over.set()

    async def run(self) -> m.RunEnded | None:
        """Take part until the run ends: the server's last word, or None after `request_leave`.

        Raises `QueueBusy` when a client of this name is connected already, `BrokerError` when the broker goes away,
        `RunFailed` when it cannot do what the run asks of its clients.
        """
        try:
            await self._run()
        except ExceptionGroup as group:
            exc = leaf(group)
            raise exc from exc.__cause__ or group
        finally:
            self._context.cancel()
            self._caller.close()
            with contextlib.suppress(BrokerError):
                await self._reader.close()
        if self._unfit:
            raise RunFailed(f"{self._client_id} left the run: {self._unfit}")
        self._tell_the_end()
        return self._result

    def _tell_the_end(self) -> None:
        ended = self._result
        finished = ended is not None and ended.finished
        early = "" if finished else "the server ended the run early: "
        reason = "it left the run" if ended is None else early + one_line(ended.reason)
        self._tell(o.ClientDone(client_id=self._client_id, finished=finished, reason=reason))

    async def _run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            may_declare = await self._be_alone(stack)
            self._inbox = await self._open_inbox(stack, may_declare=may_declare)
            if self._inbox is None:
                return
            async with asyncio.TaskGroup() as group:
                work: list[Coroutine[Any, Any, None]] = [
                    self._bus.closed(),
                    self._receive(self._inbox),
                    self._stay_present(),
                    self._answer_tasks(),
                ]
                tasks = [group.create_task(coroutine) for coroutine in work]
                await self._over.wait()
                for task in tasks:
                    task.cancel()
                if self._result is None:  # only now: a heartbeat after the goodbye would be a new join
                    await self._say_goodbye()

    async def _open_inbox(self, stack: contextlib.AsyncExitStack, *, may_declare: bool) -> Consumer | None:
        """None when we are to leave before there is one."""
        if not may_declare:
            return await self._await_inbox(stack)
        with contextlib.suppress(QueueMismatch):  # it is there, as the server wants it
            await self._bus.declare(ingress(self._app.update_queue, self._app.message_queues))
        await self._declare_inbox()
        return await stack.enter_async_context(self._bus.consume(inbox(self._client_id), prefetch=_INBOX_PREFETCH))

    async def _await_inbox(self, stack: contextlib.AsyncExitStack) -> Consumer | None:
        """Ask for an inbox until there is one: the server makes it when it hears us."""
        busy_until = now() + _TAKEN_PATIENCE_S
        for attempt, pause_s in enumerate(self._pauses()):
            try:
                return await stack.enter_async_context(
                    self._bus.consume(inbox(self._client_id), prefetch=_INBOX_PREFETCH, exclusive=True)
                )
            except QueueMissing:
                if attempt:
                    self._note_no_server()
                await self._ask_to_join(pause_s)
            except QueueBusy:  # maybe our predecessor, who was killed a moment ago
                if now() > busy_until:
                    raise self._taken() from None
            except BrokerDenied as exc:
                raise BrokerDenied(
                    f"the broker does not let {self._bus.user} read the inbox of {self._client_id}: take the bundle, "
                    f"or the login, that was made for {self._client_id} ({exc})"
                ) from exc
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._over.wait()
                    return None
        raise AssertionError("the pauses never end")

    async def _declare_inbox(self) -> None:
        kind = self._app.message_queues
        try:
            await self._bus.declare(client_inbox(self._client_id, kind))
        except QueueMismatch as exc:
            raise QueueMismatch(
                f"{exc} (the app says message_queues={kind!r}: set it to what is there, or delete the queue)"
            ) from exc

    async def _be_alone(self, stack: contextlib.AsyncExitStack) -> bool:
        """Hold our name: two clients on one inbox would each see half of what the server says.

        False where the broker lets us declare nothing: then the server makes our inbox, and we read it exclusively.
        """
        try:
            await hold_patiently(self._bus, stack, client_lock(self._client_id))
        except QueueBusy:
            raise self._taken() from None
        except BrokerDenied:
            return False
        return True

    def _taken(self) -> QueueBusy:
        return QueueBusy(f"a client named {self._client_id} is connected already: each needs an id of its own")

    def _tell(self, event: object) -> None:
        for observe in self._observers:
            observe(event)

    # ---- presence ------------------------------------------------------------------------------------------------

    async def _stay_present(self) -> None:
        first_s = _JOIN_EVERY_S[0]
        while True:
            await self._become_member(first_s)
            await self._show_signs_of_life()
            first_s = _JOIN_AGAIN_S

    async def _become_member(self, first_s: float) -> None:
        for pause_s in self._pauses(first_s):
            await self._ask_to_join(pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._welcomed.wait()
            if self._welcomed.is_set():
                return
            self._note_no_server()

    async def _show_signs_of_life(self) -> None:
        """As long as we are a member of a run that goes on."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._heartbeat_s):
                    await self._heartbeat_due.wait()
            self._heartbeat_due.clear()
            if not self._welcomed.is_set():
                return
            heartbeat = m.Heartbeat(
                client_id=self._client_id,
                session=self._session,
                run_id=self._run_id or "",
                fit_task=self._fit_task_in_hand(),
            )
            with contextlib.suppress(PublishUnconfirmed):  # the next one says the same
                await self._bus.publish(CONTROL, self._client_id, encode(heartbeat), expires_s=self._lease_s)

    def _pauses(self, first_s: float = _JOIN_EVERY_S[0]) -> Iterator[float]:
        """Seconds between two questions to a server that does not answer: longer and longer, without end."""
        pause_s = first_s
        while True:
            yield pause_s * self._jitter.uniform(0.8, 1.2)
            pause_s = min(_JOIN_EVERY_S[1], 1.5 * pause_s)

    async def _ask_to_join(self, pause_s: float) -> None:
        join = m.Join(client_id=self._client_id, session=self._session)
        # Without an exchange, or a queue behind it, no server has ever been here, or is just beginning.
        with contextlib.suppress(PublishUnconfirmed, QueueMissing, Unroutable):
            await self._bus.publish(CONTROL, self._client_id, encode(join), expires_s=2 * pause_s)

    def _note_no_server(self) -> None:
        if not self._has_told_of_waiting:
            self._has_told_of_waiting = True
            self._tell(o.ServerAwaited(client_id=self._client_id))

    def _fit_task_in_hand(self) -> str:
        """The newest fit task that is here and not answered, "" for none."""
        here = [self._current, *self._pending] if self._current is not None else self._pending
        ours = (pending.task for pending in here if pending.task.run_id == self._run_id)
        tasks = [task for task in ours if isinstance(task, m.FitTask)]
        return max(tasks, key=round_of).task_id if tasks else ""

    async def _say_goodbye(self) -> None:
        reason = self._unfit or "it was asked to stop"
        leave = m.Leave(client_id=self._client_id, session=self._session, run_id=self._run_id or "", reason=reason)
        with contextlib.suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_PATIENCE_S):  # under a broker's alarm nothing gets through
                await self._bus.publish(CONTROL, self._client_id, encode(leave), expires_s=self._lease_s)

    # ---- inbox ---------------------------------------------------------------------------------------------------

    async def _receive(self, consumer: Consumer) -> None:
        async for delivery in consumer:
            try:
                message = decode(delivery.body)
            except DecodeError as exc:
                self._tell(o.MessageRejected(queue=inbox(self._client_id), reason=str(exc)))
                await consumer.reject(delivery, requeue=False)
                continue
            if isinstance(message, m.ParametersTask | m.FitTask | m.EvaluateTask):
                self._take_task(message, delivery)
                continue
            if isinstance(message, m.CancelTask):
                await self._cancel(message)
            else:
                self._take(message)
            await consumer.ack(delivery)

    def _take_task(self, task: m.Task, delivery: Delivery) -> None:
        """Queue it, or, when it is a copy of one that is here, let it bring its newer delivery and place."""
        if task.run_id == self._run_id:  # it may come before the welcome of the server that took the run over
            self._epoch = max(self._epoch, task.epoch)
        if isinstance(task, m.FitTask) and task.receipt_task_id and self._may_be_ours(task.run_id):
            self._take_receipt(task.receipt_task_id, task.receipt_round, task.receipt_staleness)
        for known in (self._current, *self._pending):
            if known is not None and known.task.task_id == task.task_id:
                known.merge(task, delivery)
                if not isinstance(task, m.ParametersTask):
                    self._reader.move(place_of(task))
                return
        self._pending.append(_Pending(task=task, came_in=self._run_id, deliveries=[delivery]))
        if task.run_id != self._run_id:
            self._heartbeat_due.set()  # its server welcomes us once it hears that we take part in another run
        self._work.set()

    async def _cancel(self, cancel: m.CancelTask) -> None:
        """Stop working on a task, or do not begin; the server is told, for it waits until we are free."""
        if cancel.run_id != self._run_id:
            return
        self._outbox.settle(cancel.task_id)
        self._memory.discard(cancel.task_id)
        if self._current is not None and self._current.task.task_id == cancel.task_id:
            self._cancelled[cancel.task_id] = cancel.reason
            self._context.cancel()
            self._caller.interrupt()
            return
        dropped = [pending for pending in self._pending if pending.task.task_id == cancel.task_id]
        for pending in dropped:
            self._pending.remove(pending)
        await self._stopped(cancel.task_id, round_of(dropped[0].task) if dropped else 0, cancel.reason)
        assert self._inbox is not None
        await self._inbox.ack(*(delivery for pending in dropped for delivery in pending.deliveries))

    async def _stopped(self, task_id: str, round: int, reason: str) -> None:
        self._remember_end(task_id, f"it was told to stop: {reason}")
        if round:
            self._tell(o.TaskCancelled(client_id=self._client_id, round=round, reason=one_line(reason)))
        await self._report_failure(task_id, f"it was told to stop: {reason}")

    def _take(self, message: m.Message) -> None:
        match message:
            case m.Welcome() if message.session == self._session:
                self._heartbeat_s, self._lease_s = message.heartbeat_s, message.lease_s
                self._welcomed_at = time.time()
                if message.run_id == self._run_id:
                    self._epoch = max(self._epoch, message.epoch)
                else:
                    self._run_id, self._epoch = message.run_id, message.epoch
                    self._outbox.clear()
                    self._newest_fit = self._memory.newest_round(message.run_id)
                    self._context.cancel()  # whatever is being trained, it is for a run that is over
                    self._work.set()
                    self._tell(o.Welcomed(client_id=self._client_id, run_id=message.run_id))
                self._welcomed.set()
                self._check_codecs(message)
            case m.Receipt() if self._may_be_ours(message.run_id):
                self._take_receipt(message.task_id, message.round, message.staleness)
            case m.Refusal():
                self._memory.discard(message.task_id)
                self._settled(message.task_id)
                self._tell(o.RefusalArrived(client_id=self._client_id, reason=message.reason))
            case m.UploadGrant() if message.run_id == self._run_id:
                self._outbox.grant(message.task_id)
            case m.RunEnded() if message.run_id == self._run_id and message.epoch >= self._epoch:
                self._outbox.clear()
                if message.another:
                    self._await_another_run()
                    return
                self._result = message
                self._context.cancel()
                self._over.set()
            case _:
                pass  # words of a run that is over

    def _may_be_ours(self, run_id: str) -> bool:
        """Whether a verdict of that run is about what we did: it waits in the inbox for a process that follows one that
        died, and a task that it finds there, too, need not be done again."""
        return self._run_id in (None, run_id)

    def _check_codecs(self, welcome: m.Welcome) -> None:
        """Better not to take part at all than to fail at each task."""
        try:
            for codec in (welcome.codec, welcome.model_codec):
                Codec.parse(codec).check_installed()
        except ConfigError as exc:
            self._unfit = f"it cannot take part in a run with this compression: {exc}"
            self._over.set()

    def _await_another_run(self) -> None:
        self._run_id = None
        self._context.cancel()
        self._welcomed.clear()
        self._heartbeat_due.set()

    # ---- tasks ---------------------------------------------------------------------------------------------------

    async def _answer_tasks(self) -> None:
        while True:
            pending = self._current = await self._next_task()
            await self._work_on(pending.task)
            self._current = None
            reason = self._cancelled.pop(pending.task.task_id, None)
            if reason is not None:
                await self._stopped(pending.task.task_id, round_of(pending.task), reason)
            assert self._inbox is not None
            await self._inbox.ack(*pending.deliveries)

    async def _work_on(self, task: m.Task) -> None:
        """Answer it, or repeat the answer: then it was lost, or the server that it went to is no more."""
        entry = self._outbox.get(task.task_id)
        if entry is not None:
            await self._outbox.deliver(entry)
        elif task.task_id in self._ended_tasks and not isinstance(task, m.ParametersTask):
            if self._ended_tasks[task.task_id]:
                await self._report_failure(task.task_id, self._ended_tasks[task.task_id])
        elif isinstance(task, m.FitTask) and task.round < self._newest_fit:  # of a round long closed
            self._memory.discard(task.task_id)
        else:
            await self._answer(task)
            if isinstance(task, m.FitTask) and task.run_id == self._run_id:  # another server may have come meanwhile
                self._newest_fit = max(self._newest_fit, task.round)

    async def _next_task(self) -> _Pending:
        """The most urgent one of the run that we are in."""
        while True:
            self._work.clear()
            await self._drop_what_is_over()
            ours = [pending for pending in self._pending if pending.task.run_id == self._run_id]
            if ours:
                pending = min(ours, key=_urgency)
                self._pending.remove(pending)
                return pending
            await self._work.wait()

    async def _drop_what_is_over(self) -> None:
        """Tasks of other runs that were here before our welcome to this one.

        Those that come later stay: a server that goes on with a run may ask us before it has welcomed us back.
        """
        over = [
            pending for pending in self._pending if self._run_id not in (None, pending.task.run_id, pending.came_in)
        ]
        if over:
            self._pending = [pending for pending in self._pending if pending not in over]
            assert self._inbox is not None
            await self._inbox.ack(*(delivery for pending in over for delivery in pending.deliveries))

    def _take_receipt(self, task_id: str, round: int, staleness: int) -> None:
        if self._outbox.get(task_id) is not None or task_id not in self._ended_tasks:  # else it came again
            self._tell(o.ReceiptArrived(client_id=self._client_id, round=round, staleness=staleness))
        self._memory.settle(task_id)
        self._settled(task_id)

    def _settled(self, task_id: str) -> None:
        self._outbox.settle(task_id)
        self._remember_end(task_id, "")

    def _remember_end(self, task_id: str, failure: str) -> None:
        self._ended_tasks[task_id] = failure
        if len(self._ended_tasks) > _REMEMBERED:
            self._ended_tasks.popitem(last=False)

    async def _answer(self, task: m.Task) -> None:
        kind = kind_of(task)
        round_ = round_of(task)
        started_at = now()
        self._tell(o.TaskStarted(client_id=self._client_id, kind=kind, round=round_))
        self._context._reset()
        if self._over.is_set():
            self._context.cancel()
        try:
            match task:
                case m.ParametersTask():
                    await self._send_parameters(task)
                case m.FitTask():
                    await self._fit(task)
                case m.EvaluateTask():
                    await self._evaluate(task)
        except (ClientCodeError, ConfigError, BrokerError) as exc:
            if isinstance(exc, BrokerClosed):
                raise
            if task.task_id in self._cancelled:
                return  # whatever it says, it says it because it was stopped
            self._tell(o.TaskErred(client_id=self._client_id, kind=kind, round=round_, reason=str(exc)))
            if isinstance(task, m.FitTask) and not isinstance(exc, BrokerError):  # that may go better the next time
                self._remember_end(task.task_id, str(exc))
            await self._report_failure(task.task_id, str(exc))
        else:
            if task.task_id not in self._cancelled:
                seconds = now() - started_at
                self._tell(o.TaskCompleted(client_id=self._client_id, kind=kind, round=round_, seconds=seconds))

    async def _report_failure(self, task_id: str, reason: str) -> None:
        failed = m.TaskFailed(
            client_id=self._client_id, task_id=task_id, run_id=self._run_id or "", reason=reason[:1000]
        )
        await self._bus.publish(CONTROL, self._client_id, encode(failed))

    async def _send_parameters(self, task: m.ParametersTask) -> None:
        await self._upload(task, await self._code.parameters())

    async def _fit(self, task: m.FitTask) -> None:
        # Training that takes long for its task says so once: nobody need guess whether the task was lost.
        still_here = asyncio.get_running_loop().call_later(task.timeout_s / 2, self._heartbeat_due.set)
        try:
            await self._code.make()
            model = await self._model_of(task)
            if not self._is_wanted(task):
                return
            trained = await self._code.answer(task, model, self._remembered(task))
            del model
        finally:
            still_here.cancel()
        if self._is_wanted(task):
            await self._remember(task, trained)
        if self._is_wanted(task):
            await self._upload(task, trained)
        else:
            self._memory.discard(task.task_id)

    def _remembered(self, task: m.FitTask | m.EvaluateTask) -> Tensors:
        """What the client remembers of the task's run, but for earlier attempts at tasks that are here: a process that
        died before it had sent an update finds its task again, and what the fit left.

        A version is evaluated with what its fit began with: that may have ended meanwhile, and is of the next version.

        A query neither knows nor changes it: one between two servers of a run must cost the run nothing.
        """
        if isinstance(task, m.FitTask) and task.purpose == "query":
            return {}
        self._memory.begin_run(task.run_id)
        place = task.run_id, task.version
        if isinstance(task, m.EvaluateTask) and place in self._met_with:
            return self._met_with[place]
        waiting = [pending.task.task_id for pending in self._pending if self._outbox.get(pending.task.task_id) is None]
        remembered = self._memory.before(task.task_id, *waiting)
        self._met_with = {**dict(list(self._met_with.items())[-1:]), place: remembered}
        return remembered

    async def _remember(self, task: m.FitTask, trained: Trained) -> None:
        """Before it is sent: its receipt may come at any time from then on."""
        if task.purpose == "query":
            return
        if self._memory.is_on_disk:
            await asyncio.to_thread(self._memory.keep, task.task_id, trained.memory, round=task.round)
        else:
            self._memory.keep(task.task_id, trained.memory, round=task.round)

    def _is_wanted(self, task: m.FitTask) -> bool:
        """Whether its run goes on, and it is not too late for it."""
        return task.run_id == self._run_id and task.task_id not in self._cancelled

    async def _evaluate(self, task: m.EvaluateTask) -> None:
        await self._code.make()
        result = await self._code.evaluate(await self._model_of(task), task.config, self._remembered(task))
        await self._bus.publish(CONTROL, self._client_id, encode(report_of(self._client_id, task, result)))

    async def _model_of(self, task: m.FitTask | m.EvaluateTask) -> Tensors:
        pending = self._current
        if pending is not None and isinstance(pending.task, m.FitTask | m.EvaluateTask):
            task = pending.task  # a newer copy may know a newer place
        return await self._reader.read(place_of(task))

    async def _upload(self, task: m.ParametersTask | m.FitTask, trained: Trained) -> None:
        entry = Entry(
            client_id=self._client_id,
            task=task,
            outgoing=trained.outgoing,
            num_examples=trained.num_examples,
            metrics=trained.metrics,
        )
        self._outbox.keep(entry)
        try:
            await self._outbox.deliver(entry)
        except ConfigError:  # it cannot travel, now or later
            self._memory.discard(task.task_id)
            self._outbox.settle(task.task_id)
            raise

"""The worker's asyncio shell: it takes tasks of virtual clients from the queue that all workers share.

A task is acknowledged once its answer is with the broker, and forgotten: it carries nothing over to the next one. A
worker that dies half-way gives it back by that, and another takes it. So a task may be done twice; the server counts it
once.

Workers declare nothing and have no inbox: they wait for the queue until a server makes it, and stay when a run ends, as
workers of a queue do. Nobody can tell them that a task is not wanted any more; `Horizon` sees it.

Order of the end: no new tasks, then those in hand are finished while there is time, then the subscription is closed,
which gives back what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fedbus.app import App
from fedbus.bus.base import Bus, Consumer, Delivery
from fedbus.bus.topology import CONTROL, WORK
from fedbus.client.code import Trained, UserCode
from fedbus.client.tasks import kind_of, place_of, report_of, round_of
from fedbus.client.upload import Upload
from fedbus.clock import now
from fedbus.config import parse_virtual_id
from fedbus.errors import (
    BrokerClosed,
    BrokerError,
    ClientCodeError,
    ConfigError,
    DecodeError,
    QueueMissing,
    leaf,
    one_line,
)
from fedbus.observe import events as o
from fedbus.observe.figures import WorkerFigures
from fedbus.training.base import ClientContext
from fedbus.training.thread import Caller, UserThread
from fedbus.types import Tensors
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode
from fedbus.worker.horizon import Horizon
from fedbus.worker.models import Models

_ASK_EVERY_S: Final = 2.0
_MOST_SLOTS: Final = 1000


@dataclass(kw_only=True, eq=False)
class _Job:
    """A task in hand, with every delivery that it came in: the broker or the server may repeat it."""

    task: m.Task
    context: ClientContext
    consumer: Consumer
    deliveries: list[Delivery] = field(default_factory=list)

    def merge(self, task: m.Task, consumer: Consumer, delivery: Delivery) -> None:
        if consumer is not self.consumer:  # the queue was deleted, and with it what came before
            self.consumer, self.deliveries = consumer, []
        self.deliveries.append(delivery)
        if task.epoch >= self.task.epoch:
            self.task = task

    @property
    def client_id(self) -> str:
        return self.context.client_id


class WorkerRuntime:
    """One worker of `app` over `bus`.

    Args:
        app: whose `client_fn` makes a client for each task, in the thread of a slot.
        bus: an open connection; the caller closes it.
        slots: tasks at a time, each in a thread of its own.
        grace_s: seconds that tasks in hand have when the worker is to stop; then they are given back.
        until_idle_s: end once no task has come for so long; None: stay.
        observers: called with each event of `fedbus.observe.events`.
    """

    def __init__(
        self,
        app: App,
        bus: Bus,
        *,
        slots: int = 1,
        grace_s: float = 30.0,
        until_idle_s: float | None = None,
        observers: Sequence[o.Observe] = (),
    ) -> None:
        if isinstance(slots, bool) or not isinstance(slots, int) or not 1 <= slots <= _MOST_SLOTS:
            raise ConfigError(f"slots must be a whole number from 1 to {_MOST_SLOTS}, not {slots!r}")
        for codec in (app.update_codec, app.model_codec):
            codec.check_installed()
        self._app = app
        self._bus = bus
        self._slots = slots
        self._grace_s = grace_s
        self._until_idle_s = until_idle_s
        self._observers = tuple(observers)
        self._models = Models(bus)
        self._horizon = Horizon(bus, app.rounds.max_staleness)
        self._one_upload = asyncio.Lock()
        """Nobody grants uploads to a worker: one at a time keeps the server's memory from growing with the slots."""
        self._consumer: Consumer | None = None
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue()
        self._in_hand: dict[str, _Job] = {}  # task_id -> waiting, or being worked on
        self._unsettled = 0
        self._at_work = asyncio.Event()
        self._at_rest = asyncio.Event()
        self._at_rest.set()
        self._stopping = asyncio.Event()
        self._reason = ""
        self._tasks_done = 0
        self._uploaded_bytes = 0
        self._given_back = 0
        self._has_told_of_waiting = False

    def figures(self) -> WorkerFigures:
        """It as of now, in numbers. On its event loop only."""
        return WorkerFigures(
            has_work=self._consumer is not None,
            slots=self._slots,
            in_hand=len(self._in_hand),
            uploaded_bytes=self._uploaded_bytes,
            downloaded_bytes=self._models.downloaded_bytes,
        )

    def request_stop(self, reason: str = "it was asked to stop") -> None:
        """Finish what is in hand, take nothing new: `run` returns within `grace_s`."""
        self._reason = self._reason or reason
        self._stopping.set()

    async def run(self) -> int:
        """Work until `request_stop`, or until it is idle: how many tasks were answered.

        Raises `BrokerError` when the broker goes away or does not let us.
        """
        try:
            await self._run()
        except ExceptionGroup as group:
            exc = leaf(group)
            raise exc from exc.__cause__ or group
        finally:
            for job in self._in_hand.values():
                job.context.cancel()
            with contextlib.suppress(BrokerError):
                await self._models.close()
        self._tell(o.WorkerDone(tasks=self._tasks_done, reason=self._reason, given_back=self._given_back))
        return self._tasks_done

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            work: list[Coroutine[Any, Any, None]] = [
                self._bus.closed(),
                self._subscribe(),
                self._end_when_idle(),
                *(self._work(f"fedbus-slot-{number}") for number in range(self._slots)),
            ]
            tasks = [group.create_task(coroutine) for coroutine in work]
            await self._stopping.wait()
            await self._finish()
            for task in tasks:
                task.cancel()

    async def _finish(self) -> None:
        while not self._waiting.empty():
            del self._in_hand[self._waiting.get_nowait().task.task_id]
            self._given_back += 1
            self._note_settled()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace_s):
                await self._at_rest.wait()
        self._given_back += len(self._in_hand)

    async def _end_when_idle(self) -> None:
        while self._until_idle_s is not None:
            await self._at_rest.wait()
            try:
                async with asyncio.timeout(self._until_idle_s):
                    await self._at_work.wait()
            except TimeoutError:
                self.request_stop(f"no task came for {self._until_idle_s:g} s")
                return

    def _tell(self, event: object) -> None:
        for observe in self._observers:
            observe(event)

    # ---- tasks come ----------------------------------------------------------------------------------------------

    async def _subscribe(self) -> None:
        """Consume the queue as soon as there is one, and again when there is one again."""
        while True:
            try:
                async with self._bus.consume(WORK, prefetch=self._slots) as consumer:
                    self._consumer, self._has_told_of_waiting = consumer, False
                    await self._receive(consumer)
            except QueueMissing:
                self._consumer = None
                if not self._has_told_of_waiting:
                    self._has_told_of_waiting = True
                    self._tell(o.WorkAwaited())
            await asyncio.sleep(_ASK_EVERY_S * random.uniform(0.5, 1.0))

    async def _receive(self, consumer: Consumer) -> None:
        async for delivery in consumer:
            if self._stopping.is_set():
                continue  # it goes back with the end of the subscription
            try:
                self._take(consumer, delivery)
            except DecodeError as exc:
                self._tell(o.MessageRejected(queue=WORK, reason=str(exc)))
                await consumer.reject(delivery, requeue=False)

    def _take(self, consumer: Consumer, delivery: Delivery) -> None:
        task = decode(delivery.body)
        if not isinstance(task, m.Task):
            raise DecodeError(f"a {type(task).__name__} does not belong here")
        known = self._in_hand.get(task.task_id)
        if known is not None:
            known.merge(task, consumer, delivery)
            return
        job = _Job(task=task, context=_context_of(delivery), consumer=consumer, deliveries=[delivery])
        self._in_hand[task.task_id] = job
        self._waiting.put_nowait(job)
        self._unsettled += 1
        self._at_rest.clear()
        self._at_work.set()

    def _note_settled(self) -> None:
        self._unsettled -= 1
        if not self._unsettled:
            self._at_work.clear()
            self._at_rest.set()

    # ---- tasks are answered --------------------------------------------------------------------------------------

    async def _work(self, name: str) -> None:
        """One slot: one task after the other, the user's code always in the same thread."""
        caller = UserThread(name)
        try:
            while True:
                job = await self._waiting.get()
                await self._answer(job, caller)
                del self._in_hand[job.task.task_id]  # a copy that comes from now on is a question of its own
                if job.consumer is self._consumer:  # else the queue was deleted, and the task with it
                    await job.consumer.ack(*job.deliveries)
                self._note_settled()
                del job
        finally:
            caller.close()

    async def _answer(self, job: _Job, caller: Caller) -> None:
        kind, round_, started_at = kind_of(job.task), round_of(job.task), now()
        try:
            if await self._is_unwanted(job):
                return
            self._tell(o.TaskStarted(client_id=job.client_id, kind=kind, round=round_))
            await self._carry_out(job, UserCode(self._app, job.context, caller))
        except (ClientCodeError, ConfigError, BrokerError) as exc:
            if isinstance(exc, BrokerClosed):
                raise
            self._tell(o.TaskErred(client_id=job.client_id, kind=kind, round=round_, reason=str(exc)))
            await self._report_failure(job, str(exc))
        else:
            self._tasks_done += 1
            seconds = now() - started_at
            self._tell(o.TaskCompleted(client_id=job.client_id, kind=kind, round=round_, seconds=seconds))

    async def _is_unwanted(self, job: _Job) -> bool:
        task = job.task
        reason = None if isinstance(task, m.ParametersTask) else await self._horizon.why_unwanted(task)
        if reason is None:
            return False
        self._tell(o.TaskCancelled(client_id=job.client_id, round=round_of(task), reason=one_line(reason)))
        await self._report_failure(job, reason)
        return True

    async def _carry_out(self, job: _Job, code: UserCode) -> None:
        match job.task:
            case m.ParametersTask() as task:
                await self._upload(job, task, await code.parameters())
            case m.FitTask() as task:
                await code.make()
                await self._upload(job, task, await code.answer(task, await self._model_of(job), {}))
            case m.EvaluateTask() as task:
                await code.make()
                result = await code.evaluate(await self._model_of(job), task.config, {})
                await self._bus.publish(CONTROL, job.client_id, encode(report_of(job.client_id, task, result)))

    async def _model_of(self, job: _Job) -> Tensors:
        assert not isinstance(job.task, m.ParametersTask)
        return await self._models.read(place_of(job.task))  # a newer copy of the task may know a newer place

    async def _upload(self, job: _Job, task: m.ParametersTask | m.FitTask, trained: Trained) -> None:
        upload = Upload(
            client_id=job.client_id,
            task=task,
            outgoing=trained.outgoing,
            num_examples=trained.num_examples,
            metrics=trained.metrics,
        )
        async with self._one_upload:
            await upload.send(self._bus, self._note_sent)

    def _note_sent(self, nbytes: int) -> None:
        self._uploaded_bytes += nbytes

    async def _report_failure(self, job: _Job, reason: str) -> None:
        failed = m.TaskFailed(
            client_id=job.client_id, task_id=job.task.task_id, run_id=job.task.run_id, reason=reason[:1000]
        )
        await self._bus.publish(CONTROL, job.client_id, encode(failed))


def _context_of(delivery: Delivery) -> ClientContext:
    """Whom the task is for: its routing key says so. Raises `DecodeError`."""
    parts = parse_virtual_id(delivery.routing_key)
    if parts is None:
        raise DecodeError(f"{delivery.routing_key[:80]!r} is no virtual client")
    partition, num_partitions = parts
    return ClientContext(client_id=delivery.routing_key, partition=partition, num_partitions=num_partitions)

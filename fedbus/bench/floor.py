"""The floor under a round: bare aiormq moves the same bytes through the same kinds of queues.

    server ──> stream          the model in parts of 1 MiB, each confirm awaited before the next part
    server ──> N classic       a small task for each client, once the model is confirmed
    client ──> one quorum      its update in parts of 1 MiB, 16 unconfirmed at a time; the server folds them

Everything is persistent and confirmed, and updates are acknowledged after their round. No fedbus code takes part, and
what a federation needs beyond that is left out: no joining, no checks, no schema, nothing written to a disk but by the
broker. Clients send the model back as they got it, so
the mean of their updates is the model again, and the server looks whether it is.

There are two of them. The plain floor is what one writes first: a client subscribes to the stream when it has its
task, at the offset that the task names. In the tight one its subscription stays open from the first round to the last,
and it reads a model before it is asked to.

    python -m fedbus.bench.floor URL CLIENTS MODEL_BYTES ROUNDS plain|tight

prints a JSON list, the seconds from the begin of each round to the begin of the next. It ends early, with its queues
deleted, when its stdin does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeAlias

import aiormq
import numpy as np
from aiormq.abc import AbstractChannel, DeliveredMessage

from fedbus.bench import loop

Array: TypeAlias = np.ndarray[Any, Any]

PART_BYTES: Final = 1 << 20
_WINDOW: Final = 16
_PREFETCH: Final = 8
_PERSISTENT: Final = 2


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be moved, and under which names: `prefix` is this run's own, so that a broker may be shared."""

    url: str
    clients: int
    model_bytes: int
    rounds: int
    is_tight: bool = False
    prefix: str = field(default_factory=lambda: f"fedbus.floor.{uuid.uuid4().hex[:8]}")

    def arguments(self) -> tuple[str, ...]:
        """For this module's command line."""
        kind = "tight" if self.is_tight else "plain"
        return str(self.clients), str(self.model_bytes), str(self.rounds), kind

    def environment(self) -> dict[str, str]:
        """For its process: command lines are for everybody to see, and the URL holds the password."""
        return {**os.environ, "FEDBUS_BROKER": self.url}

    @property
    def parts(self) -> int:
        return -(-self.model_bytes // PART_BYTES)

    @property
    def model(self) -> str:
        return f"{self.prefix}.model"

    @property
    def updates(self) -> str:
        return f"{self.prefix}.updates"

    @property
    def joins(self) -> str:
        return f"{self.prefix}.joins"

    def inbox(self, number: int) -> str:
        return f"{self.prefix}.inbox.{number}"


class _Link:
    """Two connections, one to publish and one to consume, as fedbus has them."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        self._consuming = await aiormq.connect(self._url)
        self._publishing = await aiormq.connect(self._url)
        self._publisher = await self._publishing.channel(publisher_confirms=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._publishing.close()
        await self._consuming.close()

    async def channel(self, prefetch: int) -> AbstractChannel:
        channel = await self._consuming.channel(publisher_confirms=False)
        await channel.basic_qos(prefetch_count=prefetch)
        return channel

    async def publish(self, queue: str, body: bytes | memoryview, part: int | None = None) -> None:
        """Publish, with the number of what it is part of, and wait for the confirm."""
        await self._publisher.basic_publish(
            body,  # type: ignore[arg-type]  # annotated bytes; a flat memoryview serves as well
            routing_key=queue,
            properties=aiormq.spec.Basic.Properties(
                delivery_mode=_PERSISTENT, headers=None if part is None else {"part": part}
            ),
        )


# ---- a client --------------------------------------------------------------------------------------------------------


class _Client:
    def __init__(self, job: Job, number: int) -> None:
        self._job = job
        self._number = number
        self._model: list[bytes] = []
        self._tasks: asyncio.Queue[tuple[int, int]] = asyncio.Queue()  # round, and where its model begins, or before
        self._round = 0
        self._has_model = asyncio.Event()

    async def run(self) -> None:
        async with _Link(self._job.url) as self._link:
            self._inbox = await self._link.channel(1)
            await self._inbox.basic_consume(self._job.inbox(self._number), self._on_task)
            self._stream = await self._link.channel(_PREFETCH)
            if self._job.is_tight:
                await self._subscribe("first")
            await self._link.publish(self._job.joins, b"")
            while True:  # until it is ended by a signal
                self._round, offset = await self._tasks.get()
                tag = None if self._job.is_tight else await self._subscribe(offset)
                await self._has_model.wait()
                self._has_model.clear()
                model, self._model = self._model, []
                if tag is not None:
                    await self._stream.basic_cancel(tag)
                await self._upload(model)

    async def _subscribe(self, offset: int | str) -> str | None:
        consuming = await self._stream.basic_consume(
            self._job.model, self._on_part, arguments={"x-stream-offset": offset}
        )
        return consuming.consumer_tag

    async def _on_task(self, message: DeliveredMessage) -> None:
        round_, offset = message.body.split()
        self._tasks.put_nowait((int(round_), int(offset)))
        await self._inbox.basic_ack(_tag(message), wait=False)

    async def _on_part(self, message: DeliveredMessage) -> None:
        headers = message.header.properties.headers
        assert headers is not None
        if self._job.is_tight or int(str(headers["part"])) == self._round:  # a model before it may come first
            self._model.append(message.body)
        if len(self._model) == self._job.parts:
            self._has_model.set()
        await self._stream.basic_ack(_tag(message), wait=False)

    async def _upload(self, model: list[bytes]) -> None:
        slots = asyncio.Semaphore(_WINDOW)

        async def send(index: int, part: bytes) -> None:
            async with slots:
                await self._link.publish(self._job.updates, part, index)

        await asyncio.gather(*(send(index, part) for index, part in enumerate(model)))


# ---- the server ------------------------------------------------------------------------------------------------------


class _Server:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._joined = asyncio.Semaphore(0)
        self._folded = asyncio.Event()
        self._arrived = 0
        self._last_tag = 0
        self._round_number = 0
        self._offset = 0  # of the round's model, or before it: the stream leaves gaps
        self._first: Array = np.random.default_rng(0).standard_normal(job.model_bytes // 4, np.float32)
        self._model: Array = self._first.copy()
        self._mean: Array = np.zeros_like(self._model)
        self._scratch = np.empty(PART_BYTES // 4, np.float32)

    async def run(self) -> list[float]:
        job = self._job
        began_at = []
        async with _Link(job.url) as self._link:
            updates = await self._link.channel(0)  # no bound: all parts stay unacknowledged until the round's end
            await updates.basic_consume(job.updates, self._on_part)
            joins = await self._link.channel(0)
            await joins.basic_consume(job.joins, self._on_join, no_ack=True)
            for _ in range(job.clients):
                await self._joined.acquire()
            for _ in range(job.rounds):
                began_at.append(time.perf_counter())
                await self._round(updates)
            began_at.append(time.perf_counter())
        if not np.allclose(self._model, self._first, rtol=1e-3, atol=1e-4):
            raise RuntimeError("the mean of the updates is not the model that the clients sent back")
        return [later - earlier for earlier, later in itertools.pairwise(began_at)]

    async def _round(self, updates: AbstractChannel) -> None:
        model = self._model.data.cast("B")
        for start in range(0, model.nbytes, PART_BYTES):
            await self._link.publish(self._job.model, model[start : start + PART_BYTES], self._round_number)
        task = b"%d %d" % (self._round_number, self._offset)
        tasks = asyncio.ensure_future(self._to_all(task))  # its confirms come while the clients are at work
        await self._folded.wait()
        self._folded.clear()
        await tasks
        self._arrived = 0
        self._round_number += 1
        self._offset += self._job.parts
        self._model, self._mean = self._mean, self._model
        self._mean.fill(0)
        await updates.basic_ack(self._last_tag, multiple=True, wait=False)

    async def _to_all(self, body: bytes) -> None:
        await asyncio.gather(
            *(self._link.publish(self._job.inbox(number), body) for number in range(self._job.clients))
        )

    async def _on_join(self, _: DeliveredMessage) -> None:
        self._joined.release()

    async def _on_part(self, message: DeliveredMessage) -> None:
        headers = message.header.properties.headers
        assert headers is not None
        part = np.frombuffer(message.body, np.float32)
        start = int(str(headers["part"])) * (PART_BYTES // 4)
        weighted = np.multiply(part, 1 / self._job.clients, out=self._scratch[: part.size])
        self._mean[start : start + part.size] += weighted
        self._last_tag = _tag(message)
        self._arrived += 1
        if self._arrived == self._job.clients * self._job.parts:
            self._folded.set()


def _tag(message: DeliveredMessage) -> int:
    assert isinstance(message.delivery, aiormq.spec.Basic.Deliver)
    assert message.delivery.delivery_tag is not None
    return message.delivery.delivery_tag


# ---- queues and processes --------------------------------------------------------------------------------------------


async def declare(job: Job) -> None:
    """Make the queues, of the kinds that a federation has."""
    async with _Link(job.url) as link:
        channel = await link.channel(0)
        versions_bytes = max(4 * job.model_bytes, 256 << 20)
        await channel.queue_declare(
            job.model,
            durable=True,
            arguments={
                "x-queue-type": "stream",
                "x-max-length-bytes": versions_bytes,
                "x-stream-max-segment-size-bytes": versions_bytes // 4,
            },
        )
        await channel.queue_declare(job.updates, durable=True, arguments={"x-queue-type": "quorum"})
        for name in (job.joins, *(job.inbox(number) for number in range(job.clients))):
            await channel.queue_declare(name, durable=True)


async def delete(job: Job) -> None:
    """Delete the queues, whichever of them are there."""
    async with _Link(job.url) as link:
        channel = await link.channel(0)
        for name in (job.model, job.updates, job.joins, *(job.inbox(number) for number in range(job.clients))):
            await channel.queue_delete(name)


async def _while_wanted(work: Coroutine[Any, Any, Any], fds: Sequence[int]) -> Any:
    """Do `work`, cancelled as soon as one of `fds` can be read: the other end of a pipe, or of a process, is gone."""
    task = asyncio.ensure_future(work)
    running = asyncio.get_running_loop()
    for fd in fds:
        running.add_reader(fd, task.cancel)
    try:
        return await task
    finally:
        for fd in fds:
            running.remove_reader(fd)


def _be_client(job: Job, number: int, lifeline: int) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        loop.run(_while_wanted(_Client(job, number).run(), [lifeline]))


def measure(job: Job, lifeline: int) -> list[float]:
    """The seconds of each round, with each client in a process of its own; queues and processes are gone afterwards."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_be_client, args=(job, number, lifeline)) for number in range(job.clients)]
    try:
        loop.run(declare(job))
        for process in processes:
            process.start()
        seconds: list[float] = loop.run(
            _while_wanted(_Server(job).run(), [lifeline, *(process.sentinel for process in processes)])
        )
        return seconds
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()
        loop.run(delete(job))


def main() -> None:
    """Measure what the arguments say."""
    clients, model_bytes, rounds, kind = sys.argv[1:]
    url = os.environ["FEDBUS_BROKER"]
    is_tight = kind == "tight"
    job = Job(url=url, clients=int(clients), model_bytes=int(model_bytes), rounds=int(rounds), is_tight=is_tight)
    print(json.dumps(measure(job, os.dup(0))))  # noqa: T201  # whoever started this process reads it


if __name__ == "__main__":
    main()

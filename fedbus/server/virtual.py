"""The virtual clients of a run: members without a process of their own, whose tasks workers take from one queue.

The server enrols them itself, and they are there as long as it says so: what may die is a worker, and then the broker
gives its task to another. Whatever else clients are told has no reader here and is not sent.

The queue holds each task once, though tasks are repeated after a lost connection and by the next server: all that waits
is taken back before. What workers have in hand at that moment is done twice at the worst, and counts once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Final

from fedbus.bus.base import Bus
from fedbus.bus.topology import JOBS, WORK, MessageQueueKind, work_queue
from fedbus.config import virtual_id
from fedbus.errors import BrokerClosed, BrokerError, ConfigError, QueueMissing, Unroutable
from fedbus.observe import events as o
from fedbus.rounds import events as e
from fedbus.wire import messages as m
from fedbus.wire.codec import encode

_LOGGER = logging.getLogger("fedbus.server")

_MOST: Final = 100_000


class VirtualClients:
    """The clients virtual-00000-of-N, virtual-00001-of-N, ...; a container of their ids.

    Args:
        bus: leads to the queue of work.
        count: N; with 0 there are none, and no queue for them.
        message_queues: the kind of that queue.
        put: takes the events for the engine.
        tell: takes the events for those who watch.
        doubt: called when all their tasks must be given again, for their queue was deleted.
        every_s: seconds between two signs of life, and between two looks for workers.
    """

    def __init__(
        self,
        bus: Bus,
        count: int,
        *,
        message_queues: MessageQueueKind,
        put: Callable[[e.Event], None],
        tell: Callable[[object], None],
        doubt: Callable[[], None],
        every_s: float,
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= _MOST:
            raise ConfigError(f"virtual_clients must be a whole number from 0 to {_MOST}, not {count!r}")
        self._bus = bus
        self._ids = dict.fromkeys(virtual_id(partition, count) for partition in range(count))
        self._topology = work_queue(message_queues)
        self._put = put
        self._tell = tell
        self._doubt = doubt
        self._every_s = every_s

    def __repr__(self) -> str:
        return f"<VirtualClients {len(self)}>"

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._ids

    async def declare(self) -> None:
        """Make their queue; workers wait for it. Raises `QueueMismatch`."""
        if self._ids:
            await self._bus.declare(self._topology)

    async def take_back(self) -> None:
        """Take the tasks out of the queue that no worker has in hand."""
        if self._ids:
            with contextlib.suppress(QueueMissing):  # `watch_workers` makes it anew
                await self._bus.purge(WORK)

    async def send(self, client_id: str, task: m.Task, expires_s: float | None) -> None:
        """Put a task into the queue. Raises `PublishUnconfirmed`."""
        with contextlib.suppress(Unroutable):  # as above; then it is asked for again
            await self._bus.publish(JOBS, client_id, encode(task), expires_s=expires_s)

    async def stay_present(self) -> None:
        """Be members, for ever."""
        while self._ids:
            self._put(e.VirtualClientsHeard(client_ids=tuple(self._ids)))
            await asyncio.sleep(self._every_s)

    async def watch_workers(self) -> None:
        """Tell how many workers there are whenever that changes; see to it that their queue is there."""
        told: int | None = None
        while self._ids:
            workers = await self._count_workers()
            if workers not in (None, told):
                told = workers
                self._tell(o.WorkersCounted(workers=workers))
            await asyncio.sleep(self._every_s)

    async def _count_workers(self) -> int | None:
        try:
            return (await self._bus.queue_state(WORK)).consumers
        except QueueMissing:
            await self._bus.declare(self._topology)
            self._doubt()
            return 0
        except BrokerClosed:
            raise
        except BrokerError as exc:
            _LOGGER.debug("the broker cannot tell how many workers there are", exc_info=exc)
            return None

"""What the client has answered and the server has not yet committed: kept until the receipt, sent again when asked."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from fedbus.bus.base import Bus
from fedbus.bus.topology import CONTROL, UPDATES
from fedbus.types import Metrics
from fedbus.wire import messages as m
from fedbus.wire.codec import encode
from fedbus.wire.transfer import Outgoing, checksum

_PARTS_AT_ONCE: Final = 16
_ASK_EVERY_S: Final = 5.0
_MOST_ENTRIES: Final = 2
"""An update that waits for its receipt, and the next one."""


@dataclass(kw_only=True, eq=False)
class Entry:
    """One update: the tensors stay as they are as long as it is here."""

    task: m.ParametersTask | m.FitTask
    outgoing: Outgoing
    num_examples: int
    metrics: Metrics
    transfer: str = field(default_factory=lambda: uuid.uuid4().hex)
    granted: asyncio.Event = field(default_factory=asyncio.Event)
    is_settled: bool = False

    @property
    def is_large(self) -> bool:
        return isinstance(self.task, m.FitTask) and self.outgoing.nbytes > self.task.eager_bytes


class Outbox:
    """The updates of one client that have no receipt yet."""

    def __init__(self, bus: Bus, client_id: str, jitter: random.Random | None = None) -> None:
        self._bus = bus
        self._client_id = client_id
        self._jitter = jitter or random.Random()
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Outbox {list(self._entries)}>"

    def get(self, task_id: str) -> Entry | None:
        """The update for this task, while it has no receipt."""
        return self._entries.get(task_id)

    def keep(self, entry: Entry) -> None:
        """Take an update in. The oldest goes when there are too many: its sender was given new work, so it has come."""
        self._entries[entry.task.task_id] = entry
        while len(self._entries) > _MOST_ENTRIES:
            self.settle(next(iter(self._entries)))

    def settle(self, task_id: str) -> None:
        """The server has decided about this update: let it go."""
        entry = self._entries.pop(task_id, None)
        if entry is not None:
            entry.is_settled = True
            entry.granted.set()

    def clear(self) -> None:
        """Nobody waits for any of it."""
        for task_id in list(self._entries):
            self.settle(task_id)

    def grant(self, task_id: str) -> None:
        """The server has room for this update now."""
        entry = self._entries.get(task_id)
        if entry is not None:
            entry.granted.set()

    async def deliver(self, entry: Entry) -> None:
        """Send an update, a large one once the server has room for it; it is with the broker after that.

        Sending it again is the same transfer again: the parts that came are recognised. Raises `ConfigError` when it
        cannot travel, `BrokerError`.
        """
        if entry.is_large:
            await self._ask(entry)
        head = encode(self._message(entry, 0))
        indices = iter(range(entry.outgoing.parts))

        async def send_next() -> None:
            for index in indices:
                if entry.is_settled:
                    return
                body = encode(self._message(entry, index)) if index else head
                await self._bus.publish(UPDATES, self._client_id, body)

        # Each takes the next part when its last is confirmed: sent in order, the head first.
        at_once = min(_PARTS_AT_ONCE, entry.outgoing.parts)
        sending = [asyncio.ensure_future(send_next()) for _ in range(at_once)]
        try:
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()

    async def _ask(self, entry: Entry) -> None:
        entry.granted.clear()
        request = encode(
            m.UploadRequest(
                client_id=self._client_id,
                task_id=entry.task.task_id,
                run_id=entry.task.run_id,
                nbytes=entry.outgoing.nbytes,
            )
        )
        while not (entry.granted.is_set() or entry.is_settled):
            await self._bus.publish(CONTROL, self._client_id, request, expires_s=4 * _ASK_EVERY_S)
            try:
                async with asyncio.timeout(_ASK_EVERY_S * self._jitter.uniform(0.8, 1.2)):
                    await entry.granted.wait()
            except TimeoutError:
                continue  # the question or the answer may be lost

    def _message(self, entry: Entry, index: int) -> m.Update | m.Part:
        outgoing = entry.outgoing
        buffers = outgoing.part(index)
        if index > 0:
            return m.Part(transfer=entry.transfer, index=index, checksum=checksum(buffers), payload=buffers)
        return m.Update(
            client_id=self._client_id,
            task_id=entry.task.task_id,
            run_id=entry.task.run_id,
            transfer=entry.transfer,
            version=entry.task.version if isinstance(entry.task, m.FitTask) else 0,
            num_examples=entry.num_examples,
            metrics=entry.metrics,
            schema=outgoing.schema,
            part_bytes=outgoing.part_bytes,
            checksum=checksum(buffers),
            payload=buffers,
        )

"""What the client has answered and the server has not yet committed: kept until the receipt, sent again when asked."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from fedbus.bus.base import Bus
from fedbus.bus.topology import CONTROL
from fedbus.client.upload import Upload
from fedbus.wire import messages as m
from fedbus.wire.codec import encode

_ASK_EVERY_S: Final = 5.0
_MOST_ENTRIES: Final = 2
"""An update that waits for its receipt, and the next one."""


@dataclass(kw_only=True, eq=False)
class Entry(Upload):
    """An update until its receipt; a large one is sent once it is `granted`."""

    granted: asyncio.Event = field(default_factory=asyncio.Event)

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
        self.uploaded_bytes = 0
        """Of all messages that the broker confirmed."""

    def __repr__(self) -> str:
        return f"<Outbox {list(self._entries)}>"

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Payload bytes of what is kept."""
        return sum(entry.outgoing.nbytes for entry in self._entries.values())

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
        await entry.send(self._bus, self._note_uploaded)

    def _note_uploaded(self, nbytes: int) -> None:
        self.uploaded_bytes += nbytes

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

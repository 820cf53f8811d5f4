"""An update on its way to the server: a head and further parts, sent in order, each confirmed by the broker."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fedbus.bus.base import Bus
from fedbus.bus.topology import UPDATES
from fedbus.types import Metrics
from fedbus.wire import messages as m
from fedbus.wire.codec import encode
from fedbus.wire.transfer import Outgoing, checksum

_PARTS_AT_ONCE: Final = 16


@dataclass(kw_only=True, eq=False)
class Upload:
    """One update, or initial model, of `client_id`: the tensors stay as they are as long as it is here.

    `is_settled`: nobody waits for it any more; what is not sent by then need not be.
    """

    client_id: str
    task: m.ParametersTask | m.FitTask
    outgoing: Outgoing
    num_examples: int
    metrics: Metrics
    transfer: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_settled: bool = False

    async def send(self, bus: Bus, note_sent: Callable[[int], None] = lambda _: None) -> None:
        """Send all parts; they are with the broker after that. `note_sent` is told the bytes of each, once confirmed.

        Sending it again is the same transfer again: the parts that came are recognised. Raises `ConfigError` when it
        cannot travel, `BrokerError`.
        """
        head = encode(self.message(0))
        indices = iter(range(self.outgoing.parts))

        async def send_next() -> None:
            for index in indices:
                if self.is_settled:
                    return
                body = encode(self.message(index)) if index else head
                await bus.publish(UPDATES, self.client_id, body)
                note_sent(len(body))

        # Each takes the next part when its last is confirmed: sent in order, the head first.
        at_once = min(_PARTS_AT_ONCE, self.outgoing.parts)
        sending = [asyncio.ensure_future(send_next()) for _ in range(at_once)]
        try:
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()

    def message(self, index: int) -> m.Update | m.Part:
        """Part `index`; the head is part 0."""
        outgoing = self.outgoing
        buffers = outgoing.part(index)
        if index > 0:
            return m.Part(transfer=self.transfer, index=index, checksum=checksum(buffers), payload=buffers)
        return m.Update(
            client_id=self.client_id,
            task_id=self.task.task_id,
            run_id=self.task.run_id,
            transfer=self.transfer,
            version=self.task.version if isinstance(self.task, m.FitTask) else 0,
            num_examples=self.num_examples,
            metrics=self.metrics,
            schema=outgoing.schema,
            part_bytes=outgoing.part_bytes,
            checksum=checksum(buffers),
            payload=buffers,
            codec=outgoing.codec.text,
        )

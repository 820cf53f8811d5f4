"""The model stream, as a client reads it: one version by its offset, the last one kept."""

from __future__ import annotations

import asyncio

from fedbus.bus.base import Bus, Consumer
from fedbus.bus.topology import MODEL
from fedbus.errors import BrokerError, DecodeError, QueueMissing
from fedbus.types import Array
from fedbus.wire.codec import decode
from fedbus.wire.messages import Message, Model, Part
from fedbus.wire.transfer import Assembly

_PREFETCH = 8
_SILENCE_S = 60.0


class ModelReader:
    """Fetches model versions; fitting and evaluating the same version transfers it once."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._key: tuple[str, int] | None = None
        self._model: dict[str, Array] = {}

    async def read(self, run_id: str, version: int, offset: int) -> dict[str, Array]:
        """The tensors of `version`, read-only. Raises `BrokerError` when they are not to be had there."""
        if self._key != (run_id, version):
            self._key, self._model = None, {}  # one model in memory, not two
            try:
                self._model = await self._fetch(run_id, version, offset)
            except DecodeError as exc:
                raise BrokerError(f"model {version} cannot be read from the stream: {exc}") from exc
            self._key = (run_id, version)
        return self._model

    async def _fetch(self, run_id: str, version: int, offset: int) -> dict[str, Array]:
        async with self._bus.consume(MODEL, prefetch=_PREFETCH, offset=offset) as consumer:
            head = await self._next(consumer, version, offset)
            # RabbitMQ clamps an offset that retention has dropped, without a word.
            if not isinstance(head, Model) or (head.run_id, head.version) != (run_id, version):
                raise QueueMissing(f"model {version} is no longer in the stream")
            assembly = Assembly(head.schema, head.part_bytes)
            assembly.add(0, head.crc32, head.payload)
            while assembly.missing:
                part = await self._next(consumer, version, offset)
                if not isinstance(part, Part) or part.transfer != head.transfer:
                    raise QueueMissing(f"model {version} is not whole in the stream")
                assembly.add(part.index, part.crc32, part.payload)
        return assembly.tensors()

    async def _next(self, consumer: Consumer, version: int, offset: int) -> Message:
        """The next message at `offset` or behind it: a chunk may begin before, and offsets leave gaps."""
        try:
            async with asyncio.timeout(_SILENCE_S):
                while True:
                    delivery = await consumer.receive()
                    await consumer.ack(delivery)
                    if delivery.offset is not None and delivery.offset >= offset:
                        return decode(delivery.body)
        except TimeoutError:
            raise QueueMissing(f"model {version} did not come from the stream within {_SILENCE_S:.0f} s") from None

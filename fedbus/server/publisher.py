"""The model stream, as its only writer sees it: versions go in, their offsets are known."""

from __future__ import annotations

import asyncio

from fedbus.bus.base import Bus
from fedbus.bus.topology import MODEL, model_stream
from fedbus.errors import DecodeError, QueueMismatch, QueueMissing
from fedbus.types import Tensors
from fedbus.wire.arrays import pack
from fedbus.wire.codec import decode, encode
from fedbus.wire.messages import Model, Part
from fedbus.wire.transfer import PART_BYTES, crc32, cut


class ModelPublisher:
    """Writes model versions into the stream, each once, however many clients read it.

    Publishers are not told offsets, and offsets are not consecutive (RabbitMQ takes one for itself whenever a segment
    of the stream is full). So the end of the stream is read back, after each version and off its way: where it ended
    is where the next version begins, or a gap before it.
    """

    def __init__(self, bus: Bus, *, run_id: str, epoch: int) -> None:
        self._bus = bus
        self._run_id = run_id
        self._epoch = epoch
        self._next_offset: int | None = None
        self._last: tuple[str, int] | None = None  # transfer and index of the part published last
        self._is_declared = False

    async def publish(self, model: Tensors, version: int) -> tuple[int, int, int]:
        """Publish `version`; where to begin to read for it, its parts and its payload bytes.

        The first message at that offset or behind it is the version's head.
        """
        schema, payload = await asyncio.to_thread(pack, model)
        if not self._is_declared:
            await self._declare(payload.nbytes)
        if self._last is not None:
            await self.find_end()
        head, *rest = cut(payload)
        message = Model(
            run_id=self._run_id,
            epoch=self._epoch,
            version=version,
            schema=schema,
            part_bytes=PART_BYTES,
            crc32=crc32(head),
            payload=head,
        )
        # One confirm awaited per part: then each message is a chunk of its own, which readers fetch one by one.
        await self._bus.publish(MODEL, "", encode(message))
        if self._next_offset is None:  # only now is there anything of ours to find
            self._next_offset = await self._end_of(message.transfer, 0)
        offset = self._next_offset
        for index, part in enumerate(rest, 1):
            further = Part(transfer=message.transfer, index=index, crc32=crc32(part), payload=part)
            await self._bus.publish(MODEL, "", encode(further))
        self._last = (message.transfer, len(rest))
        return offset, 1 + len(rest), payload.nbytes

    async def find_end(self) -> None:
        """Learn where the stream ends now, unless that is known: it can wait until the version is on its way."""
        if self._last is not None:
            self._next_offset = await self._end_of(*self._last) + 1
            self._last = None

    async def _declare(self, model_bytes: int) -> None:
        topology = model_stream(model_bytes)
        try:
            await self._bus.declare(topology)
        except QueueMismatch:
            # The stream of an earlier run with a model of another size; its versions are of no use to anybody.
            await self._bus.delete_queue(MODEL)
            await self._bus.declare(topology)
        self._is_declared = True

    async def _end_of(self, transfer: str, index: int) -> int:
        """The offset of the part that was published last."""
        try:
            async with asyncio.timeout(60), self._bus.consume(MODEL, prefetch=1, offset="last") as consumer:
                while True:
                    delivery = await consumer.receive()
                    await consumer.ack(delivery)
                    if _is_part(delivery.body, transfer, index):
                        assert delivery.offset is not None
                        return delivery.offset
        except TimeoutError:
            raise QueueMissing("the model stream was emptied by somebody else: start the run anew") from None


def _is_part(body: bytes, transfer: str, index: int) -> bool:
    try:
        message = decode(body)
    except DecodeError:
        return False
    if isinstance(message, Model):
        return index == 0 and message.transfer == transfer
    return isinstance(message, Part) and (message.transfer, message.index) == (transfer, index)

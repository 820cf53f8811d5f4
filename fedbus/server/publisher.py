"""The model stream, as its only writer sees it: versions go in, readers are told where to begin."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from fedbus.bus.base import Bus
from fedbus.bus.topology import BROADCAST, MODEL, model_stream
from fedbus.errors import DecodeError, QueueMismatch, QueueMissing
from fedbus.types import Tensors
from fedbus.wire.codec import decode, encode
from fedbus.wire.compression import PLAIN, Codec
from fedbus.wire.floats import Noise
from fedbus.wire.messages import Model, Part
from fedbus.wire.transfer import Outgoing, checksum

_LOOK_EVERY_BYTES: Final = 64 << 20
"""How much is published between two looks at where the stream ends."""

_SMALL_BYTES: Final = 4 << 20
"""Models up to here are coded in a few milliseconds."""
_PATIENCE_S: Final = 600.0
"""For the end of the stream to come back to us: the broker may be away meanwhile."""


class Published(NamedTuple):
    """What went into the stream: payload bytes, and those that they stand for."""

    parts: int
    payload_bytes: int
    raw_bytes: int


class ModelPublisher:
    """Writes model versions into the stream, each once, however many clients read it.

    Publishers are not told offsets, and offsets are not consecutive: RabbitMQ takes one for itself whenever a segment
    of the stream is full. So messages are counted, which never gives too much, and the end of the stream is looked up
    now and then. Readers begin at the offset that they are told and skip what is not theirs.

    `versions`: how many the stream keeps at least, for those who read slowly (see `model_stream`). `codec`: how they
    travel; what it does by chance is a function of `seed` and the version, so that a version is always the same.
    """

    def __init__(
        self, bus: Bus, *, run_id: str, epoch: int, versions: int = 4, codec: Codec = PLAIN, seed: int = 0
    ) -> None:
        self._bus = bus
        self._run_id = run_id
        self._epoch = epoch
        self._versions = versions
        self._codec = codec
        self._seed = seed
        self._next_offset: int | None = None  # at least; the true one may lie behind
        self._last: tuple[str, int] | None = None  # transfer and index of the part published last
        self._unseen_bytes = 0
        self._is_declared = False
        self._turn = asyncio.Lock()

    async def publish(self, model: Tensors, version: int, head_out: asyncio.Future[int]) -> Published:
        """Publish `version`.

        `head_out` is given the offset to begin to read at as soon as the first part is there: readers need not wait for
        the last. Versions go in one after the other: the parts of two must never mix.
        """
        async with self._turn:
            return await self._publish(model, version, head_out)

    async def _publish(self, model: Tensors, version: int, head_out: asyncio.Future[int]) -> Published:
        outgoing = await self._coded(model, version)
        if not self._is_declared:
            await self._declare(self._codec.most_bytes(outgoing.schema))
        buffers = outgoing.part(0)
        head = Model(
            run_id=self._run_id,
            epoch=self._epoch,
            version=version,
            schema=outgoing.schema,
            part_bytes=outgoing.part_bytes,
            checksum=checksum(buffers),
            payload=buffers,
            codec=outgoing.codec.text,
        )
        # One confirm awaited per part: then each message is a chunk of its own, which readers fetch one by one.
        await self._bus.publish(BROADCAST, "", encode(head))
        if self._next_offset is None:  # only now is there anything of ours to find
            self._next_offset = await self._end_of(head.transfer, 0)
        head_out.set_result(self._next_offset)
        for index in range(1, outgoing.parts):
            buffers = outgoing.part(index)
            part = Part(transfer=head.transfer, index=index, checksum=checksum(buffers), payload=buffers)
            await self._bus.publish(BROADCAST, "", encode(part))
        self._next_offset += outgoing.parts
        self._unseen_bytes += outgoing.nbytes
        self._last = (head.transfer, outgoing.parts - 1)
        return Published(outgoing.parts, outgoing.nbytes, outgoing.raw_bytes)

    async def _coded(self, model: Tensors, version: int) -> Outgoing:
        def make() -> Outgoing:
            return Outgoing(model, codec=self._codec, noise=Noise("model", self._seed, version))

        if self._codec == PLAIN or sum(value.nbytes for value in model.values()) <= _SMALL_BYTES:
            return make()
        return await asyncio.to_thread(make)

    async def find_end(self) -> None:
        """Look up where the stream ends, when that is due: best while nobody waits."""
        if self._last is not None and self._unseen_bytes >= _LOOK_EVERY_BYTES:
            self._next_offset = await self._end_of(*self._last) + 1
            self._unseen_bytes = 0

    async def _declare(self, model_bytes: int) -> None:
        topology = model_stream(model_bytes, versions=self._versions)
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
            async with asyncio.timeout(_PATIENCE_S), self._bus.consume(MODEL, prefetch=1, offset="last") as consumer:
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

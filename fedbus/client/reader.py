"""The model stream, as a client reads it: one version by its offset, the last one kept."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Final

from fedbus.bus.base import Bus, Consumer, Delivery
from fedbus.bus.topology import MODEL
from fedbus.errors import BrokerError, DecodeError, QueueMissing
from fedbus.types import Array
from fedbus.wire.codec import decode
from fedbus.wire.compression import Codec
from fedbus.wire.messages import Message, Model, Part
from fedbus.wire.transfer import Assembly, part_count

_PREFETCH: Final = 8
_SILENCE_S: Final = 600.0
"""As long as a server may be dead in the middle of a publication, or a broker away."""
_SMALL_BYTES: Final = 4 << 20
"""So much is decoded in a few milliseconds."""
_NEAR: Final = 8
"""Messages that are skipped rather than the subscription made anew."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model is: `version` of run `run_id`, published in `epoch`, at `offset` of the stream or behind."""

    run_id: str
    epoch: int
    version: int
    offset: int

    @property
    def key(self) -> tuple[str, int]:
        """What tells models apart: a version is committed before it is published, so it is the same in each epoch."""
        return self.run_id, self.version


class ModelReader:
    """Fetches model versions, and decodes them; fitting and evaluating the same version transfers it once.

    The subscription of a small model stays open: while it is not acknowledged the broker sends no more than a few parts
    ahead, and the next version is here before its task.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._key: tuple[str, int] | None = None
        self._model: dict[str, Array] = {}
        self._place: Place | None = None
        self._has_moved = False
        self._fetching: asyncio.Task[dict[str, Array]] | None = None
        self._subscription = contextlib.AsyncExitStack()
        self._consumer: Consumer | None = None
        self._unacknowledged: list[Delivery] = []
        self._offset = 0  # of the next message of the subscription
        self._passed: Place | None = None  # the version that it gave last
        self.downloaded_bytes = 0
        """Of all messages of the stream that came."""

    async def read(self, place: Place) -> dict[str, Array]:
        """The tensors at `place`, read-only. Raises `BrokerError` when they are not to be had there."""
        if self._key != place.key:
            self._key, self._model = None, {}  # one model in memory, not two
            self._place = place
            try:
                self._model = await self._fetch_somewhere()
            except DecodeError as exc:
                raise BrokerError(f"model {place.version} cannot be read from the stream: {exc}") from exc
            finally:
                self._place = None
            self._key = place.key
        return self._model

    def move(self, place: Place) -> None:
        """The model that is being read has been published anew, by the next server, for the last one died half-way."""
        if self._place is not None and self._place.key == place.key and self._place.epoch < place.epoch:
            self._place = place
            self._has_moved = self._fetching is not None and self._fetching.cancel()

    async def close(self) -> None:
        """End the subscription."""
        self._consumer = None
        self._unacknowledged = []
        await self._subscription.aclose()

    async def _fetch_somewhere(self) -> dict[str, Array]:
        while True:
            assert self._place is not None
            self._has_moved = False
            self._fetching = asyncio.ensure_future(self._fetch(self._place))
            try:
                return await self._fetching
            except asyncio.CancelledError:
                if not self._has_moved:
                    raise

    async def _fetch(self, place: Place) -> dict[str, Array]:
        try:
            head = await self._find(place)
            assembly = _begun(head)
            while assembly.missing:
                part = await self._next(place)  # one may come twice: its confirm was lost
                if isinstance(part, Model) and part.transfer != head.transfer and _is_at(part, place):
                    head, assembly = part, _begun(part)  # the server died half-way, and the next one begins anew
                    continue
                if not isinstance(part, Model | Part) or part.transfer != head.transfer:
                    raise QueueMissing(f"model {place.version} is not whole in the stream")
                assembly.take(part)
        except BaseException:
            await self.close()
            raise
        if part_count(assembly.nbytes, head.part_bytes) > _PREFETCH:
            await self.close()
        if assembly.layout.rounded and assembly.nbytes > _SMALL_BYTES:
            return await asyncio.to_thread(assembly.tensors)
        return assembly.tensors()

    async def _find(self, place: Place) -> Model:
        """The head at `place`; what lies before it is skipped, of whatever run, epoch or version it is.

        That of a later server serves as well: it is the same version.
        """
        if not self._lies_ahead(place):
            await self.close()
            self._consumer = await self._subscription.enter_async_context(
                self._bus.consume(MODEL, prefetch=_PREFETCH, offset=place.offset)
            )
        while True:
            message = await self._next(place)
            if not isinstance(message, Model):
                continue
            if _is_at(message, place):
                self._passed = place
                return message
            is_of_run = message.run_id == place.run_id and message.epoch >= place.epoch
            if (
                is_of_run and message.version > place.version
            ):  # RabbitMQ clamps an offset that retention has dropped, silently
                raise QueueMissing(f"model {place.version} is no longer in the stream")

    async def _make_room(self, delivery: Delivery) -> None:
        """Acknowledge half of what may be on its way at a time: each word to the broker costs both sides."""
        assert self._consumer is not None
        self._unacknowledged.append(dataclasses.replace(delivery, body=b""))
        if len(self._unacknowledged) >= _PREFETCH // 2:
            unacknowledged, self._unacknowledged = self._unacknowledged, []
            await self._consumer.ack(*unacknowledged)

    def _lies_ahead(self, place: Place) -> bool:
        passed = self._passed
        return (
            self._consumer is not None
            and passed is not None
            and (passed.run_id, passed.epoch) == (place.run_id, place.epoch)
            and passed.version < place.version
            and place.offset <= self._offset + _NEAR
        )

    async def _next(self, place: Place) -> Message:
        assert self._consumer is not None
        try:
            async with asyncio.timeout(_SILENCE_S):
                while True:
                    delivery = await self._consumer.receive()
                    self.downloaded_bytes += len(delivery.body)
                    await self._make_room(delivery)
                    assert delivery.offset is not None
                    if delivery.offset >= place.offset:  # a chunk may begin before
                        self._offset = delivery.offset + 1
                        return decode(delivery.body)
        except TimeoutError:
            raise QueueMissing(
                f"model {place.version} did not come from the stream within {_SILENCE_S:.0f} s"
            ) from None


def _is_at(head: Model, place: Place) -> bool:
    """Whether it is the version that is looked for, published by the server that named the place, or a later one."""
    return (head.run_id, head.version) == place.key and head.epoch >= place.epoch


def _begun(head: Model) -> Assembly:
    assembly = Assembly(head.schema, head.part_bytes, Codec.parse(head.codec))
    assembly.take(head)
    return assembly

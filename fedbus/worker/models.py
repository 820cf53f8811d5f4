"""The model versions that the slots of a worker have in hand: each is fetched once, and kept while one has it."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from fedbus.bus.base import Bus
from fedbus.client.reader import ModelReader, Place
from fedbus.types import Array, Tensors


class _Model(dict[str, Array]):
    """A model that can be referred to weakly."""


class Models:
    """A `ModelReader` that several may ask at a time."""

    def __init__(self, bus: Bus) -> None:
        self._reader = ModelReader(bus)
        self._turn = asyncio.Lock()
        self._in_hand: WeakValueDictionary[tuple[str, int], _Model] = WeakValueDictionary()

    @property
    def downloaded_bytes(self) -> int:
        """Of all messages of the stream that came."""
        return self._reader.downloaded_bytes

    async def read(self, place: Place) -> Tensors:
        """The tensors at `place`, read-only. Raises `BrokerError` when they are not to be had there."""
        model = self._in_hand.get(place.key)
        if model is not None:
            return model
        async with self._turn:
            model = self._in_hand.get(place.key)
            if model is None:
                model = self._in_hand[place.key] = _Model(await self._reader.read(place))
            return model

    async def close(self) -> None:
        """End the subscription."""
        await self._reader.close()

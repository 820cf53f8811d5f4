"""A model or an update as parts of about 1 MiB, cut on one side and put together on the other."""

from __future__ import annotations

import zlib
from typing import Final

import numpy as np

from fedbus.errors import DecodeError
from fedbus.types import Array
from fedbus.wire.arrays import Buffer, Schema, payload_bytes, views
from fedbus.wire.codec import MAX_PART_BYTES

PART_BYTES: Final = 1 << 20
MIN_PART_BYTES: Final = 1 << 16
"""What a receiver takes at the least: bookkeeping per part must not outweigh the parts."""


def crc32(payload: Buffer) -> int:
    """The checksum that every part carries (CRC-32 of ISO 3309): it finds mixed-up parts, not forged ones."""
    return zlib.crc32(payload)


def part_count(total_bytes: int, part_bytes: int) -> int:
    """Parts that a payload of `total_bytes` is cut into: one even when it is empty."""
    return max(1, -(-total_bytes // part_bytes))


def cut(payload: memoryview, part_bytes: int = PART_BYTES) -> list[memoryview]:
    """The parts of `payload`, as views."""
    count = part_count(payload.nbytes, part_bytes)
    return [payload[i * part_bytes : (i + 1) * part_bytes] for i in range(count)]


class Assembly:
    """The receiving end of one transfer: takes parts in any order, each once.

    Memory is the payload once; a transfer of one part is not copied at all. The schema is trusted here, so compare
    it with what is expected before an Assembly is made for it.
    """

    def __init__(self, schema: Schema, part_bytes: int) -> None:
        if not 0 < part_bytes <= MAX_PART_BYTES:
            raise DecodeError(f"parts of {part_bytes} bytes, 1 to {MAX_PART_BYTES} are allowed")
        self._schema = schema
        self._part_bytes = part_bytes
        self._total_bytes = payload_bytes(schema)
        self._missing = set(range(part_count(self._total_bytes, part_bytes)))
        # Untouched memory costs nothing: what was declared is paid for only as it arrives.
        self._whole = None if len(self._missing) == 1 else np.empty(self._total_bytes, np.uint8)
        self._only: Buffer = b""

    @property
    def missing(self) -> int:
        """How many parts are still to come."""
        return len(self._missing)

    def add(self, index: int, checksum: int, payload: Buffer) -> bool:
        """Take one part; False when it was there already. Raises `DecodeError` for a part that cannot be it."""
        start = index * self._part_bytes
        expected = min(self._part_bytes, self._total_bytes - start)
        if expected < 0 or (expected == 0 and index > 0):
            raise DecodeError(f"part {index} lies behind the end of the transfer")
        if len(payload) != expected:
            raise DecodeError(f"part {index} has {len(payload)} bytes, {expected} are due")
        if crc32(payload) != checksum:
            raise DecodeError(f"part {index} fails its checksum")
        if index not in self._missing:
            return False
        self._missing.remove(index)
        if self._whole is None:
            self._only = payload
        else:
            self._whole.data[start : start + expected] = payload
        return True

    def tensors(self) -> dict[str, Array]:
        """The tensors, as read-only views, once no part is missing."""
        assert not self._missing, "parts are missing"
        payload = self._only if self._whole is None else self._whole.data
        return views(self._schema, memoryview(payload).toreadonly())

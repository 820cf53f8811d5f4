"""A model or an update as parts of about 1 MiB: cut on one side without a copy, put together on the other."""

from __future__ import annotations

import bisect
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import xxhash

from fedbus.errors import DecodeError
from fedbus.types import Array, Piece, Tensors
from fedbus.wire.arrays import ALIGN, DTYPES, Buffer, Schema, TensorSpec, offsets, payload_bytes, views
from fedbus.wire.codec import MAX_PART_BYTES
from fedbus.wire.compression import PLAIN, Codec, DecodedTensors, Layout, Walkable, encode
from fedbus.wire.floats import Noise
from fedbus.wire.lossless import most_packed, packed, unpacked
from fedbus.wire.messages import Model, Part, Update

PART_BYTES: Final = 1 << 20
MIN_PART_BYTES: Final = 1 << 16
"""What a receiver takes at the least: bookkeeping per part must not outweigh the parts."""

_Unpack: TypeAlias = Callable[[int, memoryview], memoryview]
"""Takes the number of a part, and what came for it."""

_63_BITS: Final = (1 << 63) - 1


def checksum(buffers: Buffer | Sequence[Buffer]) -> int:
    """The checksum that every part carries: it finds mixed-up and damaged parts, not forged ones.

    XXH3, 64 bits (https://github.com/Cyan4973/xxHash), without the highest, so that it is a msgpack int of ours.
    """
    if isinstance(buffers, bytes | bytearray | memoryview):
        return xxhash.xxh3_64_intdigest(buffers) & _63_BITS
    digest = xxhash.xxh3_64()
    for buffer in buffers:
        digest.update(buffer)
    return digest.intdigest() & _63_BITS


def part_count(total_bytes: int, part_bytes: int) -> int:
    """Parts that a payload of `total_bytes` is cut into: one even when it is empty."""
    return max(1, -(-total_bytes // part_bytes))


class Outgoing:
    """Tensors on their way out: each part is a list of views of the arrays' own memory, or one packed frame.

    The arrays must stay as they are until the last part is sent. Only what is not C-contiguous, or changed by `codec`,
    is copied. A lossy codec takes its chances from `noise`, and adds the `residual` of the last time. Takes long for
    large tensors with a codec. Raises what `compression.encode` raises.
    """

    def __init__(
        self,
        tensors: Tensors,
        part_bytes: int = PART_BYTES,
        *,
        codec: Codec = PLAIN,
        noise: Noise | None = None,
        residual: Tensors | None = None,
    ) -> None:
        encoded = encode(codec, tensors, noise or Noise(), residual)
        layout = encoded.layout
        self.schema = layout.schema
        self.codec = codec
        self.residual = encoded.residual
        """What a codec that leaves things out has left for the next time."""
        self.raw_bytes = payload_bytes(layout.schema)
        """What would travel without a codec."""
        self.part_bytes = part_bytes
        self._unpacked_bytes = self.nbytes = payload_bytes(layout.coded)
        self.parts = part_count(self.nbytes, part_bytes)
        self._buffers: list[memoryview] = []
        self._starts: list[int] = []
        self._packed: list[bytes] = []
        end = 0
        for spec, offset in offsets(layout.coded):
            if offset > end:
                self._append(end, memoryview(bytes(offset - end)))  # padding
            flat = np.ascontiguousarray(encoded.tensors[spec.name]).reshape(-1).view(np.uint8)
            self._append(offset, flat.data)
            end = offset + spec.nbytes
        if codec.level is not None:
            self._pack(layout.stride, codec.level)

    def _pack(self, stride: int, level: int) -> None:
        self._packed = [packed(b"".join(self.part(index)), stride, level) for index in range(self.parts)]
        self._buffers, self._starts = [], []
        self.nbytes = sum(map(len, self._packed))

    def _append(self, start: int, buffer: memoryview) -> None:
        if buffer.nbytes:
            self._starts.append(start)
            self._buffers.append(buffer)

    def part(self, index: int) -> list[memoryview]:
        """The buffers that make up part `index`, in their order."""
        if self._packed:
            return [memoryview(self._packed[index])]
        begin = index * self.part_bytes
        end = min(begin + self.part_bytes, self._unpacked_bytes)
        found = []
        for i in range(max(0, bisect.bisect_right(self._starts, begin) - 1), len(self._starts)):
            start, buffer = self._starts[i], self._buffers[i]
            if start >= end:
                break
            found.append(buffer[max(0, begin - start) : end - start])
        return found


class _Incoming:
    """What both kinds of receiver check of each part."""

    def __init__(self, schema: Schema, part_bytes: int, codec: Codec = PLAIN) -> None:
        if not 0 < part_bytes <= MAX_PART_BYTES:
            raise DecodeError(f"parts of {part_bytes} bytes, 1 to {MAX_PART_BYTES} are allowed")
        self.layout = Layout(codec, schema)
        self._part_bytes = part_bytes
        self.nbytes = payload_bytes(self.layout.coded)
        """Of the payload, unpacked."""
        self.received_bytes = 0
        """Payload bytes that are here, as they came."""
        self._missing = set(range(part_count(self.nbytes, part_bytes)))

    @property
    def missing(self) -> int:
        """How many parts are still to come."""
        return len(self._missing)

    def take(self, message: Update | Model | Part) -> bool:
        """Take one part; False when it was there already. Raises `DecodeError` for a part that cannot be it."""
        index = message.index if isinstance(message, Part) else 0
        payload = message.payload
        assert isinstance(payload, memoryview), "only what was decoded can be taken"
        due = self._due(index)
        if due < 0 or (due == 0 and index > 0):
            raise DecodeError(f"part {index} lies behind the end of the transfer")
        is_packed = self.layout.codec.level is not None
        if (len(payload) > most_packed(due)) if is_packed else (len(payload) != due):
            raise DecodeError(f"part {index} has {len(payload)} bytes, {due} are due")
        if index not in self._missing:
            return False
        if checksum(payload) != message.checksum:
            raise DecodeError(f"part {index} fails its checksum")
        self._store(index, payload)
        self._missing.remove(index)
        self.received_bytes += len(payload)
        return True

    def _due(self, index: int) -> int:
        """Bytes of part `index`, unpacked."""
        return min(self._part_bytes, self.nbytes - index * self._part_bytes)

    def _unpacked(self, index: int, payload: memoryview) -> memoryview:
        if self.layout.codec.level is None:
            return payload
        return unpacked(payload, self._due(index), self.layout.stride)

    def _store(self, index: int, payload: memoryview) -> None:
        raise NotImplementedError


class Assembly(_Incoming):
    """The receiving end of a transfer whose tensors are wanted whole: takes parts in any order, each once.

    Memory is the payload once, and the tensors that a lossy codec makes of it; a transfer of one part without a codec
    is not copied at all. The schema is trusted here, so compare it with what is expected before an Assembly is made
    for it.
    """

    def __init__(self, schema: Schema, part_bytes: int, codec: Codec = PLAIN) -> None:
        super().__init__(schema, part_bytes, codec)
        # Untouched memory costs nothing: what was declared is paid for only as it arrives.
        self._whole = None if len(self._missing) == 1 else np.empty(self.nbytes, np.uint8)
        self._only: Buffer = b""

    def _store(self, index: int, payload: memoryview) -> None:
        payload = self._unpacked(index, payload)
        if self._whole is None:
            self._only = payload
        else:
            start = index * self._part_bytes
            self._whole.data[start : start + len(payload)] = payload

    def tensors(self) -> dict[str, Array]:
        """The tensors, as read-only arrays, once no part is missing; takes long for large ones with a lossy codec."""
        assert not self._missing, "parts are missing"
        payload = self._only if self._whole is None else self._whole.data
        coded = views(self.layout.coded, memoryview(payload).toreadonly())
        return dict(DecodedTensors(coded, self.layout)) if self.layout.rounded else coded


class PartedAssembly(_Incoming):
    """The receiving end of a transfer that is read once, piece by piece: parts are kept as they came, never copied.

    The schema is trusted here, too.
    """

    def __init__(self, schema: Schema, part_bytes: int, codec: Codec = PLAIN) -> None:
        super().__init__(schema, part_bytes, codec)
        if part_bytes % ALIGN:
            raise DecodeError(
                f"parts of {part_bytes} bytes: a multiple of {ALIGN} is due, so that none cuts a number in two"
            )
        self._tensors = PartedTensors(self.layout.coded, part_bytes, self._unpacked)

    def _store(self, index: int, payload: memoryview) -> None:
        self._tensors._parts[index] = payload
        self._tensors._raw(index)  # raises for what cannot be unpacked

    def pieces_of(self, message: Update | Part) -> Iterator[Piece]:
        """The runs of elements that one part holds; of what travels, where a codec makes that of the tensors."""
        yield from self._tensors._pieces_of(message.index if isinstance(message, Part) else 0)
        self._tensors._last_raw = None

    def tensors(self) -> PartedTensors:
        """What travelled, once no part is missing."""
        assert not self._missing, "parts are missing"
        return self._tensors


class PartedTensors(Walkable):
    """Tensors that lie in the parts they came in.

    `pieces` is the cheap way to read them, once: it lets go of each part as soon as it is behind it; `peek` lets go of
    none. As a mapping it gives whole, read-only tensors, put together when they are asked for.
    """

    def __init__(self, schema: Schema, part_bytes: int, unpack: _Unpack = lambda index, payload: payload) -> None:
        self._part_bytes = part_bytes
        self._unpack = unpack
        self._last_raw: tuple[memoryview, memoryview] | None = None
        """The part that is being read, as it came and unpacked."""
        self._payload_bytes = self.nbytes = payload_bytes(schema)
        self._parts: list[memoryview | None] = [None] * part_count(self.nbytes, part_bytes)
        self._shared = len(self._parts)  # the first part that others need, too
        self._lay_out(list(offsets(schema)))

    def _lay_out(self, layout: list[tuple[TensorSpec, int]]) -> None:
        self._layout = layout
        self._specs = {spec.name: (spec, offset) for spec, offset in layout}
        self._starts = [offset for _, offset in layout]

    def split(self, prefix: str) -> tuple[PartedTensors, PartedTensors]:
        """Those whose names do not begin with `prefix`, and behind them those that do, by their names without it.

        The parts are the same ones: `pieces` of the first are to be walked before those of the second.
        """
        first = next((i for i, (spec, _) in enumerate(self._layout) if spec.name.startswith(prefix)), len(self._layout))
        own, others = copy.copy(self), copy.copy(self)
        own._lay_out(self._layout[:first])
        behind = self._layout[first:]
        assert all(spec.name.startswith(prefix) for spec, _ in behind), "those with the prefix come last"
        others._lay_out(
            [(dataclasses.replace(spec, name=spec.name.removeprefix(prefix)), offset) for spec, offset in behind]
        )
        if behind:
            own._shared = behind[0][1] // self._part_bytes
        for view in (own, others):
            view.nbytes = sum(spec.nbytes for spec, _ in view._layout)
        return own, others

    def __repr__(self) -> str:
        return f"<PartedTensors {len(self._layout)} tensors, {self.nbytes} bytes>"

    def __len__(self) -> int:
        return len(self._layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __getitem__(self, name: str) -> Array:
        spec, offset = self._specs[name]
        first, last = offset // self._part_bytes, max(offset, offset + spec.nbytes - 1) // self._part_bytes
        if first == last or not spec.nbytes:
            raw = self._bytes_of(first, offset, offset + spec.nbytes) if spec.nbytes else memoryview(b"")
        else:
            whole = np.empty(spec.nbytes, np.uint8)
            for index in range(first, last + 1):
                begin = max(offset, index * self._part_bytes)
                part = self._bytes_of(index, begin, min(offset + spec.nbytes, (index + 1) * self._part_bytes))
                whole.data[begin - offset : begin - offset + len(part)] = part
            raw = whole.data.toreadonly()
        self._last_raw = None
        flat = np.frombuffer(raw, DTYPES[spec.dtype]) if spec.nbytes else np.empty(0, DTYPES[spec.dtype])
        return flat.reshape(spec.shape)

    def pieces(self) -> Iterator[Piece]:
        """Every element once: tensors in their order, each in one run or several; parts behind us are let go."""
        for index in self._part_range():
            yield from self._pieces_of(index)
            if index < self._shared:
                self._parts[index] = self._last_raw = None

    def peek(self) -> Iterator[Piece]:
        """The same, and all of it stays."""
        for index in self._part_range():
            yield from self._pieces_of(index)
        self._last_raw = None

    def _part_range(self) -> range:
        """The parts in which our tensors lie."""
        if not self._layout:
            return range(0)
        spec, offset = self._layout[-1]
        last = min(max(offset, offset + spec.nbytes - 1) // self._part_bytes, len(self._parts) - 1)
        return range(min(self._starts[0] // self._part_bytes, last), last + 1)

    def _bytes_of(self, index: int, begin: int, end: int) -> memoryview:
        start = index * self._part_bytes
        return self._raw(index)[begin - start : end - start]

    def _raw(self, index: int) -> memoryview:
        part = self._parts[index]
        if part is None:
            raise KeyError("these tensors were read piece by piece, and are gone")
        if self._last_raw is None or self._last_raw[0] is not part:
            self._last_raw = part, self._unpack(index, part)
        return self._last_raw[1]

    def _pieces_of(self, index: int) -> Iterator[Piece]:
        begin = index * self._part_bytes
        end = min(begin + self._part_bytes, self._payload_bytes)
        is_last = index == len(self._parts) - 1
        for i in range(max(0, bisect.bisect_left(self._starts, begin) - 1), len(self._layout)):
            spec, offset = self._layout[i]
            if offset >= end and not (is_last and not spec.nbytes):
                break
            if not spec.nbytes:
                if begin <= offset:
                    yield spec.name, 0, np.empty(0, DTYPES[spec.dtype])
                continue
            first, last = max(offset, begin), min(offset + spec.nbytes, end)
            if first < last:
                dtype = DTYPES[spec.dtype]
                values = np.frombuffer(self._bytes_of(index, first, last), dtype)
                yield spec.name, (first - offset) // dtype.itemsize, values

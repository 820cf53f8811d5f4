"""Named ndarrays as a schema and one flat run of bytes.

A tensor travels as (name, dtype, shape) in the schema, its raw little- or big-endian C-order bytes at an offset
that both sides compute from the schema alone. Nothing here trusts a declared size before it is checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedbus.errors import ConfigError, DecodeError
from fedbus.types import Array, Tensors

ALIGN: Final = 64
"""Each tensor begins on a cache line of the payload, whatever came before it."""

MAX_TENSORS: Final = 65_536
MAX_NDIM: Final = 32
MAX_NAME_CHARS: Final = 512
MAX_PAYLOAD_BYTES: Final = 1 << 40
"""More than any model here; a receiver that knows what it expects compares with that, too."""

Buffer: TypeAlias = bytes | bytearray | memoryview


def _dtype_table() -> dict[str, np.dtype[Any]]:
    table: dict[str, np.dtype[Any]] = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
    for code in ("b1", "i1", "u1"):
        table[f"|{code}"] = np.dtype(f"|{code}")
    for code in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"):
        for order in "<>":
            table[f"{order}{code}"] = np.dtype(f"{order}{code}")
    return table


DTYPES: Final = _dtype_table()
"""Every dtype that may travel, by its name on the wire. A name outside never reaches numpy."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The wire's name of `dtype`; `ConfigError` when such arrays cannot travel."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ConfigError(
            f"arrays of dtype {dtype} cannot travel: use bool, an integer, float16, bfloat16, float32, "
            "float64 or complex"
        ) from None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor is: its name, wire dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        # Python ints: np.prod wraps around (np.prod([2**33, 2**31]) is 0).
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


Schema: TypeAlias = tuple[TensorSpec, ...]


def schema_of(tensors: Tensors) -> Schema:
    """The schema of `tensors`, in their order. Raises `ConfigError` for what cannot travel."""
    if len(tensors) > MAX_TENSORS:
        raise ConfigError(f"a model of {len(tensors)} tensors cannot travel: {MAX_TENSORS} at most")
    schema = tuple(
        TensorSpec(name, dtype_name(array.dtype), tuple(map(int, array.shape))) for name, array in tensors.items()
    )
    try:
        check_schema(schema)
    except DecodeError as exc:
        raise ConfigError(f"this model cannot travel: {exc}") from exc
    return schema


def check_schema(schema: Schema) -> None:
    """Raise `DecodeError` unless every spec is one that numpy can hold and no name comes twice."""
    if len(schema) > MAX_TENSORS:
        raise DecodeError(f"{len(schema)} tensors, {MAX_TENSORS} at most")
    for spec in schema:
        _check_spec(spec)
    if len({spec.name for spec in schema}) != len(schema):
        raise DecodeError("a tensor name comes twice")
    if payload_bytes(schema) > MAX_PAYLOAD_BYTES:
        raise DecodeError(f"tensors of {payload_bytes(schema)} bytes, {MAX_PAYLOAD_BYTES} at most")


def _check_spec(spec: TensorSpec) -> None:
    if not 0 < len(spec.name) <= MAX_NAME_CHARS:
        raise DecodeError(f"a tensor name of {len(spec.name)} characters, 1 to {MAX_NAME_CHARS} are allowed")
    if spec.dtype not in DTYPES:
        raise DecodeError(f"tensor {spec.name!r} has the unknown dtype {spec.dtype[:40]!r}")
    if len(spec.shape) > MAX_NDIM:
        raise DecodeError(f"tensor {spec.name!r} has {len(spec.shape)} dimensions, {MAX_NDIM} at most")
    if any(side < 0 for side in spec.shape):
        raise DecodeError(f"tensor {spec.name!r} has a negative side")
    # numpy refuses (0, 2**62) too: the sides that are not zero must fit on their own.
    if math.prod(filter(None, spec.shape)) * DTYPES[spec.dtype].itemsize > MAX_PAYLOAD_BYTES:
        raise DecodeError(f"tensor {spec.name!r} of shape {spec.shape} is too large")


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def offsets(schema: Schema) -> Iterable[tuple[TensorSpec, int]]:
    """Where each tensor begins in the payload, in bytes."""
    offset = 0
    for spec in schema:
        yield spec, offset
        offset = _aligned(offset + spec.nbytes)


def payload_bytes(schema: Schema) -> int:
    """Bytes of the payload that `schema` describes, padding included."""
    end = 0
    for spec, offset in offsets(schema):
        end = offset + spec.nbytes
    return end


def views(schema: Schema, payload: Buffer) -> dict[str, Array]:
    """The tensors inside `payload` without a copy: read-only when the buffer is.

    Raises `DecodeError` when the payload is not exactly as long as `schema` says.
    """
    if memoryview(payload).nbytes != payload_bytes(schema):
        raise DecodeError(
            f"a payload of {memoryview(payload).nbytes} bytes, its schema describes {payload_bytes(schema)}"
        )
    flat: NDArray[np.uint8] = np.frombuffer(payload, np.uint8) if payload else np.empty(0, np.uint8)
    return {spec.name: _view(flat, spec, offset) for spec, offset in offsets(schema)}


def _view(flat: NDArray[np.uint8], spec: TensorSpec, offset: int) -> Array:
    raw = flat[offset : offset + spec.nbytes]
    return raw.view(DTYPES[spec.dtype]).reshape(spec.shape)

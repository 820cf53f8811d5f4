"""Tensors in safetensors files: written whole or not at all, read as pages of the file."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from fedbus.errors import ConfigError
from fedbus.types import Array, Tensors

_DTYPES: Final = {
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "C64": np.dtype(np.complex64),
    **{
        f"{kind}{bits}": np.dtype(f"<{code}{bits // 8}")
        for kind, code in (("I", "i"), ("U", "u"))
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES: Final = 100_000_000
_WRITE_BYTES: Final = 16 << 20


def save_model(path: Path, model: Tensors, metadata: dict[str, str]) -> None:
    """Write `model` as safetensors, from the arrays' own memory; "order" in the metadata keeps the tensors' order.

    The format: https://huggingface.co/docs/safetensors, "Format": the header's length (u64), the header (JSON, padded
    with spaces), the tensors without gaps. Raises `ConfigError` for a dtype that it does not know.
    """
    # The widest first, so that each tensor begins on a multiple of its own width.
    tensors = sorted(model.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {**metadata, "order": json.dumps(list(model))}}
    end = 0
    for name, value in tensors:
        dtype = value.dtype.newbyteorder("<")
        if dtype not in _NAMES:
            raise ConfigError(f"the model cannot be saved as safetensors: tensor {name!r} is {value.dtype}")
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(value.shape),
            "data_offsets": [end, end + value.nbytes],
        }
        end += value.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)

    def write(file: IO[bytes]) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, value in tensors:
            native = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
            raw = native.reshape(-1).view(np.uint8).data
            for start in range(0, raw.nbytes, _WRITE_BYTES):
                file.write(raw[start : start + _WRITE_BYTES])

    write_whole(path, write)


def load_model(path: Path) -> dict[str, Array]:
    """The tensors in a model.safetensors, bfloat16 too, in the model's order. Raises `ConfigError` when it is none."""
    return {name: np.array(value) for name, value in map_model(path).tensors.items()}


class MappedModel(NamedTuple):
    """A model that lies in a file: its tensors, in their order, are views of `pages`."""

    tensors: dict[str, Array]
    metadata: dict[str, str]
    pages: np.memmap[Any, Any]


def map_model(path: Path) -> MappedModel:
    """The model in a safetensors file, read-only: memory is taken only for what is read.

    Raises `ConfigError` when it cannot be read or is no such file.
    """
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
        raw: np.memmap[Any, Any] = np.memmap(path, np.uint8, mode="r")
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {name: _tensor(raw, 8 + size, **entry) for name, entry in header.items()}
        order = json.loads(metadata.get("order", "[]")) or list(tensors)
        return MappedModel({name: tensors[name] for name in order}, metadata, raw)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as exc:
        raise ConfigError(f"{path} is not a safetensors file: {exc}") from exc


def _tensor(raw: Array, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Array:
    begin, end = data_offsets
    if not 0 <= begin <= end <= raw.size - start:
        raise ValueError("it is cut short")
    flat: Array = raw[start + begin : start + end].view(np.ndarray).view(_DTYPES[dtype])
    return flat.reshape(shape)


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that a crash leaves the old one or the new one: fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # a server that was replaced may write, too
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

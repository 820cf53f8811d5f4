"""The run folder: history.json and model.safetensors, each whole or not there at all."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from fedbus.errors import ConfigError
from fedbus.server.history import History
from fedbus.types import Array, Tensors


class RunFolder:
    """Where a run keeps what it made. Raises `ConfigError` when the folder cannot be written or holds a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / "history.json").exists():
            raise ConfigError(f"the run folder {path} holds a run already: name another one, or move it away")
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / ".writable", b"")
            (path / ".writable").unlink()
        except OSError as exc:
            raise ConfigError(f"the run folder {path} cannot be written: {exc.strerror or exc}") from exc

    def save_model(self, model: Tensors, *, run_id: str, version: int) -> None:
        """Write model.safetensors; its metadata tells run, version and the order of the tensors."""
        tensors = {name: np.ascontiguousarray(_native(value)).reshape(value.shape) for name, value in model.items()}
        metadata = {"run_id": run_id, "version": str(version), "order": json.dumps(list(model))}
        try:
            data = save(tensors, metadata)
        except (SafetensorError, KeyError, TypeError, ValueError) as exc:
            raise ConfigError(f"the model cannot be saved as safetensors: {exc}") from exc
        write_whole(self.path / "model.safetensors", data)

    def save_history(self, history: History) -> None:
        """Write history.json."""
        write_whole(self.path / "history.json", history.to_json().encode())


def load_model(path: Path) -> dict[str, Array]:
    """The tensors in a model.safetensors, bfloat16 too, in the model's order. Raises `ConfigError` when it is none."""
    try:
        data = path.read_bytes()
        entries = deserialize(data)  # type: ignore[no-untyped-call]
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except SafetensorError as exc:
        raise ConfigError(f"{path} is not a safetensors file: {exc}") from exc
    tensors = {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"]) for name, entry in entries
    }
    return {name: tensors[name] for name in _order(data) or tensors}


def _order(data: bytes) -> list[str]:
    """safetensors sorts the tensors; clients that speak lists need the model's own order back."""
    (size,) = struct.unpack_from("<Q", data)
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return list(json.loads(metadata.get("order", "[]")))


_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "C64": np.dtype(np.complex64),
    **{
        f"{kind}{bits}": np.dtype(f"{code}{bits // 8}")
        for kind, code in (("I", "i"), ("U", "u"))
        for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}


def _native(value: Array) -> Array:
    return value.astype(value.dtype.newbyteorder("="), copy=False)


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` so that a crash leaves the old file or the new one: fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

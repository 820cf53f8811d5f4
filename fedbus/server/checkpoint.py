"""The run folder: ledger, checkpoints, history.json and model.safetensors, each whole or not there at all.

A checkpoint is a safetensors file of one version, written before the ledger names it and deleted once the ledger names
a later one: a crash at any point leaves the version that the ledger knows.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import secrets
import struct
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import ml_dtypes
import numpy as np

from fedbus.errors import ConfigError
from fedbus.server.history import History
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


class _Checkpoint(NamedTuple):
    tensors: dict[str, Array]
    pages: np.memmap[Any, Any]


class RunFolder:
    """Where a run keeps what it made, held by one server at a time.

    Args:
        path: the folder; it is made when it is not there.
        resume: go on with the run in it; else a folder with a run is refused.

    Raises:
        ConfigError: when the folder cannot be written, holds a run, or is in use by another server.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self._lock: IO[str] | None = None
        self._pages: np.memmap[Any, Any] | None = None
        if not resume and any((path / name).exists() for name in ("history.json", "ledger.sqlite")):
            raise ConfigError(
                f"the run folder {path} holds a run already: name another one, or go on with that one "
                "(fedbus server APP --run-dir ... --resume)"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / ".writable", lambda file: None)
            (path / ".writable").unlink()
        except OSError as exc:
            raise ConfigError(f"the run folder {path} cannot be written: {exc.strerror or exc}") from exc

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.sqlite"

    def hold(self) -> None:
        """Keep other servers on this machine out until `close`. Raises `ConfigError` when one holds it."""
        lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            pid = lock.read().strip() or "?"
            lock.close()
            raise ConfigError(
                f"another server (pid {pid}) works on the run folder {self.path}: end it first (kill -9 {pid}, "
                "when it hangs)"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def save_checkpoint(self, model: Tensors, *, run_id: str, version: int) -> None:
        """Write version `version`, durably; the one before stays until `settle_checkpoint`."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        save_model(self._checkpoint(version), model, {"run_id": run_id, "version": str(version)})

    def settle_checkpoint(self, version: int, *, keep: Collection[int] = ()) -> None:
        """The ledger names `version` now: make it model.safetensors, too, and delete the others but for `keep`."""
        link = self.path / f".model.{secrets.token_hex(4)}"
        os.link(self._checkpoint(version), link)
        link.replace(self.path / "model.safetensors")
        link.unlink(missing_ok=True)  # to rename one name of a file to another of its names does nothing
        kept = {self._checkpoint(each) for each in (*keep, version)}
        for other in (self.path / "checkpoints").iterdir():
            if other not in kept:
                other.unlink(missing_ok=True)

    def load_checkpoint(self, version: int, *, run_id: str) -> dict[str, Array]:
        """The tensors of version `version`, in pages of the file: memory is taken for what is read.

        Raises `ConfigError` when they are not there, or are of another run.
        """
        tensors, self._pages = self._map(version, run_id)
        return tensors

    def earlier_checkpoint(self, version: int, *, run_id: str) -> dict[str, Array] | None:
        """The tensors of a version that an update is based on, in pages of the file; None when it is not kept."""
        return self._map(version, run_id).tensors if self._checkpoint(version).exists() else None

    def _map(self, version: int, run_id: str) -> _Checkpoint:
        path = self._checkpoint(version)
        tensors, metadata, pages = map_model(path)
        if (metadata.get("run_id"), metadata.get("version")) != (run_id, str(version)):
            raise ConfigError(f"{path} is not version {version} of run {run_id}: the run cannot be resumed")
        return _Checkpoint(tensors, pages)

    def release_pages(self) -> None:
        """Give the memory back that reading the loaded checkpoint took; what is read again comes from the file."""
        if self._pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages: mmap.mmap = self._pages._mmap  # type: ignore[attr-defined]  # numpy has no other way to it
            pages.madvise(mmap.MADV_DONTNEED)

    def _checkpoint(self, version: int) -> Path:
        return self.path / "checkpoints" / f"model-{version}.safetensors"

    def save_history(self, history: History, records: Iterable[str]) -> None:
        """Write history.json; `records` are the texts of its rounds, of which `history` may know the last ones only."""
        pieces = (piece.encode() for piece in history.json_pieces(records))
        write_whole(self.path / "history.json", lambda file: file.writelines(pieces))


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

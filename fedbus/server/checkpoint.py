"""The run folder: ledger, checkpoints, history.json and models, each whole or not there at all.

A checkpoint is a safetensors file of one version, written before the ledger names it and deleted once the ledger names
a later one: a crash at any point leaves the version that the ledger knows.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from fedbus.errors import ConfigError, RunFailed
from fedbus.server.history import History
from fedbus.tensorfile import map_model, save_model, write_whole
from fedbus.types import Array, Tensors


class _Checkpoint(NamedTuple):
    tensors: dict[str, Array]
    pages: np.memmap[Any, Any]
    metadata: dict[str, str]


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
        self._pages: list[np.memmap[Any, Any]] = []  # of the version at hand
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

    def save_checkpoint(
        self, model: Tensors, *, run_id: str, version: int, memory: Tensors | None = None, strategy: str = ""
    ) -> None:
        """Write version `version`, durably, and what the `strategy` of that name remembers with it; the one before
        stays until `settle_checkpoint`.
        """
        (self.path / "checkpoints").mkdir(exist_ok=True)
        metadata = {"run_id": run_id, "version": str(version)}
        if memory:
            save_model(self._memory(version), memory, metadata | {"strategy": strategy})
        save_model(self._checkpoint(version), model, metadata)

    def settle_checkpoint(self, version: int, *, keep: Collection[int] = ()) -> None:
        """The ledger names `version` now: make it model.safetensors, too, and delete the others but for `keep`."""
        self._link(version, "model")
        kept = {self._checkpoint(each) for each in (*keep, version)} | {self._memory(version)}
        for other in (self.path / "checkpoints").iterdir():
            if other not in kept:
                other.unlink(missing_ok=True)

    def keep_model(self, version: int, name: str, *, run_id: str) -> bool:
        """Make the checkpoint of `version` NAME.safetensors, too; False when neither of them is that version.

        Raises `RunFailed` when the folder cannot be written.
        """
        if self._checkpoint(version).exists():
            try:
                self._link(version, name)
            except OSError as exc:
                raise RunFailed(f"the run folder cannot be written: {exc.strerror or exc}") from exc
            return True
        with contextlib.suppress(ConfigError):
            metadata = map_model(self.path / f"{name}.safetensors").metadata
            return (metadata.get("run_id"), metadata.get("version")) == (run_id, str(version))
        return False

    def _link(self, version: int, name: str) -> None:
        """Give the checkpoint a second name, in place of whatever has it."""
        link = self.path / f".{name}.{secrets.token_hex(4)}"
        os.link(self._checkpoint(version), link)
        link.replace(self.path / f"{name}.safetensors")
        link.unlink(missing_ok=True)  # to rename one name of a file to another of its names does nothing

    def load_checkpoint(self, version: int, *, run_id: str) -> dict[str, Array]:
        """The tensors of version `version`, in pages of the file: memory is taken for what is read.

        Raises `ConfigError` when they are not there, or are of another run.
        """
        tensors, pages, _ = self._map(self._checkpoint(version), version, run_id)
        self._pages = [pages]
        return tensors

    def load_memory(self, version: int, *, run_id: str, strategy: str = "") -> dict[str, Array]:
        """What the strategy remembered with version `version`, as `load_checkpoint` gives the model.

        Raises `ConfigError` where that was a strategy of another name: its momenta mean nothing to this one.
        """
        path = self._memory(version)
        if not path.exists():
            return {}
        tensors, pages, metadata = self._map(path, version, run_id)
        if metadata.get("strategy") != strategy:
            raise ConfigError(
                f"the run in {self.path} was begun with the strategy {metadata.get('strategy')}, not {strategy}: "
                "go on with that one, or begin another run"
            )
        self._pages.append(pages)
        return tensors

    def earlier_checkpoint(self, version: int, *, run_id: str) -> dict[str, Array] | None:
        """The tensors of a version that an update is based on, in pages of the file; None when it is not kept."""
        path = self._checkpoint(version)
        return self._map(path, version, run_id).tensors if path.exists() else None

    def _map(self, path: Path, version: int, run_id: str) -> _Checkpoint:
        tensors, metadata, pages = map_model(path)
        if (metadata.get("run_id"), metadata.get("version")) != (run_id, str(version)):
            raise ConfigError(f"{path} is not version {version} of run {run_id}: the run cannot be resumed")
        return _Checkpoint(tensors, pages, metadata)

    def release_pages(self) -> None:
        """Give the memory back that reading the loaded checkpoint took; what is read again comes from the file."""
        for mapped in self._pages if hasattr(mmap, "MADV_DONTNEED") else ():
            pages: mmap.mmap = mapped._mmap  # type: ignore[attr-defined]  # numpy has no other way to it
            pages.madvise(mmap.MADV_DONTNEED)

    def _checkpoint(self, version: int) -> Path:
        return self.path / "checkpoints" / f"model-{version}.safetensors"

    def _memory(self, version: int) -> Path:
        return self.path / "checkpoints" / f"memory-{version}.safetensors"

    def save_history(self, history: History, records: Iterable[str]) -> None:
        """Write history.json; `records` are the texts of its rounds, of which `history` may know the last ones only."""
        pieces = (piece.encode() for piece in history.json_pieces(records))
        write_whole(self.path / "history.json", lambda file: file.writelines(pieces))

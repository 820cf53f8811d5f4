"""The updates of a round on disk, for what must see them all: written as they come, read block by block."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from fedbus.errors import RunFailed
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.exact import blocks
from fedbus.types import Array, Piece, Tensors, delta_dtype

_R = TypeVar("_R")

_ALIGN: Final = 64
_BLOCK_BYTES: Final = 2 << 20
"""What a thread reads at a time, of all updates together: it stays in the cache while it is worked on."""
_MIN_BLOCK, _MAX_BLOCK = 1 << 10, 1 << 14
_PIECE: Final = 1 << 16
_PADDING_BYTES: Final = 64
"""Behind each row of a block: rows a power of two apart would share few lines of the cache, and columns would be read
five times slower."""
_AHEAD_BYTES: Final = 32 << 20
"""What is asked of the disk at a time, of all updates together: runs so long that a disk has little to seek."""
_MAX_AHEAD: Final = 1 << 20
_MAX_WORKERS: Final = 8
_ALONE_BYTES: Final = 1 << 20
"""What is read sooner than threads are started."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies, from the begin of its update on."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int


_Layout: TypeAlias = Mapping[str, _Place]


class _File:
    """Bytes at offsets, in a file of `folder` that has no name: it is gone when this is, or the process."""

    def __init__(self, folder: Path, update_bytes: int) -> None:
        self._folder = folder
        self._update_bytes = update_bytes
        with self._disk():
            # Its name is gone as soon as it is open: a crash leaves nothing behind.
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._closing = weakref.finalize(self, self._file.close)

    def close(self) -> None:
        self._closing()

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as exc:
            raise RunFailed(
                f"the updates of a round cannot be kept in {self._folder}: {exc.strerror or exc}; each takes "
                f"{self._update_bytes / 2**20:.1f} MiB there"
            ) from exc

    def write(self, raw: Array, offset: int) -> None:
        done = 0
        while done < raw.size:
            with self._disk():
                done += os.pwrite(self._file.fileno(), raw[done:].data, offset + done)

    def read(self, out: Array, offset: int) -> None:
        """Fill `out`, 1-d and contiguous."""
        if not self._closing.alive:
            raise ValueError("the round is over, and its updates are gone: copy what is needed for longer")
        raw = out.view(np.uint8)
        done = 0
        while done < raw.size:
            with self._disk():
                count = os.preadv(self._file.fileno(), [raw[done:].data], offset + done)
            assert count, "what was written is there"
            done += count

    def readahead(self, offsets: Sequence[int], size: int) -> Callable[[int], None]:
        """For runs of `size` bytes that are read side by side: to be called with how far that has come, it has the
        system read on meanwhile."""
        step = min(max(_AHEAD_BYTES // len(offsets), _ALIGN), _MAX_AHEAD)
        asked = 0

        def ask(read: int) -> None:
            nonlocal asked
            while asked < min(read + step, size):
                for offset in offsets:
                    os.posix_fadvise(
                        self._file.fileno(), offset + asked, min(step, size - asked), os.POSIX_FADV_WILLNEED
                    )
                asked += step

        return ask if hasattr(os, "posix_fadvise") else lambda read: None


class Spool:
    """The updates of one round, in a file that has no name: it is gone when the spool is, or the process.

    Each update lies as it came, float32 as float32, every tensor of it in one run; its discount is left to whoever
    reads. Updates are read in the order of (client_id, task_id), in whatever order they came, with plain reads into
    buffers that are used again: pages of a mapped file would count as memory of this process.

    Args:
        model: what the updates move.
        folder: where the file lies; None: where temporary files do.
        report: told (bytes done, bytes in all) while the updates are read, once `expect` has said how much that is.

    Raises:
        RunFailed: when there is no room for an update.
    """

    def __init__(
        self, model: Tensors, folder: Path | None = None, report: Callable[[int, int], None] | None = None
    ) -> None:
        self._layout, self._stride = _layout((n, delta_dtype(v.dtype), v.shape) for n, v in model.items())
        self._bools = {name: value.reshape(-1) for name, value in model.items() if value.dtype.kind == "b"}
        self._updates: list[ClientUpdate] = []
        self._end = 0
        self._report = report
        self._done, self._due = 0, 0
        self._file = _File(Path(tempfile.gettempdir()) if folder is None else folder, self._stride)

    def __len__(self) -> int:
        return len(self._updates)

    def close(self) -> None:
        """Give the disk back; what was read stays what it is."""
        self._file.close()

    def add(self, update: ClientUpdate) -> None:
        """Write one update, whose arrays are not needed afterwards."""
        extra_layout, extra_bytes = _layout((n, v.dtype, v.shape) for n, v in update.extra.items())
        at, extra_at = self._end, self._end + self._stride
        held = self._write(at, self._layout, update.pieces())
        self._write(extra_at, extra_layout, update.extra_pieces())
        self._end = extra_at + extra_bytes
        layout = {name: place for name, place in self._layout.items() if name in held}
        delta = SpooledTensors(self._file, at, self._layout if len(layout) == len(self._layout) else layout)
        extra = SpooledTensors(self._file, extra_at, extra_layout)
        self._updates.append(dataclasses.replace(update, delta=delta, extra=extra))

    def updates(self) -> list[ClientUpdate]:
        """The updates in canonical order; their tensors are read from the file when they are asked for."""
        return sorted(self._updates, key=lambda update: (update.client_id, update.task_id))

    def _write(self, at: int, layout: _Layout, pieces: Iterable[Piece]) -> set[str]:
        held = set()
        for name, start, values in pieces:
            place = layout[name]
            held.add(name)
            raw = np.ascontiguousarray(values, place.dtype).view(np.uint8)
            self._file.write(raw, at + place.offset + start * place.dtype.itemsize)
        return held

    # ---- all updates at a time -----------------------------------------------------------------------------------

    def expect(self, rows: int) -> None:
        """So many updates will be read until the round is finished, one that is read twice counts twice."""
        self._due = rows * self._stride

    def reduce(
        self,
        work: Callable[[Block], _R],
        *,
        rows: Sequence[int] | None = None,
        kinds: str = "fciub",
        is_wide: bool = False,
    ) -> Generator[tuple[str, slice, _R], None, None]:
        """What `work` makes of each block of the updates: (tensor, its flat elements, result), in the model's order.

        It works on several blocks at a time, on all cores, and is handed the memory of earlier blocks again: what it
        returns must be its own.

        Args:
            work: called once for each block that at least one of the updates holds.
            rows: which updates, as indices of `updates()`; None: all.
            kinds: of which tensors, as in `np.dtype.kind` of the updates' dtypes; ml_dtypes' bfloat16 counts as f.
            is_wide: values as float64; else as float32 where that holds them.
        """
        updates = self.updates()
        tables = [_spooled(update.delta) for update in updates]
        chosen = range(len(updates)) if rows is None else rows
        jobs = self._jobs(tables, chosen, kinds)
        local = threading.local()

        def run(job: _Job) -> tuple[str, slice, _R]:
            scratch: _Scratch = local.__dict__.setdefault("scratch", _Scratch())
            return job.name, job.at, work(self._block(job, tables, scratch, is_wide))

        is_small = len(chosen) * self._stride <= _ALONE_BYTES
        results = map(run, jobs) if is_small else in_order(run, jobs)
        for name, at, result in results:
            self._tell_done((at.stop - at.start) * self._layout[name].dtype.itemsize * len(chosen))
            yield name, at, result

    def _jobs(self, tables: list[SpooledTensors], chosen: Sequence[int], kinds: str) -> Iterator[_Job]:
        for name, place in self._layout.items():
            rows = [row for row in chosen if name in tables[row]]
            if rows and _kind(place.dtype) in kinds:
                offsets = [tables[row].offset(name) for row in rows]
                ahead = self._file.readahead(offsets, place.size * place.dtype.itemsize)
                most = _BLOCK_BYTES // (len(rows) * place.dtype.itemsize)
                cuts = blocks(place.size, min(max(most, _MIN_BLOCK), _MAX_BLOCK)) if place.size else [slice(0, 0)]
                for at in cuts:
                    ahead(at.stop * place.dtype.itemsize)
                    yield _Job(name, at, rows)

    def _block(self, job: _Job, tables: list[SpooledTensors], scratch: _Scratch, is_wide: bool) -> Block:
        place = self._layout[job.name]
        start, count = job.at.start * place.dtype.itemsize, job.at.stop - job.at.start
        raw = scratch.rows("raw", len(job.rows), count, place.dtype)
        for out, row in zip(raw, job.rows, strict=True):
            self._file.read(out, tables[row].offset(job.name) + start)
        values = _reals(raw)
        wanted = np.dtype(np.float64 if is_wide or _needs_float64(place.dtype) else np.float32)
        if values.dtype != wanted:
            wide = scratch.rows("wide", values.shape[0], values.shape[1], wanted)
            np.copyto(wide, values, casting="unsafe")  # from bfloat16 to float32 is not "same kind"
            values = wide
        if job.name in self._bools:
            now = self._bools[job.name][job.at].astype(wanted)
            np.clip(values, -now, 1 - now, out=values)  # nothing where a late one asks for what is there already
        return Block(_kind(place.dtype), job.rows, values, scratch)

    def _tell_done(self, nbytes: int) -> None:
        self._done += nbytes
        if self._report is not None and self._due:
            self._report(min(self._done, self._due), self._due)


class SpooledTensors(Mapping[str, Array]):
    """The tensors of one update on disk: each is read, into memory of its own, whenever it is asked for."""

    def __init__(self, file: _File, at: int, layout: _Layout) -> None:
        self._file = file
        self._at = at
        self._layout = layout

    def __repr__(self) -> str:
        return f"<SpooledTensors {', '.join(self._layout)}>"

    def __len__(self) -> int:
        return len(self._layout)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._layout

    def __getitem__(self, name: str) -> Array:
        place = self._layout[name]
        value = np.empty(place.size, place.dtype)
        self._file.read(value, self._at + place.offset)
        return value.reshape(place.shape)

    def offset(self, name: str) -> int:
        """Where the tensor begins in the file."""
        return self._at + self._layout[name].offset

    def pieces(self) -> Iterator[Piece]:
        """The elements in runs; they can be walked again."""
        for name, place in self._layout.items():
            for at in blocks(place.size, _PIECE) if place.size else [slice(0, 0)]:
                values = np.empty(at.stop - at.start, place.dtype)
                self._file.read(values, self._at + place.offset + at.start * place.dtype.itemsize)
                yield name, at.start, values

    def peek(self) -> Iterator[Piece]:
        return self.pieces()


@dataclass(frozen=True, slots=True)
class _Job:
    name: str
    at: slice
    rows: list[int]


class _Scratch:
    """Memory of one thread, which is used again for block after block."""

    def __init__(self) -> None:
        self._memory: dict[str, Array] = {}

    def flat(self, key: str, nbytes: int) -> Array:
        memory = self._memory.get(key)
        if memory is None or memory.size < nbytes:
            memory = self._memory[key] = np.empty(nbytes, np.uint8)
        return memory[:nbytes]

    def rows(self, key: str, count: int, size: int, dtype: np.dtype[Any]) -> Array:
        """`count` rows of `size` elements, some way apart."""
        stride = -(-size * dtype.itemsize // _PADDING_BYTES) * _PADDING_BYTES + _PADDING_BYTES
        return self.flat(key, count * stride).view(dtype).reshape(count, -1)[:, :size]


@dataclass(frozen=True, slots=True)
class Block:
    """The same elements of several updates, in canonical order: those of the updates that hold the tensor.

    `values`, of shape (updates, reals), is the worker's to write to: float32 or float64, each complex element as two
    reals. `rows` says which updates they are, `kind` what `np.dtype.kind` says of their dtype, where all floating
    ones are f. No discount has been taken off.
    """

    kind: str
    rows: list[int]
    values: Array
    _scratch: _Scratch

    def discount(self, discounts: Array) -> None:
        """Multiply `values` with the discount of each update; `discounts` has those of all updates."""
        for row, values in zip(self.rows, self.values, strict=True):
            if discounts[row] != 1:
                np.multiply(values, discounts[row], out=values, casting="same_kind")

    def columns_sorted(self) -> Array:
        """What the updates say of each real, in ascending order: shape (reals, updates), in memory that goes again."""
        count, size = self.values.shape
        raw = self._scratch.flat("sorted", size * count * self.values.dtype.itemsize)
        columns = raw.view(self.values.dtype).reshape(size, count)
        np.copyto(columns, self.values.T)
        columns.sort(axis=1)  # several times faster than np.partition, which is not vectorised for so few
        return columns


def _layout(specs: Iterable[tuple[str, np.dtype[Any], tuple[int, ...]]]) -> tuple[dict[str, _Place], int]:
    """Where each tensor of an update lies, and how many bytes it takes in all."""
    places, end = {}, 0
    for name, dtype, shape in specs:
        size = int(np.prod(shape, dtype=np.int64))
        places[name] = _Place(end, dtype, shape, size)
        end = -(-(end + size * dtype.itemsize) // _ALIGN) * _ALIGN
    return places, end


def _spooled(delta: Tensors) -> SpooledTensors:
    assert isinstance(delta, SpooledTensors)
    return delta


def _kind(dtype: np.dtype[Any]) -> str:
    return "f" if dtype.kind == "V" else dtype.kind  # bfloat16 is V


def _needs_float64(dtype: np.dtype[Any]) -> bool:
    return dtype in (np.float64, np.complex128, np.int64)


def _reals(values: Array) -> Array:
    return values.view(values.real.dtype) if values.dtype.kind == "c" else values


def in_order(run: Callable[[_Job], _R], jobs: Iterable[_Job]) -> Generator[_R, None, None]:
    """`run` of each job, in their order, on all cores; few jobs are ahead of what has been taken."""
    workers = min(_MAX_WORKERS, _cores())
    running: deque[Future[_R]] = deque()
    pool = ThreadPoolExecutor(workers, "fedbus-reduce")
    try:
        coming = iter(jobs)
        running.extend(pool.submit(run, job) for job in itertools.islice(coming, 2 * workers))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(run, job) for job in itertools.islice(coming, 1))
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # nobody reads the file when it is closed


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Tensors in fewer bytes: what a codec's name means, what it makes of tensors, and the way back.

A codec is a text, such as "topk:0.01+float16+zstd": up to three stages, in this order.

    topk:SHARE                  the largest numbers alone; the rest is the residual, which whoever encodes keeps
    float16, bfloat16           numbers rounded to the nearest half
    int8, qsgd:LEVELS           numbers rounded at random, without bias, to levels of a bucket's scale
    zstd, zstd:LEVEL            the bytes of each part packed without loss

A transfer's head tells the tensors as they are; what travels for them, its `Layout`, follows from their schema and the
codec alone, so a receiver knows each size before it takes memory. Integers and bools, what travels beside the model's
own tensors, and whatever would not become smaller: these are not rounded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedbus.errors import ClientCodeError, ConfigError, DecodeError
from fedbus.types import EXTRA, Array, Piece, Tensors
from fedbus.wire import lossless
from fedbus.wire.arrays import DTYPES, Schema, TensorSpec, check_schema, payload_bytes, schema_of
from fedbus.wire.floats import Float32s, Halves, Levels, Noise, Numbers, as_reals, blocks

_STEPS, _COUNTS, _GAPS, _VALUES = "#steps", "#counts", "#gaps", "#values"
_FLOAT32: Final = Halves("float32")
_LARGEST_FLOAT16: Final = np.float32(65504)
_MOST_SHARE: Final = 0.5
"""Two of three bytes for each number that is kept are its place."""


@dataclass(frozen=True)
class Codec:
    """What becomes of tensors on their way; `Codec.parse` makes it.

    share: of the numbers, that is kept; None keeps them all.
    numbers: how they travel; None: as they are.
    level: of zstd; None packs nothing.
    """

    text: str = ""
    share: float | None = field(default=None, compare=False)
    numbers: Numbers | None = field(default=None, compare=False)
    level: int | None = field(default=None, compare=False)

    @classmethod
    def parse(cls, text: str) -> Codec:
        """The codec of that name; "" is none at all. Raises `ConfigError`, in one line, for what makes no sense."""
        if not text:
            return cls()
        found: dict[str, float | Numbers | int] = {}
        for stage in text.split("+"):
            name, colon, argument = stage.partition(":")
            if name not in _STAGES:
                raise ConfigError(
                    f"there is no codec {stage!r} (in {text!r}): take {_NAMES}, or some with + in between"
                )
            place, read = _STAGES[name]
            if place in found:
                raise ConfigError(f"{text!r} does the same twice: leave {stage!r} out, or what comes before it")
            found[place] = read(stage, argument if colon else None)
        if list(found) != [place for place in _PLACES if place in found]:
            raise ConfigError(f"{text!r} is in the wrong order: first topk, then a number format, then zstd")
        return cls(text, **found)  # type: ignore[arg-type]  # each place has its type

    @property
    def is_lossy(self) -> bool:
        """Whether numbers change."""
        return self.share is not None or self.numbers is not None

    @property
    def needs_memory(self) -> bool:
        """Whether whoever encodes must keep a residual from one time to the next."""
        return self.share is not None

    def check_installed(self) -> None:
        """Raise `ConfigError`, saying what to install, when a package that it needs is missing."""
        if self.level is not None:
            lossless.package()

    def check_carries_models(self) -> None:
        """Raise `ConfigError` when a model cannot travel so."""
        if self.share is not None:
            raise ConfigError(f"a model cannot travel as {self.text!r}: topk leaves most of it out")

    def most_bytes(self, schema: Schema) -> int:
        """The largest payload that tensors of `schema` can become."""
        coded = payload_bytes(Layout(self, schema).coded)
        return coded if self.level is None else 2 * lossless.most_packed(coded) - coded  # in parts of 64 KiB and more

    def without_loss(self) -> Codec:
        """The lossless rest of it, for what must arrive as it is."""
        return Codec.parse("" if self.level is None else f"zstd:{self.level}")


PLAIN: Final = Codec()
"""Tensors travel as they are."""


def _share(stage: str, argument: str | None) -> float:
    try:
        share = float(argument or "")
    except ValueError:
        share = math.nan
    if not 0 < share <= _MOST_SHARE:
        raise ConfigError(f"{stage!r}: topk takes the share of numbers to keep, as topk:0.01, {_MOST_SHARE} at most")
    return share


def _named(make: Callable[[], Numbers]) -> Callable[[str, str | None], Numbers]:
    def read(stage: str, argument: str | None) -> Numbers:
        if argument is not None:
            raise ConfigError(f"{stage!r}: {stage.partition(':')[0]} takes no argument")
        return make()

    return read


def _qsgd(stage: str, argument: str | None) -> Numbers:
    if argument is None or not argument.isdecimal() or not 1 <= int(argument) <= 127:
        raise ConfigError(
            f"{stage!r}: qsgd takes its number of levels, 1 to 127: qsgd:1 needs 2 bits for a number, "
            "up to qsgd:7 4 bits, more 8 bits"
        )
    return Levels(int(argument), "l2")


def _level(stage: str, argument: str | None) -> int:
    lowest, highest = lossless.LEVELS
    if argument is None:
        return lossless.DEFAULT_LEVEL
    if not argument.removeprefix("-").isdecimal() or not lowest <= int(argument) <= highest:
        raise ConfigError(f"{stage!r}: the level of zstd is a whole number from {lowest} to {highest}")
    return int(argument)


_PLACES: Final = ("share", "numbers", "level")
_STAGES: Final[dict[str, tuple[str, Callable[[str, str | None], float | Numbers | int]]]] = {
    "topk": ("share", _share),
    "float16": ("numbers", _named(lambda: Halves("float16"))),
    "bfloat16": ("numbers", _named(lambda: Halves("bfloat16"))),
    "int8": ("numbers", _named(lambda: Levels(127, "max"))),
    "qsgd": ("numbers", _qsgd),
    "zstd": ("level", _level),
}
_NAMES: Final = "float16, bfloat16, int8, qsgd:LEVELS, topk:SHARE or zstd"


# ---- what travels ----------------------------------------------------------------------------------------------------


class Layout:
    """What travels for tensors of `schema` under `codec`: the same on both sides.

    Raises:
        ConfigError: for a tensor whose name is one of ours.
        DecodeError: for a schema that nobody can have.
    """

    def __init__(self, codec: Codec, schema: Schema) -> None:
        self.codec = codec
        self.schema = schema
        self.numbers = codec.numbers or _FLOAT32
        """How floating-point numbers travel."""
        self.rounded = (
            {spec.name: _count_of(spec) for spec in schema if self._is_rounded(spec)} if codec.is_lossy else {}
        )
        """The tensors that do not travel as they are, each with how many real numbers it holds."""
        self.front = self._front()
        """What comes before the tensors themselves."""
        self.coded = schema
        """What travels."""
        if self.rounded:
            self.coded = self.front + tuple(self._body(spec) for spec in schema if not self._is_in_front(spec))
            taken = {spec.name for spec in self.front} & {spec.name for spec in schema}
            if taken:
                raise ConfigError(f"a tensor named {min(taken)!r} cannot travel as {codec.text}: rename it")
            check_schema(self.coded)

    def __repr__(self) -> str:
        return f"<Layout {self.codec.text!r} {len(self.rounded)} of {len(self.schema)} tensors are rounded>"

    @cached_property
    def kept(self) -> int:
        """How many numbers top-k keeps, of all tensors together (Stich et al. 2018, definition 2.1): one at least."""
        assert self.codec.share is not None
        return max(1, round(self.codec.share * sum(self.rounded.values())))

    @cached_property
    def stride(self) -> int:
        """Bytes of an element of what there is most of: see `lossless.packed`."""
        share: dict[int, int] = {1: 0}
        for spec in self.coded:
            size = DTYPES[spec.dtype].itemsize // (2 if DTYPES[spec.dtype].kind == "c" else 1)
            share[size] = share.get(size, 0) + spec.nbytes
        return max(share, key=lambda size: share[size])

    def reach(self, name: str) -> float:
        """How far from zero a number may lie for each 1 in the travelling tensor `name`."""
        return self.numbers.reach if name == _STEPS else 1.0

    def _is_rounded(self, spec: TensorSpec) -> bool:
        dtype = DTYPES[spec.dtype]
        if spec.name.startswith(EXTRA) or dtype.kind in "iub" or not spec.nbytes:
            return False
        if self.codec.share is not None:
            return True
        size = _count_of(spec)
        coded = self.numbers.body_size(size) * DTYPES[self.numbers.dtype].itemsize + 4 * self.numbers.buckets(size)
        return coded < spec.nbytes

    def _is_in_front(self, spec: TensorSpec) -> bool:
        return self.codec.share is not None and spec.name in self.rounded

    def _body(self, spec: TensorSpec) -> TensorSpec:
        if spec.name not in self.rounded:
            return spec
        return TensorSpec(spec.name, self.numbers.dtype, (self.numbers.body_size(self.rounded[spec.name]),))

    def _front(self) -> Schema:
        if not self.rounded:
            return ()
        if self.codec.share is None:
            buckets = sum(map(self.numbers.buckets, self.rounded.values()))
            return (TensorSpec(_STEPS, "<f4", (buckets,)),) if buckets else ()
        values = TensorSpec(_VALUES, self.numbers.dtype, (self.numbers.body_size(self.kept),))
        steps = TensorSpec(_STEPS, "<f4", (self.numbers.buckets(self.kept),))
        return (
            TensorSpec(_COUNTS, "<u4", (len(self.sparse_blocks),)),
            TensorSpec(_GAPS, "<u2", (self.kept,)),
            *((steps,) if steps.shape[0] else ()),
            values,
        )

    @cached_property
    def sparse_blocks(self) -> list[tuple[str, slice]]:
        """The blocks of 65536 numbers that places are counted in: each tensor begins a new one."""
        return [(name, block) for name, size in self.rounded.items() for block in blocks(size)]

    @cached_property
    def sparse_sizes(self) -> NDArray[np.int64]:
        """How many numbers each of the `sparse_blocks` has."""
        return np.array([block.stop - block.start for _, block in self.sparse_blocks], np.int64)


def _count_of(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * (2 if DTYPES[spec.dtype].kind == "c" else 1)


# ---- there -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """`tensors` travel, as `layout` says. `residual`: what top-k left for the next time, flat, by tensor name."""

    layout: Layout
    tensors: dict[str, Array]
    residual: dict[str, Float32s]


def encode(codec: Codec, tensors: Tensors, noise: Noise, residual: Mapping[str, Array] | None = None) -> Encoded:
    """What travels for `tensors`: the same for the same `noise`.

    `residual`: that of the last time; it is added first (error feedback: Stich et al. 2018, algorithm 1).

    Raises:
        ConfigError: for what cannot travel, or lies beyond what the codec's numbers hold.
        ClientCodeError: for NaN and infinite values.
    """
    try:
        layout = Layout(codec, schema_of(tensors))
    except DecodeError as exc:
        raise ConfigError(f"this cannot travel as {codec.text}: {exc}") from exc
    if codec.share is not None and layout.rounded:
        return _encode_sparse(layout, tensors, noise, residual or {})
    return Encoded(layout, _encode_dense(layout, tensors, noise), {})


def _encode_dense(layout: Layout, tensors: Tensors, noise: Noise) -> dict[str, Array]:
    steps, bodies = [np.empty(0, np.float32)], {}
    for spec in layout.schema:
        value = tensors[spec.name]
        if spec.name in layout.rounded:
            step, value = layout.numbers.encode(_float32s(spec.name, value), noise)
            steps.append(step)
        bodies[spec.name] = value
    front = {spec.name: np.concatenate(steps) for spec in layout.front}
    return front | bodies


def _float32s(name: str, value: Array) -> Float32s:
    with np.errstate(over="ignore"):
        flat: Float32s = as_reals(value).astype(np.float32, copy=False)
    _check_finite(name, flat)
    return flat


def _check_finite(name: str, values: Float32s) -> None:
    with np.errstate(invalid="ignore"):
        ends = float(np.maximum.reduce(values)), float(np.minimum.reduce(values))
    if not all(map(math.isfinite, ends)):
        raise ClientCodeError(f"tensor {name!r} holds NaN or infinite values: did the training diverge?")


def _encode_sparse(layout: Layout, tensors: Tensors, noise: Noise, residual: Mapping[str, Array]) -> Encoded:
    flat = np.empty(sum(layout.rounded.values()), np.float32)
    runs = _runs(layout)
    for name, run in runs.items():
        before = residual.get(name)
        flat[run] = _float32s(name, tensors[name])
        if before is not None and before.size == run.stop - run.start:
            flat[run] += before
    places = _largest(flat, layout.kept)
    steps, body = layout.numbers.encode(flat[places], noise)
    counts, gaps = _gaps(places, layout)
    front = {_COUNTS: counts, _GAPS: gaps, _STEPS: steps, _VALUES: body}
    coded = {spec.name: front[spec.name] for spec in layout.front}
    coded |= {name: value for name, value in tensors.items() if name not in layout.rounded}
    arrived = layout.numbers.decode(body, 0, steps)[1][: places.size]
    flat[places] -= _as_received(arrived, places, layout, runs)
    return Encoded(layout, coded, {name: flat[run] for name, run in runs.items()})


def _runs(layout: Layout) -> dict[str, slice]:
    """Where each tensor's numbers are among those of all."""
    runs, start = {}, 0
    for name, size in layout.rounded.items():
        runs[name] = slice(start, start + size)
        start += size
    return runs


def _largest(values: Float32s, count: int) -> NDArray[np.int64]:
    """The indices of the `count` largest magnitudes, in order; of equal ones the first."""
    sizes = values.view(np.uint32) & 0x7FFFFFFF  # finite float32 are in the order of their bits
    least = np.partition(sizes, sizes.size - count)[sizes.size - count]
    chosen = np.flatnonzero(sizes >= least)
    if chosen.size > count:
        ties = np.flatnonzero(sizes[chosen] == least)
        chosen = np.delete(chosen, ties[count - chosen.size :])
    return chosen


def _gaps(places: NDArray[np.int64], layout: Layout) -> tuple[Array, Array]:
    """How many places lie in each block; and of each how many numbers of its block lie between it and the last one."""
    begins = np.concatenate(([0], np.cumsum(layout.sparse_sizes)))
    counts = np.diff(np.searchsorted(places, begins))
    within = places - np.repeat(begins[:-1], counts)
    gaps = np.diff(within, prepend=0) - 1
    first = (np.cumsum(counts) - counts)[counts > 0]
    gaps[first] = within[first]
    return counts.astype(np.uint32), gaps.astype(np.uint16)


def _as_received(arrived: Float32s, places: NDArray[np.int64], layout: Layout, runs: dict[str, slice]) -> Float32s:
    """The numbers as they come out of the tensors' own dtypes, which may be narrower."""
    for spec in layout.schema:
        if spec.name in runs and DTYPES[spec.dtype].itemsize < arrived.itemsize:
            first, end = np.searchsorted(places, (runs[spec.name].start, runs[spec.name].stop))
            arrived[first:end] = _cast(arrived[first:end], spec)
    return arrived


# ---- and back --------------------------------------------------------------------------------------------------------


_Run: TypeAlias = tuple[str, int, Float32s]
"""A run of a tensor's real numbers: its name, the index of the first of them, and they themselves."""


class Walkable(Mapping[str, Array], ABC):
    """Tensors that can be walked piece by piece as well: once and letting go of them, or looking only."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]: ...

    @abstractmethod
    def peek(self) -> Iterator[Piece]: ...


class DecodedTensors(Mapping[str, Array]):
    """The tensors behind coded ones, each decoded when asked for; what is not among the coded ones is left out."""

    def __init__(self, coded: Tensors, layout: Layout) -> None:
        self._coded = coded
        self._layout = layout
        self._specs = {spec.name: spec for spec in layout.schema if spec.name in layout.rounded or spec.name in coded}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._layout!r}>"

    def __len__(self) -> int:
        return len(self._specs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __getitem__(self, name: str) -> Array:
        spec = self._specs[name]
        if name not in self._layout.rounded:
            return self._coded[name]
        whole = np.empty(_count_of(spec), np.float32)
        for _, start, values in self._runs_of(name):
            whole[start : start + values.size] = values
        value = _cast(whole, spec).reshape(spec.shape)
        value.flags.writeable = False
        return value

    def _runs_of(self, name: str) -> Iterator[_Run]:
        if isinstance(self._front, _Sparse):
            return self._front.runs(only=name)
        return self._front.runs(name, 0, self._coded[name])

    @cached_property
    def _front(self) -> _Dense | _Sparse:
        front = {spec.name: self._coded[spec.name] for spec in self._layout.front}
        return (_Dense if self._layout.codec.share is None else _Sparse)(self._layout, front)

    def check(self) -> None:
        """Raise `DecodeError` when the places of top-k are not such as its tensors have. Reads the places alone."""
        if self._layout.codec.share is not None and self._layout.rounded:
            _check_places(self._coded[_COUNTS], self._coded[_GAPS], self._layout)


class DecodedPieces(DecodedTensors):
    """`DecodedTensors` that can be walked piece by piece, as the coded ones can.

    `pieces` takes memory for the layout's front, one coded part and one block at a time, and lets go of what it has
    decoded; `peek` is the same, and keeps it.
    """

    def __init__(self, coded: Walkable, layout: Layout) -> None:
        super().__init__(coded, layout)
        self._walkable = coded

    def pieces(self) -> Iterator[Piece]:
        """Every element once, those of a tensor in order; what is behind us is let go."""
        return self._decoded(self._walkable.pieces())

    def peek(self) -> Iterator[Piece]:
        """The same, and nothing is let go."""
        return self._decoded(self._walkable.peek())

    def _decoded(self, coded: Iterator[Piece]) -> Iterator[Piece]:
        layout = self._layout
        front = {spec.name: np.empty(spec.shape, DTYPES[spec.dtype]) for spec in layout.front}
        to_come = sum(value.size for value in front.values())
        dense: _Dense | None = None
        for name, start, values in coded:
            if name in front:
                front[name][start : start + values.size] = values
                to_come -= values.size
                if not to_come and layout.codec.share is not None:
                    yield from map(self._as_piece, _Sparse(layout, front).runs())
            elif name in layout.rounded:
                dense = dense or _Dense(layout, front)
                yield from map(self._as_piece, dense.runs(name, start, values))
            else:
                yield name, start, values

    def _as_piece(self, run: _Run) -> Piece:
        name, start, values = run
        spec = self._specs[name]
        is_complex = DTYPES[spec.dtype].kind == "c"
        return name, start // 2 if is_complex else start, _cast(values, spec)


def _cast(values: Float32s, spec: TensorSpec) -> Array:
    dtype = DTYPES[spec.dtype]
    if dtype.kind == "c":
        return values.view(np.complex64).astype(dtype, copy=False)
    if dtype.newbyteorder("=") == np.float16:  # steps of a bucket may end beyond it
        values = np.clip(values, -_LARGEST_FLOAT16, _LARGEST_FLOAT16)
    return values.astype(dtype, copy=False)


class _Dense:
    """Numbers that all travel: each body with the steps of its buckets."""

    def __init__(self, layout: Layout, front: Tensors) -> None:
        self._numbers = layout.numbers
        self._sizes = layout.rounded
        self._steps: dict[str, Float32s] = {}
        steps, start = front.get(_STEPS, np.empty(0, np.float32)), 0
        for name, size in layout.rounded.items():
            end = start + self._numbers.buckets(size)
            self._steps[name], start = steps[start:end], end

    def runs(self, name: str, start: int, body: Array) -> Iterator[_Run]:
        """The numbers of a run of the body of `name`, which begins at its element `start`."""
        for block in blocks(body.size):
            first, values = self._numbers.decode(body[block], start + block.start, self._steps[name])
            yield name, first, values[: self._sizes[name] - first]


class _Sparse:
    """Numbers of which few travel: zeros with those in their places."""

    def __init__(self, layout: Layout, front: Tensors) -> None:
        self._blocks = layout.sparse_blocks
        self._ends = np.cumsum(front[_COUNTS], dtype=np.int64)
        self._gaps = front[_GAPS]
        steps = front.get(_STEPS, np.empty(0, np.float32))
        self._values = layout.numbers.decode(front[_VALUES], 0, steps)[1]

    def runs(self, only: str | None = None) -> Iterator[_Run]:
        """All numbers, block by block."""
        begin = 0
        for (name, block), end in zip(self._blocks, self._ends.tolist(), strict=True):
            if only in (None, name):
                values = np.zeros(block.stop - block.start, np.float32)
                places = np.cumsum(self._gaps[begin:end], dtype=np.int64)
                places += np.arange(end - begin)
                values[places] = self._values[begin:end]
                yield name, block.start, values
            begin = end


def _check_places(counts: Array, gaps: Array, layout: Layout) -> None:
    counts = counts.astype(np.int64)
    if (counts > layout.sparse_sizes).any() or int(counts.sum()) != gaps.size:
        raise DecodeError("places of top-k that do not add up")
    ends = np.cumsum(counts)
    passed = np.concatenate(([0], np.cumsum(gaps, dtype=np.int64)))
    last = passed[ends] - passed[ends - counts] + counts - 1
    if (last >= layout.sparse_sizes).any():
        raise DecodeError("a place of top-k that lies behind the end")

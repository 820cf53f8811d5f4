"""Floating-point numbers in fewer bits: halves, or whole steps of a bucket's own size, rounded without bias.

All of it works on flat float32 and is vectorised, a block at a time that stays in the cache.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Final, Literal, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedbus.errors import ConfigError
from fedbus.types import Array

BUCKET: Final = 512
"""Numbers that share a scale, as in the experiments of Alistarh et al. 2017, section 5."""
BLOCK: Final = 1 << 16
"""Numbers worked on at a time: a multiple of BUCKET."""

_FRACTION_BITS: Final = 16
"""Random bits for the rounding of one number: it is unbiased to 2**-17 of a step."""
_LEAST_STEP: Final = np.float32(2.0**-110)
"""A bucket of smaller steps is sent as zeros: 2**16 / step must be a float32."""

Float32s: TypeAlias = NDArray[np.float32]


class Noise:
    """Random bits that are a function of `parts` alone: a counter-based generator (Salmon et al. 2011, Philox)."""

    def __init__(self, *parts: int | str) -> None:
        key = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(key, "little"))

    def uint16(self, size: int) -> NDArray[np.uint16]:
        """The next `size` numbers from 0 to 65535."""
        return self._bits.random_raw(-(-size // 4)).astype("<u8", copy=False).view("<u2")[:size]


class Numbers(ABC):
    """How a run of numbers travels: a body, and for some a step for each bucket of the run."""

    dtype: str
    """Of the body, by its name on the wire."""
    reach: float
    """The largest magnitude that a body can hold, in steps."""

    @abstractmethod
    def buckets(self, size: int) -> int:
        """How many steps go with so many numbers."""

    @abstractmethod
    def body_size(self, size: int) -> int:
        """Elements of the body for so many numbers."""

    @abstractmethod
    def encode(self, values: Float32s, noise: Noise) -> tuple[Float32s, Array]:
        """The steps and the body of `values`, which are finite. Raises `ConfigError` for such as do not fit."""

    @abstractmethod
    def decode(self, body: Array, start: int, steps: Float32s) -> tuple[int, Float32s]:
        """The numbers in a run of the body that begins at its element `start`, with the index of the first of them.

        They may be more than there are: what fills the last element up.
        """


class Halves(Numbers):
    """Rounded to the nearest float16 or bfloat16 (or left as float32): relative errors of 2**-11, 2**-9 at most.

    What float16 holds ends at 65504, and below 2**-14 its steps are 2**-24; bfloat16 has the range of float32.
    """

    def __init__(self, kind: Literal["float16", "bfloat16", "float32"]) -> None:
        self.kind = kind
        self.dtype = {"float16": "<f2", "bfloat16": "bfloat16", "float32": "<f4"}[kind]
        self.reach = 1.0

    def __repr__(self) -> str:
        return f"Halves({self.kind!r})"

    def buckets(self, size: int) -> int:
        return 0

    def body_size(self, size: int) -> int:
        return size

    def encode(self, values: Float32s, noise: Noise) -> tuple[Float32s, Array]:
        none = np.empty(0, np.float32)
        if self.kind == "float32":
            return none, values
        if self.kind == "bfloat16":
            with np.errstate(over="ignore"):
                return none, _fitting(values.astype(ml_dtypes.bfloat16), self.kind)
        body = np.empty(values.size, np.float16)
        for block in blocks(values.size):
            body[block] = to_float16(values[block])
        return none, _fitting(body, self.kind)

    def decode(self, body: Array, start: int, steps: Float32s) -> tuple[int, Float32s]:
        if self.kind == "float16":
            return start, _FLOAT16.take(body.view(np.uint16))
        return start, body.astype(np.float32, copy=False)


def _fitting(body: Array, kind: str) -> Array:
    sizes = body.view(np.uint16) & 0x7FFF
    infinity = int(np.array(np.inf, body.dtype).view(np.uint16))
    if sizes.size and int(sizes.max()) >= infinity:
        advice = ": take bfloat16" if kind == "float16" else ""
        raise ConfigError(f"it holds numbers that are too large for {kind}{advice}")
    return body


_FLOAT16: Final = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""Every float16, by its bits: numpy itself converts one after the other."""


def to_float16(values: Float32s) -> Array:
    """`values` rounded to the nearest float16, ties to even, several times as fast as numpy does it."""
    bits = values.view(np.uint32)
    size = bits & 0x7FFFFFFF
    # Normal ones: the exponent has another bias, and 13 bits of the fraction go, the half to even.
    normal = size >> 13
    normal &= 1
    normal += size
    normal += np.uint32(0xFFF - (112 << 23) & 0xFFFFFFFF)
    normal >>= 13
    # Those below 2**-14: float32 has steps of 2**-24, that of a subnormal float16, from 0.5 to 1.
    below = (size.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.float32(0.5).view(np.uint32)
    half: NDArray[np.uint32] = np.where(size < 0x38800000, below, normal)
    np.minimum(half, 0x7C00, out=half, where=size >= 0x47000000)
    half |= bits >> 16 & 0x8000
    return half.astype(np.uint16).view(np.float16)


class Levels(Numbers):
    """Rounded at random to one of the two nearest multiples of a bucket's step, without bias.

    A bucket of 512 numbers v has the step ||v|| / levels, and v_i is sent as sign(v_i) xi_i of them: xi_i is one of
    the two whole numbers next to |v_i| / step, the upper one with a probability that makes E[xi_i] = |v_i| / step.

    norm: "l2" is QSGD (Alistarh et al. 2017, equation 3.1 with section 3.3's buckets): the variance is at most
        min(d / s^2, sqrt(d) / s) ||v||^2, for d = 512 numbers and s levels (lemma 3.1). "max" takes the largest
        magnitude instead, so that every level is used: the variance is at most d / (4 s^2) max|v_i|^2.
    """

    def __init__(self, levels: int, norm: Literal["l2", "max"]) -> None:
        assert 1 <= levels <= 127
        self.levels = levels
        self.norm = norm
        self.bits = 2 if levels == 1 else 4 if levels <= 7 else 8
        self.dtype = "|i1" if self.bits == 8 else "|u1"
        self._each = 8 // self.bits
        self._table = None if self.bits == 8 else _table(levels, self.bits)
        self.reach = 128.0 if self.bits == 8 else float(levels)

    def __repr__(self) -> str:
        return f"Levels({self.levels}, {self.norm!r})"

    def buckets(self, size: int) -> int:
        return -(-size // BUCKET)

    def body_size(self, size: int) -> int:
        return -(-size // self._each)

    def encode(self, values: Float32s, noise: Noise) -> tuple[Float32s, Array]:
        steps = np.empty(self.buckets(values.size), np.float32)
        body = np.empty(self.body_size(values.size), self.dtype)
        for block in blocks(values.size):
            rows = _rows(values[block])
            first = block.start // BUCKET
            step = steps[first : first + len(rows)] = self._steps(rows)
            taken = _rounded(rows, step, self.levels, noise)[: block.stop - block.start]
            packed = taken if self.bits == 8 else self._packed(taken)
            at = block.start // self._each
            body[at : at + packed.size] = packed
        if not np.isfinite(steps).all():
            raise ConfigError("it holds numbers that are too large for the scales of qsgd")
        return steps, body

    def _steps(self, rows: Float32s) -> Float32s:
        if self.norm == "max":
            scale = np.abs(rows).max(axis=1).astype(np.float64)
        else:
            wide = rows.astype(np.float64)  # squares of float32 leave its range
            scale = np.sqrt(np.einsum("ij,ij->i", wide, wide))
        with np.errstate(over="ignore"):
            steps: Float32s = (scale / self.levels).astype(np.float32)
        return steps

    def _packed(self, taken: NDArray[np.int8]) -> NDArray[np.uint8]:
        """Several to a byte, the first in the lowest bits, each counted from -levels."""
        codes = np.zeros(self.body_size(taken.size) * self._each, np.uint8)
        np.add(taken, self.levels, out=codes[: taken.size].view(np.int8))
        packed = codes[:: self._each].copy()
        for place in range(1, self._each):
            packed |= codes[place :: self._each] << place * self.bits
        return packed

    def decode(self, body: Array, start: int, steps: Float32s) -> tuple[int, Float32s]:
        taken = body if self._table is None else self._table.take(body).view(np.int8)
        values = taken.astype(np.float32)
        _scale(values, start * self._each, steps)
        return start * self._each, values


def _table(levels: int, bits: int) -> Array:
    """The numbers in each byte, side by side in one word; codes that no encoder writes stand for the largest."""
    codes = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1
    each = np.minimum(codes - levels, levels).astype(np.int8)
    return np.ascontiguousarray(each).view(f"u{8 // bits}").reshape(-1)


def _rows(values: Float32s) -> Float32s:
    """One bucket a row, the last filled up with zeros."""
    filling = np.zeros(-values.size % BUCKET, np.float32)
    rows: Float32s = (np.concatenate((values, filling)) if filling.size else values).reshape(-1, BUCKET)
    return rows


def _rounded(rows: Float32s, steps: Float32s, levels: int, noise: Noise) -> NDArray[np.int8]:
    """Whole steps, up or down at random: floor(x + u) with u evenly from [0, 1) is x at the mean."""
    is_zero = steps < _LEAST_STEP
    per_step = np.where(is_zero, 0, float(1 << _FRACTION_BITS) / np.where(is_zero, 1, steps)).astype(np.float32)
    scaled = rows * per_step[:, None]
    whole: NDArray[np.int32] = np.rint(scaled, out=scaled).astype(np.int32).reshape(-1)
    whole += noise.uint16(whole.size)
    whole >>= _FRACTION_BITS
    np.clip(whole, -levels, levels, out=whole)  # the step was rounded, too
    taken: NDArray[np.int8] = whole.astype(np.int8)
    return taken


def _scale(values: Float32s, start: int, steps: Float32s) -> None:
    """Multiply each of a run that begins at number `start` with the step of its bucket, in place."""
    first, head = start // BUCKET, min(-start % BUCKET, values.size)
    if head:
        values[:head] *= steps[first]
        first += 1
    whole = (values.size - head) // BUCKET
    rows = values[head : head + whole * BUCKET].reshape(-1, BUCKET)
    rows *= steps[first : first + whole, None]
    if head + whole * BUCKET < values.size:
        values[head + whole * BUCKET :] *= steps[first + whole]


def blocks(size: int, most: int = BLOCK) -> Iterator[slice]:
    """Cut `size` elements into slices of at most `most`."""
    return (slice(start, min(start + most, size)) for start in range(0, size, most))


def as_reals(values: Array) -> Array:
    """Flat numbers, complex ones as twice as many real ones."""
    flat: NDArray[Any] = np.ascontiguousarray(values).reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat

"""Numbers that add up exactly, and floats as integers of the same order.

A client's sums travel as integers, so that those of all clients add up to the same bits in whatever order they come,
and however the records are spread over the clients: a mean is the exact sum divided once.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedbus.types import Array

_MANTISSA_BITS: Final = 53
UNIT_BITS: Final = 1073 + _MANTISSA_BITS
"""Sums count units of 2**-1126: the last bit of the mantissa of the smallest float64, as `np.frexp` gives it."""

_LIMB_BITS: Final = 48
LIMB_END: Final = 1 << _LIMB_BITS
"""Limbs are below this in size, so that those of 32768 clients add up within int64."""
SUM_LIMBS: Final = -(-(UNIT_BITS + 1024 + 53) // _LIMB_BITS)
"""For the sum of 2**53 numbers below 2**1024."""
SQUARES_LIMBS: Final = -(-(2 * (UNIT_BITS + 1024) + 53) // _LIMB_BITS)

_BLOCK: Final = 1 << 16
_PART_BITS: Final = 22
_PART_MASK: Final = (1 << _PART_BITS) - 1
"""Three parts hold the 64 bits of an integer. Two products of parts, 2**16 times, stay below 2**61."""

_MAGNITUDE: Final = 2**63 - 1


def exact_sum(values: Array) -> int:
    """The sum of int64 or finite float64 numbers, in units of 2**-UNIT_BITS."""
    return sum(_block_sums(values, 1))


def exact_squares(values: Array) -> int:
    """The sum of their squares, in units of 2**-(2 UNIT_BITS)."""
    return sum(_block_sums(values, 2))


def _block_sums(values: Array, power: int) -> list[int]:
    return [_block_sum(values[at : at + _BLOCK], power) for at in range(0, values.size, _BLOCK)]


def _block_sum(values: Array, power: int) -> int:
    """Integers of one exponent at a time: their parts are multiplied and added in int64, without rounding."""
    mantissas, exponents = _decomposed(values)
    known, group = np.unique(exponents, return_inverse=True)
    size = np.abs(mantissas).view(np.uint64)  # as such -2**63 has a size, too
    parts = [((size >> np.uint64(shift)) & np.uint64(_PART_MASK)).astype(np.int64) for shift in (0, 22, 44)]
    if power == 1:
        sign = np.sign(mantissas)
        terms = [(index, sign * part) for index, part in enumerate(parts)]
    else:
        terms = [(i + j, parts[i] * parts[j] * (1 if i == j else 2)) for i in range(3) for j in range(i, 3)]
    total = 0
    for place, term in terms:
        sums = np.zeros(known.size, np.int64)
        np.add.at(sums, group.reshape(-1), term)
        for exponent, count in zip(known.tolist(), sums.tolist(), strict=True):
            total += count << (_PART_BITS * place + power * (exponent + UNIT_BITS))
    return total


def _decomposed(values: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(m, e) with value = m 2**e, both integers."""
    if values.dtype.kind == "i":
        return values.astype(np.int64), np.zeros(values.size, np.int64)
    fractions, exponents = np.frexp(values)
    return np.ldexp(fractions, _MANTISSA_BITS).astype(np.int64), exponents.astype(np.int64) - _MANTISSA_BITS


def to_limbs(total: int, limbs: int) -> NDArray[np.int64]:
    """An integer as digits of 48 bits, the lowest first, each with its sign."""
    digits = np.frombuffer(abs(total).to_bytes(limbs * _LIMB_BITS // 8, "little"), np.uint8).reshape(limbs, -1)
    wide = np.zeros((limbs, 8), np.uint8)
    wide[:, : digits.shape[1]] = digits
    limbs_of: NDArray[np.int64] = wide.view("<i8").reshape(-1).astype(np.int64)
    return -limbs_of if total < 0 else limbs_of


def from_limbs(limbs: list[int]) -> int:
    """The integer of such digits, or of sums of them."""
    return sum(limb << (_LIMB_BITS * index) for index, limb in enumerate(limbs))


def quotient(numerator: int, denominator: int) -> float:
    """The float64 nearest to it, infinite where it is too large for one."""
    try:
        return numerator / denominator
    except OverflowError:
        return math.inf if numerator > 0 else -math.inf


def root(numerator: int, denominator: int) -> float:
    """The square root of a quotient that may itself be too large, or too small, for a float64."""
    if numerator == 0:
        return 0.0
    shift = max(0, 128 + denominator.bit_length() - numerator.bit_length()) // 2 + 1
    return quotient(math.isqrt((numerator << 2 * shift) // denominator), 1 << shift)


# ---- keys ------------------------------------------------------------------------------------------------------------


def keys_of(values: Array) -> NDArray[np.int64]:
    """int64 in the order of the numbers: themselves for integers; for float64, neighbours for neighbouring floats."""
    if values.dtype.kind == "i":
        return values.astype(np.int64)
    bits: NDArray[Any] = (values.astype(np.float64) + 0.0).view(np.int64)  # -0.0 becomes 0.0
    return np.where(bits < 0, bits ^ _MAGNITUDE, bits)


def number_of(key: int, *, is_float: bool) -> int | float:
    """The number behind a key."""
    if not is_float:
        return key
    bits = key ^ _MAGNITUDE if key < 0 else key
    return float(np.int64(bits).view(np.float64))


def key_limits(*, is_float: bool) -> tuple[int, int]:
    """The lowest and the highest key that a number can have."""
    if not is_float:
        return -(2**63), 2**63 - 1
    low, high = keys_of(np.array([-math.inf, math.inf])).tolist()
    return low, high

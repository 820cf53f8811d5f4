"""How long updates are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np

from fedbus.strategies.base import ClientUpdate
from fedbus.types import Array, Piece

_RUN: Final = 1 << 13
"""Elements whose squares are summed at a time: always the same ones of a tensor, however it was cut."""


def squared_norm(update: ClientUpdate) -> float:
    """||d||^2 over all floating and complex tensors that the update holds.

    The same bits however the delta was cut into pieces. Integers and bools are left out: a counter of batches would
    outweigh all else. Reads the delta without letting go of it.
    """
    return math.fsum(_squares(update.peek()))


def _squares(pieces: Iterable[Piece]) -> Iterator[float]:
    for _, _, values in runs(pieces):
        wide = values.astype(np.float64)
        yield float(np.add.reduce(np.multiply(wide, wide, out=wide)))


def runs(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The reals of each floating or complex tensor in runs of `_RUN`, the last of each tensor shorter, however the
    tensors were cut; complex ones are real pairs, and are counted as such."""
    rest: Array | None = None
    last, start = "", 0
    for name, _, values in pieces:
        if name != last:
            if rest is not None:
                yield last, start, rest
            rest, last, start = None, name, 0
        if values.dtype.kind in "iub":
            continue
        flat = np.ascontiguousarray(values).view(values.real.dtype) if values.dtype.kind == "c" else values
        if rest is not None:
            wanted = _RUN - rest.size
            rest, flat = np.concatenate([rest, flat[:wanted]]), flat[wanted:]
            if rest.size < _RUN:
                continue
            yield name, start, rest
            start += _RUN
        whole = flat.size - flat.size % _RUN
        for at in range(0, whole, _RUN):
            yield name, start, flat[at : at + _RUN]
            start += _RUN
        rest = flat[whole:].copy() if whole < flat.size else None
    if rest is not None:
        yield last, start, rest

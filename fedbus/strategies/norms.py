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
    for values in _runs(pieces):
        wide = values.astype(np.float64)
        yield float(np.add.reduce(np.multiply(wide, wide, out=wide)))


def _runs(pieces: Iterable[Piece]) -> Iterator[Array]:
    """The elements of each tensor in runs of `_RUN`, the last of each tensor shorter; complex ones as real pairs."""
    rest: Array | None = None
    last = ""
    for name, _, values in pieces:
        if rest is not None and name != last:
            yield rest
            rest = None
        last = name
        if values.dtype.kind in "iub":
            continue
        flat = np.ascontiguousarray(values).view(values.real.dtype) if values.dtype.kind == "c" else values
        if rest is not None:
            wanted = _RUN - rest.size
            rest, flat = np.concatenate([rest, flat[:wanted]]), flat[wanted:]
            if rest.size < _RUN:
                continue
            yield rest
        whole = flat.size - flat.size % _RUN
        yield from (flat[start : start + _RUN] for start in range(0, whole, _RUN))
        rest = flat[whole:].copy() if whole < flat.size else None
    if rest is not None:
        yield rest

"""How quickly updates are folded, beside what memory and plain sums take for the same bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from fedbus.bench import noop
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.fedavg import FedAvg
from fedbus.types import Array, Tensors
from fedbus.wire.arrays import schema_of
from fedbus.wire.messages import Part
from fedbus.wire.transfer import PART_BYTES, Outgoing, PartedAssembly, checksum

_BLOCK: Final = 1 << 16
"""Elements that a plain fold takes at a time, so that what it widens stays in the cache."""
_GIB: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class FoldBench:
    """GiB of float32 updates in a second, on one core: the best of `clients` updates of `mib` MiB each.

    `read`: the largest element is looked for, and nothing written. `memcpy`: the update is copied. `plain_float32`:
    acc += w * x, block by block with a scratch array. `whole_float32`: the same in one expression for each tensor, as
    it is mostly written. `plain_float64`: the accumulator is float64. `exact`: FedAvg's fold, whose bits are the same
    in any order; it reads the parts as the server has them, as do all others but `whole_float32` and `memcpy`.
    """

    mib: float
    clients: int
    read: float
    memcpy: float
    plain_float32: float
    whole_float32: float
    plain_float64: float
    exact: float

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long the exact fold takes as each of the others."""
        others = ("read", "memcpy", "plain_float32", "whole_float32", "plain_float64")
        return {name: round(getattr(self, name) / self.exact, 3) for name in others}


class Sums:
    """A model's worth of accumulators for each way of folding, all in memory from the first update on."""

    def __init__(self, model: Tensors) -> None:
        self.copies = {name: np.full_like(value, 0) for name, value in model.items()}
        self.narrow = {name: np.full_like(value, 0) for name, value in model.items()}
        self.whole = {name: np.full_like(value, 0) for name, value in model.items()}
        self.wide = {name: np.full(value.shape, 0.0) for name, value in model.items()}
        self.strategy = FedAvg()
        self.exact = self.strategy.init(model)
        self._scratch = {np.dtype(dtype): np.empty(_BLOCK, dtype) for dtype in (np.float32, np.float64)}

    def ways(self, tensors: Tensors, update: ClientUpdate) -> dict[str, Callable[[], None]]:
        """Each way to deal with an update, which is given as it came, and as whole tensors."""
        return {
            "read": partial(self._read, update),
            "memcpy": partial(self._copy, tensors),
            "plain_float32": partial(self._plain, self.narrow, update),
            "whole_float32": partial(self._whole, tensors, update.num_examples),
            "plain_float64": partial(self._plain, self.wide, update),
            "exact": partial(self.strategy.fold, self.exact, update),  # the last: it lets go of the parts
        }

    def _read(self, update: ClientUpdate) -> None:
        for _, _, values in update.peek():
            np.maximum.reduce(values)

    def _copy(self, tensors: Tensors) -> None:
        for name, value in tensors.items():
            np.copyto(self.copies[name], value)

    def _plain(self, sums: dict[str, Array], update: ClientUpdate) -> None:
        for name, start, values in update.peek():
            total = sums[name]
            for first in range(0, values.size, _BLOCK):
                part = values[first : first + _BLOCK]
                scratch, at = self._scratch[total.dtype][: part.size], slice(start + first, start + first + part.size)
                if total.dtype != part.dtype:
                    np.copyto(scratch, part)  # quicker than a multiplication that casts as it goes
                    part = scratch
                np.multiply(part, total.dtype.type(update.num_examples), scratch)
                np.add(total[at], scratch, total[at])

    def _whole(self, tensors: Tensors, num_examples: int) -> None:
        for name, value in tensors.items():
            self.whole[name] += np.float32(num_examples) * value


def bench_fold(*, mib: float, clients: int) -> FoldBench:
    """Fold `clients` updates of `mib` MiB in each way, one way after the other for each update.

    Raises:
        ConfigError: for a size that is not a positive number.
    """
    if not (math.isfinite(mib) and mib > 0):
        raise ConfigError(f"--mib must be a positive number, not {mib:g}")
    delta = {name: value * np.float32(1e-2) for name, value in noop.model(mib).items()}
    sums = Sums(noop.model(mib))
    seconds: dict[str, float] = {}
    for client in range(clients):
        parts = payloads(delta)  # kept while it is measured: giving memory back is no part of a fold
        update = received(delta, parts, num_examples=1 + 37 * client)
        for name, fold in sums.ways(delta, update).items():
            seconds[name] = min(_seconds(fold), seconds.get(name, math.inf))
    gib = sum(value.nbytes for value in delta.values()) / _GIB
    return FoldBench(mib=mib, clients=clients, **{name: round(gib / best, 3) for name, best in seconds.items()})


def _seconds(work: Callable[[], None]) -> float:
    begun_at = time.perf_counter()
    work()
    return time.perf_counter() - begun_at


def payloads(delta: Tensors) -> list[memoryview]:
    """The bytes of each part of an update."""
    outgoing = Outgoing(delta)
    return [memoryview(b"".join(outgoing.part(index))) for index in range(outgoing.parts)]


def received(delta: Tensors, parts: Sequence[memoryview], num_examples: int) -> ClientUpdate:
    """The update as it lies on the server: in parts that came one by one."""
    assembly = PartedAssembly(schema_of(delta), PART_BYTES)
    for index, payload in enumerate(parts):
        assembly.take(Part(transfer="", index=index, checksum=checksum(payload), payload=payload))
    return ClientUpdate(client_id="bench", delta=assembly.tensors(), num_examples=num_examples)

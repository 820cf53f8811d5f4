"""One round of aggregation without a bus: how long folding and finishing take, and how much memory.

A process of its own feeds random updates, one after the other, to a strategy: its peak is that of the strategy and of
the two models, and not of whatever was measured before.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedbus.bench.measure import peak_rss_mib
from fedbus.bench.noop import model as model_of
from fedbus.errors import ConfigError, RunFailed, one_line
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.bulyan import Bulyan
from fedbus.strategies.clipping import CentredClipping
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fltrust import FLTrust
from fedbus.strategies.geometric import GeometricMedian
from fedbus.strategies.krum import Krum, MultiKrum
from fedbus.strategies.norm_bound import NormBound
from fedbus.strategies.order import Median, TrimmedMean
from fedbus.strategies.spool import Spool
from fedbus.types import Array, Piece, Tensors

_MODULE: Final = "fedbus.bench.aggregate"
_POOL: Final = 1 << 22
_PIECE: Final = 1 << 18
"""Elements of a piece: updates come in parts of about 1 MiB."""
_HOSTILE_SHARE: Final = 7
"""One of so many clients, which is within what Bulyan bears of 64."""


def _hostile(clients: int) -> int:
    return max(0, min(clients // _HOSTILE_SHARE, (clients - 3) // 4))


STRATEGIES: Final[dict[str, Callable[[int], Strategy]]] = {
    "fedavg": lambda n: FedAvg(),
    "median": lambda n: Median(),
    "trimmed-mean": lambda n: TrimmedMean(),
    "krum": lambda n: Krum(_hostile(n)),
    "multi-krum": lambda n: MultiKrum(_hostile(n)),
    "bulyan": lambda n: Bulyan(_hostile(n)),
    "geometric-median": lambda n: GeometricMedian(),
    "fltrust": lambda n: FLTrust(_as_it_is),
    "centred-clipping": lambda n: CentredClipping(10.0),
    "norm-bound": lambda n: NormBound(10.0),
}
"""By the name on the command line: for so many clients."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """`clients` updates of a model of `mib` MiB of float32, for one of `STRATEGIES`; spooled in `folder`."""

    strategy: str = "trimmed-mean"
    clients: int = 64
    mib: float = 100.0
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"--strategy {self.strategy!r} is not known: take one of {', '.join(STRATEGIES)}")
        if self.clients < 3 or not self.mib > 0:
            raise ConfigError("--clients must be 3 or more, --mib more than 0")


@dataclass(frozen=True, kw_only=True)
class AggregateBench:
    """What `fedbus bench aggregate` tells.

    `fold_s` and `finish_s` are of all updates, `finish_cpu_s` what all threads took for the latter. `read_s`: reading
    what was spooled once, doing nothing with it; None where nothing is spooled. `peak_mib` is the peak resident set, of
    which `start_mib` were there before the round, the model included.
    """

    strategy: str
    clients: int
    mib: float
    fold_s: float
    finish_s: float
    finish_cpu_s: float
    read_s: float | None
    start_mib: float
    peak_mib: float

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


async def bench_aggregate(spec: Spec) -> AggregateBench:
    """Measure in a process of its own. Raises `RunFailed` when that fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        _MODULE,
        json.dumps(dataclasses.asdict(spec)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = err.decode(errors="replace").strip().splitlines() or [f"exit code {process.returncode}"]
        raise RunFailed(f"the measurement failed: {one_line(lines[-1])}")
    return AggregateBench(**json.loads(out))


def measure(spec: Spec) -> AggregateBench:
    """Feed one round to the strategy, in this process."""
    model = model_of(spec.mib)
    strategy = STRATEGIES[spec.strategy](spec.clients)
    strategy.attach(folder=Path(spec.folder or tempfile.gettempdir()))
    pool = np.random.default_rng(0).standard_normal(_POOL, np.float32) * np.float32(0.01)
    start_mib = peak_rss_mib(os.getpid())
    began = time.perf_counter()
    state = strategy.init(model)
    for index in range(spec.clients):
        delta = _Random(model, pool, index)
        strategy.fold(state, ClientUpdate(client_id=f"{index:05}", task_id="1", delta=delta, num_examples=1))
    folded = time.perf_counter()
    read_s = _read_once(state) if isinstance(state, Spool) else None
    begins, cpu_s = time.perf_counter(), time.process_time()
    strategy.finish(state, model)
    finished, cpu_s = time.perf_counter(), time.process_time() - cpu_s
    return AggregateBench(
        strategy=spec.strategy,
        clients=spec.clients,
        mib=spec.mib,
        fold_s=round(folded - began, 3),
        finish_s=round(finished - begins, 3),
        finish_cpu_s=round(cpu_s, 3),
        read_s=None if read_s is None else round(read_s, 3),
        start_mib=round(start_mib or 0.0, 1),
        peak_mib=round(peak_rss_mib(os.getpid()) or 0.0, 1),
    )


def _read_once(spool: Spool) -> float:
    began = time.perf_counter()
    for _ in spool.reduce(lambda block: None):
        pass
    return time.perf_counter() - began


def _as_it_is(model: dict[str, Array]) -> Tensors:
    return model


class _Random(Mapping[str, Array]):
    """A random delta, in pieces that are made as they are read: runs of one pool, from places of its own."""

    def __init__(self, model: Tensors, pool: Array, seed: int) -> None:
        self._model = model
        self._pool = pool
        self._seed = seed

    def __len__(self) -> int:
        return len(self._model)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model)

    def __getitem__(self, name: str) -> Array:
        parts = [values for piece_of, _, values in self.pieces() if piece_of == name]
        return np.concatenate(parts).reshape(self._model[name].shape)

    def pieces(self) -> Iterator[Piece]:
        random = np.random.default_rng(self._seed)
        for name, value in self._model.items():
            for start in range(0, value.size, _PIECE):
                size = min(_PIECE, value.size - start)
                at = int(random.integers(0, self._pool.size - size))
                yield name, start, self._pool[at : at + size]

    def peek(self) -> Iterator[Piece]:
        return self.pieces()


def main(text: str) -> None:
    """What the child process does: a spec in, the result out, both as JSON."""
    spec: dict[str, Any] = json.loads(text)
    sys.stdout.write(measure(Spec(**spec)).to_json())


if __name__ == "__main__":
    main(sys.argv[1])

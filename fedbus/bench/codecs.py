"""How fast codecs are on this machine, beside a copy of the same bytes: float32 steps of normally distributed size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from fedbus.errors import ConfigError
from fedbus.types import Array
from fedbus.wire.compression import Codec, DecodedPieces
from fedbus.wire.floats import Noise
from fedbus.wire.messages import Part
from fedbus.wire.transfer import Outgoing, PartedAssembly, checksum

CODECS: Final = (
    "float16",
    "bfloat16",
    "int8",
    "qsgd:127",
    "qsgd:7",
    "topk:0.01",
    "topk:0.01+int8",
    "zstd",
    "zstd:3",
    "bfloat16+zstd",
    "int8+zstd",
)
_REPEATS: Final = 3


@dataclass(frozen=True, kw_only=True)
class CodecSpeed:
    """GiB/s of the bytes that a codec stands for, the best of some tries; `ratio`: those bytes over what travels.

    `encode_gib_s`: on one core, from tensors to parts. `decode_gib_s`: from parts to blocks, as an update is folded.
    """

    codec: str
    ratio: float
    encode_gib_s: float
    decode_gib_s: float


def bench_memcpy(mib: float) -> float:
    """GiB/s of a copy of `mib` MiB, read and written once."""
    values = _delta(mib)["w"]
    copy = np.empty_like(values)
    return _gib_s(values.nbytes, lambda: np.copyto(copy, values))


def bench_codecs(mib: float, codecs: tuple[str, ...] = CODECS) -> Iterator[CodecSpeed]:
    """Measure each codec on one tensor of `mib` MiB, one after the other.

    Raises:
        ConfigError: for a size or a codec that makes no sense, or a missing package.
    """
    delta = _delta(mib)
    for text in codecs:
        yield _bench(Codec.parse(text), delta)


def _delta(mib: float) -> dict[str, Array]:
    if not 0 < mib <= 4096:
        raise ConfigError("--mib must be more than 0, and 4096 at most")
    size = max(1, round(mib * (1 << 20) / 4))
    return {"w": 1e-3 * np.random.default_rng(0).standard_normal(size, np.float32)}


def _bench(codec: Codec, delta: dict[str, Array]) -> CodecSpeed:
    codec.check_installed()
    outgoing = Outgoing(delta, codec=codec, noise=Noise())
    coded = _arrived(outgoing)
    return CodecSpeed(
        codec=codec.text,
        ratio=round(outgoing.raw_bytes / outgoing.nbytes, 3),
        encode_gib_s=_gib_s(outgoing.raw_bytes, lambda: Outgoing(delta, codec=codec, noise=Noise())),
        decode_gib_s=_gib_s(outgoing.raw_bytes, lambda: sum(values.size for _, _, values in coded.peek())),
    )


def _arrived(outgoing: Outgoing) -> DecodedPieces:
    assembly = PartedAssembly(outgoing.schema, outgoing.part_bytes, outgoing.codec)
    for index in range(outgoing.parts):
        payload = memoryview(b"".join(outgoing.part(index)))
        assembly.take(Part(transfer="", index=index, checksum=checksum(payload), payload=payload))
    return DecodedPieces(assembly.tensors(), assembly.layout)


def _gib_s(nbytes: int, work: Callable[[], object]) -> float:
    best = min(_seconds(work) for _ in range(_REPEATS))
    return round(nbytes / best / (1 << 30), 3)


def _seconds(work: Callable[[], object]) -> float:
    began_at = time.perf_counter()
    work()
    return time.perf_counter() - began_at

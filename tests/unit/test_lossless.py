"""Parts packed without loss: what comes back is what went, and hostile frames take no memory."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fedbus.errors import DecodeError
from fedbus.wire.lossless import LEVELS, most_packed, packed, unpacked

STRIDES = (1, 2, 4, 8)


@given(st.binary(max_size=300), st.sampled_from(STRIDES), st.sampled_from(LEVELS))
def test_bytes_come_back_as_they_went(payload: bytes, stride: int, level: int) -> None:
    frame = packed(payload, stride, level)
    assert len(frame) <= most_packed(len(payload))
    assert unpacked(frame, len(payload), stride) == payload


@pytest.mark.parametrize("size", [1, 1 << 10, 1 << 17, (1 << 20) + 5])
def test_noise_grows_by_less_than_is_allowed_for(size: int) -> None:
    noise = np.random.default_rng(0).bytes(size)
    for level in LEVELS:
        assert size < len(packed(noise, 4, level)) <= most_packed(size)


def test_planes_by_hand() -> None:
    frame = packed(bytes([1, 2, 1, 3, 1, 4, 9]), 2)
    assert zstandard.decompress(frame) == bytes([1, 1, 1, 2, 3, 4, 9])


def test_byte_planes_pay_for_float32() -> None:
    delta = np.random.default_rng(0).normal(size=1 << 16).astype(np.float32).tobytes()
    assert len(packed(delta, 4)) < 0.95 * len(packed(delta, 1))


def bomb(size: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(size))


def streamed(payload: bytes) -> bytes:
    """A frame that does not say how much is in it."""
    compressor = zstandard.ZstdCompressor(write_content_size=False)
    return compressor.compress(payload)


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


@pytest.mark.parametrize(
    ("frame", "due"),
    [
        (bomb(64 << 20), 1 << 20),
        (packed(b"abcd", 1), 3),
        (packed(b"abcd", 1), 5),
        (packed(b"abcd", 1) + b"x", 4),
        (packed(b"abcd", 1) * 2, 4),
        (packed(b"abcd", 1)[:-1], 4),
        (packed(b"abcd", 1) + SKIPPABLE, 4),
        (streamed(b"abcd"), 4),
        (streamed(bytes(1 << 20)), 4),
        (SKIPPABLE, 4),
        (b"", 4),
        (b"x", 0),
        (packed(b"abcd", 1), 0),
    ],
)
def test_anything_but_one_frame_of_what_is_due_is_refused(frame: bytes, due: int) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            unpacked(frame, due, 1)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20, "it took memory for more than was due"
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=60), st.integers(0, 100))
def test_bytes_that_are_no_frame_are_a_decode_error(frame: bytes, due: int) -> None:
    for candidate in (frame, zstandard.FRAME_HEADER + frame, packed(frame, 1)[:-1] + b"\x00"):
        try:
            found = unpacked(candidate, due, 2)
        except DecodeError:
            continue
        assert len(found) == due


def test_without_the_package_one_line_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from fedbus.errors import ConfigError\n"
        "from fedbus.wire.compression import Codec\n"
        "Codec.parse('int8').check_installed()\n"
        "try: Codec.parse('int8+zstd').check_installed()\n"
        "except ConfigError as exc: print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "zstd needs the package zstandard: pip install 'fedbus[zstd]'\n"

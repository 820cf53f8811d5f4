"""The payload of one part as one Zstandard frame (RFC 8878), byte planes first: nothing is lost.

The receiver knows how many bytes are due before it looks at the frame, and takes memory for no more.
"""

from __future__ import annotations

from types import ModuleType
from typing import Final

import numpy as np

from fedbus.errors import ConfigError, DecodeError
from fedbus.wire.arrays import Buffer

LEVELS: Final = (-7, 19)
"""Higher ones want windows that are larger than a part."""
DEFAULT_LEVEL: Final = 1
"""On float32 deltas the next levels take up to three times as long and save nothing (`fedbus bench codecs`)."""
_WINDOW_BYTES: Final = 1 << 23
"""What a decoder must be ready for, RFC 8878 section 3.1.1.1.2; a part is no larger."""


def package() -> ModuleType:
    """The package zstandard. Raises `ConfigError` where it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise ConfigError("zstd needs the package zstandard: pip install 'fedbus[zstd]'") from None
    return zstandard


def packed(payload: Buffer, stride: int, level: int = DEFAULT_LEVEL) -> bytes:
    """The frame for `payload`: elements of `stride` bytes, all their first bytes, then all their second, ...

    The high bytes of floating-point numbers are much alike, the low ones are noise: apart they take less. What does not
    make a whole element stays behind the others. No bytes are no frame.
    """
    if not memoryview(payload).nbytes:
        return b""
    compressed: bytes = package().ZstdCompressor(level=level).compress(_planes(payload, stride))
    return compressed


def most_packed(nbytes: int) -> int:
    """No frame for so many bytes is larger: RFC 8878 stores what does not shrink in blocks of 128 KiB as it is."""
    return nbytes + nbytes // 256 + 128 if nbytes else 0


def unpacked(frame: Buffer, nbytes: int, stride: int) -> memoryview:
    """The `nbytes` bytes behind `frame`. Raises `DecodeError` when it is not one frame of exactly so many."""
    if not nbytes:
        if memoryview(frame).nbytes:
            raise DecodeError("a frame where nothing is due")
        return memoryview(b"")
    zstd = package()
    try:
        declared = zstd.get_frame_parameters(frame)
        # Only now: for a frame that tells its size, the decoder takes so much.
        if declared.content_size != nbytes:
            raise DecodeError(f"a zstd frame of {declared.content_size} bytes, {nbytes} are due")
        decompressor = zstd.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
        content = decompressor.decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    except zstd.ZstdError as exc:
        raise DecodeError(f"no zstd frame: {exc}") from exc
    return _elements(content, stride)


def _planes(payload: Buffer, stride: int) -> Buffer:
    raw = np.frombuffer(payload, np.uint8)
    whole = raw.size // stride * stride
    if stride == 1 or not whole:
        return payload
    planes = np.empty(raw.size, np.uint8)
    for place, plane in enumerate(planes[:whole].reshape(stride, -1)):  # twice as fast as the transpose as a whole
        plane[:] = raw[place:whole:stride]
    planes[whole:] = raw[whole:]
    return planes.data


def _elements(content: bytes, stride: int) -> memoryview:
    planes = np.frombuffer(content, np.uint8)
    whole = planes.size // stride * stride
    if stride == 1 or not whole:
        return memoryview(content)
    raw = np.empty(planes.size, np.uint8)
    for place, plane in enumerate(planes[:whole].reshape(stride, -1)):
        raw[place:whole:stride] = plane
    raw[whole:] = planes[whole:]
    return raw.data.toreadonly()

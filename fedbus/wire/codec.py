"""One message as one msgpack array: [protocol, head, payload].

The head is itself msgpack, [kind, fields], wrapped in a bin so that its bound is known before it is parsed; the
payload is a bin that is handed on as a view. Whatever the bytes, `decode` returns a message or raises `DecodeError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgpack

from fedbus.errors import ConfigError, DecodeError
from fedbus.wire import messages
from fedbus.wire.arrays import Buffer, Schema, TensorSpec, check_schema
from fedbus.wire.messages import Message

PROTOCOL: Final = 2
MAX_HEAD_BYTES: Final = 1 << 20
MAX_CONTROL_BYTES: Final = 1 << 17
"""A control message, whole: there may be many, and what a small map takes in memory is a hundred times its bytes."""
MAX_PART_BYTES: Final = 8 << 20
"""With its head a part stays under 16 MiB, the largest message that RabbitMQ 4 takes by default."""

_LARGE_HEAD_BYTES: Final = 1 << 16
_FRAME_BYTES: Final = 12
"""What `encode` puts around head and payload."""

MAX_TEXT_CHARS: Final = 4096
MAX_SCALARS: Final = 256
MAX_KEY_CHARS: Final = 256

KINDS: Final[dict[str, type[Message]]] = {
    kind.__name__: kind
    for kind in (
        messages.Join,
        messages.Heartbeat,
        messages.Leave,
        messages.TaskFailed,
        messages.EvaluateReport,
        messages.UploadRequest,
        messages.Echo,
        messages.StatusRequest,
        messages.Update,
        messages.Part,
        messages.Model,
        messages.Welcome,
        messages.ParametersTask,
        messages.FitTask,
        messages.EvaluateTask,
        messages.CancelTask,
        messages.UploadGrant,
        messages.Receipt,
        messages.Refusal,
        messages.RunEnded,
        messages.Status,
    )
}


# ---- encoding ---------------------------------------------------------------------------------------------------


def encode(message: Message) -> bytes:
    """The bytes of `message`: one copy of its payload.

    Raises `ConfigError` when the message is larger than any receiver would take.
    """
    buffers = _buffers(getattr(message, "payload", ()))
    size = sum(memoryview(buffer).nbytes for buffer in buffers)
    _check_bounds(message)
    try:
        head = msgpack.packb([type(message).__name__, _plain_fields(message)], use_bin_type=True)
    except (OverflowError, ValueError, TypeError) as exc:
        raise ConfigError(f"a {type(message).__name__} cannot travel: {exc}") from exc
    limit = MAX_CONTROL_BYTES - _FRAME_BYTES if isinstance(message, messages.ControlMessage) else MAX_HEAD_BYTES
    if len(head) > limit:
        raise ConfigError(
            f"a {type(message).__name__} with {len(head)} bytes of names and metrics cannot travel: "
            f"{limit} at most (fewer tensors or shorter names)"
        )
    if size > MAX_PART_BYTES:
        raise ConfigError(f"a part of {size} bytes cannot travel: {MAX_PART_BYTES} at most")
    return b"".join((b"\x93", bytes([PROTOCOL]), _bin_header(len(head)), head, _bin_header(size), *buffers))


def _buffers(payload: messages.Payload) -> Sequence[Buffer]:
    return (payload,) if isinstance(payload, bytes | bytearray | memoryview) else payload


def _check_bounds(message: Message) -> None:
    """What the decoder would refuse must fail here, where somebody can be told."""
    for name, check in _CHECKS[type(message)].items():
        if name not in ("payload", "schema"):
            value = getattr(message, name)
            try:
                check(dict(value) if isinstance(value, Mapping) else value)
            except DecodeError as exc:
                raise ConfigError(f"a {type(message).__name__} cannot travel: {name}: {exc}") from exc


def _bin_header(size: int) -> bytes:
    return struct.pack(">BI", 0xC6, size)


def _plain_fields(message: Message) -> dict[str, object]:
    fields: dict[str, object] = {}
    for field in dataclasses.fields(message):
        if field.name == "schema":
            fields["schema"] = [(spec.name, spec.dtype, spec.shape) for spec in getattr(message, "schema", ())]
        elif field.name != "payload":
            fields[field.name] = getattr(message, field.name)
    return fields


# ---- decoding ---------------------------------------------------------------------------------------------------


def decode(body: Buffer, *, most_bytes: int | None = None) -> Message:
    """The message in `body`; its payload is a view into it. Raises `DecodeError`, and nothing else.

    What has more than `most_bytes` is not looked at.
    """
    view = memoryview(body)
    if most_bytes is not None and len(view) > most_bytes:
        raise DecodeError(f"a message of {len(view)} bytes, {most_bytes} at most")
    if len(view) < 2 or view[0] != 0x93:
        raise DecodeError("not a fedbus message")
    if view[1] != PROTOCOL:
        raise DecodeError(f"protocol {view[1]} where {PROTOCOL} is spoken: upgrade the older side")
    head, end = _bin(view, 2, MAX_HEAD_BYTES)
    payload, end = _bin(view, end, MAX_PART_BYTES)
    if end != len(view):
        raise DecodeError(f"{len(view) - end} bytes too many behind the payload")
    return _message(_parse_head(head), payload)


_BIN_FORMATS: Final = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}


def _bin(view: memoryview, start: int, limit: int) -> tuple[memoryview, int]:
    """The msgpack bin (8, 16 or 32) at `start`, with the position behind it."""
    if start >= len(view) or view[start] not in _BIN_FORMATS:
        raise DecodeError("not a fedbus message: a bin is missing")
    size_format = _BIN_FORMATS[view[start]]
    begin = start + 1 + struct.calcsize(size_format)
    if begin > len(view):
        raise DecodeError("a message that is cut short")
    (size,) = struct.unpack_from(size_format, view, start + 1)
    if size > limit:
        raise DecodeError(f"{size} bytes declared, {limit} at most")
    if begin + size > len(view):
        raise DecodeError(f"a message that is cut short: {size} bytes declared, {len(view) - begin} there")
    return view[begin : begin + size], begin + size


@contextlib.contextmanager
def _without_collector(size: int) -> Iterator[None]:
    """A megabyte of empty lists is unpacked five times as fast where nobody looks for cycles all the while."""
    if size < _LARGE_HEAD_BYTES or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _parse_head(head: memoryview) -> Any:
    with _without_collector(len(head)):
        return _unpacked(head)


def _unpacked(head: memoryview) -> Any:
    try:
        return msgpack.unpackb(
            head,
            raw=False,
            strict_map_key=True,
            use_list=True,
            max_str_len=65_536,
            max_bin_len=65_536,
            max_array_len=65_536,
            max_map_len=4_096,
            max_ext_len=0,
        )
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as exc:
        raise DecodeError(f"a head that is not msgpack: {exc or type(exc).__name__}") from exc


def _message(head: Any, payload: memoryview) -> Message:
    if not (isinstance(head, list) and len(head) == 2 and isinstance(head[1], dict)):
        raise DecodeError("a head that is not [kind, fields]")
    kind = KINDS.get(head[0]) if isinstance(head[0], str) else None
    if kind is None:
        raise DecodeError(f"an unknown kind of message: {str(head[0])[:40]!r}")
    checks = _CHECKS[kind]
    if "payload" not in checks and len(payload):
        raise DecodeError(f"a {kind.__name__} with a payload")
    fields = head[1]
    values: dict[str, Any] = {}
    for name, check in checks.items():  # fields that we do not know are left to newer versions
        if name == "payload":
            values[name] = payload
            continue
        if name not in fields:
            raise DecodeError(f"a {kind.__name__} without {name}")
        try:
            values[name] = check(fields[name])
        except DecodeError as exc:
            raise DecodeError(f"{kind.__name__}.{name}: {exc}") from exc
    return kind(**values)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS:
        raise DecodeError(f"not a string of at most {MAX_TEXT_CHARS} characters")
    return value


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DecodeError("not an integer")
    return value


def _count(value: Any) -> int:
    if not 0 <= _int(value) < 1 << 63:
        raise DecodeError("not a count")
    return int(value)


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise DecodeError("not a number")
    return float(value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise DecodeError("not a bool")
    return value


def _scalars(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_SCALARS:
        raise DecodeError(f"not a map of at most {MAX_SCALARS} entries")
    for key, item in value.items():
        if not isinstance(key, str):
            raise DecodeError("a key that is not a string")
        if len(key) > MAX_KEY_CHARS or not key.isprintable():
            raise DecodeError(f"the key {key[:40]!r}... is longer than {MAX_KEY_CHARS} characters, or not printable")
        if not isinstance(item, bool | int | float | str | bytes):
            raise DecodeError(f"{key[:40]!r} is not a bool, number, string or bytes")
        if isinstance(item, str | bytes) and len(item) > MAX_TEXT_CHARS:
            raise DecodeError(f"{key[:40]!r} is longer than {MAX_TEXT_CHARS}")
    return value


def _schema(value: Any) -> Schema:
    if not isinstance(value, list):
        raise DecodeError("not a list of tensors")
    schema = tuple(_spec(entry) for entry in value)
    check_schema(schema)
    return schema


def _spec(entry: Any) -> TensorSpec:
    if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[2], list)):
        raise DecodeError("a tensor that is not [name, dtype, shape]")
    return TensorSpec(_text(entry[0]), _text(entry[1]), tuple(_count(side) for side in entry[2]))


def _never(value: Any) -> Any:  # the payload has its own place
    raise DecodeError("not a field")


_BY_ANNOTATION: Final[dict[str, Callable[[Any], Any]]] = {
    "Text": _text,
    "int": _int,
    "Count": _count,
    "float": _float,
    "bool": _bool,
    "Scalars": _scalars,
    "Schema": _schema,
    "Payload": _never,
}

_CHECKS: Final[dict[type[Message], dict[str, Callable[[Any], Any]]]] = {
    kind: {field.name: _BY_ANNOTATION[str(field.type)] for field in dataclasses.fields(kind)} for kind in KINDS.values()
}

"""Updates in a codec on their way: parts in any order, what they decode to, and hostile ones refused with a reason."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedbus.bus.base import Delivery
from fedbus.errors import DecodeError, UpdateRefused
from fedbus.server.staging import MAX_STEP, Staging, UpdateCheck
from fedbus.types import Array, ExtraSpec, Tensors
from fedbus.wire import messages as m
from fedbus.wire.arrays import payload_bytes
from fedbus.wire.codec import decode, encode
from fedbus.wire.compression import Codec, Encoded
from fedbus.wire.compression import encode as honest
from fedbus.wire.floats import Noise
from fedbus.wire.lossless import packed
from fedbus.wire.transfer import Assembly, Outgoing, checksum

PART = 1 << 16
RNG = np.random.default_rng(0)
DELTA: dict[str, Array] = {
    "w": RNG.normal(size=(300, 301)).astype(np.float32),
    "n": np.arange(5),
    "v": RNG.normal(size=70_000).astype(np.float32),
    "extra/c": RNG.normal(size=1000).astype(np.float32),
}
MODEL = {name: value for name, value in DELTA.items() if name != "extra/c"}
EXTRAS = {"c": ExtraSpec(dtype=np.dtype("<f4"), shape=(1000,))}
CODECS = ("", "zstd", "float16", "bfloat16+zstd", "int8", "int8+zstd", "qsgd:7", "topk:0.01", "topk:0.2+float16+zstd")


def messages_of(outgoing: Outgoing, **fields: Any) -> list[Any]:
    """Head and parts, as they come out of the decoder."""
    payloads = [b"".join(outgoing.part(index)) for index in range(outgoing.parts)]
    values: dict[str, Any] = {
        "client_id": "c1", "task_id": "t", "run_id": "r", "transfer": "x", "version": 0, "num_examples": 1,
        "metrics": {}, "schema": outgoing.schema, "part_bytes": outgoing.part_bytes, "checksum": checksum(payloads[0]),
        "payload": payloads[0], "codec": outgoing.codec.text,
    }  # fmt: skip
    parts = [m.Part(transfer="x", index=i, checksum=checksum(p), payload=p) for i, p in enumerate(payloads)]
    sent: list[m.Message] = [m.Update(**{**values, **fields}), *parts[1:]]
    return [decode(encode(message)) for message in sent]


def outgoing_of(text: str, delta: Tensors = DELTA) -> Outgoing:
    return Outgoing(delta, PART, codec=Codec.parse(text), noise=Noise("a", 1))


def stage(staging: Staging, messages: list[Any]) -> int | None:
    token = None
    for tag, message in enumerate(messages):
        came = Delivery(body=b"", tag=tag, routing_key="", redelivered=False, offset=None, user_id="c1")
        begin: Callable[..., int | None] = staging.begin if isinstance(message, m.Update) else staging.add
        token = begin(message, came, 0.0)
    return token


@pytest.mark.parametrize("text", CODECS)
def test_parts_in_any_order_decode_to_what_was_sent(text: str) -> None:
    outgoing = outgoing_of(text)
    messages = messages_of(outgoing)
    assembly = Assembly(outgoing.schema, PART, Codec.parse(text))
    for message in random.Random(1).sample(messages, len(messages)):
        assert assembly.take(message)
    assert assembly.received_bytes == outgoing.nbytes == sum(len(message.payload) for message in messages)
    assert outgoing.raw_bytes == payload_bytes(outgoing.schema)
    whole = assembly.tensors()
    assert list(whole) == list(DELTA)

    UpdateCheck(MODEL, EXTRAS, Codec.parse(text)).head(messages[0])
    staging = Staging()
    token = stage(staging, random.Random(2).sample(messages, len(messages)))
    assert token is not None
    assert staging.held_bytes == outgoing.nbytes, "it lies there as it came"
    update = staging.get(token)
    assert (update.nbytes, update.raw_bytes) == (outgoing.nbytes, outgoing.raw_bytes)
    assert update.tensors is not None
    assert update.extra is not None
    assert list(update.tensors) == list(MODEL)
    np.testing.assert_array_equal(update.extra["c"], DELTA["extra/c"])
    walked = {name: np.zeros(value.size, value.dtype) for name, value in MODEL.items()}
    for name, start, values in update.tensors.pieces():
        walked[name][start : start + values.size] = values
    for name, value in MODEL.items():
        np.testing.assert_array_equal(walked[name].reshape(value.shape), whole[name])
        assert whole[name].dtype == value.dtype
    for name, start, values in update.extra.pieces():
        np.testing.assert_array_equal(values, DELTA[f"extra/{name}"][start : start + values.size])
    for name in ("n", "extra/c"):
        np.testing.assert_array_equal(whole[name], DELTA[name])
    if not Codec.parse(text).is_lossy:
        np.testing.assert_array_equal(whole["w"], DELTA["w"])


@pytest.mark.parametrize("text", ["zstd", "topk:0.5+zstd"])
def test_what_waits_takes_no_more_memory_than_it_has_bytes(text: str) -> None:
    outgoing = Outgoing({"w": np.zeros(1 << 21, np.float32)}, 1 << 20, codec=Codec.parse(text))
    messages = messages_of(outgoing)
    staging = Staging()
    tracemalloc.start()
    try:
        token = stage(staging, messages)
        assert token is not None
        assert tracemalloc.get_traced_memory()[0] < 1 << 18
        update = staging.get(token)
        assert update.tensors is not None
        assert [values.size for _, _, values in update.tensors.peek()]
        assert tracemalloc.get_traced_memory()[0] < 1 << 18
    finally:
        tracemalloc.stop()


def test_what_may_come_is_known_beforehand() -> None:
    for text in CODECS:
        most = UpdateCheck(MODEL, EXTRAS, Codec.parse(text)).nbytes
        assert outgoing_of(text).nbytes <= most < 1.02 * payload_bytes(outgoing_of("").schema)


def test_an_update_in_another_codec_than_its_task_asked_for_is_refused() -> None:
    check = UpdateCheck(MODEL, EXTRAS, Codec.parse("int8"))
    check.head(messages_of(outgoing_of("int8"))[0])
    for text in ("", "int8+zstd", "float16"):
        with pytest.raises(UpdateRefused, match=f"it came in the codec '{text.replace('+', '.')}', its task asked for"):
            check.head(messages_of(outgoing_of(text))[0])
    with pytest.raises(UpdateRefused, match="it came in the codec 'nonsense'"):
        check.head(messages_of(outgoing_of("int8"), codec="nonsense")[0])


def hostile(
    text: str, change: Callable[[dict[str, Array]], object], monkeypatch: pytest.MonkeyPatch, delta: Tensors = DELTA
) -> list[Any]:
    """What a client sends that encodes and then changes what travels."""

    def encoded(*args: Any) -> Encoded:
        result = honest(*args)
        for name, value in result.tensors.items():
            result.tensors[name] = value.copy()
        change(result.tensors)
        return result

    monkeypatch.setattr("fedbus.wire.transfer.encode", encoded)
    return messages_of(outgoing_of(text, delta))


@pytest.mark.parametrize(
    ("text", "name", "at", "value", "reason"),
    [
        ("int8", "#steps", 3, np.nan, "'#steps' holds NaN or infinite"),
        ("qsgd:7", "#steps", -1, np.inf, "'#steps' holds NaN or infinite"),
        ("int8", "#steps", 3, MAX_STEP / 100, "'#steps' moves by 2.36e\\+19"),
        ("int8+zstd", "#steps", 0, -MAX_STEP / 127, "'#steps' moves by"),
        ("float16", "w", 5, np.inf, "'w' holds NaN or infinite"),
        ("bfloat16+zstd", "v", 69_999, 2.0**70, "'v' moves by"),
        ("topk:0.01", "#values", 7, np.nan, "'#values' holds NaN"),
        ("topk:0.01", "#values", 7, 1e30, "'#values' moves by"),
        ("topk:0.2+float16+zstd", "#gaps", 9, 60_000, "of top-k"),
        ("topk:0.01", "#counts", 0, 0, "of top-k that do not add up"),
    ],
)
def test_hostile_numbers_are_refused_with_a_reason(
    text: str, name: str, at: int, value: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors[name][at] = value

    messages = hostile(text, change, monkeypatch)
    staging = Staging()
    with pytest.raises(UpdateRefused, match=reason):
        stage(staging, messages)
    staging.take_out(staging.refuse(messages[-1], Delivery(
        body=b"", tag=99, routing_key="", redelivered=False, offset=None, user_id="c1"
    )))  # fmt: skip
    assert staging.is_empty


def test_the_largest_that_hostile_steps_may_decode_to_is_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors["#steps"][:] = MAX_STEP / 128.5
        tensors["w"][:] = -128

    staging = Staging()
    token = stage(staging, hostile("int8", change, monkeypatch))
    assert token is not None
    tensors = staging.get(token).tensors
    assert tensors is not None
    assert MAX_STEP > float(np.abs(tensors["w"]).max()) > MAX_STEP / 1.01


def test_what_float16_cannot_hold_becomes_its_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(tensors: dict[str, Array]) -> None:
        tensors["#steps"][:] = 2.0**40

    delta = {"h": np.linspace(-1, 1, 4000).astype(np.float16)}
    staging = Staging()
    token = stage(staging, hostile("int8", change, monkeypatch, delta))
    assert token is not None
    tensors = staging.get(token).tensors
    assert tensors is not None
    assert float(np.abs(tensors["h"]).max()) == 65504


@pytest.mark.parametrize("payload", [b"", b"x" * 100, packed(bytes(1 << 20), 1), packed(bytes(PART), 1) + b"x"])
def test_a_part_that_is_not_the_frame_that_is_due_is_refused(payload: bytes) -> None:
    messages = messages_of(outgoing_of("int8+zstd"))
    bad = decode(encode(m.Part(transfer="x", index=1, checksum=checksum(payload), payload=payload)))
    staging = Staging()
    with pytest.raises(UpdateRefused):
        stage(staging, [messages[0], bad])


def test_a_frame_that_is_larger_than_any_is_not_looked_at() -> None:
    outgoing = outgoing_of("zstd")
    assembly = Assembly(outgoing.schema, PART, outgoing.codec)
    payload = memoryview(bytes(PART + PART // 256 + 129))
    with pytest.raises(DecodeError, match="65536 are due"):
        assembly.take(m.Part(transfer="x", index=1, checksum=checksum(payload), payload=payload))

"""Bytes to messages and back: what went in comes out, and bad bytes give DecodeError and nothing else."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedbus.errors import ConfigError, DecodeError
from fedbus.types import Array, Piece
from fedbus.wire import messages as m
from fedbus.wire.arrays import (
    ALIGN,
    DTYPES,
    MAX_PAYLOAD_BYTES,
    TensorSpec,
    check_schema,
    payload_bytes,
    schema_of,
    views,
)
from fedbus.wire.codec import KINDS, MAX_HEAD_BYTES, MAX_PART_BYTES, PROTOCOL, decode, encode
from fedbus.wire.transfer import Assembly, Outgoing, PartedAssembly, checksum, part_count
from tests.kit import pack

PLAIN_DTYPES = sorted(name for name in DTYPES if name != "bfloat16")


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """Any array that may travel: every dtype and byte order, 0-d, empty, C or Fortran order, strided."""
    name = draw(st.sampled_from([*PLAIN_DTYPES, "bfloat16"]))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    seed = draw(st.integers(0, 2**32 - 1))
    raw = np.random.default_rng(seed).integers(0, 256, size=(*shape, DTYPES[name].itemsize), dtype=np.uint8)
    if name == "|b1":
        raw &= 1
    array = raw.view(DTYPES[name]).reshape(shape)
    order = draw(st.sampled_from(["C", "F", "strided"]))
    if order == "F":
        return np.asfortranarray(array)
    return np.repeat(array, 2, axis=0)[::2] if order == "strided" and array.ndim else array


def same_bits(left: Array, right: Array) -> bool:
    return (
        left.dtype == right.dtype
        and left.dtype.byteorder == right.dtype.byteorder
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
    )


# ---- arrays ----------------------------------------------------------------------------------------------------------


@given(st.lists(arrays(), max_size=6))
def test_every_array_comes_back_as_it_went(values: list[Array]) -> None:
    tensors = {f"t{index}": value for index, value in enumerate(values)}
    schema, payload = pack(tensors)
    back = views(schema, bytes(payload))
    assert list(back) == list(tensors)
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


def test_bfloat16_keeps_its_dtype_and_values() -> None:
    value = np.array([1.5, -2.25, np.inf], ml_dtypes.bfloat16)
    schema, payload = pack({"w": value})
    assert schema[0].dtype == "bfloat16"
    assert same_bits(views(schema, payload)["w"], value)


def test_decoding_copies_nothing_and_the_views_cannot_be_written() -> None:
    schema, payload = pack({"w": np.arange(1000, dtype=np.float32)})
    body = bytes(payload)
    view = views(schema, body)["w"]
    assert np.shares_memory(view, np.frombuffer(body, np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1


def test_tensors_begin_on_aligned_offsets_and_padding_carries_no_old_memory() -> None:
    tensors: dict[str, Array] = {"a": np.ones(3, np.uint8), "b": np.ones(2, np.float64)}
    schema, payload = pack(tensors)
    assert payload_bytes(schema) == ALIGN + 16
    assert bytes(payload[3:ALIGN]) == bytes(ALIGN - 3)


@pytest.mark.parametrize("value", [np.array(["text"]), np.array([object()]), np.zeros(2, "M8[s]"), np.zeros(2, "V8")])
def test_arrays_that_cannot_travel_are_refused_in_one_line(value: Array) -> None:
    with pytest.raises(ConfigError, match="cannot travel"):
        pack({"w": value})


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (TensorSpec("w", "V2000000000", (1,)), "unknown dtype"),
        (TensorSpec("w", "O", (1,)), "unknown dtype"),
        (TensorSpec("w", "<f4", (2**33, 2**31)), "too large"),  # np.prod of it is 0
        (TensorSpec("w", "<f4", (0, 2**62)), "too large"),
        (TensorSpec("w", "<f4", (1,) * 33), "dimensions"),
        (TensorSpec("w", "<f4", (-1,)), "negative"),
        (TensorSpec("", "<f4", (1,)), "characters"),
        (TensorSpec("n" * 513, "<f4", (1,)), "characters"),
    ],
)
def test_a_schema_that_numpy_must_not_see_is_refused(spec: TensorSpec, complaint: str) -> None:
    with pytest.raises(DecodeError, match=complaint):
        check_schema((spec,))


def test_many_tensors_that_are_too_large_together_are_refused() -> None:
    half = TensorSpec("w", "|u1", (MAX_PAYLOAD_BYTES // 2 + 1,))
    with pytest.raises(DecodeError, match="bytes"):
        check_schema((half, dataclasses.replace(half, name="v")))


def test_a_name_must_not_come_twice() -> None:
    with pytest.raises(DecodeError, match="twice"):
        check_schema((TensorSpec("w", "<f4", ()), TensorSpec("w", "<f4", ())))


def test_a_payload_of_another_length_is_refused() -> None:
    schema = schema_of({"w": np.zeros(3, np.float32)})
    with pytest.raises(DecodeError, match="12"):
        views(schema, bytes(11))


# ---- messages --------------------------------------------------------------------------------------------------------

texts = st.text(max_size=20)
scalars = st.dictionaries(
    texts.filter(str.isprintable),
    st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts | st.binary(max_size=9),
    max_size=4,
)
schemas = st.lists(arrays(), max_size=4).map(lambda v: schema_of({str(i): a for i, a in enumerate(v)}))
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "Text": texts,
    "int": st.integers(-(2**63), 2**63 - 1),
    "Count": st.integers(0, 2**63 - 1),
    "float": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "Scalars": scalars,
    "Schema": schemas,
    "Payload": st.binary(max_size=64),
}


def any_message() -> st.SearchStrategy[m.Message]:
    def of(kind: type[m.Message]) -> st.SearchStrategy[m.Message]:
        return st.builds(kind, **{field.name: FIELDS[str(field.type)] for field in dataclasses.fields(kind)})

    return st.one_of([of(kind) for kind in KINDS.values()])


def plain(message: m.Message) -> dict[str, Any]:
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    return {name: bytes(value) if isinstance(value, memoryview) else value for name, value in values.items()}


@given(any_message())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_every_message_comes_back_as_it_went(message: m.Message) -> None:
    back = decode(encode(message))
    assert type(back) is type(message)
    assert plain(back) == plain(message)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_message_or_a_decode_error(body: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(body)


@given(any_message(), st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_damaged_bytes_give_a_message_or_a_decode_error(message: m.Message, data: st.DataObject) -> None:
    body = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut_at = data.draw(st.integers(0, len(body)))
    for damaged in (bytes(body), bytes(body[:cut_at])):
        outcome = decoded(damaged)
        assert isinstance(outcome, (DecodeError, *KINDS.values()))


msgpack_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_fields_of_the_wrong_type_give_a_decode_error_that_names_the_field(kind: str, data: st.DataObject) -> None:
    names = [field.name for field in dataclasses.fields(KINDS[kind]) if field.name != "payload"]
    fields = {name: data.draw(msgpack_values) for name in names}
    outcome = decoded(body_of([kind, fields]))
    assert isinstance(outcome, KINDS[kind]) or kind in str(outcome)


def decoded(body: bytes) -> m.Message | DecodeError:
    try:
        return decode(body)
    except DecodeError as exc:
        return exc


def body_of(head: object, payload: bytes = b"") -> bytes:
    packed = msgpack.packb(head)
    return b"".join(
        (
            b"\x93",
            bytes([PROTOCOL]),
            struct.pack(">BI", 0xC6, len(packed)),
            packed,
            struct.pack(">BI", 0xC6, len(payload)),
            payload,
        )
    )


def test_a_message_is_plain_msgpack() -> None:
    part = m.Part(transfer="t", index=1, checksum=2, payload=b"abc")
    protocol, head, payload = msgpack.unpackb(encode(part))
    assert (protocol, payload) == (PROTOCOL, b"abc")
    assert msgpack.unpackb(head) == ["Part", {"transfer": "t", "index": 1, "checksum": 2}]


def test_the_payload_is_a_view_into_the_body() -> None:
    body = encode(m.Part(transfer="t", index=1, checksum=2, payload=bytes(1000)))
    part = decode(body)
    assert isinstance(part, m.Part)
    assert isinstance(part.payload, memoryview)
    assert np.shares_memory(np.frombuffer(part.payload, np.uint8), np.frombuffer(body, np.uint8))


def test_another_protocol_is_told_to_upgrade() -> None:
    body = bytearray(encode(m.Join(client_id="a", session="s")))
    body[1] = PROTOCOL + 1
    with pytest.raises(DecodeError, match="upgrade"):
        decode(body)


def test_fields_of_a_newer_version_are_ignored() -> None:
    body = body_of(["Join", {"client_id": "a", "session": "s", "colour": "blue"}])
    assert decode(body) == m.Join(client_id="a", session="s")


@pytest.mark.parametrize(
    "head",
    [
        [{} for _ in range(70_000)],  # many small objects cost far more memory than bytes
        {str(i): i for i in range(5_000)},
        "x" * 70_000,
        ["Join", {"client_id": "x" * 5_000, "session": ""}],
        ["EvaluateReport", {"metrics": {str(i): i for i in range(257)}}],
        msgpack.Timestamp(0, 0),
        ["Join", {1: 2}],
        ["Nothing", {}],
        ["Join", {"client_id": "a"}],
        ["Receipt", {"task_id": "t", "run_id": "r", "round": -1, "staleness": 0}],
        ["Receipt", {"task_id": "t", "run_id": "r", "round": True, "staleness": 0}],
    ],
    ids=lambda head: str(head)[:30],
)
def test_heads_out_of_bounds_are_refused(head: object) -> None:
    with pytest.raises(DecodeError):
        decode(body_of(head))


def test_declared_sizes_are_checked_before_anything_is_read() -> None:
    huge = b"\x93" + bytes([PROTOCOL]) + struct.pack(">BI", 0xC6, 0xFFFFFFFF)
    with pytest.raises(DecodeError, match=str(MAX_HEAD_BYTES)):
        decode(huge)


def test_a_deeply_nested_head_is_refused() -> None:
    nested = b"\x91" * 100_000 + b"\xc0"
    body = b"\x93" + bytes([PROTOCOL]) + struct.pack(">BI", 0xC6, len(nested)) + nested + b"\xc4\x00"
    with pytest.raises(DecodeError):
        decode(body)


def test_a_payload_where_none_belongs_is_refused() -> None:
    with pytest.raises(DecodeError, match="payload"):
        decode(body_of(["Join", {"client_id": "a", "session": "s"}], b"x"))


def test_what_is_too_large_to_travel_is_refused_at_the_sender() -> None:
    with pytest.raises(ConfigError, match="part"):
        encode(m.Part(transfer="t", index=1, checksum=0, payload=bytes(MAX_PART_BYTES + 1)))
    with pytest.raises(ConfigError, match="cannot travel"):
        encode(m.EvaluateReport(client_id="a", task_id="t", run_id="r", loss=0, num_examples=1, metrics={"n": 2**70}))
    for metrics in ({str(i): i for i in range(257)}, {"note": "x" * 5_000}, {"\x1b]0;": 1}):
        with pytest.raises(ConfigError, match="metrics"):
            encode(m.EvaluateReport(client_id="a", task_id="t", run_id="r", loss=0, num_examples=1, metrics=metrics))
    schema = tuple(TensorSpec(f"{'long' * 100}{i}", "<f4", (1,)) for i in range(3_000))
    with pytest.raises(ConfigError, match="fewer tensors"):
        encode(m.Model(run_id="r", epoch=1, version=0, schema=schema, part_bytes=1, checksum=0, payload=b""))


# ---- transfers -------------------------------------------------------------------------------------------------------


def part_of(index: int, payload: bytes | bytearray | memoryview, check: int | None = None) -> m.Part:
    """A part as it comes out of the decoder."""
    view = memoryview(payload)
    return m.Part(transfer="t", index=index, checksum=checksum(view) if check is None else check, payload=view)


def parts_of(outgoing: Outgoing) -> list[m.Part]:
    return [part_of(index, b"".join(outgoing.part(index))) for index in range(outgoing.parts)]


@given(st.lists(arrays(), max_size=4), st.integers(1, 40), st.randoms(use_true_random=False))
def test_parts_in_any_order_and_twice_give_the_tensors(values: list[Array], part_bytes: int, random: Any) -> None:
    tensors = {str(index): value for index, value in enumerate(values)}
    outgoing = Outgoing(tensors, part_bytes)
    parts = parts_of(outgoing)
    assert len(parts) == part_count(outgoing.nbytes, part_bytes)
    random.shuffle(parts)
    assembly = Assembly(outgoing.schema, part_bytes)
    for count, part in enumerate(parts):
        assert assembly.missing == len(parts) - count
        assert assembly.take(part)
        assert not assembly.take(part)
    back = assembly.tensors()
    assert all(same_bits(back[name], tensors[name]) for name in tensors)


@given(st.lists(arrays(), max_size=6), st.sampled_from([ALIGN, 2 * ALIGN, 1 << 20]), st.randoms(use_true_random=False))
def test_parts_that_are_never_put_together_give_each_element_once(
    values: list[Array], part_bytes: int, random: Any
) -> None:
    tensors = {str(index): value for index, value in enumerate(values)}
    outgoing = Outgoing(tensors, part_bytes)
    parts = parts_of(outgoing)
    random.shuffle(parts)
    assembly = PartedAssembly(outgoing.schema, part_bytes)
    for part in parts:
        assert assembly.take(part)
    parted = assembly.tensors()
    assert list(parted) == list(tensors)
    assert all(same_bits(parted[name], tensors[name]) for name in tensors)
    assert_gives_each_element_once(parted.peek(), tensors)
    assert_gives_each_element_once(parted.pieces(), tensors)


def assert_gives_each_element_once(pieces: Iterable[Piece], tensors: dict[str, Array]) -> None:
    runs: dict[str, list[Array]] = {}
    for name, start, run in pieces:
        assert start == sum(earlier.size for earlier in runs.setdefault(name, []))
        runs[name].append(run)
    assert list(runs) == list(tensors)
    for name, value in tensors.items():
        assert all(run.dtype == value.dtype for run in runs[name])
        assert b"".join(run.tobytes() for run in runs[name]) == value.tobytes()


@given(st.lists(arrays(), max_size=4), st.lists(arrays(), max_size=4), st.sampled_from([ALIGN, 2 * ALIGN, 1 << 20]))
def test_parted_tensors_are_split_by_name_and_keep_what_the_others_need(
    values: list[Array], further: list[Array], part_bytes: int
) -> None:
    own = {str(index): value for index, value in enumerate(values)}
    others = {str(index): value for index, value in enumerate(further)}
    outgoing = Outgoing(own | {f"extra/{name}": value for name, value in others.items()}, part_bytes)
    assembly = PartedAssembly(outgoing.schema, part_bytes)
    for part in parts_of(outgoing):
        assembly.take(part)
    parted = assembly.tensors()
    first, second = parted.split("extra/")
    assert_gives_each_element_once(second.peek(), others)
    assert_gives_each_element_once(first.pieces(), own)
    assert all(same_bits(second[name], others[name]) for name in others)
    assert_gives_each_element_once(second.pieces(), others)
    assert not outgoing.nbytes or all(part is None for part in parted._parts), "memory that nobody frees"


def test_what_was_read_piece_by_piece_is_gone() -> None:
    outgoing = Outgoing({"w": np.arange(100.0)}, ALIGN)
    assembly = PartedAssembly(outgoing.schema, ALIGN)
    for part in parts_of(outgoing):
        assembly.take(part)
    parted = assembly.tensors()
    pieces = parted.pieces()
    for _ in range(3):
        next(pieces)
    assert [part is None for part in parted._parts].count(True) == 2  # the one at hand is still here
    with pytest.raises(KeyError, match="gone"):
        parted["w"]


def test_what_goes_out_is_not_copied_unless_it_has_to_be() -> None:
    whole, strided = np.arange(1000.0), np.arange(1000.0)[::2]
    (first,) = Outgoing({"w": whole}).part(0)
    assert np.shares_memory(np.frombuffer(first, np.uint8), whole)
    (second,) = Outgoing({"w": strided}).part(0)
    assert np.frombuffer(second).tolist() == strided.tolist()


@pytest.mark.parametrize("part_bytes", [1 << 20, 8])
def test_what_was_received_cannot_be_written_to(part_bytes: int) -> None:
    outgoing = Outgoing({"w": np.arange(10.0)}, part_bytes)
    assembly = Assembly(outgoing.schema, part_bytes)
    for index in range(outgoing.parts):
        assembly.take(part_of(index, bytearray(b"".join(outgoing.part(index)))))
    with pytest.raises(ValueError, match="read-only"):
        assembly.tensors()["w"] += 1


def test_a_transfer_of_one_part_is_not_copied() -> None:
    schema, payload = pack({"w": np.arange(10.0)})
    body = bytes(payload)
    assembly = Assembly(schema, 1 << 20)
    assembly.take(part_of(0, body))
    assert np.shares_memory(assembly.tensors()["w"], np.frombuffer(body, np.uint8))


@pytest.mark.parametrize(
    ("index", "part", "complaint"),
    [(0, b"123", "bytes"), (3, b"12345678", "behind the end"), (2**40, b"", "behind the end")],
)
def test_a_part_that_does_not_fit_is_refused(index: int, part: bytes, complaint: str) -> None:
    assembly = Assembly((TensorSpec("w", "|u1", (24,)),), 8)
    with pytest.raises(DecodeError, match=complaint):
        assembly.take(part_of(index, part))


def test_a_part_with_a_wrong_checksum_is_refused_and_still_missing() -> None:
    assembly = Assembly((TensorSpec("w", "|u1", (8,)),), 8)
    with pytest.raises(DecodeError, match="checksum"):
        assembly.take(part_of(0, bytes(8), check=1))
    assert assembly.missing == 1


@pytest.mark.parametrize("part_bytes", [0, MAX_PART_BYTES + 1])
def test_parts_of_an_absurd_size_are_refused(part_bytes: int) -> None:
    with pytest.raises(DecodeError, match="parts"):
        Assembly((TensorSpec("w", "|u1", (8,)),), part_bytes)


def test_parts_that_would_cut_a_number_in_two_are_refused_where_they_are_read_as_they_lie() -> None:
    with pytest.raises(DecodeError, match="multiple of 64"):
        PartedAssembly((TensorSpec("w", "<f8", (100,)),), 100)

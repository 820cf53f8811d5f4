"""Bounds of what hostile transfers may take, and each delivery settled once."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedbus.bus.base import Delivery
from fedbus.errors import DecodeError, UpdateRefused
from fedbus.server.staging import (
    MAX_ORPHAN_BYTES,
    MAX_ORPHAN_BYTES_OF_USER,
    MAX_STEP,
    Staging,
    UpdateCheck,
    check_step,
    metrics_bytes,
)
from fedbus.types import Tensors
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode
from fedbus.wire.transfer import Outgoing, checksum

PART = 1 << 16


def delivery(tag: int) -> Delivery:
    return Delivery(body=b"", tag=tag, routing_key="", redelivered=False, offset=None, user_id="m1")


def update_of_three_parts(transfer: str = "x") -> list[Any]:
    outgoing = Outgoing({"w": np.zeros(3 * PART // 4, np.float32)}, PART)
    payloads = [b"".join(outgoing.part(index)) for index in range(3)]
    head = m.Update(
        client_id="m1", task_id="t", run_id="r", transfer=transfer, version=0, num_examples=1, metrics={},
        schema=outgoing.schema, part_bytes=PART, checksum=checksum(payloads[0]), payload=payloads[0],
    )  # fmt: skip
    parts = [m.Part(transfer=transfer, index=i, checksum=checksum(p), payload=p) for i, p in enumerate(payloads)]
    messages: list[m.Message] = [head, *parts[1:]]
    return [decode(encode(message)) for message in messages]


def orphan(transfer: str, payload: bytes = b"") -> Any:
    return decode(encode(m.Part(transfer=transfer, index=1, checksum=0, payload=payload)))


def test_a_part_that_came_twice_before_its_head_is_settled_once_when_the_update_is_refused() -> None:
    """Found by fuzzing: RabbitMQ closes the channel of whoever settles a delivery twice."""
    staging = Staging()
    head, first, second = update_of_three_parts()
    short = dataclasses.replace(second, payload=memoryview(b"short"))
    for tag, part in enumerate((first, first, short), 1):
        staging.add(part, delivery(tag), 0.0)
    with pytest.raises(UpdateRefused, match="5 bytes"):
        staging.begin(head, delivery(4), 0.0)
    refused = staging.take_out(staging.refuse(head, delivery(4)))
    settled = [each.tag for each in (*refused.in_settling_order(), *staging.take_copies())]
    assert sorted(settled) == [1, 2, 3, 4]


def test_parts_without_a_head_are_bounded_for_each_user_empty_ones_too() -> None:
    staging = Staging()
    most = MAX_ORPHAN_BYTES_OF_USER // 4096
    for number in range(most):
        staging.add(orphan(f"m1/{number}"), delivery(number), 0.0, user="m1")
    with pytest.raises(DecodeError, match="not under way"):
        staging.add(orphan("m1/more"), delivery(most), 0.0, user="m1")
    staging.add(orphan("c1/x"), delivery(20_000), 0.0, user="c1")  # another's are not concerned
    for transfer in staging.of_user("m1"):
        staging.abort(transfer)
    assert staging.of_user("m1") == []
    staging.add(orphan("m1/again"), delivery(20_001), 0.0, user="m1")


def test_parts_without_a_head_are_bounded_in_all() -> None:
    staging = Staging()
    users = MAX_ORPHAN_BYTES // MAX_ORPHAN_BYTES_OF_USER
    large = bytes(MAX_ORPHAN_BYTES_OF_USER // 2 - 4096)
    for number in range(2 * users):
        staging.add(orphan(f"{number}", large), delivery(number), 0.0, user=f"m{number % users}")
    with pytest.raises(DecodeError):
        staging.add(orphan("more"), delivery(99), 0.0, user="c1")


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128", "bfloat16"])
@pytest.mark.parametrize(("value", "words"), [(np.nan, "NaN"), (-np.inf, "NaN or inf"), (-1e20, "too far")])
def test_a_step_is_finite_and_no_further_than_any_training_goes(dtype: str, value: float, words: str) -> None:
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    values = np.zeros(70_000, dtype)
    check_step("w", values)
    values[69_999] = value
    with pytest.raises(UpdateRefused, match=words):
        check_step("w", values)


def test_the_largest_step_that_counts_and_what_can_be_no_step() -> None:
    check_step("w", np.array([np.nextafter(MAX_STEP, 0), -np.nextafter(MAX_STEP, 0)]))
    check_step("w", np.array([65504], np.float16))
    check_step("w", np.array([2**63 - 1]))
    check_step("w", np.zeros(0, np.float32))
    with pytest.raises(UpdateRefused):
        check_step("w", np.array([0, MAX_STEP * 1j]))


def test_metrics_count_their_names_and_texts() -> None:
    assert metrics_bytes({"loss": 0.5, "note": "abc", "raw": b"12"}) == 4 + 8 + 4 + 3 + 3 + 2


def test_the_check_knows_how_large_an_update_can_be() -> None:
    model: Tensors = {"w": np.zeros((10, 10), np.float32), "n": np.zeros(3, np.int64), "b": np.zeros(5, np.bool_)}
    assert UpdateCheck(model).nbytes == Outgoing({**model, "b": np.zeros(5, np.int8)}).nbytes


def test_a_signalling_nan_is_refused_like_any_other() -> None:
    """Found by fuzzing: of one in bfloat16 numpy warns."""
    values = np.full(100, 0x7F81, np.uint16).view(ml_dtypes.bfloat16)
    with pytest.raises(UpdateRefused, match="'w' holds NaN"):
        check_step("w", values)

"""FedAvg against numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.fedavg import _BLOCK, FedAvg
from fedbus.strategies.metrics import weighted_mean
from fedbus.training.delta import update_delta
from fedbus.types import Array, Metrics, Tensors


def average(
    model: Tensors, trained: Sequence[tuple[Tensors, int]], discounts: list[float] | None = None
) -> dict[str, Array]:
    strategy = FedAvg()
    state = strategy.init(model)
    for index, (tensors, num_examples) in enumerate(trained):
        delta = update_delta(model, tensors)
        discount = discounts[index] if discounts else 1.0
        strategy.fold(
            state, ClientUpdate(client_id=str(index), delta=delta, num_examples=num_examples, discount=discount)
        )
    return strategy.finish(state, model)


def test_the_mean_is_weighted_by_num_examples() -> None:
    model = {"w": np.array([1.0, 2.0], np.float32)}
    new = average(model, [({"w": np.array([2.0, 2.0], np.float32)}, 10), ({"w": np.array([6.0, 0.0], np.float32)}, 30)])
    np.testing.assert_array_equal(new["w"], np.array([5.0, 0.5], np.float32))  # (2*10 + 6*30) / 40


def test_a_tensor_that_only_some_send_is_averaged_over_those() -> None:
    model = {"a": np.zeros(1), "b": np.zeros(1), "c": np.full(1, 7.0)}
    new = average(model, [({"a": np.ones(1), "b": np.full(1, 4.0)}, 1), ({"a": np.full(1, 3.0)}, 1)])
    assert [float(new[name][0]) for name in "abc"] == [2.0, 4.0, 7.0]


def test_a_discount_multiplies_the_weight() -> None:
    model = {"w": np.zeros(1)}
    new = average(model, [({"w": np.ones(1)}, 10), ({"w": np.full(1, 4.0)}, 10)], [1.0, 0.5])
    assert float(new["w"][0]) == pytest.approx((10 * 1 + 5 * 4) / 15)


def test_integers_take_the_rounded_mean() -> None:
    model = {"steps": np.array([100, 0], np.int64)}
    new = average(model, [({"steps": np.array([110, 1])}, 1), ({"steps": np.array([121, 2])}, 1)])
    assert new["steps"].tolist() == [116, 2]  # 115.5 and 1.5, ties to even
    assert new["steps"].dtype == np.int64


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_integers_at_the_ends_of_their_range_do_not_overflow(dtype: str) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    model = {"n": np.array([low, high], dtype)}
    swapped = np.array([high if dtype.endswith("8") else low + 8, low if dtype.endswith("8") else high - 8], dtype)
    np.testing.assert_array_equal(average(model, [({"n": swapped}, 3)])["n"], swapped)


@pytest.mark.parametrize(
    ("dtype", "before", "after"), [("int64", 0, 2**63 - 1), ("int64", -1, -(2**63)), ("uint64", 2**63 + 5, 2**64 - 1)]
)
def test_steps_as_long_as_the_range_end_near_where_they_should(dtype: str, before: int, after: int) -> None:
    new = average({"n": np.array([before], dtype)}, [({"n": np.array([after], dtype)}, 1)])["n"]
    assert abs(int(new[0]) - after) <= 2048  # float64 has no more digits there


def test_bools_take_the_weighted_majority_and_stay_on_a_tie() -> None:
    model = {"mask": np.array([True, True, False, False])}
    one = {"mask": np.array([False, False, True, True])}
    other = {"mask": np.array([True, False, False, True])}
    assert average(model, [(one, 1), (other, 1)])["mask"].tolist() == [True, False, False, True]
    assert average(model, [(one, 3), (other, 1)])["mask"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64])
def test_the_dtype_survives_and_the_sum_is_wider_than_it(dtype: Any) -> None:
    model = {"w": np.full(3, 1.0, dtype)}
    trained = [({"w": np.full(3, 1.0 + k / 8, dtype)}, 1) for k in range(8)]
    new = average(model, trained)["w"]
    assert new.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(new, np.full(3, 1.0 + 3.5 / 8, dtype))


def test_a_thousand_small_steps_are_not_lost_in_a_large_weight() -> None:
    model = {"w": np.zeros(1, np.float32)}
    trained = [({"w": np.ones(1, np.float32)}, 2**30), *[({"w": np.ones(1, np.float32)}, 1)] * 1000]
    assert float(average(model, trained)["w"][0]) == 1.0


def test_tensors_longer_than_a_block_zero_d_and_empty_ones_are_averaged_whole() -> None:
    size = 2 * _BLOCK + 17
    model: dict[str, Array] = {
        "long": np.zeros(size, np.float32),
        "scalar": np.array(1, np.float32),
        "empty": np.zeros((0, 3)),
    }
    trained: dict[str, Array] = {
        "long": np.arange(size, dtype=np.float32),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 3)),
    }
    new = average(model, [(trained, 5)])
    for name in model:
        np.testing.assert_array_equal(new[name], trained[name])


def test_the_model_itself_is_not_written_to() -> None:
    model = {"w": np.zeros(3)}
    model["w"].flags.writeable = False
    new = average(model, [({"w": np.ones(3)}, 1)])
    assert new["w"] is not model["w"]


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), st.integers(1, 10_000)), min_size=1
    )
)
def test_the_streaming_mean_is_the_weighted_mean(trained: list[tuple[list[float], int]]) -> None:
    model = {"w": np.array([0.5, -3.0, 100.0])}
    new = average(model, [({"w": np.array(values)}, n) for values, n in trained])
    expected = np.average([values for values, _ in trained], axis=0, weights=[n for _, n in trained])
    np.testing.assert_allclose(new["w"], expected, rtol=1e-9, atol=1e-9)


def test_metrics_are_averaged_over_the_clients_that_report_them() -> None:
    reports: list[tuple[int, Metrics]] = [
        (10, {"accuracy": 0.5, "note": "x"}),
        (30, {"accuracy": 0.9, "rare": 2}),
        (5, {"accuracy": float("nan")}),
    ]
    assert weighted_mean(reports) == {"accuracy": pytest.approx(0.8), "rare": 2.0}
    assert weighted_mean([(1, {"is_done": True}), (3, {"is_done": False})]) == {"is_done": 0.25}
    assert weighted_mean([]) == {}

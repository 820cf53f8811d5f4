"""FedAvg against numbers that can be checked by hand, and what it shares with FedBuff: the exact mean, in any order."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.exact import BLOCK
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fedbuff import FedBuff
from fedbus.strategies.metrics import weighted_mean
from fedbus.training.delta import update_delta
from fedbus.types import Array, Metrics, Piece, Tensors


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


def test_a_late_update_counts_its_discount_of_what_it_would() -> None:
    model = {"w": np.zeros(1)}
    new = average(model, [({"w": np.ones(1)}, 10), ({"w": np.full(1, 4.0)}, 10)], [1.0, 0.5])
    assert float(new["w"][0]) == pytest.approx((10 * 1 + 5 * 4) / 20)


def test_where_all_updates_are_late_the_model_moves_less() -> None:
    model = {"w": np.zeros(1)}
    new = average(model, [({"w": np.ones(1)}, 10), ({"w": np.full(1, 3.0)}, 10)], [0.5, 0.5])
    assert float(new["w"][0]) == pytest.approx(1.0)  # half of what it would be in time


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


def test_a_late_vote_for_what_is_there_already_counts_once() -> None:
    model: Tensors = {"mask": np.array([False])}
    state = FedAvg().init(model)
    for client_id, delta in (("late", -1), ("a", 1), ("b", 1)):  # the late one began from True
        FedAvg().fold(
            state,
            ClientUpdate(client_id=client_id, delta={"mask": np.array([delta], np.int8)}, num_examples=1),
        )
    assert FedAvg().finish(state, model)["mask"].tolist() == [True]  # two of three; the plain sum says 1/3


@pytest.mark.parametrize(
    ("dtype", "step", "end"), [("int8", 400, 127), ("uint8", 400, 255), ("int32", 2**40, 2**31 - 1)]
)
def test_a_step_longer_than_the_range_ends_at_its_limit(dtype: str, step: int, end: int) -> None:
    model: Tensors = {"n": np.array([0], dtype)}
    state = FedAvg().init(model)
    FedAvg().fold(state, ClientUpdate(client_id="a", delta={"n": np.array([step])}, num_examples=1))
    assert FedAvg().finish(state, model)["n"].tolist() == [end]


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
    size = 2 * BLOCK + 17
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


# ---- the order of arrival --------------------------------------------------------------------------------------------

FED_AVG = FedAvg()
EXACT = [FED_AVG, FedBuff(server_learning_rate=0.7)]


def updates_of(model: Tensors, count: int, nasty: Callable[[Array, np.random.Generator], None]) -> list[ClientUpdate]:
    """Updates with weights from 1 to 10**6, with and without a discount, some of them without some tensors."""
    rng = np.random.default_rng(1)
    updates = []
    for index in range(count):
        delta = {name: random_delta(value, rng) for name, value in model.items() if rng.random() < 0.9}
        for value in delta.values():
            if value.dtype.kind not in "iu" and rng.random() < 0.5:
                nasty(value, rng)
        num_examples, discount = int(10 ** rng.uniform(0, 6)), (index % 3 + 1) ** -0.5
        updates.append(
            ClientUpdate(client_id=str(index), delta=delta, num_examples=num_examples, staleness=1, discount=discount)
        )
    return updates


def random_delta(value: Array, rng: np.random.Generator) -> Array:
    if value.dtype.kind == "b":
        return rng.integers(-1, 2, value.shape).astype(np.int8)
    if value.dtype.kind in "iu":
        return rng.integers(-(2**40), 2**40, value.shape)
    delta = rng.normal(0, 1e-2, value.shape)
    return (delta + 1j * delta[::-1] if value.dtype.kind == "c" else delta).astype(value.dtype)


def tame(delta: Array, rng: np.random.Generator) -> None:
    pass


def with_outliers(delta: Array, rng: np.random.Generator) -> None:
    """Values that cancel, dwarf all others, or are the smallest there are."""
    huge = 1e4 if delta.dtype == np.float16 else 1e30
    at = rng.integers(0, delta.size, 6)
    delta[at] = np.array([huge, -huge, huge / 3, 5.0, np.finfo(np.float32).smallest_subnormal, 1e-7], delta.dtype)


def digest_of(model: Tensors, updates: Sequence[ClientUpdate], strategy: Strategy = FED_AVG) -> str:
    state = strategy.init(model)
    for update in updates:
        strategy.fold(state, update)
    digest = hashlib.sha256()
    for value in strategy.finish(state, model).values():
        digest.update(value.tobytes())
    return digest.hexdigest()


def digests_of(
    model: Tensors,
    updates: list[ClientUpdate],
    orders: int,
    strategy: Strategy = FED_AVG,
) -> set[str]:
    shuffled, order = list(updates), random.Random(2)
    digests = set()
    for _ in range(orders):
        order.shuffle(shuffled)
        digests.add(digest_of(model, shuffled, strategy))
    return digests


def model_of(dtype: Any, size: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {"w": rng.normal(0, 0.05, size).astype(dtype), "b": np.zeros(min(size, 64), dtype)}


@pytest.mark.parametrize("nasty", [tame, with_outliers])
@pytest.mark.parametrize("strategy", EXACT, ids=repr)
def test_a_thousand_orders_give_one_model(
    strategy: Strategy, nasty: Callable[[Array, np.random.Generator], None]
) -> None:
    model = model_of(np.float32, 500)
    assert len(digests_of(model, updates_of(model, 20, nasty), 1000, strategy)) == 1


@pytest.mark.parametrize("nasty", [tame, with_outliers])
def test_orders_of_updates_longer_than_a_block_give_one_model(
    nasty: Callable[[Array, np.random.Generator], None],
) -> None:
    model = model_of(np.float32, BLOCK + 17)
    assert len(digests_of(model, updates_of(model, 20, nasty), 6)) == 1


@pytest.mark.parametrize(
    "dtype", [np.float64, ml_dtypes.bfloat16, np.float16, np.complex64, np.complex128, np.int32, np.uint64, np.bool_]
)
@pytest.mark.parametrize("strategy", EXACT, ids=repr)
def test_the_order_does_not_show_in_any_dtype(strategy: Strategy, dtype: Any) -> None:
    model = model_of(dtype, 300)
    assert len(digests_of(model, updates_of(model, 20, with_outliers), 60, strategy)) == 1


def test_plain_sums_of_these_updates_would_show_their_order() -> None:
    """So that the tests above can fail."""
    model = {"w": model_of(np.float64, 300)["w"]}
    sent = [update for update in updates_of(model, 20, tame) if "w" in update.delta]
    terms = [update.delta["w"] * (update.num_examples * update.discount) for update in sent]
    assert sum(terms).tobytes() != sum(terms[::-1]).tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64])
def test_the_mean_is_that_of_plain_float64_sums(dtype: Any) -> None:
    model = {name: value.astype(dtype) for name, value in model_of(np.float32, 2000).items()}
    zeros = {name: np.zeros_like(value) for name, value in model.items()}
    updates = updates_of(model, 20, tame)
    state = FedAvg().init(model)
    for update in updates:
        FedAvg().fold(state, update)
    wide = np.complex128 if np.dtype(dtype).kind == "c" else np.float64
    new = FedAvg().finish(state, {name: value.astype(wide) for name, value in zeros.items()})
    for name in model:
        sent = [update for update in updates if name in update.delta]
        examples = sum(update.num_examples for update in sent)
        terms = [update.delta[name].astype(wide) * (update.num_examples * update.discount) for update in sent]
        largest = np.abs(terms).max() / examples
        np.testing.assert_allclose(new[name], sum(terms) / examples, rtol=0, atol=1e-9 * largest)


def test_small_elements_beside_a_large_one_take_their_updates() -> None:
    model: Tensors = {"w": np.array([1e9, 1e-3], np.float32)}
    trained = {"w": np.array([1e9, 1.0001e-3], np.float32)}
    np.testing.assert_array_equal(average(model, [(trained, 1), (trained, 10**6)])["w"], trained["w"])


def test_float64_keeps_its_digits() -> None:
    model: Tensors = {"w": np.array([0.5, -0.1])}
    trained = {"w": np.array([0.5 + 1e-13 / 3, -0.1 + 1e-6 / 7])}
    np.testing.assert_array_equal(average(model, [(trained, 1), (trained, 3)])["w"], trained["w"])


def test_a_model_of_the_smallest_numbers_can_be_trained() -> None:
    model: Tensors = {"w": np.array([5e-324, 0.0]), "v": np.array([1e-45], np.float32)}
    trained = {"w": np.array([5e-324, 0.25]), "v": np.array([0.25], np.float32)}
    new = average(model, [(trained, 1), (trained, 7)])
    assert (new["w"].tolist(), new["v"].tolist()) == ([5e-324, 0.25], [0.25])


# ---- updates in pieces -----------------------------------------------------------------------------------------------


class Pieces(dict[str, Array]):
    """A delta that hands itself out cut into runs of `sizes`, over and over."""

    def __init__(self, delta: Tensors, sizes: list[int]) -> None:
        super().__init__(delta)
        self._sizes = sizes

    def pieces(self) -> Iterator[Piece]:
        turn = 0
        for name, value in self.items():
            start = 0
            while start < value.size or start == value.size == 0:
                run = value.reshape(-1)[start : start + self._sizes[turn % len(self._sizes)]]
                yield name, start, run
                start, turn = start + max(run.size, 1), turn + 1


@given(st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_an_update_in_pieces_is_the_update(sizes: list[int]) -> None:
    model = model_of(np.float32, 300) | {"c": np.full(100, 1 + 1j, np.complex64), "empty": np.zeros((0, 2))}
    updates = updates_of(model, 3, lambda delta, rng: with_outliers(delta, rng) if delta.size else None)
    cut = [
        ClientUpdate(
            client_id=u.client_id, delta=Pieces(u.delta, sizes), num_examples=u.num_examples, discount=u.discount
        )
        for u in updates
    ]
    assert digest_of(model, cut) == digest_of(model, updates)


def test_a_tensor_in_pieces_weighs_once() -> None:
    model: Tensors = {"w": np.zeros(4, np.float32)}
    state = FedAvg().init(model)
    halves, whole = Pieces({"w": np.ones(4, np.float32)}, [1, 3]), {"w": np.full(4, 5, np.float32)}
    FedAvg().fold(state, ClientUpdate(client_id="a", delta=halves, num_examples=1))
    FedAvg().fold(state, ClientUpdate(client_id="b", delta=whole, num_examples=1))
    assert FedAvg().finish(state, model)["w"].tolist() == [3, 3, 3, 3]


def test_strided_updates_are_read_as_they_lie() -> None:
    model: Tensors = {"f": np.zeros((3, 2), np.float32), "c": np.zeros(3, np.complex64)}
    even = {
        "f": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "c": (np.arange(6) * (1 - 2j)).astype(np.complex64)[::2],
    }
    new = average(model, [(even, 2)])
    state = FedAvg().init(model)
    FedAvg().fold(state, ClientUpdate(client_id="a", delta=even, num_examples=2))
    for result in (new, FedAvg().finish(state, model)):
        for name in model:
            np.testing.assert_array_equal(result[name], even[name])


def test_the_memory_of_a_round_is_that_of_the_sums_and_a_new_tensor() -> None:
    """The sum of a tensor goes when its mean is there: the second new tensor fits where the first sum was."""
    size = 32 * BLOCK
    model: Tensors = {name: np.ones(size, np.float32) for name in "ab"}
    update = ClientUpdate(client_id="a", delta=model, num_examples=3)
    tracemalloc.start()
    try:
        state = FedAvg().init(model)
        FedAvg().fold(state, update)
        FedAvg().finish(state, model)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * size * 8 + size * 4 + 10 * BLOCK * 8


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_the_order_of_reports_does_not_show_in_metrics() -> None:
    reports: list[tuple[int, Metrics]] = [(n, {"loss": n**-0.5, "huge": 1.7e308}) for n in range(1, 40)]
    shuffled = random.Random(0).sample(reports, len(reports))
    assert weighted_mean(reports) == weighted_mean(shuffled)
    assert weighted_mean(reports)["huge"] == 1.7e308


def test_metrics_are_averaged_over_the_clients_that_report_them() -> None:
    reports: list[tuple[int, Metrics]] = [
        (10, {"accuracy": 0.5, "note": "x"}),
        (30, {"accuracy": 0.9, "rare": 2}),
        (5, {"accuracy": float("nan")}),
    ]
    assert weighted_mean(reports) == {"accuracy": pytest.approx(0.8), "rare": 2.0}
    assert weighted_mean([(1, {"is_done": True}), (3, {"is_done": False})]) == {"is_done": 0.25}
    assert weighted_mean([]) == {}

"""FedAsync against the closed form of its paper, where it differs from what is often taken for it."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedbus.config import Constant, Hinge, Polynomial, RoundConfig, Staleness
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.exact import BLOCK
from fedbus.strategies.fedasync import FedAsync
from fedbus.training.delta import update_delta
from fedbus.types import Array, Tensors

ROOT = Polynomial(0.5)


def update(
    base: Tensors, trained: Tensors, staleness: int = 0, *, alpha: float = 0.5, s: Staleness = ROOT
) -> ClientUpdate:
    return ClientUpdate(
        client_id="c",
        delta=update_delta(base, trained),
        num_examples=1,
        staleness=staleness,
        discount=alpha * s(staleness),
        base=base,
    )


def mixed(model: Tensors, updates: Sequence[ClientUpdate]) -> dict[str, Array]:
    strategy = FedAsync()
    state = strategy.init(model)
    for each in updates:
        strategy.fold(state, each)
    return strategy.finish(state, model)


def test_a_fresh_update_moves_the_model_alpha_of_the_way() -> None:
    model = {"w": np.array([1.0, 8.0])}
    new = mixed(model, [update(model, {"w": np.array([3.0, 4.0])}, alpha=0.25)])
    assert new["w"].tolist() == [1.5, 7.0]


def test_a_late_update_mixes_in_the_weights_and_not_the_delta() -> None:
    model, base = {"w": np.array([10.0])}, {"w": np.array([2.0])}
    new = mixed(model, [update(base, {"w": np.array([4.0])}, 3)])  # a = 0.5 / sqrt(4)
    assert new["w"].tolist() == [0.75 * 10 + 0.25 * 4]  # 8.5; adding 0.25 of the delta would give 10.5


@pytest.mark.parametrize(
    ("s", "staleness", "a"),
    [
        (Constant(), 9, 0.8),
        (Polynomial(0.5), 0, 0.8),
        (Polynomial(0.5), 3, 0.4),
        (Polynomial(1.0), 3, 0.2),
        (Hinge(a=10, b=4), 4, 0.8),
        (Hinge(a=10, b=4), 5, 0.8 / 11),
        (Hinge(a=0.5, b=1), 3, 0.4),
    ],
)
def test_a_is_alpha_times_s_of_tau(s: Staleness, staleness: int, a: float) -> None:
    model, base = {"w": np.array([10.0])}, {"w": np.array([2.0])}
    new = mixed(model, [update(base, {"w": np.array([4.0])}, staleness, alpha=0.8, s=s)])
    np.testing.assert_allclose(new["w"], [(1 - a) * 10 + a * 4], rtol=1e-15)


def test_several_updates_are_mixed_in_one_after_the_other() -> None:
    model = {"w": np.array([0.0])}
    new = mixed(model, [update(model, {"w": np.array([8.0])}), update(model, {"w": np.array([0.0])}, 3)])
    assert new["w"].tolist() == [0.75 * 4.0]


def test_an_alpha_of_one_takes_the_clients_weights() -> None:
    model, base, trained = ({"w": np.array([value])} for value in (10.0, 2.0, 4.0))
    assert mixed(model, [update(base, trained, 5, alpha=1, s=Constant())])["w"].tolist() == [4.0]


values = hnp.arrays(np.float32, 5, elements=st.floats(-1e3, 1e3, width=32))


@given(values, values, values, st.integers(0, 20), st.floats(0.01, 1))
def test_the_closed_form_of_the_paper_holds_to_the_rounding(
    now: Array, base: Array, trained: Array, staleness: int, alpha: float
) -> None:
    sent = update({"w": base}, {"w": trained}, staleness, alpha=alpha)
    new = mixed({"w": now}, [sent])["w"]
    wide = np.float64
    arrived = base.astype(wide) + sent.delta["w"].astype(wide)
    expected = (1 - sent.discount) * now.astype(wide) + sent.discount * arrived
    largest = np.abs([now, base, trained]).max()
    smallest = 2.0**-149  # float32 has no finer steps
    np.testing.assert_allclose(new, expected, rtol=2**-24, atol=1e-13 * largest + smallest)


@given(values, values, st.floats(0.01, 1))
def test_without_staleness_it_is_a_step_of_alpha_times_the_delta(base: Array, trained: Array, alpha: float) -> None:
    sent = update({"w": base}, {"w": trained}, alpha=alpha)
    expected = base.astype(np.float64) + alpha * sent.delta["w"].astype(np.float64)
    np.testing.assert_array_equal(mixed({"w": base}, [sent])["w"], expected.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        (np.float16, 10),
        (ml_dtypes.bfloat16, 7),
        (np.float32, 23),
        (np.float64, 52),
        (np.complex64, 23),
        (np.complex128, 52),
    ],
)
def test_every_floating_dtype_is_mixed_and_survives(dtype: Any, bits: int) -> None:
    model, base = {"w": np.full(3, 1.0, dtype)}, {"w": np.full(3, 1.5, dtype)}
    new = mixed(model, [update(base, {"w": np.full(3, 2.0, dtype)}, alpha=1 / 4)] * 4)["w"]
    assert new.dtype == np.dtype(dtype)
    np.testing.assert_allclose(new.astype(np.complex128), 2 - (3 / 4) ** 4, rtol=4 * 2.0**-bits)


def test_narrow_weights_are_rounded_once() -> None:
    model: Tensors = {"w": np.array([2048.0], np.float16)}
    trained: Tensors = {"w": np.array([2054.0], np.float16)}
    assert mixed(model, [update(model, trained, alpha=0.5)])["w"].tolist() == [2052.0]  # 2051, tie to even
    assert mixed(model, [update(model, trained, alpha=0.51)])["w"].tolist() == [2052.0]
    assert mixed(model, [update(model, trained, alpha=0.49)])["w"].tolist() == [2050.0]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32, np.float64])
def test_what_is_not_trained_keeps_its_bits(dtype: Any) -> None:
    model = {"frozen": np.random.default_rng(0).normal(size=1000).astype(dtype)}
    new = mixed(model, [update(model, model, tau, alpha=0.6) for tau in range(50)])
    assert new["frozen"].tobytes() == model["frozen"].tobytes()


def test_a_tensor_that_was_not_sent_stays() -> None:
    model, base = {name: np.array([10.0]) for name in "ab"}, {name: np.array([2.0]) for name in "ab"}
    new = mixed(model, [update(base, {"b": np.array([4.0])})])
    assert [new[name].tolist() for name in "ab"] == [[10.0], [7.0]]


def test_integers_move_by_the_rounded_step_and_are_exact_beyond_float64() -> None:
    big = 2**60
    model, base = {"n": np.array([10, -10, big + 1])}, {"n": np.array([2, 2, big])}
    new = mixed(model, [update(base, {"n": np.array([5, 5, big + 7])})])["n"]
    assert new.tolist() == [8, -2, big + 4]  # steps of -2.5 and 7.5 (ties to even), and 3
    assert new.dtype == np.int64


@pytest.mark.parametrize(("dtype", "a"), [("int8", 1.0), ("uint8", 1.0), ("int64", 0.5), ("uint64", 0.5)])
def test_integers_at_the_ends_of_their_range_do_not_overflow(dtype: str, a: float) -> None:
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    model, base = {"n": np.array([low, high], dtype)}, {"n": np.array([high, low], dtype)}
    new = mixed(model, [update(base, {"n": np.array([high, low], dtype)}, alpha=a)])["n"]
    for now, trained, result in zip([low, high], [high, low], new.tolist(), strict=True):
        assert abs(result - (now + a * (trained - now))) <= 2048  # float64 has no more digits there


def test_bools_take_the_heavier_side_and_stay_on_a_tie() -> None:
    model, base = {"mask": np.array([True, False, True])}, {"mask": np.array([False, False, True])}
    sent = {"mask": np.array([False, True, True])}
    for alpha, expected in ((0.6, [False, True, True]), (0.5, [True, False, True]), (0.4, [True, False, True])):
        assert mixed(model, [update(base, sent, alpha=alpha)])["mask"].tolist() == expected


def test_tensors_longer_than_a_block_zero_d_and_empty_ones_are_mixed_whole() -> None:
    size = 2 * BLOCK + 17
    model = {"long": np.zeros(size), "scalar": np.array(1.0), "empty": np.zeros((0, 3)), "matrix": np.zeros((3, 2))}
    base = {name: value + 2 for name, value in model.items()}
    trained = {
        "long": np.arange(size) * 1.0,
        "scalar": np.array(3.0),
        "empty": np.zeros((0, 3)),
        "matrix": np.arange(6.0).reshape(2, 3).T,
    }
    new = mixed(model, [update(base, trained)])
    for name in model:
        np.testing.assert_allclose(new[name], (model[name] + trained[name]) / 2, rtol=1e-15)


def test_neither_the_model_nor_the_base_is_written_to() -> None:
    model, base = {"w": np.zeros(3)}, {"w": np.ones(3)}
    model["w"].flags.writeable = base["w"].flags.writeable = False
    new = mixed(model, [update(base, {"w": np.full(3, 5.0)})] * 2)
    assert (new["w"].tolist(), new["w"].flags.writeable) == ([3.75] * 3, True)


def test_a_round_without_updates_gives_the_model_again() -> None:
    model = {"w": np.arange(3.0)}
    new = mixed(model, [])
    assert new["w"].tolist() == [0, 1, 2]
    assert new["w"] is not model["w"]


def test_the_memory_of_a_round_is_that_of_the_next_model() -> None:
    size = 32 * BLOCK
    model: Tensors = {name: np.ones(size, np.float32) for name in "ab"}
    sent = ClientUpdate(client_id="a", delta=model, num_examples=3, discount=0.5, base=model)
    tracemalloc.start()
    try:
        mixed(model, [sent, sent])
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * size * 4 + 5 * BLOCK * 8


@pytest.mark.parametrize(
    "rounds",
    [
        RoundConfig(min_fit_clients=1),
        RoundConfig.synchronous(1),
        RoundConfig.semi_synchronous(4),
        RoundConfig.buffered(2),
    ],
)
def test_rounds_that_are_not_asynchronous_ones_of_one_update_are_refused(rounds: RoundConfig) -> None:
    with pytest.raises(
        ConfigError, match=r"^FedAsync makes a version of each .* rounds=RoundConfig\.asynchronous\(\)$"
    ):
        FedAsync().check(rounds)


def test_rounds_of_one_update_are_taken() -> None:
    FedAsync().check(RoundConfig.asynchronous(0.9))
    FedAsync().check(RoundConfig.buffered(1))
    assert repr(FedAsync()) == "FedAsync()"

"""FedBuff against the closed form of its paper, in numbers that can be checked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.config import Constant, Hinge, Polynomial, RoundConfig, Staleness
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.fedbuff import FedBuff
from fedbus.types import Array, Tensors

ROOT = Polynomial(0.5)


def update(delta: Tensors, staleness: int = 0, *, s: Staleness = ROOT, n: int = 1) -> ClientUpdate:
    return ClientUpdate(client_id="c", delta=delta, num_examples=n, staleness=staleness, discount=s(staleness))


def buffered(model: Tensors, updates: Sequence[ClientUpdate], eta: float = 1.0) -> dict[str, Array]:
    strategy = FedBuff(server_learning_rate=eta)
    state = strategy.init(model)
    for each in updates:
        strategy.fold(state, each)
    return strategy.finish(state, model)


def test_the_model_moves_by_the_mean_of_the_discounted_deltas() -> None:
    model = {"w": np.array([1.0, -2.0])}
    updates = [
        update({"w": np.array([2.0, 1.0])}, 0),
        update({"w": np.array([2.0, 4.0])}, 3),  # 1 / sqrt(4)
        update({"w": np.array([6.0, 0.0])}, 8),  # 1 / sqrt(9)
    ]
    new = buffered(model, updates)
    np.testing.assert_allclose(new["w"], [1 + (2 + 1 + 2) / 3, -2 + (1 + 2 + 0) / 3], rtol=1e-15)


def test_the_server_learning_rate_multiplies_the_step() -> None:
    model = {"w": np.array([1.0])}
    updates = [update({"w": np.array([2.0])}), update({"w": np.array([4.0])}, 3)]
    assert buffered(model, updates, eta=0.25)["w"].tolist() == [1 + 0.25 * (2 + 2) / 2]
    assert buffered(model, updates, eta=3)["w"].tolist() == [1 + 3 * (2 + 2) / 2]


def test_a_round_of_late_updates_moves_less() -> None:
    model = {"w": np.array([0.0])}
    late = [update({"w": np.array([1.0])}, 3), update({"w": np.array([1.0])}, 3)]
    assert buffered(model, late)["w"].tolist() == [0.5]  # a weighted mean would say 1


def test_a_single_late_update_moves_less() -> None:
    assert buffered({"w": np.array([0.0])}, [update({"w": np.array([1.0])}, 3)])["w"].tolist() == [0.5]


def test_a_fresh_update_counts_in_full() -> None:
    assert buffered({"w": np.array([0.0])}, [update({"w": np.array([1.0])}, 0)])["w"].tolist() == [1.0]


def test_every_client_counts_alike_however_many_examples_it_has() -> None:
    updates = [update({"w": np.array([1.0])}, n=1), update({"w": np.array([3.0])}, n=10**6)]
    assert buffered({"w": np.array([0.0])}, updates)["w"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("s", "discounts"),
    [
        (Constant(), {0: 1.0, 1: 1.0, 20: 1.0}),
        (Polynomial(0.5), {0: 1.0, 3: 1 / 2, 8: 1 / 3, 15: 1 / 4}),
        (Polynomial(1.0), {0: 1.0, 1: 1 / 2, 9: 1 / 10}),
        (Polynomial(0.0), {0: 1.0, 9: 1.0}),
        (Hinge(a=10, b=4), {0: 1.0, 4: 1.0, 5: 1 / 11, 6: 1 / 21, 14: 1 / 101}),
        (Hinge(a=0.5, b=0), {0: 1.0, 2: 1 / 2}),
        (Hinge(a=0, b=3), {3: 1.0, 50: 1.0}),
    ],
)
def test_each_staleness_function_has_the_papers_numbers(s: Staleness, discounts: dict[int, float]) -> None:
    for staleness, expected in discounts.items():
        moved = buffered({"w": np.array([0.0])}, [update({"w": np.array([1.0])}, staleness, s=s)])["w"]
        np.testing.assert_allclose(moved, [expected], rtol=1e-14)


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), st.integers(0, 30)), min_size=1, max_size=12
    ),
    st.floats(1e-3, 10),
)
def test_the_closed_form_of_the_paper(sent: list[tuple[list[float], int]], eta: float) -> None:
    model = {"w": np.array([0.5, -3.0, 100.0])}
    new = buffered(model, [update({"w": np.array(delta)}, tau) for delta, tau in sent], eta)
    expected = model["w"] + eta / len(sent) * sum(np.array(delta) / np.sqrt(1 + tau) for delta, tau in sent)
    np.testing.assert_allclose(new["w"], expected, rtol=1e-9, atol=1e-8)


def test_k_is_the_number_of_updates_that_hold_the_tensor() -> None:
    model = {name: np.zeros(1) for name in "abc"}
    updates = [update({"a": np.array([2.0]), "b": np.array([2.0])}), update({"a": np.array([4.0])}, 3)]
    new = buffered(model, updates)
    assert [float(new[name][0]) for name in "abc"] == [2.0, 2.0, 0.0]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.complex64, np.complex128])
def test_the_dtype_survives(dtype: Any) -> None:
    model = {"w": np.full(3, 1.0, dtype)}
    updates = [update({"w": np.full(3, 0.5, dtype)}, tau) for tau in (0, 3)]
    new = buffered(model, updates, eta=2)["w"]
    assert new.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(new, np.full(3, 1.75, dtype))


def test_integers_move_by_the_rounded_step_within_their_limits() -> None:
    model = {"steps": np.array([100, 100, 100], np.int8)}
    updates = [update({"steps": np.array([10, 1, 27])}, 0), update({"steps": np.array([10, 1, 27])}, 3)]
    new = buffered(model, updates, eta=2)["steps"]
    assert new.tolist() == [115, 102, 127]  # steps of 15, 1.5 (ties to even) and 40.5
    assert new.dtype == np.int8


def test_bools_take_the_majority_of_discounted_votes_and_stay_on_a_tie() -> None:
    model = {"mask": np.array([False, False, False, True])}
    fresh = update({"mask": np.array([1, 0, 0, -1], np.int8)}, 0)
    late = [update({"mask": np.array([0, 1, 0, 0], np.int8)}, 3)] * 2  # half a vote each
    assert buffered(model, [fresh, *late])["mask"].tolist() == [False, False, False, True]
    assert buffered(model, [fresh, late[0]])["mask"].tolist() == [True, False, False, False]


def test_bools_can_move_where_every_update_is_late_and_the_step_small() -> None:
    late = [update({"mask": np.array([1], np.int8)}, 15)] * 3
    assert buffered({"mask": np.array([False])}, late, eta=0.1)["mask"].tolist() == [True]


def test_the_model_itself_is_not_written_to() -> None:
    model = {"w": np.zeros(3)}
    model["w"].flags.writeable = False
    assert buffered(model, [update({"w": np.ones(3)})])["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("eta", [0.0, -1.0, float("nan"), float("inf")])
def test_a_server_learning_rate_that_is_not_positive_is_refused(eta: float) -> None:
    with pytest.raises(ConfigError, match="server_learning_rate must be a positive number, not"):
        FedBuff(server_learning_rate=eta)


def test_fedasyncs_rounds_are_refused_and_every_kind_of_rounds_taken() -> None:
    for rounds in (RoundConfig(), RoundConfig.buffered(5), RoundConfig.buffered(1), RoundConfig.semi_synchronous(4)):
        FedBuff().check(rounds)
    with pytest.raises(ConfigError, match="is for FedAsync: leave the strategy out"):
        FedBuff().check(RoundConfig.asynchronous(0.6))


def test_it_says_what_it_is() -> None:
    assert repr(FedBuff(server_learning_rate=0.5)) == "FedBuff(server_learning_rate=0.5)"

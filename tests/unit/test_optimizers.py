"""Server optimizers against the formulas of Reddi et al. 2021 and Hsu et al. 2019, in numbers checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.exact import BLOCK
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fedopt import FedOpt
from fedbus.strategies.optimizers import SGD, Adagrad, Adam, Momentum, ServerOptimizer, Yogi
from fedbus.strategies.step import Step, StepStrategy
from fedbus.types import Array, Tensors


class Given(StepStrategy):
    """Takes the steps that it is given."""

    def init(self, model: Tensors) -> dict[str, Array]:
        return {}

    def fold(self, state: dict[str, Array], update: ClientUpdate) -> None:
        state.update(update.delta)

    def steps(self, state: dict[str, Array], model: Tensors) -> Iterator[Step]:
        for name in state:
            flat = state[name].reshape(-1)
            yield name, slice(0, flat.size), flat.copy()


def walk(optimizer: ServerOptimizer, steps: list[float], begin: float = 0.0) -> list[float]:
    """Where an element is after each of the steps."""
    strategy, model, path = Given(optimizer=optimizer), {"w": np.array([begin])}, []
    for step in steps:
        model = strategy.finish({"w": np.array([step])}, model)
        path.append(float(model["w"][0]))
    return path


# ---- closed forms ----------------------------------------------------------------------------------------------------


def test_sgd_takes_its_learning_rate_of_each_step() -> None:
    assert walk(SGD(0.5), [2.0, -8.0], begin=1.0) == [2.0, -2.0]
    assert walk(SGD(), [2.0, -8.0], begin=1.0) == [3.0, -5.0]


def test_momentum_goes_on_in_its_direction() -> None:
    # m: 1, 1.5 (0.5 * 1 + 1), -1.25 (0.75 - 2); w: + 2 m
    assert walk(Momentum(2.0, beta=0.5), [1.0, 1.0, -2.0]) == [2.0, 5.0, 2.5]


def test_adagrad_adds_up_the_squares() -> None:
    # v: 0 + 9, 9 + 16; w: 0.5 * 3 / (3 + 1), + 0.5 * 4 / (5 + 1)
    path = walk(Adagrad(0.5, tau=1.0, initial_v=0), [3.0, 4.0])
    assert path == pytest.approx([0.375, 0.375 + 2 / 6], rel=1e-15)


def test_adagrad_may_have_momentum() -> None:
    # m: 0.25 * 3 = 0.75, 0.75 * 0.75 + 0.25 * 4 = 1.5625; v as above
    path = walk(Adagrad(1.0, beta_1=0.75, tau=1.0, initial_v=0), [3.0, 4.0])
    assert path == pytest.approx([0.75 / 4, 0.75 / 4 + 1.5625 / 6], rel=1e-15)


def test_adam_averages_the_squares() -> None:
    # m: 0.5 * 2 = 1, 0.5 * 1 + 0.5 * 6 = 3.5; v: 0.25 * 4 = 1, 0.75 * 1 + 0.25 * 36 = 9.75
    path = walk(Adam(0.1, beta_1=0.5, beta_2=0.75, tau=0.5, initial_v=0), [2.0, 6.0])
    assert path == pytest.approx([0.1 / 1.5, 0.1 / 1.5 + 0.35 / (math.sqrt(9.75) + 0.5)], rel=1e-15)


def test_yogi_moves_v_by_the_square_and_not_by_the_difference() -> None:
    # v: 16 - 0.25 * 4 (it is larger than 2^2), then 15 + 0.25 * 36 (it is smaller than 6^2); m as Adam's
    path = walk(Yogi(0.1, beta_1=0.5, beta_2=0.75, tau=0.5, initial_v=16), [2.0, 6.0])
    first = 0.1 * 1 / (math.sqrt(15) + 0.5)
    assert path == pytest.approx([first, first + 0.35 / (math.sqrt(24) + 0.5)], rel=1e-15)


def test_yogi_rests_where_v_is_the_square() -> None:
    assert walk(Yogi(1.0, beta_1=0.0, beta_2=0.5, tau=1.0, initial_v=9), [3.0, 3.0]) == [0.75, 1.5]


@pytest.mark.parametrize("kind", [Adagrad, Adam, Yogi])
def test_v_begins_at_the_square_of_tau_and_nothing_is_corrected(kind: type[Adagrad] | type[Adam] | type[Yogi]) -> None:
    optimizer = kind(1.0, beta_1=0.0, tau=0.5)
    assert optimizer.slots == {"m": 0.0, "v": 0.25}
    v = {Adagrad: 0.25 + 4, Adam: 0.99 * 0.25 + 0.01 * 4, Yogi: 0.25 + 0.01 * 4}[kind]
    assert walk(optimizer, [2.0]) == pytest.approx([2 / (math.sqrt(v) + 0.5)], rel=1e-14)


def test_the_papers_defaults() -> None:
    assert (SGD().learning_rate, Momentum().learning_rate, Momentum().beta) == (1.0, 1.0, 0.9)
    assert Adagrad().beta_1 == 0.0
    for adaptive in (Adam(), Yogi()):
        assert (adaptive.beta_1, adaptive.beta_2, adaptive.tau) == (0.9, 0.99, 1e-3)


REFERENCES: dict[str, tuple[ServerOptimizer, Callable[[float, float], float]]] = {
    "adagrad": (Adagrad(0.3, beta_1=0.4, tau=1e-2), lambda v, d: v + d * d),
    "adam": (Adam(0.3, beta_1=0.4, beta_2=0.8, tau=1e-2), lambda v, d: 0.8 * v + 0.2 * d * d),
    "yogi": (Yogi(0.3, beta_1=0.4, beta_2=0.8, tau=1e-2), lambda v, d: v - 0.2 * d * d * np.sign(v - d * d)),
}


@pytest.mark.parametrize("name", REFERENCES)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8))
def test_many_rounds_are_the_recursion_of_algorithm_2(name: str, steps: list[float]) -> None:
    optimizer, second = REFERENCES[name]
    m, v, w, expected = 0.0, 1e-4, 0.0, []
    for step in steps:
        m, v = 0.4 * m + 0.6 * step, second(v, step)
        w += 0.3 * m / (math.sqrt(v) + 1e-2)
        expected.append(w)
    np.testing.assert_allclose(walk(optimizer, steps), expected, rtol=1e-9, atol=1e-9)


# ---- what it remembers, and how --------------------------------------------------------------------------------------

KINDS = [SGD(0.5), Momentum(0.5), Adagrad(), Adam(), Yogi()]


@pytest.mark.parametrize("optimizer", KINDS, ids=lambda one: type(one).__name__)
def test_a_complex_tensor_moves_as_its_parts_do(optimizer: ServerOptimizer) -> None:
    model: Tensors = {"c": np.array([1 + 2j, -3j]), "r": np.array([1.0, 2.0, 0.0, -3.0])}
    strategy = Given(optimizer=optimizer)
    for step in (np.array([0.5 - 1j, 2 + 2j]), np.array([-0.25j, 1.0 + 0j])):
        model = strategy.finish({"c": step, "r": step.view(np.float64)}, model)
    assert model["c"].view(np.float64).tolist() == model["r"].tolist()
    for slot in optimizer.slots:
        assert strategy.memory[f"{slot}/c"].view(np.float64).tolist() == strategy.memory[f"{slot}/r"].tolist()


@pytest.mark.parametrize(
    ("dtype", "slot"),
    [
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.complex64, np.complex64),
        (np.complex128, np.complex128),
    ],
)
def test_slots_are_as_wide_as_they_must_be(dtype: Any, slot: Any) -> None:
    strategy = FedOpt(Adam())
    model: Tensors = {"w": np.ones((2, 3), dtype), "scalar": np.ones((), dtype), "none": np.ones((0, 2), dtype)}
    moved = run(strategy, model, {name: np.ones_like(value) for name, value in model.items()})
    for name, value in model.items():
        assert (moved[name].dtype, moved[name].shape) == (value.dtype, value.shape)
    assert set(strategy.memory) == {"m/w", "v/w", "m/scalar", "v/scalar"}  # of a tensor without elements nothing comes
    assert {value.dtype for value in strategy.memory.values()} == {np.dtype(slot)}
    assert strategy.memory["m/w"].shape == (2, 3)


def run(strategy: FedAvg, model: Tensors, *deltas: Tensors) -> dict[str, Array]:
    state = strategy.init(model)
    for index, delta in enumerate(deltas):
        strategy.fold(state, ClientUpdate(client_id=str(index), delta=delta, num_examples=index + 1))
    return strategy.finish(state, model)


def test_old_slots_are_not_written_to() -> None:
    """An aggregate that is discarded takes them back."""
    strategy, model = FedOpt(Adam()), {"w": np.zeros(3)}
    run(strategy, model, {"w": np.ones(3)})
    before = dict(strategy.memory)
    for value in before.values():
        value.flags.writeable = False
    first = run(strategy, model, {"w": np.full(3, 2.0)})
    strategy.memory.update(before)
    np.testing.assert_array_equal(run(strategy, model, {"w": np.full(3, 2.0)})["w"], first["w"])


def test_a_tensor_that_nobody_sent_rests_with_its_slots() -> None:
    strategy = FedOpt(Momentum(1.0, beta=0.5))
    model = run(strategy, {"a": np.zeros(1), "b": np.zeros(1)}, {"a": np.ones(1), "b": np.ones(1)})
    model = run(strategy, model, {"a": np.zeros(1)})
    assert (model["a"].tolist(), model["b"].tolist()) == ([1.5], [1.0])
    assert (strategy.memory["m/a"].tolist(), strategy.memory["m/b"].tolist()) == ([0.5], [1.0])


def test_tensors_longer_than_a_block_move_whole() -> None:
    size = BLOCK + 1001
    strategy, rng = FedOpt(Yogi(0.1)), np.random.default_rng(0)
    deltas = [{"w": rng.normal(size=size)} for _ in range(2)]
    model = {"w": np.zeros(size)}
    for delta in deltas:
        model = run(strategy, model, delta)
    for at in (0, BLOCK // 4, size - 1):
        path = walk(Yogi(0.1), [float(delta["w"][at]) for delta in deltas])
        assert float(model["w"][at]) == pytest.approx(path[-1], rel=1e-8)


def test_what_a_slot_cannot_hold_is_kept_as_its_largest_number() -> None:
    strategy = FedOpt(Adagrad(initial_v=0))
    moved = run(strategy, {"w": np.zeros(1, np.float32)}, {"w": np.full(1, 1e30, np.float32)})
    assert strategy.memory["v/w"].tolist() == [float(np.finfo(np.float32).max)]
    assert moved["w"].tolist() == [pytest.approx(0.1)]


def test_integers_and_bools_take_the_step_itself() -> None:
    model: Tensors = {"steps": np.array([10, 100], np.uint8), "mask": np.array([True, False])}
    deltas: list[Tensors] = [{"steps": np.array([5, 200]), "mask": np.array([-1, 0], np.int8)}] * 2
    for optimizer in (Momentum(0.1), Adam(), Yogi()):
        strategy = FedOpt(optimizer)
        moved = run(strategy, model, *deltas)
        assert (moved["steps"].tolist(), moved["mask"].tolist()) == ([15, 255], [False, False])
        assert strategy.memory == {}
    slow = run(FedOpt(SGD(0.1)), model, *deltas)
    assert (slow["steps"].tolist(), slow["mask"].tolist()) == ([10, 120], [False, False])  # 0.5: ties to even


def test_ones_own_optimizer_is_a_few_lines() -> None:
    class Sign(ServerOptimizer):
        def moved(self, values: Array, step: Array, slots: Any) -> Array:
            return values + 0.25 * np.sign(step)

    assert walk(Sign(), [5.0, -0.1, -7.0]) == [0.25, 0.0, -0.25]


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(0), "learning_rate must be a positive number, not 0"),
        (lambda: SGD(True), "learning_rate must be a positive number, not True"),
        (lambda: Momentum(math.inf), "learning_rate must be a positive number, not inf"),
        (lambda: Momentum(1.0, 1.0), "beta must be a number from 0 to less than 1, not 1.0"),
        (lambda: Adam(beta_1=-0.1), "beta_1 must be a number from 0 to less than 1, not -0.1"),
        (lambda: Adam(beta_2=1), "beta_2 must be a number from 0 to less than 1, not 1"),
        (lambda: Yogi(beta_2=math.nan), "beta_2 must be a number from 0 to less than 1, not nan"),
        (lambda: Yogi(tau=0), "tau must be a positive number, not 0"),
        (lambda: Adagrad(initial_v=-1), "initial_v must be a number of 0 or more, not -1"),
        (lambda: FedOpt(0.1), "optimizer must be a fedbus server optimizer such as Adam(), not 0.1"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert str(refused.value) == message


def test_fedasyncs_rounds_are_refused() -> None:
    Given().check(RoundConfig.buffered(3))
    with pytest.raises(ConfigError, match=r"is for FedAsync.*buffered\(k\) with Given"):
        Given().check(RoundConfig.asynchronous())


@pytest.mark.parametrize("kind", [Adagrad, Adam, Yogi])
def test_what_comes_after_the_learning_rate_is_named(kind: Any) -> None:
    """Else 0.9 would be the one decay or the other, as the class pleases."""
    with pytest.raises(TypeError):
        kind(0.1, 0.9)

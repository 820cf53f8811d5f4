"""The mean families against their papers, in two rounds that can be checked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.errors import ClientCodeError, ConfigError, UpdateRefused
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fednova import FedNova, a_norm
from fedbus.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedOpt, FedYogi
from fedbus.strategies.geometric import GeometricMedian
from fedbus.strategies.norms import squared_norm
from fedbus.strategies.optimizers import SGD, Momentum
from fedbus.strategies.qfedavg import QFedAvg
from fedbus.strategies.scaffold import Scaffold
from fedbus.types import Array, Scalar, Tensors


def update(*delta: float, n: int = 1, discount: float = 1.0, client: str = "c", **metrics: Scalar) -> ClientUpdate:
    return told(metrics, *delta, n=n, discount=discount, client=client)


def told(
    metrics: Mapping[str, Scalar], *delta: float, n: int = 1, discount: float = 1.0, client: str = "c"
) -> ClientUpdate:
    tensors = {"w": np.array(delta)}
    return ClientUpdate(client_id=client, delta=tensors, num_examples=n, discount=discount, metrics=metrics)


def after(strategy: Strategy, model: Tensors, *updates: ClientUpdate) -> dict[str, Array]:
    state = strategy.init(model)
    for each in updates:
        strategy.fold(state, each)
    return strategy.finish(state, model)


def path(strategy: Strategy, *rounds: list[ClientUpdate]) -> list[float]:
    """Where a model of one element, 0 at first, is after each round."""
    model, values = {"w": np.zeros(1)}, []
    for updates in rounds:
        model = after(strategy, model, *updates)
        values.append(float(model["w"][0]))
    return values


# ---- FedAvg and what it weighs by ------------------------------------------------------------------------------------


def test_each_client_may_count_alike() -> None:
    updates = [update(1.0, n=1), update(3.0, n=999)]
    assert path(FedAvg(weighting="uniform"), updates) == [2.0]


def test_a_function_may_say_what_an_update_weighs() -> None:
    def by_loss(update: ClientUpdate) -> float:
        return float(update.metrics["loss"])

    updates = [update(1.0, loss=3.0), update(5.0, loss=1.0), update(math.pi, loss=0.0)]
    assert path(FedAvg(weighting=by_loss), updates) == [2.0]  # (3 * 1 + 1 * 5) / 4
    assert repr(FedAvg(weighting=by_loss)) == "FedAvg(weighting=by_loss)"


def test_where_all_weigh_nothing_the_model_stays() -> None:
    assert path(FedAvg(weighting=lambda _: 0.0), [update(1.0)], [update(2.0)]) == [0.0, 0.0]


def test_weights_far_below_one_lose_no_digits() -> None:
    model, delta = {"w": np.zeros(1, np.float32)}, {"w": np.full(1, 0.2, np.float32)}
    strategy = FedAvg(weighting=lambda _: 1e-12)
    new = after(strategy, model, ClientUpdate(client_id="c", delta=delta, num_examples=1))
    assert new["w"].tolist() == delta["w"].tolist()


def test_a_late_update_counts_less_whatever_it_weighs() -> None:
    assert path(FedAvg(weighting="uniform"), [update(4.0, discount=0.5), update(2.0)]) == [2.0]


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 2.0**65, None, "much"])
def test_a_weight_that_is_none_is_told_with_its_client(weight: Any) -> None:
    with pytest.raises(ClientCodeError) as refused:
        path(FedAvg(weighting=lambda _: weight), [update(1.0, client="hospital-a")])
    assert str(refused.value) == f"weighting gave {weight!r} for client hospital-a: return a number from 0 to 2**64"


@pytest.mark.parametrize("strategy", [FedAvg, FedNova, QFedAvg, GeometricMedian, Scaffold])
def test_what_a_function_cannot_weigh_is_refused_and_the_run_goes_on(strategy: Any) -> None:
    weighted = strategy(weighting=lambda update: update.metrics["quality"])
    metrics: dict[str, Scalar] = {"a_norm": 1.0, "loss": 1.0}
    weighted.verify(told(metrics | {"quality": 2.0}, 1.0))
    with pytest.raises(UpdateRefused, match="weighting gave nan for client"):
        weighted.verify(told(metrics | {"quality": math.nan}, 1.0))
    with pytest.raises(UpdateRefused, match="weighting raised KeyError: 'quality'"):
        weighted.verify(told(metrics, 1.0))


def test_a_weighting_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="weighting must be 'examples', 'uniform' or a function of an update, not 3"):
        FedAvg(weighting=3)  # type: ignore[arg-type]


# ---- server optimizers -----------------------------------------------------------------------------------------------

ROUNDS = [[update(1.0, n=1), update(3.0, n=3)], [update(-1.0, n=1), update(3.0, n=1)]]  # means: 2.5, 1.0


def test_fedavgm_two_rounds() -> None:
    # m: 2.5, 0.5 * 2.5 + 1
    assert path(FedAvgM(2.0, 0.5), *ROUNDS) == [5.0, 9.5]


def test_fedadagrad_two_rounds() -> None:
    # m: the mean itself; v: 6.25, 7.25
    first = 0.5 * 2.5 / (2.5 + 0.5)
    expected = [first, first + 0.5 * 1 / (math.sqrt(7.25) + 0.5)]
    assert path(FedAdagrad(0.5, tau=0.5, initial_v=0), *ROUNDS) == pytest.approx(expected, rel=1e-14)


def test_fedadam_two_rounds() -> None:
    # m: 0.25, 0.9 * 0.25 + 0.1; v: 0.99 * 1e-6 + 0.01 * 6.25, 0.99 * that + 0.01
    v = 0.99e-6 + 0.0625
    first = 0.1 * 0.25 / (math.sqrt(v) + 1e-3)
    expected = [first, first + 0.1 * 0.325 / (math.sqrt(0.99 * v + 0.01) + 1e-3)]
    assert path(FedAdam(), *ROUNDS) == pytest.approx(expected, rel=1e-14)


def test_fedyogi_two_rounds() -> None:
    # m as FedAdam's; v: 1e-6 + 0.01 * 6.25, that + 0.01 * 1 (it is still below 1)
    v = 1e-6 + 0.0625
    first = 0.01 * 0.25 / (math.sqrt(v) + 1e-3)
    expected = [first, first + 0.01 * 0.325 / (math.sqrt(v + 0.01) + 1e-3)]
    assert path(FedYogi(), *ROUNDS) == pytest.approx(expected, rel=1e-14)


def test_flambys_forms_can_be_had() -> None:
    # v from 0, and m in Adagrad too
    adagrad = FedAdagrad(0.316228, beta_1=0.9, tau=1e-8, initial_v=0)
    assert path(adagrad, ROUNDS[0]) == pytest.approx([0.316228 * 0.25 / (2.5 + 1e-8)], rel=1e-14)
    adam = FedAdam(0.01, beta_2=0.999, tau=1e-8, initial_v=0)
    assert path(adam, ROUNDS[0]) == pytest.approx([0.01 * 0.25 / (math.sqrt(0.001 * 6.25) + 1e-8)], rel=1e-14)
    yogi = FedYogi(0.01, beta_2=0.999, tau=1e-8, initial_v=0)
    assert path(yogi, ROUNDS[0]) == path(FedAdam(0.01, beta_2=0.999, tau=1e-8, initial_v=0), ROUNDS[0])


def test_fedopt_with_sgd_is_fedavg() -> None:
    assert path(FedOpt(SGD()), *ROUNDS) == path(FedAvg(), *ROUNDS) == [2.5, 3.5]
    assert path(FedOpt(SGD(0.5), weighting="uniform"), *ROUNDS) == [1.0, 1.5]


@pytest.mark.parametrize("kind", [FedAvgM, FedAdagrad, FedAdam, FedYogi])
def test_the_server_learning_rate_has_its_name_in_errors(kind: Callable[[float], Strategy]) -> None:
    with pytest.raises(ConfigError, match="server_learning_rate must be a positive number, not -1"):
        kind(-1)


def test_they_say_what_they_are() -> None:
    assert repr(FedAvgM()) == "FedAvgM(optimizer=Momentum(learning_rate=1.0, beta=0.9))"
    assert repr(FedOpt(SGD(), weighting="uniform")) == "FedOpt(weighting=uniform)"
    assert repr(QFedAvg()) == "QFedAvg(q=0.2, client_learning_rate=0.1)"


# ---- FedNova ---------------------------------------------------------------------------------------------------------


def test_fednova_two_rounds() -> None:
    # p: 1/4, 3/4; tau_eff: (10 + 3 * 2) / 4 = 4; sum p d / a: (20/10 + 3 * 4/2) / 4 = 2
    one = [update(20.0, n=1, a_norm=10.0), update(4.0, n=3, a_norm=2.0)]
    # p: 1/2; tau_eff: 3; sum p d / a: (1/1 - 10/5) / 2
    other = [update(1.0, n=7, a_norm=1), update(-10.0, n=7, a_norm=5)]
    assert path(FedNova(), one, other) == [8.0, 6.5]


def test_fednova_is_fedavg_where_all_take_as_many_steps() -> None:
    same = [update(2.0, n=1, a_norm=8.0), update(3.0, n=3, a_norm=8.0)]
    assert path(FedNova(), same) == path(FedAvg(), same) == [2.75]


def test_fednova_weighs_as_it_is_told_and_a_late_update_less() -> None:
    updates = [update(4.0, n=1, a_norm=4.0), update(6.0, n=9, a_norm=2.0, discount=0.5)]
    assert path(FedNova(weighting="uniform"), updates) == [3 * (1 + 1.5) / 2]


def test_fednova_may_have_slow_momentum_on_the_server() -> None:
    one = [update(2.0, a_norm=2.0)]
    assert path(FedNova(optimizer=Momentum(1.0, 0.5)), one, one) == [2.0, 5.0]


def test_fednova_counts_those_who_sent_the_tensor() -> None:
    model = {"a": np.zeros(1), "b": np.zeros(1), "c": np.zeros(1)}
    both = ClientUpdate(
        client_id="1", delta={"a": np.ones(1), "b": np.full(1, 4.0)}, num_examples=1, metrics={"a_norm": 4}
    )
    one = ClientUpdate(client_id="2", delta={"a": np.full(1, 2.0)}, num_examples=1, metrics={"a_norm": 1})
    new = after(FedNova(), model, both, one)
    # a: tau_eff 2.5, (1/4 + 2) / 2; b: its client's own step
    assert [float(new[name][0]) for name in "abc"] == [2.5 * 1.125, 4.0, 0.0]


def test_fednova_leaves_votes_as_they_are() -> None:
    model: Tensors = {"mask": np.array([False, False])}
    updates = [
        ClientUpdate(client_id=str(k), delta={"mask": np.array(v, np.int8)}, num_examples=1, metrics={"a_norm": 5})
        for k, v in enumerate([[1, 1], [1, 0], [0, 0]])
    ]
    assert after(FedNova(), model, *updates)["mask"].tolist() == [True, False]


def unrolled(steps: int, momentum: float, proximal: float) -> float:
    """By how much each gradient of a local run is in its delta (in -eta), summed up: SGD run on symbols."""
    weights, velocity = np.zeros(steps), np.zeros(steps)
    for step in range(steps):
        velocity *= momentum
        velocity[step] += 1
        weights = (1 - proximal) * weights + velocity
    return float(weights.sum())


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_a_norm_is_that_of_sgd_with_momentum(steps: int, rho: float) -> None:
    assert a_norm(steps, momentum=rho) == pytest.approx(unrolled(steps, rho, 0.0), rel=1e-9)


@given(st.integers(1, 60), st.floats(1e-6, 0.99))
def test_a_norm_is_that_of_sgd_with_a_proximal_term(steps: int, alpha: float) -> None:
    assert a_norm(steps, proximal=alpha) == pytest.approx(unrolled(steps, 0.0, alpha), rel=1e-9)


def test_a_norm_of_plain_sgd_is_the_number_of_steps() -> None:
    assert a_norm(17) == 17
    with pytest.raises(ConfigError, match="not both at a time"):
        a_norm(3, momentum=0.9, proximal=0.1)


@pytest.mark.parametrize(
    "metrics", [{}, {"a_norm": 0.0}, {"a_norm": -1}, {"a_norm": math.nan}, {"a_norm": True}, {"a_norm": 2.0**41}]
)
def test_fednova_refuses_who_does_not_say_how_far_it_went(metrics: Mapping[str, Scalar]) -> None:
    FedNova().verify(update(1.0, a_norm=1.5))
    with pytest.raises(UpdateRefused, match=r"^FedNova needs the metric 'a_norm': \|\|a\|\|_1 of the local steps"):
        FedNova().verify(told(metrics, 1.0))


# ---- QFedAvg ---------------------------------------------------------------------------------------------------------


def q_step(model: Array, sent: list[tuple[Array, float]], q: float, eta: float) -> Array:
    """Algorithm 2 as the paper writes it, with F + 1e-10 for F."""
    lipschitz = 1 / eta
    gradients = [(lipschitz * (model - trained), loss + 1e-10) for trained, loss in sent]
    deltas = [loss**q * gradient for gradient, loss in gradients]
    h = [q * loss ** (q - 1) * np.sum(gradient**2) + lipschitz * loss**q for gradient, loss in gradients]
    return np.asarray(model - sum(deltas) / sum(h))


@given(
    st.lists(st.tuples(st.lists(st.floats(-5, 5), min_size=3, max_size=3), st.floats(0.01, 5)), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.2, 1.0, 5.0]),
    st.sampled_from([0.01, 0.1, 1.0]),
)
def test_qfedavg_is_algorithm_2(sent: list[tuple[list[float], float]], q: float, eta: float) -> None:
    strategy, model = QFedAvg(q, eta), np.array([0.5, -1.0, 3.0])
    for _ in range(2):
        updates = [update(*(np.array(trained) - model), n=k + 1, loss=loss) for k, (trained, loss) in enumerate(sent)]
        expected = q_step(model, [(np.array(trained), loss) for trained, loss in sent], q, eta)
        model = after(strategy, {"w": model}, *updates)["w"]
        np.testing.assert_allclose(model, expected, rtol=1e-9, atol=1e-9)


def test_qfedavg_two_rounds() -> None:
    # q = 1, L = 2: h: 1 * (2 * 1)^2 + 2 * 3, 1 * (2 * 3)^2 + 2 * 1; Delta: 2 * (3 * 1 + 1 * 3)
    one = [update(1.0, loss=3.0), update(3.0, loss=1.0)]
    other = [update(-1.0, loss=4.0)]  # h: 4 + 8; Delta: -8
    assert path(QFedAvg(1.0, 0.5), one, other) == pytest.approx([12 / 48, 12 / 48 - 8 / 12], rel=1e-9)


def test_qfedavg_with_q_0_is_the_plain_mean() -> None:
    updates = [update(2.0, n=1, loss=9.0), update(4.0, n=50, loss=0.0)]
    for eta in (0.01, 1.0):
        assert path(QFedAvg(0, eta), updates) == path(FedAvg(weighting="uniform"), updates) == [3.0]
    assert path(QFedAvg(0, optimizer=SGD(0.5)), updates) == [1.5]


def test_qfedavg_hears_small_losses_as_well() -> None:
    sent = [(np.array([0.1, 0.2], np.float32), 1e-4), (np.array([0.3, -0.2], np.float32), 2e-4)]
    updates = [
        ClientUpdate(client_id="c", delta={"w": delta}, num_examples=1, metrics={"loss": loss}) for delta, loss in sent
    ]
    new = after(QFedAvg(5, 1.0), {"w": np.zeros(2, np.float32)}, *updates)["w"]
    np.testing.assert_allclose(new, q_step(np.zeros(2), sent, 5, 1.0), rtol=1e-4)


def test_qfedavg_takes_a_client_that_has_nothing_to_lose() -> None:
    updates = [update(1.0, loss=0.0), update(3.0, loss=1.0)]
    expected = q_step(np.zeros(1), [(np.array([1.0]), 0.0), (np.array([3.0]), 1.0)], 0.2, 0.1)
    assert path(QFedAvg(), updates) == pytest.approx(list(expected), rel=1e-9)


@pytest.mark.parametrize(
    "metrics", [{}, {"loss": -0.1}, {"loss": math.inf}, {"loss": "low"}, {"loss": 1e300}, {"loss": False}]
)
def test_qfedavg_refuses_who_does_not_say_its_loss(metrics: Mapping[str, Scalar]) -> None:
    QFedAvg().verify(update(1.0, loss=0))
    with pytest.raises(UpdateRefused, match=r"^QFedAvg needs the metric 'loss': what the received model lost before"):
        QFedAvg(5.0).verify(told(metrics, 1.0))


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_the_norm_is_over_all_floating_tensors() -> None:
    delta: Tensors = {
        "w": np.array([[3.0, 0.0], [0.0, 4.0]], np.float32),
        "c": np.array([1 + 2j], np.complex64),
        "steps": np.array([1000]),
        "none": np.zeros((0, 2)),
        "mask": np.array([1], np.int8),
        "half": np.array([2.0], np.float16),
    }
    assert squared_norm(ClientUpdate(client_id="a", delta=delta, num_examples=1)) == 25 + 5 + 4


class Cut(dict[str, Array]):
    """A delta that comes in runs of `size`."""

    def __init__(self, delta: Tensors, size: int) -> None:
        super().__init__(delta)
        self.size = size

    def peek(self) -> Any:
        for name, value in self.items():
            for start in range(0, max(value.size, 1), self.size):
                yield name, start, value.reshape(-1)[start : start + self.size]

    pieces = peek


@pytest.mark.parametrize("size", [1, 7, 8191, 8192, 8193, 20_000])
def test_the_norm_is_the_same_however_the_delta_is_cut(size: int) -> None:
    rng = np.random.default_rng(0)
    runs = 30_001 if size > 100 else 500
    delta = {"a": rng.normal(size=runs).astype(np.float32), "b": rng.normal(size=9) * (1 + 2j), "c": rng.normal(size=3)}
    whole = ClientUpdate(client_id="a", delta=delta, num_examples=1)
    cut = ClientUpdate(client_id="a", delta=Cut(delta, size), num_examples=1)
    expected = math.fsum(
        float(np.vdot(value, value).real) for value in (v.astype(np.complex128) for v in delta.values())
    )
    assert squared_norm(cut) == squared_norm(whole) == pytest.approx(expected, rel=1e-12)

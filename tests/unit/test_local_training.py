"""The clients' half of the methods, and the servers', on objectives whose optima and fixed points are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate, RoundInfo, Strategy
from fedbus.strategies.ditto import Ditto
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.feddyn import FedDyn
from fedbus.strategies.fednova import FedNova, a_norm
from fedbus.strategies.fedprox import FedProx
from fedbus.strategies.scaffold import Scaffold
from fedbus.training.base import ClientContext
from fedbus.training.delta import update_delta
from fedbus.training.local import LocalTraining, PersonalTraining, personal_parameters
from fedbus.types import Array, Config, FitResult, Piece, Tensors

Gradient = Callable[[Array], Array]


@dataclass
class Quadratic:
    """A client of f(w) = a/2 (w - b)^2, w a number: a local step of size lr takes w to w - lr a (w - b)."""

    a: float
    b: float
    steps: int = 5
    lrs: tuple[float, ...] = (0.1,)
    """One after the other, and again from the first."""
    momentum: float = 0.0
    num_examples: int = 1
    context: ClientContext = field(default_factory=lambda: ClientContext(client_id="c"))

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        local = LocalTraining(parameters, config, self.context)
        weights = {"w": parameters["w"].copy()}
        velocity = np.array(0.0)
        for lr in local.batches(itertools.islice(itertools.cycle(self.lrs), self.steps)):
            gradients = {"w": self.a * (weights["w"] - self.b)}
            local.correct(gradients, weights, lr, self.momentum)
            velocity = self.momentum * velocity + gradients["w"]
            weights["w"] = weights["w"] - lr * velocity
        return local.result(weights, self.num_examples)


def update_of(model: Tensors, result: FitResult, name: str = "c", **settings: Any) -> ClientUpdate:
    return ClientUpdate(
        client_id=name,
        delta=update_delta(model, result.parameters),
        num_examples=result.num_examples,
        metrics=result.metrics,
        extra=result.extra,
        **settings,
    )


def play(
    strategy: Strategy,
    clients: Sequence[Quadratic],
    rounds: int,
    *,
    start: float = 0.0,
    takes_part: Callable[[int, int], bool] = lambda round, client: True,
    more: Config | None = None,
) -> float:
    """The model after so many rounds, as server and clients make it."""
    model: dict[str, Array] = {"w": np.array(start)}
    for round in range(1, rounds + 1):
        strategy.attach(round=RoundInfo(number=round, version=round - 1, num_clients=len(clients)))
        state = strategy.init(model)
        config = {**strategy.fit_config(round), **(more or {})}
        broadcast = strategy.broadcast(model)
        for index, client in enumerate(clients):
            if takes_part(round, index):
                client.context.broadcast = broadcast
                result = client.fit(model, config)
                assert result.extra.keys() == strategy.extras(model).keys()
                strategy.fold(state, update_of(model, result, str(index)))
        model = strategy.finish(state, model)
    return float(model["w"])


def hospitals(**settings: Any) -> list[Quadratic]:
    """Two clients that disagree, and see their own optimum the sooner the steeper they are."""
    return [Quadratic(a=1.0, b=-1.0, **settings), Quadratic(a=4.0, b=2.0, **settings)]


OPTIMUM = (1 * -1 + 4 * 2) / (1 + 4)
"""Of the sum of both: 1.4."""


class TestFixedPoints:
    def test_federated_averaging_ends_beside_the_optimum(self) -> None:
        pulls = [1 - (1 - 0.1 * a) ** 5 for a in (1, 4)]  # of the way to b, in five steps
        fixed_point = (pulls[0] * -1 + pulls[1] * 2) / sum(pulls)
        assert abs(fixed_point - OPTIMUM) > 0.3
        assert play(FedAvg(), hospitals(), 200) == pytest.approx(fixed_point, abs=1e-9)

    def test_scaffold_ends_at_the_optimum(self) -> None:
        clients = hospitals()
        strategy = Scaffold()
        assert play(strategy, clients, 300) == pytest.approx(OPTIMUM, abs=1e-9)
        for client, gradient in zip(clients, (1 * (OPTIMUM + 1), 4 * (OPTIMUM - 2)), strict=True):
            assert float(client.context.memory["sum/scaffold/w"]) == pytest.approx(gradient, abs=1e-9)
        assert float(strategy.memory["c/w"]) == pytest.approx(0, abs=1e-9)

    def test_scaffold_ends_at_the_optimum_where_one_client_takes_part_at_a_time(self) -> None:
        def in_turn(round: int, client: int) -> bool:
            return round % 2 == client

        assert play(Scaffold(), hospitals(), 600, takes_part=in_turn) == pytest.approx(OPTIMUM, abs=1e-6)

    def test_scaffold_by_examples_minimises_the_weighted_sum(self) -> None:
        clients = hospitals()
        clients[0].num_examples = 3
        found = play(Scaffold(weighting="examples"), clients, 300)
        assert found == pytest.approx((3 * 1 * -1 + 4 * 2) / (3 * 1 + 4), abs=1e-9)

    @pytest.mark.parametrize("settings", [{"lrs": (0.0, 0.1, 0.02)}, {"momentum": 0.5}])
    def test_scaffold_ends_at_the_optimum_with_rates_that_change_and_momentum(self, settings: dict[str, Any]) -> None:
        assert play(Scaffold(), hospitals(**settings), 400) == pytest.approx(OPTIMUM, abs=1e-9)

    def test_feddyn_ends_at_the_optimum(self) -> None:
        clients = hospitals(steps=200)
        strategy = FedDyn(alpha=1.0)
        assert play(strategy, clients, 100) == pytest.approx(OPTIMUM, abs=1e-9)
        gradients = [float(client.context.memory["sum/feddyn/w"]) for client in clients]
        assert gradients == pytest.approx([1 * (OPTIMUM + 1), 4 * (OPTIMUM - 2)], abs=1e-9)
        assert float(strategy.memory["h/w"]) == pytest.approx(0, abs=1e-9)

    def test_feddyn_ends_at_the_optimum_where_one_client_takes_part_at_a_time(self) -> None:
        def in_turn(round: int, client: int) -> bool:
            return round % 2 == client

        found = play(FedDyn(alpha=4.0), hospitals(steps=200, lrs=(0.05,)), 600, takes_part=in_turn)
        assert found == pytest.approx(OPTIMUM, abs=1e-6)

    def test_fedprox_ends_where_its_formula_says(self) -> None:
        mu = 2.0
        # A client's optimum of f + mu/2 (w - w_t)^2 lies a / (a + mu) of the way to b; five steps go so far towards it.
        pulls = [a / (a + mu) * (1 - (1 - 0.1 * (a + mu)) ** 5) for a in (1, 4)]
        fixed_point = (pulls[0] * -1 + pulls[1] * 2) / sum(pulls)
        assert play(FedProx(mu), hospitals(), 300) == pytest.approx(fixed_point, abs=1e-9)

    def test_a_strong_proximal_term_lies_nearer_to_the_optimum(self) -> None:
        bias = [abs(play(FedProx(mu), hospitals(steps=100, lrs=(0.04,)), 100) - OPTIMUM) for mu in (0, 2, 20)]
        assert bias[2] < bias[1] / 2 < bias[0] / 4

    def test_a_proximal_term_of_nothing_is_federated_averaging(self) -> None:
        assert play(FedProx(0), hospitals(), 10) == play(FedAvg(), hospitals(), 10)


class TestObjectiveInconsistency:
    """Wang et al. 2020, section 3: F_i(x) = 1/2 ||x - e_i||^2, and client i takes tau_i steps."""

    E = (0.0, 3.0)
    TAU = (2, 8)
    LR = 0.01

    def clients(self, **settings: Any) -> list[Quadratic]:
        return [Quadratic(1.0, e, tau, (self.LR,), **settings) for e, tau in zip(self.E, self.TAU, strict=True)]

    def test_federated_averaging_minimises_another_objective(self) -> None:
        pulls = [1 - (1 - self.LR) ** tau for tau in self.TAU]
        found = play(FedAvg(), self.clients(), 1000)
        assert found == pytest.approx(np.dot(pulls, self.E) / sum(pulls), abs=1e-9)
        assert found == pytest.approx(np.dot(self.TAU, self.E) / sum(self.TAU), abs=0.02)  # eq. 4, eta -> 0

    def test_fednova_minimises_the_one_that_was_asked_for(self) -> None:
        pulls = [(1 - (1 - self.LR) ** tau) / tau for tau in self.TAU]
        found = play(FedNova(), self.clients(), 1000)
        assert found == pytest.approx(np.dot(pulls, self.E) / sum(pulls), abs=1e-9)
        assert found == pytest.approx(np.mean(self.E), abs=0.03)  # and it is the mean as eta -> 0

    def test_with_momentum_as_well(self) -> None:
        assert play(FedNova(), self.clients(momentum=0.9), 1000) == pytest.approx(np.mean(self.E), abs=0.15)
        assert play(FedAvg(), self.clients(momentum=0.9), 1000) > 2.7


class TestClient:
    def local(self, config: Config, **memory: float) -> tuple[LocalTraining, ClientContext]:
        context = ClientContext(client_id="c")
        context.memory.update({"sum/" + name.replace("_", "/"): np.array(value) for name, value in memory.items()})
        return LocalTraining({"w": np.array(1.0)}, config, context), context

    def corrected(self, local: LocalTraining, gradient: float, weight: float, lr: float = 0.1) -> float:
        gradients = {"w": np.array(gradient)}
        local.correct(gradients, {"w": np.array(weight)}, lr)
        return float(gradients["w"])

    def test_without_a_word_of_the_strategy_nothing_is_added(self) -> None:
        local, context = self.local({"lr": 0.1})
        assert self.corrected(local, 5.0, 3.0) == 5.0
        result = local.result({"w": np.array(0.5)}, 7, {"loss": 2.0})
        assert (result.num_examples, result.metrics, result.extra) == (7, {"loss": 2.0}, {})
        assert context.memory == {}

    def test_a_proximal_step_by_hand(self) -> None:
        local, _ = self.local({"proximal_mu": 0.5})
        assert self.corrected(local, 5.0, 3.0) == 5.0 + 0.5 * (3.0 - 1.0)

    def test_a_scaffold_fit_by_hand(self) -> None:
        context = ClientContext(client_id="c")
        context.memory["sum/scaffold/w"] = np.array(2.0)
        context.broadcast = {"c/w": np.array(0.5)}
        local = LocalTraining({"w": np.array(1.0)}, {"scaffold": True}, context)
        assert self.corrected(local, 5.0, 3.0, lr=0.1) == 5.0 - 2.0 + 0.5
        assert self.corrected(local, 5.0, 3.0, lr=0.3) == 5.0 - 2.0 + 0.5
        result = local.result({"w": np.array(0.8)}, 7)
        after = 2.0 - 0.5 + (1.0 - 0.8) / (0.1 + 0.3)
        assert float(context.memory["sum/scaffold/w"]) == pytest.approx(after)
        assert float(result.extra["c/w"]) == pytest.approx(after - 2.0)

    def test_a_feddyn_fit_by_hand(self) -> None:
        local, context = self.local({"feddyn_alpha": 0.5}, feddyn_w=2.0)
        assert self.corrected(local, 5.0, 3.0) == 5.0 - 2.0 + 0.5 * (3.0 - 1.0)
        result = local.result({"w": np.array(4.0)}, 7)
        assert result.extra == {}
        assert float(context.memory["sum/feddyn/w"]) == 2.0 - 0.5 * (4.0 - 1.0)

    def test_nothing_was_trained_and_nothing_is_learnt_of_the_gradient(self) -> None:
        local, context = self.local({"scaffold": True, "feddyn_alpha": 1.0, "fednova": True}, scaffold_w=2.0)
        result = local.result({"w": np.array(1.0)}, 7)
        assert (float(result.extra["c/w"]), result.metrics) == (0.0, {"a_norm": 0.0})
        assert float(context.memory["sum/scaffold/w"]) == 2.0
        assert "sum/feddyn/w" not in context.memory

    def test_what_has_no_gradient_has_no_control_variate(self) -> None:
        parameters = {
            "w": np.ones(2, np.float16),
            "seen": np.array(3),
            "mask": np.array([True]),
            "running_mean": np.ones(2, np.float32),
        }
        context = ClientContext(client_id="c")
        local = LocalTraining(parameters, {"scaffold": True}, context)
        local.correct({"w": np.ones(2, np.float32)}, parameters, 0.1)
        trained = {**parameters, "w": np.full(2, 0.5, np.float16), "running_mean": np.zeros(2, np.float32)}
        extra = local.result(trained, 1).extra
        assert {name: (value.dtype.name, value.tolist()) for name, value in extra.items()} == {
            "c/w": ("float32", [5.0, 5.0]),
            "c/running_mean": ("float32", [0.0, 0.0]),
        }
        assert Scaffold().extras(parameters).keys() == extra.keys()

    def test_a_step_of_size_nothing_teaches_nothing(self) -> None:
        local, context = self.local({"scaffold": True, "fednova": True}, scaffold_w=2.0)
        self.corrected(local, 5.0, 3.0, lr=0.0)
        result = local.result({"w": np.array(1.0)}, 7)
        assert (float(result.extra["c/w"]), result.metrics) == (0.0, {"a_norm": 0.0})
        assert float(context.memory["sum/scaffold/w"]) == 2.0

    @pytest.mark.parametrize("config", [{"proximal_mu": 0.5}, {"feddyn_alpha": 0.5}, {"scaffold": True}])
    def test_what_the_client_keeps_to_itself_is_trained_plainly(self, config: Config) -> None:
        context = ClientContext(client_id="c", is_personal=lambda name: name == "w")
        context.memory |= {"sum/scaffold/w": np.array(2.0), "sum/feddyn/w": np.array(3.0)}
        before = dict(context.memory)
        local = LocalTraining({"w": np.array(1.0)}, config, context)
        assert self.corrected(local, 5.0, 3.0) == 5.0
        assert not any(value.any() for value in local.result({"w": np.array(0.0)}, 1).extra.values())
        assert context.memory == before

    def test_the_old_memory_is_not_written_to(self) -> None:
        config = {"scaffold": True, "feddyn_alpha": 1.0}
        local, context = self.local(config, scaffold_w=2.0, feddyn_w=1.0)
        for value in context.memory.values():
            value.setflags(write=False)
        before = dict(context.memory)
        self.corrected(local, 5.0, 3.0)
        local.result({"w": np.array(0.0)}, 1)
        assert (float(before["sum/scaffold/w"]), float(before["sum/feddyn/w"])) == (2.0, 1.0)
        assert float(context.memory["sum/scaffold/w"]) != 2.0

    @pytest.mark.parametrize(("momentum", "proximal"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.03)])
    def test_steps_are_counted_as_the_paper_says(self, momentum: float, proximal: float) -> None:
        client = Quadratic(1.0, 0.0, 9, (0.1,), momentum)
        fitted = client.fit({"w": np.array(1.0)}, {"fednova": True, "proximal_mu": proximal / 0.1})
        assert fitted.metrics["a_norm"] == pytest.approx(a_norm(9, momentum=momentum, proximal=proximal))

    def test_a_task_that_is_not_wanted_any_more_ends_with_what_there_is(self) -> None:
        client = Quadratic(1.0, 0.0, 1000)
        client.context.cancel()
        assert float(client.fit({"w": np.array(1.0)}, {}).parameters["w"]) == 1.0

    def test_time_that_is_up_ends_it_with_partial_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter(range(100))
        monkeypatch.setattr("time.monotonic", lambda: float(next(now)))
        local, _ = self.local({"budget_s": 4.0})
        assert list(local.batches("abcdefgh")) == ["a", "b", "c"]
        now = iter(range(100))
        local, _ = self.local({})
        assert list(local.batches("abcdefgh")) == list("abcdefgh")


class TestDitto:
    def test_a_personal_step_by_hand_and_what_is_kept(self) -> None:
        context = ClientContext(client_id="c")
        model = {"w": np.array(1.0)}
        config = Ditto(0.5).fit_config(1)
        first = PersonalTraining(model, config, context)
        assert first.start == model
        gradients = {"w": np.array(5.0)}
        first.correct(gradients, {"w": np.array(3.0)})
        assert float(gradients["w"]) == 5.0 + 0.5 * (3.0 - 1.0)
        first.keep({"w": np.array(3.0)})
        later = PersonalTraining({"w": np.array(2.0)}, config, context)
        assert float(later.start["w"]) == 3.0
        assert float(personal_parameters(model, context)["w"]) == 3.0

    @pytest.mark.parametrize("strength", [0.0, 0.5, 4.0])
    def test_the_personal_model_ends_between_its_own_optimum_and_the_federations(self, strength: float) -> None:
        context = ClientContext(client_id="c")
        model, a, b = {"w": np.array(1.0)}, 2.0, 5.0
        for _ in range(20):
            personal = PersonalTraining(model, {"ditto_lambda": strength}, context)
            weights = {"w": np.array(personal.start["w"])}
            for _ in range(20):
                gradients = {"w": a * (weights["w"] - b)}
                personal.correct(gradients, weights)
                weights["w"] = weights["w"] - 0.1 * gradients["w"]
            personal.keep(weights)
        expected = (a * b + strength * 1.0) / (a + strength)
        assert float(context.memory["ditto/w"]) == pytest.approx(expected, abs=1e-9)


class TestServer:
    MODEL: ClassVar[Tensors] = {
        "w": np.array([1.0, 2.0], np.float32),
        "seen": np.array(10),
        "mask": np.array([True, False]),
    }

    def update(self, client: str, delta: float, change: float = 0.0, **settings: Any) -> ClientUpdate:
        return ClientUpdate(
            client_id=client,
            delta={
                "w": np.full(2, delta, np.float32),
                "seen": np.array(4),
                "mask": np.array([-settings.pop("flips", 1), 0], np.int8),
            },
            num_examples=settings.pop("num_examples", 1),
            extra={"c/w": np.full(2, change, np.float32)},
            **settings,
        )

    def aggregate(self, strategy: Strategy, *updates: ClientUpdate, num_clients: int = 4) -> dict[str, Array]:
        strategy.attach(round=RoundInfo(num_clients=num_clients))
        state = strategy.init(self.MODEL)
        for update in updates:
            strategy.fold(state, update)
        return strategy.finish(state, self.MODEL)

    def test_a_scaffold_round_by_hand(self) -> None:
        strategy = Scaffold(0.5)
        assert strategy.broadcast(self.MODEL) == {}
        moved = self.aggregate(strategy, self.update("a", 1, 3), self.update("b", 3, 5, num_examples=9))
        np.testing.assert_array_equal(moved["w"], [1 + 0.5 * 2, 2 + 0.5 * 2])
        np.testing.assert_array_equal(strategy.broadcast(self.MODEL)["c/w"], [2 / 4 * 4] * 2)
        assert int(moved["seen"]) == 10 + 2
        self.aggregate(strategy, self.update("a", 0, 2), num_clients=2)
        np.testing.assert_array_equal(strategy.memory["c/w"], [2 + 1 / 2 * 2] * 2)

    def test_scaffold_by_examples_and_with_a_number_of_clients_of_its_own(self) -> None:
        strategy = Scaffold(weighting="examples", num_clients=8)
        moved = self.aggregate(strategy, self.update("a", 1, 3), self.update("b", 3, 5, num_examples=3))
        np.testing.assert_array_equal(moved["w"], [1 + 2.5, 2 + 2.5])
        np.testing.assert_array_equal(strategy.memory["c/w"], [2 / 8 * 4.5] * 2)

    def test_a_late_update_counts_less_for_the_model_and_in_full_for_what_clients_remember(self) -> None:
        late = {"staleness": 1, "discount": 0.5}
        scaffold = Scaffold()
        moved = self.aggregate(scaffold, self.update("a", 1, 3), self.update("b", 3, 5, **late))
        np.testing.assert_array_equal(moved["w"], [1 + (1 + 1.5) / 2, 2 + (1 + 1.5) / 2])
        np.testing.assert_array_equal(scaffold.memory["c/w"], [2 / 4 * 4] * 2)
        feddyn = FedDyn(0.5)
        moved = self.aggregate(feddyn, self.update("a", 1, flips=0), self.update("b", 3, **late))
        h = -0.5 / 4 * (1 + 3)
        np.testing.assert_array_equal(feddyn.memory["h/w"], [h] * 2)
        np.testing.assert_allclose(moved["w"], np.array([1, 2]) + (1 + 1.5) / 2 - h / 0.5)
        assert int(moved["seen"]) == 10 + 3
        assert moved["mask"].tolist() == [True, False], "one vote each, for votes are not late in part"

    def test_feddyn_rounds_by_hand(self) -> None:
        strategy = FedDyn(0.5, num_clients=3)
        moved = self.aggregate(strategy, self.update("a", 1), self.update("b", 3, num_examples=9))
        h = -0.5 / 3 * (1 + 3)
        np.testing.assert_allclose(strategy.memory["h/w"], [h] * 2, rtol=1e-6)
        np.testing.assert_allclose(moved["w"], np.array([1, 2]) + 2 - h / 0.5, rtol=1e-6)
        assert int(moved["seen"]) == 10 + 4
        moved = self.aggregate(strategy, self.update("a", -1))
        h -= 0.5 / 3 * -1
        np.testing.assert_allclose(strategy.memory["h/w"], [h] * 2, rtol=1e-6)
        np.testing.assert_allclose(moved["w"], np.array([1, 2]) - 1 - h / 0.5, rtol=1e-6)

    def test_a_tensor_that_not_all_send_is_averaged_over_those_who_do(self) -> None:
        only_w = ClientUpdate(client_id="b", delta={"w": np.full(2, 3, np.float32)}, num_examples=1, discount=0.5)
        strategy = FedDyn(1.0, num_clients=2)
        moved = self.aggregate(strategy, self.update("a", 1), only_w)
        assert int(moved["seen"]) == 10 + 4
        np.testing.assert_allclose(moved["w"], np.array([1, 2]) + (1 + 1.5) / 2 + (1 + 3) / 2)

    def test_a_tensor_that_comes_in_pieces_is_one_tensor(self) -> None:
        class Parted(dict[str, Array]):
            def pieces(self) -> Iterator[Piece]:
                for name, value in self.items():
                    yield from ((name, start, value[start : start + 1]) for start in range(len(value)))

            peek = pieces

        delta = {"w": np.array([1, 3], np.float32)}
        late: dict[str, Any] = {"num_examples": 1, "staleness": 1, "discount": 0.5}
        whole = [ClientUpdate(client_id=name, delta=delta, **late) for name in "ab"]
        parted = [ClientUpdate(client_id=name, delta=Parted(delta), **late) for name in "ab"]
        for one, other in zip(*(self.aggregate(FedDyn(), *each).values() for each in (whole, parted)), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_memory_that_is_taken_back_is_as_it_was(self) -> None:
        for strategy, name in ((Scaffold(), "c/w"), (FedDyn(), "h/w")):
            self.aggregate(strategy, self.update("a", 1, 3))
            before, bits = dict(strategy.memory), strategy.memory[name].tobytes()
            strategy.memory[name].setflags(write=False)
            self.aggregate(strategy, self.update("a", 1, 3))
            assert before[name].tobytes() == bits
            assert strategy.memory[name].tobytes() != bits

    def test_they_say_what_they_are(self) -> None:
        assert repr(Scaffold(num_clients=4)) == "Scaffold(num_clients=4)"
        assert repr(Scaffold(weighting="examples")) == "Scaffold(weighting=examples)"
        assert repr(FedDyn(0.1)) == "FedDyn(alpha=0.1)"
        assert repr(FedProx(1, budget_s=60)) == "FedProx(mu=1, budget_s=60)"
        assert repr(Ditto(weighting="uniform")) == "Ditto(lambda_=0.1, weighting=uniform)"
        assert FedProx(1, budget_s=60).fit_config(3) == {"proximal_mu": 1, "budget_s": 60}

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: FedProx(-1), "mu must be a number of 0 or more, not -1"),
            (lambda: FedProx(budget_s=0), "budget_s must be a positive number, not 0"),
            (lambda: Scaffold(0), "server_learning_rate must be a positive number, not 0"),
            (lambda: Scaffold(num_clients=0), "num_clients must be a whole number of 1 or more, not 0"),
            (lambda: FedDyn(0), "alpha must be a positive number, not 0"),
            (lambda: FedDyn(num_clients=True), "num_clients must be a whole number of 1 or more, not True"),
            (lambda: Ditto(-0.1), "lambda_ must be a number of 0 or more, not -0.1"),
        ],
    )
    def test_arguments_that_cannot_work_are_refused(self, make: Callable[[], Strategy], message: str) -> None:
        with pytest.raises(ConfigError, match=f"^{message}$"):
            make()

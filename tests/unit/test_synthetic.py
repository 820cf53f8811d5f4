"""FedProx's synthetic(alpha, beta), and logistic regression on it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedbus.app import App, load_app
from fedbus.config import RoundConfig
from fedbus.data.synthetic import synthetic
from fedbus.errors import ConfigError
from fedbus.examples.synthetic import (
    LogisticClient,
    _epochs,
    descend,
    joined,
    make_app,
    measure,
    parted,
    with_ones,
)
from fedbus.strategies.base import ClientUpdate
from fedbus.training.base import ClientContext
from fedbus.training.delta import update_delta
from fedbus.training.local import LocalTraining
from fedbus.types import Array, Config

ROUNDS = RoundConfig.synchronous(10)


def client_of(app: App, partition: int = 0, num_partitions: int = 30) -> LogisticClient:
    context = ClientContext(client_id="c", partition=partition, num_partitions=num_partitions)
    client = app.client_fn(context)
    assert isinstance(client, LogisticClient)
    return client


def model_of(app: App) -> dict[str, Array]:
    model = app.initial_model()
    assert model is not None
    return model


class TestData:
    def test_there_are_thirty_users_of_sixty_features_and_ten_classes(self) -> None:
        users = synthetic(1, 1)
        assert len(users) == 30
        for user in users:
            assert user.x.shape == (len(user), 60)
            assert (user.x.dtype.name, user.y.dtype.name) == ("float64", "int64")
            assert len(user) >= 50
        assert set(np.concatenate([user.y for user in users])) == set(range(10))

    def test_a_seed_gives_the_data_of_the_authors_program(self) -> None:
        """numpy.random.seed(0), then their generate_synthetic(1, 1)."""
        users = synthetic(1, 1, seed=0)
        assert sum(map(len, users)) == 22349
        assert [len(user) for user in users[:6]] == [1909, 171, 436, 4876, 2337, 57]
        np.testing.assert_allclose(users[0].x[0, :3], [-2.69532196, 0.92777756, 0.52000441], atol=1e-8)
        np.testing.assert_allclose(users[29].x[-1, 59], 1.84565229, atol=1e-8)
        labels = np.bincount(np.concatenate([user.y for user in users]))
        assert labels.tolist() == [789, 1322, 1791, 2169, 1905, 10749, 2514, 598, 149, 363]

    def test_the_data_are_a_function_of_the_seed_alone(self) -> None:
        np.random.seed(1)
        first = synthetic(1, 1, seed=3)
        np.random.seed(2)
        before = np.random.random_sample()
        np.random.seed(2)
        second, other = synthetic(1, 1, seed=3), synthetic(1, 1, seed=4)
        assert np.random.random_sample() == before
        for one, two in zip(first, second, strict=True):
            np.testing.assert_array_equal(one.x, two.x)
            np.testing.assert_array_equal(one.y, two.y)
        assert [len(user) for user in first] != [len(user) for user in other]

    def test_a_users_features_vary_as_sigma_says(self) -> None:
        largest = max(synthetic(1, 1, seed=0), key=len)
        sigma = np.arange(1, 61) ** -1.2
        np.testing.assert_allclose(largest.x.var(axis=0), sigma, rtol=0.15)  # 4 deviations of 4876 examples are 0.08

    def test_beta_is_how_unlike_the_users_data_are(self) -> None:
        def spread(beta: float) -> float:
            return float(np.std([user.x.mean() for user in synthetic(1, beta, seed=0)]))

        assert spread(0) == pytest.approx(60**-0.5, rel=0.3)  # v_k alone: the mean of 60 of N(0, 1)
        assert spread(1) == pytest.approx(1, rel=0.3)
        assert spread(10) == pytest.approx(10 * spread(1), rel=0.1)

    def test_users_label_by_models_of_their_own_and_alpha_changes_no_label(self) -> None:
        plain, shifted = synthetic(0, 1, seed=5), synthetic(3, 1, seed=5)
        for one, other in zip(plain, shifted, strict=True):
            np.testing.assert_array_equal(one.x, other.x)
            np.testing.assert_array_equal(one.y, other.y)
        assert len({int(np.bincount(user.y).argmax()) for user in plain}) > 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"alpha": -1, "beta": 1}, "alpha must be 0 or more, not -1"),
            ({"alpha": 1, "beta": math.nan}, "beta must be 0 or more, not nan"),
            ({"alpha": 1, "beta": math.inf}, "beta must be 0 or more, not inf"),
            ({"alpha": 1, "beta": 1, "num_users": 0}, "num_users must be 1 or more, not 0"),
            ({"alpha": 1, "beta": 1, "seed": -1}, r"seed must be from 0 to 2\*\*32 - 1, not -1"),
        ],
    )
    def test_arguments_that_cannot_work_are_refused(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=f"^{message}$"):
            synthetic(**arguments)


class TestRegression:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(61, 10)) / 4
    x = with_ones(rng.normal(size=(8, 60)))
    y = rng.integers(0, 10, 8)
    labels = np.eye(10)[y]

    def test_a_step_follows_the_gradient_of_the_loss(self) -> None:
        stepped = self.weights.copy()
        descend(stepped, self.x, self.labels, batch_size=10, lr=0.5)
        gradient, nearby = np.empty_like(self.weights), self.weights.copy()
        for at in np.ndindex(nearby.shape):
            nearby[at] = self.weights[at] + 1e-5
            above, _ = measure(nearby, self.x, self.y)
            nearby[at] = self.weights[at] - 1e-5
            below, _ = measure(nearby, self.x, self.y)
            nearby[at] = self.weights[at]
            gradient[at] = (above - below) / 2e-5
        np.testing.assert_allclose((self.weights - stepped) / 0.5, gradient, atol=1e-9)

    def test_an_epoch_is_a_step_for_each_batch_the_last_one_smaller(self) -> None:
        epoch, steps = self.weights.copy(), self.weights.copy()
        descend(epoch, self.x, self.labels, batch_size=3, lr=0.1)
        for batch in (slice(0, 3), slice(3, 6), slice(6, 8)):
            descend(steps, self.x[batch], self.labels[batch], batch_size=10, lr=0.1)
        np.testing.assert_array_equal(epoch, steps)

    def test_scores_beyond_the_range_of_exp_are_no_trouble(self) -> None:
        far = self.weights * 1e5
        loss, accuracy = measure(far, self.x, self.y)
        descend(far, self.x, self.labels, batch_size=4, lr=0.1)
        assert math.isfinite(loss)
        assert 0 <= accuracy <= 1
        assert np.isfinite(far).all()

    def test_a_model_of_zeros_knows_nothing(self) -> None:
        loss, accuracy = measure(np.zeros((61, 10)), self.x, self.y)
        assert loss == pytest.approx(math.log(10))
        assert accuracy == np.mean(self.y == 0)

    def test_more_examples_than_are_measured_at_once(self) -> None:
        many, labels = np.tile(self.x, (100, 1)), np.tile(self.y, 100)
        assert measure(self.weights, many, labels) == pytest.approx(measure(self.weights, self.x, self.y))

    def test_parameters_are_put_together_and_taken_apart(self) -> None:
        parameters = parted(self.weights)
        assert {name: value.shape for name, value in parameters.items()} == {"W": (60, 10), "b": (10,)}
        np.testing.assert_array_equal(joined(parameters), self.weights)
        with_bias = self.x[:, :60] @ parameters["W"] + parameters["b"]
        np.testing.assert_allclose(with_bias, self.x @ self.weights, atol=1e-12)


class TestApp:
    def test_each_user_is_a_client_with_nine_tenths_to_train_on(self) -> None:
        app = make_app(ROUNDS)
        for user, data in enumerate(synthetic(1, 1, seed=0)):
            client = client_of(app, user)
            assert len(client.train) == int(0.9 * len(data))
            np.testing.assert_array_equal(np.concatenate([client.train.x, client.test.x]), data.x)

    def test_fewer_clients_share_out_all_users_and_more_are_refused(self) -> None:
        app = make_app(ROUNDS)
        clients = [client_of(app, partition, 7) for partition in range(7)]
        assert sum(len(client.train) + len(client.test) for client in clients) == 22349
        with pytest.raises(ConfigError, match="there are 30 users: at most so many clients, not 31"):
            client_of(app, 0, 31)

    def test_a_task_done_twice_gives_the_same_update_and_another_round_another(self) -> None:
        app = make_app(ROUNDS, epochs=1)
        model = model_of(app)
        first, again, other = (client_of(app, 5).fit(model, app.fit_config_of(round)) for round in (1, 1, 2))
        np.testing.assert_array_equal(first.parameters["W"], again.parameters["W"])
        assert not np.array_equal(first.parameters["W"], other.parameters["W"])
        assert first.num_examples == len(client_of(app, 5).train)
        assert first.metrics == {"loss": pytest.approx(math.log(10))}
        assert not model["W"].any()

    def test_the_settings_reach_the_training(self) -> None:
        def trained(**settings: Any) -> Array:
            app = make_app(ROUNDS, **settings)
            return np.asarray(client_of(app, 5).fit(model_of(app), app.fit_config_of(1)).parameters["W"])

        plain = trained()
        changed: list[dict[str, Any]] = [
            {"epochs": 4},
            {"batch_size": 9},
            {"lr": 0.02},
            {"seed": 1},
            {"data_seed": 1},
            {"beta": 0.5},
        ]
        for settings in changed:
            assert not np.array_equal(plain, trained(**settings)), settings
        np.testing.assert_array_equal(plain, trained(epochs=5, batch_size=10, lr=0.01, seed=0))

    @pytest.mark.parametrize("method", [{"proximal_mu": 0.5}, {"scaffold": True}, {"fednova": True}])
    def test_what_the_strategy_asks_for_is_done_in_each_step(self, method: Config) -> None:
        """By the gradients of a plain step, and the method in numpy as it stands in its own tests."""
        app = make_app(ROUNDS, epochs=2)
        client = client_of(app, 5)
        config = {**app.fit_config_of(1), **method}
        model = {"W": np.full((60, 10), 0.1), "b": np.full(10, 0.2)}
        result = client.fit(model, config)
        local = LocalTraining(model, config, ClientContext(client_id="c"))
        weights, rng = joined(model), np.random.default_rng([0, 1, 0, 5])
        for _ in range(2):
            order = rng.permutation(len(client.train))
            for start in range(0, len(order), 10):
                batch, stepped = order[start : start + 10], weights.copy()
                descend(stepped, client.x[batch], client.labels[batch], 10, 1.0)
                gradients = parted(weights - stepped)
                local.correct(gradients, parted(weights), 0.01)
                weights -= 0.01 * joined(gradients)
        expected = local.result(parted(weights), 1)
        np.testing.assert_allclose(result.parameters["W"], expected.parameters["W"], rtol=1e-9)
        assert result.extra.keys() == expected.extra.keys()
        for name, value in expected.extra.items():
            np.testing.assert_allclose(result.extra[name], value, rtol=1e-6, atol=1e-12)
        assert result.metrics.get("a_norm") == expected.metrics.get("a_norm")

    def test_stragglers_come_to_fewer_epochs_and_to_the_same_ones_again(self) -> None:
        def epochs(stragglers: float) -> list[int]:
            app = make_app(ROUNDS, epochs=20, stragglers=stragglers)
            return [_epochs(app.fit_config_of(round), [0, round, 0, 5]) for round in range(400)]

        assert set(epochs(0)) == {20}
        drawn = epochs(0.9)
        assert set(drawn) == set(range(1, 21))
        assert drawn == epochs(0.9)
        assert sum(count < 20 for count in drawn) == pytest.approx(0.9 * 19 / 20 * 400, abs=30)  # 4 deviations
        assert np.mean(drawn) == pytest.approx(0.9 * 10.5 + 0.1 * 20, abs=1.3)

    def test_a_task_that_is_no_longer_wanted_ends_before_the_next_epoch(self) -> None:
        app = make_app(ROUNDS)
        client = client_of(app)
        client.context.cancel()
        assert not client.fit(model_of(app), app.fit_config_of(1)).parameters["W"].any()

    def test_ten_rounds_of_ten_users_learn_for_all_of_them(self) -> None:
        app = make_app(ROUNDS)
        model, rng = model_of(app), np.random.default_rng(0)
        assert app.evaluate_fn is not None
        clients = [client_of(app, user) for user in range(30)]
        before = [client.evaluate(model, {}).loss for client in clients]
        for round in range(1, 11):
            state = app.strategy.init(model)
            for user in rng.choice(30, 10, replace=False):
                result = clients[user].fit(model, app.fit_config_of(round))
                delta = update_delta(model, result.parameters)
                app.strategy.fold(
                    state, ClientUpdate(client_id=str(user), delta=delta, num_examples=result.num_examples)
                )
            model = app.strategy.finish(state, model)
        evaluated = app.evaluate_fn(10, model)
        assert evaluated is not None
        own = [client.evaluate(model, {}) for client in clients]
        assert before == [pytest.approx(math.log(10))] * 30
        assert float(evaluated[1]["accuracy"]) > 0.75
        total = sum(result.num_examples for result in own)
        assert evaluated[0] == pytest.approx(sum(result.loss * result.num_examples for result in own) / total)

    def test_the_module_has_an_app_and_rounds_choose_the_strategy(self) -> None:
        assert repr(load_app("fedbus.examples.synthetic").strategy) == "FedAvg()"
        assert repr(make_app(RoundConfig.asynchronous()).strategy) == "FedAsync()"

"""Local training of PyTorch models: the same as in numpy, by hooks on the optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedbus.errors import ClientCodeError
from fedbus.training import local as numpy_training
from fedbus.training.base import ClientContext
from fedbus.training.torch import (
    LocalTraining,
    PersonalTraining,
    batch_norm_names,
    frozen,
    get_parameters,
)
from fedbus.types import Array, Config, FitResult

# isort: split
import torch
from torch import nn

X = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [3.0, -2.0]])
Y = torch.tensor([[1.0], [0.0], [2.0]])
START: dict[str, Array] = {"weight": np.array([[0.5, -0.5]], np.float32), "bias": np.array([0.1], np.float32)}


def context_with(**tensors: float) -> ClientContext:
    """Memory and broadcast as after some rounds: a tensor of each name for each of the model's, of one number."""
    context = ClientContext(client_id="c")
    for name, start in START.items():
        for kept, number in tensors.items():
            place: Any = context.broadcast if kept == "c" else context.memory
            place[f"{kept}/{name}" if kept in ("c", "ditto") else f"sum/{kept}/{name}"] = np.full(
                start.shape, number, np.float32
            )
    return context


def gradients_of(weights: dict[str, Array]) -> dict[str, Array]:
    """Of the mean squared error of a linear model, by hand."""
    x, y = X.numpy(), Y.numpy()
    error = x @ weights["weight"].T + weights["bias"] - y
    return {"weight": 2 * error.T @ x / len(x), "bias": 2 * error.mean(axis=0)}


def backward(net: nn.Module) -> None:
    nn.functional.mse_loss(net(X), Y).backward()  # type: ignore[no-untyped-call]


def fit_in_torch(config: Config, context: ClientContext, steps: int = 3, momentum: float = 0.0) -> FitResult:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=momentum)
    local = LocalTraining(net, optimizer, START, config, context)
    for rate in local.batches([0.1, 0.05, 0.1][:steps]):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
    return local.result(3, {"loss": 0.5})


def fit_in_numpy(config: Config, context: ClientContext, steps: int = 3, momentum: float = 0.0) -> FitResult:
    local = numpy_training.LocalTraining(START, config, context)
    weights = {name: value.copy() for name, value in START.items()}
    velocity = {name: np.zeros_like(value) for name, value in START.items()}
    for rate in local.batches([0.1, 0.05, 0.1][:steps]):
        gradients = gradients_of(weights)
        local.correct(gradients, weights, rate, momentum)
        for name, gradient in gradients.items():
            velocity[name] = momentum * velocity[name] + gradient
            weights[name] = weights[name] - rate * velocity[name]
    return local.result(weights, 3, {"loss": 0.5})


METHODS: dict[str, Config] = {
    "none": {},
    "fedprox": {"proximal_mu": 0.7},
    "scaffold": {"scaffold": True},
    "feddyn": {"feddyn_alpha": 0.3},
    "fednova": {"fednova": True, "proximal_mu": 0.7},
}


class TestLocalTraining:
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("method", METHODS)
    def test_a_fit_is_that_of_numpy(self, method: str, momentum: float) -> None:
        results = []
        for fit in (fit_in_torch, fit_in_numpy):
            context = context_with(scaffold=0.2, c=-0.1, feddyn=0.4)
            results.append((fit(METHODS[method], context, momentum=momentum), context))
        (one, its_context), (other, others_context) = results
        assert one.metrics == pytest.approx(other.metrics)
        assert one.num_examples == 3
        assert one.extra.keys() == other.extra.keys() == ({"c/weight", "c/bias"} if method == "scaffold" else set())
        for ours, theirs in (
            (one.parameters, other.parameters),
            (one.extra, other.extra),
            (its_context.memory, others_context.memory),
        ):
            for name, value in theirs.items():
                assert ours[name].dtype == np.float32
                np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-6, err_msg=name)

    def test_the_parameters_are_loaded_and_each_method_goes_another_way(self) -> None:
        ends = {
            method: fit_in_torch(config, context_with(scaffold=0.2, c=-0.1, feddyn=0.4)).parameters["weight"].tobytes()
            for method, config in METHODS.items()
            if method != "fednova"
        }
        assert len(set(ends.values())) == 4
        np.testing.assert_array_equal(fit_in_torch({}, context_with(), steps=0).parameters["weight"], START["weight"])

    def test_groups_of_parameters_have_rates_of_their_own(self) -> None:
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD([{"params": [net.weight], "lr": 0.1}, {"params": [net.bias], "lr": 0.02}])
        context = context_with()
        local = LocalTraining(net, optimizer, START, {"scaffold": True}, context)
        backward(net)
        optimizer.step()
        local.result(3)
        for name, gradient in gradients_of(START).items():  # c_i+ of one step is the gradient
            np.testing.assert_allclose(context.memory[f"sum/scaffold/{name}"], gradient, rtol=1e-4)

    def test_a_parameter_that_rests_is_not_counted_and_buffers_are_not_corrected(self) -> None:
        net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        start = get_parameters(net)
        context = ClientContext(client_id="c")
        context.memory["sum/scaffold/0.weight"] = np.ones((1, 2), np.float32)
        context.broadcast = {"c/0.weight": np.full((1, 2), 0.5, np.float32)}
        local = LocalTraining(net, optimizer, start, {"scaffold": True}, context)
        with frozen(net, "0.*"):
            optimizer.zero_grad()
            backward(net)
            optimizer.step()
        extra = local.result(3).extra
        assert extra["c/1.bias"].any()
        assert not any(extra[f"c/{name}"].any() for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"))
        assert "c/1.num_batches_tracked" not in extra

    def test_after_the_result_the_optimizer_is_plain_again(self) -> None:
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        LocalTraining(net, optimizer, START, {"feddyn_alpha": 1.0}, context_with(feddyn=100.0)).result(3)
        backward(net)
        optimizer.step()
        plain = gradients_of(START)["bias"]
        np.testing.assert_allclose(net.bias.detach().numpy(), START["bias"] - 0.1 * plain, rtol=1e-5)

    def test_training_that_failed_does_not_correct_in_the_next(self) -> None:
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        LocalTraining(net, optimizer, START, {"feddyn_alpha": 1.0}, context_with(feddyn=100.0))
        local = LocalTraining(net, optimizer, START, {}, context_with())
        backward(net)
        optimizer.step()
        plain = START["bias"] - 0.1 * gradients_of(START)["bias"]
        np.testing.assert_allclose(local.result(3).parameters["bias"], plain, rtol=1e-5)

    def test_what_the_client_keeps_to_itself_is_trained_plainly(self) -> None:
        context = context_with(feddyn=100.0)
        context.is_personal = lambda name: name == "bias"
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        LocalTraining(net, optimizer, START, {"feddyn_alpha": 1.0}, context)
        with torch.no_grad():
            net.bias.add_(1)  # away from where it began
        moved = {**START, "bias": START["bias"] + 1}
        backward(net)
        optimizer.step()
        plain = {name: moved[name] - 0.1 * gradient for name, gradient in gradients_of(moved).items()}
        np.testing.assert_allclose(net.bias.detach().numpy(), plain["bias"], rtol=1e-5)
        np.testing.assert_allclose(net.weight.detach().numpy(), plain["weight"] + 0.1 * 100, rtol=1e-5)

    def test_an_optimizer_whose_steps_cannot_be_counted_is_refused(self) -> None:
        net = nn.Linear(2, 1)
        for optimizer in (
            torch.optim.Adam(net.parameters()),
            torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        ):
            for method in ("scaffold", "fednova"):
                with pytest.raises(
                    ClientCodeError, match=r"count the steps of torch.optim.SGD, .*: (Adam|SGD) .* cann"
                ):
                    LocalTraining(net, optimizer, START, {method: True}, context_with())
            LocalTraining(net, optimizer, START, {"proximal_mu": 0.1}, context_with()).result(1)

    def test_a_closure_is_refused(self) -> None:
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        LocalTraining(net, optimizer, START, {}, context_with())
        with pytest.raises(ClientCodeError, match="local training sees no gradients of a closure"):
            optimizer.step(lambda: 0.0)


class TestPersonalTraining:
    def test_the_personal_model_is_pulled_towards_the_federations_and_kept(self) -> None:
        context = context_with(ditto=2.0)
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        personal = PersonalTraining(net, optimizer, START, {"ditto_lambda": 0.5}, context)
        v = {name: np.full(value.shape, 2.0, np.float32) for name, value in START.items()}
        np.testing.assert_array_equal(net.weight.detach().numpy(), v["weight"])
        backward(net)
        optimizer.step()
        personal.keep()
        for name, gradient in gradients_of(v).items():
            expected = v[name] - 0.1 * (gradient + 0.5 * (v[name] - START[name]))
            np.testing.assert_allclose(context.memory[f"ditto/{name}"], expected, rtol=1e-5)


class TestPersonalLayers:
    def net(self) -> nn.Module:
        body = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.ReLU())
        return nn.ModuleDict({"body": body, "head": nn.Linear(2, 3), "norm": nn.LayerNorm(3)})

    def test_everything_of_batch_norm_is_named_and_nothing_else(self) -> None:
        kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        assert batch_norm_names(self.net()) == [f"body.1.{kind}" for kind in kinds]
        assert batch_norm_names(nn.Linear(2, 3)) == []
        assert batch_norm_names(nn.BatchNorm2d(2, affine=False)) == list(kinds[2:])

    def test_fedrep_trains_the_head_and_then_the_body(self) -> None:
        net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        def step() -> set[str]:
            before = get_parameters(net)
            optimizer.zero_grad()
            nn.functional.mse_loss(net["head"](net["body"](X)), Y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return {name for name, value in get_parameters(net).items() if not np.array_equal(value, before[name])}

        head, body = {"head.weight", "head.bias"}, {"body.weight", "body.bias"}
        assert step() == head | body  # what is left of its gradients and momenta must not move the body later
        with frozen(net, "body.*"):
            before = get_parameters(net)
            optimizer.step()
            assert all(np.array_equal(get_parameters(net)[name], before[name]) for name in body)
            assert step() == head
        with frozen(net, "head.weight", "head.bias"):
            assert step() == body
        assert step() == head | body

    def test_what_rested_before_rests_afterwards_and_failure_frees_the_others(self) -> None:
        net = self.net()
        net["head"].bias.requires_grad_(False)  # type: ignore[index]
        with pytest.raises(ZeroDivisionError), frozen(net, "head.*"):
            _ = 1 / 0
        resting = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
        assert resting == ["head.bias"]

    def test_a_name_that_is_nobodys_is_told(self) -> None:
        message = r"^the net has no parameter 'tail\.\*': 'body\.0\.weight', .* and 5 more$"
        with pytest.raises(ClientCodeError, match=message), frozen(self.net(), "tail.*"):
            pass

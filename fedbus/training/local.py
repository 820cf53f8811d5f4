"""The clients' half of FedProx, SCAFFOLD, FedDyn, FedNova and Ditto: what they add to local SGD, in numpy.

The server's strategy says in the fit config which of them it is, so that one client program does for all; without a
word of it nothing is added. `fedbus.training.torch` has the same for PyTorch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, TypeVar

import numpy as np

from fedbus.training.base import ClientContext
from fedbus.types import SUMS, Array, Config, FitResult, Metrics, Tensors, kept_dtype

T = TypeVar("T")


class LocalTraining:
    """Local SGD from `parameters`, as the strategy wants it; one for each fit.

        local = LocalTraining(parameters, config, context)
        weights = {name: value.copy() for name, value in parameters.items()}
        for batch in local.batches(my_batches):
            gradients = my_gradients(weights, batch)  # {name: array}
            local.correct(gradients, weights, lr)
            for name in gradients:
                weights[name] -= lr * gradients[name]
        return local.result(weights, num_examples)

    To each gradient it adds `pull` (w - w_t) + `drift`, with w_t the parameters given: a scalar, and a tensor for each
    name that has one.

    - FedProx ("proximal_mu"): mu (w - w_t), the gradient of the proximal term. Li et al. 2020 (Federated Optimization
      in Heterogeneous Networks), eq. 2.
    - SCAFFOLD ("scaffold"): c - c_i, and then option II, c_i+ = c_i - c + (w_t - w) / (K eta_l); c is the server's,
      c_i the client's own. Karimireddy et al. 2020 (SCAFFOLD: Stochastic Controlled Averaging for Federated Learning),
      algorithm 1. K eta_l is the sum of the learning rates: they may change within a fit.
    - FedDyn ("feddyn_alpha"): alpha (w - w_t) - g_k, and then g_k <- g_k - alpha (w - w_t). Acar et al. 2021 (Federated
      Learning Based on Dynamic Regularization), algorithm 1.
    - FedNova ("fednova"): adds nothing, and tells ||a_i||_1 as the metric "a_norm". Wang et al. 2020 (Tackling the
      Objective Inconsistency Problem in Heterogeneous Federated Optimization), section 4.

    Tensors that the client keeps to itself (`App.personal`) are trained plainly.

    Args:
        parameters: the model that training begins from.
        config: of the fit task.
        context: the client's; its memory keeps c_i and g_k.
    """

    def __init__(self, parameters: Tensors, config: Config, context: ClientContext) -> None:
        self._context = context
        self._shared = {name: value for name, value in parameters.items() if not context.is_personal(name)}
        self._methods = _methods(parameters, self._shared, config, context)
        self.counts_steps = bool(config.get("scaffold") or config.get("fednova"))
        """Whether the method makes sense with SGD only, plain or with momentum."""
        self.pull = sum(method.pull for method in self._methods)
        self.drift: dict[str, Array] = _sum(method.drift for method in self._methods)
        self._tells_a_norm = bool(config.get("fednova"))
        self.is_plain = not self._methods and not self._tells_a_norm
        """Whether `correct` may be left out, for there is no method."""
        self._reaches: dict[str, _Reach] = {}
        self._stop_at = time.monotonic() + float(config.get("budget_s", float("inf")))

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches` until they end, the task is no longer wanted, or its time is up: "budget_s" of the fit config, in
        seconds from when this was made. What has been trained by then counts as partial work (FedProx, section 3.2)."""
        for batch in batches:
            if self._context.cancelled or time.monotonic() >= self._stop_at:
                return
            yield batch

    def correct(self, gradients: dict[str, Array], weights: Tensors, lr: float, momentum: float = 0.0) -> None:
        """Make `gradients` at `weights` those of the method, in place, for a step of SGD that is now taken with them.

        `momentum`: of a heavy ball that begins at rest, v <- momentum v + g, w <- w - lr v.
        """
        for name, gradient in gradients.items():
            if self.pull and name in self._shared:
                gradient += self.pull * (weights[name] - self._shared[name])
            if name in self.drift:
                gradient += self.drift[name]
            gradients[name] = gradient  # a numpy scalar, as 0-d arithmetic gives it, is not changed in place
        self.stepped(gradients, lr, momentum)

    def stepped(self, names: Iterable[str], lr: float, momentum: float = 0.0) -> None:
        """Count one step of these tensors: for those who correct their gradients themselves."""
        for name in names:
            if name in self._shared:
                self._reaches.setdefault(name, _Reach()).step(lr, momentum, self.pull)

    def result(self, weights: Tensors, num_examples: int, metrics: Metrics | None = None) -> FitResult:
        """What `fit` returns; the client's memory is as it is to be after this fit."""
        told = dict(metrics or {})
        if self._tells_a_norm:
            told["a_norm"] = max((reach.a_norm for reach in self._reaches.values()), default=0.0)
        way = {name: _difference(self._shared[name], weights[name]) for name in self._reaches}
        extra: dict[str, Array] = {}
        for method in self._methods:
            extra |= method.end(way, self._reaches)
        return FitResult(parameters=weights, num_examples=num_examples, metrics=told, extra=extra)


class PersonalTraining:
    """Ditto: a model v of the client's own, trained beside the federation's and pulled towards it.

        personal = PersonalTraining(parameters, config, context)
        weights = {name: value.copy() for name, value in personal.start.items()}
        ... personal.correct(gradients, weights) before each step ...
        personal.keep(weights)

    The gradient of f_k(v) + lambda/2 ||v - w_t||^2, with lambda the fit config's "ditto_lambda". Li et al. 2021 (Ditto:
    Fair and Robust Federated Learning Through Personalization), algorithm 1. v stays in the client's memory and begins
    as the first model that the client is given; `personal_parameters` finds it for an evaluation.
    """

    def __init__(self, parameters: Tensors, config: Config, context: ClientContext) -> None:
        self.parameters = parameters
        self.pull = float(config.get("ditto_lambda", 0.0))
        self.start = personal_parameters(parameters, context)
        self._context = context

    def correct(self, gradients: dict[str, Array], weights: Tensors) -> None:
        """Make `gradients` of f_k at `weights` those of the whole objective, in place."""
        for name, gradient in gradients.items():
            gradients[name] = gradient + self.pull * (weights[name] - self.parameters[name])

    def keep(self, weights: Tensors) -> None:
        """Remember v."""
        for name, value in weights.items():
            self._context.memory[_DITTO + name] = np.array(value)


def personal_parameters(parameters: Tensors, context: ClientContext) -> dict[str, Array]:
    """Ditto's v as the client remembers it, and `parameters` where it has none yet."""
    return {name: context.memory.get(_DITTO + name, value) for name, value in parameters.items()}


_DITTO = "ditto/"


class _Reach:
    """How far gradients of 1 would have led so far: K eta for plain SGD; and eta ||a||_1, for a is what counts.

    After tau steps of size eta with momentum rho, [tau - rho (1 - rho^tau) / (1 - rho)] eta / (1 - rho); with a pull of
    mu instead, [1 - (1 - eta mu)^tau] / mu (Wang et al. 2020, section 4). Both come of the recurrence itself, which
    has room for rates that change, too.
    """

    __slots__ = ("_lr", "_velocity", "a_norm")

    def __init__(self) -> None:
        self._lr = 0.0
        self._velocity = 0.0
        self.a_norm = 0.0
        """In steps of the first one's size."""

    @property
    def distance(self) -> float:
        return self.a_norm * self._lr

    def step(self, lr: float, momentum: float, pull: float) -> None:
        self._lr = self._lr or lr
        self._velocity = momentum * self._velocity + 1 - pull * self.distance
        if self._lr:  # a warm-up may begin at 0
            self.a_norm += lr / self._lr * self._velocity


class _Method(Protocol):
    """What one method adds to each gradient, and does at the end."""

    @property
    def pull(self) -> float: ...

    @property
    def drift(self) -> Mapping[str, Array]: ...

    def end(self, way: Tensors, reaches: Mapping[str, _Reach]) -> dict[str, Array]:
        """What goes to the server beside the update; `way` is w_t - w of all tensors that were trained."""


class _FedProx:
    drift: Mapping[str, Array] = {}

    def __init__(self, mu: float) -> None:
        self.pull = mu

    def end(self, way: Tensors, reaches: Mapping[str, _Reach]) -> dict[str, Array]:
        return {}


class _FedDyn:
    def __init__(self, alpha: float, parameters: Tensors, context: ClientContext) -> None:
        self.pull = alpha
        self._memory = context.memory
        self._g = {name: context.memory.get(_FEDDYN + name, zero) for name, zero in _zeros(parameters).items()}
        self.drift = {name: -g for name, g in self._g.items()}

    def end(self, way: Tensors, reaches: Mapping[str, _Reach]) -> dict[str, Array]:
        for name, moved in way.items():
            self._memory[_FEDDYN + name] = (self._g[name] + self.pull * moved).astype(self._g[name].dtype)
        return {}


_FEDDYN = f"{SUMS}feddyn/"


class _Scaffold:
    pull = 0.0

    def __init__(self, parameters: Tensors, shared: Tensors, context: ClientContext) -> None:
        zeros = _zeros(shared)
        self._memory = context.memory
        self._c_i = {name: context.memory.get(_SCAFFOLD + name, zero) for name, zero in zeros.items()}
        self.drift = {name: context.broadcast.get(_C + name, zeros[name]) - c_i for name, c_i in self._c_i.items()}
        self._changes = {_C + name: zero for name, zero in _zeros(parameters).items()}

    def end(self, way: Tensors, reaches: Mapping[str, _Reach]) -> dict[str, Array]:
        changes = self._changes  # nothing, for a tensor that took no step: nothing has been learnt of its gradient
        for name in way.keys() & self._c_i.keys():
            if reaches[name].distance:
                old = self._c_i[name]
                new = np.asarray(way[name] / reaches[name].distance - self.drift[name], old.dtype)
                self._memory[_SCAFFOLD + name] = new
                changes[_C + name] = new - old
        return changes


_SCAFFOLD = f"{SUMS}scaffold/"
_C = "c/"


def _methods(parameters: Tensors, shared: Tensors, config: Config, context: ClientContext) -> list[_Method]:
    methods: list[_Method] = []
    if config.get("proximal_mu"):
        methods.append(_FedProx(float(config["proximal_mu"])))
    if config.get("feddyn_alpha"):
        methods.append(_FedDyn(float(config["feddyn_alpha"]), shared, context))
    if config.get("scaffold"):
        methods.append(_Scaffold(parameters, shared, context))
    return methods


def _zeros(parameters: Tensors) -> dict[str, Array]:
    """A tensor of zeros for each that can have a gradient."""
    dtypes = {name: kept_dtype(value.dtype) for name, value in parameters.items()}
    return {name: np.zeros(parameters[name].shape, dtype) for name, dtype in dtypes.items() if dtype is not None}


def _sum(drifts: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    total: dict[str, Array] = {}
    for drift in drifts:
        for name, value in drift.items():
            total[name] = total[name] + value if name in total else value
    return total


def _difference(one: Array, other: Array) -> Array:
    dtype = kept_dtype(one.dtype)
    return np.asarray(np.asarray(one, dtype) - np.asarray(other, dtype))

"""FedProx's synthetic(1, 1) on multinomial logistic regression, in plain numpy: no download, a few ms a fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from fedbus.app import App
from fedbus.config import RoundConfig
from fedbus.data.sources import Dataset
from fedbus.data.synthetic import NUM_CLASSES, NUM_FEATURES, synthetic
from fedbus.errors import ConfigError
from fedbus.strategies.base import Strategy
from fedbus.training.base import Client, ClientContext
from fedbus.training.local import LocalTraining
from fedbus.types import Array, Config, EvaluateResult, FitResult, Metrics, Tensors

NUM_USERS = 30
TRAIN_FRACTION = 0.9

Matrix = NDArray[np.float64]


class LogisticClient(Client):
    """Trains y = argmax(softmax(x W + b)) with plain SGD on the cross-entropy.

    Reads from the fit config: "local_epochs", "batch_size", "lr"; what the strategy says to `LocalTraining`; "seed",
    "round" and "repeat" for the order of the examples, so that a task done twice gives the same update; "stragglers",
    the share of tasks that come to fewer epochs: to 1, 2, ... or all of them, each as often.
    """

    def __init__(self, context: ClientContext, train: Dataset, test: Dataset) -> None:
        self.context = context
        self.train, self.test = train, test
        self.x, self.labels = with_ones(train.x), np.eye(NUM_CLASSES)[train.y]

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        """Train for some local epochs; the metric is the mean loss that training began from."""
        weights = joined(parameters)
        local = LocalTraining(parameters, config, self.context)
        key = [int(config[key]) for key in ("seed", "round", "repeat")] + [self.context.partition]
        rng = np.random.default_rng(key)
        loss, _ = measure(weights, self.x, self.train.y)
        for _ in local.batches(range(_epochs(config, key))):
            order = rng.permutation(len(self.train))
            descend(weights, self.x[order], self.labels[order], int(config["batch_size"]), float(config["lr"]), local)
        return local.result(parted(weights), len(self.train), {"loss": loss})

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        """Measure loss and accuracy on the tenth of the user's examples that it does not train on."""
        loss, accuracy = measure(joined(parameters), with_ones(self.test.x), self.test.y)
        return EvaluateResult(loss=loss, num_examples=len(self.test), metrics={"accuracy": accuracy})


def _epochs(config: Config, key: Sequence[int]) -> int:
    """How many the task comes to; by random numbers of their own, for the order of the examples is to be the same."""
    rng = np.random.default_rng([*key, _STRAGGLING])
    most = int(config["local_epochs"])
    is_straggler = rng.random() < float(config.get("stragglers", 0.0))
    return int(rng.integers(1, most, endpoint=True)) if is_straggler else most


_STRAGGLING = 1


def descend(
    weights: Matrix, x: Matrix, labels: Matrix, batch_size: int, lr: float, local: LocalTraining | None = None
) -> None:
    """One epoch of SGD on `weights` [61, 10], in place; `x` [n, 61] ends in ones, `labels` [n, 10] are one-hot.

    The arrays are so small that a step costs what its numpy calls cost: the sum over classes is quickest as a product.
    """
    method = None if local is None or local.is_plain else local
    tensors = _views(weights)
    for start in range(0, len(x), batch_size):
        batch = x[start : start + batch_size]
        p = np.dot(batch, weights)
        p -= np.maximum.reduce(p, axis=1, keepdims=True)
        np.exp(p, out=p)
        p /= np.dot(p, _SUM)
        p -= labels[start : start + batch_size]
        p *= lr / len(batch)
        step = np.dot(batch.T, p)
        if method is not None:
            step /= lr
            method.correct(_views(step), tensors, lr)
            step *= lr
        weights -= step


_SUM = np.ones((NUM_CLASSES, NUM_CLASSES))


def measure(weights: Matrix, x: Matrix, y: Array) -> tuple[float, float]:
    """The mean cross-entropy and the accuracy of `weights` [61, 10] on `x` [n, 61], which ends in ones, and `y` [n]."""
    logits = np.concatenate([x[start : start + _AT_ONCE] @ weights for start in range(0, len(x), _AT_ONCE)])
    highest = logits.max(axis=1)
    log_total = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    loss = (log_total - logits[np.arange(len(y)), y]).mean()
    return float(loss), float((logits.argmax(axis=1) == y).mean())


_AT_ONCE = 256
"""For larger products OpenBLAS wakes threads of its own, which then spin for a while in the way of other clients."""


def with_ones(x: Array) -> Matrix:
    """`x` with a last column of ones, by which the bias is a row of the weights."""
    return np.column_stack([x, np.ones(len(x))])


def joined(parameters: Tensors) -> Matrix:
    """W [60, 10] and b [10] as one array [61, 10], a copy."""
    return np.vstack([parameters["W"], parameters["b"]])


def _views(weights: Matrix) -> dict[str, Array]:
    """The tensors of `weights`, which lie in it."""
    return {"W": weights[:-1], "b": weights[-1]}


def parted(weights: Matrix) -> dict[str, Array]:
    """The parameters of `weights`: what `joined` puts together."""
    return {name: value.copy() for name, value in _views(weights).items()}


# ---- the app ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Users:
    """Every user's examples, cut in two."""

    train: list[Dataset]
    test: list[Dataset]


@cache
def _users(alpha: float, beta: float, seed: int) -> _Users:
    everything = synthetic(alpha, beta, num_users=NUM_USERS, seed=seed)
    cuts = [int(TRAIN_FRACTION * len(data)) for data in everything]  # examples come in no order
    return _Users(
        train=[data.take(np.arange(cut)) for data, cut in zip(everything, cuts, strict=True)],
        test=[data.take(np.arange(cut, len(data))) for data, cut in zip(everything, cuts, strict=True)],
    )


def make_app(
    rounds: RoundConfig,
    *,
    strategy: Strategy | None = None,
    seed: int = 0,
    data_seed: int = 0,
    alpha: float = 1.0,
    beta: float = 1.0,
    epochs: int = 5,
    batch_size: int = 10,
    lr: float = 0.01,
    stragglers: float = 0.0,
) -> App:
    """The app for `rounds`; `seed` is that of the cohorts and of the order of the examples.

    A client is the user of its partition's number where there are 30 partitions, and every n-th user where there are
    n, fewer. The central evaluation is over all users' test examples together.
    """

    def client_fn(context: ClientContext) -> Client:
        if context.num_partitions > NUM_USERS:
            raise ConfigError(f"there are {NUM_USERS} users: at most so many clients, not {context.num_partitions}")
        users = _users(alpha, beta, data_seed)
        mine = slice(context.partition, None, context.num_partitions)
        return LogisticClient(context, _together(users.train[mine]), _together(users.test[mine]))

    def evaluate_fn(round: int, model: dict[str, Array]) -> tuple[float, Metrics]:
        x, y = test_examples()
        loss, accuracy = measure(joined(model), x, y)
        return loss, {"accuracy": accuracy}

    @cache
    def test_examples() -> tuple[Matrix, Array]:
        everyone = _together(_users(alpha, beta, data_seed).test)
        return with_ones(everyone.x), everyone.y

    return App(
        client_fn=client_fn,
        strategy=strategy,
        initial_parameters={"W": np.zeros((NUM_FEATURES, NUM_CLASSES)), "b": np.zeros(NUM_CLASSES)},
        evaluate_fn=evaluate_fn,
        rounds=rounds,
        fit_config={"local_epochs": epochs, "batch_size": batch_size, "lr": lr, "stragglers": stragglers},
        seed=seed,
    )


def _together(parts: list[Dataset]) -> Dataset:
    return Dataset(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))


app = make_app(RoundConfig.synchronous(10, num_rounds=150))
"""Ten of thirty users in each round: `fedbus run fedbus.examples.synthetic:app --clients 30`."""

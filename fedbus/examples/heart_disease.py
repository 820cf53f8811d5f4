"""Heart disease in four hospitals, by logistic regression: FLamby's Fed-Heart-Disease in plain numpy.

Ogier du Terrail et al. 2022 (FLamby: Datasets and Benchmarks for Cross-Silo Federated Learning in Realistic Healthcare
Settings), appendix G. FEDBUS_HEART_DISEASE names the folder of the files (`fedbus.data.heart_disease`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedbus.app import App
from fedbus.config import RoundConfig
from fedbus.data.heart_disease import HOSPITALS, NUM_FEATURES, Hospital, Matrix, Scale, data_folder, load_hospital
from fedbus.errors import ConfigError
from fedbus.strategies.base import Strategy
from fedbus.training.base import Client, ClientContext
from fedbus.training.local import LocalTraining
from fedbus.types import Array, Config, EvaluateFn, EvaluateResult, FitResult, Metrics, Tensors

NUM_ROUNDS = 15
NUM_UPDATES = 100
BATCH_SIZE = 4


class HospitalClient(Client):
    """Trains y = sigmoid(w x + b) on one hospital's patients, by SGD on the binary cross-entropy.

    Reads from the fit config: "lr", "num_updates", "batch_size", and what the strategy says to `LocalTraining`; "seed"
    and "round" for the order of the patients, so that a task done twice gives the same update. Batches go on where
    those of the last round ended.
    """

    def __init__(self, context: ClientContext, hospital: Hospital) -> None:
        self.context = context
        self.scale = Scale.of(hospital.train.x)
        self.x, self.y = self.scale.apply(hospital.train.x), hospital.train.y
        self.test = hospital.test

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        """Take some steps; the metric is the mean loss that they began from."""
        lr = float(config["lr"])
        local = LocalTraining(parameters, config, self.context)
        weights: dict[str, Array] = {name: value.astype(np.float64) for name, value in parameters.items()}
        loss, _ = measure(weights, self.x, self.y)
        for batch in local.batches(self._batches(config)):
            gradients = gradients_of(weights, self.x[batch], self.y[batch])
            local.correct(gradients, weights, lr)
            for name, gradient in gradients.items():
                weights[name] -= lr * gradient
        return local.result(weights, len(self.y), {"loss": loss})

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        """Measure loss and accuracy on the hospital's own test patients."""
        loss, accuracy = measure(parameters, self.scale.apply(self.test.x), self.test.y)
        return EvaluateResult(loss=loss, num_examples=len(self.test), metrics={"accuracy": accuracy})

    def _batches(self, config: Config) -> Iterator[Array]:
        """The round's own batches of an endless row of them: all patients in a new order, and again."""
        size, count = int(config["batch_size"]), int(config["num_updates"])
        per_epoch = -(-len(self.y) // size)
        first = (int(config["round"]) - 1) * count
        for number in range(first, first + count):
            epoch, at = divmod(number, per_epoch)
            if at == 0 or number == first:
                rng = np.random.default_rng([int(config["seed"]), self.context.partition, epoch])
                order = rng.permutation(len(self.y))
            yield order[at * size : (at + 1) * size]


def gradients_of(weights: Tensors, x: Matrix, y: Array) -> dict[str, Array]:
    """Of the mean binary cross-entropy, for "weight" [1, 13] and "bias" [1], at `x` [n, 13] and `y` [n]."""
    error = (_probability(weights, x) - y) / len(y)
    return {"weight": (error @ x)[None], "bias": error.sum(keepdims=True)}


def measure(weights: Tensors, x: Matrix, y: Array) -> tuple[float, float]:
    """The mean binary cross-entropy, and the accuracy at a probability of 0.5."""
    logits = _logits(weights, x)
    loss = np.logaddexp(0, logits) - y * logits
    return float(loss.mean()), float(((logits > 0) == (y > 0)).mean())


def _logits(weights: Tensors, x: Matrix) -> Matrix:
    logits: Matrix = x @ weights["weight"][0].astype(np.float64) + float(weights["bias"][0])
    return logits


def _probability(weights: Tensors, x: Matrix) -> Matrix:
    probability: Matrix = 1 / (1 + np.exp(-_logits(weights, x)))
    return probability


def initial_parameters(seed: int) -> dict[str, Array]:
    """One linear layer as PyTorch makes it after `torch.manual_seed(seed)`: "weight" [1, 13], "bias" [1], float32."""
    from fedbus.training.torch import get_parameters  # before torch: it says what to install

    # isort: split
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_parameters(torch.nn.Linear(NUM_FEATURES, 1))


def evaluate_on_all(folder: Path | str | None = None) -> EvaluateFn:
    """The accuracy on the test patients of all hospitals together, who are scaled as all training patients are."""

    @functools.cache
    def pooled() -> tuple[Matrix, Array]:
        hospitals = [load_hospital(name, data_folder(folder)) for name in HOSPITALS]
        scale = Scale.of(np.concatenate([hospital.train.x for hospital in hospitals]))
        x = np.concatenate([hospital.test.x for hospital in hospitals])
        return scale.apply(x), np.concatenate([hospital.test.y for hospital in hospitals])

    def evaluate(round: int, model: dict[str, Array]) -> tuple[float, Metrics]:
        loss, accuracy = measure(model, *pooled())
        return loss, {"accuracy": accuracy}

    return evaluate


def make_app(
    strategy: Strategy | None = None,
    *,
    seed: int = 42,
    lr: float = 0.001,
    data: Path | str | None = None,
    rounds: RoundConfig | None = None,
) -> App:
    """The app with a strategy; `data` is the folder of the files, None what FEDBUS_HEART_DISEASE says."""

    def client_fn(context: ClientContext) -> Client:
        if context.num_partitions != len(HOSPITALS):
            raise ConfigError(f"there are {len(HOSPITALS)} hospitals: as many clients, not {context.num_partitions}")
        return HospitalClient(context, load_hospital(HOSPITALS[context.partition], data_folder(data)))

    return App(
        client_fn=client_fn,
        strategy=strategy,
        initial_parameters=functools.partial(initial_parameters, seed),
        evaluate_fn=evaluate_on_all(data),
        rounds=rounds or RoundConfig.synchronous(len(HOSPITALS), num_rounds=NUM_ROUNDS),
        fit_config={"lr": lr, "num_updates": NUM_UPDATES, "batch_size": BATCH_SIZE},
        seed=seed,
    )


app = make_app()
"""FedAvg: `FEDBUS_HEART_DISEASE=FOLDER fedbus run fedbus.examples.heart_disease:app --clients 4`."""

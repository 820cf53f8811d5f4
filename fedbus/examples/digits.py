"""Handwritten digits on a small CNN: the application of the demo, whose clients do as any strategy says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from fedbus.app import App
from fedbus.config import RoundConfig
from fedbus.data.partitioners import Indices, dirichlet
from fedbus.data.sources import Dataset, digits
from fedbus.training.base import Client, ClientContext
from fedbus.training.torch import LocalTraining, get_parameters, set_parameters  # before torch: it says what to install
from fedbus.types import Array, Config, EvaluateResult, FitResult, Scalar, Tensors

# isort: split
import torch
from torch import nn
from torch.nn import functional as F

ALPHA = 0.5
TEST_FRACTION = 0.2
SPLIT_SEED = 0
LOCAL_EPOCHS = 5
LEARNING_RATE = 0.02
BATCH_SIZE = 16
MOMENTUM = 0.9
LOCAL_TEST_EVERY = 5


def make_model(seed: int = 0) -> nn.Module:
    """Return the CNN for [n, 1, 8, 8] images, its weights a function of `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *_block(1, 16),
            *_block(16, 32),
            nn.MaxPool2d(2),
            *_block(32, 32),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )


class DigitsClient(Client):
    """Trains the CNN on one partition of the digits.

    Reads from the fit config: "local_epochs", "lr", "batch_size", and "seed" and "round" for the order of
    the batches, so that a task done twice gives the same update; `LocalTraining` reads what the strategy says.
    """

    def __init__(self, context: ClientContext, dataset: Dataset) -> None:
        self.context = context
        # The client's own hold-out: accuracy on what it trained on would tell nothing.
        held_out = np.arange(len(dataset)) % LOCAL_TEST_EVERY == 0
        self.x, self.y = _tensors(dataset.take(np.flatnonzero(~held_out)))
        self.test_x, self.test_y = _tensors(dataset.take(np.flatnonzero(held_out)))
        self.model = make_model()

    def get_parameters(self) -> Tensors:
        """Return the tensors of the local model."""
        return get_parameters(self.model)

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        """Train with SGD for some local epochs; the metric is the mean loss of the last one."""
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=float(config.get("lr", LEARNING_RATE)), momentum=MOMENTUM
        )
        local = LocalTraining(self.model, optimizer, parameters, config, self.context)
        losses: list[float] = []
        for batch in local.batches(self._batches(config)):
            optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.x[batch]), self.y[batch], reduction="sum")
            (loss / len(batch)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        per_epoch = -(-len(self.y) // int(config.get("batch_size", BATCH_SIZE)))
        return local.result(len(self.y), {"train_loss": sum(losses[-per_epoch:]) / len(self.y)})

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        """Measure loss and accuracy on the fifth of the client's partition that it does not train on."""
        set_parameters(self.model, parameters)
        loss, accuracy = _evaluate(self.model, self.test_x, self.test_y)
        return EvaluateResult(loss=loss, num_examples=len(self.test_y), metrics={"accuracy": accuracy})

    def _batches(self, config: Config) -> Iterator[torch.Tensor]:
        """The examples' numbers, all of them in each local epoch, in an order that the task alone decides."""
        keys = ("seed", "round", "repeat")
        rng = np.random.default_rng([*(int(config.get(key, 0)) for key in keys), self.context.partition])
        size = int(config.get("batch_size", BATCH_SIZE))
        for _ in range(int(config.get("local_epochs", LOCAL_EPOCHS))):
            order = torch.from_numpy(rng.permutation(len(self.y)))
            yield from (order[start : start + size] for start in range(0, len(order), size))


def client_fn(context: ClientContext) -> Client:
    """Return the client of `context.partition`, one of `context.num_partitions` Dirichlet(0.5) partitions."""
    torch.set_num_threads(1)  # many clients share one machine's cores
    train, _ = _split()
    return DigitsClient(context, train.take(_partitions(context.num_partitions)[context.partition]))


def initial_parameters() -> dict[str, Array]:
    """Return version 0 of the global model."""
    return get_parameters(make_model())


def evaluate_fn(round: int, model: dict[str, Array]) -> tuple[float, dict[str, Scalar]]:
    """Measure the global model on the 20 % of the digits that no client has."""
    network = make_model()
    set_parameters(network, model)
    _, test = _split()
    loss, accuracy = _evaluate(network, *_tensors(test))
    return loss, {"accuracy": accuracy}


def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    # GroupNorm, not batch norm, whose running statistics do not average over unlike clients (Hsieh et al. 2020).
    return (
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.GroupNorm(4, channels_out),
        nn.ReLU(),
    )


def _tensors(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    # Roughly zero mean and unit variance; constants, for the data's own statistics are nobody's to know.
    return torch.from_numpy((dataset.x - 0.3) * 2.5), torch.from_numpy(dataset.y)


@cache
def _split() -> tuple[Dataset, Dataset]:
    return digits().split(TEST_FRACTION, SPLIT_SEED)


@cache
def _partitions(num_partitions: int) -> list[Indices]:
    train, _ = _split()
    return dirichlet(train.y, num_partitions, ALPHA, SPLIT_SEED)


def _evaluate(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    with torch.no_grad():
        logits = model(x)
    accuracy = (logits.argmax(1) == y).double().mean().item()
    return F.cross_entropy(logits, y).item(), accuracy


app = App(
    client_fn=client_fn,
    initial_parameters=initial_parameters,
    evaluate_fn=evaluate_fn,
    rounds=RoundConfig(num_rounds=10, min_fit_clients=3),
)
"""For any number of clients from three up."""

demo_app = replace(
    app,
    rounds=RoundConfig(
        num_rounds=10, min_fit_clients=8, min_available_clients=10, grace_s=0.5, heartbeat_s=0.5, lease_s=2.0
    ),
)
"""What `fedbus demo` runs: ten clients, of which eight make a round; half a second more for the others."""

"""The same updates give the same bits in any order of arrival, for every mean family with every server optimizer."""

from __future__ import annotations

import copy
import functools
import hashlib
import random
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fedbuff import FedBuff
from fedbus.strategies.feddyn import FedDyn
from fedbus.strategies.fednova import FedNova
from fedbus.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from fedbus.strategies.qfedavg import QFedAvg
from fedbus.strategies.scaffold import Scaffold
from fedbus.types import Array, Tensors, kept_dtype

ORDERS = 1000
UPDATES = 20


def by_loss(update: ClientUpdate) -> float:
    return float(update.metrics["loss"]) ** 3


FOLDED_ALIKE: list[list[Strategy]] = [
    [FedAvg(), FedAvgM(0.7), FedAdagrad(), FedAdam(), FedYogi()],
    [FedAvg(weighting="uniform")],
    [FedAvg(weighting=by_loss)],
    [FedBuff(0.3)],
    [FedNova()],
    [QFedAvg(1.5)],
    [Scaffold(), Scaffold(0.5, num_clients=100)],
    [Scaffold(weighting="examples")],
    [FedDyn(0.1), FedDyn(0.01)],
]
"""Strategies whose sums are the same; what they make of them differs."""

DTYPES = (np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.complex64, np.int32, np.bool_)


@functools.cache
def model(*dtypes: Any) -> Tensors:
    rng = np.random.default_rng(0)
    return {np.dtype(dtype).name: rng.normal(0, 0.05, size).astype(dtype) for size, dtype in enumerate(dtypes, 30)}


@functools.cache
def updates(*dtypes: Any) -> list[ClientUpdate]:
    """Of many weights, in time and late, some without some tensors, with values far apart."""
    rng = np.random.default_rng(1)
    return [
        ClientUpdate(
            client_id=f"client-{index}",
            delta={name: delta(value, rng) for name, value in model(*dtypes).items() if rng.random() < 0.7},
            num_examples=int(10 ** rng.uniform(0, 6)),
            staleness=index % 3,
            discount=(index % 3 + 1) ** -0.5,
            metrics={"loss": float(rng.lognormal()), "a_norm": float(rng.integers(1, 200))},
            extra=control_variates(model(*dtypes), index),
        )
        for index in range(UPDATES)
    ]


def control_variates(model: Tensors, index: int) -> Tensors:
    rng = np.random.default_rng([2, index])
    dtypes = {name: kept_dtype(value.dtype) for name, value in model.items()}
    return {f"c/{name}": delta(model[name].astype(dtype), rng) for name, dtype in dtypes.items() if dtype is not None}


def delta(value: Array, rng: np.random.Generator) -> Array:
    if value.dtype.kind == "b":
        return rng.integers(-1, 2, value.shape).astype(np.int8)
    if value.dtype.kind in "iu":
        return rng.integers(-(2**20), 2**20, value.shape)
    scale = 10.0 ** rng.integers(-6, 3, value.shape)
    return (rng.normal(0, scale) * (1 - 2j if value.dtype.kind == "c" else 1)).astype(value.dtype)


def digest(strategy: Strategy, state: Any, model: Tensors) -> str:
    """The SHA-256 of the next model, and of what is kept for the round after it."""
    strategy.memory.clear()
    digest = hashlib.sha256()
    for tensors in (strategy.finish(state, model), strategy.memory):
        for name, value in tensors.items():
            digest.update(name.encode() + value.tobytes())
    return digest.hexdigest()


def digests(strategies: list[Strategy], orders: int, *dtypes: Any) -> dict[str, set[str]]:
    """Those that come of so many orders, for each of the strategies, which fold alike."""
    shuffled, order = list(updates(*dtypes)), random.Random(2)
    found: dict[str, set[str]] = {repr(strategy): set() for strategy in strategies}
    for _ in range(orders):
        order.shuffle(shuffled)
        state = strategies[0].init(model(*dtypes))
        for update in shuffled:
            strategies[0].fold(state, update)
        for strategy in strategies:
            found[repr(strategy)].add(digest(strategy, copy.deepcopy(state), model(*dtypes)))
    return found


@pytest.mark.parametrize("strategies", FOLDED_ALIKE, ids=lambda alike: type(alike[-1]).__name__)
def test_a_thousand_orders_give_one_digest(strategies: list[Strategy]) -> None:
    assert [len(found) for found in digests(strategies, ORDERS, np.float32).values()] == [1] * len(strategies)


@pytest.mark.parametrize("strategies", FOLDED_ALIKE, ids=lambda alike: type(alike[-1]).__name__)
def test_the_order_does_not_show_in_any_dtype(strategies: list[Strategy]) -> None:
    assert [len(found) for found in digests(strategies, 15, *DTYPES).values()] == [1] * len(strategies)


def test_a_running_sum_would_show_the_order() -> None:
    """So that the test above can fail."""

    class Plain(FedAvg):
        def init(self, model: Tensors) -> Any:
            return {name: np.zeros(value.shape) for name, value in model.items()}

        def fold(self, state: Any, update: ClientUpdate) -> None:
            for name in ("float32", "float64"):
                if name in update.delta:
                    state[name] += update.num_examples * update.discount * update.delta[name]

        def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
            return dict(state)

    ((_, found),) = digests([Plain()], 20, np.float32, np.float64).items()
    assert len(found) > 1

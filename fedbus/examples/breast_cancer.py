"""Breast cancer at four hospitals, by XGBoost: bagging in `app`, one hospital after the other in `cyclic_app`."""

from __future__ import annotations

from functools import cache

import numpy as np

from fedbus.after_evaluation import BestModel
from fedbus.app import App
from fedbus.config import RoundConfig
from fedbus.data.partitioners import iid
from fedbus.strategies.xgboost_bagging import XGBBagging
from fedbus.strategies.xgboost_cyclic import XGBCyclic
from fedbus.training.base import ClientContext
from fedbus.training.xgboost import XGBClient, as_booster, evaluate, initial_parameters  # says what to install
from fedbus.types import Array, Scalar

# isort: split
import xgboost as xgb

PARAMS = {
    "objective": "binary:logistic",
    "eval_metric": ["logloss", "auc"],
    "eta": 0.3,
    "max_depth": 3,
    "min_child_weight": 0.2,  # each hospital has a quarter of the rows
    "subsample": 0.8,
    "nthread": 1,  # many clients share one machine's cores
}
NUM_FEATURES = 30
TEST_EVERY = 5
SPLIT_SEED = 0


@cache
def data() -> tuple[Array, Array]:
    """The 569 tumours of the Wisconsin Diagnostic Breast Cancer data, shuffled: features and labels (1 is benign)."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(y))
    return x[order].astype(np.float32), y[order]


@cache
def split() -> tuple[Array, Array]:
    """Rows to train on, and the fifth that no client has."""
    rows = np.arange(len(data()[1]))
    return rows[rows % TEST_EVERY != 0], rows[rows % TEST_EVERY == 0]


def matrix(rows: Array) -> xgb.DMatrix:
    """Those rows as XGBoost wants them."""
    x, y = data()
    return xgb.DMatrix(x[rows], y[rows])


def client_fn(context: ClientContext) -> XGBClient:
    """Return the client of `context.partition`: an equal share of the rows, a fifth of them held out."""
    train, _ = split()
    mine = train[iid(data()[1][train], context.num_partitions, SPLIT_SEED)[context.partition]]
    held_out = np.arange(len(mine)) % TEST_EVERY == 0
    return XGBClient(PARAMS, matrix(mine[~held_out]), matrix(mine[held_out]))


def evaluate_fn(round: int, model: dict[str, Array]) -> tuple[float, dict[str, Scalar]]:
    """Measure the booster on the rows that no client has."""
    booster, test = as_booster(model, PARAMS), matrix(split()[1])
    loss, metrics = evaluate(booster, test)
    accuracy = float(((booster.predict(test) > 0.5) == (test.get_label() > 0.5)).mean())
    return loss, {**metrics, "accuracy": accuracy}


app = App(
    client_fn=client_fn,
    strategy=XGBBagging(),
    initial_parameters=lambda: initial_parameters(PARAMS, NUM_FEATURES),
    evaluate_fn=evaluate_fn,
    after_evaluation=[BestModel("logloss", mode="min")],
    rounds=RoundConfig.synchronous(4, num_rounds=30),
)

cyclic_app = App(
    client_fn=client_fn,
    strategy=XGBCyclic(),
    initial_parameters=lambda: initial_parameters(PARAMS, NUM_FEATURES),
    evaluate_fn=evaluate_fn,
    rounds=RoundConfig.cyclic(4, num_rounds=32),
)

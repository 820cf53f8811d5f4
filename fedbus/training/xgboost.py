"""The client's half of federated XGBoost: a `Client` that boosts on the global model, and boosters as parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedbus.errors import ClientCodeError, ConfigError, UpdateRefused, UsageError, one_line
from fedbus.strategies.xgboost_bagging import BOOSTER, LOCAL_ROUNDS, TREES
from fedbus.strategies.xgboost_trees import read_booster
from fedbus.training.base import Client
from fedbus.types import Array, Config, EvaluateResult, FitResult, Scalar, Tensors

try:
    import xgboost as xgb
except ImportError as exc:
    raise UsageError("XGBoost is not installed: pip install 'fedbus[xgboost]'") from exc

_BASE_SCORE = 0.5
_SCORE = re.compile(r"\tdata-(\S+?):(\S+)")


def initial_parameters(
    params: Mapping[str, Any], num_features: int, feature_names: Sequence[str] | None = None
) -> dict[str, Array]:
    """A booster without trees, for `App.initial_parameters`: it settles the objective, the features and the base score.

    Everybody's trees are put on top of it, so its base score cannot be what XGBoost takes from the labels at hand:
    "base_score" in `params`, else 0.5.

    Raises:
        ConfigError: when XGBoost does not take the parameters.
    """
    names = None if feature_names is None else list(feature_names)
    try:
        nothing = xgb.DMatrix(np.zeros((1, num_features), np.float32), label=[0.0], feature_names=names)
        booster = xgb.train({"base_score": _BASE_SCORE, **params}, nothing, num_boost_round=0)
        return {BOOSTER: _bytes_of(booster)}
    except (xgb.core.XGBoostError, ValueError, TypeError) as exc:
        raise ConfigError(f"XGBoost does not take these parameters: {_reason(exc)}") from exc


def as_booster(parameters: Tensors, params: Mapping[str, Any] | None = None) -> xgb.Booster:
    """The booster that the parameters of a model are; `params`: how it is to be trained or used on.

    Raises:
        ClientCodeError: they are none.
    """
    raw = _raw(parameters)
    try:
        booster = xgb.Booster(dict(params or {}))
        booster.load_model(raw)
    except xgb.core.XGBoostError as exc:
        ours = f"this XGBoost ({xgb.__version__})"
        raise ClientCodeError(f"the model is no booster that {ours} reads: {_reason(exc)}") from exc
    return booster


class XGBClient(Client):
    """Boosts on its own data for `XGBBagging` and `XGBCyclic`, and evaluates there.

    It gives the trees that are new. Which rows and columns are sampled is a function of "seed" and "round" of the fit
    config, unless `params` has a "seed": a task that is done twice gives the same trees. Metrics of fit: "new_trees".

    Args:
        params: XGBoost's own; "base_score" and the objective are those of the model. With "eval_metric", the first one
            is the loss of evaluations, and all are metrics; else it is the objective's own.
        train: what it trains on.
        test: what it evaluates on; None: `train`.
    """

    def __init__(self, params: Mapping[str, Any], train: xgb.DMatrix, test: xgb.DMatrix | None = None) -> None:
        self.params = {name: value for name, value in params.items() if name != "base_score"}
        self.train = train
        self.test = train if test is None else test
        self._base_score = params.get("base_score", _BASE_SCORE)

    def get_parameters(self) -> Tensors:
        """A booster without trees."""
        params = {**self.params, "base_score": self._base_score}
        return initial_parameters(params, self.train.num_col(), self.train.feature_names)

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        """Boost "local_rounds" (of the config) iterations on top of the model."""
        iterations = int(config.get(LOCAL_ROUNDS, 1))
        params = {"seed": _seed(config), **self.params}
        try:
            grown = xgb.train(params, self.train, iterations, xgb_model=_raw(parameters))
            trees = _bytes_of(grown[grown.num_boosted_rounds() - iterations :])
        except xgb.core.XGBoostError as exc:
            raise ClientCodeError(f"XGBoost cannot train: {_reason(exc)}") from exc
        return FitResult(
            parameters={},
            num_examples=self.train.num_row(),
            metrics={"new_trees": _check(trees)},
            extra={TREES: trees},
        )

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        """Measure the model by "eval_metric" of `params`."""
        loss, metrics = evaluate(as_booster(parameters, self.params), self.test)
        return EvaluateResult(loss=loss, num_examples=self.test.num_row(), metrics=metrics)


def evaluate(booster: xgb.Booster, data: xgb.DMatrix) -> tuple[float, dict[str, Scalar]]:
    """The loss, which is the booster's first "eval_metric" (or its objective's own), and all of them by name."""
    try:
        found = {name: float(value) for name, value in _SCORE.findall(booster.eval(data, "data"))}
    except xgb.core.XGBoostError as exc:
        raise ClientCodeError(f"XGBoost cannot evaluate: {_reason(exc)}") from exc
    if not found:
        raise ClientCodeError("this booster has no eval_metric: name one in params")
    loss = next(iter(found.values()))
    return loss, {name: value for name, value in found.items() if math.isfinite(value)}


def _raw(parameters: Tensors) -> bytearray:
    if BOOSTER not in parameters:
        raise ClientCodeError(f"the model is {', '.join(parameters)}, and no booster: use XGBBagging or XGBCyclic")
    return bytearray(parameters[BOOSTER].tobytes())


def _check(trees: Array) -> int:
    """How many trees these are. Raises `ClientCodeError` for those that the server would refuse."""
    try:
        return len(read_booster(trees.tobytes()).trees)
    except UpdateRefused as exc:
        raise ClientCodeError(f"these trees cannot be part of a federated booster: {exc}") from exc


def _seed(config: Config) -> int:
    words = [int(config.get(name, 0)) for name in ("seed", "round", "repeat")]
    return int(np.random.SeedSequence([word % 2**32 for word in words]).generate_state(1)[0] >> 1)


def _bytes_of(booster: xgb.Booster) -> Array:
    return np.frombuffer(bytes(booster.save_raw("json")), np.uint8).copy()


def _reason(exc: BaseException) -> str:
    """XGBoost's errors are a C++ stack trace behind their first lines."""
    return one_line(str(exc).partition("Stack trace")[0], 200)

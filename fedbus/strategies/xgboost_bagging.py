"""Federated XGBoost by bagging: every client grows trees on the same model, and all of them become part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal, TypeAlias

import numpy as np

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError, UpdateRefused
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.xgboost_trees import Booster, BoosterShape, read_booster, with_trees, write_model
from fedbus.types import Array, Config, ExtraSpec, Tensors

BOOSTER: Final = "booster"
"""The model's only tensor: the bytes of a booster, uint8."""
TREES: Final = "trees"
"""What an update is: the bytes of a booster that has the new trees alone."""
LOCAL_ROUNDS: Final = "local_rounds"
"""Under this name the fit config tells clients how many iterations to boost."""

TreeWeighting: TypeAlias = Literal["examples", "uniform", "sum"]


@dataclass(frozen=True, kw_only=True, order=True)
class _Grown:
    client_id: str
    task_id: str
    trees: bytes = field(compare=False)
    weight: float = field(compare=False)
    discount: float = field(compare=False)


class TreeStrategy(Strategy):
    """What bagging and cyclic boosting have in common: updates are trees, and the model grows by them.

    Trees are checked before they count (`read_booster`): no byte of an update that was not reaches XGBoost, on the
    server or on a client. In whatever order updates come, their trees are appended in that of the clients' names.

    Memory: the model, and the bytes of the round's new trees.

    Args:
        local_rounds: iterations that a client boosts in a round; each adds a tree for each output.
        max_bytes: of one update.

    Raises:
        ConfigError: when a setting cannot work.
    """

    may_resize: ClassVar[bool] = True

    def __init__(self, *, local_rounds: int = 1, max_bytes: int = 8 << 20) -> None:
        for name, value in (("local_rounds", local_rounds), ("max_bytes", max_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number, 1 or more, not {value!r}")
        self.local_rounds, self.max_bytes = local_rounds, max_bytes
        self._shape: BoosterShape | None = None
        self._made: Array | None = None  # the model, where it comes from here
        self._start = b""  # the model as it is laid out here, where it is not yet

    def fit_config(self, round: int) -> Config:
        return {LOCAL_ROUNDS: self.local_rounds}

    def extras(self, model: Tensors) -> Mapping[str, ExtraSpec]:
        if model.get(BOOSTER) is not self._made or self._made is None:
            self._read(model)
        return {TREES: ExtraSpec(dtype=np.dtype(np.uint8), max_bytes=self.max_bytes)}

    def _read(self, model: Tensors) -> None:
        """Look at a model that may come from a client, from a user or from the disk."""
        tensor = model.get(BOOSTER)
        if list(model) != [BOOSTER] or tensor is None or tensor.dtype != np.uint8 or tensor.ndim != 1:
            raise ConfigError(
                f"{type(self).__name__} trains a booster: take initial_parameters from fedbus.training.xgboost"
            )
        try:
            booster = read_booster(tensor.tobytes())
        except UpdateRefused as exc:
            raise ConfigError(f"{type(self).__name__} cannot begin with this booster: {exc}") from exc
        self._shape, self._start = booster.shape, write_model(booster)

    def verify(self, update: ClientUpdate) -> None:
        self._booster(update.extra[TREES].tobytes())

    def _booster(self, raw: bytes) -> Booster:
        booster = read_booster(raw, like=self._shape, most_iterations=self.local_rounds)
        if not booster.trees:
            raise UpdateRefused("it has no new trees")
        return booster

    def init(self, model: Tensors) -> list[_Grown]:
        return []

    def weight_of(self, update: ClientUpdate) -> float:
        """What the trees of `update` weigh, before its discount."""
        return 1.0

    def factor(self, weight: float, total: float) -> float:
        """What the leaves of trees of that weight are multiplied with, where those of the round weigh `total`."""
        return 1.0

    def fold(self, state: list[_Grown], update: ClientUpdate) -> None:
        state.append(
            _Grown(
                client_id=update.client_id,
                task_id=update.task_id,
                trees=update.extra[TREES].tobytes(),
                weight=self.weight_of(update),
                discount=update.discount,
            )
        )

    def finish(self, state: list[_Grown], model: Tensors) -> dict[str, Array]:
        assert self._shape is not None
        in_order = sorted(state)
        total = sum(grown.weight for grown in in_order)
        grown = ((self._booster(each.trees), each.discount * self.factor(each.weight, total)) for each in in_order)
        text = with_trees(self._start or model[BOOSTER].tobytes(), self._shape, grown)
        self._start, self._made = b"", np.frombuffer(text, np.uint8).copy()
        return {BOOSTER: self._made}


class XGBBagging(TreeStrategy):
    """F <- F + sum_k(p_k f_k), with f_k the trees that client k boosted on top of F with its own data.

    Tree-based bagging as NVIDIA FLARE has it (https://nvflare.readthedocs.io, "Tree-based XGBoost"), a random forest of
    clients in each round of boosting (Friedman 2001, Greedy Function Approximation; Chen and Guestrin 2016, XGBoost).
    Every client fits the whole gradient of F as it sees it, so that N of them added up would go N times as far as the
    learning rate says. FLARE's clients divide theirs by N ("uniform") or multiply it with their share of the examples
    ("scaled"); here the server does so with the leaves, by those that did answer: p_k = n_k / sum(n). That is FedAvg's
    mean, of functions. "sum" (p_k = 1) is what Flower's FedXgbBagging does; take a learning rate for N trees with it.

    The leaves of a late update, which were grown on an older F, are multiplied with its staleness discount, too. With
    one client the model is that of plain XGBoost, to the last bit.

    A round adds N * local_rounds iterations to the booster, and only those travel to the server; the model that clients
    fetch is the whole booster.

    Args:
        weighting: p_k, by "examples", "uniform" (1 / N) or "sum" (1).
        local_rounds, max_bytes: as in `TreeStrategy`.

    Raises:
        ConfigError: when a setting cannot work.
    """

    def __init__(
        self, *, weighting: TreeWeighting = "examples", local_rounds: int = 1, max_bytes: int = 8 << 20
    ) -> None:
        super().__init__(local_rounds=local_rounds, max_bytes=max_bytes)
        if weighting not in ("examples", "uniform", "sum"):
            raise ConfigError(f"weighting must be 'examples', 'uniform' or 'sum', not {weighting!r}")
        self.weighting = weighting

    def __repr__(self) -> str:
        return f"XGBBagging(weighting={self.weighting!r}, local_rounds={self.local_rounds})"

    def check(self, rounds: RoundConfig) -> None:
        if rounds.mixing is not None:
            raise ConfigError("XGBBagging does not mix models: use RoundConfig.buffered(k) for asynchronous rounds")

    def weight_of(self, update: ClientUpdate) -> float:
        return float(update.num_examples) if self.weighting == "examples" else 1.0

    def factor(self, weight: float, total: float) -> float:
        return 1.0 if self.weighting == "sum" else weight / total

"""A bound on the length of updates, before whatever strategy."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate, RoundInfo, Strategy
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.norms import squared_norm
from fedbus.strategies.settings import positive
from fedbus.types import Array, Config, ExtraSpec, Piece, Tensors


class NormBound(Strategy):
    """Each d_i becomes d_i min(1, M / ||d_i||) before `strategy` sees it.

    Sun et al. 2019 (Can You Really Backdoor Federated Learning?), norm thresholding of updates. Nobody moves the model
    by more than M times its share; more it does not promise.

    The length is over all floating and complex tensors that the update holds, and these are scaled. A late update's
    discount comes after it.

    Args:
        max_norm: M.
        strategy: what makes a model of the updates; None: `FedAvg`.

    Raises:
        ConfigError: when `max_norm` is not a positive number, or `strategy` no strategy.
    """

    def __init__(self, max_norm: float, strategy: Strategy | None = None) -> None:
        if not (strategy is None or isinstance(strategy, Strategy)):
            raise ConfigError(f"strategy must be a fedbus strategy such as FedAvg(), not {strategy!r}")
        if strategy is not None and type(strategy).extras is not Strategy.extras:
            raise ConfigError(
                f"NormBound bounds updates, and clients of {type(strategy).__name__} send more: give it another"
            )
        self.max_norm = positive("max_norm", max_norm)
        self.strategy = FedAvg() if strategy is None else strategy
        inner = self.strategy
        self.needs_base = inner.needs_base  # type: ignore[misc]  # what the class says is only what is usual
        self.needs_client_memory = inner.needs_client_memory  # type: ignore[misc]
        self.needs_exact_updates = inner.needs_exact_updates  # type: ignore[misc]
        self.may_resize = inner.may_resize  # type: ignore[misc]
        self.asks = inner.asks  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"NormBound(max_norm={self.max_norm}, strategy={self.strategy!r})"

    def __copy__(self) -> NormBound:
        """Two servers' strategies must not remember in one place."""
        return NormBound(self.max_norm, copy.copy(self.strategy))

    @property
    def is_quick(self) -> bool:
        return self.strategy.is_quick

    def check(self, rounds: RoundConfig) -> None:
        self.strategy.check(rounds)

    def fit_config(self, round: int) -> Config:
        return self.strategy.fit_config(round)

    def broadcast(self, model: Tensors) -> Tensors:
        return self.strategy.broadcast(model)

    def extras(self, model: Tensors) -> Mapping[str, ExtraSpec]:
        return self.strategy.extras(model)

    def verify(self, update: ClientUpdate) -> None:
        self.strategy.verify(update)

    def init(self, model: Tensors) -> Any:
        return self.strategy.init(model)

    def fold(self, state: Any, update: ClientUpdate) -> None:
        norm = math.sqrt(squared_norm(update))
        if norm > self.max_norm:
            update = dataclasses.replace(update, delta=_Scaled(update.delta, self.max_norm / norm))
        self.strategy.fold(state, update)

    def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
        return self.strategy.finish(state, model)

    @property
    def memory(self) -> dict[str, Array]:
        return self.strategy.memory

    def attach(
        self,
        *,
        memory: Mapping[str, Array] | None = None,
        round: RoundInfo | None = None,
        folder: Path | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        super().attach(round=round, folder=folder, tell=tell)
        self.strategy.attach(memory=memory, round=round, folder=folder, tell=tell)


class _Scaled(Mapping[str, Array]):
    """A delta whose floating and complex tensors are multiplied as they are read."""

    def __init__(self, delta: Tensors, factor: float) -> None:
        self._delta = delta
        self._factor = factor

    def __len__(self) -> int:
        return len(self._delta)

    def __iter__(self) -> Iterator[str]:
        return iter(self._delta)

    def __getitem__(self, name: str) -> Array:
        return self._times(self._delta[name])

    def pieces(self) -> Iterator[Piece]:
        whole = ClientUpdate(client_id="", delta=self._delta, num_examples=1)
        return ((name, start, self._times(values)) for name, start, values in whole.pieces())

    def peek(self) -> Iterator[Piece]:
        whole = ClientUpdate(client_id="", delta=self._delta, num_examples=1)
        return ((name, start, self._times(values)) for name, start, values in whole.peek())

    def _times(self, values: Array) -> Array:
        if values.dtype.kind in "iub":
            return values
        if values.dtype.itemsize == 2:  # 16 bits may not hold the factor
            return np.asarray((values.astype(np.float32) * np.float32(self._factor)).astype(values.dtype))
        return np.asarray(values * values.dtype.type(self._factor))

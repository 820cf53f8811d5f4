"""What an `App` does with each evaluation: end the run in time, keep the best model, or whatever a user adds."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from fedbus.errors import ConfigError

_LOGGER = logging.getLogger("fedbus.server")

Where: TypeAlias = Literal["central", "federated"]
Mode: TypeAlias = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """A model and what it is worth: `version` is what `round` led to (0 and 0: the initial one), `where` who says so.

    `loss` and what is in `metrics` may be nan; a metric that was no number when it was recorded may be None.
    """

    round: int
    version: int
    where: Where
    loss: float
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Stop:
    """End the run: it has done its work. `reason` is one line for logs, clients and history.json."""

    reason: str


@dataclass(frozen=True)
class Keep:
    """Keep the model that was evaluated as NAME.safetensors in the run folder, in place of the one kept before.

    history.json notes it under "best" with `metric` and `value`, which say why.
    """

    name: str
    metric: str
    value: float


class AfterEvaluation(ABC):
    """Sees the evaluations of a run, one after the other in the order in which they were recorded.

    Each run works on a copy of its own, made with `copy.copy`, that is told to `begin`. After a resume the copy sees
    all that is recorded once more, so that it knows what the last one knew: what it says must depend on what it has
    seen and on nothing else.
    """

    where: Where | None = None
    """Whose evaluations it sees; None: the central ones if the App has an `evaluate_fn`, else the federated ones."""

    def begin(self) -> None:  # noqa: B027  # most user's own have nothing to forget
        """Forget what was seen."""

    @abstractmethod
    def see(self, model: EvaluatedModel) -> Stop | Keep | None:
        """Say what is to be done about it. Off the event loop, one call at a time.

        What it raises is one line in the log, and the run goes on.
        """

    def check(self, *, has_central: bool, has_federated: bool) -> None:
        """Raise `ConfigError` where it would never see anything."""
        name = type(self).__name__
        if self.where not in (None, "central", "federated"):
            raise ConfigError(f"{name}: where must be 'central' or 'federated', not {self.where!r}")
        if self.where == "central" and not has_central:
            raise ConfigError(f"{name} waits for central evaluations: give the App an evaluate_fn")
        if self.where == "federated" and not has_federated:
            raise ConfigError(f"{name} waits for federated evaluations: set RoundConfig.fraction_evaluate above 0")
        if not (has_central or has_federated):
            raise ConfigError(
                f"{name} waits for evaluations, and there are none: give the App an evaluate_fn, or set "
                "RoundConfig.fraction_evaluate above 0"
            )


class EarlyStopping(AfterEvaluation):
    """Ends the run, as finished, once `metric` has not become better for `patience` evaluations.

    Rounds do not wait for central evaluations, so a few more than the evaluated ones may be committed by then;
    `BestModel` keeps the one that was best. Evaluations that come after the end still count for that.

    Args:
        metric: "loss", or the name of a metric.
        patience: so many evaluations in a row that are no better than the best before them end the run.
        mode: whether "max" or "min" is better; None: "min" for the loss, else "max".
        min_delta: what is better by no more than this is no better. A value that is no finite number never is.
        where: see `AfterEvaluation`.

    Raises:
        ConfigError: when a setting cannot work.
    """

    def __init__(
        self,
        metric: str,
        *,
        patience: int = 3,
        mode: Mode | None = None,
        min_delta: float = 0.0,
        where: Where | None = None,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ConfigError(f"patience must be a whole number of evaluations, 1 or more, not {patience!r}")
        if isinstance(min_delta, bool) or not isinstance(min_delta, int | float) or not 0 <= min_delta < math.inf:
            raise ConfigError(f"min_delta must be a number, 0 or more, not {min_delta!r}")
        self.metric, self.mode, self.patience, self.min_delta = metric, _mode(metric, mode), patience, min_delta
        self.where = where
        self.begin()

    def __repr__(self) -> str:
        return f"EarlyStopping({self.metric!r}, patience={self.patience}, mode={self.mode!r})"

    def begin(self) -> None:
        self._best = _Best(self.metric, self.mode, self.min_delta)
        self._waited = 0

    def see(self, model: EvaluatedModel) -> Stop | None:
        value = self._best.value_of(model)
        if value is None:
            return None
        self._waited = 0 if self._best.takes(value) else self._waited + 1
        if self._waited < self.patience:
            return None
        verb = "risen" if self.mode == "max" else "fallen"
        return Stop(f"{self.metric} has not {verb} for {self.patience} evaluation{'s' * (self.patience != 1)}")


class BestModel(AfterEvaluation):
    """Keeps the model that scored best as NAME.safetensors in the run folder, and notes it in history.json.

    Of equals the first one. Without a run folder history alone tells which version it was.

    Args:
        metric, mode, where: as in `EarlyStopping`.
        name: of the file, so that several can be kept.

    Raises:
        ConfigError: when a setting cannot work.
    """

    _TAKEN: ClassVar = ("model", "history", "ledger")

    def __init__(
        self, metric: str, *, mode: Mode | None = None, where: Where | None = None, name: str = "best"
    ) -> None:
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum() or name in self._TAKEN:
            raise ConfigError(f"name must be letters, digits, - and _, and none of {', '.join(self._TAKEN)}: {name!r}")
        self.metric, self.mode, self.name = metric, _mode(metric, mode), name
        self.where = where
        self.begin()

    def __repr__(self) -> str:
        return f"BestModel({self.metric!r}, mode={self.mode!r})"

    def begin(self) -> None:
        self._best = _Best(self.metric, self.mode, 0.0)

    def see(self, model: EvaluatedModel) -> Keep | None:
        value = self._best.value_of(model)
        is_better = value is not None and self._best.takes(value)
        return Keep(self.name, self.metric, self._best.value) if is_better else None


class _Best:
    """The best value of a metric so far."""

    def __init__(self, metric: str, mode: Mode, min_delta: float) -> None:
        self._metric, self._sign, self._min_delta = metric, 1 if mode == "max" else -1, min_delta
        self.value = -self._sign * math.inf
        self._has_warned = False

    def value_of(self, model: EvaluatedModel) -> float | None:
        """The metric, nan for what is no number; None where it did not come, which is told once."""
        values = {"loss": model.loss, **model.metrics}
        if self._metric not in values:
            if not self._has_warned:
                self._has_warned = True
                have = ", ".join(sorted(values))
                _LOGGER.warning(
                    "the %s evaluation of round %d has no metric %r, only %s",
                    *(model.where, model.round, self._metric, have),
                )
            return None
        value = values[self._metric]
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan

    def takes(self, value: float) -> bool:
        """Whether it is better; then it is the best from now on."""
        is_better = self._sign * (value - self.value) > self._min_delta
        if is_better:
            self.value = value
        return is_better


def _mode(metric: object, mode: object) -> Mode:
    if not isinstance(metric, str) or not metric:
        raise ConfigError(f"metric must be the name of one ('loss', 'accuracy', ...), not {metric!r}")
    if mode is None:
        return "min" if metric == "loss" else "max"
    if mode == "max":
        return "max"
    if mode == "min":
        return "min"
    raise ConfigError(f"mode must be 'max' or 'min', not {mode!r}")

"""What an update counts in a mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Final, Literal, TypeAlias

from fedbus.errors import ClientCodeError, ConfigError, UpdateRefused
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.optimizers import ServerOptimizer
from fedbus.strategies.step import StepStrategy

Weighting: TypeAlias = Literal["examples", "uniform"] | Callable[[ClientUpdate], float]
"""By `num_examples`, each alike, or what a function says: it sees all but the tensors, which are to be read once."""

MAX_WEIGHT: Final = 2.0**64
"""Sums of weights stay finite, whatever a function says."""


class WeightedStrategy(StepStrategy):
    """A strategy whose updates weigh: by their examples, alike, or as a function says."""

    usual_weighting: ClassVar[Literal["examples", "uniform"]] = "examples"

    def __init__(self, *, weighting: Weighting | None = None, optimizer: ServerOptimizer | None = None) -> None:
        super().__init__(optimizer=optimizer)
        self.weighting: Weighting = self.usual_weighting if weighting is None else weighting
        if not (self.weighting in ("examples", "uniform") or callable(self.weighting)):
            raise ConfigError(f"weighting must be 'examples', 'uniform' or a function of an update, not {weighting!r}")

    def _settings(self) -> list[str]:
        weighting = self.weighting if isinstance(self.weighting, str) else _name_of(self.weighting)
        settings = [] if weighting == self.usual_weighting else [f"weighting={weighting}"]
        return [*settings, *super()._settings()]

    def verify(self, update: ClientUpdate) -> None:
        """Refuse what a function cannot weigh: nan as one client's metric must not end the run."""
        if callable(self.weighting):
            try:
                self.weight_of(update)
            except ClientCodeError as exc:
                raise UpdateRefused(str(exc)) from exc
            except Exception as exc:  # the user's own code
                raise UpdateRefused(f"weighting raised {type(exc).__name__}: {exc}") from exc

    def weight_of(self, update: ClientUpdate) -> float:
        """What `update` weighs, before its discount. Raises `ClientCodeError` for what cannot be a weight."""
        if self.weighting == "examples":
            return update.num_examples
        if self.weighting == "uniform":
            return 1
        weight = self.weighting(update)
        try:
            number = float(weight)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number <= MAX_WEIGHT:  # not so with NaN
            raise ClientCodeError(
                f"weighting gave {weight!r} for client {update.client_id}: return a number from 0 to 2**64"
            )
        return number


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)

"""The strategy contract: `init`, then `fold` for each update as it comes, then `finish`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from fedbus.types import Array, Metrics, Tensors


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """One client's update, verified.

    `delta` holds trained minus base for all or some of the model's tensors: the model's shape, `delta_dtype` of its
    dtype, all values finite. `num_examples` is 1 or more. `discount`, in (0, 1], is what an update that is
    `staleness` versions late still counts.
    """

    client_id: str
    delta: Tensors
    num_examples: int
    staleness: int = 0
    discount: float = 1.0
    metrics: Metrics = field(default_factory=dict)


class Strategy(ABC):
    """How a round's updates become the next model.

    The state between the calls is the strategy's own affair: whatever `init` returns is handed to `fold` and
    `finish` of the same round, one call at a time, off the event loop.
    """

    @abstractmethod
    def init(self, model: Tensors) -> Any:
        """Begin a round on `model`, which must not be written to."""

    @abstractmethod
    def fold(self, state: Any, update: ClientUpdate) -> None:
        """Take one update into `state`; its arrays are gone after the call."""

    @abstractmethod
    def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
        """The next model: the names, order, shapes and dtypes of `model`, in new arrays."""

"""The strategy contract: `init`, then `fold` for each update as it comes, then `finish`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from fedbus.config import RoundConfig
from fedbus.types import Array, Metrics, Piece, Tensors


@runtime_checkable
class InPieces(Protocol):
    """A delta that comes in pieces, so that its memory can go as it is folded."""

    def pieces(self) -> Iterator[Piece]:
        """Each element once, those of one tensor in order; a tensor without elements as one piece without any."""


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """One client's update, verified.

    `delta` holds trained minus base for all or some of the model's tensors: the model's shape, `delta_dtype` of its
    dtype, all values finite. `num_examples` is 1 or more. `discount`, in (0, 1], is what an update that is
    `staleness` versions late still counts. `base`: the model that the client
    began from, where the strategy `needs_base`.
    """

    client_id: str
    delta: Tensors
    num_examples: int
    staleness: int = 0
    discount: float = 1.0
    metrics: Metrics = field(default_factory=dict)
    base: Tensors | None = None

    def pieces(self) -> Iterator[Piece]:
        """The delta piece by piece, as it hands itself out, or else one piece for each tensor; to be walked once."""
        if isinstance(self.delta, InPieces):
            return self.delta.pieces()
        return ((name, 0, value.reshape(-1)) for name, value in self.delta.items())


class Strategy(ABC):
    """How a round's updates become the next model.

    The state between the calls is the strategy's own affair: whatever `init` returns is handed to `fold` and
    `finish` of the same round, one call at a time, off the event loop.
    """

    needs_base: ClassVar[bool] = False
    """Whether `ClientUpdate.base` is wanted: the server then keeps `max_staleness` versions more."""

    def check(self, rounds: RoundConfig) -> None:  # noqa: B027  # most have nothing against any
        """Raise `ConfigError`, saying what to do, when it makes no sense with such rounds."""

    @abstractmethod
    def init(self, model: Tensors) -> Any:
        """Begin a round on `model`, which must not be written to."""

    @abstractmethod
    def fold(self, state: Any, update: ClientUpdate) -> None:
        """Take one update into `state`; its arrays are gone after the call."""

    @abstractmethod
    def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
        """The next model: the names, order, shapes and dtypes of `model`, in new arrays."""

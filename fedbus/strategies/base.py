"""The strategy contract: `init`, then `fold` for each update as it comes, then `finish`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from fedbus.config import RoundConfig
from fedbus.types import Array, Config, ExtraSpec, Metrics, Piece, Tensors


@runtime_checkable
class InPieces(Protocol):
    """Tensors that come in pieces, so that their memory can go as they are folded."""

    def pieces(self) -> Iterator[Piece]:
        """Each element once, those of one tensor in order; a tensor without elements as one piece without any.

        What is behind us is gone.
        """

    def peek(self) -> Iterator[Piece]:
        """The same, and nothing goes."""


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """One client's update, verified.

    `delta` holds trained minus base for all or some of the model's tensors: the model's shape, `delta_dtype` of its
    dtype, all values finite. `num_examples` is 1 or more. `discount`, in (0, 1], is what an update that is
    `staleness` versions late still counts. `base`: the model that the client
    began from, where the strategy `needs_base`. `extra`: what the strategy asked for beside the delta.
    """

    client_id: str
    delta: Tensors
    num_examples: int
    task_id: str = ""
    staleness: int = 0
    discount: float = 1.0
    metrics: Metrics = field(default_factory=dict)
    base: Tensors | None = None
    extra: Tensors = field(default_factory=dict)

    def pieces(self) -> Iterator[Piece]:
        """The delta piece by piece, as it hands itself out, or else one piece for each tensor; to be walked once."""
        return self.delta.pieces() if isinstance(self.delta, InPieces) else _whole(self.delta)

    def peek(self) -> Iterator[Piece]:
        """The same, as often as you like before `pieces`: for what must be known before it can be folded."""
        return self.delta.peek() if isinstance(self.delta, InPieces) else _whole(self.delta)

    def extra_pieces(self) -> Iterator[Piece]:
        """`extra` piece by piece; to be walked once, after `pieces`."""
        return self.extra.pieces() if isinstance(self.extra, InPieces) else _whole(self.extra)


def _whole(tensors: Tensors) -> Iterator[Piece]:
    return ((name, 0, value.reshape(-1)) for name, value in tensors.items())


@dataclass(frozen=True, kw_only=True)
class RoundInfo:
    """The open round: its number (1, 2, ...), the model version that it began from, and the members just now."""

    number: int = 1
    version: int = 0
    num_clients: int = 1


class Strategy(ABC):
    """How a round's updates become the next model.

    The state between the calls is the strategy's own affair: whatever `init` returns is handed to `fold` and
    `finish` of the same round, one call at a time, off the event loop. What shall outlast the round belongs in
    `memory`.
    """

    needs_base: ClassVar[bool] = False
    """Whether `ClientUpdate.base` is wanted: the server then keeps `max_staleness` versions more."""

    needs_client_memory: ClassVar[bool] = False
    """Whether clients must remember something from one task to the next, as stateless virtual clients do not."""

    needs_exact_updates: ClassVar[bool] = False
    """Whether what arrives must be what the client sent, to the last bit: no codec may round it."""

    may_resize: ClassVar[bool] = False
    """Whether `finish` may give tensors another shape; their names, order and dtypes stay."""

    asks: ClassVar[Literal["fit", "query"]] = "fit"
    """Which of a client's methods answers."""

    def check(self, rounds: RoundConfig) -> None:  # noqa: B027  # most have nothing against any
        """Raise `ConfigError`, saying what to do, when it makes no sense with such rounds."""

    @property
    def is_quick(self) -> bool:
        """Whether each call takes milliseconds for a model of a few MiB: then no thread is made for it."""
        return False

    # ---- what it says to the clients -----------------------------------------------------------------------------

    def fit_config(self, round: int) -> Config:
        """Settings of the clients' half of the method; they go with each fit task, the user's own before them."""
        return {}

    def broadcast(self, model: Tensors) -> Tensors:
        """Tensors that travel with each version of the model, for `ClientContext.broadcast`; of any names."""
        return {}

    def extras(self, model: Tensors) -> Mapping[str, ExtraSpec]:
        """What each update must hold beside its delta (`FitResult.extra`)."""
        return {}

    def verify(self, update: ClientUpdate) -> None:  # noqa: B027  # most take whatever fits the model
        """Raise `UpdateRefused` for an update that must not count, before anybody counts on it.

        What is late about it is not known yet. `pieces` must not be walked here; `peek` may be.
        """

    # ---- a round -------------------------------------------------------------------------------------------------

    @abstractmethod
    def init(self, model: Tensors) -> Any:
        """Begin a round on `model`, which must not be written to."""

    @abstractmethod
    def fold(self, state: Any, update: ClientUpdate) -> None:
        """Take one update into `state`; its arrays are gone after the call."""

    @abstractmethod
    def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
        """The next model: the names, order, shapes and dtypes of `model`, in new arrays.

        Raises `AggregateRefused` when none can be made of what came: then the model stays.
        """

    # ---- what the server gives it --------------------------------------------------------------------------------

    @property
    def memory(self) -> dict[str, Array]:
        """Tensors that it keeps from round to round: in each checkpoint, and there again after a resume; empty when a
        run begins.

        `finish` assigns new arrays to its entries and never writes into old ones, which come back when the aggregate
        is discarded.
        """
        memory: dict[str, Array] = self.__dict__.setdefault("_memory", {})
        return memory

    @property
    def round(self) -> RoundInfo:
        """The open round."""
        info: RoundInfo = self.__dict__.get("_round", RoundInfo())
        return info

    @property
    def folder(self) -> Path | None:
        """Where it may put files while a round is open; None for a place of its own."""
        folder: Path | None = self.__dict__.get("_folder")
        return folder

    def report(self, done: int, total: int) -> None:
        """Tell how far a `finish` that takes long has come; from any thread."""
        tell: Callable[[int, int], None] | None = self.__dict__.get("_tell")
        if tell is not None:
            tell(done, total)

    def attach(
        self,
        *,
        memory: Mapping[str, Array] | None = None,
        round: RoundInfo | None = None,
        folder: Path | None = None,
        tell: Callable[[int, int], None] | None = None,
    ) -> None:
        """Set what the server gives it; what is None stays as it is."""
        given = {"_round": round, "_folder": folder, "_tell": tell}
        self.__dict__.update({name: value for name, value in given.items() if value is not None})
        if memory is not None:
            self.__dict__["_memory"] = dict(memory)

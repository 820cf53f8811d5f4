"""For strategies of one function: all updates of a round in, the step out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedbus.errors import ClientCodeError
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.exact import blocks
from fedbus.strategies.spool import Spool
from fedbus.strategies.spooled import SpooledStrategy
from fedbus.strategies.step import Step
from fedbus.types import Tensors

_RUN = 1 << 16


class WholeRound(SpooledStrategy):
    """A strategy that needs all updates of a round at a time: write `aggregate`, and no more.

        class Middle(fb.WholeRound):
            def aggregate(self, updates):
                held = self.holders(updates)
                return {name: np.median([u.delta[name] for u in held[name]], axis=0) for name in held}

    Memory is what `aggregate` takes: updates lie in a file, and a tensor is read whenever it is asked for, into an
    array of its own. Go tensor by tensor, as above, and it is one tensor of all updates; for less, walk
    `update.pieces()`, which may be done again and again.
    """

    reads = 0

    @abstractmethod
    def aggregate(self, updates: Sequence[ClientUpdate]) -> Tensors:
        """The step: by how much the model is to move, for all or some of its tensors.

        `updates` are in the order of (client_id, task_id), the same however they came. Nothing has been done about
        those that are late: `update.discount` is what they should count. Their deltas can be read until this returns.
        """

    @staticmethod
    def holders(updates: Sequence[ClientUpdate]) -> dict[str, list[ClientUpdate]]:
        """The updates that hold each tensor: a client may send some of them only, and be the first of all."""
        held: dict[str, list[ClientUpdate]] = {}
        for update in updates:
            for name in update.delta:
                held.setdefault(name, []).append(update)
        return held

    def reduced(self, spool: Spool, model: Tensors) -> Iterator[Step]:
        step: object = self.aggregate(spool.updates())
        if not isinstance(step, Mapping):
            name, kind = type(self).__name__, type(step).__name__
            raise ClientCodeError(f"{name}.aggregate must return {{tensor name: array}}, the step, not {kind}")
        _check(type(self).__name__, step, model)
        for name, value in model.items():
            if name in step:
                wide = np.dtype(np.complex128 if value.dtype.kind == "c" else np.float64)
                flat = np.asarray(step[name]).reshape(-1)
                for at in blocks(flat.size, _RUN) if flat.size else [slice(0, 0)]:
                    yield name, at, flat[at].astype(wide)


def _check(strategy: str, step: Tensors, model: Tensors) -> None:
    for name in step:
        if name not in model:
            raise ClientCodeError(f"{strategy}.aggregate returned {name!r}: the model has no such tensor")
        found, wanted = np.shape(step[name]), model[name].shape
        if found != wanted:
            raise ClientCodeError(f"{strategy}.aggregate returned {name!r} of shape {found}, the model has {wanted}")

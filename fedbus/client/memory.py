"""What a client remembers from one fit to the next: it counts once the server's receipt for that fit has come.

A fit whose update is refused must leave no trace: the server's half of the method (a control variate, a sum of what
was not sent) knows nothing of it. Training does not wait for receipts, so each fit begins with what the last one left;
should that be refused afterwards, its share is taken out of the sums ("sum/...") that later fits have left. Other
tensors stay as they left them.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from fedbus.errors import ConfigError
from fedbus.tensorfile import map_model, save_model
from fedbus.types import SUMS, Array, Tensors

_SETTLED: Final = "settled.safetensors"
_SUFFIX: Final = ".open.safetensors"


class ClientMemory:
    """The tensors of one client, in one run.

    Args:
        folder: where they lie, so that they outlive the process; None keeps them in memory alone.

    Raises:
        ConfigError: when the folder cannot be used, or holds something else.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._run_id = ""
        self._settled: Tensors = {}
        self._open: OrderedDict[str, tuple[int, Tensors]] = OrderedDict()  # task_id -> (number, what it left)
        self._begun: tuple[tuple[str, ...], Tensors] = (), {}  # what `before` was asked last, and what it said
        self._number = 0
        self._newest_round = 0
        if folder is not None:
            with _using(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._load(folder)

    @property
    def is_on_disk(self) -> bool:
        return self._folder is not None

    def __repr__(self) -> str:
        return f"<ClientMemory run={self._run_id!r} settled={len(self._settled)} open={list(self._open)}>"

    def begin_run(self, run_id: str) -> None:
        """Forget what belongs to another run."""
        if run_id == self._run_id:
            return
        for task_id in list(self._open):
            self._forget(task_id)
        self._run_id, self._settled, self._newest_round = run_id, {}, 0
        if self._folder is not None:
            with _using(self._folder):
                (self._folder / _SETTLED).unlink(missing_ok=True)

    def newest_round(self, run_id: str) -> int:
        """The last round of that run whose fit left something: older tasks are of no use; 0 when there is none."""
        return self._newest_round if run_id == self._run_id else 0

    def before(self, *unanswered: str) -> dict[str, Array]:
        """What a fit begins with: what the last one left, but for attempts at tasks whose answer never went out, by
        their ids; that of the fit itself is the first of them."""
        newest = self._newest(but=unanswered)
        if unanswered:
            self._begun = unanswered, newest
        return dict(newest)

    def _newest(self, *, but: Collection[str]) -> Tensors:
        others = [tensors for task_id, (_, tensors) in list(self._open.items()) if task_id not in but]
        return others[-1] if others else self._settled

    def keep(self, task_id: str, tensors: Tensors, *, round: int = 0) -> None:
        """Note what the fit for `task_id`, of `round`, left, until it is settled.

        On disk, durably: not on the event loop then. Nothing stays of one that is discarded while it is written, or
        cannot be written.
        """
        self._forget(task_id)
        unanswered, base = self._begun
        has_begun = unanswered[:1] == (task_id,)
        newest = self._newest(but=unanswered if has_begun else (task_id,))
        if not tensors and not newest:
            return
        if has_begun:
            tensors = _rebased(tensors, base, newest)
        self._number += 1
        number = self._number
        self._open[task_id] = number, dict(tensors)
        self._newest_round = max(self._newest_round, round)
        if self._folder is None:
            return
        file = self._folder / f"{number}{_SUFFIX}"
        with _using(self._folder):
            try:
                save_model(file, tensors, {"run_id": self._run_id, "task_id": task_id, "round": str(round)})
            except BaseException:
                self._forget(task_id)
                raise
            if self._open.get(task_id, (0, {}))[0] != number:
                file.unlink(missing_ok=True)

    def settle(self, task_id: str) -> None:
        """The server counts this fit: what it left is what there is, and older ones have no more to say."""
        if task_id not in self._open:
            return
        while next(iter(self._open)) != task_id:
            self._forget(next(iter(self._open)))
        number, self._settled = self._open.pop(task_id)
        if self._folder is not None:
            with _using(self._folder):
                (self._folder / f"{number}{_SUFFIX}").replace(self._folder / _SETTLED)

    def discard(self, task_id: str) -> None:
        """The server does not count this fit, which later ones may have begun with; on disk those stay as they are."""
        if task_id in self._open:
            earlier: Tensors = self._settled
            number, left = self._open[task_id]
            for other, (its_number, tensors) in list(self._open.items()):
                if its_number < number:
                    earlier = tensors
                elif its_number > number:
                    self._open[other] = its_number, _rebased(tensors, left, earlier)
        self._forget(task_id)

    def _forget(self, task_id: str) -> None:
        number, _ = self._open.pop(task_id, (0, {}))
        if number and self._folder is not None:
            with _using(self._folder):
                (self._folder / f"{number}{_SUFFIX}").unlink(missing_ok=True)

    def _load(self, folder: Path) -> None:
        if (folder / _SETTLED).exists():
            self._settled, self._run_id, _, self._newest_round = _read(folder / _SETTLED)
        waiting = {int(path.name.removesuffix(_SUFFIX)): path for path in folder.glob(f"*{_SUFFIX}")}
        for number, path in sorted(waiting.items()):
            tensors, run_id, task_id, round = _read(path)
            if self._run_id in ("", run_id):
                self._run_id, self._newest_round = run_id, max(self._newest_round, round)
                self._open[task_id] = number, tensors
            self._number = number


def _rebased(tensors: Tensors, base: Tensors, new_base: Tensors) -> dict[str, Array]:
    """`tensors`, which came of `base`, as if they had come of `new_base`, as far as they are sums."""
    return {
        name: _shifted(value, base.get(name), new_base.get(name)) if name.startswith(SUMS) else value
        for name, value in tensors.items()
    }


def _shifted(value: Array, base: Array | None, new_base: Array | None) -> Array:
    if base is new_base:
        return value
    shifted = value if new_base is None else value + new_base
    return np.asarray(shifted if base is None else shifted - base, value.dtype)


def _read(path: Path) -> tuple[dict[str, Array], str, str, int]:
    tensors, metadata, _ = map_model(path)
    return tensors, metadata.get("run_id", ""), metadata.get("task_id", ""), int(metadata.get("round", "0"))


@contextlib.contextmanager
def _using(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigError(f"the client's state folder {folder} cannot be used: {exc.strerror or exc}") from exc
    except ValueError as exc:
        raise ConfigError(f"the client's state folder {folder} holds something else: {exc}") from exc

"""The versions that updates may still be based on, for strategies that need them."""

from __future__ import annotations

from collections.abc import Collection

from fedbus.server.checkpoint import RunFolder
from fedbus.types import Array, Tensors


class Bases:
    """Earlier versions: in the run folder, where there is one, so that they take no memory."""

    def __init__(self, folder: RunFolder | None) -> None:
        self._folder = folder
        self._in_memory: dict[int, Tensors] = {}

    def add(self, version: int, model: Tensors, *, in_use: Collection[int]) -> None:
        """Note a new version, and forget those that nobody works on; the caller sees to checkpoints."""
        if self._folder is None:
            self._in_memory = {each: kept for each, kept in self._in_memory.items() if each in in_use}
            self._in_memory[version] = model

    def get(self, version: int, *, run_id: str) -> dict[str, Array] | None:
        """The tensors of `version`, read-only; None when it is not kept."""
        if self._folder is not None:
            return self._folder.earlier_checkpoint(version, run_id=run_id)
        model = self._in_memory.get(version)
        return None if model is None else dict(model)

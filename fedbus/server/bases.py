"""The versions that updates may still be based on, for strategies that need them."""

from __future__ import annotations

from fedbus.server.checkpoint import RunFolder
from fedbus.types import Array, Tensors


class Bases:
    """The last `keep` + 1 versions: in the run folder, where there is one, so that they take no memory."""

    def __init__(self, folder: RunFolder | None, *, keep: int) -> None:
        self._folder = folder
        self.keep = keep
        self._in_memory: dict[int, Tensors] = {}

    def add(self, version: int, model: Tensors) -> None:
        """Note a new version; the caller saves its checkpoint."""
        if self._folder is None and self.keep:
            self._in_memory[version] = model
            self._in_memory.pop(version - self.keep - 1, None)

    def get(self, version: int, *, run_id: str) -> dict[str, Array] | None:
        """The tensors of `version`, read-only; None when it is not kept."""
        if self._folder is not None:
            return self._folder.earlier_checkpoint(version, run_id=run_id)
        model = self._in_memory.get(version)
        return None if model is None else dict(model)

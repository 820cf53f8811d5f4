"""How far the run is, as the end of the model stream tells: what lies too far behind is not worth any work.

A task may have waited for long, while others closed the round that it was for. Workers have no inbox, so nobody can
tell them; but whatever is wanted now is wanted for the version that was published last, or for one not long before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import Final

from fedbus.bus.base import Bus
from fedbus.bus.topology import MODEL
from fedbus.clock import now
from fedbus.errors import DecodeError, QueueMissing
from fedbus.wire import messages as m
from fedbus.wire.codec import decode

_LOOK_EVERY_S: Final = 1.0
_PATIENCE_S: Final = 5.0


class Horizon:
    """Looks at the last message of the stream, now and then.

    Args:
        bus: leads to the stream.
        max_staleness: versions that an update may be late.
    """

    def __init__(self, bus: Bus, max_staleness: int) -> None:
        self._bus = bus
        self._max_staleness = max_staleness
        self._newest: tuple[str, int] | None = None  # run_id, version
        self._due_at = -math.inf

    async def why_unwanted(self, task: m.FitTask | m.EvaluateTask) -> str | None:
        """Why nobody waits for this task any more; None when somebody may."""
        # Before it is said that a run is over: another one may have begun since the last look.
        if now() >= self._due_at or self._judge(task) is not None:
            await self._look()
        return self._judge(task)

    def _judge(self, task: m.FitTask | m.EvaluateTask) -> str | None:
        if self._newest is None:
            return None
        run_id, version = self._newest
        if task.run_id != run_id:
            return f"run {task.run_id[:40]} is over"
        late = version - task.version
        if isinstance(task, m.FitTask) and late > self._max_staleness:
            return f"{late} version{'s' * (late != 1)} late, max_staleness is {self._max_staleness}"
        return None

    async def _look(self) -> None:
        """Each message of the stream names its version; when it says nothing, what is known stays."""
        self._due_at = now() + _LOOK_EVERY_S
        with contextlib.suppress(QueueMissing, DecodeError, TimeoutError, ValueError):
            async with asyncio.timeout(_PATIENCE_S), self._bus.consume(MODEL, prefetch=1, offset="last") as consumer:
                message = decode((await consumer.receive()).body)
                if isinstance(message, m.Model | m.Part):
                    run_id, _, version = message.transfer.rsplit("/", 2)
                    self._newest = run_id, int(version)

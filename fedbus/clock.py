"""The time, as the event loop knows it: a simulation runs the same code on a clock of its own."""

from __future__ import annotations

import asyncio


def now() -> float:
    """Seconds, monotonic, of the running event loop."""
    return asyncio.get_running_loop().time()

"""An event loop whose time is virtual: where another one would wait, it jumps to its next timer."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context
from typing import Final, TypeVar, TypeVarTuple, Unpack

from fedbus.errors import RunFailed

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

FOREVER_S: Final = 1e9
"""A timer that is farther away, some 30 years, never comes."""

_RESOLUTION_S: Final = 1e-6
"""Timers so close together are one instant. Floats near 1e9 lie 1.2e-7 apart, and asyncio's own 1 ns would be less than
the rounding of a jump: the timer that was jumped to would never be due."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time begins at 0 and passes only while nothing is ready to run.

    What others would run in an executor (`asyncio.to_thread`) runs at once, in this thread, so that the order of all
    that happens depends on nothing outside. Signals and `call_soon_threadsafe` work as ever.

    When nothing is scheduled either, nothing can happen any more: `on_standstill` is called, which may end things in
    good order. Raises `RunFailed` out of the loop when that is not set, or changes nothing.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._has_told = False
        self.on_standstill: Callable[[], None] | None = None
        super().__init__(_NeverWaiting(self._jump))
        self._clock_resolution = _RESOLUTION_S

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._now

    def call_at(
        self, when: float, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As in any loop, but what is farther away than `FOREVER_S` is not even noted."""
        if when - self._now >= FOREVER_S:
            return asyncio.TimerHandle(when, callback, args, self, context)
        return super().call_at(when, callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Call the function now; a future that is done."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as exc:  # noqa: BLE001  # for whoever awaits the future
            future.set_exception(exc)
        return future

    def _jump(self, seconds: float | None) -> None:
        if seconds is not None:
            self._now += seconds
            self._has_told = False
        elif self.on_standstill is None or self._has_told:
            raise RunFailed("the simulation stands still: everybody waits, and nothing is scheduled to happen")
        else:
            self._has_told = True
            self.on_standstill()


class _NeverWaiting(selectors.DefaultSelector):
    """Looks for what has come, a signal above all; where it would wait, it lets virtual time jump."""

    def __init__(self, jump: Callable[[float | None], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready now. `timeout` is how long asyncio would wait; None: for ever."""
        events = super().select(0)
        if not events and timeout != 0:
            self._jump(timeout)
        return events

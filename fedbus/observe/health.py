"""Whether a process does its work: told by its events and the beat of its event loop, asked by another thread.

Every field is one value that is replaced as a whole, so a reader needs no lock, and gets an answer also when the event
loop hangs: that is what it is there for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from fedbus.observe import events as o

BEAT_S: Final = 0.5
"""Seconds between two beats of the event loop."""
LOOP_PATIENCE_S: Final = 10.0
"""An event loop that has not run for so long hangs; what is large leaves it, so it never should for a second."""
BLOCKED_PATIENCE_S: Final = 60.0
"""An alarm on the broker passes; one that lasts needs somebody."""


class Health:
    """The health of one process.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._beat_at = clock()
        self.is_connected = False
        self._lost = "it has not connected to the broker yet"
        self._blocked_since: float | None = None
        self._failed = ""

    def observe(self, event: object) -> None:
        """Take in one event: an `Observe` function."""
        match event:
            case o.ConnectedToBroker() | o.BrokerRestored():
                self.is_connected = True
            case o.BrokerLost():
                self.is_connected, self._blocked_since = False, None
                self._lost = f"the broker is lost: {event.reason}"
            case o.BrokerBlocked():
                self._blocked_since = self._clock()
            case o.BrokerUnblocked():
                self._blocked_since = None
            case o.RunFinished(finished=False) | o.ClientDone(finished=False):
                self._failed = f"the run is over: {event.reason}"
            case _:
                pass

    def beat(self) -> None:
        """The event loop runs."""
        self._beat_at = self._clock()

    @property
    def silence_s(self) -> float:
        """Seconds since the event loop ran."""
        return max(0.0, self._clock() - self._beat_at)

    def loop_problem(self) -> str:
        """Why this process cannot go on by itself; "" when it can."""
        silence_s = self.silence_s
        return f"the event loop has not run for {silence_s:.0f} s" if silence_s > LOOP_PATIENCE_S else ""

    def problem(self) -> str:
        """Why this process does not do its work, "" when it does."""
        blocked_since = self._blocked_since
        blocked_s = 0.0 if blocked_since is None else self._clock() - blocked_since
        if problem := self.loop_problem():
            return problem
        if self._failed:
            return self._failed
        if not self.is_connected:
            return self._lost
        if blocked_s > BLOCKED_PATIENCE_S:
            return f"the broker has held publishes back for {blocked_s:.0f} s"
        return ""

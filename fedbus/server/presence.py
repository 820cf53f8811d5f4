"""Looks whether those who owe a fit task are still connected: the broker knows it long before their lease ends.

A client reads its inbox for as long as it is there, so an inbox that nobody reads is that of a client that was killed
or cut off. One that is there and hangs is its lease's affair: a look that finds it is no sign of life.

Nobody is blamed for what is the broker's fault, or ours. A client may take a moment to connect again. Whenever our
connection was lost, or an answer takes so long that the broker or we must have been held up, all that was seen is
forgotten, and clients have time to come back before anybody is looked at. And as with leases, a word to ourselves must
have come back the way that the clients' words come, said after the client was seen to be gone.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from fedbus.bus.base import Bus
from fedbus.bus.topology import inbox
from fedbus.clock import now
from fedbus.errors import BrokerClosed, BrokerDenied, BrokerError, QueueMissing
from fedbus.rounds import events as e
from fedbus.rounds.engine import Engine

_LOGGER = logging.getLogger("fedbus.server")

_PATIENCE_LOOKS: Final = 3
_SHORTEST_PAUSE_S: Final = 0.02
_HELD_UP_S: Final = 3.0
_MISSED: Final = ""
"""Stands for the task of who was told to be unreachable: its inbox may be deleted a moment later."""
_MISSED_S: Final = 30.0

_Found: TypeAlias = Literal["somebody", "nobody", "no inbox", "unknown"]


@dataclass(slots=True, eq=False)
class _Watch:
    """What was seen of one client during one task: by the last look, and when (None: not yet, or not any more)."""

    task_id: str
    found: _Found = "unknown"
    seen_at: float | None = None
    gone_since: float | None = None


class Presence:
    """The watch over the clients at work.

    A task is looked at from the second tour on: a client that answers within `every_s` is never looked at.

    Args:
        bus: whom to ask.
        engine: knows who is at work, and up to when everything that clients said was heard.
        put: takes what is to be told to the engine.
        inbox_gone: called with the name of a client at work that has no inbox any more.
        ask_for_echo: makes a word to ourselves go out now.
        every_s: seconds between two looks at the same client, more with many; one whose connection is gone for three
            times as long is told to be unreachable.
        grace_s: seconds without a look after each disturbance.
        without_inbox: clients that are not looked at.
    """

    def __init__(
        self,
        bus: Bus,
        engine: Engine,
        *,
        put: Callable[[e.Event], None],
        inbox_gone: Callable[[str], None],
        ask_for_echo: Callable[[], None],
        every_s: float,
        grace_s: float,
        without_inbox: Container[str] = (),
    ) -> None:
        self._bus = bus
        self._engine = engine
        self._put = put
        self._inbox_gone = inbox_gone
        self._ask_for_echo = ask_for_echo
        self._every_s = every_s
        self._grace_s = grace_s
        self._without_inbox = without_inbox
        self._watches: dict[str, _Watch] = {}
        self._missed: dict[str, float] = {}  # who was told to be unreachable -> until when
        self._quiet_until = -math.inf

    def disturbed(self) -> None:
        """Begin anew, later: what was seen proves nothing, and clients may have to connect again."""
        self._watches.clear()
        self._quiet_until = now() + self._grace_s

    async def watch(self) -> None:
        """Look, tour after tour, until the broker says that we may not."""
        try:
            while True:
                names = self._tour()
                pause_s = max(_SHORTEST_PAUSE_S, self._every_s / max(1, len(names)))
                if not names:
                    await asyncio.sleep(pause_s)
                for client_id in names:
                    await self._look_after(pause_s, client_id)
        except BrokerDenied as exc:
            _LOGGER.warning("clients that die are noticed by their lease alone: %s", exc)

    def _tour(self) -> list[str]:
        """Whom to look at now: those who were at the same task when the last tour began."""
        if now() < self._quiet_until:
            return []
        known, out = self._watches, self._without_inbox
        self._missed = {name: until for name, until in self._missed.items() if now() < until}
        at_work = dict.fromkeys(self._missed, _MISSED)
        at_work |= {name: task_id for name, task_id in self._engine.at_work.items() if name not in out}
        same = {name for name, task_id in at_work.items() if name in known and known[name].task_id == task_id}
        self._watches = {name: known[name] if name in same else _Watch(task_id) for name, task_id in at_work.items()}
        return [name for name in self._watches if name in same]

    async def _look_after(self, pause_s: float, client_id: str) -> None:
        watch = self._watches.get(client_id)
        if watch is None:  # disturbed in the middle of the tour
            return
        began_at = now()
        await asyncio.sleep(pause_s)
        found = await self._ask(client_id)
        if now() - began_at > pause_s + _HELD_UP_S:
            self.disturbed()
        if self._watches.get(client_id) is watch:
            self._judge(client_id, watch, found)

    async def _ask(self, client_id: str) -> _Found:
        try:
            return "somebody" if (await self._bus.queue_state(inbox(client_id))).consumers else "nobody"
        except QueueMissing:
            return "no inbox"
        except (BrokerClosed, BrokerDenied):
            raise
        except BrokerError as exc:
            _LOGGER.debug("the broker cannot tell whether %s is there", client_id, exc_info=exc)
            return "unknown"

    def _judge(self, client_id: str, watch: _Watch, found: _Found) -> None:
        last, watch.found = watch.found, found
        match found:
            case "no inbox" if last == "no inbox":
                del self._watches[client_id]
                self._missed.pop(client_id, None)
                self._inbox_gone(client_id)
            case "somebody":
                watch.seen_at, watch.gone_since = now(), None
                self._missed.pop(client_id, None)
            case _ if watch.task_id == _MISSED:
                pass
            case "unknown":
                watch.gone_since = None
            case _ if watch.gone_since is None:
                watch.gone_since = now()
                self._ask_for_echo()
            case _ if now() - watch.gone_since >= _PATIENCE_LOOKS * self._every_s:
                self._blame_if_heard(client_id, watch, watch.gone_since)

    def _blame_if_heard(self, client_id: str, watch: _Watch, gone_since: float) -> None:
        if self._engine.heard_through >= gone_since:
            del self._watches[client_id]
            self._missed[client_id] = now() + _MISSED_S
            reason = "its connection is gone"
            self._put(e.ClientUnreachable(client_id=client_id, reason=reason, seen_at=watch.seen_at))
        elif now() - gone_since > _PATIENCE_LOOKS * self._every_s + _HELD_UP_S:
            self.disturbed()  # publishes do not come through: an alarm, a queue without a leader, a flood

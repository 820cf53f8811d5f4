"""What a client costs the others is bounded: what it sends is metered by its broker user, and a flood is kept out.

The broker checks who sends a message, so that whoever has a user of its own (a provisioned federation) can be held to
account; where all share the server's user nobody can be told from the others, and nothing is metered.

Whoever uses up its allowance is shut out for a while: what it has sent is dropped before it is looked at, and the
broker refuses further messages under its routing key (a client may use no other), which neither costs the server
anything nor fills the queues that all share. An honest client that was shut out by mistake sends again what was
refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedbus.bus.base import Bus, Consumer, Delivery
from fedbus.bus.topology import QUARANTINE, kept_out, quarantine
from fedbus.clock import now
from fedbus.errors import BrokerDenied, PublishUnconfirmed, QueueMismatch, QueueMissing
from fedbus.observe import events as o
from fedbus.server.identity import Identity
from fedbus.server.meter import Allowance, Meter

_LOGGER = logging.getLogger("fedbus.server")

CLIENT: Final = Allowance(per_s=200, burst=5000)
WORKERS: Final = Allowance(per_s=20_000, burst=500_000)
"""All worker processes together: they speak for any number of virtual clients."""

MESSAGE: Final = 5
"""A heartbeat, an upload request, a report: 40 in a second at length, 1000 at once."""
COPY: Final = 0.5
"""A part that came already, or that nobody needs now: soon done with, but for its bytes."""
JOIN: Final = 50
"""It is answered, noted in the ledger, and may be given its task again: 4 in a second at length, 100 at once."""
REFUSED_UPDATE: Final = 50
"""It goes through the engine and the ledger, and its sender is told why."""
ORPHAN: Final = 10
"""A part whose head has not come: the broker keeps the order, but for redeliveries."""
REJECTED: Final = 50
"""Bytes that are no message of ours, or not the sender's to send."""
_BYTES_PER_TOKEN: Final = 1 << 14
_TOKENS_PER_CPU_S: Final = 10_000

_DROPS_AT_ONCE: Final = 256
_MOST_HELD: Final = 32_768
"""Half of what a consumer may hold unsettled."""
_MOST_HELD_BYTES: Final = 64 << 20
_TELL_EVERY_S: Final = 1.0
_RETRY_S: Final = 1.0
SHUT_OUT: Final = "its sender is shut out for flooding"


def cost_of_bytes(delivery: Delivery) -> float:
    """What it costs to carry so many bytes for nothing: 64 a MiB."""
    return len(delivery.body) / _BYTES_PER_TOKEN


@dataclass(slots=True)
class _Untold:
    count: int
    reason: str


class Drops:
    """What is not looked at, acknowledged in bulk: one by one a flood would cost the broker as much as it did to come.

    Only what was delivered without a gap is acknowledged at once. So while something older is still to be settled, the
    drops wait for it, as many as the broker may well hold for us.

    Args:
        consumer: from which they came.
        has_older: whether deliveries from before are not settled.
    """

    def __init__(self, consumer: Consumer, has_older: Callable[[], bool] = lambda: False) -> None:
        self._consumer = consumer
        self._has_older = has_older
        self._waiting: list[Delivery] = []
        self._bytes = 0

    async def add(self, delivery: Delivery) -> None:
        self._waiting.append(delivery)
        self._bytes += len(delivery.body)
        if len(self._waiting) % _DROPS_AT_ONCE == 0:
            await self.settle_if_cheap()
            await asyncio.sleep(0)  # what has arrived is handed out without a pause: others must have their turn

    async def settle_if_cheap(self) -> None:
        """Acknowledge them, unless that is cheaper later."""
        is_full = len(self._waiting) >= _MOST_HELD or self._bytes >= _MOST_HELD_BYTES
        if self._waiting and (is_full or not self._has_older()):
            waiting, self._waiting, self._bytes = self._waiting, [], 0
            await self._consumer.ack(*waiting)


class Guard:
    """Meters users, tells what was rejected without flooding the log in turn, and keeps floods out.

    Args:
        bus: the server's own.
        identity: knows which client a user is.
        tell: takes the events for those who watch.
    """

    def __init__(self, bus: Bus, identity: Identity, tell: Callable[[object], None]) -> None:
        self._bus = bus
        self._identity = identity
        self._tell = tell
        self._meter = Meter()
        self._untold: dict[tuple[str, str | None], _Untold] = {}
        self._told_at: dict[tuple[str, str | None], float] = {}
        self._kept_out: dict[str, float] = {}  # routing key -> until when
        self._changed = asyncio.Event()
        self._watched_from_s = time.thread_time()

    def is_shut_out(self, queue: str, delivery: Delivery) -> bool:
        """Whether the message is to be dropped unread; then it has been noted."""
        user = self._identity.user_of(delivery)
        if user is None or not self._meter.is_shut(user):
            return False
        self._note(queue, user, SHUT_OUT)
        return True

    def watch(self) -> None:
        """A message is being looked at from now on: what that takes of the processor is put down to its sender, if it
        was for nothing."""
        self._watched_from_s = time.thread_time()

    def wasted(self, delivery: Delivery, cost: float) -> None:
        """As `spend`, and what was spent on it since `watch`: a message that is small may be laborious."""
        self.spend(delivery, cost + _TOKENS_PER_CPU_S * (time.thread_time() - self._watched_from_s))

    def spend(self, delivery: Delivery, cost: float) -> None:
        """Put the cost of a message down to its sender."""
        user = self._identity.user_of(delivery)
        if user is None or delivery.redelivered:  # it has been paid for, and comes again by nobody's fault
            return
        shut_s = self._meter.spend(user, cost, WORKERS if self._identity.is_worker(user) else CLIENT)
        if shut_s:
            self._shut_out(user, shut_s)

    def rejected(self, queue: str, delivery: Delivery, reason: str) -> None:
        """Tell of a message that was none, and put it down to its sender."""
        self._note(queue, self._identity.user_of(delivery), reason)
        self.wasted(delivery, REJECTED + cost_of_bytes(delivery))

    # ---- words -----------------------------------------------------------------------------------------------------

    def _note(self, queue: str, user: str | None, reason: str) -> None:
        """The first at once; those that follow within a second with a count, when it is over."""
        key = queue, user
        waiting = self._untold.get(key)
        if waiting is not None:
            waiting.count += 1
            waiting.reason = reason
            return
        rest_s = self._told_at.get(key, -_TELL_EVERY_S) + _TELL_EVERY_S - now()
        if rest_s <= 0:
            self._told_at[key] = now()
            self._tell(o.MessageRejected(queue=queue, reason=reason, user=user))
        else:
            self._untold[key] = _Untold(1, reason)
            asyncio.get_running_loop().call_later(rest_s, self._tell_count, key)

    def tell_rest(self) -> None:
        """The run is over: nothing more will be counted."""
        for key in list(self._untold):
            self._tell_count(key)

    def _tell_count(self, key: tuple[str, str | None]) -> None:
        untold = self._untold.pop(key, None)
        if untold is None:  # told at the end of the run
            return
        self._told_at[key] = now()
        self._tell(o.MessageRejected(queue=key[0], user=key[1], reason=untold.reason, count=untold.count))

    # ---- the broker's door -----------------------------------------------------------------------------------------

    def _shut_out(self, user: str, seconds: float) -> None:
        client_id = self._identity.client_of(user)
        self._tell(o.UserShutOut(user=user, client_id=client_id, seconds=seconds))
        if client_id is not None:
            self._kept_out[client_id] = now() + seconds
            self._changed.set()

    async def begin(self) -> None:
        """Let everybody in: a server that died may have left its doors shut."""
        await self._bus.delete_queue(QUARANTINE)
        await self._bus.declare(quarantine(), remember=False)

    async def keep_doors(self) -> None:
        """Shut and open them, for ever."""
        shut: set[str] | None = set()  # None: nobody knows
        while True:
            until = min(self._kept_out.values(), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if until is None else max(0.0, until - now())):
                    await self._changed.wait()
            self._changed.clear()
            self._kept_out = {key: end for key, end in self._kept_out.items() if end > now()}
            if shut != self._kept_out.keys():
                shut = await self._keep_out(set(self._kept_out), shut)

    async def _keep_out(self, keys: set[str], former: set[str] | None) -> set[str] | None:
        """A binding is taken away with its queue: the others' are made anew. None, and soon again, on failure."""
        try:
            if former is None or not former <= keys:
                await self.begin()
                former = set()
            await self._bus.declare(kept_out(keys - former), remember=False)
        except (BrokerDenied, QueueMismatch, QueueMissing, PublishUnconfirmed) as exc:
            _LOGGER.warning("the broker does not keep out who floods: %s", exc)
            asyncio.get_running_loop().call_later(_RETRY_S, self._changed.set)
            return None
        return keys

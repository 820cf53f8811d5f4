"""A federation at a glance, from outside: what its server says, and what the broker says of its queues."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from typing import Any, Final

from fedbus.bus.base import Bus, QueueState
from fedbus.bus.topology import CONTROL, DEAD, MODEL, TASKS, UPDATES, WORK
from fedbus.errors import BrokerDenied, BrokerUnreachable, DecodeError, QueueMissing, Unroutable
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode

QUEUES: Final = (CONTROL, UPDATES, WORK, DEAD, MODEL)
PATIENCE_S: Final = 3.0


async def ask_server(bus: Bus, *, patience_s: float = PATIENCE_S) -> dict[str, Any] | None:
    """What the server of the run says, see `fedbus.server.status`; None when none answers within `patience_s`.

    Raises `BrokerDenied` when the user of `bus` is not one that may ask.
    """
    reply_to = f"reply.{uuid.uuid4().hex}"
    request = encode(m.StatusRequest(reply_to=reply_to))
    try:
        async with asyncio.timeout(patience_s), bus.replies(TASKS, reply_to) as replies:
            await bus.publish(CONTROL, "server", request, expires_s=patience_s)
            async for delivery in replies:
                await replies.ack(delivery)
                answer = decode(delivery.body)
                if isinstance(answer, m.Status):
                    return _parse(answer)
    except (TimeoutError, QueueMissing, Unroutable):  # no federation was ever here, or nobody serves it now
        return None
    except BrokerDenied as exc:
        raise BrokerDenied(
            f"only the server's user may ask how a run goes: give its URL or its bundle ({exc})"
        ) from exc
    raise AssertionError("replies come until the connection ends")


def _parse(answer: m.Status) -> dict[str, Any]:
    try:
        status = json.loads(bytes(memoryview(answer.payload)))  # type: ignore[arg-type]  # decoded: one buffer
        if isinstance(status, dict):
            return status
    except (ValueError, RecursionError) as exc:
        raise DecodeError(f"the server's status is no JSON: {exc}") from exc
    raise DecodeError("the server's status is no JSON object")


async def ask_queues(bus: Bus) -> Mapping[str, QueueState | None]:
    """How each queue of the federation is; None: it is not there, or its node is away."""
    return {name: await _queue_state(bus, name) for name in QUEUES}


async def _queue_state(bus: Bus, name: str) -> QueueState | None:
    try:
        return await bus.queue_state(name)
    except (QueueMissing, BrokerUnreachable):
        return None

"""The `fedbus` command in a process that kills or stops itself at a named point.

    python -m tests.faults.victim POINT:NTH:SIGKILL server APP ...
    python -m tests.faults.victim POINT:NTH:SIGSTOP client APP ...

or the same arguments to a fork, see `tests.forked`. The product knows nothing of this: its methods are wrapped from
outside, before the command begins. What is behind each point is in `_HOOKS`, the one place to look when the product
changes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import aiormq

from fedbus.bus.base import Delivery
from fedbus.bus.rabbitmq import RabbitMQBus, _RabbitMQConsumer
from fedbus.bus.topology import TASKS, UPDATES
from fedbus.errors import DecodeError
from fedbus.server.checkpoint import RunFolder
from fedbus.server.history import History
from fedbus.server.ledger import Ledger
from fedbus.strategies.fedavg import FedAvg
from fedbus.wire import messages as m
from fedbus.wire.codec import decode

_FLUSH_S: Final = 0.1
"""Time for acknowledgements, which nobody waits for, to reach the broker."""


class Point:
    """Counts how often it was passed, and sends the signal at the nth time."""

    def __init__(self, nth: int, number: signal.Signals) -> None:
        self._left = nth
        self._number = number

    def passed(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), self._number)

    async def passed_when_flushed(self) -> None:
        """The same, once what was written before is out; nobody passes meanwhile."""
        self._left -= 1
        is_nth = self._left == 0
        if self._left <= 0:
            await asyncio.sleep(_FLUSH_S)
        if is_nth:
            os.kill(os.getpid(), self._number)


def _decoded(body: Any) -> m.Message | None:
    try:
        return decode(bytes(body))
    except DecodeError:
        return None


# ---- where the points are --------------------------------------------------------------------------------------------


def _client_before_confirm(point: Point) -> None:
    """A part of an update has reached the broker, and its confirm has reached the client, who has not read it."""
    publish, confirm = RabbitMQBus.publish, aiormq.Channel._confirm_delivery
    parts_out = 0

    async def publishing(self: RabbitMQBus, exchange: str, *args: Any, **kwargs: Any) -> None:
        nonlocal parts_out
        parts_out += exchange == UPDATES
        try:
            await publish(self, exchange, *args, **kwargs)
        finally:
            parts_out -= exchange == UPDATES

    def confirming(self: aiormq.Channel, *args: Any, **kwargs: Any) -> None:
        if parts_out:
            point.passed()
        confirm(self, *args, **kwargs)

    _replace(RabbitMQBus, "publish", publishing)
    _replace(aiormq.Channel, "_confirm_delivery", confirming)


def _client_before_task_ack(point: Point) -> None:
    """All parts are confirmed; the task is still the client's."""
    ack = _RabbitMQConsumer.ack

    async def acknowledging(self: _RabbitMQConsumer, *deliveries: Delivery) -> None:
        if any(isinstance(_decoded(delivery.body), m.FitTask) for delivery in deliveries):
            point.passed()
        await ack(self, *deliveries)

    _replace(_RabbitMQConsumer, "ack", acknowledging)


def _server_before_fold(point: Point) -> None:
    """An update is received and verified, and about to be folded."""
    fold = FedAvg.fold

    def folding(self: FedAvg, *args: Any) -> None:
        point.passed()
        fold(self, *args)

    _replace(FedAvg, "fold", folding)


def _server_before_ledger(point: Point) -> None:
    """The new model is on the disk, the ledger does not know of its round."""
    save = RunFolder.save_checkpoint

    def saving(self: RunFolder, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        point.passed()

    _replace(RunFolder, "save_checkpoint", saving)


def _server_before_ack(point: Point) -> None:
    """The round is in the ledger, the first of its updates is about to be acknowledged."""
    ack = _RabbitMQConsumer.ack

    async def acknowledging(self: _RabbitMQConsumer, *deliveries: Delivery) -> None:
        if self._queue == UPDATES:
            point.passed()
        await ack(self, *deliveries)

    _replace(_RabbitMQConsumer, "ack", acknowledging)


def _server_before_receipt(point: Point) -> None:
    """The updates are acknowledged, and a receipt is about to be sent."""
    publish = RabbitMQBus.publish

    async def publishing(self: RabbitMQBus, exchange: str, routing_key: str, body: Any, **kwargs: Any) -> None:
        if exchange == TASKS and isinstance(_decoded(body), m.Receipt):
            await point.passed_when_flushed()
        await publish(self, exchange, routing_key, body, **kwargs)

    _replace(RabbitMQBus, "publish", publishing)


def _server_after_ledger(point: Point) -> None:
    """The round is in the ledger, and nobody has heard of it: model.safetensors is that of the round before."""
    commit = Ledger.commit_round

    def committing(self: Ledger, *args: Any, **kwargs: Any) -> None:
        commit(self, *args, **kwargs)
        point.passed()

    _replace(Ledger, "commit_round", committing)


def _server_while_ledger_begins(point: Point) -> None:
    """The ledger has its tables, and the run is about to be written into it."""
    head = History.head

    def heading(self: History) -> dict[str, Any]:
        point.passed()
        return head(self)

    _replace(History, "head", heading)


def _replace(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    setattr(owner, name, wrapper)


_HOOKS: Final[dict[str, Callable[[Point], None]]] = {
    "client-before-confirm": _client_before_confirm,
    "client-after-confirm-before-task-ack": _client_before_task_ack,
    "server-after-receive-before-fold": _server_before_fold,
    "server-after-checkpoint-before-ledger": _server_before_ledger,
    "server-after-ledger-before-ack": _server_before_ack,
    "server-after-ack-before-receipt": _server_before_receipt,
    "server-after-ledger-before-anything": _server_after_ledger,
    "server-while-the-ledger-begins": _server_while_ledger_begins,
}
POINTS: Final = tuple(_HOOKS)


def main() -> None:
    fault, *command = sys.argv[1:]
    name, nth, number = fault.split(":")
    _HOOKS[name](Point(int(nth), signal.Signals[number]))
    from fedbus.cli.main import main as run

    sys.argv = ["fedbus", *command]
    run()


if __name__ == "__main__":
    main()

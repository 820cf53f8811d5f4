"""What an attacker has: a user of the federation, the wire, and what the operator sees of it."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from pamqp import commands

from fedbus.bus.topology import CONTROL, UPDATES, inbox
from fedbus.types import Tensors
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode
from fedbus.wire.transfer import Outgoing, checksum
from tests.hostile import field_app
from tests.hostile.ground import Ground
from tests.hostile.raw import RawConnection, Refused, flood

_CONNECTIONS = 2


class Field:
    """One attacker's view.

    Args:
        ground: the federation under attack.
        who: the client id of the attacker.
        seconds: how long a flood goes on; 0: until it is refused.
    """

    def __init__(self, ground: Ground, who: str, seconds: float = 0.0) -> None:
        self.ground = ground
        self.who = who
        self.user = ground.user(who)
        self.url = ground.url(who)
        self.seconds = seconds
        self.since = len(ground.look())
        self._connection: RawConnection | None = None
        self._all: list[RawConnection] = []

    def close(self) -> None:
        """Hang up, everywhere."""
        for connection in self._all:
            connection.socket.close()

    def connect(self) -> RawConnection:
        """One more connection; it is closed with the field."""
        self._all.append(RawConnection(self.url))
        return self._all[-1]

    # ---- attacks ---------------------------------------------------------------------------------------------------

    @property
    def connection(self) -> RawConnection:
        """A connection of its own, made when it is first used."""
        if self._connection is None:
            self._connection = self.connect()
        return self._connection

    def refused_by_broker(self, *methods: Any) -> str:
        """Say this on a connection of its own; the broker's word when it closes the channel for it."""
        with RawConnection(self.url) as connection:
            for method in methods:
                connection.send(method)
            return connection.refusal()

    def publish_refused(self, exchange: str, routing_key: str, body: bytes, **properties: Any) -> str:
        """Publish, and return the broker's word when it closes the channel for it."""
        with RawConnection(self.url) as connection:
            connection.send(commands.Confirm.Select())
            connection.expect(commands.Confirm.SelectOk)
            connection.publish(exchange, routing_key, body, **properties)
            with suppress(TimeoutError):
                connection.expect(commands.Basic.Ack)
                raise AssertionError(f"the broker took a message for {exchange}/{routing_key}")
            raise AssertionError("the broker says nothing")

    def say(self, message: m.Message | bytes, exchange: str = CONTROL, **properties: Any) -> None:
        """Publish as itself."""
        body = message if isinstance(message, bytes) else encode(message)
        self.connection.publish(exchange, self.who, body, **{"user_id": self.user, **properties})

    def flood(self, exchange: str, messages: Sequence[m.Message | bytes], most: int = 1000, **how: Any) -> str:
        """Publish these again and again, until the server has shut the attacker out, and the broker takes no more.

        For as many seconds as are asked for, over several connections; else `most` messages, more than what is borne.
        """
        bodies = [each if isinstance(each, bytes) else encode(each) for each in messages]
        stop = threading.Event()

        def run() -> None:
            with suppress(OSError, Refused):
                flood(self.url, exchange, bodies, stop=stop, most=sys.maxsize if self.seconds else most, **how)

        connections = _CONNECTIONS if self.seconds else 1
        threads = [threading.Thread(target=run, daemon=True) for _ in range(connections)]
        over_at = time.monotonic() + self.seconds
        for thread in threads:
            thread.start()
        try:
            shut_out = self.ground.until("user_shut_out", user=self.user, timeout_s=30)
            while time.monotonic() < over_at:
                time.sleep(0.05)
        finally:
            stop.set()
            for thread in threads:
                thread.join(10)
        self._until_refused(exchange, bodies[0])
        return str(shut_out["message"])

    def _until_refused(self, exchange: str, body: bytes) -> None:
        """The broker's door closes a moment after the server's word."""
        connection = self.connect()
        connection.send(commands.Confirm.Select())
        connection.expect(commands.Confirm.SelectOk)
        for _ in range(100):
            connection.publish(exchange, self.who, body, user_id=self.user)
            if isinstance(connection.expect(commands.Basic.Ack | commands.Basic.Nack), commands.Basic.Nack):
                return
            time.sleep(0.02)
        raise AssertionError("the broker goes on taking what it sends")

    # ---- what the operator sees ------------------------------------------------------------------------------------

    def rejected(self, queue: str, reason: str) -> str:
        """The server's word about a message of ours that was none."""
        told = self.ground.until("message_rejected", self.since, queue=queue, user=self.user, reason=reason)
        return str(told["message"])

    def update_refused(self, reason: str) -> str:
        """The server's word about an update of ours."""
        told = self.ground.until("update_refused", self.since, client_id=self.who, reason=reason)
        return str(told["message"])

    def in_broker_log(self, words: str) -> None:
        """Wait until the broker has written this down."""
        for _ in range(500):
            if words in self.ground.broker_log():
                return
            time.sleep(0.02)
        raise AssertionError(f"the broker's log does not say {words!r}")

    def member(self) -> Member:
        """Join, as an honest client does."""
        return Member(self)


class Member:
    """A client that has joined, and is given tasks like all others."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.session = uuid.uuid4().hex[:12]
        self.run_id = ""
        self._reads = field.connect()
        self._consume()
        self._until(m.Welcome)

    def _consume(self) -> None:
        """The server makes the inbox when it hears us."""
        for number in range(2, 200):
            self.field.say(m.Join(client_id=self.field.who, session=self.session))
            self._reads.open_channel(number)
            self._reads.send(commands.Basic.Consume(queue=inbox(self.field.who), no_ack=True), channel=number)
            try:
                self._reads.expect(commands.Basic.ConsumeOk)
            except Refused:
                self._reads.send(commands.Channel.CloseOk(), channel=number)
                time.sleep(0.05)
            else:
                return
        raise AssertionError("the server makes no inbox")

    def _until(self, kind: Any, fits: Callable[[Any], bool] = lambda _: True) -> Any:
        while True:
            message = decode(self._reads.body())
            self.run_id = getattr(message, "run_id", self.run_id)
            if isinstance(message, kind) and fits(message):
                return message

    def task(self) -> m.FitTask:
        """The next fit task."""
        task: m.FitTask = self._until(m.FitTask)
        return task

    def evaluate_task(self) -> m.EvaluateTask:
        """The next one; it fails to fit until then, for whoever trains is not asked to evaluate."""
        while True:
            task = self._until((m.FitTask, m.EvaluateTask))
            if isinstance(task, m.EvaluateTask):
                return task
            self.field.say(
                m.TaskFailed(client_id=self.field.who, task_id=task.task_id, run_id=self.run_id, reason="no")
            )

    def verdict(self, task_id: str) -> m.Receipt | m.Refusal:
        """What became of an update."""
        verdict: m.Receipt | m.Refusal = self._until(m.Receipt | m.Refusal, lambda said: said.task_id == task_id)
        return verdict

    def update(self, task_id: str, tensors: Tensors | None = None, **fields: Any) -> list[m.Update | m.Part]:
        """An update as the wire has it: by default one that would be folded."""
        outgoing = Outgoing(tensors if tensors is not None else honest_delta(), fields.pop("part_bytes", 1 << 16))
        payloads = [b"".join(outgoing.part(index)) for index in range(outgoing.parts)]
        head = m.Update(
            client_id=self.field.who,
            task_id=task_id,
            run_id=self.run_id,
            transfer=uuid.uuid4().hex,
            version=0,
            num_examples=10,
            metrics={},
            schema=outgoing.schema,
            part_bytes=outgoing.part_bytes,
            checksum=checksum(payloads[0]),
            payload=payloads[0],
        )
        head = replace(head, **fields)
        rest = [
            m.Part(transfer=head.transfer, index=index, checksum=checksum(payload), payload=payload)
            for index, payload in enumerate(payloads)
        ]
        return [head, *rest[1:]]

    def send(self, task_id: str, tensors: Tensors | None = None, **fields: Any) -> None:
        """Send such an update."""
        for message in self.update(task_id, tensors, **fields):
            self.field.say(message, UPDATES)


def honest_delta(value: float = 0.001) -> Tensors:
    """A delta of the right shape."""
    return {"w": np.full(field_app.MODEL_BYTES // 4, value, np.float32)}

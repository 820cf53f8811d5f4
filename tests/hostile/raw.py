"""AMQP 0-9-1 as somebody writes it who keeps to no manners: a blocking socket and frames made by hand.

`python -m tests.hostile.raw URL EXCHANGE BODIES_FOLDER SECONDS [CONNECTIONS]` floods an exchange with one message.
"""

from __future__ import annotations

import itertools
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import SplitResult, unquote, urlsplit

from pamqp import commands, frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader

_FRAME_BYTES = 131_072
_FRAME_EXTRA = 8  # type, channel, size and end
_BLOCK_BYTES = 1 << 18


class RawConnection:
    """One connection to the broker, up to `Connection.OpenOk` and one open channel.

    Args:
        url: whom to log in as, and where.
        heartbeat_s: what is agreed on; 0 asks for none.
    """

    def __init__(self, url: str, *, heartbeat_s: int = 0) -> None:
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname or "", parts.port or 5672), timeout=20)
        self._buffer = b""
        try:
            self._log_in(parts, heartbeat_s)
        except BaseException:
            self.socket.close()
            raise

    def _log_in(self, parts: SplitResult, heartbeat_s: int) -> None:
        self.socket.sendall(ProtocolHeader().marshal())
        self.expect(commands.Connection.Start)
        login = f"\0{unquote(parts.username or '')}\0{unquote(parts.password or '')}"
        self.send(commands.Connection.StartOk(mechanism="PLAIN", response=login, client_properties={}), channel=0)
        tune = self.expect(commands.Connection.Tune)
        self.send(commands.Connection.TuneOk(tune.channel_max, _FRAME_BYTES, heartbeat_s), channel=0)
        self.send(commands.Connection.Open(unquote(parts.path.removeprefix("/"))), channel=0)
        self.expect(commands.Connection.OpenOk)
        self.open_channel(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, method: Any, channel: int = 1) -> None:
        self.socket.sendall(frame.marshal(method, channel))

    def open_channel(self, number: int) -> None:
        self.send(commands.Channel.Open(), channel=number)
        self.expect(commands.Channel.OpenOk)

    def receive(self) -> Any:
        """The next frame's content. Raises `ConnectionError` at the end of the connection."""
        while True:
            size = _FRAME_EXTRA + int.from_bytes(self._buffer[3:7], "big")
            if len(self._buffer) >= max(size, _FRAME_EXTRA):
                raw, self._buffer = self._buffer[:size], self._buffer[size:]
                return frame.unmarshal(raw)[2]
            more = self.socket.recv(1 << 20)
            if not more:
                raise ConnectionError("the broker hung up")
            self._buffer += more

    def expect(self, kind: Any) -> Any:
        """The next frame of this kind, or of several; what the broker closes with instead is raised as `Refused`."""
        while True:
            found = self.receive()
            if isinstance(found, kind):
                return found
            if isinstance(found, commands.Channel.Close | commands.Connection.Close):
                raise Refused(f"{found.reply_code} {found.reply_text}")

    def body(self) -> bytes:
        """The next delivered message."""
        self.expect(commands.Basic.Deliver)
        size, body = self.expect(ContentHeader).body_size, b""
        while len(body) < size:
            body += self.expect(ContentBody).value
        return body

    def refusal(self) -> str:
        """What the broker says when it closes the channel or the connection."""
        try:
            while True:
                self.expect(commands.Basic.Nack)
        except Refused as refused:
            return str(refused)
        except ConnectionError as exc:
            return str(exc)

    def publish(self, exchange: str, routing_key: str, body: bytes, **properties: Any) -> None:
        self.socket.sendall(message(exchange, routing_key, body, **properties))


class Refused(Exception):
    """The broker's own words."""


def message(exchange: str, routing_key: str, body: bytes, channel: int = 1, **properties: Any) -> bytes:
    """One whole publication as it goes over the wire."""
    method = commands.Basic.Publish(exchange=exchange, routing_key=routing_key)
    head = ContentHeader(body_size=len(body), properties=commands.Basic.Properties(**properties))
    pieces = [frame.marshal(method, channel), frame.marshal(head, channel)]
    room = _FRAME_BYTES - 8
    pieces += [frame.marshal(ContentBody(body[at : at + room]), channel) for at in range(0, len(body), room)]
    return b"".join(pieces)


def flood(
    url: str,
    exchange: str,
    bodies: Sequence[bytes],
    *,
    seconds: float = 1e9,
    most: int = sys.maxsize,
    stop: threading.Event | None = None,
    routing_key: str | None = None,
    is_anonymous: bool = False,
) -> int:
    """Publish these bodies again and again over one connection, as fast as the broker reads; returns how many."""
    user = unquote(urlsplit(url).username or "")
    key = user.partition(".")[2] if routing_key is None else routing_key
    over_at = time.monotonic() + seconds
    sent = 0
    with RawConnection(url) as connection:
        for block, count in itertools.cycle(_blocks(exchange, key, bodies, None if is_anonymous else user)):
            if time.monotonic() > over_at or sent >= most or (stop is not None and stop.is_set()):
                return sent
            try:
                connection.socket.sendall(block)
            except TimeoutError:
                return sent
            sent += count
    raise AssertionError("the cycle never ends")


def _blocks(exchange: str, key: str, bodies: Sequence[bytes], user: str | None) -> list[tuple[bytes, int]]:
    """The messages, put together so that one call of the kernel takes many small ones."""
    blocks: list[tuple[bytes, int]] = []
    pieces: list[bytes] = []
    times = max(1, min(256, _BLOCK_BYTES // sum(len(body) + 100 for body in bodies)))
    for body in itertools.chain(*itertools.repeat(bodies, times)):
        pieces.append(message(exchange, key, body, user_id=user))
        if sum(map(len, pieces)) >= _BLOCK_BYTES or len(pieces) >= 256:
            blocks.append((b"".join(pieces), len(pieces)))
            pieces = []
    return blocks + ([(b"".join(pieces), len(pieces))] if pieces else [])


def _main(url: str, exchange: str, folder: str, seconds: str, connections: str = "1") -> None:
    bodies = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    threads = [
        threading.Thread(target=flood, args=(url, exchange, bodies), kwargs={"seconds": float(seconds)})
        for _ in range(int(connections))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    _main(*sys.argv[1:])

"""A TCP proxy in front of a port, which is slow, breaks off or falls silent on command."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

_CHUNK = 1 << 16
_QUEUED_CHUNKS = 64


class Proxy:
    """Listens on `port`, forwards to 127.0.0.1:`target`; an async context manager.

    `latency_s` and `bandwidth` (bytes per second, each way and connection; None: no bound) may be set at any time, and
    hold for what is read from then on.
    """

    def __init__(self, target: int) -> None:
        self.latency_s = 0.0
        self.bandwidth: float | None = None
        self.port = 0
        self._target = target
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self._swallows_new = False

    def __repr__(self) -> str:
        return f"<Proxy {self.port} -> {self._target}, {len(self._pairs)} connections>"

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.refuse()
        self.reset()
        for pair in list(self._pairs):
            await asyncio.wait([pair.task])

    def through(self, url: str) -> str:
        """`url`, led through this proxy."""
        parts = urlsplit(url)
        return parts._replace(netloc=f"{parts.netloc.rpartition(':')[0]}:{self.port}").geturl()

    @property
    def num_connections(self) -> int:
        return len(self._pairs)

    def reset(self) -> None:
        """Break all connections off with RST, both ways; what is under way is lost."""
        for pair in list(self._pairs):
            pair.reset()

    def half_open(self, *, up: bool = True, down: bool = True) -> None:
        """Let nothing through any more on the connections there are (`up`: to the target), and keep them open.

        Not even an end comes through: neither side learns that the other is gone. New connections work.
        """
        for pair in self._pairs:
            pair.hold(up=up, down=down)

    def black_hole(self) -> None:
        """As `half_open`, and new connections are accepted and never answered."""
        self._swallows_new = True
        self.half_open()

    def heal(self) -> None:
        """Let through again, also what was held back meanwhile, as TCP does after an interruption."""
        self._swallows_new = False
        for pair in self._pairs:
            pair.release()

    def refuse(self) -> None:
        """Refuse new connections; those there are go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """Accept new connections, again on the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        pair = _Pair(self, task, reader, writer)
        self._pairs.add(pair)
        if self._swallows_new:
            pair.hold(up=True, down=True)
        try:
            await pair.forward(self._target)
        except asyncio.CancelledError:
            pass  # by reset(): the end of this connection, and of nothing else
        finally:
            self._pairs.discard(pair)


class _Pair:
    """One connection to the proxy, and its counterpart to the target."""

    def __init__(
        self, proxy: Proxy, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.task = task
        self._proxy = proxy
        self._reader = reader
        self._writers = [writer]
        self._up, self._down = asyncio.Event(), asyncio.Event()
        self.release()

    def hold(self, *, up: bool, down: bool) -> None:
        if up:
            self._up.clear()
        if down:
            self._down.clear()

    def release(self) -> None:
        self._up.set()
        self._down.set()

    def reset(self) -> None:
        for writer in self._writers:
            sock: socket.socket | None = writer.get_extra_info("socket")
            if sock is not None and not writer.transport.is_closing():
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends RST
            writer.transport.abort()
        self.task.cancel()

    async def forward(self, target: int) -> None:
        try:
            await self._up.wait()
            reader, writer = await asyncio.open_connection("127.0.0.1", target)
            self._writers.append(writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(self._reader, writer, self._up))
                both.create_task(self._pump(reader, self._writers[0], self._down))
        except* OSError:
            self.reset()
        finally:
            for each in self._writers:
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        """Read and write side by side, so that latency delays but does not slow down."""
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED_CHUNKS)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._write(chunks, writer, gate))
            with contextlib.suppress(OSError):  # an end is passed on behind what came before it
                while chunk := await reader.read(_CHUNK):
                    await chunks.put((asyncio.get_running_loop().time() + self._proxy.latency_s, chunk))
            await chunks.put((0.0, b""))

    async def _write(
        self, chunks: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, gate: asyncio.Event
    ) -> None:
        while True:
            due, chunk = await chunks.get()
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            await gate.wait()
            if not chunk:
                writer.close()
                return
            if self._proxy.bandwidth is not None:
                await asyncio.sleep(len(chunk) / self._proxy.bandwidth)
            writer.write(chunk)
            await writer.drain()

"""A federation of one server and many client processes on one machine, over a private broker or a given one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fedbus.api import serve
from fedbus.app import App, load_app
from fedbus.bus.node import PrivateNode
from fedbus.errors import AppError, RunFailed
from fedbus.observe import events as o
from fedbus.server.history import History

T = TypeVar("T")

_STOP_PATIENCE_S = 10.0


class ClientProcesses:
    """Client processes forked from one nursery; made by `client_processes`."""

    def __init__(self, process: asyncio.subprocess.Process, reference: str, log_dir: Path) -> None:
        self._process = process
        self._reference = reference
        self._log_dir = log_dir
        self._pids: dict[str, int] = {}
        self._loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._changed = asyncio.Condition()
        self._exit_codes: dict[str, int] = {}
        self._is_ended = False

    def __repr__(self) -> str:
        return f"<ClientProcesses {len(self._pids)} running>"

    async def load(self) -> None:
        """Wait until the app is imported. Raises `AppError` when it cannot be."""
        await self._tell(load={"app": self._reference})
        await self._loaded

    async def spawn(self, client_id: str, *, broker: str, partition: int, num_partitions: int) -> None:
        """Fork one more client; its output goes to CLIENT_ID.log in the log folder."""
        await self._tell(
            spawn={
                "client_id": client_id,
                "partition": partition,
                "num_partitions": num_partitions,
                "broker": broker,
                "log": os.fspath(self._log_dir / f"{client_id}.log"),
            }
        )
        async with self._changed:
            await self._changed.wait_for(
                lambda: client_id in self._pids or client_id in self._exit_codes or self._is_ended
            )
        if self._is_ended:
            raise RunFailed("the process that starts the clients died")

    def kill(self, client_id: str) -> None:
        """SIGKILL, as a crash or the kernel's memory killer would."""
        os.kill(self._pids[client_id], signal.SIGKILL)

    async def all_exited(self) -> None:
        """Wait until no client runs any more."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._pids or self._is_ended)

    async def any_exited(self) -> None:
        """Wait until a client has ended, or the process that starts them."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._exit_codes or self._is_ended)

    async def _tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise RunFailed("the process that starts the clients died") from exc

    async def listen(self) -> None:
        """Take in what the nursery says, until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            words = json.loads(line)
            async with self._changed:
                self._take(words)
                self._changed.notify_all()
        async with self._changed:
            self._is_ended = True
            self._changed.notify_all()
        if not self._loaded.done():
            self._loaded.set_exception(AppError(f"importing {self._reference} ended the process that did it"))

    def _take(self, words: dict[str, Any]) -> None:
        if "spawned" in words:
            self._pids[words["spawned"]] = words["pid"]
        elif "exited" in words:
            self._pids.pop(words["exited"], None)
            self._exit_codes[words["exited"]] = words["code"]
        elif "failed" in words and not self._loaded.done():
            self._loaded.set_exception(AppError(words["failed"]))
        elif not self._loaded.done():
            self._loaded.set_result(None)

    def close_stdin(self) -> None:
        """The nursery's signal to end its clients and itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()


@asynccontextmanager
async def client_processes(reference: str, *, log_dir: Path) -> AsyncIterator[ClientProcesses]:
    """Client processes of the app that `reference` names; whoever still runs at the end of the context is ended."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fedbus.simulation.nursery",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C at the terminal reaches the server, which tells the clients
    )
    clients = ClientProcesses(process, reference, log_dir)
    listening = asyncio.create_task(clients.listen())
    try:
        yield clients
    finally:
        clients.close_stdin()
        try:
            async with asyncio.timeout(_STOP_PATIENCE_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        await listening
        if clients._loaded.done() and not clients._loaded.cancelled():
            clients._loaded.exception()  # nobody may have waited for it


@asynccontextmanager
async def broker_or_private(broker: str | None) -> AsyncIterator[str]:
    """The URL given, or that of a private node which lives as long as the context."""
    if broker is not None:
        yield broker
        return
    async with PrivateNode() as node:
        yield node.url


def client_names(count: int) -> list[str]:
    """client-01, client-02, ...: as many digits as the last one needs, two at least."""
    width = max(2, len(str(count)))
    return [f"client-{number:0{width}d}" for number in range(1, count + 1)]


async def run_federation(
    reference: str,
    load: Callable[[], App],
    *,
    num_clients: int,
    num_partitions: int | None = None,
    broker: str | None,
    run_dir: Path,
    observers: Sequence[o.Observe],
    director: Director | None = None,
) -> History:
    """Run the app with `num_clients` client processes, to its end.

    `load` makes the same app as `reference`, in this process, for the server; it runs beside the start of the
    broker and the nursery. `director` may interfere: it is how the demo kills a client and adds another.
    """
    num_partitions = num_partitions or num_clients
    async with (
        client_processes(reference, log_dir=run_dir / "logs") as clients,
        contextlib.AsyncExitStack() as stack,
    ):
        url, app, _ = await _all(
            stack.enter_async_context(broker_or_private(broker)), asyncio.to_thread(load), clients.load()
        )
        names = client_names(num_clients)
        closing = asyncio.Event()

        def watch(event: object) -> None:
            if isinstance(event, o.RunClosing):
                closing.set()

        told = [*observers, watch, *([director.observe] if director else [])]
        serving = asyncio.create_task(serve(app, broker=url, run_dir=run_dir, observers=told))
        try:
            if director is not None:
                director.begin(clients, url, num_partitions)
            for partition, name in enumerate(names):
                await clients.spawn(name, broker=url, partition=partition, num_partitions=num_partitions)
            watching = asyncio.create_task(_fail_when_deserted(clients, closing))
            await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await watching
            watching.cancel()
            history = await serving
        finally:
            serving.cancel()
            await asyncio.wait([serving])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_PATIENCE_S):
                await clients.all_exited()
        return history


async def query_federation(
    reference: str,
    ask: Callable[[App, str], Coroutine[Any, Any, T]],
    *,
    num_clients: int,
    broker: str | None,
    log_dir: Path,
) -> T:
    """What `ask(app, broker)` finds out among `num_clients` client processes, which end with it."""
    async with (
        client_processes(reference, log_dir=log_dir) as clients,
        contextlib.AsyncExitStack() as stack,
    ):
        url, app, _ = await _all(
            stack.enter_async_context(broker_or_private(broker)),
            asyncio.to_thread(load_app, reference),
            clients.load(),
        )
        asking = asyncio.create_task(ask(app, url))
        try:
            for partition, name in enumerate(client_names(num_clients)):
                await clients.spawn(name, broker=url, partition=partition, num_partitions=num_clients)
            watching = asyncio.create_task(_fail_when_deserted(clients, asyncio.Event()))
            await asyncio.wait({asking, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                await watching
            watching.cancel()
            return await asking
        finally:
            asking.cancel()
            await asyncio.wait([asking])


async def _fail_when_deserted(clients: ClientProcesses, closing: asyncio.Event) -> None:
    await clients.all_exited()
    await asyncio.sleep(1)  # what the server has to say comes first
    if closing.is_set():
        await asyncio.Event().wait()  # they were sent home
    raise RunFailed(f"every client process has ended; their last words are in {clients._log_dir}")


async def _all(*awaitables: Any) -> tuple[Any, ...]:
    """gather, but the others are cancelled when one fails."""
    tasks = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            if not task.cancelling():  # twice would interrupt the first one's cleaning up
                task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # the first one is raised already


class Director:
    """Interferes with a federation while it runs."""

    def begin(self, clients: ClientProcesses, broker: str, num_partitions: int) -> None:
        """Called before the first client is spawned."""
        self.clients, self.broker, self.num_partitions = clients, broker, num_partitions

    def observe(self, event: object) -> None:
        """Called with each of the server's events."""


def new_run_dir(base: Path = Path("fedbus-runs")) -> Path:
    """A folder named by the time, not made yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = base / stamp
    suffix = 1
    while path.exists():
        suffix += 1
        path = base / f"{stamp}-{suffix}"
    return path

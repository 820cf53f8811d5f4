"""The calls that people make: serve, join, simulate and their blocking twins."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fedbus.app import App
from fedbus.bus.rabbitmq import connect, redacted
from fedbus.client.runtime import ClientRuntime
from fedbus.config import check_client_id
from fedbus.errors import RunFailed
from fedbus.observe import events as o
from fedbus.server.history import History
from fedbus.server.runtime import Server


async def serve(
    app: App, *, broker: str, run_dir: Path | str | None = None, observers: Sequence[o.Observe] = ()
) -> History:
    """Run the server of `app` against the broker URL `broker`, to the end of its rounds.

    In the main thread SIGTERM and Ctrl-C end the run gracefully: a commit under way is finished, clients are told.
    `run_dir` receives history.json and model.safetensors.

    Raises:
        ConfigError: for a URL or a run folder that cannot be used.
        BrokerError: when the broker cannot be reached, refuses us, or goes away.
        RunFailed: when the run was stopped, or no update was ever accepted.
    """
    async with await connect(broker, name="fedbus server") as bus:
        _tell(observers, o.ConnectedToBroker(broker=redacted(broker), role="server"))
        server = Server(app, bus, run_dir=None if run_dir is None else Path(run_dir), observers=observers)
        with on_signals(lambda name: server.request_stop(f"stopped by {name}")):
            return await server.run()


async def join(
    app: App,
    *,
    broker: str,
    client_id: str,
    partition: int = 0,
    num_partitions: int = 1,
    observers: Sequence[o.Observe] = (),
) -> bool:
    """Take part in the run on the broker URL `broker` as `client_id`, waiting for its server if need be.

    True when the run finished, False when it was asked to leave (SIGTERM or Ctrl-C in the main thread).

    Raises:
        ConfigError: for a URL or a client id that cannot be used.
        BrokerError: when the broker cannot be reached, refuses us, or goes away; `QueueBusy` for a taken id.
        RunFailed: when the server ended the run early.
    """
    check_client_id(client_id)
    async with await connect(broker, name=f"fedbus client {client_id}") as bus:
        _tell(observers, o.ConnectedToBroker(broker=redacted(broker), role="client"))
        client = ClientRuntime(
            app, bus, client_id=client_id, partition=partition, num_partitions=num_partitions, observers=observers
        )
        with on_signals(lambda _: client.request_leave()):
            ended = await client.run()
    if ended is not None and not ended.finished:
        raise RunFailed(f"the server ended the run early: {ended.reason}")
    return ended is not None


def start_server(
    app: App, *, broker: str, run_dir: Path | str | None = None, observers: Sequence[o.Observe] = ()
) -> History:
    """`serve`, blocking."""
    return asyncio.run(serve(app, broker=broker, run_dir=run_dir, observers=observers))


def start_client(
    app: App,
    *,
    broker: str,
    client_id: str,
    partition: int = 0,
    num_partitions: int = 1,
    observers: Sequence[o.Observe] = (),
) -> bool:
    """`join`, blocking."""
    return asyncio.run(
        join(
            app,
            broker=broker,
            client_id=client_id,
            partition=partition,
            num_partitions=num_partitions,
            observers=observers,
        )
    )


@contextlib.contextmanager
def on_signals(stop: Callable[[str], None]) -> Iterator[None]:
    """Call `stop(name)` at the first SIGTERM or SIGINT; a second one has its old effect. Main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def once(number: signal.Signals) -> None:
        for each in signals:
            loop.remove_signal_handler(each)
        stop("Ctrl-C" if number is signal.SIGINT else number.name)

    for number in signals:
        loop.add_signal_handler(number, once, number)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _tell(observers: Sequence[o.Observe], event: object) -> None:
    for observe in observers:
        observe(event)

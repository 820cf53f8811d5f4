"""The calls that people make: serve, join, work and their blocking twins."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fedbus.app import App
from fedbus.bus.access import Access
from fedbus.bus.rabbitmq import connect_supervised
from fedbus.bus.supervised import LinkState
from fedbus.client.memory import ClientMemory
from fedbus.client.runtime import ClientRuntime
from fedbus.config import check_client_id, parse_virtual_id
from fedbus.errors import ConfigError, RunFailed
from fedbus.observe import events as o
from fedbus.observe.watch import watching
from fedbus.server.history import History
from fedbus.server.runtime import Server
from fedbus.worker.runtime import WorkerRuntime


async def serve(
    app: App,
    *,
    broker: str | Access,
    run_dir: Path | str | None = None,
    resume: bool = False,
    virtual_clients: int = 0,
    keeps_clients: bool = False,
    observers: Sequence[o.Observe] = (),
    metrics: str | None = None,
) -> History:
    """Run the server of `app` against `broker`, a URL or an `Access`, to the end of its rounds.

    In the main thread SIGTERM and Ctrl-C end the run gracefully: a commit under way is finished, clients are told.
    `run_dir` receives the ledger, history.json and model.safetensors. With `resume` the run that is in it goes on from
    its last commit, whatever became of its server; where there is none, one begins. At `metrics` ("[HOST:]PORT") it
    serves /metrics for Prometheus, /healthz and /livez.
    `keeps_clients`: at the end clients are told to wait for the next run, in place of being sent home.
    `virtual_clients`: so many clients are enrolled, whose tasks are done by whatever workers there are (see `work`).

    Raises:
        ConfigError: for a URL, a run folder or an address that cannot be used.
        BrokerError: when the broker cannot be reached or refuses us; one that goes away later is waited for.
        RunFailed: when the run was stopped, or no update was ever accepted, or another server took it over.
    """
    if resume and run_dir is None:
        raise ConfigError("resume needs the run_dir of the run that is to go on")
    server: Server | None = None

    def on_state(state: LinkState) -> None:
        _tell(observers, _link_event(state))
        if state.kind == "lost" and server is not None:
            server.connection_lost()
        if state.kind == "restored" and server is not None:
            server.connection_restored()

    async with watching("server", metrics, observers) as watch:
        observers = [*observers, *watch.observers]
        async with await connect_supervised(broker, name="fedbus server", on_state=on_state) as bus:
            _tell(observers, o.ConnectedToBroker(broker=bus.broker, role="server"))
            folder = None if run_dir is None else Path(run_dir)
            server = Server(
                app,
                bus,
                run_dir=folder,
                resume=resume,
                virtual_clients=virtual_clients,
                keeps_clients=keeps_clients,
                observers=observers,
            )
            watch.read(server.figures)
            watch.look_at(bus)
            with on_signals(lambda name: server.request_stop(f"stopped by {name}")):
                return await server.run()


async def join(
    app: App,
    *,
    broker: str | Access,
    client_id: str,
    partition: int = 0,
    num_partitions: int = 1,
    state_dir: Path | str | None = None,
    observers: Sequence[o.Observe] = (),
    metrics: str | None = None,
) -> bool:
    """Take part in the run on `broker`, a URL or an `Access`, as `client_id`, waiting for its server if need be.

    True when the run finished, False when it was asked to leave (SIGTERM or Ctrl-C in the main thread). At `metrics`
    ("[HOST:]PORT") it serves /metrics for Prometheus, /healthz and /livez. What the client remembers from one task to
    the next (`ClientContext.memory`) lies in `state_dir`, and so outlives the process; without it, in memory.

    Raises:
        ConfigError: for a URL, a state folder, a client id or an address that cannot be used.
        BrokerError: when the broker cannot be reached or refuses us (one that goes away later is waited for);
            `QueueBusy` for a taken id.
        RunFailed: when the server ended the run early.
    """
    check_client_id(client_id)
    if parse_virtual_id(client_id) is not None:
        raise ConfigError(f"{client_id} is the name of a virtual client, which workers play: take another id")

    memory = ClientMemory(None if state_dir is None else Path(state_dir) / client_id)

    def on_state(state: LinkState) -> None:
        _tell(observers, _link_event(state))

    async with watching("client", metrics, observers) as watch:
        observers = [*observers, *watch.observers]
        async with await connect_supervised(broker, name=f"fedbus client {client_id}", on_state=on_state) as bus:
            _tell(observers, o.ConnectedToBroker(broker=bus.broker, role="client"))
            client = ClientRuntime(
                app,
                bus,
                client_id=client_id,
                partition=partition,
                num_partitions=num_partitions,
                memory=memory,
                observers=observers,
            )
            watch.read(client.figures)
            with on_signals(lambda _: client.request_leave()):
                ended = await client.run()
    if ended is not None and not ended.finished:
        raise RunFailed(f"the server ended the run early: {ended.reason}")
    return ended is not None


async def work(
    app: App,
    *,
    broker: str | Access,
    slots: int = 1,
    grace_s: float = 30.0,
    until_idle_s: float | None = None,
    observers: Sequence[o.Observe] = (),
    metrics: str | None = None,
) -> int:
    """Do tasks of virtual clients on `broker`, a URL or an `Access`, waiting for a server with such clients if need be.

    `slots` tasks at a time, each in a thread of its own: more than one where the code waits, or leaves the interpreter
    to others, as a GPU or numpy does; for more Python start more workers. The number of tasks that were answered, once
    none has come for `until_idle_s`; without it, or before, at SIGTERM or Ctrl-C (in the main thread): then what is in
    hand is finished within `grace_s`, or given back to the other workers. At `metrics` ("[HOST:]PORT") it
    serves /metrics for Prometheus, /healthz and /livez.

    Raises:
        ConfigError: for a URL, a number of slots or an address that cannot be used.
        BrokerError: when the broker cannot be reached or refuses us; one that goes away later is waited for.
    """

    def on_state(state: LinkState) -> None:
        _tell(observers, _link_event(state))

    async with watching("worker", metrics, observers) as watch:
        observers = [*observers, *watch.observers]
        async with await connect_supervised(broker, name="fedbus worker", on_state=on_state) as bus:
            _tell(observers, o.ConnectedToBroker(broker=bus.broker, role="worker"))
            worker = WorkerRuntime(
                app, bus, slots=slots, grace_s=grace_s, until_idle_s=until_idle_s, observers=observers
            )
            watch.read(worker.figures)
            with on_signals(lambda name: worker.request_stop(f"stopped by {name}")):
                return await worker.run()


P = ParamSpec("P")
T = TypeVar("T")


def blocking(function: Callable[P, Coroutine[Any, Any, T]], name: str) -> Callable[P, T]:
    """`function` for those who have no event loop, under another name."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return asyncio.run(function(*args, **kwargs))

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`{function.__name__}`, blocking."
    return call


start_server = blocking(serve, "start_server")
start_client = blocking(join, "start_client")
start_worker = blocking(work, "start_worker")


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


def _link_event(state: LinkState) -> object:
    match state.kind:
        case "lost":
            return o.BrokerLost(broker=state.broker, reason=state.reason)
        case "restored":
            return o.BrokerRestored(broker=state.broker, outage_s=state.outage_s)
        case "blocked":
            return o.BrokerBlocked(broker=state.broker, reason=state.reason)
        case "unblocked":
            return o.BrokerUnblocked(broker=state.broker, outage_s=state.outage_s)


def _tell(observers: Sequence[o.Observe], event: object) -> None:
    for observe in observers:
        observe(event)

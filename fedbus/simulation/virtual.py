"""A federation in virtual time: the real server and clients over the memory bus, in one thread, without any waiting.

Nobody sends heartbeats: in a thousand hours they would be nearly all there is to do. The simulation knows who is gone,
and tells the server when that client's lease has run out.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from fedbus.api import on_signals
from fedbus.app import App
from fedbus.bus.memory import MemoryBroker, MemoryBus
from fedbus.errors import ConfigError, leaf
from fedbus.observe import events as o
from fedbus.server.history import History
from fedbus.server.runtime import Server
from fedbus.simulation.habits import habits_of
from fedbus.simulation.processes import client_names
from fedbus.simulation.virtual_client import InlineCaller, VirtualClient
from fedbus.simulation.virtual_loop import FOREVER_S, VirtualLoop
from fedbus.simulation.virtual_time import VirtualTime
from fedbus.training.base import ClientContext

STARTED_AT: Final = "1970-01-01T00:00:00+00:00"
"""Virtual time begins at 0, whenever it is run: the same seed gives the same history."""

_NEVER_S: Final = 16 * FOREVER_S
"""Of this the server waits for an eighth between two echoes, and for a quarter between two looks at stalled uploads."""


def simulate(
    app: App,
    *,
    num_clients: int,
    virtual: VirtualTime,
    run_dir: Path | str | None = None,
    observers: Sequence[o.Observe] = (),
) -> History:
    """Run `app` with `num_clients` clients in virtual time, to the end of its rounds.

    Clients are client-01, client-02, ..., each with its partition. What takes time is what `virtual` says: fits,
    evaluations, the clients' roads; all else happens at once. The history's times are virtual seconds. The same app,
    number of clients and settings give the same history again, if the app's code does the same again.

    Blocks; works in a notebook, too. In the main thread SIGTERM and Ctrl-C end the run gracefully.

    Raises:
        ConfigError: for settings, traces or a run folder that cannot be used.
        RunFailed: when the run was stopped, no update was ever accepted, or nothing can happen any more.
    """
    _check(app, num_clients, virtual)
    simulation = _Simulation(app, num_clients, virtual, None if run_dir is None else Path(run_dir), observers)
    if not _is_loop_running():
        return simulation.run()
    with ThreadPoolExecutor(1, "fedbus-simulate") as pool:
        pending = pool.submit(simulation.run)
        try:
            return pending.result()
        except KeyboardInterrupt:
            simulation.stop("stopped by Ctrl-C")
            raise


def _check(app: App, num_clients: int, virtual: VirtualTime) -> None:
    if not isinstance(app, App):
        raise ConfigError(f"simulate takes an App, not {app!r}")
    if not isinstance(virtual, VirtualTime):
        raise ConfigError(f"virtual must be a VirtualTime(...), not {virtual!r}")
    if isinstance(num_clients, bool) or not isinstance(num_clients, int) or num_clients < 1:
        raise ConfigError(f"num_clients must be a whole number of 1 or more, not {num_clients!r}")
    if app.rounds.start_clients > num_clients:
        raise ConfigError(
            f"the app waits for {app.rounds.start_clients} clients before its first round: "
            f"simulate {app.rounds.start_clients} or more, or lower min_fit_clients"
        )


def _is_loop_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _Simulation:
    def __init__(
        self, app: App, num_clients: int, virtual: VirtualTime, run_dir: Path | None, observers: Sequence[o.Observe]
    ) -> None:
        self._app = app
        self._virtual = virtual
        self._run_dir = run_dir
        self._observers = observers
        self._names = client_names(num_clients)
        self._habits = habits_of(virtual, self._names)
        self._clients: list[VirtualClient] = []
        self._server: Server | None = None
        self._loop: VirtualLoop | None = None

    def run(self) -> History:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            try:
                return runner.run(self._run())
            except ExceptionGroup as group:
                exc = leaf(group)
                raise exc from exc.__cause__ or group

    def stop(self, reason: str) -> None:
        """End the run early; from any thread."""
        if self._loop is not None and self._server is not None:
            with contextlib.suppress(RuntimeError):  # it has just ended
                self._loop.call_soon_threadsafe(self._server.request_stop, reason)

    async def _run(self) -> History:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        broker = MemoryBroker(clock=loop.time)
        async with broker.connect("server") as bus, asyncio.TaskGroup() as group:
            server = self._server = self._make_server(bus)
            self._clients = [self._make_client(broker, server, n) for n in range(len(self._names))]
            loop.on_standstill = lambda: server.request_stop(self._standstill(loop.time()))
            with on_signals(lambda name: server.request_stop(f"stopped by {name}")):
                lives = [group.create_task(client.live()) for client in self._clients]
                history = await server.run()
                for life in lives:
                    life.cancel()
        return history

    def _make_server(self, bus: MemoryBus) -> Server:
        rounds = self._app.rounds
        silent = dataclasses.replace(rounds, heartbeat_s=_NEVER_S / 8, lease_s=_NEVER_S)
        server = Server(
            dataclasses.replace(self._app, rounds=silent),
            bus,
            run_dir=self._run_dir,
            observers=self._observers,
            stalled_after_s=_NEVER_S,
            look_every_s=math.inf,
            run_id=f"virtual-{self._virtual.seed}",
            caller=InlineCaller(),
            settings={
                "heartbeat_s": rounds.heartbeat_s,
                "lease_s": rounds.lease_s,
                "virtual_time": {"num_clients": len(self._names), **dataclasses.asdict(self._virtual)},
            },
        )
        server.history.started_at = STARTED_AT
        return server

    def _make_client(self, broker: MemoryBroker, server: Server, partition: int) -> VirtualClient:
        name = self._names[partition]
        context = ClientContext(client_id=name, partition=partition, num_partitions=len(self._names))
        return VirtualClient(
            self._app,
            broker,
            context,
            self._habits[name],
            seed=self._virtual.seed,
            tell_lost=server.client_lost,
        )

    def _standstill(self, seconds: float) -> str:
        there = sum(client.is_there for client in self._clients)
        return (
            f"the simulation stands still at {seconds:.0f} s: everybody waits, {there} of {len(self._clients)} clients "
            "are there, and nobody else will ever come"
        )

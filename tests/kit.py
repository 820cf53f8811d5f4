"""A federation in one event loop, over the memory bus: for tests that play a story with real server and clients."""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedbus.app import App
from fedbus.bus.base import Bus
from fedbus.bus.memory import MemoryBroker, MemoryBus
from fedbus.bus.supervised import LinkState, SupervisedBus, no_observer
from fedbus.bus.topology import DEAD, UPDATES
from fedbus.client.memory import ClientMemory
from fedbus.client.runtime import ClientRuntime
from fedbus.config import RoundConfig
from fedbus.observe import events as o
from fedbus.server.history import History
from fedbus.server.runtime import Server
from fedbus.training.base import Client, ClientContext, NumPyClient
from fedbus.types import Array, Config, EvaluateResult, FitResult, Scalar, Tensors
from fedbus.wire.arrays import Schema
from fedbus.wire.messages import RunEnded
from fedbus.wire.transfer import PART_BYTES, Outgoing, part_count
from fedbus.worker.runtime import WorkerRuntime

T = TypeVar("T")


def pack(tensors: Tensors) -> tuple[Schema, memoryview]:
    """The schema of `tensors` and their payload in one run of bytes."""
    outgoing = Outgoing(tensors)
    return outgoing.schema, memoryview(b"".join(buffer for i in range(outgoing.parts) for buffer in outgoing.part(i)))


def cut(payload: memoryview, part_bytes: int = PART_BYTES) -> list[memoryview]:
    """The parts of `payload`."""
    return [payload[i * part_bytes : (i + 1) * part_bytes] for i in range(part_count(payload.nbytes, part_bytes))]


HEART_DISEASE = Path(
    os.environ.get("FEDBUS_HEART_DISEASE") or Path(__file__).parents[1].parent / "shared/data/heart_disease"
)
"""The files of `fedbus.data.heart_disease`, which come with no package: tests that need them skip without."""

QUICK: dict[str, Any] = {"num_rounds": 2, "heartbeat_s": 0.05, "lease_s": 2.0, "timeout_s": 30.0}
"""Round settings for tests: short heartbeats, no short timeouts."""


class AddingClient(NumPyClient):
    """Adds its own number (the digits of its name) to every tensor, and has ten times as many examples."""

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        self.number = int("".join(filter(str.isdigit, context.client_id)) or 1)

    def get_parameters(self, config: dict[str, Scalar]) -> list[Array]:
        return [np.full(3, self.number, np.float32)]

    def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> tuple[list[Array], int, dict[str, Scalar]]:
        return [value + value.dtype.type(self.number) for value in parameters], 10 * self.number, {"n": self.number}

    def evaluate(self, parameters: list[Array], config: dict[str, Scalar]) -> tuple[float, int, dict[str, Scalar]]:
        return float(parameters[0].mean()), self.number, {"half": 0.5}


async def eventually(condition: Callable[[], bool]) -> None:
    """Let others run until `condition` holds."""
    async with asyncio.timeout(20):
        for _ in itertools.count():
            if condition():
                return
            await asyncio.sleep(0)


class Gate:
    """Clients whose fit waits until the gate is opened; with `only` that client alone, with `in_round` that round."""

    def __init__(self, only: str | None = None, in_round: int | None = None) -> None:
        self._only = only
        self._in_round = in_round
        self._opened = threading.Event()

    def open(self) -> None:
        self._opened.set()

    def client_fn(self, context: ClientContext) -> NumPyClient:
        gate = self

        class Waiting(AddingClient):
            def fit(
                self, parameters: list[Array], config: dict[str, Scalar]
            ) -> tuple[list[Array], int, dict[str, Scalar]]:
                if gate._only in (None, self.context.client_id) and gate._in_round in (None, config["round"]):
                    gate._opened.wait(30)
                return super().fit(parameters, config)

        return Waiting(context)


class Counting:
    """Makes clients whose step is a function of (client, round) alone, and counts how often each was asked for one."""

    def __init__(self, size: int = 3) -> None:
        self.size = size
        self.asked: Counter[tuple[str, int]] = Counter()
        self.hooks: list[Callable[[str, int], object]] = []
        """Called in the client's thread, with its id and the round, before it trains."""
        self.evaluate_hooks: list[Callable[[str, int], object]] = []

    def client_fn(self, context: ClientContext) -> Client:
        counting = self

        class Stepping(Client):
            def get_parameters(self) -> Tensors:
                return {"w": np.zeros(counting.size, np.float32)}

            def fit(self, parameters: Tensors, config: Config) -> FitResult:
                round_ = int(str(config["round"]))
                counting.asked[context.client_id, round_] += 1
                for hook in counting.hooks:
                    hook(context.client_id, round_)
                rng = np.random.default_rng([*context.client_id.encode(), round_])
                step = rng.normal(size=counting.size).astype(np.float32)
                return FitResult(
                    parameters={"w": parameters["w"] + step}, num_examples=int(rng.integers(1, 100)), metrics={}
                )

            def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
                for hook in counting.evaluate_hooks:
                    hook(context.client_id, int(str(config["round"])))
                return EvaluateResult(loss=float(np.abs(parameters["w"]).mean()), num_examples=1, metrics={})

        return Stepping()

    def app(self, *, num_clients: int = 3, num_rounds: int = 4, **settings: Any) -> App:
        """An app in which every client is in every round, unless `settings` say otherwise."""
        rounds = {"num_rounds": num_rounds, "min_fit_clients": num_clients, "fraction_evaluate": 0}
        settings.setdefault("initial_parameters", {"w": np.zeros(self.size, np.float32)})
        return app_of(self.client_fn, **{**settings, "rounds": {**rounds, **settings.get("rounds", {})}})


class Pause:
    """A place where whoever comes by stops for ever, until it is told to go on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reached = asyncio.Event()
        self._released = threading.Event()
        self._released_here = asyncio.Event()

    async def reached(self) -> None:
        async with asyncio.timeout(20):
            await self._reached.wait()

    def go_on(self) -> None:
        self._released.set()
        self._released_here.set()

    async def here(self) -> None:
        """Stop the task that comes by."""
        self._reached.set()
        await self._released_here.wait()

    def in_thread(self) -> None:
        """Stop the thread that comes by."""
        self._loop.call_soon_threadsafe(self._reached.set)
        assert self._released.wait(30)


def app_of(client_fn: Callable[[ClientContext], Any] = AddingClient, **settings: Any) -> App:
    """An app with a model of one tensor of zeros, float32 [3], quick rounds, and whatever else is given."""
    rounds = RoundConfig(**{**QUICK, **settings.pop("rounds", {})})
    settings.setdefault("initial_parameters", {"w": np.zeros(3, np.float32)})
    return App(client_fn=client_fn, rounds=rounds, **settings)


class Federation:
    """A memory broker with the parties that a test starts on it, and every event that they told."""

    def __init__(self, app: App, *, run_dir: Path | None = None, supervised: bool = False) -> None:
        self.app = app
        self.run_dir = run_dir
        self.supervised = supervised
        self.wrap: Callable[[str, MemoryBus], Bus] = lambda user, bus: bus
        """What each connection of a user becomes."""
        self.broker = MemoryBroker()
        self.events: list[object] = []
        self.server: Server | None = None
        self.server_bus: Bus | None = None
        self.serving: asyncio.Task[History] | None = None
        self.all_buses: list[Bus] = []
        self.links: dict[str, MemoryBus] = {}
        self.may_connect: dict[str, asyncio.Event] = {}
        self.clients: dict[str, ClientRuntime] = {}
        self.workers: dict[str, WorkerRuntime] = {}
        self.buses: dict[str, Bus] = {}
        self.tasks: list[asyncio.Task[Any]] = []
        self._told = asyncio.Event()

    def observe(self, event: object) -> None:
        self.events.append(event)
        self._told.set()

    def connect(
        self, user: str, on_state: Callable[[LinkState], None] = no_observer, *, login: str | None = None
    ) -> Bus:
        """A connection of `user` (`login`: its name on the broker), which comes back by itself when supervised."""
        may_connect = self.may_connect[user] = asyncio.Event()
        may_connect.set()

        def one() -> Bus:
            self.links[user] = self.broker.connect(login or user)
            return self.wrap(user, self.links[user])

        async def reconnect() -> Bus:
            await may_connect.wait()
            return one()

        bus = one()
        if self.supervised:
            bus = SupervisedBus(
                bus, reconnect, on_state=on_state, pause_s=0.002, longest_pause_s=0.02, busy_patience_s=0.1
            )
        self.all_buses.append(bus)
        return bus

    def cut_off(self, user: str) -> asyncio.Event:
        """End the connection of `user`; it is let back once the event is set."""
        may_connect = self.may_connect[user]
        may_connect.clear()
        self.links[user].drop()
        return may_connect

    def start_server(self, run_dir: Path | None = None, **options: Any) -> asyncio.Task[History]:
        server: Server | None = None

        def on_state(state: LinkState) -> None:
            if state.kind == "lost" and server is not None:
                server.connection_lost()
            if state.kind == "restored" and server is not None:
                server.connection_restored()

        self.server_bus = self.connect("server", on_state)
        folder = run_dir or self.run_dir
        server = Server(self.app, self.server_bus, run_dir=folder, observers=[self.observe], **options)
        self.server = server
        self.serving = self._start(self.server.run())
        return self.serving

    async def kill_server(self) -> None:
        """End the server as SIGKILL does: no goodbye, and its connection is gone."""
        assert self.serving is not None
        assert self.server_bus is not None
        self.serving.cancel()
        await asyncio.wait([self.serving])
        await self.server_bus.close()

    def resume_server(self, **options: Any) -> asyncio.Task[History]:
        """Start another server on the run of the last one."""
        return self.start_server(resume=True, **options)

    def start_client(
        self, client_id: str, app: App | None = None, *, memory: ClientMemory | None = None
    ) -> asyncio.Task[RunEnded | None]:
        self.buses[client_id] = self.connect(client_id)
        self.clients[client_id] = ClientRuntime(
            app or self.app, self.buses[client_id], client_id=client_id, observers=[self.observe], memory=memory
        )
        return self._start(self.clients[client_id].run())

    def start_worker(self, name: str, app: App | None = None, **options: Any) -> asyncio.Task[int]:
        """A worker, which the broker knows as "worker" like all others."""
        self.buses[name] = self.connect(name, login="worker")
        self.workers[name] = WorkerRuntime(app or self.app, self.buses[name], observers=[self.observe], **options)
        return self._start(self.workers[name].run())

    def _start(self, story: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(story)
        self.tasks.append(task)
        return task

    async def kill(self, client_id: str, task: asyncio.Task[Any]) -> None:
        """End a client or worker as SIGKILL does: no goodbye, and its connection is gone."""
        task.cancel()
        await asyncio.wait([task])
        await self.buses[client_id].close()

    async def run(self, *client_ids: str) -> History:
        """Server and these clients, to the end."""
        serving = self.start_server()
        tasks = [self.start_client(client_id) for client_id in client_ids]
        history = await serving
        await asyncio.gather(*tasks)
        return history

    def told(self, kind: type[T], /, **fields: object) -> list[T]:
        """The events of one kind, and with these fields."""
        return [event for event in self.events if isinstance(event, kind) and _fits(event, fields)]

    async def until(self, kind: type[T], count: int = 1, /, **fields: object) -> T:
        """Wait until `count` such events have been told; the last of them."""
        async with asyncio.timeout(20):
            while len(found := self.told(kind, **fields)) < count:
                self._told.clear()
                await self._told.wait()
        return found[count - 1]

    def model(self) -> dict[str, Array]:
        assert self.server is not None
        assert self.server.model is not None
        return dict(self.server.model)

    def bits(self) -> bytes:
        """The bytes of the current model."""
        return b"".join(value.tobytes() for value in self.model().values())

    def check_whole(
        self, history: History, clients: Sequence[str], num_rounds: int, *, with_copies: bool = False
    ) -> None:
        """Every client's update is in every round once, has its receipt, and has left the broker.

        `with_copies`: a part whose confirm was lost may come again after the server has gone.
        """
        assert history.finished
        assert [record.round for record in history.rounds] == list(range(1, num_rounds + 1))
        for record in history.rounds:
            assert sorted(update.client_id for update in record.folded) == sorted(clients)
        tasks = sorted(f"{history.run_id}/fit/{n}/{client}" for n in range(1, num_rounds + 1) for client in clients)
        if self.run_dir is not None:
            assert folded_in(self.run_dir) == tasks
        receipts = {(event.client_id, event.round) for event in self.told(o.ReceiptArrived) if event.round}
        assert receipts == {(client, n) for n in range(1, num_rounds + 1) for client in clients}
        assert self.told(o.RefusalArrived) == []
        assert self.told(o.MessageRejected) == []
        assert self.broker.depth(DEAD) == 0
        assert with_copies or self.broker.depth(UPDATES) == 0


def _fits(event: object, fields: dict[str, object]) -> bool:
    return all(getattr(event, name) == value for name, value in fields.items())


def folded_in(run_dir: Path) -> list[str]:
    """The task ids whose updates the ledger says are folded, sorted."""
    db = sqlite3.connect(run_dir / "ledger.sqlite")
    try:
        return [row[0] for row in db.execute("SELECT task_id FROM folded ORDER BY task_id")]
    finally:
        db.close()


@asynccontextmanager
async def federation(app: App, *, run_dir: Path | None = None, supervised: bool = False) -> AsyncIterator[Federation]:
    """A `Federation` whose tasks end with the context."""
    story = Federation(app, run_dir=run_dir, supervised=supervised)
    try:
        async with asyncio.timeout(60):
            yield story
    finally:
        for task in story.tasks:
            task.cancel()
        await asyncio.gather(*story.tasks, return_exceptions=True)
        for bus in story.all_buses:
            await bus.close()


def weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean, by hand."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

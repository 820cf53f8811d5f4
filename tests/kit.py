"""A federation in one event loop, over the memory bus: for tests that play a story with real server and clients."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedbus.app import App
from fedbus.bus.base import Bus
from fedbus.bus.memory import MemoryBroker
from fedbus.client.runtime import ClientRuntime
from fedbus.config import RoundConfig
from fedbus.server.history import History
from fedbus.server.runtime import Server
from fedbus.training.base import ClientContext, NumPyClient
from fedbus.types import Array, Scalar, Tensors
from fedbus.wire.arrays import Schema
from fedbus.wire.messages import RunEnded
from fedbus.wire.transfer import PART_BYTES, Outgoing, part_count

T = TypeVar("T")


def pack(tensors: Tensors) -> tuple[Schema, memoryview]:
    """The schema of `tensors` and their payload in one run of bytes."""
    outgoing = Outgoing(tensors)
    return outgoing.schema, memoryview(b"".join(buffer for i in range(outgoing.parts) for buffer in outgoing.part(i)))


def cut(payload: memoryview, part_bytes: int = PART_BYTES) -> list[memoryview]:
    """The parts of `payload`."""
    return [payload[i * part_bytes : (i + 1) * part_bytes] for i in range(part_count(payload.nbytes, part_bytes))]


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


def app_of(client_fn: Callable[[ClientContext], Any] = AddingClient, **settings: Any) -> App:
    """An app with a model of one tensor of zeros, float32 [3], quick rounds, and whatever else is given."""
    rounds = RoundConfig(**{**QUICK, **settings.pop("rounds", {})})
    settings.setdefault("initial_parameters", {"w": np.zeros(3, np.float32)})
    return App(client_fn=client_fn, rounds=rounds, **settings)


class Federation:
    """A memory broker with the parties that a test starts on it, and every event that they told."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.broker = MemoryBroker()
        self.events: list[object] = []
        self.server: Server | None = None
        self.server_bus: Bus | None = None
        self.clients: dict[str, ClientRuntime] = {}
        self.buses: dict[str, Bus] = {}
        self.tasks: list[asyncio.Task[Any]] = []
        self._told = asyncio.Event()

    def observe(self, event: object) -> None:
        self.events.append(event)
        self._told.set()

    def start_server(self, run_dir: Path | None = None, **options: Any) -> asyncio.Task[History]:
        self.server_bus = self.broker.connect("server")
        self.server = Server(self.app, self.server_bus, run_dir=run_dir, observers=[self.observe], **options)
        return self._start(self.server.run())

    def start_client(self, client_id: str, app: App | None = None) -> asyncio.Task[RunEnded | None]:
        self.buses[client_id] = self.broker.connect(client_id)
        self.clients[client_id] = ClientRuntime(
            app or self.app, self.buses[client_id], client_id=client_id, observers=[self.observe]
        )
        return self._start(self.clients[client_id].run())

    def _start(self, story: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(story)
        self.tasks.append(task)
        return task

    async def kill(self, client_id: str, task: asyncio.Task[Any]) -> None:
        """End a client as SIGKILL does: no goodbye, and its connection is gone."""
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


def _fits(event: object, fields: dict[str, object]) -> bool:
    return all(getattr(event, name) == value for name, value in fields.items())


@asynccontextmanager
async def federation(app: App) -> AsyncIterator[Federation]:
    """A `Federation` whose tasks end with the context."""
    story = Federation(app)
    try:
        async with asyncio.timeout(60):
            yield story
    finally:
        for task in story.tasks:
            task.cancel()
        await asyncio.gather(*story.tasks, return_exceptions=True)


def weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean, by hand."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

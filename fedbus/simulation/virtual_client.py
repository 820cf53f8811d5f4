"""One simulated client: the real client runtime, whose work takes virtual time, and which comes and goes."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from fedbus.app import App
from fedbus.bus.memory import MemoryBroker
from fedbus.client.memory import ClientMemory
from fedbus.client.runtime import ClientRuntime
from fedbus.clock import now
from fedbus.simulation.habits import Habits
from fedbus.training.base import Client, ClientContext, NumPyClient
from fedbus.types import Array, Tensors
from fedbus.wire.arrays import schema_of
from fedbus.wire.compression import PLAIN, Codec
from fedbus.wire.transfer import Outgoing

T = TypeVar("T")


class InlineCaller:
    """Calls the user's code at once, on the event loop: a `Caller` whose calls take no virtual time."""

    async def call(self, what: str, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`, or what it raised (SystemExit as RuntimeError)."""
        try:
            return function(*args)
        except SystemExit as exc:  # it ends that task, not the simulation
            raise RuntimeError(f"SystemExit: {exc}") from exc

    def interrupt(self) -> None:
        """Nothing: no call is ever under way when somebody else's turn is."""

    def close(self) -> None:
        """Nothing is open."""


class VirtualCaller(InlineCaller):
    """Calls a client's code after the virtual seconds that the call takes.

    First they pass, then the function is called: so it can see what has happened meanwhile
    (`ClientContext.cancelled`). The model's way to the client is part of them, and the update's way from it follows.
    """

    def __init__(self, habits: Habits, model_codec: Codec = PLAIN) -> None:
        self._habits = habits
        self._model_codec = model_codec
        self._tasks = self._fits = 0
        self._fetched: weakref.ref[Array] | None = None
        self._passing: asyncio.Future[None] | None = None
        self._is_interrupted = False
        self.vanished: asyncio.Future[float] | None = None
        """Given the time at which the client is back when it vanishes; nothing that it does counts any more."""

    async def call(self, what: str, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`, or what it raised."""
        if what not in ("fit", "evaluate"):
            return await super().call(what, function, *args)
        task, self._tasks = self._tasks, self._tasks + 1
        self._is_interrupted = False
        seconds = self._fetch_s(_model_among(args))
        if what == "evaluate":
            await self._pass(seconds + self._habits.evaluate_s(task))
            return await super().call(what, function, *args)
        fit, self._fits = self._fits, self._fits + 1
        await self._train(task, seconds + self._habits.fit_s(task, fit))
        result = await super().call(what, function, *args)
        await self._pass(self._habits.upload_s(_nbytes(result)))
        return result

    async def _train(self, task: int, seconds: float) -> None:
        share = self._habits.drops_out_after(task)
        if share is None:
            await self._pass(seconds)
            return
        await self._pass(share * seconds)
        if not self._is_interrupted:
            assert self.vanished is not None
            _resolve(self.vanished, now() + self._habits.downtime_s(task))
            await asyncio.get_running_loop().create_future()  # until it is cancelled

    def interrupt(self) -> None:
        """The call that is under way takes no more time."""
        self._is_interrupted = True
        if self._passing is not None:
            _resolve(self._passing, None)

    async def _pass(self, seconds: float) -> None:
        if seconds <= 0 or self._is_interrupted:
            return
        loop = asyncio.get_running_loop()
        passing = self._passing = loop.create_future()
        timer = loop.call_later(seconds, _resolve, passing, None)
        try:
            await passing
        finally:
            timer.cancel()
            self._passing = None

    def _fetch_s(self, model: Tensors) -> float:
        """Nothing for a model that is here already: then the reader gives the very same arrays again."""
        first = next(iter(model.values()))
        if self._fetched is not None and self._fetched() is first:
            return 0.0
        self._fetched = weakref.ref(first)
        nbytes = sum(value.nbytes for value in model.values())
        if self._model_codec.is_lossy:
            nbytes = self._model_codec.most_bytes(schema_of(model))
        return self._habits.download_s(nbytes)

    def forget_model(self) -> None:
        """The client was gone: the model must be fetched again."""
        self._fetched = None


def _resolve(future: asyncio.Future[T], value: T) -> None:
    if not future.done():
        future.set_result(value)


def _model_among(args: tuple[Any, ...]) -> Tensors:
    """The model that a fit or an evaluation is given; its config holds no arrays."""
    mappings = (arg for arg in args if isinstance(arg, Mapping))
    return next(arg for arg in mappings if any(isinstance(value, np.ndarray) for value in arg.values()))


def _nbytes(result: object) -> int:
    """Payload bytes of the update that a fit of the runtime returned, among other things."""
    return sum(part.nbytes for part in result if isinstance(part, Outgoing)) if isinstance(result, tuple) else 0


class VirtualClient:
    """A client that takes part whenever it is there.

    Args:
        app: its `client_fn` is called once, however often the client comes back.
        broker: where it meets the server.
        tell_lost: called with (client_id, reason) when it has been gone for its lease.
    """

    def __init__(
        self,
        app: App,
        broker: MemoryBroker,
        context: ClientContext,
        habits: Habits,
        *,
        seed: int,
        tell_lost: Callable[[str, str], None],
    ) -> None:
        self._app = dataclasses.replace(app, client_fn=self._user_client)
        self._client_fn = app.client_fn
        self._made: Client | NumPyClient | None = None
        self._broker = broker
        self._context = context
        self._habits = habits
        self._caller = VirtualCaller(habits, app.model_codec)
        self._memory = ClientMemory()
        self._jitter = random.Random(f"{seed}/{context.client_id}/jitter")
        self._tell_lost = tell_lost
        self._lease: asyncio.TimerHandle | None = None
        self.is_there = False

    def __repr__(self) -> str:
        return f"<VirtualClient {self._context.client_id}{'' if self.is_there else ' away'}>"

    def _user_client(self, context: ClientContext) -> Client | NumPyClient:
        if self._made is None:
            self._made = self._client_fn(context)
        return self._made

    async def live(self) -> None:
        """Come and go until the run is over, or for the last time."""
        back_at = 0.0
        for start, end in self._habits.presence():
            while (begin := max(start, back_at)) < end:
                await asyncio.sleep(begin - now())
                back_at = await self._take_part(end)
                if back_at == math.inf:  # the run is over, and presence may go on for ever
                    return

    async def _take_part(self, until: float) -> float:
        """One life of the client's process; when the next one may begin, inf when the run is over."""
        loop = asyncio.get_running_loop()
        vanished: asyncio.Future[float] = loop.create_future()
        self._caller.vanished = vanished
        self._caller.forget_model()
        leaving = loop.call_at(until, _resolve, vanished, until)
        self._come()
        async with self._broker.connect(self._context.client_id) as bus:
            runtime = ClientRuntime(
                self._app,
                bus,
                client_id=self._context.client_id,
                context=self._context,
                caller=self._caller,
                memory=self._memory,
                jitter=self._jitter,
            )
            running = asyncio.create_task(runtime.run())
            ends: list[asyncio.Future[Any]] = [running, vanished]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                running.cancel()
                await asyncio.wait([running])
        if not running.cancelled():
            running.result()  # raises what ended it
            return math.inf
        self._go()
        return vanished.result()

    def _come(self) -> None:
        self.is_there = True
        if self._lease is not None:
            self._lease.cancel()

    def _go(self) -> None:
        """Without a word, so the server knows it by the end of the lease."""
        self.is_there = False
        lease_s = self._app.rounds.lease_s
        tell = (self._context.client_id, f"silent for {lease_s:.1f} s")
        self._lease = asyncio.get_running_loop().call_later(lease_s, self._tell_lost, *tell)

"""Keeping an eye on a process: its metrics and its health at an address, where that is asked for.

async with watching("server", "9100", observers) as watch:
    ... run with [*observers, *watch.observers]; then watch.read(server.figures), watch.look_at(bus)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from fedbus.bus.base import Bus
from fedbus.bus.topology import CONTROL, DEAD, MODEL, UPDATES, WORK
from fedbus.errors import BrokerDenied, BrokerError, ConfigError, QueueMissing
from fedbus.observe import events as o
from fedbus.observe.endpoint import Endpoint, Page
from fedbus.observe.health import BEAT_S, Health

if TYPE_CHECKING:
    from fedbus.observe.metrics import Metrics

T = TypeVar("T")

QUEUES: Final = (CONTROL, UPDATES, WORK, DEAD, MODEL)
LOOK_EVERY_S: Final = 5.0
_FIRST_LOOK_S: Final = 1.0
"""Then a server has declared its queues."""
_ABSENT_LOOKS: Final = 12
"""A queue that is not there is asked for again after so many looks: each time is an error in the broker's log."""
_SCRAPE_PATIENCE_S: Final = 1.0


class Watch:
    """What nobody watches: it takes what it is given, and does nothing with it."""

    observers: Sequence[o.Observe] = ()

    def read(self, figures: Callable[[], Any]) -> None:
        """Take figures from here at each scrape, called on this event loop.

        They are those of `fedbus.observe.figures` that belong to the role, or None while there are none.
        """

    def look_at(self, bus: Bus) -> None:
        """Tell the depth of the queues from now on, asked for over `bus`."""


@asynccontextmanager
async def watching(
    role: Literal["server", "client", "worker"], address: str | None, observers: Iterable[o.Observe] = ()
) -> AsyncIterator[Watch]:
    """Serve /metrics, /healthz and /livez at `address` ("[HOST:]PORT", None: nowhere) for the time of the context.

    `observers` are told where. Raises `ConfigError` where the address cannot be had or prometheus-client is missing.
    """
    if address is None:
        yield Watch()
        return
    health = Health()
    watch = _Watch(role, health, _metrics(role, health))
    with Endpoint(address, watch.pages()) as endpoint:
        for observe in observers:
            observe(o.MetricsExposed(url=f"{endpoint.url}/metrics"))
        async with watch.running():
            yield watch


def _metrics(role: Literal["server", "client", "worker"], health: Health) -> Metrics:
    try:
        from fedbus.observe.metrics import ClientMetrics, ServerMetrics, WorkerMetrics
    except ModuleNotFoundError as exc:
        if (exc.name or "").split(".")[0] != "prometheus_client":
            raise
        raise ConfigError("metrics need the package prometheus-client: pip install 'fedbus[metrics]'") from exc
    return {"server": ServerMetrics, "client": ClientMetrics, "worker": WorkerMetrics}[role](health)


class _Watch(Watch):
    def __init__(self, role: str, health: Health, metrics: Metrics) -> None:
        self._role = role
        self._health = health
        self._metrics = metrics
        self._began_at = time.monotonic()
        self._looking: asyncio.Task[None] | None = None
        self.observers = (health.observe, metrics.observe)

    def pages(self) -> dict[str, Callable[[], Page]]:
        return {
            "/metrics": self._show_metrics,
            "/healthz": lambda: self._show_health(self._health.problem()),
            "/livez": lambda: self._show_health(self._health.loop_problem()),
        }

    def _show_metrics(self) -> Page:
        from fedbus.observe.metrics import CONTENT_TYPE

        return Page(status=200, content_type=CONTENT_TYPE, body=self._metrics.text())

    def _show_health(self, problem: str) -> Page:
        words = {
            "status": "unhealthy" if problem else "ok",
            **({"reason": problem} if problem else {}),
            "role": self._role,
            "broker_connected": self._health.is_connected,
            "event_loop_silence_s": round(self._health.silence_s, 3),
            "uptime_s": round(time.monotonic() - self._began_at, 3),
        }
        body = json.dumps(words).encode() + b"\n"
        return Page(status=503 if problem else 200, content_type="application/json", body=body)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        beating = asyncio.create_task(self._beat(), name="fedbus watch beat")
        try:
            yield
        finally:
            tasks = [beating, *filter(None, (self._looking,))]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _beat(self) -> None:
        while True:
            self._health.beat()
            due = time.monotonic() + BEAT_S
            await asyncio.sleep(BEAT_S)
            self._metrics.lagged(time.monotonic() - due)

    def read(self, figures: Callable[[], Any]) -> None:
        self._metrics.figures = _Latest(asyncio.get_running_loop(), figures)

    def look_at(self, bus: Bus) -> None:
        self._looking = asyncio.create_task(self._look(bus), name="fedbus watch queues")

    async def _look(self, bus: Bus) -> None:
        due = dict.fromkeys(QUEUES, 0)  # queue -> looks until it is asked for
        await asyncio.sleep(_FIRST_LOOK_S)
        while True:
            for name in due:
                due[name] = max(0, due[name] - 1) or await self._look_at_queue(bus, name)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look_at_queue(self, bus: Bus, name: str) -> int:
        """Note how it is; for how many looks it need not be asked for."""
        try:
            self._metrics.queue(name, await bus.queue_state(name))
        except (QueueMissing, BrokerDenied):
            self._metrics.queue(name, None)
            return _ABSENT_LOOKS
        except BrokerError:
            self._metrics.queue(name, None)  # nobody knows: its node is away
        return 0


class _Latest(Generic[T]):
    """What a function of an event loop gives, asked for by another thread; the last answer while that loop hangs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, source: Callable[[], T]) -> None:
        self._loop = loop
        self._source = source
        self._last = source()

    def __call__(self) -> T:
        answered = threading.Event()

        def answer() -> None:
            self._last = self._source()
            answered.set()

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(answer)
            answered.wait(_SCRAPE_PATIENCE_S)
        return self._last

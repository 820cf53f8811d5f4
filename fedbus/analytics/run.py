"""Queries against a broker: a server whose rounds are questions, and whose clients stay for the next one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

from fedbus.analytics.inquiry import Inquiry
from fedbus.analytics.result import QueryResult
from fedbus.analytics.statistics import Statistic
from fedbus.analytics.strategy import QueryStrategy
from fedbus.api import blocking, on_signals
from fedbus.app import App
from fedbus.bus.access import Access
from fedbus.bus.base import Bus
from fedbus.bus.rabbitmq import connect_supervised
from fedbus.bus.supervised import LinkState
from fedbus.clock import now
from fedbus.config import RoundConfig
from fedbus.errors import ConfigError, RunFailed
from fedbus.observe import events as o
from fedbus.server.runtime import Server
from fedbus.strategies.metrics import weighted_mean

_GATHER_S = 6.5
"""Clients without a server ask for one every 6 s, or more often: by now all have."""
_MOST_ROUNDS = 1_000_000


async def query(
    app: App,
    *,
    broker: str | Access,
    ask: Statistic | Sequence[Statistic],
    by: str | None = None,
    min_clients: int = 2,
    min_count: int = 5,
    wait_for: int | None = None,
    timeout_s: float = 60.0,
    virtual_clients: int = 0,
    observers: Sequence[o.Observe] = (),
) -> QueryResult:
    """Ask the clients of `app` that are on `broker` about their data (`Client.query`), of which only sums are sent.

    It takes the place of a server, and the clients wait for the next one afterwards. Whoever is killed meanwhile has
    `timeout_s`, or the lease, to come back; without it all begins anew among the others, so that all figures are those
    of the same clients.

    Args:
        ask: what to find out: `Mean("age")`, `Quantiles("age", [0.1, 0.9])`, `Describe()`, ...
        by: a column of few values: all is found out for each of its 32 most frequent values, too.
        min_clients: what fewer clients contribute to is not shown. It protects clients from those who read the result,
            not from whoever runs the query, whose server sees the sums of each.
        min_count: clients leave out cells (bins, values, groups, columns) of fewer records than this, so that those
            counts are lower bounds. Extremes and quantiles are values of single records all the same.
        wait_for: begin once so many clients are there; None: after 6.5 s, by when all have come that wait for a server.
        timeout_s: how long to wait for clients, and then for the answers to each question.
        virtual_clients: so many clients are enrolled, whose tasks are done by workers (`work`); all of them are waited
            for.

    Raises:
        ConfigError: for what cannot be asked.
        BrokerError: when the broker cannot be reached, `QueueBusy` when a server runs on it.
        RunFailed: when too few clients came or answered, or no client has such a column.
    """
    statistics = list(ask) if isinstance(ask, Sequence) else [ask]
    inquiry = Inquiry(statistics, by=by, min_clients=min_clients, min_count=min_count)
    session: QuerySession | None = None

    def on_state(state: LinkState) -> None:
        if session is not None and state.kind == "lost":
            session.server.connection_lost()
        if session is not None and state.kind == "restored":
            session.server.connection_restored()

    async with await connect_supervised(broker, name="fedbus query", on_state=on_state) as bus:
        session = QuerySession(
            app,
            bus,
            inquiry,
            wait_for=wait_for,
            timeout_s=timeout_s,
            virtual_clients=virtual_clients,
            observers=observers,
        )
        with on_signals(lambda name: session.stop(f"stopped by {name}")):
            return await session.run()


run_query = blocking(query, "run_query")


class QuerySession:
    """One inquiry over `bus`; the arguments are those of `query`."""

    def __init__(
        self,
        app: App,
        bus: Bus,
        inquiry: Inquiry,
        *,
        wait_for: int | None = None,
        timeout_s: float = 60.0,
        virtual_clients: int = 0,
        observers: Sequence[o.Observe] = (),
    ) -> None:
        self._inquiry = inquiry
        self._least = max(inquiry.min_clients, virtual_clients, wait_for or 0)
        is_open = wait_for is None and not virtual_clients
        self._gather_s = min(_GATHER_S, timeout_s) if is_open else 0.0
        self._timeout_s = timeout_s
        self._observers = tuple(observers)
        self._here: set[str] = set()
        self._changed = asyncio.Event()
        self._began_at = 0.0
        self._stopping = ""
        self._loop = asyncio.get_running_loop()
        strategy = QueryStrategy(inquiry, self._end)
        self.server = Server(
            _as_query(app, strategy, inquiry, timeout_s),
            bus,
            keeps_clients=True,
            virtual_clients=virtual_clients,
            before_first_round=self._gather,
            observers=[*observers, self._observe],
        )

    def stop(self, reason: str) -> None:
        """End without a result."""
        self._stopping = reason
        self._changed.set()
        self.server.request_stop(reason)

    async def run(self) -> QueryResult:
        """The result. Raises `RunFailed` where there is none."""
        try:
            await self.server.run()
        except RunFailed as exc:
            if self._inquiry.failure is not None:
                raise self._inquiry.failure from None
            if self._inquiry.result is None:
                raise RunFailed(self._stopping or str(exc)) from exc
        assert self._inquiry.result is not None, "the rounds do not run out"
        return dataclasses.replace(self._inquiry.result, seconds=now() - self._began_at)

    async def _gather(self) -> None:
        """Wait for the clients."""
        if self._gather_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._gather_s):
                    await self._until(lambda: False)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timeout_s - self._gather_s):
                await self._until(lambda: len(self._here) >= self._least)
        if len(self._here) < self._least and not self._stopping:
            count = len(self._here)
            who = "one client" if count == 1 else f"{count or 'no'} clients"
            self._inquiry.fail(f"{who} came within {self._timeout_s:g} s, {self._least} must be there")
            self._end()
        self._began_at = now()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self._stopping:
            await self._changed.wait()
            self._changed.clear()

    def _end(self) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self.server.request_stop, "the query is over")

    def _observe(self, event: object) -> None:
        match event:
            case o.MemberJoined():
                self._here.add(event.client_id)
                self._changed.set()
            case o.MemberLost():
                self._here.discard(event.client_id)
                self._inquiry.note(event.client_id, "it went away")
            case o.FitFailed() | o.UpdateRefused():
                self._inquiry.note(event.client_id, event.reason)
            case o.RoundClosed() if not event.folded and not self._inquiry.is_done:
                self._inquiry.fail("nobody answered" if event.cohort else "all clients went away")
                self._end()
            case _:
                pass


def _as_query(app: App, strategy: QueryStrategy, inquiry: Inquiry, timeout_s: float) -> App:
    """An app with the same clients and queues, whose rounds wait for all who are there; nothing is evaluated."""
    if not (math.isfinite(timeout_s) and timeout_s > 0):
        raise ConfigError(f"timeout_s must be a positive number of seconds, not {timeout_s}")
    rounds = RoundConfig(
        num_rounds=_MOST_ROUNDS,
        min_fit_clients=1,
        grace_s=math.inf,
        fraction_evaluate=0,
        max_staleness=0,
        timeout_s=timeout_s,
        heartbeat_s=app.rounds.heartbeat_s,
        lease_s=app.rounds.lease_s,
    )
    return dataclasses.replace(
        app,
        strategy=strategy,
        rounds=rounds,
        initial_parameters=inquiry.question.tensors(),
        evaluate_fn=None,
        after_evaluation=(),
        aggregate_fit_metrics=weighted_mean,
        fit_config={},
        evaluate_config={},
    )

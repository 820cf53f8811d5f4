"""What chance and the traces make of each simulated client: how long its tasks take, and when it is there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from fedbus.errors import ConfigError
from fedbus.simulation.chance import exponential, lognormal, uniform
from fedbus.simulation.traces import read_presence, read_speeds
from fedbus.simulation.virtual_time import Lognormal, OnOff, Trace, VirtualTime

Span: TypeAlias = tuple[float, float]


class Habits:
    """One client's; its tasks are counted from 0, evaluations among them.

    Args:
        fits: seconds of its fits, one after the other and from the first again; empty: `virtual.speeds` draws them.
        spans: when it is there; None: `virtual.availability` draws them.
    """

    def __init__(
        self, virtual: VirtualTime, client_id: str, *, fits: Sequence[float] = (), spans: Sequence[Span] | None = None
    ) -> None:
        self._virtual = virtual
        self._key = (virtual.seed, client_id)
        self._fits = fits
        self._spans = spans
        speeds, road = virtual.speed_model, virtual.road
        self._speeds = speeds if isinstance(speeds, Lognormal) else Lognormal()
        self._slowness = lognormal(self._speeds.sigma, *self._key, "speed")
        self._down = self._up = math.inf
        if road is not None:
            factor = lognormal(virtual.bandwidth_spread, *self._key, "bandwidth")
            self._down, self._up = factor * road.down, factor * road.up

    def fit_s(self, task: int, fit: int) -> float:
        """Seconds of task `task`, which is fit number `fit`."""
        if self._fits:
            return self._fits[fit % len(self._fits)]
        return self._virtual.fit_s * self._factor(task)

    def evaluate_s(self, task: int) -> float:
        """Seconds of task `task`, an evaluation."""
        return self._virtual.evaluate_s * self._factor(task)

    def _factor(self, task: int) -> float:
        return self._slowness * lognormal(self._speeds.jitter, *self._key, "jitter", task)

    def download_s(self, nbytes: int) -> float:
        """Seconds that so many bytes take to the client."""
        return nbytes / self._down

    def upload_s(self, nbytes: int) -> float:
        """Seconds that so many bytes take from the client."""
        return nbytes / self._up

    def drops_out_after(self, task: int) -> float | None:
        """The share of task `task` after which the client vanishes; None: it does not."""
        if uniform(*self._key, "dropout", task) >= self._virtual.dropout:
            return None
        return uniform(*self._key, "instant", task)

    def downtime_s(self, task: int) -> float:
        """Seconds that the client is away after it vanished in task `task`."""
        return exponential(self._virtual.downtime_s, *self._key, "downtime", task)

    def presence(self) -> Iterator[Span]:
        """When the client is there: spans (start, end) in seconds of the run, in order."""
        if self._spans is not None:
            return iter(self._spans)
        model = self._virtual.availability_model
        return self._drawn_presence(model) if isinstance(model, OnOff) else iter([(0.0, math.inf)])

    def _drawn_presence(self, model: OnOff) -> Iterator[Span]:
        """On and off by turns; at 0 on with the share of time that it is on, for exponential times have no memory."""
        turn, time = 0, 0.0
        is_on = uniform(*self._key, "on") < model.on_s / (model.on_s + model.off_s)
        while True:
            start = time
            time += exponential(model.on_s if is_on else model.off_s, *self._key, "presence", turn)
            if is_on:
                yield start, time
            turn, is_on = turn + 1, not is_on


def habits_of(virtual: VirtualTime, clients: Sequence[str]) -> dict[str, Habits]:
    """The habits of each of the clients. Raises `ConfigError` when a trace cannot be read, or lacks one of them."""
    speeds, availability = virtual.speed_model, virtual.availability_model
    fits = read_speeds(speeds.path) if isinstance(speeds, Trace) else None
    spans = read_presence(availability.path) if isinstance(availability, Trace) else None
    for trace, known in ((speeds, fits), (availability, spans)):
        missing = [client for client in clients if known is not None and client not in known]
        if missing:
            assert isinstance(trace, Trace)
            raise ConfigError(
                f"the trace {trace.path} has no row for {missing[0]}: the clients are {clients[0]} to {clients[-1]}"
            )
    return {
        client: Habits(
            virtual, client, fits=fits[client] if fits else (), spans=spans[client] if spans is not None else None
        )
        for client in clients
    }

"""Settings of a simulation in virtual time, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedbus.errors import ConfigError

_TRACE = "trace:"
_MAX_SIGMA = 10.0
"""Beyond it a factor of e^60 between two clients is nothing unusual."""
_SHORTEST_S = 1e-3


@dataclass(frozen=True, kw_only=True)
class Lognormal:
    """A factor exp(`sigma` Z) that is a client's own, times exp(`jitter` Z') for each task; both have median 1."""

    sigma: float = 0.0
    jitter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class OnOff:
    """There for `on_s` seconds, then away for `off_s`: means of exponential durations."""

    on_s: float
    off_s: float


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A CSV file says it."""

    path: str


@dataclass(frozen=True, kw_only=True)
class Bandwidth:
    """Payload bytes per second."""

    down: float
    up: float


@dataclass(frozen=True, kw_only=True)
class VirtualTime:
    """What simulated clients are like: how long they take, and when they are there.

    Every draw is a function of (`seed`, client, n-th task), so the same settings give the same history.

    Args:
        fit_s: seconds of a fit, the median over the clients.
        evaluate_s: seconds of an evaluation, likewise.
        speeds: "constant"; "lognormal:SIGMA", a factor of each client's own on both, or "lognormal:SIGMA:JITTER" with
            one more for each task; "trace:FILE", a CSV of rows client,seconds: the fits of each client one after the
            other, and from its first row again after its last (evaluations take `evaluate_s`).
        dropout: probability that a client vanishes during a fit, at a uniform instant of it, without a word.
        downtime_s: seconds until it is back, exponential, on average.
        availability: "always"; "ON:OFF", mean seconds of exponential times there and away; "trace:FILE", a CSV of rows
            client,start_s,end_s. A client whose time ends vanishes, whatever it is doing.
        bandwidth: payload bytes per second of each client, or "DOWN:UP"; None: the road costs no time. A model that
            the client has already is not fetched again.
        bandwidth_spread: sigma of the lognormal factor on `bandwidth` that is each client's own.
        seed: of all that is drawn here; the app's seed draws the cohorts.

    Raises:
        ConfigError: when a value cannot work.
    """

    fit_s: float = 60.0
    evaluate_s: float = 0.0
    speeds: str = "constant"
    dropout: float = 0.0
    downtime_s: float = 600.0
    availability: str = "always"
    bandwidth: float | str | None = None
    bandwidth_spread: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("fit_s", "downtime_s"):
            if not _number(name, getattr(self, name)) > 0:
                raise ConfigError(f"{name} must be a positive number of seconds, not {getattr(self, name)}")
        for name in ("evaluate_s", "bandwidth_spread"):
            if _number(name, getattr(self, name)) < 0:
                raise ConfigError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.bandwidth_spread > _MAX_SIGMA:
            raise ConfigError(f"bandwidth_spread must be {_MAX_SIGMA:g} at most, not {self.bandwidth_spread}")
        if not 0 <= _number("dropout", self.dropout) <= 1:
            raise ConfigError(f"dropout must be a probability, in [0, 1], not {self.dropout}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, not {self.seed!r}")
        _ = self.speed_model, self.availability_model, self.road  # each raises for what it cannot read

    @property
    def speed_model(self) -> Lognormal | Trace:
        """`speeds`, understood."""
        _text("speeds", self.speeds)
        kind, _, rest = self.speeds.partition(":")
        if self.speeds.startswith(_TRACE) and rest:
            return Trace(path=rest)
        sigmas = _numbers(rest)
        if kind == "lognormal" and len(sigmas) in (1, 2) and min(sigmas) >= 0 and max(sigmas) <= _MAX_SIGMA:
            return Lognormal(sigma=sigmas[0], jitter=sigmas[-1] if len(sigmas) == 2 else 0.0)
        if self.speeds == "constant":
            return Lognormal()
        raise ConfigError(
            f"speeds must be constant, lognormal:SIGMA, lognormal:SIGMA:JITTER or trace:FILE, with SIGMA and JITTER in "
            f"[0, {_MAX_SIGMA:g}], not {self.speeds!r}"
        )

    @property
    def availability_model(self) -> OnOff | Trace | None:
        """`availability`, understood; None: always there."""
        _text("availability", self.availability)
        if self.availability == "always":
            return None
        if self.availability.startswith(_TRACE) and self.availability != _TRACE:
            return Trace(path=self.availability.removeprefix(_TRACE))
        means = _numbers(self.availability)
        if len(means) == 2 and min(means) >= _SHORTEST_S:
            return OnOff(on_s=means[0], off_s=means[1])
        raise ConfigError(
            f"availability must be always, ON:OFF in seconds (600:300), each {_SHORTEST_S:g} or more, or trace:FILE, "
            f"not {self.availability!r}"
        )

    @property
    def road(self) -> Bandwidth | None:
        """`bandwidth`, understood; None: the road costs no time."""
        if self.bandwidth is None:
            return None
        rates = _numbers(str(self.bandwidth))
        if len(rates) in (1, 2) and min(rates) > 0:
            return Bandwidth(down=rates[0], up=rates[-1])
        raise ConfigError(
            f"bandwidth must be bytes per second (1e6), or those down and up (1e6:2e5), not {self.bandwidth!r}"
        )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a number, not {value!r}")
    return value


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string such as 'lognormal:1.0' or '600:300', not {value!r}")


def _numbers(text: str) -> list[float]:
    """The finite numbers between colons; none when one of them is no such thing."""
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        return []
    return values if all(map(math.isfinite, values)) else []

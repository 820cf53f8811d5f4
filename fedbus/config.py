"""Settings of a run, checked when they are made."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fedbus.errors import ConfigError

_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_client_id(client_id: str) -> str:
    """Return `client_id` when it can name a queue and a broker user, else raise `ConfigError`."""
    if not _CLIENT_ID.fullmatch(client_id):
        raise ConfigError(
            f"client id {client_id[:80]!r} cannot be used: take 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return client_id


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """How rounds open and close.

    Args:
        num_rounds: rounds to run.
        min_fit_clients: a round closes once this many updates are folded (then `grace_s`).
        min_available_clients: clients that must have joined before the first round opens; None means
            `min_fit_clients`.
        fraction_fit: share of the living clients that is tasked in a round (at least `min_fit_clients`).
        fraction_evaluate: share of the living clients that evaluates each new model; 0 turns it off.
        timeout_s: a round that is still open after this many seconds closes with what came.
        grace_s: seconds that a round stays open for more updates once `min_fit_clients` are folded; `inf`
            waits for the whole cohort, as Flower does.
        evaluate_timeout_s: seconds after which a federated evaluation closes with what came; None means
            `timeout_s`.
        heartbeat_s: seconds between a client's signs of life.
        lease_s: seconds of silence after which a client is taken for lost.
        staleness_exponent: a in s(tau) = (1 + tau)^-a, the discount of an update that is tau versions old
            (Xie et al. 2019, section 5.2, "polynomial"); 0 gives late updates their full weight.
        max_staleness: versions beyond which a late update is refused.

    Raises:
        ConfigError: when the values cannot work together.
    """

    num_rounds: int = 10
    min_fit_clients: int = 2
    min_available_clients: int | None = None
    fraction_fit: float = 1.0
    fraction_evaluate: float = 1.0
    timeout_s: float = 600.0
    grace_s: float = 0.0
    evaluate_timeout_s: float | None = None
    heartbeat_s: float = 5.0
    lease_s: float = 20.0
    staleness_exponent: float = 0.5
    max_staleness: int = 10

    def __post_init__(self) -> None:
        _at_least(1, num_rounds=self.num_rounds, min_fit_clients=self.min_fit_clients)
        _at_least(0, max_staleness=self.max_staleness)
        if self.min_available_clients is not None:
            _at_least(1, min_available_clients=self.min_available_clients)
        _positive(timeout_s=self.timeout_s)
        if self.evaluate_timeout_s is not None:
            _positive(evaluate_timeout_s=self.evaluate_timeout_s)
        _positive(heartbeat_s=self.heartbeat_s, lease_s=self.lease_s)
        if not 0 < self.fraction_fit <= 1:
            raise ConfigError(f"fraction_fit must be in (0, 1], not {self.fraction_fit}")
        if not 0 <= self.fraction_evaluate <= 1:
            raise ConfigError(f"fraction_evaluate must be in [0, 1], not {self.fraction_evaluate}")
        if math.isnan(self.grace_s) or self.grace_s < 0:
            raise ConfigError(f"grace_s must be 0 or more, not {self.grace_s}")
        if not (math.isfinite(self.staleness_exponent) and self.staleness_exponent >= 0):
            raise ConfigError(f"staleness_exponent must be 0 or more, not {self.staleness_exponent}")
        if self.lease_s < 2 * self.heartbeat_s:
            raise ConfigError(
                f"lease_s ({self.lease_s}) must be at least twice heartbeat_s ({self.heartbeat_s}), "
                "or one late heartbeat costs a client its place"
            )

    @property
    def start_clients(self) -> int:
        """Clients that must be there before the first round opens."""
        if self.min_available_clients is not None:
            return self.min_available_clients
        return self.min_fit_clients


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} must be a whole number, not {value!r}")
        if value < least:
            raise ConfigError(f"{name} must be {least} or more, not {value}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name} must be a positive number of seconds, not {value}")

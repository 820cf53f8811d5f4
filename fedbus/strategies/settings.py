"""The numbers that strategies are made with, checked."""

from __future__ import annotations

import math

from fedbus.config import RoundConfig
from fedbus.errors import ConfigError

_NEVER_TOO_LATE = 1000
"""Versions: what the asynchronous presets take for granted."""


def positive(name: str, value: float) -> float:
    """`value`. Raises `ConfigError` unless it is a finite number above 0."""
    if not (_is_number(value) and value > 0):
        raise ConfigError(f"{name} must be a positive number, not {value!r}")
    return value


def not_negative(name: str, value: float) -> float:
    """`value`. Raises `ConfigError` unless it is a finite number, 0 or more."""
    if not (_is_number(value) and value >= 0):
        raise ConfigError(f"{name} must be a number of 0 or more, not {value!r}")
    return value


def decay(name: str, value: float) -> float:
    """`value`. Raises `ConfigError` unless it is a number in [0, 1)."""
    if not (_is_number(value) and 0 <= value < 1):
        raise ConfigError(f"{name} must be a number from 0 to less than 1, not {value!r}")
    return value


def count(name: str, value: int) -> int:
    """`value`. Raises `ConfigError` unless it is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of 1 or more, not {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def whole(name: str, value: int, *, least: int) -> int:
    """`value`. Raises `ConfigError` unless it is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of {least} or more, not {value!r}")
    return value


def check_none_is_too_late(strategy: object, rounds: RoundConfig) -> None:
    """Raise `ConfigError` where clients train on before they hear that their last update came too late: what they
    remember of it would be in the next one."""
    if rounds.is_asynchronous and rounds.max_staleness < _NEVER_TOO_LATE:
        raise ConfigError(
            f"{type(strategy).__name__} needs updates that are not refused for being late: in asynchronous rounds set "
            f"max_staleness to {_NEVER_TOO_LATE}, not {rounds.max_staleness}"
        )

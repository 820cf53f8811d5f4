"""Traces of real clients, as CSV files: how long each one trains, and when it is there."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from fedbus.errors import ConfigError

_SPEED_COLUMNS = ("client", "seconds")
_PRESENCE_COLUMNS = ("client", "start_s", "end_s")


def read_speeds(path: str) -> dict[str, tuple[float, ...]]:
    """Seconds of each client's fits, in the file's order: rows `client,seconds`.

    Raises `ConfigError` for a file that cannot be read, with the line that is wrong.
    """
    speeds: dict[str, list[float]] = {}
    for where, client, (seconds,) in _rows(path, _SPEED_COLUMNS):
        if seconds <= 0:
            raise ConfigError(f"{where}: a fit takes more than 0 seconds, not {seconds:g}")
        speeds.setdefault(client, []).append(seconds)
    return {client: tuple(values) for client, values in speeds.items()}


def read_presence(path: str) -> dict[str, tuple[tuple[float, float], ...]]:
    """The spans (start, end) in which each client is there, in seconds of the run: rows `client,start_s,end_s`.

    Raises `ConfigError` for a file that cannot be read, with the line that is wrong.
    """
    spans: dict[str, list[tuple[float, float]]] = {}
    for where, client, (start, end) in _rows(path, _PRESENCE_COLUMNS):
        known = spans.setdefault(client, [])
        if end <= start:
            raise ConfigError(f"{where}: {client} ends at {end:g}, which is not after its start at {start:g}")
        if start < (known[-1][1] if known else 0):
            raise ConfigError(f"{where}: {client} starts at {start:g}, before its last span ends: sort its rows")
        known.append((start, end))
    return {client: tuple(values) for client, values in spans.items()}


def _rows(path: str, columns: tuple[str, ...]) -> Iterator[tuple[str, str, list[float]]]:
    """FILE:LINE, the client and its numbers of each row; a first line that names the columns is skipped."""
    wanted = ",".join(columns)
    for line, row in enumerate(_read(path), start=1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (line == 1 and tuple(cells) == columns):
            continue
        where = f"{path}:{line}"
        if len(cells) != len(columns) or not cells[0]:
            raise ConfigError(f"{where}: {','.join(row)[:80]!r} is not {wanted}")
        yield where, cells[0], [_number(where, name, cell) for name, cell in zip(columns[1:], cells[1:], strict=True)]


def _read(path: str) -> list[list[str]]:
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            return list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise ConfigError(f"the trace {path} cannot be read: {reason}") from exc


def _number(where: str, name: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{where}: {name} must be a number, not {cell[:80]!r}")
    return value

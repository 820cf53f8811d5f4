"""How much processes take over time: samples of memory, descriptors and threads, and whether they grow.

Processes are killed and started again, so an average over time would mostly tell how old they were. What is compared
is equal ages: the first quarter of a run with the last.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

AGES_S: Final = (0, 10, 30, 60, 120, 300, 600, 1200, 2400)
"""Ages are compared within these bounds; the youngest still grow to their size."""
_GROWN_S: Final = 120
"""From this age on a process has everything that it needs, and what it gains is suspect."""


@dataclass(frozen=True, kw_only=True)
class Vitals:
    """One process at one moment: `at_s` from the start of the run, `age_s` from its own."""

    at_s: float
    kind: str
    name: str
    pid: int
    age_s: float
    rss_mib: float
    descriptors: int
    threads: int


def look_at(pid: int, *, at_s: float, kind: str, name: str) -> Vitals | None:
    """The vitals of a process; None when it is gone."""
    folder = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        started_ticks = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
        descriptors = len(os.listdir(folder / "fd"))
    except OSError:
        return None
    if "VmRSS" not in status:  # a zombie
        return None
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return Vitals(
        at_s=round(at_s, 1),
        kind=kind,
        name=name,
        pid=pid,
        age_s=round(uptime_s - started_ticks / os.sysconf("SC_CLK_TCK"), 1),
        rss_mib=round(int(status["VmRSS"].split()[0]) / 1024, 2),
        descriptors=descriptors,
        threads=int(status["Threads"]),
    )


def bytes_under(folder: Path, pattern: str = "**/*") -> int:
    """What the files in `folder` take."""
    total = 0
    for path in folder.glob(pattern):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


class Table:
    """A CSV file with a row for each object, written as it comes."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._columns = columns
        self._file = path.open("w", newline="", buffering=1)
        self._writer = csv.DictWriter(self._file, columns)
        self._writer.writeheader()

    @classmethod
    def of_vitals(cls, path: Path) -> Table:
        return cls(path, [field.name for field in fields(Vitals)])

    def add(self, row: dict[str, Any]) -> None:
        self._writer.writerow(row)

    def close(self) -> None:
        self._file.close()


def growth(samples: Iterable[Vitals], *, until_s: float) -> dict[str, dict[str, Any]]:
    """For each kind and measure: medians of the first and the last quarter at equal ages, and the slope with age."""
    by_kind: dict[str, list[Vitals]] = {}
    for sample in samples:
        by_kind.setdefault(sample.kind, []).append(sample)
    measures: dict[str, Callable[[Vitals], float]] = {
        "rss_mib": lambda sample: sample.rss_mib,
        "descriptors": lambda sample: sample.descriptors,
        "threads": lambda sample: sample.threads,
    }
    return {
        kind: {name: _growth_of(of_kind, measure, until_s) for name, measure in measures.items()}
        for kind, of_kind in by_kind.items()
    }


def _growth_of(samples: list[Vitals], measure: Callable[[Vitals], float], until_s: float) -> dict[str, Any]:
    first = [sample for sample in samples if sample.at_s < until_s / 4]
    last = [sample for sample in samples if sample.at_s >= until_s * 3 / 4]
    at_age = {}
    for low, high in zip(AGES_S, (*AGES_S[1:], float("inf")), strict=True):
        both = [[measure(each) for each in quarter if low <= each.age_s < high] for quarter in (first, last)]
        if all(len(values) >= 3 for values in both):
            before, after = (statistics.median(values) for values in both)
            at_age[f"{low}-{high:g}s"] = {"first": round(before, 2), "last": round(after, 2), "samples": len(both[1])}
    return {
        "first": _median(map(measure, first)),
        "last": _median(map(measure, last)),
        "peak": max(map(measure, samples), default=None),
        "at_equal_age": at_age,
        "per_hour_of_age": _slope_with_age(samples, measure),
    }


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return round(statistics.median(known), 2) if known else None


def _slope_with_age(samples: list[Vitals], measure: Callable[[Vitals], float]) -> float | None:
    """Least squares over each life from two minutes on, in units per hour: all lives share the slope."""
    lives: dict[tuple[str, int], list[Vitals]] = {}
    for sample in samples:
        if sample.age_s >= _GROWN_S:
            lives.setdefault((sample.name, sample.pid), []).append(sample)
    above = below = 0.0
    for life in lives.values():
        mean_age = statistics.fmean(each.age_s for each in life)
        mean = statistics.fmean(map(measure, life))
        above += sum((each.age_s - mean_age) * (measure(each) - mean) for each in life)
        below += sum((each.age_s - mean_age) ** 2 for each in life)
    return round(3600 * above / below, 3) if below else None

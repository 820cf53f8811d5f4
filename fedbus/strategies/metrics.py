"""What the clients' metrics say together.

Each function takes [(num_examples, metrics), ...], one for each client, as `App.aggregate_fit_metrics` and
`App.aggregate_evaluate_metrics` do, and looks at numbers only: strings, bytes and values that are not finite are left
out, bools count as 0 and 1. A metric is taken over those clients that report it. The sums are exact, so that the order
of the reports does not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

from fedbus.errors import ConfigError
from fedbus.strategies.exact import smallest_units
from fedbus.types import Metrics

Reports: TypeAlias = Iterable[tuple[int, Metrics]]


def reported(metrics: Metrics, name: str) -> float | None:
    """The metric `name` as a finite number; None when it is missing, or something else."""
    value = metrics.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]  # is_number


def weighted_mean(reports: Reports) -> dict[str, float]:
    """Mean of each metric, weighted by num_examples."""
    return {name: _mean(values) for name, values in _by_name(reports).items() if sum(n for n, _ in values) > 0}


def unweighted_mean(reports: Reports) -> dict[str, float]:
    """Mean of each metric, in which every client counts alike."""
    return {name: _mean([(1, value) for _, value in values]) for name, values in _by_name(reports).items()}


def mean_and_extremes(reports: Reports) -> dict[str, float]:
    """The weighted mean of each metric, and beside it the least and the greatest value of any client: "accuracy",
    "accuracy_min", "accuracy_max"."""
    found = _by_name(reports)
    result = {name: _mean(values) for name, values in found.items() if sum(n for n, _ in values) > 0}
    for name, values in found.items():
        result[f"{name}_min"] = min(value for _, value in values)
        result[f"{name}_max"] = max(value for _, value in values)
    return result


def quantiles(*shares: float) -> Callable[[Reports], dict[str, float]]:
    """A function that takes these quantiles of each metric over the clients: `quantiles(0.1, 0.5)` gives "accuracy_q10"
    and "accuracy_q50".

    Every client counts alike; between two clients' values it interpolates linearly. The worst and best tenth are how
    fairness is reported: Li et al. 2020 (Fair Resource Allocation in Federated Learning), table 1.

    Raises:
        ConfigError: when there is none, or one is not in [0, 1].
    """
    if not shares or not all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares):
        raise ConfigError(f"quantiles takes shares in [0, 1], such as 0.1 and 0.9, not {shares!r}")

    def aggregate(reports: Reports) -> dict[str, float]:
        result = {}
        for name, values in _by_name(reports).items():
            ascending = sorted(value for _, value in values)
            for share in shares:
                result[f"{name}_q{100 * share:g}"] = _quantile(ascending, share)
        return result

    return aggregate


def _by_name(reports: Reports) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for num_examples, metrics in reports:
        for name, value in metrics.items():
            if isinstance(value, bool | int | float) and math.isfinite(value):
                found.setdefault(name, []).append((num_examples, value))
    return found


def _mean(values: list[tuple[int, float]]) -> float:
    total = sum(weight * smallest_units(value) for weight, value in values)
    return total / (sum(weight for weight, _ in values) * smallest_units(1))


def _quantile(ascending: list[float], share: float) -> float:
    place = share * (len(ascending) - 1)
    below = math.floor(place)
    low, high, part = ascending[below], ascending[min(below + 1, len(ascending) - 1)], place - below
    if math.isfinite(high - low):
        return low + part * (high - low)
    return (1 - part) * low + part * high  # ends so far apart that float64 does not hold it

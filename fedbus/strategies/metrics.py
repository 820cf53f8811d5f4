"""What the clients' metrics say together."""

from __future__ import annotations

import math
from collections.abc import Iterable

from fedbus.strategies.exact import smallest_units
from fedbus.types import Metrics


def reported(metrics: Metrics, name: str) -> float | None:
    """The metric `name` as a finite number; None when it is missing, or something else."""
    value = metrics.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]  # is_number


def weighted_mean(reports: Iterable[tuple[int, Metrics]]) -> dict[str, float]:
    """Mean of each numeric metric over the clients that report it, weighted by their num_examples.

    Bools count as 0 and 1, so that their mean is a share; strings, bytes and values that are not finite are left out.
    The sums are exact, so that the order of the reports does not show.
    """
    totals: dict[str, int] = {}
    weights: dict[str, int] = {}
    for num_examples, metrics in reports:
        for name, value in metrics.items():
            if isinstance(value, bool | int | float) and math.isfinite(value):
                totals[name] = totals.get(name, 0) + num_examples * smallest_units(value)
                weights[name] = weights.get(name, 0) + num_examples
    unit = smallest_units(1)
    return {name: totals[name] / (weights[name] * unit) for name in totals if weights[name] > 0}

"""Loss and metrics over the rounds, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedbus.errors import UsageError
from fedbus.server.history import Evaluation, History


def save_curves(history: History, path: Path) -> None:
    """Draw loss and every numeric metric, central and federated, against the round into a PNG at `path`.

    Raises `UsageError` when matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise UsageError("matplotlib is not installed: pip install 'fedbus[demo]'") from exc
    series = _series(history)
    names = list(dict.fromkeys(name for points in series.values() for name in points))
    figure = Figure(figsize=(5.0 * max(1, len(names)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: nothing global, no window
    for axes, name in zip(figure.subplots(1, max(1, len(names)), squeeze=False)[0], names, strict=False):
        for where, points in series.items():
            if name in points:
                rounds, values = zip(*points[name], strict=True)
                axes.plot(rounds, values, marker="o", markersize=3.5, label=where)
        axes.set_xlabel("round")
        axes.set_title(name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)


def _series(history: History) -> dict[str, dict[str, list[tuple[int, float]]]]:
    evaluations: dict[str, list[tuple[int, Evaluation | None]]] = {
        "central": [(0, history.initial), *((record.round, record.central) for record in history.rounds)],
        "federated": [(record.round, record.federated) for record in history.rounds],
    }
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for where, points in evaluations.items():
        for round_, evaluation in points:
            for name, value in _numbers(evaluation).items():
                series.setdefault(where, {}).setdefault(name, []).append((round_, value))
    return series


def _numbers(evaluation: Evaluation | None) -> dict[str, float]:
    if evaluation is None:
        return {}
    values: dict[str, Any] = {"loss": evaluation.loss, **evaluation.metrics}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}

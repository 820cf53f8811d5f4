"""What clients' metrics say together: by hand, and in a run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import fedbus as fb
from fedbus.errors import ConfigError
from fedbus.observe import events as o
from fedbus.observe.logs import sentence
from fedbus.types import Metrics
from tests.kit import AddingClient, app_of, federation

REPORTS: list[tuple[int, Metrics]] = [
    (10, {"accuracy": 0.5, "is_done": True, "name": "a"}),
    (30, {"accuracy": 0.9, "is_done": False, "only_here": float("nan")}),
    (60, {"accuracy": 0.1}),
]


def test_the_means_by_hand() -> None:
    assert fb.weighted_mean(REPORTS) == {"accuracy": pytest.approx((5 + 27 + 6) / 100), "is_done": 0.25}
    assert fb.unweighted_mean(REPORTS) == {"accuracy": pytest.approx(0.5), "is_done": 0.5}


def test_extremes_stand_beside_the_mean() -> None:
    assert fb.mean_and_extremes(REPORTS[:1] + REPORTS[2:]) == {
        "accuracy": pytest.approx((5 + 6) / 70),
        "accuracy_min": 0.1,
        "accuracy_max": 0.5,
        "is_done": 1.0,
        "is_done_min": True,
        "is_done_max": True,
    }


def test_quantiles_interpolate_between_clients() -> None:
    found = fb.quantiles(0, 0.25, 0.5, 1)(REPORTS)
    assert {name: value for name, value in found.items() if name.startswith("accuracy")} == {
        "accuracy_q0": 0.1,
        "accuracy_q25": pytest.approx(0.3),
        "accuracy_q50": 0.5,
        "accuracy_q100": 0.9,
    }


@pytest.mark.parametrize("shares", [(), (1.5,), (-0.1, 0.5), ("0.5",)])
def test_what_is_no_quantile_is_refused(shares: Any) -> None:
    with pytest.raises(ConfigError, match="shares in"):
        fb.quantiles(*shares)


@pytest.mark.parametrize("together", [fb.weighted_mean, fb.unweighted_mean, fb.mean_and_extremes, fb.quantiles(0.5)])
def test_the_order_of_the_reports_does_not_show(together: Any) -> None:
    reports: list[tuple[int, Metrics]] = [(n, {"x": v}) for n, v in ((1, 1e16), (1, 1.0), (1, -1e16), (3, 0.1))]
    assert together(reports) == together(reports[::-1])
    assert together([]) == {}


async def test_the_apps_own_functions_see_every_client_and_decide_what_is_recorded(tmp_path: Path) -> None:
    fits: list[list[tuple[int, Metrics]]] = []

    def of_fit(reports: Iterable[tuple[int, Metrics]]) -> Metrics:
        fits.append(list(reports))
        return {"clients": len(fits[-1]), "who": "all"}

    app = app_of(
        aggregate_fit_metrics=of_fit, aggregate_evaluate_metrics=fb.mean_and_extremes, rounds={"min_fit_clients": 2}
    )
    async with federation(app, run_dir=tmp_path) as story:
        history = await story.run("c3", "c1")
    assert fits == [[(10, {"n": 1}), (30, {"n": 3})]] * 2  # by the clients' names, whoever came first
    assert [record.fit_metrics for record in history.rounds] == [{"clients": 2, "who": "all"}] * 2
    federated = history.rounds[1].federated
    assert federated is not None
    assert federated.metrics == {"half": 0.5, "half_min": 0.5, "half_max": 0.5}
    assert federated.loss == pytest.approx(5.0)  # the loss stays the weighted mean
    saved = json.loads((tmp_path / "history.json").read_text())
    assert saved["rounds"][0]["fit_metrics"] == {"clients": 2, "who": "all"}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda reports: 1 // 0, "ZeroDivisionError: integer division or modulo by zero"),
        (lambda reports: [1], "it returned a list as metrics, expected a dict"),
        (
            lambda reports: {"x": object()},
            "it returned an object as metric 'x', expected a bool, int, float, str or bytes",
        ),
    ],
)
async def test_a_function_that_fails_is_noted_and_the_round_goes_on(broken: Any, reason: str) -> None:
    app = app_of(aggregate_fit_metrics=broken, aggregate_evaluate_metrics=broken, rounds={"num_rounds": 1})
    async with federation(app) as story:
        history = await story.run("c1", "c2")
    assert [(event.of, event.reason) for event in story.told(o.MetricsFailed)] == [
        ("fit", reason),
        ("evaluate", reason),
    ]
    assert sentence(story.told(o.MetricsFailed)[0]) == f"round 1: aggregate_fit_metrics failed: {reason}"
    record = history.rounds[0]
    assert (record.fit_metrics, record.metrics_failed) == ({}, {"fit": reason, "evaluate": reason})
    assert record.federated is not None
    assert record.federated.metrics == {}
    assert record.federated.loss == pytest.approx(weighted_loss())


def weighted_loss() -> float:
    model = (10 * 1 + 20 * 2) / 30
    return (1 * model + 2 * model) / 3


async def test_nobody_is_asked_what_no_metrics_at_all_say_together() -> None:
    class Failing(AddingClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            raise ValueError("no data")

    asked: list[object] = []

    def of_fit(reports: Iterable[tuple[int, Metrics]]) -> Metrics:
        asked.append(reports)
        return {}

    app = app_of(
        lambda context: (Failing if context.client_id == "c1" else AddingClient)(context),
        aggregate_fit_metrics=of_fit,
        rounds={"num_rounds": 1, "min_fit_clients": 1, "min_available_clients": 2, "fraction_evaluate": 0},
    )
    async with federation(app) as story:
        await story.run("c1", "c2")
    assert len(asked) == 1


def test_what_is_no_function_of_the_reports_is_refused() -> None:
    with pytest.raises(ConfigError, match="aggregate_fit_metrics must be a function, not 'mean'"):
        app_of(aggregate_fit_metrics="mean")
    with pytest.raises(ConfigError, match=r"aggregate_evaluate_metrics must take \(reports\)"):
        app_of(aggregate_evaluate_metrics=lambda: {})


def test_quantiles_between_the_ends_of_float64_are_finite() -> None:
    """A client may say what it likes: it must not make nan or infinity of what the others say."""
    reports = [(1, {"a": -1e308}), (1, {"a": 1e308}), (1, {"a": 1e308})]
    assert fb.quantiles(0, 0.25, 1)(reports) == {"a_q0": -1e308, "a_q25": 0.0, "a_q100": 1e308}

"""The files for Grafana and Prometheus: whole, consistent, and about metrics that there are."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbus.observe.figures import ClientFigures, WorkerFigures
from fedbus.observe.health import Health
from fedbus.observe.metrics import ClientMetrics, ServerMetrics, WorkerMetrics
from tests.unit.test_metrics import figures_of

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "fedbus.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
METRIC = re.compile(r"\bfedbus_[a-z_]+")


def known_metrics() -> set[str]:
    """Every name that a server, a client or a worker shows, those without a sample yet included."""
    server, client, worker = ServerMetrics(Health()), ClientMetrics(Health()), WorkerMetrics(Health())
    server.figures = lambda: figures_of(1)
    client.figures = lambda: ClientFigures(
        is_member=True,
        lease_s=1.0,
        welcomed_at=1.0,
        outbox_updates=0,
        outbox_bytes=0,
        uploaded_bytes=0,
        downloaded_bytes=0,
    )
    worker.figures = lambda: WorkerFigures(has_work=True, slots=1, in_hand=0, uploaded_bytes=0, downloaded_bytes=0)
    text = "".join(metrics.text().decode() for metrics in (server, client, worker))
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    histograms = {line.split()[2] for line in text.splitlines() if line.endswith(" histogram")}
    return names | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}


def expressions() -> list[str]:
    queries = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
    return queries + [rule["expr"] for rule in RULES]


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_is_about_metrics_that_there_are(expression: str) -> None:
    assert set(METRIC.findall(expression)) <= known_metrics()


def test_the_panels_have_ids_titles_and_places_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_query_goes_to_the_data_source_that_is_chosen() -> None:
    variables = {variable["name"]: variable["type"] for variable in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "federation": "query"}
    for panel in PANELS:
        if panel["type"] == "row":
            continue
        assert panel["title"]
        assert panel["targets"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_that_need_the_brokers_plugin_say_so() -> None:
    for panel in PANELS:
        if any("rabbitmq_" in target["expr"] for target in panel.get("targets", [])):
            assert "Needs the plugin rabbitmq_prometheus" in panel["description"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_wrong_and_where_it_stands_what_to_do(rule: dict[str, Any]) -> None:
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", rule["alert"].removeprefix("Fedbus")).lower()
    assert rule["annotations"]["runbook_url"] == f"deploy/README.md#alert-{name}"
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(".")
    assert rule["labels"]["severity"] in ("critical", "warning")

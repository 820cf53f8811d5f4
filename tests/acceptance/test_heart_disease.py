"""Four hospitals, six strategies, five seeds, over a real RabbitMQ: the accuracies that FLamby has published."""

from __future__ import annotations

import json

import pytest

from fedbus.bench.heart_disease import METHODS, SEEDS
from tests.acceptance.conftest import QuickShell
from tests.kit import HEART_DISEASE
from tests.vhosts import Vhost

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

POINTS = {method.name: 0.02 if method.name == "SCAFFOLD" else 0.01 for method in METHODS}


@pytest.mark.skipif(not HEART_DISEASE.is_dir(), reason="the heart-disease files are not here")
def test_four_hospitals_reach_the_published_accuracies(quick_shell: QuickShell, vhost: Vhost) -> None:
    done = quick_shell.run("bench", "heart-disease", "--data", str(HEART_DISEASE), "--json", "--broker", vhost.url)
    assert done.returncode == 0, done.stderr
    outcomes = {outcome["method"]: outcome for outcome in json.loads(done.stdout)}
    assert outcomes.keys() == POINTS.keys()
    for name, outcome in outcomes.items():
        assert [int(seed) for seed in outcome["accuracies"]] == list(SEEDS)
        assert abs(outcome["difference"]) <= POINTS[name], outcome
    assert outcomes["SCAFFOLD"]["accuracies"] != outcomes["FedAdam"]["accuracies"]


def test_where_the_files_are_must_be_told(quick_shell: QuickShell) -> None:
    done = quick_shell.run("bench", "heart-disease")
    assert done.returncode == 2
    assert "Set FEDBUS_HEART_DISEASE to the folder of cleveland.csv" in done.stderr

"""A cluster of three RabbitMQ nodes: the one that matters most dies in the middle of a round."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from fedbus.bus.topology import MODEL, UPDATES
from tests.faults.adding_app import Settings
from tests.faults.cluster import Cluster
from tests.faults.expected import expected_sha
from tests.faults.fleet import SERVER, Fleet

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]


def test_the_node_that_leads_the_updates_dies_and_the_run_goes_on(
    tmp_path: Path, rabbitmq_installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(clients=3, rounds=6, fit_s=0.02, model_bytes=2_500_000, gate="c1/3")
    with Cluster() as cluster, Fleet(tmp_path, settings, cluster.url) as fleet:
        fleet.start()
        for client_id in ("c2", "c3"):
            fleet.until_event(client_id, "task_completed", kind="fit", round=3)
        cluster.await_replicas(UPDATES)
        cluster.await_replicas(MODEL)
        killed_at = time.monotonic()
        cluster.kill(cluster.leader_of(UPDATES))
        fleet.open_gate()
        fleet.until_event(SERVER, "round_closed", round=3, timeout_s=60)
        pause_s = time.monotonic() - killed_at
        assert fleet.until_done() == []
        assert fleet.verdict(expected_sha(settings)).problems == ()
    with capsys.disabled():
        sys.stdout.write(
            f"\ncluster up in {cluster.seconds:.1f} s; the leader's death held the run up {pause_s:.1f} s\n"
        )

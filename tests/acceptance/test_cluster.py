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


_DOWN_S = 3.0
"""Control messages and inboxes are in classic queues: those of a node that is down are there again when it is."""


def test_the_node_that_leads_the_updates_dies_and_the_run_goes_on_once_it_is_back(
    tmp_path: Path, rabbitmq_installed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(clients=3, rounds=6, fit_s=0.02, model_bytes=2_500_000, gate="c1/3")
    with Cluster() as cluster, Fleet(tmp_path, settings, cluster.url) as fleet:
        fleet.start()
        for client_id in ("c2", "c3"):
            fleet.until_event(client_id, "task_completed", kind="fit", round=3)
        cluster.await_replicas(UPDATES)
        cluster.await_replicas(MODEL)
        leader = cluster.leader_of(UPDATES)
        killed_at = time.monotonic()
        cluster.kill(leader)
        fleet.open_gate()
        time.sleep(_DOWN_S)
        cluster.restart(leader)
        fleet.until_event(SERVER, "round_closed", round=3)
        pause_s = time.monotonic() - killed_at
        assert fleet.until_done() == []
        assert fleet.verdict(expected_sha(settings)).problems == ()
    with capsys.disabled():
        sys.stdout.write(
            f"\ncluster up in {cluster.seconds:.1f} s; the leader's death held the run up {pause_s:.1f} s\n"
        )

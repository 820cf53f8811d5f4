"""A cluster of three RabbitMQ nodes: the one that matters most dies in the middle of a round, and stays dead."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedbus.bus.rabbitmq import connect
from fedbus.bus.topology import CONTROL, MODEL, UPDATES, client_inbox, inbox, ingress, model_stream
from tests.faults.adding_app import Settings
from tests.faults.cluster import Cluster
from tests.faults.expected import expected_sha
from tests.faults.fleet import SERVER, Fleet

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

SETTINGS = Settings(clients=3, rounds=6, fit_s=0.02, model_bytes=2_500_000, gate="c1/3", message_queues="quorum")
QUEUES = (CONTROL, UPDATES, MODEL, *map(inbox, SETTINGS.client_ids))


@pytest.fixture(scope="module")
def cluster(rabbitmq_installed: None) -> Iterator[Cluster]:
    """Whole at the begin of each test: each starts the node again that it killed."""
    with Cluster() as shared:
        yield shared


async def make_all(url: str) -> None:
    """Make every queue at one node, which so becomes their leader."""
    async with await connect(url) as bus:
        await bus.declare(ingress(message_queues="quorum"))
        for client_id in SETTINGS.client_ids:
            await bus.declare(client_inbox(client_id, "quorum"))
        await bus.declare(model_stream(SETTINGS.model_bytes))


@pytest.mark.parametrize(
    ("leads", "serves", "dies"),
    [
        pytest.param(0, 0, 0, id="it leads all queues and serves all parties"),
        pytest.param(1, 0, 1, id="it leads all queues"),
        pytest.param(1, 0, 0, id="it serves all parties"),
    ],
)
def test_a_node_dies_in_the_middle_of_a_round_and_the_run_goes_on_without_it(
    tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str], leads: int, serves: int, dies: int
) -> None:
    cluster.use_vhost(tmp_path.name)
    asyncio.run(make_all(cluster.url_of(leads)))
    assert cluster.await_replicas(*QUEUES) == [leads] * len(QUEUES)
    urls = [cluster.url_of((serves + i) % len(cluster)) for i in range(len(cluster))]
    try:
        with Fleet(tmp_path, SETTINGS, ",".join(urls)) as fleet:
            fleet.start()
            for client_id in ("c2", "c3"):
                fleet.until_event(client_id, "task_completed", kind="fit", round=3)
            killed_at = time.monotonic()
            cluster.kill(dies)
            fleet.open_gate()
            fleet.until_event(SERVER, "round_closed", round=3)
            pause_s = time.monotonic() - killed_at
            assert fleet.until_done() == []
            assert fleet.verdict(expected_sha(SETTINGS)).problems == ()
            lost = {name: len(fleet.events(name, "broker_lost")) for name in fleet.processes}
    finally:
        cluster.restart(dies)
    cluster.await_replicas(*QUEUES)
    with capsys.disabled():
        sys.stdout.write(f"\n{pause_s:.1f} s from the death of the node to the next commit; connections lost: {lost}\n")

"""Workers as people start them: over a real RabbitMQ, with real processes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.tensorfile import load_model
from tests.acceptance.conftest import Shell, last_json, poll
from tests.kit import folded_in
from tests.vhosts import Vhost

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

APP = """
import os, pathlib, time
import numpy as np
import fedbus as fb

HERE = pathlib.Path(__file__).parent

class Adding(fb.NumPyClient):
    def __init__(self, context):
        self.context = context

    def fit(self, parameters, config):
        mine = HERE / f"{self.context.client_id}-{config['round']}"
        with mine.open("a") as file:
            file.write(f"{os.getpid()}\\n")
        while config["round"] == 2 and self.context.partition == 1 and not (HERE / "gate").exists():
            time.sleep(0.01)
        return [p + np.float32(self.context.partition + 1) for p in parameters], self.context.partition + 1, {}

    def evaluate(self, parameters, config):
        return float(parameters[0][0]), 1, {}

app = fb.App(
    client_fn=Adding,
    initial_parameters=[np.zeros(3, np.float32)],
    rounds=fb.RoundConfig.synchronous(4, num_rounds=3, min_available_clients=4, heartbeat_s=0.5, lease_s=4),
)
"""


def pids(folder: Path, client: str, round_: int) -> list[int]:
    """The processes that trained for this client in this round, in their order."""
    path = folder / f"{client}-{round_}"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def clients_of(record: dict[str, Any]) -> list[str]:
    return sorted(update["client_id"] for update in record["folded"])


def test_a_worker_that_is_killed_in_the_middle_of_a_task_costs_no_round_and_counts_nothing_twice(
    shell: Shell, vhost: Vhost
) -> None:
    (shell.folder / "app.py").write_text(APP)
    broker = ("--broker", vhost.url)
    workers = [shell.start("worker", "app.py", *broker, "--json") for _ in range(2)]
    workers[0].until("waiting for a server with virtual clients on this broker")
    server = shell.start("server", "app.py", *broker, "--virtual-clients", "3", "--run-dir", "out", "--json")
    server.until("3 virtual clients enrolled, for workers to play")
    client = shell.start("client", "app.py", *broker, "--id", "hospital")

    victim = "virtual-00001-of-00003"
    poll(lambda: bool(pids(shell.folder, victim, 2)), 60, lambda: server.output)
    (dying,) = pids(shell.folder, victim, 2)
    os.kill(dying, signal.SIGKILL)
    poll(lambda: len(pids(shell.folder, victim, 2)) == 2, 30, lambda: server.output)
    (shell.folder / "gate").touch()

    assert server.end(60) == 0, server.output
    assert client.end() == 0, client.output
    dead, living = sorted(workers, key=lambda worker: worker.process.pid != dying)
    assert dead.end() == -signal.SIGKILL
    living.signal(signal.SIGTERM)
    assert living.end() == 0, living.output
    assert "worker ends: stopped by SIGTERM" in living.output

    everybody = ["hospital", *(f"virtual-{part:05d}-of-00003" for part in range(3))]
    history = json.loads((shell.folder / "out" / "history.json").read_text())
    assert [clients_of(record) for record in history["rounds"]] == [everybody] * 3
    assert [record["reason"] for record in history["rounds"]] == ["min_fit_clients"] * 3
    assert history["clients_lost"] == []
    tasks = [f"{history['run_id']}/fit/{n}/{name}" for n in (1, 2, 3) for name in everybody]
    assert folded_in(shell.folder / "out") == sorted(tasks)
    step = (1 * 1 + 1 * 1 + 2 * 2 + 3 * 3) / (1 + 1 + 2 + 3)
    np.testing.assert_allclose(load_model(shell.folder / "out" / "model.safetensors")["0"], [3 * step] * 3, atol=1e-6)
    trained = [len(pids(shell.folder, name, n)) for n in (1, 2, 3) for name in everybody]
    assert sum(trained) == 13  # the victim's task was trained for twice, all others once
    assert last_json(living.output)["tasks"] >= 3


def test_a_worker_that_finds_nothing_to_do_ends_when_it_was_told_to(shell: Shell, vhost: Vhost) -> None:
    (shell.folder / "app.py").write_text(APP)
    done = shell.run("worker", "app.py", "--broker", vhost.url, "--until-idle", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout) == {"tasks": 0}
    assert "worker ends: no task came for 0.2 s (0 tasks answered)" in done.stderr

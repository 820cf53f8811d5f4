"""Slow clients, comings and goings: over a real RabbitMQ, with real processes that are killed for good."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import QuickShell, Shell, last_json
from tests.vhosts import Vhost

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

APP = """
import pathlib, time
import numpy as np
import fedbus as fb

HERE = pathlib.Path(__file__).parent

class Client(fb.NumPyClient):
    def __init__(self, context):
        self.context = context

    def fit(self, parameters, config):
        name, (w,) = self.context.client_id, parameters
        with (HERE / f"trained-{name}").open("a") as file:
            file.write(f"{config['round']} {int(w[0])}\\n")  # the model counts its versions
        while config["round"] in GATED and not (HERE / f"gate-{config['round']}").exists():
            time.sleep(0.01)
        ends_at = time.monotonic() + SECONDS.get(name, 0.05)
        while time.monotonic() < ends_at and not self.context.cancelled:
            time.sleep(0.01)
        return [w + 1], 1, {}

app = fb.App(client_fn=Client, initial_parameters=[np.zeros(3)], rounds=ROUNDS)
"""


class Run:
    """A server and its clients in one vhost, each in a terminal of its own."""

    def __init__(self, shell: Shell, vhost: Vhost, **words: str) -> None:
        source = APP
        for word, text in {"GATED": "()", "SECONDS": "{}", **words}.items():
            source = source.replace(word, text)
        (shell.folder / "app.py").write_text(source)
        self.shell, self.vhost = shell, vhost
        self.server = self.start("server", "--run-dir", "run", "--log-json")

    def start(self, command: str, *args: str) -> Any:
        return self.shell.start(command, "app.py", "--broker", self.vhost.url, *args)

    def client(self, name: str) -> Any:
        return self.start("client", "--id", name)

    def open_gate(self, number: int) -> None:
        (self.shell.folder / f"gate-{number}").touch()

    def trained(self, name: str) -> list[tuple[int, int]]:
        """The (round, version) of each training that this client began."""
        lines = (self.shell.folder / f"trained-{name}").read_text().splitlines()
        return [(int(line.split()[0]), int(line.split()[1])) for line in lines]

    def history(self) -> dict[str, Any]:
        assert self.server.end(90) == 0, self.server.output
        found = json.loads((self.shell.folder / "run" / "history.json").read_text())
        assert isinstance(found, dict)
        return found

    def staleness_in_the_ledger(self, name: str) -> list[int]:
        db = sqlite3.connect(self.shell.folder / "run" / "ledger.sqlite")
        try:
            query = "SELECT staleness FROM folded WHERE client_id = ? ORDER BY round"
            return [row[0] for row in db.execute(query, (name,))]
        finally:
            db.close()


@pytest.fixture
def shell(quick_shell: QuickShell) -> QuickShell:
    """What happens before `fedbus` is imported is none of these tests' business."""
    return quick_shell


def test_half_of_the_clients_are_killed_for_good_and_new_ones_join_and_all_rounds_close(
    shell: Shell, vhost: Vhost
) -> None:
    run = Run(
        shell,
        vhost,
        GATED="(3, 6)",
        ROUNDS="fb.RoundConfig.synchronous(4, num_rounds=10, timeout_s=60, min_available_clients=6, lease_s=10)",
    )
    clients = {name: run.client(name) for name in ("c1", "c2", "c3", "c4", "c5", "c6")}
    run.server.until("round 3: 4 clients tasked")
    for name in ("c4", "c5"):
        clients[name].kill()
    clients["c6"].signal(signal.SIGTERM)
    assert clients["c6"].end() == 0
    run.open_gate(3)
    run.server.until("round 6: ")
    for name in ("n1", "n2", "n3"):
        run.client(name)
    run.server.until("n3 joined during round 6")
    run.open_gate(6)
    history = run.history()
    assert [record["round"] for record in history["rounds"]] == list(range(1, 11))
    assert {record["reason"] for record in history["rounds"]} <= {"min_fit_clients", "cohort_done"}
    gone = {"c4", "c5", "c6"}
    who = [{update["client_id"] for update in record["folded"]} for record in history["rounds"]]
    assert not gone & set().union(*who[3:])
    assert {"n1", "n2", "n3"} & set().union(*who[5:])
    assert set(history["clients_lost"]) <= {"c4", "c5"}
    assert history["clients_left"] == ["c6"]
    assert all(set(names) <= set(record["cohort"]) for names, record in zip(who, history["rounds"], strict=True))


def test_updates_that_always_take_longer_than_the_timeout_count_and_no_version_is_trained_twice(
    shell: Shell, vhost: Vhost
) -> None:
    run = Run(
        shell,
        vhost,
        SECONDS="{'slow': 2.5, 'fast': 0.3}",
        ROUNDS="fb.RoundConfig(num_rounds=12, min_fit_clients=2, timeout_s=1, fraction_evaluate=0)",
    )
    run.client("fast")
    run.client("slow")
    history = run.history()
    assert len(history["rounds"]) == 12
    late = run.staleness_in_the_ledger("slow")
    assert len(late) >= 2
    assert all(staleness > 0 for staleness in late)
    versions = [version for _, version in run.trained("slow")]
    assert len(versions) == len(set(versions))
    assert versions == sorted(versions)
    assert history["clients"]["slow"]["failed"] == 0


def test_the_stragglers_of_a_measurement_count_and_nobody_waits_for_them(shell: Shell, vhost: Vhost) -> None:
    sizes = ("--fast", "3", "--slow", "1", "--fast-s", "0.1", "--slow-s", "0.8", "--rounds", "20")
    done = shell.run("bench", "stragglers", *sizes, "--model-mib", "0.25", "--json", "--broker", vhost.url)
    assert done.returncode == 0, done.stderr
    found = last_json(done.stdout)
    assert found["updates"] == 60
    assert 1 <= found["slow_updates"] == len(found["staleness"])
    assert max(found["staleness"]) > 0
    assert list(shell.folder.iterdir()) == []


def test_the_regimes_are_compared_in_one_table(shell: Shell) -> None:
    done = shell.run("bench", "regimes", "--seeds", "1", "--trainings", "60", "--target", "0.3")
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    assert table[0].split()[:4] == ["regime", "s", "to", "30%"]
    assert any(line.startswith("FedAsync alpha 0.6, all") for line in table)
    wrong = shell.run("bench", "regimes", "--speeds", "warp")
    assert wrong.returncode != 0
    assert wrong.stderr.splitlines()[-1].startswith("fedbus: speeds must be constant")


@pytest.mark.parametrize("word", ["RoundConfig.buffered(3, over_selection=1.2)", "RoundConfig(concurrency=3)"])
def test_settings_that_contradict_one_another_are_one_line(shell: Shell, word: str) -> None:
    (Path(shell.folder) / "app.py").write_text(APP.replace("ROUNDS", f"fb.{word}"))
    done = shell.run("server", "app.py", "--broker", "amqp://127.0.0.1:1")
    assert done.returncode == 2
    assert "app.py:" in done.stderr  # the line to look at
    assert len(done.stderr.splitlines()) == 1
    assert "asynchronous" in done.stderr

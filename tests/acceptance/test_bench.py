"""`fedbus bench` as its users type it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.acceptance.conftest import QuickShell, Shell, last_json, poll
from tests.vhosts import Vhost

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

SMALL = ("--clients", "2", "--model-mib", "0.25", "--rounds", "4")


def test_a_small_measurement_tells_plausible_figures_and_leaves_nothing_behind(shell: Shell) -> None:
    done = shell.run("bench", "round", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    found = last_json(done.stdout)
    assert (found["clients"], found["model_mib"], found["rounds"]) == (2, 0.25, 4)
    assert found["loop"] in ("asyncio", "uvloop")
    for spread in (found["round_s"], found["floor_round_s"]):
        assert 0 < spread["p50"] <= spread["p95"]
    assert found["floor_s"] == found["floor_round_s"]["p50"]
    assert found["ratio"] == pytest.approx(found["round_s"]["p50"] / found["floor_s"], abs=0.001)
    assert found["tight_ratio"] == pytest.approx(found["round_s"]["p50"] / found["tight_floor_s"], abs=0.001)
    assert 0.25 <= found["server_egress_mib_per_round"] < 0.35  # the model once, whatever the number of clients
    assert 0.5 <= found["server_ingress_mib_per_round"] < 0.9  # two updates; the model's last part is read back
    if Path("/proc").is_dir():
        assert all(10 < found[f"{who}_rss_mib"] < 2000 for who in ("server", "client", "broker"))
    assert list(shell.folder.iterdir()) == []


def test_people_get_a_table_with_units(quick_shell: QuickShell, vhost: Vhost) -> None:
    done = quick_shell.run("bench", "round", *SMALL, "--run-dir", "kept", "--broker", vhost.url)
    assert done.returncode == 0, done.stderr
    for word in ("p50", " ms", "MiB", "ratio", "floor: bare aiormq"):
        assert word in done.stdout
    assert len(json.loads((quick_shell.folder / "kept" / "history.json").read_text())["rounds"]) == 5


def test_on_a_shared_broker_the_floor_takes_its_queues_away_again(quick_shell: QuickShell, vhost: Vhost) -> None:
    done = quick_shell.run("bench", "round", *SMALL, "--json", "--broker", vhost.url)
    assert done.returncode == 0, done.stderr
    assert vhost.queues("fedbus.updates") == ["fedbus.updates"]
    assert vhost.queues("fedbus.floor") == []
    found = last_json(done.stdout)
    assert found["broker_rss_mib"] is None
    assert found["server_egress_mib_per_round"] is None


def test_the_floor_ends_with_whoever_started_it(shell: Shell, vhost: Vhost) -> None:
    command = [sys.executable, "-m", "fedbus.bench.floor", "2", "4096", "1000000", "plain"]
    env = {**shell.env, "FEDBUS_BROKER": vhost.url}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as floor:
        poll(lambda: len(vhost.queues("fedbus.floor")) == 5, 20)
        assert floor.stdin is not None
        floor.stdin.close()
        assert floor.wait(20) != 0
    assert vhost.queues("fedbus.floor") == []


def test_ctrl_c_ends_everything_in_one_line(shell: Shell) -> None:
    terminal = shell.start("bench", "round", "--clients", "2", "--model-mib", "0.25", "--rounds", "100000")
    poll(lambda: any(shell.folder.glob("fedbus-bench-*/gates/go.1")), 30)
    terminal.signal(signal.SIGINT)
    assert terminal.end() == 1
    assert terminal.output == "fedbus: interrupted\n"
    assert not list(shell.folder.glob("fedbus-bench-*"))


@pytest.mark.parametrize(
    "wrong", [("--clients", "0"), ("--rounds", "2"), ("--model-mib", "0"), ("--model-mib", "-1"), ("--model-mib", "x")]
)
def test_arguments_that_cannot_work_are_told_in_time(quick_shell: QuickShell, wrong: tuple[str, str]) -> None:
    done = quick_shell.run("bench", "round", *wrong)
    assert done.returncode == 2
    assert wrong[0] in done.stderr
    assert list(quick_shell.folder.iterdir()) == []

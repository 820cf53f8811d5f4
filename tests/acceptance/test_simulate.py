"""`fedbus simulate --virtual`, as its users type it: one process, no broker."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import QuickShell, Shell, last_json

pytestmark = pytest.mark.acceptance

APP = """
import numpy as np
import fedbus as fb

class Adding(fb.NumPyClient):
    def __init__(self, context):
        self.number = context.partition + 1

    def fit(self, parameters, config):
        return [p + np.float32(self.number) for p in parameters], 10 * self.number, {}

app = fb.App(
    client_fn=Adding,
    initial_parameters=[np.zeros(3, np.float32)],
    evaluate_fn=lambda round, model: (float(model["0"][0]), {}),
    rounds=fb.RoundConfig(num_rounds=ROUNDS, min_fit_clients=3, fraction_evaluate=0),
)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "app.py").write_text(APP.replace("ROUNDS", "3"))
    (tmp_path / "endless.py").write_text(APP.replace("ROUNDS", "10**9"))
    return tmp_path


@pytest.fixture
def bare_shell(folder: Path) -> Iterator[Shell]:
    """A shell that needs no RabbitMQ."""
    its_shell = Shell(folder)
    yield its_shell
    its_shell.close()


@pytest.fixture
def quick_bare_shell(folder: Path) -> QuickShell:
    """The same, with commands that need not import anything first."""
    return QuickShell(folder)


def test_hours_pass_in_one_command(bare_shell: Shell) -> None:
    done = bare_shell.run(
        *("simulate", "app.py:app", "--virtual", "--clients", "3", "--fit-seconds", "540"), "--json", "--run-dir", "out"
    )
    assert done.returncode == 0, done.stderr
    summary = last_json(done.stdout)
    assert (summary["rounds"], summary["updates"], summary["simulated_s"]) == (3, 9, 1620)
    assert summary["wall_s"] > 0
    assert summary["central"]["loss"] == pytest.approx(3 * (10 * 1 + 20 * 2 + 30 * 3) / 60)
    assert " 0:27:00  run finished: all rounds are done (3 rounds, 1620.0 s)" in done.stderr
    assert (bare_shell.folder / "out" / "history.json").exists()


def test_the_same_command_gives_the_same_history(bare_shell: Shell) -> None:
    command = ("simulate", "app.py:app", "--virtual", "--clients", "6", "--speeds", "lognormal:1.0:0.2")
    weather = ("--dropout", "0.2", "--availability", "600:300", "--bandwidth", "10:5", "--seed", "7")
    for folder in ("a", "b"):
        done = bare_shell.run(*command, *weather, "--run-dir", folder)
        assert done.returncode == 0, done.stderr
    first, second = ((bare_shell.folder / folder / "history.json").read_text() for folder in ("a", "b"))
    assert first == second
    assert json.loads(first)["run_id"] == "virtual-7"


def test_log_lines_for_machines_have_the_virtual_time(quick_bare_shell: QuickShell) -> None:
    done = quick_bare_shell.run("simulate", "app.py:app", "--virtual", "--clients", "3", "--log-json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["virtual_s"] for line in lines if line.get("event") == "round_closed"] == [60, 120, 180]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "for real processes use: fedbus run APP"),
        (["--virtual", "--speeds", "fast"], "speeds must be constant, lognormal:SIGMA"),
        (["--virtual", "--availability", "trace:gone.csv"], "the trace gone.csv cannot be read"),
        (["--virtual", "--clients", "2"], "the app waits for 3 clients before its first round"),
    ],
)
def test_wrong_usage_is_one_line(quick_bare_shell: QuickShell, options: list[str], says: str) -> None:
    done = quick_bare_shell.run("simulate", "app.py:app", *options, "--run-dir", "out")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fedbus: ")]
    assert says in line
    assert not (quick_bare_shell.folder / "out").exists()


def test_ctrl_c_ends_a_simulation_in_good_order(bare_shell: Shell) -> None:
    terminal = bare_shell.start("simulate", "endless.py:app", "--virtual", "--clients", "3", "--run-dir", "out")
    terminal.until("round 20 closed")
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 1
    assert "stopped by Ctrl-C (run folder: out)" in terminal.output
    assert json.loads((bare_shell.folder / "out" / "history.json").read_text())["reason"] == "stopped by Ctrl-C"

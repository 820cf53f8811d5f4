"""FedProx counts what stragglers come to, and is the better for it than FedAvg, which drops them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedbus.bench.fedprox import METHODS, bench_fedprox
from tests.acceptance.conftest import QuickShell

pytestmark = pytest.mark.acceptance


@pytest.mark.parametrize("data_seed", [0, 1, 2])
def test_with_90_percent_of_stragglers_partial_work_is_worth_more_than_none(data_seed: int) -> None:
    dropped, partial = bench_fedprox(rounds=20, data_seeds=[data_seed], methods=METHODS[1:])
    assert dropped.updates == 20, "one in ten"
    assert partial.updates == 200
    assert partial.accuracy > dropped.accuracy + 0.05
    assert partial.loss < dropped.loss * 0.7


def test_people_get_a_table(tmp_path: Path) -> None:
    shell = QuickShell(tmp_path)
    done = shell.run("bench", "fedprox", "--rounds", "10", "--data-seeds", "1")
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["method", "data", "0"]
    assert [row.split("  ")[0].strip() for row in rows[:3]] == [method.name for method in METHODS]
    wrong = shell.run("bench", "fedprox", "--rounds", "9")
    assert (wrong.returncode, wrong.stderr) == (2, "fedbus: --rounds must be 10 or more: the last 10 are averaged\n")

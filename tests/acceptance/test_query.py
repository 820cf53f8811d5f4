"""Client processes that stay: they answer queries, one of them dies on the way, and then they train."""

from __future__ import annotations

import signal
from collections import Counter

import numpy as np
import pytest

from tests.acceptance.conftest import QuickShell, Shell, last_json, poll
from tests.vhosts import Vhost

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

APP = """
import time
from pathlib import Path
import numpy as np
import fedbus as fb


def columns(partition):
    rng = np.random.default_rng(partition)
    size = 100 * (partition + 1)
    age = rng.normal(54, 9, size)
    age[:partition] = np.nan
    return {"age": age, "cp": rng.integers(1, 5, size), "sex": rng.choice(["female", "male"], size)}


class Hospital(fb.NumPyClient):
    def __init__(self, context):
        self.context = context

    def query(self, config):
        if self.context.client_id == "b" and config["round"] == 4 and not Path("gate").exists():
            Path("asked").touch()
            time.sleep(60)
        return columns(self.context.partition)

    def fit(self, parameters, config):
        return [parameters[0] + 1], 10, {}


app = fb.App(
    client_fn=Hospital,
    initial_parameters=[np.zeros(2)],
    rounds=fb.RoundConfig.synchronous(3, num_rounds=2, fraction_evaluate=0),
)
"""


@pytest.fixture
def shell(quick_shell: QuickShell) -> QuickShell:
    """What happens before `fedbus` is imported is none of these tests' business."""
    return quick_shell


def pooled() -> dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    scope: dict[str, object] = {}
    exec(APP, scope)
    parts = [scope["columns"](partition) for partition in range(3)]  # type: ignore[operator]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_clients_answer_a_query_though_one_is_killed_and_then_train(shell: Shell, vhost: Vhost) -> None:
    (shell.folder / "app.py").write_text(APP)
    broker = ("--broker", vhost.url)

    def start(partition: int, name: str):  # type: ignore[no-untyped-def]
        where = ("--partition", str(partition), "--num-partitions", "3")
        return shell.start("client", "app.py", "--id", name, *where, *broker)

    clients = {name: start(partition, name) for partition, name in enumerate("abc")}
    figures_of_age = ("--variance", "age", "--histogram", "age:8")
    figures_of_cp = ("--extremes", "cp", "--quantiles", "cp:0.1,0.5", "--top", "cp")
    settings = ("--wait-for", "3", "--min-count", "1", "--json")
    query = shell.start("query", "app.py", *broker, *figures_of_age, *figures_of_cp, "--by", "sex", *settings)
    poll((shell.folder / "asked").exists, 30)
    clients["b"].signal(signal.SIGKILL)
    clients["b"].end()
    (shell.folder / "gate").touch()
    clients["b"] = start(1, "b")
    assert query.end() == 0, query.output
    found, data = last_json(query.output), pooled()
    age = data["age"][~np.isnan(data["age"])]
    assert (found["clients"], found["left_out"]) == (["a", "b", "c"], {})
    figures = found["columns"]["age"]
    assert (figures["count"], figures["missing"]) == (597, 3)
    assert [figures["mean"], figures["std"]] == pytest.approx([age.mean(), age.std()], rel=1e-14)
    assert figures["histogram"]["counts"] == np.histogram(age, 8)[0].tolist()
    quantiles = np.quantile(data["cp"], [0.1, 0.5], method="inverted_cdf").tolist()
    assert list(found["columns"]["cp"]["quantiles"].values()) == quantiles
    assert dict(found["columns"]["cp"]["top"]) == Counter(data["cp"].tolist())
    groups = {value: group["mean"] for value, group in figures["groups"]}
    assert groups == pytest.approx({sex: np.nanmean(data["age"][data["sex"] == sex]) for sex in ("male", "female")})

    wrong = shell.run("query", "app.py", *broker, "--mean", "weight", "--wait-for", "3")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "fedbus: no client has a column 'weight': a has age, cp, sex\n"

    trained = shell.run("server", "app.py", *broker, "--run-dir", "out", "--json")
    assert trained.returncode == 0, trained.stderr
    assert last_json(trained.stdout)["updates"] == 6
    assert [client.end() for client in clients.values()] == [0, 0, 0]

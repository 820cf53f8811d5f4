"""What a user types, and what comes of it: over a real RabbitMQ, with real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.bus.node import PrivateNode
from fedbus.tensorfile import load_model
from fedbus.types import Tensors
from tests.acceptance.conftest import QuickShell, Shell, last_json, poll
from tests.vhosts import Vhost

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

ADDING_APP = """
import pathlib, time
import numpy as np
import fedbus as fb

HERE = pathlib.Path(__file__).parent

class Adding(fb.NumPyClient):
    def __init__(self, context):
        self.name = context.client_id
        self.number = int("".join(filter(str.isdigit, self.name)) or 1)

    def fit(self, parameters, config):
        gate = HERE / f"gate-{config['round']}"
        while GATED and config["round"] == 4 and self.name != "c3" and not gate.exists():
            time.sleep(0.01)
        return [p + np.float32(self.number) for p in parameters], 10 * self.number, {}

    def evaluate(self, parameters, config):
        return float(parameters[0][0]), 1, {}

GATED = False
app = fb.App(
    client_fn=Adding,
    initial_parameters=[np.zeros(3, np.float32)],
    evaluate_fn=lambda round, model: (float(model["0"][0]), {}),
    rounds=fb.RoundConfig(num_rounds=3, min_fit_clients=3, heartbeat_s=0.5, lease_s=2),
)
"""


def write(folder: Path, source: str, name: str = "app.py") -> str:
    (folder / name).write_text(source)
    return f"{name}:app"


def clients_of(record: dict[str, Any]) -> set[str]:
    return {update["client_id"] for update in record["folded"]}


def history_of(run_dir: Path) -> dict[str, Any]:
    history = json.loads((run_dir / "history.json").read_text())
    assert isinstance(history, dict)
    return history


# ---- the main job ----------------------------------------------------------------------------------------------------


def test_the_demo_learns_while_one_client_dies_and_another_comes_late(shell: Shell) -> None:
    done = shell.run("demo", "--json")
    assert done.returncode == 0, done.stderr
    summary = last_json(done.stdout)
    assert summary["test_accuracy"] >= 0.95
    assert (summary["rounds"], summary["clients_joined"], summary["clients_lost"]) == (10, 11, 1)
    assert summary["seconds"] > 0
    run_dir = shell.folder / summary["run_dir"]
    assert {"history.json", "model.safetensors", "curves.png", "logs"} <= {path.name for path in run_dir.iterdir()}
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    history = history_of(run_dir)
    (lost,) = history["clients_lost"]
    assert lost in history["rounds"][2]["cohort"]
    assert lost not in clients_of(history["rounds"][2])
    assert "client-11" in history["clients_joined"][10:]
    assert any("client-11" in clients_of(record) for record in history["rounds"])
    assert f"SIGKILL to {lost} in the middle of round 3" in done.stderr
    assert f"{lost} is lost: silent for" in done.stderr
    assert "client-11 joined during round" in done.stderr


def test_run_gives_the_hand_computed_weighted_mean(shell: Shell) -> None:
    done = shell.run("run", write(shell.folder, ADDING_APP), "--clients", "3", "--json", "--run-dir", "out")
    assert done.returncode == 0, done.stderr
    summary = last_json(done.stdout)
    assert (summary["rounds"], summary["updates"], summary["run_dir"]) == (3, 9, "out")
    step = (10 * 1 + 20 * 2 + 30 * 3) / 60
    np.testing.assert_allclose(load_model(shell.folder / "out" / "model.safetensors")["0"], [3 * step] * 3, atol=1e-6)


def test_a_model_of_many_parts_passes_through_segment_after_segment_of_the_stream(
    quick_shell: QuickShell, vhost: Vhost
) -> None:
    source = """
import numpy as np
import fedbus as fb

class Same(fb.Client):
    def __init__(self, context):
        pass

    def fit(self, parameters, config):
        return fb.FitResult(parameters={"w": parameters["w"] + np.float32(1)}, num_examples=1)

app = fb.App(
    client_fn=Same,
    initial_parameters={"w": np.zeros(5 << 20, np.float32)},
    rounds=fb.RoundConfig(num_rounds=7, min_fit_clients=2, fraction_evaluate=0),
)
"""
    app = write(quick_shell.folder, source)
    done = quick_shell.run("run", app, "--clients", "2", "--run-dir", "out", "--json", "--broker", vhost.url)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["updates"] == 14  # 160 MiB through a stream of 64 MiB segments
    assert np.unique(load_model(quick_shell.folder / "out" / "model.safetensors")["w"]).tolist() == [7]


def test_one_client_with_all_the_digits_equals_training_them_alone(shell: Shell, vhost: Vhost) -> None:
    source = """
import dataclasses
from fedbus.examples import digits
import fedbus as fb
rounds = fb.RoundConfig(num_rounds=2, min_fit_clients=1)
app = dataclasses.replace(digits.app, rounds=rounds, fit_config={"local_epochs": 1})
"""
    app = write(shell.folder, source)
    done = shell.run("run", app, "--clients", "1", "--run-dir", "out", "--broker", vhost.url)
    assert done.returncode == 0, done.stderr
    from fedbus.examples import digits
    from fedbus.training.base import ClientContext

    client = digits.client_fn(ClientContext(client_id="client-01"))
    alone: Tensors = digits.initial_parameters()
    for round_ in (1, 2):
        alone = client.fit(alone, {"local_epochs": 1, "seed": 0, "round": round_}).parameters
    federated = load_model(shell.folder / "out" / "model.safetensors")
    for name, value in federated.items():
        np.testing.assert_allclose(value, alone[name], atol=1e-6)


def test_four_terminals_finish_a_run_whoever_comes_first_and_a_late_client_takes_part(shell: Shell) -> None:
    app = write(
        shell.folder,
        ADDING_APP.replace("GATED = False", "GATED = True")
        .replace("num_rounds=3", "num_rounds=5")
        .replace("min_fit_clients=3", "min_fit_clients=2"),
    )
    assert shell.run("broker", "status").returncode == 1
    started = shell.run("broker", "start", "--json")
    assert started.returncode == 0, started.stderr
    try:
        first = shell.start("client", app, "--id", "c1")
        first.until("c1: waiting for a server")
        server = shell.start("server", app, "--run-dir", "out")
        second = shell.start("client", app, "--id", "c2")
        server.until("round 4: 2 clients tasked")
        late = shell.start("client", app, "--id", "c3")
        server.until("c3 joined during round 4")
        server.until("round 4: update of c3 folded")
        (shell.folder / "gate-4").touch()
        assert [terminal.end() for terminal in (server, first, second, late)] == [0, 0, 0, 0]
    finally:
        assert shell.run("broker", "stop").returncode == 0
    history = history_of(shell.folder / "out")
    assert (history["finished"], len(history["rounds"])) == (True, 5)
    assert "c3" in clients_of(history["rounds"][3])


# ---- errors: one clear line, the right exit code ---------------------------------------------------------------------


def refused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


BAD_APPS = {
    "nothing.py:app": "there is no file nothing.py",
    "no.such.module:app": "there is no module 'no'",
    "good.py:ap": "good.py has no attribute 'ap': it has app",
    "good.py:np": "good.py:np is not a fedbus.App but module",
    "broken.py:app": "broken.py cannot be imported: ZeroDivisionError: division by zero (broken.py:1)",
    "syntax.py:app": "syntax.py cannot be imported: SyntaxError",
    "config.py:app": "cannot be imported: ConfigError: lease_s (2) must be at least twice heartbeat_s (5)",
}


def one_line(text: str) -> str:
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("fedbus: ")]
    return line


@pytest.mark.parametrize("reference", BAD_APPS)
def test_a_wrong_app_is_one_line_and_exit_code_2(quick_shell: QuickShell, reference: str) -> None:
    write(quick_shell.folder, ADDING_APP, "good.py")
    write(quick_shell.folder, "1 / 0", "broken.py")
    write(quick_shell.folder, "def", "syntax.py")
    write(quick_shell.folder, "import fedbus\napp = fedbus.RoundConfig(heartbeat_s=5, lease_s=2)", "config.py")
    for command in (["server", reference], ["client", reference, "--id", "a"], ["run", reference]):
        done = quick_shell.run(*command)
        assert done.returncode == 2, done.stderr
        assert BAD_APPS[reference] in one_line(done.stderr)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["server", "good.py"], 1, "no broker runs here: start one with 'fedbus broker start', or give --broker URL"),
        (["server", "good.py", "--broker", "http://x"], 2, "the broker URL must look like amqp://"),
        (["server", "good.py", "--broker", "amqp://x:notaport/"], 2, "the broker URL"),
        (["client", "good.py", "--id", "../x", "--broker", "amqp://127.0.0.1:1"], 2, "client id '../x' cannot be used"),
        (["client", "good.py", "--id", "a", "--partition", "3"], 2, "--partition 3 of --num-partitions 1"),
        (["run", "good.py", "--clients", "2"], 2, "the app waits for 3 clients before its first round"),
        (
            ["run", "good.py", "--clients", "3", "--run-dir", "good.py/x"],
            2,
            "the run folder good.py/x cannot be written",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line(quick_shell: QuickShell, args: list[str], code: int, message: str) -> None:
    write(quick_shell.folder, ADDING_APP, "good.py")
    done = quick_shell.run(*args)
    assert done.returncode == code, done.stderr
    assert message in one_line(done.stderr)


def test_an_unknown_option_is_exit_code_2(quick_shell: QuickShell) -> None:
    done = quick_shell.run("run", "--colour", "blue")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_broker_that_cannot_be_used_is_one_line_and_exit_code_1(quick_shell: QuickShell, node: PrivateNode) -> None:
    write(quick_shell.folder, ADDING_APP, "good.py")
    url = node.url
    secret = url.split(":")[2].split("@")[0]
    cases = {
        f"amqp://127.0.0.1:{refused_port()}/": "no broker answers at amqp://127.0.0.1",
        url.replace(secret, "wrong"): "refuses the user or the password",
        f"{url}nowhere": "refuses the vhost 'nowhere'",
    }
    for broker, message in cases.items():
        for command in (["server", "good.py"], ["client", "good.py", "--id", "a"]):
            done = quick_shell.run(*command, "--broker", broker)
            assert done.returncode == 1, done.stderr
            assert message in one_line(done.stderr)
            assert secret not in done.stdout + done.stderr


def test_a_missing_rabbitmq_and_a_taken_port_are_one_line_and_exit_code_1(quick_shell: QuickShell) -> None:
    write(quick_shell.folder, ADDING_APP, "good.py")
    for command in (["run", "good.py", "--clients", "3"], ["broker", "start"], ["demo"]):
        done = quick_shell.run(*command, FEDBUS_RABBITMQ=str(quick_shell.folder))
        assert done.returncode == 1
        assert "holds no rabbitmq-server" in one_line(done.stderr)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = quick_shell.run("broker", "start", "--port", str(port))
    assert done.returncode == 1
    assert f"port {port} " in one_line(done.stderr)


ODD_CLIENTS = """
import numpy as np
import fedbus as fb

print("imported")  # must not disturb anything

class Odd(fb.NumPyClient):
    def __init__(self, context):
        self.kind = context.partition

    def fit(self, parameters, config):
        if self.kind == 1:
            raise RuntimeError("the disk is full")
        if self.kind == 2:
            return [np.zeros(5, np.float32)], 1, {}
        if self.kind == 3:
            return parameters, 0, {}
        if self.kind == 4:
            return [parameters[0] * np.float32("nan")], 1, {}
        return [parameters[0] + np.float32(1)], 1, {}

app = fb.App(
    client_fn=Odd,
    initial_parameters=[np.zeros(3, np.float32)],
    rounds=fb.RoundConfig(num_rounds=2, min_fit_clients=2, min_available_clients=6, fraction_evaluate=0, grace_s=30),
)
"""


def test_what_clients_do_wrong_is_refused_or_reported_and_the_run_goes_on(
    quick_shell: QuickShell, vhost: Vhost
) -> None:
    app = write(quick_shell.folder, ODD_CLIENTS)
    done = quick_shell.run("run", app, "--clients", "6", "--run-dir", "out", "--broker", vhost.url)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for record in history_of(quick_shell.folder / "out")["rounds"]:
        assert clients_of(record) == {"client-01", "client-06"}
        assert record["failed"] == {
            "client-02": "fit raised RuntimeError: the disk is full",
            "client-03": "fit returned shape (5,) for tensor '0', the model has (3,)",
            "client-04": "num_examples is 0: an update needs at least one example",
            "client-05": "tensor '0' holds NaN or infinite values: did the training diverge?",
        }
    assert load_model(quick_shell.folder / "out" / "model.safetensors")["0"].tolist() == [2, 2, 2]
    log = (quick_shell.folder / "out" / "logs" / "client-05.log").read_text()
    assert "the server refused the update: tensor '0' holds NaN" in log
    raised = (quick_shell.folder / "out" / "logs" / "client-02.log").read_text()
    assert 'raise RuntimeError("the disk is full")' in raised  # the whole traceback, in the client's own log
    assert "client-02 failed to fit: fit raised RuntimeError: the disk is full" in done.stdout


# ---- signals and kills -----------------------------------------------------------------------------------------------

SLOW_APP = ADDING_APP.replace("GATED = False", "GATED = True").replace("num_rounds=3", "num_rounds=6")


def test_sigterm_ends_server_and_client_gracefully(quick_shell: QuickShell, vhost: Vhost) -> None:
    app = write(quick_shell.folder, SLOW_APP.replace("min_fit_clients=3", "min_fit_clients=2"))
    server = quick_shell.start("server", app, "--run-dir", "out", "--broker", vhost.url)
    leaving, staying = (quick_shell.start("client", app, "--id", name, "--broker", vhost.url) for name in ("c1", "c2"))
    server.until("round 4: 2 clients tasked")
    leaving.signal(signal.SIGTERM)  # in the middle of its fit
    assert leaving.end() == 0
    server.until("c1 left: it was asked to stop")
    server.signal(signal.SIGTERM)
    assert (server.end(), staying.end()) == (1, 1)
    assert "fedbus: the run ended after 3 rounds: stopped by SIGTERM" in server.output
    assert "the server ended the run early: stopped by SIGTERM" in staying.output
    assert "Traceback" not in server.output + leaving.output + staying.output
    history = history_of(quick_shell.folder / "out")
    assert (history["finished"], len(history["rounds"]), history["clients_left"]) == (False, 3, ["c1"])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_however_a_run_is_ended_nothing_of_it_is_left(shell: Shell, number: signal.Signals) -> None:
    run = shell.start("run", write(shell.folder, SLOW_APP), "--clients", "3", "--run-dir", "out")
    run.until("round 4: 3 clients tasked")
    assert any("beam" in line for line in shell.leftovers())
    run.signal(number)
    assert run.end() == (-9 if number is signal.SIGKILL else 1)
    poll(lambda: not shell.leftovers(), 15, shell.leftovers)


def test_a_slow_evaluate_fn_is_waited_for_when_the_clients_are_gone(quick_shell: QuickShell, vhost: Vhost) -> None:
    slow = 'evaluate_fn=lambda round, model: time.sleep(2 * (round == 3)) or (float(model["0"][0]), {})'
    source = ADDING_APP.replace('evaluate_fn=lambda round, model: (float(model["0"][0]), {})', slow)
    app = write(quick_shell.folder, source)
    done = quick_shell.run("run", app, "--clients", "3", "--run-dir", "out", "--broker", vhost.url)
    assert done.returncode == 0, done.stderr
    assert history_of(quick_shell.folder / "out")["rounds"][2]["central"]["loss"] > 0


def test_a_client_process_that_dies_in_a_run_is_noticed_and_the_run_goes_on(
    quick_shell: QuickShell, vhost: Vhost
) -> None:
    rounds = "min_fit_clients=2, min_available_clients=3, grace_s=float('inf')"  # each round waits for the living
    app = write(quick_shell.folder, SLOW_APP.replace("min_fit_clients=3", rounds))
    run = quick_shell.start("run", app, "--clients", "3", "--run-dir", "out", "--log-json", "--broker", vhost.url)
    run.until('"event": "round_opened"')
    poll(lambda: any(e.get("round") == 4 for e in events(run.output) if e["event"] == "round_opened"), 30)
    os.kill(pid_of(quick_shell, "client-02"), signal.SIGKILL)
    lost = json.loads(run.until('"event": "member_lost"'))
    assert lost["client_id"] == "client-02"
    (quick_shell.folder / "gate-4").touch()
    assert run.end() == 0
    assert history_of(quick_shell.folder / "out")["clients_lost"] == ["client-02"]


def events(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"time"')]


def pid_of(shell: Shell, client_id: str) -> int:
    """The process that has the client's log open."""
    log = os.fspath((shell.folder / "out" / "logs" / f"{client_id}.log").resolve())
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "fd" / "1") == log:
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no process writes to {log}")

"""Keeping an eye on a federation: /metrics, /healthz, `fedbus status`, and a Prometheus that scrapes a live run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedbus.bus.node import PrivateNode
from fedbus.bus.rabbitmq import connect
from fedbus.bus.topology import CONTROL
from tests.acceptance.alert_cases import CASES, QUIET
from tests.acceptance.conftest import QuickShell, Shell, Terminal, poll
from tests.unit.test_dashboard import DEPLOY, PANELS, RULES

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

ALERTS = DEPLOY / "prometheus" / "alerts.yml"
PARTIES = ("server", "client", "worker")
SELECTOR = re.compile(r"\b(?:fedbus|process|rabbitmq)_[a-z_]+(?:\{[^}]*\})?")

APP = """
import time
import numpy as np
import fedbus as fb

class Adding(fb.NumPyClient):
    def __init__(self, context):
        pass

    def fit(self, parameters, config):
        time.sleep(0.2)
        return [p + np.float32(1) for p in parameters], 1, {}

    def evaluate(self, parameters, config):
        return float(parameters[0][0]), 1, {"accuracy": 0.5}

app = fb.App(
    client_fn=Adding,
    initial_parameters=[np.zeros(3, np.float32)],
    evaluate_fn=lambda round, model: (float(model["0"][0]), {"accuracy": 0.25}),
    rounds=fb.RoundConfig(num_rounds=100_000, min_fit_clients=2, heartbeat_s=0.5, lease_s=2),
)
"""


@dataclass
class Live:
    """A federation that goes on and on, with the addresses of its parties' pages."""

    node: PrivateNode
    broker_metrics_port: int
    shell: Shell
    terminals: dict[str, Terminal] = field(default_factory=dict)
    pages: dict[str, str] = field(default_factory=dict)

    def start(self, name: str, *args: str) -> None:
        self.terminals[name] = self.shell.start(*args, "--metrics", "0")

    def find(self, name: str) -> None:
        line = self.terminals[name].until("metrics at http://")
        self.pages[name] = line.partition("metrics at ")[2].strip().removesuffix("/metrics")

    def get(self, name: str, page: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"{self.pages[name]}/{page}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.read().decode()

    def samples(self, name: str) -> dict[str, float]:
        """Every sample of one page."""
        lines = [line for line in self.get(name, "metrics")[1].splitlines() if not line.startswith("#")]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def show_metrics_of(node: PrivateNode, port: int) -> None:
    """Switch the broker's own metrics on, as rabbitmq-plugins does."""
    plugins = node.data_dir / "enabled_plugins"
    plugins.write_text("[rabbitmq_prometheus].\n")
    listener = f'[{{port, {port}}}, {{ip, "127.0.0.1"}}]'
    node.rabbitmqctl(
        "eval",
        "application:load(rabbitmq_prometheus),"
        f"application:set_env(rabbitmq_prometheus, tcp_config, {listener}),"
        f'{{ok, _, _}} = rabbit_plugins:ensure("{plugins}").',
    )


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, rabbitmq_installed: None) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "app.py").write_text(APP)
    with PrivateNode() as node:
        shell = QuickShell(folder)
        shell.env["FEDBUS_BROKER"] = node.url
        found = Live(node=node, broker_metrics_port=free_port(), shell=shell)
        try:
            found.start("server", "server", "app.py:app", "--virtual-clients", "2")
            found.start("client", "client", "app.py:app", "--id", "a")
            found.start("worker", "worker", "app.py:app")
            for name in PARTIES:
                found.find(name)
            show_metrics_of(node, found.broker_metrics_port)
            poll(lambda: found.samples("server").get("fedbus_model_version", 0) > 3, 30)
            yield found
        finally:
            shell.close()


def test_server_client_and_worker_show_their_metrics_and_that_they_are_well(live: Live) -> None:
    for name in PARTIES:
        status, body = live.get(name, "healthz")
        assert (status, json.loads(body)["status"], json.loads(body)["role"]) == (200, "ok", name)
        assert live.get(name, "livez")[0] == 200
        samples = live.samples(name)
        assert samples["fedbus_broker_connected"] == 1
        assert samples["process_resident_memory_bytes"] > 1 << 20
    poll(lambda: f'fedbus_queue_consumers{{queue="{CONTROL}"}}' in live.samples("server"))
    server = live.samples("server")
    assert server[f'fedbus_queue_consumers{{queue="{CONTROL}"}}'] == 1
    assert sum(server[f'fedbus_updates_total{{outcome="{outcome}"}}'] for outcome in ("folded", "late")) > 4
    assert server["fedbus_model_bytes"] == 12
    assert sum(server[f'fedbus_members{{state="{state}"}}'] for state in ("idle", "busy", "overdue")) == 3
    for name in ("client", "worker"):
        assert live.samples(name)['fedbus_tasks_total{kind="fit",outcome="completed"}'] > 1


def test_status_tells_the_federation_at_a_glance_again_and_again_until_it_is_stopped(live: Live) -> None:
    watching = live.shell.start("status", "--watch", "0.2", "--json")
    poll(lambda: len(watching.output.splitlines()) >= 3, 30, lambda: watching.output)
    watching.signal(signal.SIGINT)
    assert watching.end() == 0
    looks = [json.loads(line) for line in watching.output.splitlines()]
    found = looks[0]
    names = [member["client_id"] for member in found["server"]["members"]]
    assert sorted(names) == ["a", "virtual-00000-of-00002", "virtual-00001-of-00002"]
    assert found["server"]["server"]["pid"] == live.terminals["server"].process.pid
    assert found["queues"][CONTROL]["consumers"] == 1
    assert found["broker"]["nodes"] is None  # the node of a test is not that of `fedbus broker start`
    assert "--management" in found["broker"]["unknown"]
    versions = [look["server"]["version"] for look in looks]
    assert versions == sorted(versions)
    assert versions[-1] > versions[0] > 2


# ---- Prometheus ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prometheus_installed() -> None:
    if shutil.which("prometheus") is None or shutil.which("promtool") is None:
        if os.environ.get("CI"):
            pytest.fail("prometheus and promtool are not installed: apt install prometheus")
        pytest.skip("prometheus and promtool are not installed")


def promtool(*args: str | Path) -> None:
    done = subprocess.run(["promtool", *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules_and_the_configuration(prometheus_installed: None) -> None:
    promtool("check", "rules", ALERTS)
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_each_alert_fires_for_what_it_is_about_and_for_nothing_else(prometheus_installed: None, tmp_path: Path) -> None:
    assert {alert for alert, _, _ in CASES} == {rule["alert"] for rule in RULES}
    cases = [(at, series, [{"labels": f'{{alertname="{name}"}}', "value": 1}]) for name, at, series in CASES]
    cases += [(at, QUIET, []) for at in ("30m", "150m", "540m")]
    for interval, is_long in (("1m", False), ("10m", True)):  # nine hours minute by minute would take as many seconds
        tests = [case(at, series, firing) for at, series, firing in cases if (at == "540m") == is_long]
        file = tmp_path / f"{interval}.yml"
        file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": interval, "tests": tests}))
        promtool("test", "rules", file)


def case(at: str, series: dict[str, str], firing: list[dict[str, Any]]) -> dict[str, Any]:
    """One test of promtool: which alerts fire `at` that time."""
    expr = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": expr, "eval_time": at, "exp_samples": firing}],
    }


@dataclass
class Prometheus:
    """One that runs, and is asked."""

    port: int

    def api(self, path: str, **params: str) -> Any:
        query = urllib.parse.urlencode(params)
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def is_up(self) -> bool:
        try:
            return bool(self.api("status/buildinfo"))
        except OSError:
            return False

    def has_data(self, expression: str) -> bool:
        return bool(self.api("query", query=expression)["result"])


@pytest.fixture(scope="module")
def prometheus(
    prometheus_installed: None, live: Live, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")

    def job(name: str, *targets: str) -> dict[str, Any]:
        return {"job_name": name, "static_configs": [{"targets": list(targets), "labels": {"federation": "main"}}]}

    hosts = {name: url.removeprefix("http://") for name, url in live.pages.items()}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [
            job("fedbus-server", hosts["server"]),
            job("fedbus-client", hosts["client"]),
            job("fedbus-worker", hosts["worker"]),
            job("rabbitmq", f"127.0.0.1:{live.broker_metrics_port}"),
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    found = Prometheus(free_port())
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{found.port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        poll(found.is_up, 30, lambda: (folder / "log").read_text())
        yield found
    finally:
        process.terminate()
        process.wait(20)


async def say_nonsense(url: str) -> None:
    async with await connect(url) as bus:
        await bus.publish(CONTROL, "x", b"no message of ours")


def test_every_query_of_the_dashboard_and_of_the_alerts_finds_data_in_a_live_run(
    live: Live, prometheus: Prometheus
) -> None:
    asyncio.run(say_nonsense(live.node.url))
    queries = {
        target["expr"].replace("$__rate_interval", "10s").replace("$federation", ".*")
        for panel in PANELS
        for target in panel.get("targets", [])
    }
    # What an alert is about must be there; that it fires is shown by the rules' own tests.
    queries |= {selector for rule in RULES for selector in SELECTOR.findall(rule["expr"])}
    missing = set(queries)

    def all_found() -> bool:
        missing.difference_update({query for query in missing if prometheus.has_data(query)})
        return not missing

    poll(all_found, 40, lambda: missing)


def test_every_rule_can_be_evaluated_and_a_live_run_is_no_reason_for_an_alert(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]

    poll(lambda: all(rule["health"] != "unknown" for rule in rules()), 30, rules)
    assert {rule["name"]: rule.get("lastError", "") for rule in rules() if rule["health"] != "ok"} == {}
    assert {rule["name"] for rule in rules() if rule["state"] == "firing"} == set()


# ---- the end of it ---------------------------------------------------------------------------------------------------


def test_without_its_server_the_status_says_so_and_still_shows_the_queues(live: Live) -> None:
    live.terminals["server"].kill()
    done = live.shell.run("status")
    assert done.returncode == 1, done.stderr
    assert "none answers" in done.stdout
    assert re.search(r"^fedbus\.updates +\d+ +0$", done.stdout, re.MULTILINE)
    assert live.get("client", "healthz")[0] == 200  # a client waits for the next server, and is well

"""Metrics and health: what is counted is what has happened, and a hung process says that it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest

from fedbus.bus.memory import MemoryBroker
from fedbus.bus.topology import CONTROL, UPDATES, ingress
from fedbus.errors import ConfigError
from fedbus.observe import events as o
from fedbus.observe import watch as watch_module
from fedbus.observe.endpoint import Endpoint, Page, parse_address
from fedbus.observe.figures import ServerFigures
from fedbus.observe.health import BEAT_S, BLOCKED_PATIENCE_S, LOOP_PATIENCE_S, Health
from fedbus.observe.metrics import ClientMetrics, ServerMetrics, WorkerMetrics
from fedbus.observe.watch import watching
from fedbus.rounds.commands import MemberLost
from fedbus.types import Array, Scalar
from tests.kit import AddingClient, app_of, federation


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Sometimes(AddingClient):
    """c2's update is NaN in round 1, and c3's fit raises in round 2."""

    def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> tuple[list[Array], int, dict[str, Scalar]]:
        if (self.context.client_id, config["round"]) == ("c2", 1):
            return [value * np.float32("nan") for value in parameters], 1, {}
        if (self.context.client_id, config["round"]) == ("c3", 2):
            raise RuntimeError("no data today")
        return super().fit(parameters, config)


def fetch(url: str) -> tuple[int, str]:
    """The status and the body behind `url`."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as answer:
        with answer:
            return answer.code, answer.read().decode()


def value(text: str, sample: str) -> float:
    """The value of one sample, written as Prometheus writes it."""
    (found,) = [line.rpartition(" ")[2] for line in text.splitlines() if line.rpartition(" ")[0] == sample]
    return float(found)


def until_told(url: str, words: str) -> str:
    """The page, once `words` are on it."""
    give_up_at = time.monotonic() + 10
    while words not in (text := fetch(url)[1]):
        assert time.monotonic() < give_up_at, text
        time.sleep(0.01)
    return text


# ---- what is counted -------------------------------------------------------------------------------------------------


async def test_the_counters_of_a_run_equal_what_its_history_says() -> None:
    app = app_of(Sometimes, rounds={"num_rounds": 4, "min_fit_clients": 2, "min_available_clients": 3})
    async with federation(app) as story:
        metrics = ServerMetrics(Health())
        history = await story.run("c1", "c2", "c3")
        for event in story.events:
            metrics.observe(event)
        assert story.server is not None
        metrics.figures = story.server.figures
        text = metrics.text().decode()
    updates = [update for record in history.rounds for update in record.folded]
    assert value(text, 'fedbus_updates_total{outcome="folded"}') == sum(not u.staleness for u in updates)
    assert value(text, 'fedbus_updates_total{outcome="late"}') == sum(u.staleness > 0 for u in updates)
    assert value(text, "fedbus_update_staleness_versions_sum") == sum(u.staleness for u in updates)
    assert value(text, "fedbus_update_staleness_versions_count") == len(updates)
    assert value(text, "fedbus_update_folded_bytes_total") == sum(u.nbytes for u in updates)
    assert value(text, "fedbus_update_folded_raw_bytes_total") == sum(u.raw_bytes for u in updates) > 0
    assert value(text, 'fedbus_updates_total{outcome="refused"}') == sum(len(r.refused) for r in history.rounds)
    for reason in ("min_fit_clients", "cohort_done", "timeout"):
        closed = sum(record.reason == reason for record in history.rounds)
        assert value(text, f'fedbus_rounds_closed_total{{reason="{reason}"}}') == closed
    assert value(text, "fedbus_round_seconds_count") == len(history.rounds)
    assert value(text, "fedbus_round_seconds_sum") == pytest.approx(sum(r.seconds for r in history.rounds), abs=0.1)
    assert value(text, "fedbus_member_joins_total") == len(history.clients_joined)
    assert value(text, "fedbus_model_version") == history.rounds[-1].version
    assert history.federated is not None
    assert value(text, 'fedbus_evaluation_loss{where="federated"}') == history.federated.loss
    assert value(text, f'fedbus_run_info{{run_id="{history.run_id}"}}') == 1
    assert value(text, "fedbus_update_received_bytes_total") > sum(u.nbytes for u in updates)
    assert value(text, "fedbus_model_published_bytes_total") == 12 * (1 + len({r.version for r in history.rounds}))
    assert "_created" not in text


@pytest.mark.parametrize("where", ["central", "federated"])
def test_an_evaluation_that_ends_after_that_of_a_newer_model_is_not_shown(
    where: Literal["central", "federated"],
) -> None:
    metrics = ServerMetrics(Health())
    for round_, loss in ((1, 3.0), (3, 1.0), (2, 2.0)):
        accuracy = {"accuracy": loss / 10}
        metrics.observe(o.Evaluated(round=round_, where=where, loss=loss, metrics=accuracy, clients=1))
    text = metrics.text().decode()
    assert value(text, f'fedbus_evaluation_loss{{where="{where}"}}') == 1.0
    assert value(text, f'fedbus_evaluation_accuracy{{where="{where}"}}') == 0.1


async def test_a_client_counts_its_tasks_its_receipts_and_its_bytes() -> None:
    app = app_of(Sometimes, rounds={"num_rounds": 3, "min_fit_clients": 3, "timeout_s": 60.0})
    async with federation(app) as story:
        await story.run("c1", "c2", "c3")
        texts = {}
        for name, client in story.clients.items():
            metrics = ClientMetrics(Health())
            for event in story.events:
                if getattr(event, "client_id", "") == name and type(event).__module__ == o.__name__:
                    metrics.observe(event)
            figures = client.figures()
            metrics.figures = functools.partial(dataclasses.replace, figures)
            texts[name] = metrics.text().decode()
    completed = 'fedbus_tasks_total{kind="fit",outcome="completed"}'
    assert [value(texts[name], completed) for name in ("c1", "c2", "c3")] == [3, 3, 2]
    assert value(texts["c3"], 'fedbus_tasks_total{kind="fit",outcome="failed"}') == 1
    assert value(texts["c2"], "fedbus_client_refusals_total") == 1
    assert value(texts["c1"], "fedbus_client_receipts_total") == 3
    assert value(texts["c1"], 'fedbus_task_seconds_count{kind="fit"}') == 3
    assert value(texts["c1"], "fedbus_uploaded_bytes_total") > 3 * 12
    assert value(texts["c1"], "fedbus_downloaded_bytes_total") > 3 * 12
    assert value(texts["c1"], "fedbus_client_member") == 1
    assert value(texts["c1"], "fedbus_client_lease_seconds") == 2.0
    assert value(texts["c1"], "fedbus_client_last_welcome_timestamp_seconds") == pytest.approx(time.time(), abs=60)


def test_an_outage_counts_while_it_lasts_and_an_alarm_ends_with_its_connection() -> None:
    clock = Clock()
    health = Health(clock)
    metrics = ServerMetrics(health, clock)

    def happens(event: object) -> None:
        health.observe(event)
        metrics.observe(event)

    def read(sample: str) -> float:
        return value(metrics.text().decode(), sample)

    happens(o.ConnectedToBroker(broker="b", role="server"))
    happens(o.BrokerBlocked(broker="b", reason="low on memory"))
    clock.now = 5.0
    assert (read("fedbus_broker_blocked"), read("fedbus_broker_blocked_seconds_total")) == (1, 5)
    happens(o.BrokerLost(broker="b", reason="gone"))
    clock.now = 8.0
    assert (read("fedbus_broker_blocked"), read("fedbus_broker_blocked_seconds_total")) == (0, 5)
    assert (read("fedbus_broker_connected"), read("fedbus_broker_outage_seconds_total")) == (0, 3)
    happens(o.BrokerRestored(broker="b", outage_s=3.0))
    clock.now = 20.0
    assert (read("fedbus_broker_connected"), read("fedbus_broker_outage_seconds_total")) == (1, 3)
    assert read("fedbus_broker_reconnects_total") == 1
    happens(o.BrokerBlocked(broker="b", reason="low on disk"))
    clock.now = 21.0
    happens(o.BrokerUnblocked(broker="b", outage_s=1.0))
    assert read("fedbus_broker_blocked_seconds_total") == 6


def test_every_way_that_an_update_or_a_member_can_go_has_its_count() -> None:
    metrics = ServerMetrics(Health())
    named: dict[str, Any] = {"client_id": "a", "task_id": "t"}
    metrics.observe(o.UpdateRepeated(**named))
    metrics.observe(o.UpdateRefused(**named, reason="NaN"))
    metrics.observe(o.FitFailed(**named, round=1, reason="no"))
    metrics.observe(o.FitCancelled(**named, round=1, reason="late"))
    for cause in ("left", "lease", "lease", "unreachable"):
        metrics.observe(MemberLost(client_id="a", reason="", cause=cause, members=0, round=1))
    text = metrics.text().decode()
    for outcome in ("duplicate", "refused", "failed", "cancelled"):
        assert value(text, f'fedbus_updates_total{{outcome="{outcome}"}}') == 1
    causes = [value(text, f'fedbus_member_losses_total{{cause="{c}"}}') for c in ("left", "lease", "unreachable")]
    assert causes == [1, 2, 1]


def test_users_have_labels_up_to_a_limit_and_nobody_else_has() -> None:
    metrics = ServerMetrics(Health())
    for number in range(5000):
        metrics.observe(o.MessageRejected(queue=CONTROL, reason="", user=f"user-{number}"))
    metrics.observe(o.MessageRejected(queue=CONTROL, reason="", user="user-0"))
    metrics.observe(o.MessageRejected(queue=UPDATES, reason="", user=None))
    text = metrics.text().decode()
    assert text.count("fedbus_messages_rejected_total{") == 256 + 2
    assert value(text, f'fedbus_messages_rejected_total{{queue="{CONTROL}",user="user-0"}}') == 2
    assert value(text, f'fedbus_messages_rejected_total{{queue="{CONTROL}",user="other"}}') == 5000 - 256
    assert value(text, f'fedbus_messages_rejected_total{{queue="{UPDATES}",user="none"}}') == 1


def test_a_client_that_gets_nonsense_counts_it_without_its_own_name() -> None:
    metrics = ClientMetrics(Health())
    metrics.observe(o.MessageRejected(queue="fedbus.inbox.hospital-a", reason=""))
    text = metrics.text().decode()
    assert value(text, 'fedbus_messages_rejected_total{queue="fedbus.inbox",user="none"}') == 1


async def test_a_worker_counts_the_tasks_of_whomever_it_plays() -> None:
    app = app_of(rounds={"num_rounds": 2, "min_fit_clients": 3, "fraction_evaluate": 0})
    async with federation(app) as story:
        metrics, server = WorkerMetrics(Health()), ServerMetrics(Health())
        assert "fedbus_worker_slots " not in metrics.text().decode()
        serving = story.start_server(virtual_clients=3)
        working = story.start_worker("w1", slots=2)
        assert (await serving).updates == 6
        metrics.figures = story.workers["w1"].figures
        story.workers["w1"].request_stop()
        assert await working == 6
        for event in story.events:
            metrics.observe(event)
            server.observe(event)
        text = metrics.text().decode()
    assert value(text, 'fedbus_tasks_total{kind="fit",outcome="completed"}') == 6
    assert value(text, "fedbus_uploaded_bytes_total") > 6 * 12
    assert value(text, "fedbus_downloaded_bytes_total") > 2 * 12
    assert [value(text, f"fedbus_worker_{name}") for name in ("has_work", "slots", "tasks_in_hand")] == [1, 2, 0]
    assert "virtual-" not in text
    assert value(server.text().decode(), 'fedbus_updates_total{outcome="folded"}') == 6


def test_the_workers_that_the_server_counts_are_told() -> None:
    metrics = ServerMetrics(Health())
    metrics.observe(o.WorkersCounted(workers=7))
    assert value(metrics.text().decode(), "fedbus_workers") == 7


async def test_staged_bytes_and_slots_show_what_lies_in_memory() -> None:
    figures = ServerFigures(
        version=7,
        open_round=8,
        open_s=1.5,
        idle=1,
        busy=2,
        overdue=3,
        uploads_granted=4,
        uploads_waiting=5,
        staged_bytes=6,
        received_bytes=9,
    )
    metrics = ServerMetrics(Health())
    metrics.figures = lambda: figures
    text = metrics.text().decode()
    assert [value(text, f'fedbus_members{{state="{s}"}}') for s in ("idle", "busy", "overdue")] == [1, 2, 3]
    assert [value(text, f'fedbus_upload_slots{{state="{s}"}}') for s in ("granted", "waiting")] == [4, 5]
    assert (value(text, "fedbus_staging_bytes"), value(text, "fedbus_round_open")) == (6, 8)


# ---- health ----------------------------------------------------------------------------------------------------------


def test_health_is_a_loop_that_runs_a_broker_that_listens_and_a_run_that_goes_on() -> None:
    clock = Clock()
    health = Health(clock)
    assert health.problem() == "it has not connected to the broker yet"
    health.observe(o.ConnectedToBroker(broker="b", role="server"))
    assert health.problem() == ""
    clock.now += LOOP_PATIENCE_S + 1
    assert health.problem() == health.loop_problem() == "the event loop has not run for 11 s"
    health.beat()
    health.observe(o.BrokerLost(broker="b", reason="its heartbeats stayed out"))
    assert health.problem() == "the broker is lost: its heartbeats stayed out"
    assert health.loop_problem() == ""
    health.observe(o.BrokerRestored(broker="b", outage_s=1.0))
    health.observe(o.BrokerBlocked(broker="b", reason="low on memory"))
    assert health.problem() == ""
    clock.now += BLOCKED_PATIENCE_S + 1
    health.beat()
    assert health.problem() == "the broker has held publishes back for 61 s"
    health.observe(o.BrokerUnblocked(broker="b", outage_s=61.0))
    assert health.problem() == ""
    health.observe(o.RunFinished(finished=False, reason="stopped by SIGTERM", rounds=1, seconds=1.0))
    assert health.problem() == "the run is over: stopped by SIGTERM"


def test_a_run_that_is_done_is_no_problem() -> None:
    health = Health()
    health.observe(o.ConnectedToBroker(broker="b", role="client"))
    health.observe(o.ClientDone(client_id="a", finished=True, reason=""))
    assert health.problem() == ""


async def test_while_the_event_loop_hangs_the_pages_still_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(watch_module, "Health", lambda: Health(clock))
    monkeypatch.setattr(watch_module, "_SCRAPE_PATIENCE_S", 0.05)
    told: list[Any] = []
    version = 1
    async with watching("server", "0", [told.append]) as watch:
        (exposed,) = told
        root = exposed.url.removesuffix("/metrics")
        for observe in watch.observers:
            observe(o.ConnectedToBroker(broker="b", role="server"))
        watch.read(lambda: figures_of(version))
        status, body = await asyncio.to_thread(fetch, f"{root}/healthz")
        assert (status, json.loads(body)["status"], json.loads(body)["role"]) == (200, "ok", "server")
        version = 2
        assert value((await asyncio.to_thread(fetch, exposed.url))[1], "fedbus_model_version") == 2
        version, clock.now = 3, clock.now + 100.0  # from here the loop is ours: nothing else in it runs
        status, body = fetch(f"{root}/healthz")
        assert (status, json.loads(body)["reason"]) == (503, "the event loop has not run for 100 s")
        assert fetch(f"{root}/livez")[0] == 503
        text = fetch(exposed.url)[1]
        assert value(text, "fedbus_model_version") == 2
        assert value(text, "fedbus_event_loop_silence_seconds") == 100
        beaten = asyncio.Event()
        asyncio.get_running_loop().call_later(BEAT_S + 0.1, beaten.set)
        await beaten.wait()
        assert fetch(f"{root}/livez")[0] == 200


def figures_of(version: int) -> ServerFigures:
    zero = dict.fromkeys(("open_round", "idle", "busy", "overdue", "uploads_granted", "uploads_waiting"), 0)
    return ServerFigures(version=version, open_s=0.0, staged_bytes=0, received_bytes=0, **zero)


async def test_the_depth_of_the_queues_is_looked_at_and_one_that_is_missing_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch_module, "_FIRST_LOOK_S", 0.0)
    broker = MemoryBroker()
    bus = broker.connect("server")
    await bus.declare(ingress())
    for _ in range(3):
        await bus.publish(CONTROL, "server", b"x")
    told: list[Any] = []
    async with watching("server", "0", [told.append]) as watch:
        watch.look_at(bus)
        text = await asyncio.to_thread(until_told, told[0].url, "fedbus_queue_messages{")
        assert value(text, 'fedbus_queue_messages{queue="fedbus.control"}') == 3
        assert "fedbus.work" not in text
        for observe in watch.observers:
            observe(o.BrokerLost(broker="b", reason="gone"))
        assert "fedbus_queue_messages{" not in (await asyncio.to_thread(fetch, told[0].url))[1]
    await bus.close()


# ---- where it is served ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9100", ("127.0.0.1", 9100)),
        ("0", ("127.0.0.1", 0)),
        ("0.0.0.0:9100", ("0.0.0.0", 9100)),
        ("monitor.example:80", ("monitor.example", 80)),
        ("[::1]:9100", ("::1", 9100)),
    ],
)
def test_an_address_is_a_port_or_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", ":9100", "::1:9100", "[::1]", "1:65536", "1:-1", "1:1e3", "²"])
def test_what_is_no_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"looks like 9100, 0\.0\.0\.0:9100 or \[::\]:9100"):
        parse_address(text)


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


async def test_a_port_that_is_taken_is_said_in_one_line() -> None:
    with taken_port() as port, pytest.raises(ConfigError, match=f"served at {port}: Address already in use. Give"):
        async with watching("server", str(port)):
            pass


async def test_a_host_that_is_not_ours_is_said_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"served at 192\.0\.2\.1:0: "):
        async with watching("server", "192.0.2.1:0"):
            pass


async def test_without_prometheus_client_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "fedbus.observe.metrics")
    with pytest.raises(ConfigError, match=r"pip install 'fedbus\[metrics\]'"):
        async with watching("server", "0"):
            pass


async def test_nobody_watches_unless_that_is_asked_for() -> None:
    told: list[object] = []
    async with watching("client", None, [told.append]) as watch:
        watch.read(lambda: [])
        assert list(watch.observers) == told == []


def test_a_page_that_fails_or_is_not_there_says_so_and_the_next_one_is_served() -> None:
    def fails() -> Page:
        raise ValueError("broken")

    fine = Page(status=200, content_type="text/plain", body=b"fine")
    with Endpoint("0", {"/fails": fails, "/fine": lambda: fine}) as endpoint:
        assert fetch(f"{endpoint.url}/fails") == (500, "ValueError: broken\n")
        assert fetch(f"{endpoint.url}/nothing") == (404, "there is: /fails /fine\n")
        assert fetch(f"{endpoint.url}/fine?x=1") == (200, "fine")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_an_ipv6_address_stands_in_brackets() -> None:
    page = Page(status=200, content_type="text/plain", body=b"six")
    try:
        endpoint = Endpoint("[::1]:0", {"/": lambda: page})
    except ConfigError as exc:
        pytest.skip(str(exc))
    with endpoint:
        assert endpoint.url.startswith("http://[::1]:")
        assert fetch(f"{endpoint.url}/") == (200, "six")


def test_connections_that_say_nothing_do_not_get_a_thread_each() -> None:
    page = Page(status=200, content_type="text/plain", body=b"here")
    with Endpoint("0", {"/": lambda: page}) as endpoint, contextlib.ExitStack() as stack:
        host, port = endpoint.url.removeprefix("http://").split(":")
        idle = [stack.enter_context(socket.create_connection((host, int(port)), timeout=10)) for _ in range(17)]
        assert idle[-1].recv(1) == b""  # turned away; the others have their threads
        idle[0].close()
        while True:  # until its thread has seen that
            with contextlib.suppress(OSError):
                assert fetch(f"{endpoint.url}/") == (200, "here")
                break

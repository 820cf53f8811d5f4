"""Queries over a bus: rounds that are questions, with the fault rules of all rounds."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.after_evaluation import EarlyStopping
from fedbus.analytics.inquiry import Inquiry
from fedbus.analytics.local import answer
from fedbus.analytics.result import QueryResult
from fedbus.analytics.run import QuerySession
from fedbus.analytics.statistics import Mean, Quantiles, Statistic, TopValues, Variance
from fedbus.app import App
from fedbus.bus.base import Bus, hold_patiently
from fedbus.errors import QueueBusy, RunFailed
from fedbus.observe import events as o
from fedbus.types import Array, Scalar
from tests.kit import AddingClient, Federation, app_of, eventually, federation

DATA = {f"client-{n}": np.random.default_rng(n).normal(50, 10, size=20 * n) for n in (1, 2, 3)}
POOLED = np.concatenate(list(DATA.values()))


class Hospital(AddingClient):
    """Has an age for each patient, and trains as well."""

    hook: Callable[[str], object] = staticmethod(lambda client_id: None)

    def query(self, config: dict[str, Scalar]) -> Mapping[str, Array]:
        self.hook(self.context.client_id)
        ages = DATA.get(self.context.client_id, np.arange(10.0 * self.context.partition, 10.0))
        return {"age": ages, "old": ages > 50}


def hospitals(hook: Callable[[str], object] = lambda client_id: None, **settings: Any) -> App:
    class Hooked(Hospital):
        pass

    Hooked.hook = staticmethod(hook)
    return app_of(Hooked, **settings)


def session(story: Federation, *statistics: Statistic, **settings: Any) -> QuerySession:
    wanted = {name: settings.pop(name) for name in ("min_clients", "min_count", "by") if name in settings}
    inquiry = Inquiry(statistics or [Mean("age")], **{"min_clients": 1, "min_count": 1, **wanted})
    settings = {"wait_for": 3, "timeout_s": 30.0, **settings}
    return QuerySession(story.app, story.connect("server"), inquiry, observers=[story.observe], **settings)


async def ended(story: Federation, query: QuerySession) -> QueryResult:
    result = await story._start(query.run())
    await story.all_buses[-1].close()
    return result


async def test_a_query_finds_what_numpy_finds_in_the_pooled_data() -> None:
    async with federation(hospitals()) as story:
        clients = [story.start_client(name) for name in DATA]
        result = await ended(story, session(story, Variance("age"), Quantiles("age", [0.1, 0.5]), TopValues("old")))
        age, old = result["age"], result["old"]
        assert result.clients == list(DATA)
        assert age.mean == pytest.approx(POOLED.mean(), rel=1e-14)
        assert age.std == pytest.approx(POOLED.std(), rel=1e-14)
        expected = np.quantile(POOLED, [0.1, 0.5], method="inverted_cdf").tolist()
        assert age.quantiles == dict(zip([0.1, 0.5], expected, strict=True))
        assert old.top is not None
        assert dict(old.top.values) == {True: int((POOLED > 50).sum()), False: int((POOLED <= 50).sum())}
        assert result.rounds <= 67
        assert not any(client.done() for client in clients)  # they stay for the next server
        assert {event.kind for event in story.told(o.TaskStarted)} == {"query"}, "who owns the data reads what is asked"


async def test_what_an_app_does_with_evaluations_and_metrics_is_nothing_to_a_query() -> None:
    """There are none: what waits for them would be refused, what looks at them would raise in each round."""
    settings: dict[str, Any] = {
        "evaluate_fn": lambda round, model: (0.0, {}),
        "after_evaluation": [EarlyStopping("loss", where="central")],
        "aggregate_fit_metrics": lambda reports: {"n": sum(metrics["n"] for _, metrics in reports)},
    }
    async with federation(hospitals(**settings)) as story:
        for name in DATA:
            story.start_client(name)
        result = await ended(story, session(story, Mean("age")))
        assert result["age"].mean == pytest.approx(POOLED.mean(), rel=1e-14)
        assert story.told(o.MetricsFailed) == []


async def test_the_same_clients_answer_a_query_train_and_answer_another() -> None:
    app = hospitals(rounds={"min_fit_clients": 3, "num_rounds": 2})
    async with federation(app) as story:
        clients = [story.start_client(name) for name in DATA]
        first = await ended(story, session(story))
        history = await story.start_server(keeps_clients=True)
        assert story.server_bus is not None
        await story.server_bus.close()
        assert (history.finished, history.updates) == (True, 6)
        second = await ended(story, session(story))
        assert (first["age"].to_dict(), first.clients) == (second["age"].to_dict(), second.clients)
        assert (await story.start_server()).finished
        assert None not in await asyncio.gather(*clients)


async def test_a_client_that_dies_in_the_middle_and_comes_back_is_in_every_figure() -> None:
    loop, doomed, goes_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    asked = 0

    def hook(client_id: str) -> None:
        nonlocal asked
        if client_id == "client-2" and not goes_on.is_set():
            asked += 1
            if asked == 5:
                loop.call_soon_threadsafe(doomed.set)
                goes_on.wait(20)

    async with federation(hospitals(hook)) as story:
        tasks = {name: story.start_client(name) for name in DATA}
        query = session(story, Quantiles("age", [0.5]))
        running = story._start(query.run())
        await doomed.wait()
        await story.kill("client-2", tasks["client-2"])
        goes_on.set()
        query.server.client_lost("client-2", "its connection is gone")
        story.start_client("client-2")
        result = await running
        assert result.clients == list(DATA)
        assert result["age"].quantiles == {0.5: np.quantile(POOLED, 0.5, method="inverted_cdf")}
        assert result["age"].count == POOLED.size


async def test_a_client_that_hangs_is_left_out_of_every_figure() -> None:
    release = threading.Event()
    asked = 0

    def hook(client_id: str) -> None:
        nonlocal asked
        asked += client_id == "client-3"
        if client_id == "client-3" and asked > 2:
            release.wait(20)

    async with federation(hospitals(hook)) as story:
        for name in DATA:
            story.start_client(name)
        result = await ended(story, session(story, Mean("age"), Quantiles("age", [0.5]), timeout_s=1.0))
        release.set()
        rest = np.concatenate([DATA["client-1"], DATA["client-2"]])
        assert result.clients == ["client-1", "client-2"]
        assert list(result.left_out) == ["client-3"]
        assert result["age"].count == rest.size
        assert result["age"].mean == pytest.approx(rest.mean())


async def test_a_client_whose_answers_are_refused_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def forging(columns: Any, question: Any, config: Any) -> dict[str, Array]:
        given = answer(columns, question, config)
        is_liar = np.asarray(columns["age"]).size == 60  # client-3
        return {**given, "sums": -given["sums"]} if is_liar else given

    monkeypatch.setattr("fedbus.analytics.local.answer", forging)
    async with federation(hospitals()) as story:
        for name in DATA:
            story.start_client(name)
        result = await ended(story, session(story, Mean("age")))
        assert result.clients == ["client-1", "client-2"]
        assert result.left_out == {"client-3": "a count that is none"}
        assert result["age"].count == 60


async def test_a_client_without_the_method_is_told_with_its_name() -> None:
    async with federation(app_of()) as story:
        for name in DATA:
            story.start_client(name)
        with pytest.raises(RunFailed, match=r"^nobody answered; client-1: AddingClient has no query method: define it"):
            await ended(story, session(story))


async def test_too_few_clients_are_an_error_after_the_timeout() -> None:
    async with federation(hospitals()) as story:
        story.start_client("client-1")
        with pytest.raises(RunFailed, match=r"^one client came within 0.3 s, 2 must be there$"):
            await ended(story, session(story, min_clients=2, wait_for=None, timeout_s=0.3))


async def test_a_query_that_is_stopped_says_so() -> None:
    async with federation(hospitals()) as story:
        query = session(story)
        running = story._start(query.run())
        await story.until(o.RunStarted)
        query.stop("stopped by SIGTERM")
        with pytest.raises(RunFailed, match=r"^stopped by SIGTERM$"):
            await running


async def test_there_is_no_query_beside_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.server.runtime.hold_patiently", functools.partial(hold_patiently, patience_s=0.0))
    async with federation(hospitals()) as story:
        story.start_server()
        await story.until(o.RunStarted)
        with pytest.raises(QueueBusy, match="another server runs on this broker"):
            await ended(story, session(story))


async def test_workers_answer_for_virtual_clients() -> None:
    async with federation(hospitals()) as story:
        story.start_worker("worker")
        result = await ended(story, session(story, Mean("age"), virtual_clients=4, wait_for=None, timeout_s=20.0))
        assert (len(result.clients), result["age"].count) == (4, 10)


async def test_a_query_survives_the_loss_of_its_connection() -> None:
    async with federation(hospitals(), supervised=True) as story:
        for name in DATA:
            story.start_client(name)
        inquiry = Inquiry([Quantiles("age", [0.5])], min_clients=1, min_count=1)
        query: QuerySession | None = None

        def on_state(state: Any) -> None:
            if query is not None:
                (query.server.connection_lost if state.kind == "lost" else query.server.connection_restored)()

        bus: Bus = story.connect("server", on_state)
        query = QuerySession(story.app, bus, inquiry, wait_for=3, timeout_s=30, observers=[story.observe])
        running = story._start(query.run())
        await story.until(o.RoundClosed, 10)
        story.cut_off("server").set()
        result = await running
        assert result["age"].quantiles == {0.5: np.quantile(POOLED, 0.5, method="inverted_cdf")}
        assert result.clients == list(DATA)


async def test_a_newcomer_does_not_change_what_is_counted() -> None:
    async with federation(hospitals()) as story:
        tasks = [story.start_client(name) for name in ("client-1", "client-2")]
        query = session(story, Mean("age"), Quantiles("age", [0.5]), wait_for=2)
        running = story._start(query.run())
        await story.until(o.RoundClosed, 3)
        tasks.append(story.start_client("client-3"))
        await eventually(lambda: running.done() or bool(story.told(o.MemberJoined, client_id="client-3")))
        result = await running
        assert result.clients == ["client-1", "client-2"]
        assert result["age"].count == 60


class Counting(Hospital):
    """Remembers how often it was trained."""

    def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> tuple[list[Array], int, dict[str, Scalar]]:
        fits = float(self.context.memory.get("fits", np.zeros(1))[0]) + 1
        self.context.memory["fits"] = np.array([fits])
        return parameters, 1, {"fits": fits}


COUNTING = {"min_fit_clients": 3, "num_rounds": 4, "fraction_evaluate": 0, "heartbeat_s": 0.8, "lease_s": 40.0}


async def test_a_query_between_two_servers_of_a_run_leaves_what_the_clients_remember(tmp_path: Path) -> None:
    async with federation(app_of(Counting, rounds=COUNTING), run_dir=tmp_path) as story:
        clients = [story.start_client(name) for name in DATA]
        story.start_server()
        await story.until(o.RoundClosed, round=2)
        await story.kill_server()
        assert (await ended(story, session(story)))["age"].count == POOLED.size
        history = await story.resume_server()
        await asyncio.gather(*clients)
        assert [record.fit_metrics["fits"] for record in history.rounds] == [1.0, 2.0, 3.0, 4.0]


async def test_a_run_goes_on_at_once_after_a_query_that_was_killed(tmp_path: Path) -> None:
    async with federation(app_of(Counting, rounds=COUNTING), run_dir=tmp_path) as story:
        clients = [story.start_client(name) for name in DATA]
        story.start_server()
        await story.until(o.RoundClosed, round=2)
        await story.kill_server()
        query = session(story, Quantiles("age"))
        running = story._start(query.run())
        await story.until(o.RoundClosed, 1, round=9)
        running.cancel()
        await asyncio.wait([running])
        await story.all_buses[-1].close()
        history = await story.resume_server()
        await asyncio.gather(*clients)
        assert [record.fit_metrics["fits"] for record in history.rounds] == [1.0, 2.0, 3.0, 4.0]

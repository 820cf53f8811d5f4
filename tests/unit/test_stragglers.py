"""Whole stories over the memory bus in which nobody waits: stragglers, comings and goings, asynchronous rounds."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.bus.topology import inbox, model_stream
from fedbus.client.reader import ModelReader, Place
from fedbus.config import RoundConfig
from fedbus.observe import events as o
from fedbus.rounds.clients import ClientRecord
from fedbus.server.checkpoint import RunFolder
from fedbus.server.history import History
from fedbus.strategies.fedbuff import FedBuff
from fedbus.training.base import Client, ClientContext
from fedbus.types import Array, Config, EvaluateResult, FitResult, Tensors
from tests.kit import Counting, Gate, app_of, federation

QUICK: dict[str, Any] = {"heartbeat_s": 0.05, "lease_s": 5.0, "timeout_s": 30.0, "fraction_evaluate": 0}


class Versions:
    """Clients that add 1 to a counter of versions in the model, and note which version each of them trained."""

    def __init__(self) -> None:
        self.trained: defaultdict[str, list[int]] = defaultdict(list)
        self.seconds: dict[str, float] = {}
        self.gates: dict[str, threading.Event] = {}
        self.looks_at_cancelled = True
        self.cancelled: list[str] = []

    def client_fn(self, context: ClientContext) -> Client:
        versions = self

        class Training(Client):
            def fit(self, parameters: Tensors, config: Config) -> FitResult:
                name = context.client_id
                versions.trained[name].append(round(float(parameters["w"][0])))
                time.sleep(versions.seconds.get(name, 0.001))
                gate = versions.gates.get(name)
                while gate is not None and not gate.is_set():
                    if versions.looks_at_cancelled and context.cancelled:
                        versions.cancelled.append(name)
                        raise RuntimeError("stopped in the middle of an epoch")
                    time.sleep(0.002)
                return FitResult(parameters={"w": parameters["w"] + 1}, num_examples=1)

            def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
                gate = versions.gates.get(f"{context.client_id} evaluates")
                if gate is not None:
                    gate.wait(20)
                return EvaluateResult(loss=0.0, num_examples=1)

        return Training()


def app(versions: Versions, rounds: RoundConfig) -> Any:
    made = app_of(versions.client_fn, initial_parameters={"w": np.zeros(3, np.float32)})
    made.rounds = rounds
    return made


# ---- told to stop ----------------------------------------------------------------------------------------------------


async def test_training_that_nobody_waits_for_is_told_to_stop_and_gets_the_newest_task() -> None:
    versions = Versions()
    versions.gates["slow"] = threading.Event()
    rounds = RoundConfig(num_rounds=6, min_fit_clients=2, min_available_clients=3, max_staleness=1, **QUICK)
    async with federation(app(versions, rounds)) as story:
        serving = story.start_server()
        for name in ("a", "b", "slow"):
            story.start_client(name)
        told = await story.until(o.TaskCancelled, client_id="slow")
        assert "max_staleness is 1" in told.reason
        assert versions.cancelled[0] == "slow"
        versions.gates["slow"].set()
        history = await serving
        assert story.told(o.TaskErred) == []  # what fit said when it was stopped is no failure of its own
        assert "max_staleness is 1" in next(r.refused["slow"] for r in history.rounds if "slow" in r.refused)
        assert len(history.rounds) == 6


async def test_training_that_does_not_listen_is_not_uploaded_and_its_client_trains_the_newest_version_next() -> None:
    versions = Versions()
    versions.looks_at_cancelled = False
    versions.gates["slow"] = threading.Event()
    versions.gates["a"] = versions.gates["b"] = threading.Event()
    versions.gates["a"].set()
    rounds = RoundConfig(num_rounds=40, min_fit_clients=2, min_available_clients=3, max_staleness=1, **QUICK)
    async with federation(app(versions, rounds)) as story:
        story.start_server()
        for name in ("a", "b", "slow"):
            story.start_client(name)
        cancelled = await story.until(o.FitCancelled)
        versions.gates["slow"].set()
        await story.until(o.UpdateFolded, client_id="slow")
        assert versions.trained["slow"][0] == 0
        assert versions.trained["slow"][1] > cancelled.round - 1  # nothing from the backlog
        assert story.told(o.RefusalArrived) == []  # for nothing was sent in vain


async def test_a_task_that_was_not_begun_is_dropped_when_it_is_cancelled() -> None:
    versions = Versions()
    versions.gates["slow evaluates"] = threading.Event()
    settings = {**QUICK, "fraction_evaluate": 1.0}
    rounds = RoundConfig(num_rounds=12, min_fit_clients=2, min_available_clients=3, max_staleness=1, **settings)
    async with federation(app(versions, rounds)) as story:
        serving = story.start_server()
        clients = [story.start_client(name) for name in ("a", "b", "slow")]
        cancelled = await story.until(o.TaskCancelled, client_id="slow")
        await story.until(o.CohortGrew)  # it is asked again
        before = len(versions.trained["slow"])
        versions.gates["slow evaluates"].set()
        await serving
        await asyncio.gather(*clients)
        assert cancelled.round > 1
        assert cancelled.round - 1 not in versions.trained["slow"][before:]


async def test_a_task_that_is_cancelled_while_its_model_is_fetched_is_never_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    versions = Versions()
    versions.looks_at_cancelled = False
    may_read = asyncio.Event()
    read = ModelReader.read

    async def slow_read(reader: ModelReader, place: Place) -> dict[str, Array]:
        if place.version == 0 and reader is story.clients["slow"]._reader:
            await may_read.wait()
        return await read(reader, place)

    monkeypatch.setattr(ModelReader, "read", slow_read)
    rounds = RoundConfig(num_rounds=30, min_fit_clients=2, min_available_clients=3, max_staleness=1, **QUICK)
    async with federation(app(versions, rounds)) as story:
        serving = story.start_server()
        clients = [story.start_client(name) for name in ("a", "b", "slow")]
        await story.until(o.FitCancelled)
        await asyncio.sleep(0.01)  # the word is on its way
        may_read.set()
        await serving
        await asyncio.gather(*clients)
        assert 0 not in versions.trained["slow"]


# ---- longer than the timeout -----------------------------------------------------------------------------------------


async def test_updates_of_a_fit_that_takes_longer_than_the_timeout_count_and_no_version_is_trained_twice() -> None:
    versions = Versions()
    versions.seconds = {"slow": 0.5, "a": 0.05}
    rounds = RoundConfig(
        num_rounds=18, min_fit_clients=2, min_available_clients=2, **{**QUICK, "timeout_s": 0.2, "heartbeat_s": 2.0}
    )
    async with federation(app(versions, rounds)) as story:
        history = await story.run("a", "slow")
        late = [update for record in history.rounds for update in record.folded if update.client_id == "slow"]
        assert len(late) >= 3
        assert all(update.staleness > 0 for update in late)
        assert versions.trained["slow"] == sorted(set(versions.trained["slow"]))
        assert all(record.reason == "timeout" or len(record.folded) == 2 for record in history.rounds)
        assert story.told(o.RefusalArrived) == []


async def test_a_client_alone_whose_fit_takes_longer_than_the_timeout_gets_on() -> None:
    versions = Versions()
    versions.seconds = {"slow": 0.45}
    rounds = RoundConfig(num_rounds=9, min_fit_clients=1, **{**QUICK, "timeout_s": 0.2, "heartbeat_s": 2.0})
    async with federation(app(versions, rounds)) as story:
        history = await story.run("slow")
        assert versions.trained["slow"][:3] == [0, 1, 2]
        assert history.updates >= 3
        assert any(record.folded == [] for record in history.rounds)


# ---- comings and goings ----------------------------------------------------------------------------------------------


async def test_half_of_the_clients_leave_for_ever_and_new_ones_join_and_all_rounds_close() -> None:
    counting = Counting()
    settings = {**QUICK, "num_rounds": 10, "min_fit_clients": 3, "over_selection": 1.0, "lease_s": 0.4, "timeout_s": 5}
    async with federation(app_of(counting.client_fn, rounds=settings)) as story:
        leaving = {"c4", "c5", "c6"}
        gate = threading.Event()
        counting.hooks.append(lambda client, round_: gate.wait(10) if round_ in (3, 6) else None)
        serving = story.start_server()
        tasks = {name: story.start_client(name) for name in ("c1", "c2", "c3", "c4", "c5", "c6")}
        await story.until(o.RoundOpened, round=3)
        await story.kill("c4", tasks["c4"])
        story.clients["c5"].request_leave()
        story.clients["c6"].request_leave()
        await story.until(o.MemberLost, 3)
        gate.set()
        await story.until(o.RoundOpened, round=6)
        for name in ("n1", "n2", "n3"):
            story.start_client(name)
        history = await serving
    assert [record.round for record in history.rounds] == list(range(1, 11))
    assert all(len(record.folded) == 3 for record in history.rounds)
    assert set(history.clients_left) == {"c5", "c6"}
    assert history.clients_lost == ["c4"]
    for record in history.rounds[3:]:
        assert not leaving & set(record.cohort)
    assert set().union(*(record.clients for record in history.rounds[5:])) & {"n1", "n2", "n3"}
    assert all(record.clients <= set(record.cohort) for record in history.rounds)


async def test_an_update_whose_client_went_counts_and_when_it_is_back_it_is_in_the_next_round() -> None:
    gate = Gate(only="b")
    settings = {**QUICK, "num_rounds": 3, "min_fit_clients": 2, "lease_s": 0.3}
    async with federation(app_of(gate.client_fn, rounds=settings)) as story:
        serving = story.start_server()
        a = story.start_client("a")
        story.start_client("b")
        await story.until(o.UpdateFolded, client_id="a")
        await story.kill("a", a)
        await story.until(o.MemberLost, client_id="a")
        gate.open()
        closed = await story.until(o.RoundClosed, round=1)
        assert closed.folded == 2
        story.start_client("a")
        history = await serving
        assert [record.clients for record in history.rounds] == [{"a", "b"}] * 3


async def test_a_client_whose_inbox_is_gone_when_its_task_comes_is_replaced_at_once() -> None:
    settings = {**QUICK, "num_rounds": 2, "min_fit_clients": 2, "over_selection": 1.0, "min_available_clients": 3}
    async with federation(app_of(rounds=settings)) as story:
        connection = story.broker.connect("operator")
        serving = story.start_server()
        for name in ("a", "b"):
            story.start_client(name)
        await story.until(o.MemberJoined, 2)
        await connection.delete_queue(inbox("a"))
        story.start_client("c")
        history = await serving
        assert history.clients_lost == ["a"]
        assert [record.clients for record in history.rounds] == [{"b", "c"}] * 2
        assert story.told(o.MemberLost)[0].reason.startswith("its inbox is gone")
        await connection.close()


# ---- asynchronous ----------------------------------------------------------------------------------------------------


async def test_in_a_buffered_run_every_version_has_k_updates_and_the_slow_ones_count_late() -> None:
    versions = Versions()
    versions.seconds = {"slow": 0.1}
    rounds = RoundConfig.buffered(3, num_rounds=80, min_available_clients=3, max_staleness=1000, **QUICK)
    async with federation(app(versions, rounds)) as story:
        history = await story.run("a", "b", "slow")
        assert all(len(record.folded) == 3 for record in history.rounds)
        slow = [update for record in history.rounds for update in record.folded if update.client_id == "slow"]
        assert max(update.staleness for update in slow) > 0
        assert history.clients["slow"].folded == len(slow)
        assert history.clients["a"].folded > 3 * len(slow)
        assert versions.trained["a"] == sorted(versions.trained["a"])


@pytest.mark.parametrize("keeps_a_folder", [True, False])
async def test_fedasync_mixes_in_the_model_that_a_late_client_trained_not_its_step(
    keeps_a_folder: bool, tmp_path: Path
) -> None:
    versions = Versions()
    versions.seconds = {"slow": 0.06, "a": 0.005}
    rounds = RoundConfig.asynchronous(0.6, num_rounds=60, min_available_clients=2, max_staleness=40, **QUICK)
    async with federation(app(versions, rounds), run_dir=tmp_path if keeps_a_folder else None) as story:
        history = await story.run("a", "slow")
        by_hand = [0.0]
        for (update,) in (record.folded for record in history.rounds):
            base = by_hand[-1 - update.staleness]
            a = 0.6 / (1 + update.staleness) ** 0.5
            by_hand.append((1 - a) * by_hand[-1] + a * (base + 1))
        assert max(update.staleness for record in history.rounds for update in record.folded) > 2
        np.testing.assert_allclose(story.model()["w"], by_hand[-1], rtol=1e-5)
    if keeps_a_folder:
        assert len(list((tmp_path / "checkpoints").iterdir())) == 1  # the earlier ones are of no use any more


async def test_fedbuff_adds_the_discounted_steps_and_divides_by_their_number() -> None:
    versions = Versions()
    versions.seconds = {"slow": 0.05}
    rounds = RoundConfig.buffered(2, num_rounds=40, min_available_clients=2, max_staleness=100, **QUICK)
    async with federation(app(versions, rounds)) as story:
        history = await story.run("a", "slow")
        by_hand = sum((1 + update.staleness) ** -0.5 / 2 for record in history.rounds for update in record.folded)
        assert max(update.staleness for record in history.rounds for update in record.folded) > 2
        np.testing.assert_allclose(story.model()["w"], by_hand, rtol=1e-5)


async def test_fedasync_goes_on_after_a_restart_with_updates_of_versions_before_it(tmp_path: Path) -> None:
    versions = Versions()
    versions.gates["slow"] = threading.Event()
    rounds = RoundConfig.asynchronous(0.6, num_rounds=12, min_available_clients=2, **QUICK)
    async with federation(app(versions, rounds), run_dir=tmp_path) as story:
        story.start_server()
        story.start_client("a")
        story.start_client("slow")
        await story.until(o.RoundClosed, round=3)
        await story.kill_server()
        serving = story.resume_server()
        versions.gates["slow"].set()
        history = await serving
        (late, *_) = [u for record in history.rounds for u in record.folded if u.client_id == "slow"]
        assert late.staleness >= 3
        assert history.finished


def test_the_stream_keeps_more_versions_where_each_update_makes_one() -> None:
    def kept(model_bytes: int, versions: int) -> int | None:
        return model_stream(model_bytes, versions=versions).queues[0].max_bytes

    assert kept(1 << 20, 32) == kept(1 << 20, 4) == 256 << 20
    assert (kept(32 << 20, 4), kept(32 << 20, 32)) == (256 << 20, 1 << 30)
    assert (kept(1 << 30, 4), kept(1 << 30, 32)) == (4 << 30, 8 << 30)
    assert kept(4 << 30, 32) == 16 << 30


async def test_what_is_written_to_disk_does_not_change_under_the_thread_that_writes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save = RunFolder.save_history

    def save_while_clients_come(folder: RunFolder, history: History, records: Iterable[str]) -> None:
        assert story.server is not None
        before = history.to_json()
        story.server.history.clients[f"late-{len(story.server.history.clients)}"] = ClientRecord(client_id="late")
        story.server.history.clients_joined.append("late")
        assert history.to_json() == before
        save(folder, history, records)

    monkeypatch.setattr(RunFolder, "save_history", save_while_clients_come)
    async with federation(app_of(rounds={"num_rounds": 3, "fraction_evaluate": 0}), run_dir=tmp_path) as story:
        assert (await story.run("a", "b")).finished


async def test_an_asynchronous_run_whose_server_is_killed_again_and_again_has_the_model_that_its_ledger_tells(
    tmp_path: Path,
) -> None:
    counting = Counting()
    made = counting.app(strategy=FedBuff())
    made.rounds = RoundConfig.buffered(2, num_rounds=14, min_available_clients=3, **QUICK)
    async with federation(made, run_dir=tmp_path) as story:
        story.start_server()
        for name in ("c1", "c2", "c3"):
            story.start_client(name)
        for round_ in (2, 5, 8, 11):
            await story.until(o.RoundClosed, round=round_)
            await story.kill_server()
            serving = story.resume_server()
        history = await serving
        assert [record.version for record in history.rounds] == list(range(1, 15))
        assert all(len(record.folded) == 2 for record in history.rounds)
        assert history.clients["c1"].folded == sum(u.client_id == "c1" for r in history.rounds for u in r.folded)
        db = sqlite3.connect(tmp_path / "ledger.sqlite")
        rows = db.execute("SELECT task_id, staleness FROM folded").fetchall()
        db.close()
        assert len(rows) == len({task_id for task_id, _ in rows}) == 28
        by_hand = np.zeros(3)
        for task_id, staleness in rows:
            _, _, round_, client, *_ = task_id.split("/")
            step = np.random.default_rng([*client.encode(), int(round_)]).normal(size=3)
            by_hand += step * (1 + staleness) ** -0.5 / 2
        np.testing.assert_allclose(story.model()["w"], by_hand, atol=1e-5)


@pytest.mark.parametrize("client", ["a", "b"])
async def test_what_each_client_did_is_in_the_history(client: str, tmp_path: Path) -> None:
    async with federation(app_of(rounds={"num_rounds": 3, "fraction_evaluate": 0}), run_dir=tmp_path) as story:
        history = await story.run("a", "b")
        record = history.clients[client]
        assert (record.asked, record.folded, record.failed, record.nbytes) == (3, 3, 0, 36)
        assert record.mean_seconds is not None
        assert f'"client_id": "{client}"' in (tmp_path / "history.json").read_text()

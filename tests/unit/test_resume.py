"""Stories of servers that die and others that go on, over the memory bus."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

import fedbus.bus.supervised
import fedbus.server.runtime
from fedbus.bus.topology import CONTROL, SERVER_LOCK, TASKS, UPDATES, inbox
from fedbus.client.outbox import Entry, Outbox
from fedbus.client.runtime import ClientRuntime
from fedbus.errors import ConfigError, QueueBusy, RunFailed
from fedbus.observe import events as o
from fedbus.rounds import commands as c
from fedbus.rounds import events as e
from fedbus.server.history import RoundRecord
from fedbus.server.intake import UpdateIntake
from fedbus.server.ledger import Fenced, Ledger
from fedbus.server.publisher import ModelPublisher
from fedbus.server.runtime import Server, _Events
from fedbus.tensorfile import save_model
from fedbus.types import Array
from fedbus.wire import messages as m
from fedbus.wire.codec import encode
from fedbus.wire.transfer import MIN_PART_BYTES, Outgoing
from tests.faults.failing import Fault, When
from tests.kit import Counting, Federation, Pause, federation

CLIENTS = ("c1", "c2", "c3")


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory all is given again at once."""
    monkeypatch.setattr(fedbus.server.runtime, "_REDELIVERY_PAUSE_S", 0.02)
    monkeypatch.setattr(fedbus.server.runtime, "_NOTES_EVERY_S", 0.0)
    monkeypatch.setattr(fedbus.bus.supervised, "_BUSY_PAUSE_S", 0.01)


async def bits_without_faults(counting: Counting, clients: tuple[str, ...] = CLIENTS, **settings: Any) -> bytes:
    async with federation(Counting(counting.size).app(**settings)) as story:
        await story.run(*clients)
        return story.bits()


# ---- the server dies at any point of a commit ------------------------------------------------------------------------


def only_once(pause: Pause, original: Callable[..., Awaitable[Any]], when: Callable[..., bool]) -> Callable[..., Any]:
    """`original`, but the first call that `when` is true of hangs, and never does anything."""
    hung = False

    async def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal hung
        if not hung and when(*args, **kwargs):
            hung = True
            await pause.here()
        return await original(*args, **kwargs)

    return patched


def only_once_in_thread(pause: Pause, original: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    hung = False

    def patched(*args: Any, **kwargs: Any) -> Any:
        nonlocal hung
        if not hung and when(*args, **kwargs):
            hung = True
            pause.in_thread()
            raise OSError("this process is dead")
        return original(*args, **kwargs)

    return patched


Hang: TypeAlias = Callable[[pytest.MonkeyPatch, Pause], None]


def _before_a_fold(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    patch.setattr(Server, "_fold", only_once(pause, Server._fold, lambda _, job: job.command.round == 2))


def _before_the_last_fold(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    def when(server: Server, job: Any) -> bool:
        return bool(job.command.round == 2 and len(server._folded) == 2)

    patch.setattr(Server, "_fold", only_once(pause, Server._fold, when))


def _between_checkpoint_and_ledger(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    original = Ledger.commit_round
    patch.setattr(
        Ledger, "commit_round", only_once_in_thread(pause, original, lambda _, record, rows, **rest: record.round == 2)
    )


def _between_ledger_and_ack(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    commits = iter(range(1, 100))
    patch.setattr(UpdateIntake, "settle_all", only_once(pause, UpdateIntake.settle_all, lambda *_: next(commits) == 2))


def _between_ack_and_receipt(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    patch.setattr(
        # Only the last round's receipts travel alone: others go with the next task, before the acknowledgements.
        Server,
        "_send_receipt",
        only_once(pause, Server._send_receipt, lambda _, command: command.round == 4),
    )


def _between_ledger_and_publication(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    committed = threading.Event()
    commit_round, publish = Ledger.commit_round, ModelPublisher.publish
    hangs = only_once(pause, publish, lambda _, model, version, head: version == 2)

    def commit_and_tell(self: Ledger, record: RoundRecord, rows: Any, **rest: Any) -> None:
        commit_round(self, record, rows, **rest)
        if record.round == 2:
            committed.set()

    async def publish_once_committed(self: ModelPublisher, model: Any, version: int, head: Any) -> Any:
        if version == 2:
            await asyncio.to_thread(committed.wait, 10)
        return await hangs(self, model, version, head)

    patch.setattr(Ledger, "commit_round", commit_and_tell)
    patch.setattr(ModelPublisher, "publish", publish_once_committed)


def _between_noting_tasks_and_sending_them(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    def when(_: Server, command: c.SendFitTask, receipt: object) -> bool:
        return command.round == 2

    patch.setattr(Server, "_send_fit_task", only_once(pause, Server._send_fit_task, when))


def _in_the_first_publication(patch: pytest.MonkeyPatch, pause: Pause) -> None:
    patch.setattr(Ledger, "commit_model", only_once_in_thread(pause, Ledger.commit_model, lambda *_: True))


HANGS: tuple[Hang, ...] = (
    _before_a_fold,
    _before_the_last_fold,
    _between_checkpoint_and_ledger,
    _between_ledger_and_ack,
    _between_ack_and_receipt,
    _between_ledger_and_publication,
    _between_noting_tasks_and_sending_them,
    _in_the_first_publication,
)


@pytest.mark.parametrize("hang", HANGS)
@pytest.mark.parametrize("size", [3, 400_000])
async def test_a_server_killed_anywhere_in_a_round_is_resumed_as_if_nothing_had_been(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hang: Hang, size: int
) -> None:
    counting = Counting(size)
    expected = await bits_without_faults(counting)
    async with federation(counting.app(), run_dir=tmp_path) as story:
        pause = Pause()
        hang(monkeypatch, pause)
        story.start_server()
        clients = [story.start_client(client) for client in CLIENTS]
        await pause.reached()
        await story.kill_server()
        pause.go_on()
        history = await story.resume_server()
        for client in clients:
            ended = await client
            assert ended is not None
            assert ended.finished
        story.check_whole(history, CLIENTS, 4)
        assert story.bits() == expected
    assert set(counting.asked.values()) == {1}


async def test_a_server_killed_before_it_kept_the_model_of_a_client_takes_it_when_it_comes_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counting = Counting()
    app = counting.app(initial_parameters=None, num_clients=1)
    async with federation(app, run_dir=tmp_path) as story:
        pause = Pause()
        _in_the_first_publication(monkeypatch, pause)
        story.start_server()
        story.start_client("c1")
        await pause.reached()
        await story.kill_server()
        pause.go_on()
        history = await story.resume_server()
        story.check_whole(history, ["c1"], 4)
        assert story.bits() == await bits_without_faults(counting, ("c1",), num_clients=1)
    assert set(counting.asked.values()) == {1}


# ---- clients that are gone, updates that are gone, fits that failed --------------------------------------------------


class Hold:
    """Holds these fits, (client, round), until it is let go."""

    def __init__(self, counting: Counting, *fits: tuple[str, int]) -> None:
        self._fits = fits
        self._is_over = threading.Event()
        counting.hooks.append(self._hold)

    def _hold(self, client: str, round_: int) -> None:
        if (client, round_) in self._fits:
            assert self._is_over.wait(30)

    def let_go(self) -> None:
        self._is_over.set()


async def test_an_update_whose_sender_is_gone_for_good_is_in_the_round_and_the_others_go_on(tmp_path: Path) -> None:
    counting = Counting()
    hold = Hold(counting, ("c2", 2), ("c3", 2))
    async with federation(counting.app(rounds={"lease_s": 0.4}), run_dir=tmp_path) as story:
        story.start_server()
        leaving, *_ = [story.start_client(client) for client in CLIENTS]
        await story.until(o.UpdateFolded, client_id="c1", round=2)
        await story.kill_server()
        await story.kill("c1", leaving)
        serving = story.resume_server()
        hold.let_go()
        history = await serving
    assert history.rounds[1].clients == set(CLIENTS)
    assert [record.clients for record in history.rounds[2:]] == [{"c2", "c3"}] * 2
    assert (history.clients_lost, history.rounds[2].lost) == (["c1"], ["c1"])


@pytest.mark.parametrize("size", [3, 400_000])
async def test_what_comes_again_over_a_new_connection_stays_with_the_broker_until_its_commit(
    tmp_path: Path, size: int
) -> None:
    """Acknowledged as a copy, it would be gone with the server that has folded and not committed it."""
    counting = Counting(size)
    hold = Hold(counting, ("c2", 2), ("c3", 2))
    app = counting.app(rounds={"lease_s": 0.4})
    async with federation(app, run_dir=tmp_path, supervised=True) as story:
        story.start_server()
        leaving, *_ = [story.start_client(client) for client in CLIENTS]
        await story.until(o.UpdateFolded, client_id="c1", round=2)
        await story.kill("c1", leaving)  # with its outbox
        story.links["server"].drop()
        await asyncio.sleep(0.3)  # the broker has given all again
        await story.kill_server()
        assert story.broker.depth(UPDATES) > 0
        serving = story.resume_server()
        hold.let_go()
        history = await serving
    assert history.rounds[1].clients == set(CLIENTS)


@pytest.mark.parametrize("size", [3, 400_000])
async def test_updates_that_the_broker_lost_are_sent_again_without_being_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    counting = Counting(size)
    expected = await bits_without_faults(counting)
    async with federation(counting.app(), run_dir=tmp_path) as story:
        pause = Pause()
        _before_the_last_fold(monkeypatch, pause)
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await pause.reached()
        await story.kill_server()
        assert story.broker.depth(UPDATES) > 0
        story.broker.purge(UPDATES)
        history = await story.resume_server()
        story.check_whole(history, CLIENTS, 4)
        assert story.bits() == expected
    assert set(counting.asked.values()) == {1}


async def test_updates_that_the_broker_still_has_are_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting()
    sent: list[str] = []
    deliver = Outbox.deliver

    async def counted(outbox: Outbox, entry: Entry) -> None:
        sent.append(entry.task.task_id)
        await deliver(outbox, entry)

    receive = UpdateIntake.receive

    async def late(intake: UpdateIntake) -> None:
        await asyncio.sleep(0.03)  # a real broker takes its time to give them again
        await receive(intake)

    monkeypatch.setattr(fedbus.server.runtime, "_REDELIVERY_PAUSE_S", 0.2)
    monkeypatch.setattr(UpdateIntake, "receive", late)
    monkeypatch.setattr(Outbox, "deliver", counted)
    async with federation(counting.app(), run_dir=tmp_path) as story:
        pause = Pause()
        _before_the_last_fold(monkeypatch, pause)
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await pause.reached()
        await story.kill_server()
        history = await story.resume_server()
        story.check_whole(history, CLIENTS, 4)
    assert len(sent) == len(set(sent)) == 12


async def test_a_fit_that_failed_before_the_kill_stays_failed_after_it(tmp_path: Path) -> None:
    counting = Counting()

    def fail(client: str, round_: int) -> None:
        if (client, round_) == ("c2", 2):
            raise ValueError("no data today")

    counting.hooks.append(fail)
    hold = Hold(counting, ("c3", 2))
    async with federation(counting.app(), run_dir=tmp_path) as story:
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(c.FitFailed, client_id="c2", round=2)
        await story.until(o.UpdateFolded, client_id="c1", round=2)
        await story.kill_server()
        serving = story.resume_server()
        hold.let_go()
        history = await serving
    assert history.rounds[1].failed == {"c2": "fit raised ValueError: no data today"}
    assert [record.clients for record in history.rounds] == [
        set(CLIENTS),
        {"c1", "c3"},
        set(CLIENTS),
        set(CLIENTS),
    ]
    assert counting.asked["c2", 2] == 1


async def test_a_failure_stays_known_when_its_client_is_gone_for_good(tmp_path: Path) -> None:
    counting = Counting()

    def fail(client: str, round_: int) -> None:
        if (client, round_) == ("c2", 2):
            raise ValueError("no data today")

    counting.hooks.append(fail)
    hold = Hold(counting, ("c3", 2))
    async with federation(counting.app(rounds={"lease_s": 0.4}), run_dir=tmp_path) as story:
        story.start_server()
        clients = {client: story.start_client(client) for client in CLIENTS}
        await story.until(c.FitFailed, client_id="c2", round=2)
        await story.kill_server()
        await story.kill("c2", clients["c2"])
        serving = story.resume_server()
        hold.let_go()
        history = await serving
    assert history.rounds[1].failed == {"c2": "fit raised ValueError: no data today"}
    assert history.rounds[1].lost == []


async def test_a_failure_that_nobody_heard_of_is_told_again_and_not_trained_again(tmp_path: Path) -> None:
    counting = Counting()

    def fail(client: str, round_: int) -> None:
        if (client, round_) == ("c2", 2):
            raise ValueError("no data today")

    counting.hooks.append(fail)
    hold = Hold(counting, ("c2", 2))
    async with federation(counting.app(), run_dir=tmp_path) as story:
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.UpdateFolded, client_id="c1", round=2)
        await story.until(o.UpdateFolded, client_id="c3", round=2)
        await story.kill_server()
        hold.let_go()
        await story.until(o.TaskErred, client_id="c2", round=2)
        await asyncio.sleep(0)
        story.broker.purge(CONTROL)
        history = await story.resume_server()
    assert history.rounds[1].failed == {"c2": "fit raised ValueError: no data today"}
    assert counting.asked["c2", 2] == 1


async def test_the_late_update_of_a_straggler_is_folded_after_the_resume_with_its_staleness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting()
    hold = Hold(counting, ("c3", 1))
    app = counting.app(rounds={"min_fit_clients": 2, "min_available_clients": 3})
    async with federation(app, run_dir=tmp_path) as story:
        pause = Pause()
        _before_a_fold(monkeypatch, pause)
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await pause.reached()
        await story.kill_server()
        hold.let_go()
        await story.until(o.TaskCompleted, client_id="c3", round=1)
        history = await story.resume_server()
    assert {(update.client_id, update.staleness) for update in history.rounds[1].folded} == {
        ("c1", 0),
        ("c2", 0),
        ("c3", 1),
    }
    assert counting.asked["c3", 1] == 1
    assert history.finished


@pytest.mark.parametrize("num_rounds", [2, 4])
async def test_evaluations_that_were_under_way_are_done_after_the_resume(tmp_path: Path, num_rounds: int) -> None:
    counting = Counting()
    hold = threading.Event()
    hold_clients = threading.Event()

    def evaluate(round_: int, model: dict[str, Array]) -> tuple[float, dict[str, Any]]:
        assert round_ != 2 or hold.wait(30)
        return float(round_), {}

    counting.evaluate_hooks.append(lambda _, round_: round_ != 2 or hold_clients.wait(30))
    hold_fits = Hold(counting, *((client, 3) for client in CLIENTS))
    app = counting.app(evaluate_fn=evaluate, num_rounds=num_rounds, rounds={"fraction_evaluate": 1.0})
    async with federation(app, run_dir=tmp_path) as story:
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.RoundClosed, round=2)
        await story.until(o.TaskStarted, 1, kind="fit" if num_rounds > 2 else "evaluate", round=num_rounds - 1)
        await story.kill_server()
        hold.set()
        serving = story.resume_server()
        await story.until(o.RunResumed)
        hold_clients.set()
        if num_rounds > 2:
            await story.until(o.RoundOpened, 2, round=3)  # everybody is at work
        hold_fits.let_go()
        history = await serving
    assert [record.central.loss for record in history.rounds if record.central] == list(range(1, num_rounds + 1))
    assert history.initial is not None
    assert history.initial.loss == 0
    assert [record.federated.clients for record in history.rounds if record.federated] == [3] * num_rounds
    assert history.updates == 3 * num_rounds


async def test_the_history_goes_on_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    app = counting.app(evaluate_fn=lambda round_, model: (float(round_), {}), rounds={"fraction_evaluate": 1.0})
    async with federation(app) as story:
        clean = await story.run(*CLIENTS)
    async with federation(app, run_dir=tmp_path) as story:
        pause = Pause()
        _between_ledger_and_publication(monkeypatch, pause)
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        gone = story.start_client("gone")
        await story.until(o.MemberJoined, client_id="gone")
        story.clients["gone"].request_leave()
        await gone
        await pause.reached()
        run_id, started_at = story.told(o.RunStarted)[0].run_id, story.server.history.started_at if story.server else ""
        await story.kill_server()
        history = await story.resume_server()
    assert (history.run_id, history.started_at) == (run_id, started_at)
    assert sorted(history.clients_joined) == [*CLIENTS, "gone"]
    assert (history.clients_lost, history.clients_left) == ([], ["gone"])
    assert (history.settings, history.initial, history.finished, history.reason) == (
        clean.settings,
        clean.initial,
        True,
        "all rounds are done",
    )
    assert json.loads((tmp_path / "history.json").read_text()) == json.loads(history.to_json())
    opened = [record.opened_s for record in history.rounds]
    assert opened == sorted(opened)


@pytest.mark.parametrize("hang", [_before_the_last_fold, _between_ledger_and_ack, _between_ledger_and_publication])
async def test_random_cohorts_are_those_of_the_run_without_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang: Hang
) -> None:
    six = tuple(f"c{n}" for n in range(6))
    rounds = {"min_fit_clients": 3, "min_available_clients": 6, "fraction_fit": 0.5}
    counting = Counting()
    async with federation(counting.app(rounds=rounds)) as story:
        clean = await story.run(*six)
        expected = story.bits()
    counting.asked.clear()
    async with federation(counting.app(rounds=rounds), run_dir=tmp_path) as story:
        pause = Pause()
        hang(monkeypatch, pause)
        story.start_server()
        for client in six:
            story.start_client(client)
        await pause.reached()
        await story.kill_server()
        history = await story.resume_server()
        assert story.bits() == expected
    cohorts = [sorted(record.cohort) for record in clean.rounds]
    assert [sorted(record.cohort) for record in history.rounds] == cohorts
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert set(counting.asked.values()) == {1}


# ---- folders ---------------------------------------------------------------------------------------------------------


async def test_resuming_a_finished_run_returns_its_history_at_once_and_writes_it(tmp_path: Path) -> None:
    counting = Counting()
    async with federation(counting.app(), run_dir=tmp_path) as story:
        first = await story.run(*CLIENTS)
        (tmp_path / "history.json").unlink()
        assert await story.resume_server() == first
    assert json.loads((tmp_path / "history.json").read_text()) == json.loads(first.to_json())
    assert set(counting.asked.values()) == {1}


async def test_resuming_an_empty_folder_begins_a_run(tmp_path: Path) -> None:
    counting = Counting()
    async with federation(counting.app(), run_dir=tmp_path) as story:
        serving = story.resume_server()
        for client in CLIENTS:
            story.start_client(client)
        story.check_whole(await serving, CLIENTS, 4)
        assert story.told(o.RunResumed) == []


async def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path) -> None:
    async with federation(Counting().app(), run_dir=tmp_path) as story:
        await story.run(*CLIENTS)
        (tmp_path / "history.json").unlink()
        with pytest.raises(ConfigError, match=r"holds a run already.*--resume"):
            story.start_server()


async def test_a_folder_in_use_by_another_server_is_refused_with_its_pid(tmp_path: Path) -> None:
    async with federation(Counting().app(), run_dir=tmp_path) as story:
        story.start_server()
        await story.until(o.RunStarted)
        with pytest.raises(ConfigError, match=rf"another server \(pid {os.getpid()}\) works on"):
            await story.resume_server()


async def a_run_that_was_killed(story: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = Pause()
    _between_ledger_and_ack(monkeypatch, pause)
    story.start_server()
    for client in CLIENTS:
        story.start_client(client)
    await pause.reached()
    await story.kill_server()


@pytest.mark.parametrize("damage", [b"SQLite format 3\0 and then nothing", b"no database at all" * 100])
async def test_a_damaged_ledger_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    async with federation(Counting().app(), run_dir=tmp_path) as story:
        await a_run_that_was_killed(story, monkeypatch)
        for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / "ledger.sqlite").write_bytes(damage)
        with pytest.raises(ConfigError, match=r"ledger.sqlite is not the ledger of a run"):
            await story.resume_server()


async def test_a_ledger_of_another_format_is_one_clear_error(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("PRAGMA user_version=77")
    db.close()
    async with federation(Counting().app(), run_dir=tmp_path) as story:
        with pytest.raises(ConfigError, match=r"written by another version of fedbus"):
            await story.resume_server()


async def test_a_missing_or_foreign_checkpoint_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(Counting().app(), run_dir=tmp_path) as story:
        await a_run_that_was_killed(story, monkeypatch)
        checkpoint = tmp_path / "checkpoints" / "model-2.safetensors"
        save_model(checkpoint, {"w": np.zeros(3, np.float32)}, {"run_id": "another", "version": "2"})
        with pytest.raises(ConfigError, match=r"is not version 2 of run .*: the run cannot be resumed"):
            await story.resume_server()
        checkpoint.unlink()
        with pytest.raises(ConfigError, match=r"model-2.safetensors cannot be read: No such file"):
            await story.resume_server()


# ---- fencing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comes_back", ["in its commit", "on the queues"])
async def test_a_server_that_was_given_up_and_comes_back_is_fenced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: str
) -> None:
    counting = Counting()
    expected = await bits_without_faults(counting)
    hold = Hold(counting, ("c1", 3))
    pause, original = Pause(), Ledger.commit_round
    first: list[Ledger] = []

    def hang_in_round_2(ledger: Ledger, record: Any, rows: Any, **rest: Any) -> None:
        if record.round == 2 and not first:
            first.append(ledger)
            pause.in_thread()
        original(ledger, record, rows, **rest)

    goodbyes: list[m.RunEnded] = []
    take = ClientRuntime._take

    def noting(client: ClientRuntime, message: m.Message) -> None:
        if isinstance(message, m.RunEnded):
            goodbyes.append(message)
        take(client, message)

    monkeypatch.setattr(ClientRuntime, "_take", noting)
    monkeypatch.setattr(Ledger, "commit_round", hang_in_round_2)
    async with federation(counting.app(), run_dir=tmp_path, supervised=True) as story:
        old_serving = story.start_server()
        clients = [story.start_client(client) for client in CLIENTS]
        await pause.reached()
        let_back = story.cut_off("server")
        old = story.server
        assert old is not None
        assert old._folder is not None
        old._folder.close()  # as if it were on another machine
        serving = story.resume_server()
        await story.until(o.RunResumed)
        if comes_back == "in its commit":
            hold.let_go()
            pause.go_on()
            with pytest.raises(Fenced, match=r"epoch 2, this one is 1"):
                await old_serving
        else:
            let_back.set()
            with pytest.raises((QueueBusy, Fenced)):
                await old_serving
            pause.go_on()
            hold.let_go()
        history = await serving
        for client in clients:
            ended = await client
            assert ended is not None
            assert ended.finished
        assert {goodbye.epoch for goodbye in goodbyes} == {2}
        story.check_whole(history, CLIENTS, 4)
        assert story.bits() == expected
    assert set(counting.asked.values()) == {1}


async def test_a_server_that_was_frozen_and_replaced_learns_it_without_the_broker(tmp_path: Path) -> None:
    counting = Counting()
    hold = Hold(counting, ("c1", 2))
    async with federation(counting.app(), run_dir=tmp_path, supervised=True) as story:
        frozen = story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.RoundOpened, 1, round=2)
        del story.broker._holders[SERVER_LOCK]  # to the broker it is dead, and it does not know yet
        old, link = story.server, story.links["server"]
        assert old is not None
        assert old._folder is not None
        old._folder.close()  # as if it were on another machine
        serving = story.resume_server()
        await story.until(o.RunResumed)
        story.may_connect["server"].clear()
        link.drop()
        with pytest.raises(Fenced):
            await frozen
        hold.let_go()
        story.check_whole(await serving, CLIENTS, 4)


async def test_the_goodbye_of_a_server_that_was_replaced_ends_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting()
    hold = Hold(counting, *((client, 3) for client in CLIENTS))
    app = counting.app(rounds={"heartbeat_s": 10.0, "lease_s": 30.0})  # no heartbeat, so no welcome
    async with federation(app, run_dir=tmp_path) as story:
        await a_run_that_was_killed(story, monkeypatch)
        serving = story.resume_server()
        await story.until(o.TaskStarted, 3, round=3)
        run_id = story.told(o.RunStarted)[0].run_id
        bus = story.connect("old server")
        goodbye = m.RunEnded(run_id=run_id, epoch=1, finished=False, reason="the broker went away")
        for client in CLIENTS:
            await bus.publish(TASKS, client, encode(goodbye))
        async with asyncio.timeout(10):
            while any(story.broker.depth(inbox(client)) for client in CLIENTS):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0)
        hold.let_go()
        history = await serving
        story.check_whole(history, CLIENTS, 4)


# ---- what comes twice ------------------------------------------------------------------------------------------------


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 64 KiB, so that small models have several."""
    monkeypatch.setattr(Outgoing.__init__, "__defaults__", (MIN_PART_BYTES,))


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("size", [3, 50_000])
@pytest.mark.parametrize("held", [None, "c3"])
async def test_an_update_that_is_sent_twice_is_folded_once_and_leaves_nothing_in_the_queue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, held: str | None
) -> None:
    counting = Counting(size)
    expected = await bits_without_faults(counting)
    deliver = Outbox.deliver

    async def deliver_twice(outbox: Outbox, entry: Entry) -> None:
        await deliver(outbox, entry)
        await deliver(outbox, entry)

    monkeypatch.setattr(Outbox, "deliver", deliver_twice)
    hold = Hold(counting, *((held, n) for n in range(1, 5) if held))
    async with federation(counting.app(), run_dir=tmp_path) as story:
        serving = story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.TaskCompleted, 2)
        hold.let_go()
        history = await serving
        story.check_whole(history, CLIENTS, 4)
        assert story.bits() == expected
    assert set(counting.asked.values()) == {1}


@pytest.mark.usefixtures("_small_parts")
async def test_a_part_that_comes_once_more_after_its_commit_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(50_000)
    hold = Hold(counting, ("c1", 2))
    sent: list[Entry] = []
    keep = Outbox.keep

    def noting(outbox: Outbox, entry: Entry) -> None:
        sent.append(entry)
        keep(outbox, entry)

    monkeypatch.setattr(Outbox, "keep", noting)
    async with federation(counting.app()) as story:
        serving = story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.ReceiptArrived, 3, round=1)
        await story.links[sent[0].client_id].publish(UPDATES, "", encode(sent[0].message(1)))
        hold.let_go()
        story.check_whole(await serving, CLIENTS, 4)


async def test_the_updates_of_a_run_that_was_stopped_are_in_it_once_it_goes_on(tmp_path: Path) -> None:
    counting = Counting()
    expected = await bits_without_faults(counting)
    hold = Hold(counting, ("c2", 2), ("c3", 2))
    async with federation(counting.app(), run_dir=tmp_path) as story:
        serving = story.start_server()
        clients = [story.start_client(client) for client in CLIENTS]
        await story.until(o.UpdateFolded, client_id="c1", round=2)
        assert story.server is not None
        story.server.request_stop("enough for today")
        with pytest.raises(RunFailed, match="enough for today"):
            await serving
        hold.let_go()
        await asyncio.gather(*clients)
        assert story.server_bus is not None
        await story.server_bus.close()
        for client in CLIENTS:
            await story.buses[client].close()
            story.start_client(client)
        history = await story.resume_server()
        assert story.bits() == expected
        assert story.broker.depth(UPDATES) == 0
    assert (history.finished, history.reason, history.updates) == (True, "all rounds are done", 12)
    assert counting.asked["c1", 2] == 1


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("acked", [1, 3, 5, 11])
async def test_a_server_killed_in_the_middle_of_its_acknowledgements_leaves_no_parts_without_a_head(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, acked: int
) -> None:
    counting = Counting(50_000)
    expected = await bits_without_faults(counting)
    settle_all = UpdateIntake.settle_all
    async with federation(counting.app(), run_dir=tmp_path) as story:
        pause = Pause()

        async def settle_some(intake: UpdateIntake, tokens: list[int]) -> None:
            if len(story.told(o.RoundClosed)) != 2 or story.told(o.RunResumed):
                return await settle_all(intake, tokens)
            updates = [intake.get(token) for token in tokens]
            deliveries = [delivery for update in updates for delivery in update.in_settling_order()]
            assert len(deliveries) == 12
            await intake._consumer.ack(*deliveries[:acked])
            return await pause.here()

        monkeypatch.setattr(UpdateIntake, "settle_all", settle_some)
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await pause.reached()
        await story.kill_server()
        history = await story.resume_server()
        story.check_whole(history, CLIENTS, 4)
        assert story.bits() == expected
    assert set(counting.asked.values()) == {1}


# ---- connections that come and go ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("seed", range(20))
async def test_connections_dropped_at_any_moment_cost_no_update_and_no_bit(tmp_path: Path, seed: int) -> None:
    counting = Counting(50_000)
    expected = await bits_without_faults(counting, num_rounds=6)
    rng = random.Random(seed)
    async with federation(counting.app(num_rounds=6), run_dir=tmp_path, supervised=True) as story:
        serving = story.start_server()
        clients = [story.start_client(client) for client in CLIENTS]
        while not serving.done():
            for _ in range(rng.randrange(400)):
                await asyncio.sleep(0)
            if len(story.told(o.RoundClosed)) < 5:  # at the end the clients may be gone already
                story.broker.drop_connections()
        history = await serving
        await asyncio.gather(*clients)
        story.check_whole(history, CLIENTS, 6)
        assert story.bits() == expected
        assert history.clients_lost == []
    assert set(counting.asked.values()) == {1}


async def test_what_was_lost_while_there_was_no_connection_is_asked_for_again_without_training() -> None:
    counting = Counting()
    expected = await bits_without_faults(counting)
    hold = Hold(counting, *((client, 2) for client in CLIENTS))
    async with federation(counting.app(), supervised=True) as story:
        serving = story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.TaskStarted, 3, round=2)
        let_back = story.cut_off("server")
        hold.let_go()
        await story.until(o.TaskCompleted, 3, round=2)
        story.broker.purge(UPDATES)
        let_back.set()
        history = await serving
        story.check_whole(history, CLIENTS, 4)
        assert story.bits() == expected
    assert set(counting.asked.values()) == {1}


def for_longer_than_a_lease(
    story: Federation, hold: Hold, begin: Callable[[], object], end: Callable[[], object]
) -> Any:
    """Let it begin in the middle of round 2, and end some leases later."""

    async def play() -> None:
        await story.until(o.TaskStarted, 3, round=2)
        begin()
        hold.let_go()
        await asyncio.sleep(5 * story.app.rounds.lease_s)
        end()

    return play()


@pytest.mark.parametrize("what", ["blocked", "stopped", "frozen"])
async def test_a_broker_that_is_gone_for_longer_than_the_leases_costs_nobody_a_place(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    counting = Counting()
    expected = await bits_without_faults(counting)
    hold = Hold(counting, *((client, 2) for client in CLIENTS))
    frozen = asyncio.Event()
    frozen.set()
    app = counting.app(rounds={"heartbeat_s": 0.01, "lease_s": 0.08})
    async with federation(app, supervised=True) as story:
        put = _Events.put_from_outside

        async def put_later(events: _Events, event: e.Event) -> None:
            await frozen.wait()
            await put(events, event)

        monkeypatch.setattr(_Events, "put_from_outside", put_later)
        begin, end = {
            "blocked": (story.broker.block, story.broker.unblock),
            "stopped": (story.broker.stop, story.broker.start),
            "frozen": (frozen.clear, frozen.set),
        }[what]
        serving = story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await for_longer_than_a_lease(story, hold, begin, end)
        history = await serving
        story.check_whole(history, CLIENTS, 4)
        assert story.bits() == expected
        assert (history.clients_lost, history.clients_left) == ([], [])
        assert all(not record.failed and not record.lost for record in history.rounds)
    assert set(counting.asked.values()) == {1}


async def test_a_client_that_is_silent_while_the_server_hears_is_lost() -> None:
    counting = Counting()
    hold = Hold(counting, ("c1", 2))
    app = counting.app(rounds={"heartbeat_s": 0.01, "lease_s": 0.08})
    async with federation(app, supervised=True) as story:
        serving = story.start_server()
        silent, *_ = [story.start_client(client) for client in CLIENTS]
        await story.until(o.TaskStarted, client_id="c1", round=2)
        await story.kill("c1", silent)
        hold.let_go()
        history = await serving
    assert history.clients_lost == ["c1"]
    assert history.rounds[1].lost == ["c1"]


# ---- the Nth operation fails -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_small_parts")
@pytest.mark.parametrize("who", ["server", "c1"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("first", range(1, 4))
async def test_whatever_operation_fails_the_run_ends_with_the_same_bits(who: str, when: When, first: int) -> None:
    expected = await bits_without_faults(Counting(50_000), num_rounds=3)
    for nth in itertools.count(first, 3):
        counting = Counting(50_000)
        fault = Fault(nth, when=when)
        async with federation(counting.app(num_rounds=3), supervised=True) as story:
            story.wrap = lambda user, bus, fault=fault: fault.wrap(bus) if user == who else bus  # type: ignore[misc]
            serving = story.start_server()
            clients = [story.start_client(client) for client in CLIENTS]
            try:
                async with asyncio.timeout(10):
                    history = await serving
                    await asyncio.gather(*clients)
                story.check_whole(history, CLIENTS, 3, with_copies=when == "after")
            except BaseException as exc:
                exc.add_note(f"the {nth}th operation of {who}, {when}: {[kind for kind, _ in fault.effects][-3:]}")
                raise
            assert story.bits() == expected
            assert set(counting.asked.values()) == {1}
        if not fault.happened:
            break
    assert nth > 40


async def test_an_evaluation_of_a_version_long_past_is_not_repeated_and_harms_nothing() -> None:
    counting = Counting()
    slow = threading.Event()
    counting.evaluate_hooks.append(lambda client, round_: slow.wait(20) if (client, round_) == ("c1", 1) else None)
    app = counting.app(num_rounds=6, rounds={"fraction_evaluate": 1.0, "min_fit_clients": 2, "timeout_s": 20.0})
    async with federation(app, supervised=True) as story:
        serving = story.start_server()
        clients = [story.start_client(client) for client in CLIENTS]
        await story.until(o.RoundClosed, round=5)
        story.links["server"].drop()
        await asyncio.sleep(0.2)
        slow.set()
        assert (await serving).finished
        await asyncio.gather(*clients)

"""Workers: whole stories over the memory bus, with virtual clients, in one event loop."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedbus.bus.supervised
import fedbus.server.runtime
import fedbus.worker.horizon
import fedbus.worker.runtime
from fedbus.api import join
from fedbus.app import App
from fedbus.bus.base import QueueState
from fedbus.bus.memory import MemoryBroker, MemoryBus
from fedbus.bus.topology import CONTROL, DEAD, JOBS, TASKS, UPDATES, WORK, ingress, work_queue
from fedbus.client.reader import ModelReader, Place
from fedbus.client.upload import Upload
from fedbus.config import parse_virtual_id, virtual_id
from fedbus.errors import ConfigError
from fedbus.observe import events as o
from fedbus.server.history import History
from fedbus.server.publisher import ModelPublisher
from fedbus.server.slots import EAGER_BYTES
from fedbus.training.base import ClientContext, NumPyClient
from fedbus.types import Array, Scalar
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode
from fedbus.worker.horizon import Horizon
from fedbus.worker.models import Models
from fedbus.worker.runtime import WorkerRuntime
from tests.faults.failing import Fault, When
from tests.kit import Counting, Federation, Gate, app_of, federation, folded_in, weighted


@pytest.fixture(autouse=True)
def _no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory all is given again at once."""
    monkeypatch.setattr(fedbus.server.runtime, "_REDELIVERY_PAUSE_S", 0.02)
    monkeypatch.setattr(fedbus.worker.runtime, "_ASK_EVERY_S", 0.02)
    monkeypatch.setattr(fedbus.bus.supervised, "_BUSY_PAUSE_S", 0.01)


def virtual(count: int) -> list[str]:
    return [virtual_id(partition, count) for partition in range(count)]


class AddingPart(NumPyClient):
    """Adds its partition, counted from 1, to every tensor, and has ten times as many examples."""

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        self.number = context.partition + 1

    def get_parameters(self, config: dict[str, Scalar]) -> list[Array]:
        return [np.full(3, self.context.num_partitions, np.float32)]

    def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> tuple[list[Array], int, dict[str, Scalar]]:
        return [value + value.dtype.type(self.number) for value in parameters], 10 * self.number, {}

    def evaluate(self, parameters: list[Array], config: dict[str, Scalar]) -> tuple[float, int, dict[str, Scalar]]:
        return float(parameters[0].mean()), self.number, {"half": 0.5}


async def served(story: Federation, count: int, **options: Any) -> History:
    """The server with so many virtual clients and two workers, to the end."""
    serving = story.start_server(virtual_clients=count, **options)
    workers = [story.start_worker(name) for name in ("w1", "w2")]
    history = await serving
    for runtime in story.workers.values():
        runtime.request_stop()
    await asyncio.gather(*workers)
    return history


def check_whole(story: Federation, history: History, clients: list[str], num_rounds: int) -> None:
    """Every client's update is in every round once, and nothing is left on the broker."""
    assert history.finished
    assert [record.round for record in history.rounds] == list(range(1, num_rounds + 1))
    for record in history.rounds:
        assert sorted(update.client_id for update in record.folded) == sorted(clients)
    if story.run_dir is not None:
        expected = [f"{history.run_id}/fit/{n}/{client}" for n in range(1, num_rounds + 1) for client in clients]
        assert folded_in(story.run_dir) == sorted(expected)
    assert story.told(o.MessageRejected) == []
    assert [story.broker.depth(queue) for queue in (DEAD, WORK, UPDATES)] == [0, 0, 0]


# ---- a run -----------------------------------------------------------------------------------------------------------


async def test_virtual_clients_on_two_workers_give_the_hand_computed_weighted_mean() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 3, "min_fit_clients": 4, "fraction_evaluate": 0})
    async with federation(app) as story:
        history = await served(story, 4)
        check_whole(story, history, virtual(4), 3)
        assert story.model()["w"].tolist() == pytest.approx([3 * weighted([1, 2, 3, 4], [10, 20, 30, 40])] * 3)
    assert story.told(o.VirtualClientsEnrolled)[0].clients == 4
    assert sum(done.tasks for done in story.told(o.WorkerDone)) == 12
    assert {event.kind for event in story.told(o.TaskCompleted)} == {"fit"}


async def test_real_clients_take_part_beside_virtual_ones() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 2, "min_fit_clients": 3, "min_available_clients": 3})
    async with federation(app) as story:
        client = story.start_client("hospital")
        history = await served(story, 2)
        assert (await client) is not None
    assert [record.clients for record in history.rounds] == [{"hospital", *virtual(2)}] * 2
    assert story.told(o.ReceiptArrived, client_id="hospital")


async def test_nothing_but_tasks_goes_into_the_queue_of_work_and_each_task_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = noted_sends(monkeypatch)
    app = app_of(AddingPart, rounds={"num_rounds": 2, "min_fit_clients": 2})
    async with federation(app) as story:
        history = await served(story, 2)
    kinds = itertools.product(("fit", "evaluate"), (1, 2), virtual(2))
    assert Counter((exchange, getattr(message, "task_id", type(message).__name__)) for exchange, message in sent) == {
        (JOBS, f"{history.run_id}/{kind}/{n}/{client}"): 1 for kind, n, client in kinds
    }


def noted_sends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, m.Message]]:
    """What the server says to clients and workers from now on, and through which exchange."""
    sent: list[tuple[str, m.Message]] = []
    publish = MemoryBroker._publish

    def noting(broker: MemoryBroker, exchange: str, routing_key: str, body: bytes, *rest: Any) -> int:
        if exchange in (JOBS, TASKS):
            sent.append((exchange, decode(body)))
        return publish(broker, exchange, routing_key, body, *rest)

    monkeypatch.setattr(MemoryBroker, "_publish", noting)
    return sent


async def test_what_real_clients_may_send_unasked_is_shared_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = noted_sends(monkeypatch)
    app = app_of(AddingPart, rounds={"num_rounds": 1, "min_fit_clients": 8, "min_available_clients": 8})
    async with federation(app) as story:
        story.start_client("hospital")
        assert (await served(story, 7)).updates == 8
    assert {message.eager_bytes for _, message in sent if isinstance(message, m.FitTask)} == {EAGER_BYTES}


async def test_federated_evaluation_is_done_by_virtual_clients_too() -> None:
    async with federation(app_of(AddingPart, rounds={"num_rounds": 1, "min_fit_clients": 3})) as story:
        history = await served(story, 3)
    (record,) = history.rounds
    assert record.federated is not None
    assert record.federated.loss == pytest.approx(weighted([1, 2, 3], [10, 20, 30]))
    assert (record.federated.metrics, record.federated.num_examples, record.federated.clients) == ({"half": 0.5}, 6, 3)


async def test_a_virtual_client_gives_the_initial_model() -> None:
    settings = {"num_rounds": 1, "min_fit_clients": 1, "fraction_fit": 0.2, "fraction_evaluate": 0}
    async with federation(app_of(AddingPart, initial_parameters=None, rounds=settings)) as story:
        history = await served(story, 5)
        (update,) = history.rounds[0].folded
        assert story.model()["0"].tolist() == [5 + update.num_examples // 10] * 3


async def test_a_model_of_many_parts_comes_whole_and_updates_go_out_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_once, most = 0, 0
    send = Upload.send

    async def counted(upload: Upload, bus: Any, *rest: Any) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await send(upload, bus, *rest)
        at_once -= 1

    monkeypatch.setattr(Upload, "send", counted)
    start: dict[str, Array] = {"w": np.zeros(600_000, np.float32)}  # three parts
    rounds = {"num_rounds": 2, "min_fit_clients": 4, "fraction_evaluate": 0}
    async with federation(app_of(AddingPart, initial_parameters=start, rounds=rounds)) as story:
        serving = story.start_server(virtual_clients=4)
        story.start_worker("w1", slots=4)
        check_whole(story, await serving, virtual(4), 2)
        assert np.unique(story.model()["w"]).tolist() == pytest.approx([2 * weighted([1, 2, 3, 4], [1, 2, 3, 4])])
    assert most == 1


async def test_each_version_is_fetched_once_however_many_slots_work_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = noted_fetches(monkeypatch)
    app = app_of(AddingPart, rounds={"num_rounds": 3, "min_fit_clients": 6, "fraction_evaluate": 0})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=6)
        story.start_worker("w1", slots=3)
        assert (await serving).finished
    assert fetched == [0, 1, 2]


# ---- the user's code -------------------------------------------------------------------------------------------------


async def test_each_task_has_a_client_of_its_own_and_knows_its_part() -> None:
    made: list[ClientContext] = []

    def client_fn(context: ClientContext) -> NumPyClient:
        assert not context.state
        context.state["seen"] = True
        made.append(context)
        return AddingPart(context)

    app = app_of(client_fn, rounds={"num_rounds": 2, "min_fit_clients": 3, "fraction_evaluate": 0})
    async with federation(app) as story:
        await served(story, 3)
    seen = sorted((context.client_id, context.partition, context.num_partitions) for context in made)
    assert seen == sorted((client, part, 3) for part, client in enumerate(virtual(3)) for _ in range(2))


async def test_code_that_raises_is_reported_with_its_cause_and_the_worker_lives_on() -> None:
    class Failing(AddingPart):
        def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> Any:
            if self.number == 2 and config["round"] == 1:
                raise ValueError("no data\nfor today")
            return ([np.zeros(4, np.float32)], 1, {}) if self.number == 2 else super().fit(parameters, config)

    rounds = {"num_rounds": 2, "min_fit_clients": 2, "fraction_evaluate": 0}
    async with federation(app_of(Failing, rounds=rounds)) as story:
        history = await served(story, 2)
    first, second = virtual(2)
    assert [record.failed for record in history.rounds] == [
        {second: "fit raised ValueError: no data for today"},
        {second: "fit returned shape (4,) for tensor 'w', the model has (3,)"},
    ]
    assert [record.clients for record in history.rounds] == [{first}] * 2
    assert len(story.told(o.TaskErred, client_id=second)) == 2


# ---- workers die -----------------------------------------------------------------------------------------------------


async def test_the_task_of_a_worker_that_is_killed_goes_to_another_and_counts_once(tmp_path: Path) -> None:
    counting = Counting()
    asked, killed = threading.Event(), threading.Event()
    victim, *_ = virtual(3)

    def wait(client: str, round_: int) -> None:
        if (client, round_) == (victim, 2) and not asked.is_set():
            asked.set()
            killed.wait(20)

    counting.hooks.append(wait)
    async with federation(counting.app(), run_dir=tmp_path) as story:
        serving = story.start_server(virtual_clients=3)
        workers = {name: story.start_worker(name) for name in ("w1", "w2")}
        await asyncio.to_thread(asked.wait, 20)
        running = story.told(o.TaskStarted, client_id=victim, round=2)
        assert len(running) == 1
        (dying,) = [name for name, runtime in story.workers.items() if any_task_of(runtime, victim)]
        await story.kill(dying, workers[dying])
        history = await serving
        killed.set()
        check_whole(story, history, virtual(3), 4)
        bits = story.bits()
    assert counting.asked[victim, 2] == 2
    assert history.clients_lost == []
    assert bits == await bits_of_real_clients(3)


def any_task_of(runtime: WorkerRuntime, client_id: str) -> bool:
    return any(job.client_id == client_id for job in runtime._in_hand.values())


async def bits_of_real_clients(count: int, size: int = 3, **settings: Any) -> bytes:
    """The model that real clients of the same names make."""
    counting = Counting(size)
    async with federation(counting.app(num_clients=count, **settings)) as story:
        serving = story.start_server()
        for client in virtual(count):
            story.start_client(client)
        await serving
        return story.bits()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("first", [1, 2])
async def test_whatever_operation_of_a_worker_fails_the_run_ends_with_the_same_bits(when: When, first: int) -> None:
    expected = await bits_of_real_clients(2, num_rounds=2)
    for nth in itertools.count(first, 2):
        counting, fault = Counting(), Fault(nth, when=when)
        async with federation(counting.app(num_clients=2, num_rounds=2), supervised=True) as story:
            story.wrap = lambda user, bus, fault=fault: fault.wrap(bus) if user == "w1" else bus  # type: ignore[misc]
            serving = story.start_server(virtual_clients=2)
            worker = story.start_worker("w1")
            try:
                async with asyncio.timeout(10):
                    history = await serving
                    story.workers["w1"].request_stop()
                    await worker
            except BaseException as exc:
                exc.add_note(f"the {nth}th operation, {when}: {[kind for kind, _ in fault.effects][-3:]}")
                raise
            assert sorted(u.client_id for r in history.rounds for u in r.folded) == sorted(2 * virtual(2))
            assert story.bits() == expected
        if not fault.happened:
            break
    assert nth > 15


async def test_a_worker_whose_connection_is_lost_in_the_middle_of_a_task_counts_once() -> None:
    gate = Gate()
    app = app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1, "fraction_evaluate": 0})
    async with federation(app, supervised=True) as story:
        serving = story.start_server(virtual_clients=1)
        story.start_worker("w1")
        await story.until(o.TaskStarted)
        story.links["w1"].drop()
        await asyncio.to_thread(wait_for, lambda: story.broker.depth(WORK) == 0 and len(deliveries(story, "w1")) == 2)
        gate.open()
        check_whole(story, await serving, virtual(1), 1)
    assert len(story.told(o.TaskStarted)) == 1  # it came again, and was recognised


def deliveries(story: Federation, name: str) -> list[object]:
    return [delivery for job in story.workers[name]._in_hand.values() for delivery in job.deliveries]


def wait_for(condition: Any) -> None:
    """Wait, in a thread, for what no event tells."""
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    raise AssertionError("it never came to that")


async def test_virtual_clients_outlive_their_lease_and_nobody_looks_for_their_inboxes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: Counter[str] = Counter()
    queue_state = MemoryBus.queue_state

    async def counted(bus: MemoryBus, queue: str) -> QueueState:
        looks[queue] += 1
        return await queue_state(bus, queue)

    monkeypatch.setattr(MemoryBus, "queue_state", counted)
    gate = Gate()
    app = app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1, "fraction_evaluate": 0, "lease_s": 0.1})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=1, look_every_s=0.005)
        story.start_worker("w1")
        await story.until(o.TaskStarted)
        await asyncio.to_thread(wait_for, lambda: looks[WORK] >= 16)  # four leases
        gate.open()
        history = await serving
    assert (history.clients_lost, history.updates) == ([], 1)
    assert set(looks) == {WORK}


# ---- the server dies, or loses its connection ------------------------------------------------------------------------


async def test_a_server_that_goes_on_finds_each_task_in_the_queue_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting()
    purges = 0
    purge = MemoryBroker.purge

    def counted(broker: MemoryBroker, queue: str) -> None:
        nonlocal purges
        purge(broker, queue)
        purges += 1

    monkeypatch.setattr(MemoryBroker, "purge", counted)
    async with federation(counting.app(), run_dir=tmp_path) as story:
        story.start_server(virtual_clients=3)
        await story.until(o.RoundOpened)
        await asyncio.to_thread(wait_for, lambda: story.broker.depth(WORK) == 3)
        await story.kill_server()
        serving = story.resume_server(virtual_clients=3)
        await asyncio.to_thread(wait_for, lambda: purges == 2 and story.broker.depth(WORK) == 3)
        story.start_worker("w1")
        history = await serving
        check_whole(story, history, virtual(3), 4)
    assert set(counting.asked.values()) == {1}


async def test_a_run_whose_server_dies_in_the_middle_of_a_round_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    counting = Counting()
    expected = await bits_of_real_clients(3)
    asked, go_on = threading.Event(), threading.Event()

    def wait(client: str, round_: int) -> None:
        if (client, round_) == (virtual(3)[1], 2):
            asked.set()
            go_on.wait(20)

    counting.hooks.append(wait)
    async with federation(counting.app(), run_dir=tmp_path) as story:
        story.start_server(virtual_clients=3)
        story.start_worker("w1")
        await asyncio.to_thread(asked.wait, 20)
        await story.kill_server()
        serving = story.resume_server(virtual_clients=3)
        await story.until(o.RoundOpened, 3)
        go_on.set()
        check_whole(story, await serving, virtual(3), 4)
        assert story.bits() == expected


async def test_a_server_whose_connection_comes_back_asks_again_for_what_the_broker_lost() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 2, "min_fit_clients": 3, "fraction_evaluate": 0})
    async with federation(app, supervised=True) as story:
        serving = story.start_server(virtual_clients=3)
        await story.until(o.RoundOpened)
        await asyncio.to_thread(wait_for, lambda: story.broker.depth(WORK) == 3)
        story.broker.purge(WORK)
        story.links["server"].drop()
        story.start_worker("w1")
        check_whole(story, await serving, virtual(3), 2)


async def test_a_queue_of_work_that_somebody_deletes_is_made_anew_with_all_its_tasks() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 2, "min_fit_clients": 3, "fraction_evaluate": 0, "lease_s": 0.2})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=3)
        await story.until(o.RoundOpened)
        await asyncio.to_thread(wait_for, lambda: story.broker.depth(WORK) == 3)
        await story.broker.connect("server").delete_queue(WORK)
        worker = story.start_worker("w1")
        check_whole(story, await serving, virtual(3), 2)
        story.workers["w1"].request_stop()
        assert await worker == 6


async def test_a_new_run_takes_back_what_another_left_in_the_queue() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 1, "min_fit_clients": 3, "fraction_evaluate": 0})
    async with federation(app) as story:
        story.start_server(virtual_clients=3)
        await story.until(o.RoundOpened)
        await story.kill_server()
        serving = story.start_server(virtual_clients=3)
        await story.until(o.RoundOpened, 2)
        worker = story.start_worker("w1")
        check_whole(story, await serving, virtual(3), 1)
        story.workers["w1"].request_stop()
        assert await worker == 3


# ---- what nobody wants any more --------------------------------------------------------------------------------------


async def test_a_task_whose_update_would_be_refused_costs_no_training_and_frees_its_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fedbus.worker.horizon, "_LOOK_EVERY_S", 0.0)
    counting = Counting()
    rounds = {"min_fit_clients": 1, "over_selection": 3.0, "max_staleness": 0}
    async with federation(counting.app(num_clients=3, num_rounds=3, rounds=rounds)) as story:
        serving = story.start_server(virtual_clients=3)
        worker = story.start_worker("w1")
        history = await serving
        story.workers["w1"].request_stop()
        await worker
    assert [len(record.folded) for record in history.rounds] == [1, 1, 1]
    assert all(len(record.cohort) == 3 for record in history.rounds)  # who was told to stop is asked again
    cancelled = story.told(o.TaskCancelled)
    assert {event.reason for event in cancelled} <= {
        f"{n} version{'s' * (n > 1)} late, max_staleness is 0" for n in (1, 2)
    }
    assert cancelled
    assert story.told(o.UpdateRefused) == []


async def test_virtual_clients_that_nobody_plays_are_freed_of_late_tasks_and_leave_none_behind() -> None:
    rounds = {"num_rounds": 3, "min_fit_clients": 1, "over_selection": 3.0, "max_staleness": 0, "fraction_evaluate": 0}
    async with federation(app_of(AddingPart, rounds={**rounds, "min_available_clients": 3})) as story:
        serving = story.start_server(virtual_clients=2)
        await story.start_client("hospital")
        history = await serving
        assert story.broker.depth(WORK) == 0
    assert [sorted(record.cohort) for record in history.rounds] == [["hospital", *virtual(2)]] * 3
    assert [record.clients for record in history.rounds] == [{"hospital"}] * 3


def fit_task(run_id: str, version: int, epoch: int = 1) -> m.FitTask:
    return m.FitTask(
        task_id=f"{run_id}/fit/{version + 1}/{virtual_id(0, 1)}",
        run_id=run_id,
        epoch=epoch,
        round=version + 1,
        version=version,
        offset=0,
        timeout_s=10.0,
        eager_bytes=0,
        config={"round": version + 1},
        receipt_task_id="",
        receipt_round=0,
        receipt_staleness=0,
    )


async def publish(broker: MemoryBroker, run_id: str, version: int, epoch: int = 1, size: int = 3) -> None:
    publisher = ModelPublisher(broker.connect("server"), run_id=run_id, epoch=epoch)
    head: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    await publisher.publish({"w": np.zeros(size, np.float32)}, version, head)


@pytest.mark.parametrize("size", [3, 400_000])  # the stream ends with a head, or with a further part
async def test_the_horizon_is_the_last_version_that_was_published(size: int) -> None:
    broker = MemoryBroker()
    horizon = Horizon(broker.connect("worker"), max_staleness=2)
    assert await horizon.why_unwanted(fit_task("run", 0)) is None  # nothing is known
    horizon = Horizon(broker.connect("worker"), max_staleness=2)
    await publish(broker, "run", 7, size=size)
    reasons = [await horizon.why_unwanted(fit_task("run", version)) for version in (4, 5, 7, 8)]
    assert reasons == ["3 versions late, max_staleness is 2", None, None, None]
    assert await horizon.why_unwanted(fit_task("yesterday", 7)) == "run yesterday is over"


async def test_a_run_that_has_just_begun_is_not_taken_for_one_that_is_over() -> None:
    broker = MemoryBroker()
    horizon = Horizon(broker.connect("worker"), max_staleness=2)
    await publish(broker, "old", 7)
    assert await horizon.why_unwanted(fit_task("old", 7)) is None
    await publish(broker, "new", 0)
    assert await horizon.why_unwanted(fit_task("new", 0)) is None  # although it has just looked


async def test_models_that_slots_have_in_hand_are_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = MemoryBroker()
    await publish(broker, "run", 0)
    await publish(broker, "run", 1)
    fetched = noted_fetches(monkeypatch)
    models = Models(broker.connect("worker"))
    places = [Place(run_id="run", epoch=1, version=version, offset=version) for version in (0, 1, 2)]
    old, new, again = await asyncio.gather(*(models.read(places[version]) for version in (0, 1, 0)))
    assert old is again
    hanging = asyncio.create_task(models.read(places[2]))  # nobody has published it
    await asyncio.to_thread(wait_for, lambda: fetched == [0, 1, 2])
    async with asyncio.timeout(5):
        assert [await models.read(place) for place in places[:2]] == [old, new]
    hanging.cancel()
    await asyncio.wait([hanging])
    await models.close()
    assert fetched == [0, 1, 2]


def noted_fetches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The versions that are fetched from now on."""
    fetched: list[int] = []
    fetch = ModelReader._fetch

    async def noting(reader: ModelReader, place: Place) -> dict[str, Array]:
        fetched.append(place.version)
        return await fetch(reader, place)

    monkeypatch.setattr(ModelReader, "_fetch", noting)
    return fetched


@pytest.mark.parametrize("is_made_anew", [True, False])
async def test_a_task_in_hand_whose_queue_was_deleted_is_answered_and_the_worker_goes_on(is_made_anew: bool) -> None:
    gate = Gate()
    async with federation(app_of(gate.client_fn)) as story:
        bus = story.broker.connect("server")
        await bus.declare(ingress())
        await bus.declare(work_queue())
        await publish(story.broker, "run", 0)
        worker = story.start_worker("w1")
        await bus.publish(JOBS, virtual_id(0, 1), encode(fit_task("run", 0)))
        await story.until(o.TaskStarted)
        await bus.delete_queue(WORK)
        await story.until(o.WorkAwaited)
        (lost,) = deliveries(story, "w1")
        if is_made_anew:
            await bus.declare(work_queue())
            await bus.publish(JOBS, virtual_id(0, 1), encode(fit_task("run", 0)))
            await asyncio.to_thread(wait_for, lambda: deliveries(story, "w1")[0] is not lost)
        gate.open()
        await story.until(o.TaskCompleted)
        await bus.declare(work_queue())
        await bus.publish(JOBS, virtual_id(0, 1), encode(fit_task("run", 0)))
        await story.until(o.TaskCompleted, 2)
        story.workers["w1"].request_stop()
        await worker
        assert story.broker.depth(WORK) == 0


# ---- coming and going ------------------------------------------------------------------------------------------------


async def test_a_worker_that_comes_first_waits_for_the_queue_and_says_so_once() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 1, "min_fit_clients": 2})
    async with federation(app) as story:
        worker = story.start_worker("w1")
        await story.until(o.WorkAwaited)
        assert (await story.start_server(virtual_clients=2)).finished
        story.workers["w1"].request_stop()
        assert await worker == 4
    assert len(story.told(o.WorkAwaited)) == 1


async def test_a_worker_declares_nothing() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 1, "min_fit_clients": 2})
    async with federation(app) as story:
        fault = Fault(10**9)
        story.wrap = lambda user, bus: fault.wrap(bus) if user == "w1" else bus
        serving = story.start_server(virtual_clients=2)
        story.start_worker("w1")
        assert (await serving).finished
    assert {kind for kind, _ in fault.effects} == {"consume", "receive", "publish", "ack"}


async def test_a_worker_stays_for_the_next_run_on_its_broker() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 1, "min_fit_clients": 2, "fraction_evaluate": 0})
    async with federation(app) as story:
        worker = story.start_worker("w1")
        for _ in range(2):
            assert (await story.start_server(virtual_clients=2)).finished
        story.workers["w1"].request_stop()
        assert await worker == 4


async def test_a_worker_ends_once_no_task_has_come_for_as_long_as_it_was_told() -> None:
    app = app_of(AddingPart, rounds={"num_rounds": 1, "min_fit_clients": 2, "fraction_evaluate": 0})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=2)
        await story.until(o.RoundOpened)
        worker = story.start_worker("w1", until_idle_s=0.3)
        assert (await serving).finished
        assert await worker == 2
    assert story.told(o.WorkerDone)[0].reason == "no task came for 0.3 s"


async def test_a_worker_that_is_stopped_finishes_what_it_has_in_hand_and_takes_nothing_new() -> None:
    gate = Gate()
    app = app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 3, "fraction_evaluate": 0})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=3)
        leaving = story.start_worker("w1")
        await story.until(o.TaskStarted)
        story.workers["w1"].request_stop("stopped by SIGTERM")
        await asyncio.sleep(0)
        gate.open()
        assert await leaving == 1
        assert story.told(o.WorkerDone) == [o.WorkerDone(tasks=1, reason="stopped by SIGTERM", given_back=0)]
        story.start_worker("w2")
        check_whole(story, await serving, virtual(3), 1)
    assert len(story.told(o.TaskStarted)) == 3


async def test_a_slot_that_is_free_while_another_finishes_takes_nothing_new() -> None:
    last, others = threading.Event(), threading.Event()
    begun: list[str] = []

    class Waiting(AddingPart):
        def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> Any:
            begun.append(self.context.client_id)
            (others if len(begun) == 1 else last).wait(20)
            return super().fit(parameters, config)

    app = app_of(Waiting, rounds={"num_rounds": 1, "min_fit_clients": 4, "fraction_evaluate": 0})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=4)
        leaving = story.start_worker("w1", slots=2)
        await asyncio.to_thread(wait_for, lambda: len(begun) == 2)
        story.workers["w1"].request_stop()
        others.set()
        await asyncio.to_thread(wait_for, lambda: story.broker.depth(WORK) == 1)  # one more lies with the worker
        last.set()
        assert await leaving == 2
        assert story.broker.depth(WORK) == 2
        story.start_worker("w2")
        check_whole(story, await serving, virtual(4), 1)


async def test_what_a_stopped_worker_cannot_finish_in_time_is_given_back_and_it_is_told() -> None:
    gate = Gate()
    contexts: list[ClientContext] = []
    made = threading.Event()

    def client_fn(context: ClientContext) -> NumPyClient:
        contexts.append(context)
        made.set()
        return gate.client_fn(context)

    app = app_of(client_fn, rounds={"num_rounds": 1, "min_fit_clients": 2, "fraction_evaluate": 0})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=2)
        leaving = story.start_worker("w1", grace_s=0.0)
        await asyncio.to_thread(made.wait, 20)
        story.workers["w1"].request_stop()
        assert await leaving == 0
        assert story.told(o.WorkerDone)[0].given_back == 1
        assert contexts[0].cancelled
        assert story.broker.depth(WORK) == 2
        gate.open()
        story.start_worker("w2")
        check_whole(story, await serving, virtual(2), 1)


async def test_the_server_tells_how_many_workers_there_are() -> None:
    gate = Gate()
    app = app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1, "fraction_evaluate": 0, "lease_s": 0.2})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=1)
        await story.until(o.WorkersCounted, workers=0)
        workers = {name: story.start_worker(name) for name in ("w1", "w2")}
        await story.until(o.WorkersCounted, workers=2)
        await story.kill("w2", workers["w2"])
        await story.until(o.WorkersCounted, workers=1)
        gate.open()
        assert (await serving).finished


# ---- who may say what ------------------------------------------------------------------------------------------------


async def test_nobody_joins_or_leaves_as_a_virtual_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.server.guard._TELL_EVERY_S", 0.0)  # each by itself
    gate = Gate()
    app = app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 2, "fraction_evaluate": 0})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=2)
        story.start_worker("w1")
        await story.until(o.TaskStarted)
        name, run_id = virtual(2)[0], story.told(o.RunStarted)[0].run_id
        bus = story.broker.connect("worker")
        for message in (
            m.Join(client_id=name, session="s"),
            m.Heartbeat(client_id=name, session="s", run_id=run_id, fit_task=""),
            m.Leave(client_id=name, session="virtual", run_id=run_id, reason="bye"),
        ):
            await bus.publish(CONTROL, name, encode(message))
        await story.until(o.MessageRejected, 3, queue=CONTROL)
        gate.open()
        assert (await serving).updates == 2
    assert {event.reason for event in story.told(o.MessageRejected)} == {
        f"{name} is a virtual client, for workers: a client needs another id"
    }


async def test_a_worker_speaks_for_virtual_clients_only() -> None:
    gate = Gate()
    app = app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 2, "min_available_clients": 2})
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=1)
        story.start_worker("w1")
        story.start_client("hospital")
        await story.until(o.TaskStarted, 2)
        task_id = f"{story.told(o.RunStarted)[0].run_id}/fit/1/hospital"
        failed = m.TaskFailed(client_id="hospital", task_id=task_id, run_id="", reason="sabotage")
        await story.broker.connect("worker").publish(CONTROL, "hospital", encode(failed))
        assert "'worker' is not the user of hospital" in (await story.until(o.MessageRejected)).reason
        gate.open()
        assert (await serving).rounds[0].clients == {"hospital", *virtual(1)}


async def test_what_is_no_task_of_a_virtual_client_is_set_aside() -> None:
    app = app_of(AddingPart)
    async with federation(app) as story:
        bus = story.broker.connect("server")
        await bus.declare(work_queue())
        story.start_worker("w1")
        await bus.publish(JOBS, "hospital", encode(fit_task("run", 0)))
        await bus.publish(JOBS, virtual_id(0, 1), encode(m.UploadGrant(task_id="t", run_id="run", epoch=1)))
        await bus.publish(JOBS, virtual_id(0, 1), b"garbage")
        await story.until(o.MessageRejected, 3, queue=WORK)
    assert [event.reason for event in story.told(o.MessageRejected)][:2] == [
        "'hospital' is no virtual client",
        "a UploadGrant does not belong here",
    ]


# ---- names and settings ----------------------------------------------------------------------------------------------


def test_a_virtual_client_is_named_by_its_part_of_the_data() -> None:
    assert virtual_id(7, 1000) == "virtual-00007-of-01000"
    assert parse_virtual_id("virtual-00007-of-01000") == (7, 1000)
    assert parse_virtual_id(virtual_id(123_456, 1_000_000)) == (123_456, 1_000_000)


@pytest.mark.parametrize(
    "name",
    [
        "hospital-a",
        "virtual-7-of-1000",
        "virtual-01000-of-01000",
        "virtual-000007-of-01000",
        "virtual-00007-of-01000x",
        "virtual-\u0660\u0660\u0660\u0660\u0667-of-01000",
        "virtual-" + "1" * 5000 + "-of-" + "2" * 5000,
    ],
)
def test_other_names_are_those_of_real_clients(name: str) -> None:
    assert parse_virtual_id(name) is None


@pytest.mark.parametrize("count", [-1, 100_001, True, 2.0])
async def test_a_number_of_virtual_clients_that_cannot_be_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match="virtual_clients must be a whole number from 0 to 100000"):
        await federation_server(app_of(AddingPart), count)


async def federation_server(app: App, count: int) -> History:
    async with federation(app) as story:
        return await story.start_server(virtual_clients=count)


async def test_no_real_client_takes_the_name_of_a_virtual_one() -> None:
    with pytest.raises(ConfigError, match="virtual-00001-of-00010 is the name of a virtual client"):
        await join(app_of(AddingPart), broker="amqp://localhost", client_id="virtual-00001-of-00010")


async def test_a_number_of_slots_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="slots must be a whole number from 1 to 1000, not 0"):
        WorkerRuntime(app_of(AddingPart), MemoryBroker().connect(), slots=0)

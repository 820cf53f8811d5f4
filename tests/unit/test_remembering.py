"""What strategies and clients remember from round to round, say to one another, and refuse: over the memory bus."""

from __future__ import annotations

import asyncio
import errno
import io
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import fedbus.client.memory
import fedbus.server.runtime
from fedbus.bus.base import Delivery
from fedbus.client.memory import ClientMemory
from fedbus.client.outbox import Entry
from fedbus.client.runtime import ClientRuntime
from fedbus.client.tasks import round_of
from fedbus.errors import AggregateRefused, ConfigError, RunFailed, UpdateRefused
from fedbus.observe import events as o
from fedbus.observe.progress import Board
from fedbus.rounds import commands as c
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.fedavg import FedAvg
from fedbus.tensorfile import save_model
from fedbus.training.base import Client, ClientContext
from fedbus.types import Array, Config, EvaluateResult, ExtraSpec, FitResult, Tensors
from fedbus.wire import messages as m
from tests.kit import Gate, app_of, federation

_W = np.float32


class Sums(Strategy):
    """w <- w + sum(d) + memory; memory <- memory + the sum of what comes beside; clients see memory."""

    def fit_config(self, round: int) -> Config:
        return {"factor": 2.0, "lr": 0.5}

    def broadcast(self, model: Tensors) -> Tensors:
        return {"total": self.memory.get("total", np.zeros(3, _W))}

    def extras(self, model: Tensors) -> dict[str, ExtraSpec]:
        return {"seen": ExtraSpec(dtype=np.dtype(_W), shape=(3,))}

    def verify(self, update: ClientUpdate) -> None:
        if next(update.peek())[2].min() < 0:
            raise UpdateRefused("it is negative")

    def init(self, model: Tensors) -> dict[str, Array]:
        return {"delta": np.zeros(3), "seen": np.zeros(3)}

    def fold(self, state: dict[str, Array], update: ClientUpdate) -> None:
        for _, start, values in update.pieces():
            state["delta"][start : start + values.size] += values
        for name, start, values in update.extra_pieces():
            state[name][start : start + values.size] += values

    def finish(self, state: dict[str, Array], model: Tensors) -> dict[str, Array]:
        before = self.memory.get("total", np.zeros(3, _W))
        self.memory["total"] = (before + state["seen"]).astype(_W)
        if state["delta"].max() > 1000:
            raise AggregateRefused("more than 1000")
        return {"w": (model["w"] + state["delta"] + before).astype(_W)}


class Answering(Client):
    """Steps by the round times `factor`, and tells what it was shown; remembers how often it has counted."""

    step: dict[tuple[str, int], float] = {}  # noqa: RUF012  # each test makes a class of its own

    def __init__(self, context: ClientContext) -> None:
        self.context = context

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        number = int(config["round"])
        before = self.context.memory.get("counted", np.zeros(1))
        self.context.memory["counted"] = before + 1
        step = self.step.get((self.context.client_id, number), number * float(config["factor"]))
        return FitResult(
            parameters={"w": parameters["w"] + _W(step)},
            num_examples=1,
            metrics={"before": float(before[0]), "lr": config["lr"]},
            extra={"seen": self.context.broadcast["total"] + 1},
        )


def stepping(steps: dict[tuple[str, int], float]) -> type[Answering]:
    return type("Stepping", (Answering,), {"step": steps})


def app(client: type[Client] = Answering, strategy: Strategy | None = None, **settings: Any) -> Any:
    rounds = {"min_fit_clients": 2, "fraction_evaluate": 0, **settings.pop("rounds", {})}
    return app_of(
        client, strategy=strategy or Sums(), initial_parameters={"w": np.zeros(3, _W)}, rounds=rounds, **settings
    )


async def test_a_strategy_remembers_tells_the_clients_and_is_told_more_than_a_delta() -> None:
    async with federation(app(fit_config={"lr": 0.25})) as story:
        history = await story.run("c1", "c2")
        # Round 1: 2 * 2, shown 0, so 2 * 1 are seen. Round 2: 2 * 4, and what was remembered.
        assert story.model()["w"].tolist() == [4 + 8 + 2] * 3
    assert history.rounds[-1].fit_metrics["lr"] == 0.25, "the user's own settings go before the strategy's"
    assert "_memory" not in vars(story.app.strategy), "the app's own strategy knows nothing of a run"


async def test_what_a_strategy_remembers_outlives_its_server(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rounds": {"num_rounds": 4}}
    async with federation(app(**settings)) as story:
        await story.run("c1", "c2")
        expected = story.bits()
    async with federation(app(**settings), run_dir=tmp_path) as story:
        story.start_server()
        clients = [story.start_client(name) for name in ("c1", "c2")]
        await story.until(o.RoundClosed, 2)
        await story.kill_server()
        history = await story.resume_server()
        await asyncio.gather(*clients)
        assert history.num_rounds == 4
        assert story.bits() == expected
    assert [path.name for path in (tmp_path / "checkpoints").glob("memory-*")] == ["memory-4.safetensors"]


async def test_a_run_is_not_resumed_with_what_another_strategy_remembered(tmp_path: Path) -> None:
    class Others(Sums):
        """Remembers under the same name, and means something else by it."""

    async with federation(app(rounds={"num_rounds": 4}), run_dir=tmp_path) as story:
        story.start_server()
        for name in ("c1", "c2"):
            story.start_client(name)
        await story.until(o.RoundClosed, 2)
        await story.kill_server()
        story.app = app(strategy=Others(), rounds={"num_rounds": 4})
        with pytest.raises(ConfigError, match="was begun with the strategy Sums, not Others: go on with that one"):
            await story.resume_server()


async def test_an_aggregate_that_is_refused_leaves_model_and_memory_as_they_were() -> None:
    async with federation(app(stepping({("c1", 1): 2000.0}), rounds={"num_rounds": 3})) as story:
        history = await story.run("c1", "c2")
        assert story.told(o.AggregateDiscarded)[0].reason == "more than 1000"
        # Rounds 2 and 3 alone: 2 * 4, then 2 * 6 and the 2 of round 2.
        assert story.model()["w"].tolist() == [8 + 12 + 2] * 3
        assert len(story.told(o.RefusalArrived, reason="its round was discarded")) == 2
    before = {(r.round, u.client_id): u.metrics["before"] for r in history.rounds for u in r.folded}
    assert before[2, "c1"] == before[2, "c2"] == 0, "nor do the clients remember it"
    assert [record.reason for record in history.rounds] == ["discarded", "min_fit_clients", "min_fit_clients"]


async def test_a_refusal_comes_before_the_next_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else training may have begun with what the refused fit left: the model is at hand where none was made."""
    came: list[tuple[str, int]] = []
    take_task, take = ClientRuntime._take_task, ClientRuntime._take

    def note_task(self: ClientRuntime, task: m.Task, delivery: Delivery) -> None:
        if isinstance(task, m.FitTask):
            came.append(("task", task.round))
        take_task(self, task, delivery)

    def note(self: ClientRuntime, message: m.Message) -> None:
        if isinstance(message, m.Refusal):
            came.append(("refusal", int(message.task_id.split("/")[2])))
        take(self, message)

    monkeypatch.setattr(ClientRuntime, "_take_task", note_task)
    monkeypatch.setattr(ClientRuntime, "_take", note)
    one_alone = {"min_fit_clients": 1, "num_rounds": 2}
    async with federation(app(stepping({("c1", 1): 2000.0}), rounds=one_alone)) as story:
        await story.run("c1")
    assert came == [("task", 1), ("refusal", 1), ("task", 2)]


async def test_what_a_strategy_refuses_does_not_count_and_leaves_no_trace_at_its_client() -> None:
    rounds = {"num_rounds": 3, "min_fit_clients": 1, "fraction_fit": 1.0, "grace_s": float("inf")}
    async with federation(app(stepping({("c1", 1): -1.0}), rounds=rounds | {"min_available_clients": 2})) as story:
        history = await story.run("c1", "c2")
    assert [sorted(update.client_id for update in record.folded) for record in history.rounds] == [
        ["c2"],
        ["c1", "c2"],
        ["c1", "c2"],
    ]
    assert history.rounds[0].refused == {"c1": "it is negative"}
    before = {(r.round, u.client_id): u.metrics["before"] for r in history.rounds for u in r.folded}
    assert before == {(1, "c2"): 0, (2, "c1"): 0, (2, "c2"): 1, (3, "c1"): 1, (3, "c2"): 2}


async def test_an_update_that_never_went_out_leaves_no_trace_at_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c1 is killed in the middle of its first upload; when it is back, it finds that task again, and a newer one."""
    send, uploading, c1_is_back = Entry.send, asyncio.Event(), asyncio.Event()

    async def send_with_breaks(self: Entry, *args: Any) -> None:
        if self.client_id == "c1" and not uploading.is_set():
            uploading.set()
            await asyncio.Event().wait()
        if self.client_id == "c2" and round_of(self.task) == 2:
            await c1_is_back.wait()
        await send(self, *args)

    monkeypatch.setattr(Entry, "send", send_with_breaks)
    rounds = {"num_rounds": 3, "min_fit_clients": 1, "min_available_clients": 2, "fraction_fit": 1.0, "lease_s": 0.5}
    async with federation(app(rounds=rounds | {"grace_s": float("inf")})) as story:
        serving = story.start_server()
        story.start_client("c2")
        c1 = story.start_client("c1", memory=ClientMemory(tmp_path))
        await uploading.wait()
        await story.kill("c1", c1)
        await story.until(c.RoundOpened, round=2)
        story.start_client("c1", memory=ClientMemory(tmp_path))
        await story.until(o.UpdateFolded, client_id="c1", round=2)
        c1_is_back.set()
        history = await serving
    folded = [(r.round, u) for r in history.rounds for u in r.folded if u.client_id == "c1"]
    before = {number: update.metrics["before"] for number, update in folded}
    assert before == {2: 0, 3: 1}


async def test_a_receipt_for_a_process_that_died_counts_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c1 is killed between its upload and its word to the broker that the task is done: it finds that again."""
    send, uploaded, c1_is_gone = Entry.send, asyncio.Event(), asyncio.Event()

    async def send_with_breaks(self: Entry, *args: Any) -> None:
        if self.client_id == "c2":
            await c1_is_gone.wait()
        await send(self, *args)
        if self.client_id == "c1" and not uploaded.is_set():
            uploaded.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(Entry, "send", send_with_breaks)
    async with federation(app()) as story:
        serving = story.start_server()
        story.start_client("c2")
        c1 = story.start_client("c1", memory=ClientMemory(tmp_path))
        await uploaded.wait()
        await story.kill("c1", c1)
        c1_is_gone.set()
        await story.until(o.RoundClosed)
        story.start_client("c1", memory=ClientMemory(tmp_path))
        history = await serving
    assert len(story.told(o.TaskStarted, client_id="c1", round=1)) == 1, "it is not done again"
    assert {u.client_id: u.metrics["before"] for u in history.rounds[1].folded} == {"c1": 1, "c2": 1}


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({}, "it came without 'seen', which the strategy needs: give it in FitResult.extra"),
        ({"seen": np.zeros(3, _W), "more": np.zeros(1)}, "the strategy does not ask for 'more'"),
        ({"seen": np.zeros(4, _W)}, "'seen' came with shape (4,), (3,) is due"),
        ({"seen": np.zeros(3)}, "'seen' came as <f8, <f4 is due"),
    ],
)
async def test_only_what_the_strategy_asks_for_may_come_beside_the_delta(extra: dict[str, Array], reason: str) -> None:
    class Wrong(Answering):
        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            return FitResult(parameters=parameters, num_examples=1, extra=extra)

    right = {"c2": Answering}
    rounds = {"min_fit_clients": 1, "min_available_clients": 2, "num_rounds": 1, "grace_s": float("inf")}
    client_fn: Any = lambda context: right.get(context.client_id, Wrong)(context)  # noqa: E731
    async with federation(app(client_fn, rounds=rounds)) as story:
        history = await story.run("c1", "c2")
    assert reason in history.rounds[0].refused["c1"]


async def test_a_tensor_of_any_length_is_bounded_by_its_bytes() -> None:
    class Notes(Sums):
        def extras(self, model: Tensors) -> dict[str, ExtraSpec]:
            return {"seen": ExtraSpec(dtype=np.dtype(_W), max_bytes=12)}

    class Talking(Answering):
        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            size = {"c1": 4, "c2": 2}[self.context.client_id]
            return FitResult(parameters=parameters, num_examples=1, extra={"seen": np.ones(size, _W)})

    rounds = {"min_fit_clients": 1, "min_available_clients": 2, "num_rounds": 1, "grace_s": float("inf")}
    async with federation(app(Talking, Notes(), rounds=rounds)) as story:
        history = await story.run("c1", "c2")
    assert "one dimension, and 12 bytes at most, are due" in history.rounds[0].refused["c1"]
    assert [update.client_id for update in history.rounds[0].folded] == ["c2"]


async def test_personal_tensors_stay_where_they_are() -> None:
    """Each client's head grows by itself; what is shared is the mean of what they make of it."""

    class Two(Client):
        def __init__(self, context: ClientContext) -> None:
            self.context = context
            self.number = int(context.client_id[1:])

        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            trained = {name: value + _W(self.number) for name, value in parameters.items()}
            return FitResult(parameters=trained, num_examples=1)

        def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
            metrics = {self.context.client_id: float(parameters["head.w"][0])}
            return EvaluateResult(loss=float(parameters["body.w"][0]), num_examples=1, metrics=metrics)

    model = {"body.w": np.zeros(1, _W), "head.w": np.zeros(1, _W)}
    rounds = {"min_fit_clients": 2, "num_rounds": 3, "grace_s": float("inf")}
    async with federation(app_of(Two, initial_parameters=model, personal=["head.*"], rounds=rounds)) as story:
        history = await story.run("c1", "c2")
        assert story.model()["head.w"].tolist() == [0.0], "it never left its clients"
        assert story.model()["body.w"].tolist() == [4.5]
    assert [update.nbytes for record in history.rounds for update in record.folded] == [4] * 6
    last = history.rounds[-1].federated  # earlier ones run beside the next fit
    assert last is not None
    assert (last.loss, last.metrics) == (4.5, {"c1": 3.0, "c2": 6.0})


async def test_nobody_moves_what_each_client_keeps_to_itself() -> None:
    model = {"body.w": np.zeros(3, _W), "head.w": np.zeros(3, _W)}
    rounds = {"num_rounds": 1, "min_fit_clients": 1, "min_available_clients": 2, "fraction_evaluate": 0}
    settings: dict[str, Any] = {"initial_parameters": model, "rounds": rounds | {"grace_s": float("inf")}}
    async with federation(app_of(personal=["head.*"], **settings)) as story:
        serving = story.start_server()
        clients = [story.start_client("c1"), story.start_client("c2", app_of(**settings))]
        history = await serving
        await asyncio.gather(*clients)
        assert story.model()["head.w"].tolist() == [0, 0, 0]
    assert [update.client_id for update in history.rounds[0].folded] == ["c1"]
    assert history.rounds[0].refused == {"c2": "the model has no tensor 'head.w'"}


async def test_a_version_is_evaluated_with_what_its_client_had_when_it_was_given_it() -> None:
    """Evaluations run behind the next fit, which must not show in them."""
    trained = Gate(in_round=3)

    class Mine(Client):
        def __init__(self, context: ClientContext) -> None:
            pass

        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            if config["round"] == 3:
                trained._opened.wait(30)  # until the evaluation of version 2 is in the inbox
            return FitResult(parameters={name: value + 1 for name, value in parameters.items()}, num_examples=1)

        def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
            return EvaluateResult(loss=float(parameters["head"][0] - parameters["body"][0]), num_examples=1)

    model = {"body": np.zeros(1, _W), "head": np.zeros(1, _W)}
    rounds = {"min_fit_clients": 1, "num_rounds": 4}
    async with federation(app_of(Mine, initial_parameters=model, personal=["head"], rounds=rounds)) as story:
        serving = story.start_server()
        client = story.start_client("c1")
        await story.until(o.TaskStarted, 3, kind="fit")
        trained.open()
        history = await serving
        await client
    losses = [record.federated.loss for record in history.rounds if record.federated is not None]
    assert losses == [0.0] * len(losses)
    assert len(losses) >= 2


async def test_a_personal_name_that_no_tensor_has_is_refused() -> None:
    model = {"body.w": np.zeros(1, _W), "head.w": np.zeros(1, _W)}
    async with federation(app_of(Answering, initial_parameters=model, personal=["heads.*"])) as story:
        with pytest.raises(ConfigError, match=r"no tensor matches 'heads\.\*'; the model has body\.w, head\.w"):
            await story.run("c1")
    async with federation(app_of(Answering, initial_parameters=model, personal=["head.*"])) as story:
        with pytest.raises(ConfigError, match=r"personal=\['head\.\*'\] needs clients that remember"):
            story.start_server(virtual_clients=3)


async def test_clients_stay_for_another_run_and_begin_it_with_nothing_in_mind() -> None:
    async with federation(app()) as story:
        first = story.start_server(keeps_clients=True, run_id="first")
        clients = [story.start_client(name) for name in ("c1", "c2")]
        assert (await first).finished
        assert not any(client.done() for client in clients)
        assert story.server_bus is not None
        await story.server_bus.close()
        history = await story.start_server(run_id="second")
        ended = await asyncio.gather(*clients)
    assert history.run_id == "second"
    assert [end.run_id for end in ended if end is not None] == ["second", "second"]
    assert {update.metrics["before"] for update in history.rounds[0].folded} == {0.0}


async def test_what_is_no_array_cannot_be_remembered() -> None:
    class Counting(Sums):
        def finish(self, state: dict[str, Array], model: Tensors) -> dict[str, Array]:
            self.memory["rounds"] = 1.0  # type: ignore[assignment]
            return super().finish(state, model)

    async with federation(app(strategy=Counting())) as story:
        with pytest.raises(
            RunFailed, match=r"Counting\.finish left memory\['rounds'\] = float: only arrays can be kept"
        ):
            await story.run("c1", "c2")


@pytest.mark.parametrize(("tensors", "is_aside"), [(500, False), (501, True)])
async def test_a_model_of_many_tensors_is_nothing_for_the_event_loop(tensors: int, is_aside: bool) -> None:
    """Each takes its time, however small it is."""
    threads = []

    class Quick(FedAvg):
        is_quick = True

        def fold(self, state: Any, update: ClientUpdate) -> None:
            threads.append(threading.current_thread())
            super().fold(state, update)

    model = {str(number): np.zeros(1, _W) for number in range(tensors)}
    rounds = {"num_rounds": 1, "min_fit_clients": 1, "fraction_evaluate": 0}
    async with federation(app_of(strategy=Quick(), initial_parameters=model, rounds=rounds)) as story:
        await story.run("c1")
    assert [thread is not threading.main_thread() for thread in threads] == [is_aside]


async def test_virtual_clients_on_workers_cannot_remember() -> None:
    class Forgetful(Sums):
        needs_client_memory = True

    async with federation(app(strategy=Forgetful())) as story:
        with pytest.raises(ConfigError, match="Forgetful needs clients that remember"):
            story.start_server(virtual_clients=3)


async def test_names_of_ours_are_refused_in_a_model() -> None:
    async with federation(app_of(Answering, initial_parameters={"extra/w": np.zeros(3, _W)})) as story:
        with pytest.raises(ConfigError, match=r"'extra/w': names that begin with 'extra/' are fedbus's own"):
            await story.run("c1")


async def test_a_long_aggregation_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Sums):
        def finish(self, state: dict[str, Array], model: Tensors) -> dict[str, Array]:
            for done in range(1, 5):
                self.report(done, 4)
            return super().finish(state, model)

    monkeypatch.setattr(fedbus.server.runtime, "_PROGRESS_EVERY_S", 0.0)
    async with federation(app(strategy=Slow(), rounds={"num_rounds": 1})) as story:
        await story.run("c1", "c2")
        told = [(event.round, event.share) for event in story.told(o.AggregationProgressed)]
    assert told == [(1, 0.25), (1, 0.5), (1, 0.75), (1, 1.0)]
    board, console = Board(), Console(width=160, record=True, file=io.StringIO())
    for event in itertools.takewhile(lambda event: not _is_half_done(event), story.events):
        board.observe(event)
    console.print(board)
    assert "round 1/1: 2 of 2 updates, 25% aggregated" in console.export_text()


def _is_half_done(event: object) -> bool:
    return isinstance(event, o.AggregationProgressed) and event.share > 0.25


# ---- the client's memory ---------------------------------------------------------------------------------------------


def tensors(value: float) -> dict[str, Array]:
    return {"w": np.full(2, value)}


def value_of(memory: Tensors) -> float | None:
    return float(memory["w"][0]) if memory else None


@pytest.fixture(params=[True, False], ids=["on disk", "in memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "c1" if request.param else None


def test_a_fit_begins_with_what_the_last_one_left_until_that_is_refused(folder: Path | None) -> None:
    memory = ClientMemory(folder)
    memory.begin_run("r")
    memory.keep("1", tensors(1))
    assert value_of(memory.before("2")) == 1
    assert value_of(memory.before("1")) is None, "the same task again begins where it began"
    memory.keep("2", tensors(2))
    memory.discard("1")
    assert value_of(memory.before("3")) == 2
    memory.discard("2")
    assert value_of(memory.before("3")) is None


def sums(value: float) -> dict[str, Array]:
    return {"sum/w": np.full(2, value), **tensors(value)}


def test_the_share_of_a_refused_fit_is_taken_out_of_the_sums_of_later_ones(folder: Path | None) -> None:
    memory = ClientMemory(folder)
    memory.begin_run("r")
    memory.keep("1", sums(1))
    memory.settle("1")
    for number, left in (("2", 10), ("3", 100), ("4", 1000)):
        memory.before(number)
        memory.keep(number, sums(left))
    assert float(memory.before("5")["sum/w"][0]) == 1000
    memory.discard("3")  # its 90
    assert float(memory.before("6")["sum/w"][0]) == 910
    memory.discard("2")  # its 9, while 6 is at work
    memory.keep("6", sums(2000))
    assert float(memory.before()["sum/w"][0]) == 2000 - 9
    assert value_of(memory.before()) == 2000, "it is no sum"
    memory.settle("4")
    assert float(memory.before()["sum/w"][0]) == 2000 - 9
    memory.discard("6")
    assert float(memory.before()["sum/w"][0]) == 1 + 900


def test_a_first_fit_that_is_refused_leaves_the_others_shares(folder: Path | None) -> None:
    memory = ClientMemory(folder)
    memory.begin_run("r")
    memory.keep("1", sums(1))
    memory.before("2")
    memory.keep("2", sums(10))
    memory.discard("1")
    assert float(memory.before()["sum/w"][0]) == 9


def test_what_is_settled_stays(folder: Path | None) -> None:
    memory = ClientMemory(folder)
    memory.begin_run("r")
    for number in (1, 2, 3):
        memory.keep(str(number), tensors(number))
    memory.settle("2")
    memory.discard("1")
    assert value_of(memory.before("4")) == 3
    memory.discard("3")
    assert value_of(memory.before("4")) == 2
    memory.settle("1")
    assert value_of(memory.before("4")) == 2, "the receipt for an older one came late"
    memory.begin_run("r")
    assert value_of(memory.before()) == 2
    memory.begin_run("another")
    assert value_of(memory.before()) is None


def test_a_process_that_died_goes_on_with_what_was_on_disk(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    memory.begin_run("r")
    for number in (1, 2, 3):
        memory.keep(str(number), tensors(number))
    memory.settle("1")
    again = ClientMemory(tmp_path)
    again.begin_run("r")
    assert value_of(again.before("3")) == 2
    again.settle("3")
    third = ClientMemory(tmp_path)
    assert value_of(third.before()) == 3
    third.begin_run("another")
    assert value_of(ClientMemory(tmp_path).before()) is None


def test_the_next_process_knows_which_rounds_are_behind_it(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    memory.begin_run("r")
    memory.keep("3", tensors(3), round=3)
    assert ClientMemory(tmp_path).newest_round("r") == 3
    memory.settle("3")
    assert ClientMemory(tmp_path).newest_round("r") == memory.newest_round("r") == 3
    assert ClientMemory(tmp_path).newest_round("another") == 0
    memory.begin_run("another")
    assert memory.newest_round("another") == 0


async def test_an_older_task_in_the_inbox_is_not_done_by_the_next_process(tmp_path: Path) -> None:
    """It would begin with what newer ones left, and leave what newer ones begin with."""
    memory = ClientMemory(tmp_path)
    memory.begin_run("r")
    memory.keep("r/fit/2/c1", tensors(1), round=2)
    rounds = {"min_fit_clients": 1, "fraction_fit": 1.0, "min_available_clients": 2}
    async with federation(app(rounds=rounds)) as story:
        serving = story.start_server(run_id="r")
        story.start_client("c1", memory=memory)
        story.start_client("c2")
        await serving
    assert story.told(o.TaskStarted, client_id="c1", kind="fit", round=1) == []


def test_nothing_stays_of_a_fit_that_cannot_be_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = ClientMemory(tmp_path)
    memory.begin_run("r")

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fedbus.client.memory, "save_model", full)
        with pytest.raises(ConfigError, match="No space left"):
            memory.keep("1", tensors(1))
    assert value_of(memory.before("2")) is None, "its task has failed"


def test_nothing_stays_of_a_fit_that_is_discarded_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large memory takes the disk a while, in a thread; the server's word to stop may come meanwhile."""
    memory = ClientMemory(tmp_path)
    memory.begin_run("r")

    def slow(*args: Any) -> None:
        memory.discard("1")
        save_model(*args)

    monkeypatch.setattr(fedbus.client.memory, "save_model", slow)
    memory.keep("1", tensors(1))
    assert value_of(memory.before("2")) is None
    assert value_of(ClientMemory(tmp_path).before("2")) is None, "nor does the next process find it"


def test_a_state_folder_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "settled.safetensors").write_bytes(b"what is this?")
    with pytest.raises(ConfigError, match=r"settled\.safetensors is not a safetensors file"):
        ClientMemory(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state folder .*file cannot be used"):
        ClientMemory(tmp_path / "file")
    other = tmp_path / "other"
    other.mkdir()
    save_model(other / "x.open.safetensors", tensors(1), {})
    with pytest.raises(ConfigError, match=r"state folder .*other holds something else"):
        ClientMemory(other)

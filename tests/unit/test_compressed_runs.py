"""Runs whose updates and models travel in a codec: real server and clients over the memory bus."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.app import App
from fedbus.client.code import RESIDUAL
from fedbus.client.memory import ClientMemory
from fedbus.client.runtime import ClientRuntime
from fedbus.errors import ConfigError, RunFailed, UpdateRefused
from fedbus.observe import events as o
from fedbus.server.history import History
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.fedavg import FedAvg
from fedbus.training.base import Client, ClientContext
from fedbus.types import Array, Config, EvaluateResult, FitResult, Tensors
from fedbus.wire.compression import Codec
from tests.kit import Federation, Pause, app_of, eventually, federation

SIZE = 1500
CLIENTS = ("c1", "c2")
ALL_CODECS = ("float16", "bfloat16", "int8", "qsgd:7", "topk:0.01", "topk:0.1+int8+zstd", "zstd", "int8+zstd")


def step(client_id: str, round: int) -> Array:
    return np.random.default_rng([*client_id.encode(), round]).normal(size=SIZE).astype(np.float32)


class Own(Client):
    """Each client trains the tensor of its own name alone: the model holds the sum of what counts of its steps."""

    hold: dict[tuple[str, int], Pause]

    def __init__(self, context: ClientContext, hold: dict[tuple[str, int], Pause]) -> None:
        self.name = context.client_id
        self.hold = hold

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        round_ = int(str(config["round"]))
        trained = parameters[self.name] + step(self.name, round_)
        if (self.name, round_) in self.hold:
            self.hold[self.name, round_].in_thread()
        return FitResult(parameters={self.name: trained}, num_examples=3, metrics={"round": round_})

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        return EvaluateResult(loss=0.0, num_examples=1)


class Picky(FedAvg):
    """Does not like what c2 has to say in round 4."""

    def verify(self, update: ClientUpdate) -> None:
        if (update.client_id, update.metrics["round"]) == ("c2", 4):
            raise UpdateRefused("not this one")


def own_app(compression: str, hold: dict[tuple[str, int], Pause] | None = None, **settings: Any) -> App:
    rounds = {"num_rounds": 4, "min_fit_clients": 2, "fraction_evaluate": 0, **settings.pop("rounds", {})}
    return app_of(
        lambda context: Own(context, hold or {}),
        initial_parameters={name: np.zeros(SIZE, np.float32) for name in CLIENTS},
        compression=compression,
        rounds=rounds,
        **settings,
    )


def counted(history: History, client_id: str) -> Array:
    """The sum of the steps that count."""
    rounds = [record.round for record in history.rounds for update in record.folded if update.client_id == client_id]
    total: Array = np.array([step(client_id, number) for number in rounds]).sum(axis=0, dtype=np.float64)
    return total


@pytest.mark.parametrize("text", ALL_CODECS)
async def test_a_run_is_as_it_would_be_but_for_what_the_codec_rounds(text: str) -> None:
    async with federation(own_app(text)) as story:
        history = await story.run(*CLIENTS)
        assert history.finished
        assert story.told(o.UpdateRefused) == []
        model = story.model()
        for client_id in CLIENTS:
            left = story.clients[client_id]._memory.before().get(f"{RESIDUAL}{client_id}", np.zeros(SIZE))
            near = {"float16": 0.01, "bfloat16": 0.1, "int8": 0.2, "int8+zstd": 0.2, "qsgd:7": 20}.get(text, 1e-4)
            if "topk" in text:
                assert np.abs(left).max() > 1
            away = np.abs(model[client_id] + left - counted(history, client_id)).max()
            assert away <= near
            assert (away > 1e-5) == (text not in ("zstd", "topk:0.01", "topk:0.1+int8+zstd"))
        folded = story.told(o.UpdateFolded)
        assert {event.raw_bytes for event in folded} == {4 * SIZE}
        ratio = sum(event.raw_bytes for event in folded) / sum(event.nbytes for event in folded)
        least = {"float16": 2, "bfloat16": 2, "int8": 3.8, "qsgd:7": 7.3, "topk:0.01": 30, "zstd": 1.05}
        assert ratio >= least.get(text, 4)
        records = [update for record in history.rounds for update in record.folded]
        assert [(r.nbytes, r.raw_bytes) for r in records] == [(e.nbytes, e.raw_bytes) for e in folded]
        assert history.settings["compression"] == text


async def test_what_was_left_out_of_an_update_that_does_not_count_is_not_lost(tmp_path: Path) -> None:
    """c2 is too late for round 2 and refused in round 4; c1 is killed in round 3 and comes back, as the server does."""
    hold = {("c2", 2): Pause(), ("c1", 3): Pause(), ("c2", 3): Pause()}
    rounds = {"min_fit_clients": 1, "min_available_clients": 2, "max_staleness": 0, "num_rounds": 5, "grace_s": 0.2}
    app = own_app("topk:0.02+int8", hold, rounds=rounds, strategy=Picky())
    memories = {name: ClientMemory(tmp_path / name) for name in CLIENTS}
    async with federation(app, run_dir=tmp_path / "run", supervised=True) as story:
        story.start_server()
        first, second = (start(story, name, memories[name]) for name in CLIENTS)
        await hold["c2", 2].reached()
        await story.until(o.RoundClosed, round=2)  # without c2
        await hold["c1", 3].reached()
        hold["c2", 2].go_on()
        await hold["c2", 3].reached()
        await story.kill("c1", first)
        hold["c1", 3].go_on()
        hold.pop(("c1", 3))
        memories["c1"] = ClientMemory(tmp_path / "c1")
        first = start(story, "c1", memories["c1"])
        await story.kill_server()
        hold["c2", 3].go_on()
        history = await story.resume_server()
        await asyncio.gather(first, second)
        assert history.finished
        assert [len(record.folded) for record in history.rounds if record.round in (2, 4)] == [1, 1]
        assert len(story.told(o.RefusalArrived, reason="not this one")) == 1
        for client_id in CLIENTS:
            await eventually(lambda memory=memories[client_id]: not memory._open)  # type: ignore[misc]
            left = memories[client_id].before()[f"{RESIDUAL}{client_id}"]
            np.testing.assert_allclose(story.model()[client_id] + left, counted(history, client_id), atol=1e-4)
            assert np.abs(left).max() > 1


def start(story: Federation, client_id: str, memory: ClientMemory) -> asyncio.Task[Any]:
    bus = story.buses[client_id] = story.connect(client_id)
    runtime = ClientRuntime(story.app, bus, client_id=client_id, memory=memory, observers=[story.observe])
    task: asyncio.Task[Any] = story._start(runtime.run())
    return task


class Still(Client):
    """Changes nothing, and keeps what it was given."""

    def __init__(self, given: list[Array]) -> None:
        self.given = given

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        self.given.append(parameters["w"])
        return FitResult(parameters=parameters, num_examples=1)

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        return EvaluateResult(loss=0.0, num_examples=1)


@pytest.mark.parametrize("text", ["bfloat16", "float16+zstd", "int8", "zstd"])
async def test_an_update_is_the_difference_from_the_model_that_the_client_got(text: str) -> None:
    given: list[Array] = []
    initial = np.random.default_rng(0).normal(size=(50, 700)).astype(np.float32)
    app = app_of(
        lambda context: Still(given),
        initial_parameters={"w": initial, "n": np.arange(3)},
        model_compression=text,
        rounds={"num_rounds": 2, "min_fit_clients": 2, "fraction_evaluate": 0},
    )
    async with federation(app) as story:
        await story.run("c1", "c2")
        np.testing.assert_array_equal(story.model()["w"], initial)
        published = story.told(o.ModelPublished)
        assert {event.raw_bytes for event in published} == {4 * initial.size + 32 + 24}
        assert published[0].payload_bytes < 0.95 * published[0].raw_bytes
        np.testing.assert_array_equal(given[1], given[0])  # both got the same of version 0
        away = np.abs(given[0] - initial).max()
        assert away <= 0.04
        assert (away == 0) == (text == "zstd")


async def test_a_client_that_cannot_speak_the_codec_leaves_at_once_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with federation(own_app("int8+zstd")) as story:
        story.start_server()
        await story.until(o.ModelPublished)
        monkeypatch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(RunFailed) as failed:
            await story.start_client("c1")
        assert str(failed.value) == (
            "c1 left the run: it cannot take part in a run with this compression: zstd needs the package zstandard: "
            "pip install 'fedbus[zstd]'"
        )
        lost = await story.until(o.MemberLost)
        assert lost.left
        assert "pip install 'fedbus[zstd]'" in lost.reason
        monkeypatch.undo()
        await asyncio.gather(*(story.start_client(name) for name in CLIENTS))
        assert story.serving is not None
        assert (await story.serving).finished


class Older:
    """A codec module that knows none yet."""

    @staticmethod
    def parse(text: str) -> Codec:
        raise ConfigError(f"there is no codec {text!r}")


async def test_a_codec_that_the_client_does_not_know_is_told_at_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.client.runtime.Codec", Older)
    async with federation(own_app("int8")) as story:
        story.start_server()
        with pytest.raises(RunFailed, match="compression: there is no codec 'int8'"):
            await story.start_client("c1")


async def test_a_missing_package_is_told_when_server_or_worker_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for app in (own_app("zstd"), app_of(model_compression="int8+zstd")):
        async with federation(app) as story:
            with pytest.raises(ConfigError, match=r"pip install 'fedbus\[zstd\]'"):
                story.start_server()
            with pytest.raises(ConfigError, match=r"pip install 'fedbus\[zstd\]'"):
                story.start_worker("w")


async def test_virtual_clients_on_workers_do_all_but_top_k() -> None:
    async with federation(app_of(compression="topk:0.1")) as story:
        with pytest.raises(ConfigError, match=r"compression='topk:0\.1' needs clients that remember"):
            story.start_server(virtual_clients=4)
    app = app_of(
        compression="int8+zstd",
        initial_parameters={"w": np.zeros(3000, np.float32)},
        rounds={"num_rounds": 1, "min_fit_clients": 4},
    )
    async with federation(app) as story:
        serving = story.start_server(virtual_clients=4)
        story.start_worker("w", slots=2)
        assert (await serving).updates == 4
        assert {event.nbytes < event.raw_bytes for event in story.told(o.UpdateFolded)} == {True}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"compression": "gzip"}, "there is no codec 'gzip'"),
        ({"compression": None}, "compression must be the name of a codec"),
        ({"model_compression": 8}, "model_compression must be the name of a codec"),
        (
            {"model_compression": "topk:0.1+int8"},
            "a model cannot travel as 'topk:0.1.int8': topk leaves most of it out",
        ),
    ],
)
def test_an_app_with_a_codec_that_makes_no_sense_is_not_made(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        app_of(**settings)


async def test_a_model_with_a_name_of_ours_ends_the_run_with_a_line_that_says_so() -> None:
    app = app_of(compression="int8", initial_parameters={"#steps": np.zeros(700, np.float32)})
    async with federation(app) as story:
        with pytest.raises(ConfigError, match="a tensor named '#steps' cannot travel as int8: rename it"):
            await story.start_server()


class Asking(FedAvg):
    asks = "query"


def test_answers_to_queries_are_packed_and_not_rounded() -> None:
    app = app_of(compression="topk:0.1+int8+zstd:3", strategy=Asking())
    assert app.update_codec == Codec.parse("zstd:3")
    assert app_of(compression="int8", strategy=Asking()).update_codec == Codec.parse("")
    assert app_of(compression="int8").update_codec == Codec.parse("int8")


async def test_the_same_task_done_again_gives_the_same_update() -> None:
    """A run is a function of its seed, whatever is rounded at random."""
    bits = []
    for _ in range(2):
        async with federation(own_app("qsgd:7", seed=5)) as story:
            await story.run(*CLIENTS)
            bits.append(story.bits())
    assert bits[0] == bits[1]
    async with federation(own_app("qsgd:7", seed=6)) as story:
        await story.run(*CLIENTS)
        assert story.bits() != bits[0]

"""Whole stories over the memory bus: real server, real clients, one event loop."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.bus.base import Bus, hold_patiently
from fedbus.bus.memory import MemoryBroker
from fedbus.bus.topology import BROADCAST, CONTROL, DEAD, UPDATES, client_inbox, inbox, ingress, model_stream
from fedbus.client.reader import ModelReader, Place
from fedbus.errors import BrokerClosed, ConfigError, QueueBusy, QueueMismatch, QueueMissing, RunFailed
from fedbus.observe import events as o
from fedbus.observe.logs import sentence
from fedbus.server.publisher import ModelPublisher
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fedbuff import FedBuff
from fedbus.tensorfile import load_model
from fedbus.training.base import Client, ClientContext
from fedbus.types import Array, Config, FitResult, Scalar, Tensors
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode
from fedbus.wire.transfer import checksum
from tests.kit import AddingClient, Gate, app_of, cut, eventually, federation, pack, weighted

# ---- the arithmetic --------------------------------------------------------------------------------------------------


async def test_full_participation_equals_the_hand_computed_weighted_mean() -> None:
    rng = np.random.default_rng(0)
    start: dict[str, Array] = {"w": rng.normal(size=(7, 5)).astype(np.float32), "b": rng.normal(size=5)}
    steps = {name: {t: rng.normal(size=v.shape).astype(v.dtype) for t, v in start.items()} for name in ("a", "b", "c")}
    examples = {"a": 17, "b": 400, "c": 3}

    class Stepping(Client):
        def __init__(self, context: ClientContext) -> None:
            self.name = context.client_id

        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            trained = {t: np.asarray(0.9 * v + steps[self.name][t], v.dtype) for t, v in parameters.items()}
            return FitResult(parameters=trained, num_examples=examples[self.name])

    app = app_of(
        Stepping, initial_parameters=start, rounds={"num_rounds": 3, "min_fit_clients": 3, "fraction_evaluate": 0}
    )
    async with federation(app) as story:
        await story.run("a", "b", "c")
        by_hand: dict[str, Array] = {t: v.astype(np.float64) for t, v in start.items()}
        for _ in range(3):
            by_hand = {
                t: sum(examples[c] * (0.9 * v + steps[c][t]) for c in examples) / sum(examples.values())
                for t, v in by_hand.items()
            }
        for t, value in story.model().items():
            assert value.dtype == start[t].dtype
            np.testing.assert_allclose(value, by_hand[t], atol=1e-6)


async def test_one_client_with_all_the_data_equals_training_it_alone() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 4)), rng.integers(0, 2, 200).astype(float)

    def train(w: Array) -> Array:
        for _ in range(20):
            w = w - 0.1 * x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y)
        return w

    class Alone(Client):
        def __init__(self, context: ClientContext) -> None:
            pass

        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            return FitResult(parameters={"w": train(parameters["w"])}, num_examples=len(y))

    app = app_of(
        Alone,
        initial_parameters={"w": np.zeros(4)},
        rounds={"num_rounds": 4, "min_fit_clients": 1, "fraction_evaluate": 0},
    )
    async with federation(app) as story:
        await story.run("only")
        alone = np.zeros(4)
        for _ in range(4):
            alone = train(alone)
        np.testing.assert_allclose(story.model()["w"], alone, atol=1e-6)


async def test_a_model_of_many_parts_and_dtypes_arrives_whole() -> None:
    start: dict[str, Array] = {
        "large": np.arange(800_000, dtype=np.float32).reshape(1000, 800),
        "half": np.ones(300_001, np.float16),
        "steps": np.array(7, np.int64),
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 4)),
    }

    class Same(Client):
        def __init__(self, context: ClientContext) -> None:
            pass

        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            assert all(np.array_equal(parameters[t], start[t]) for t in start)
            return FitResult(parameters=parameters, num_examples=1)

    app = app_of(Same, initial_parameters=start, rounds={"min_fit_clients": 2, "fraction_evaluate": 0})
    async with federation(app) as story:
        history = await story.run("a", "b")
        assert history.updates == 4
        assert story.told(o.ModelPublished)[0].parts == 4
        assert all(np.array_equal(story.model()[t], start[t]) for t in start)
        assert all(story.model()[t].dtype == start[t].dtype for t in start)


# ---- evaluation and configuration ------------------------------------------------------------------------------------


async def test_evaluation_is_weighted_and_central_evaluation_sees_every_version(tmp_path: Path) -> None:
    app = app_of(evaluate_fn=lambda round_, model: (float(model["w"][0]), {"round": round_}), rounds={"num_rounds": 2})
    async with federation(app) as story:
        serving = story.start_server(run_dir=tmp_path)
        clients = [story.start_client("c1"), story.start_client("c3")]
        history = await serving
        ended = await asyncio.gather(*clients)
    step = weighted([1, 3], [10, 30])
    assert history.initial is not None
    assert history.initial.loss == 0.0
    assert [record.central.loss for record in history.rounds if record.central] == pytest.approx([step, 2 * step])
    federated = history.rounds[0].federated
    assert federated is not None
    assert federated.loss == pytest.approx(step)
    assert (federated.metrics, federated.num_examples) == ({"half": 0.5}, 4)
    assert [e.finished for e in ended if e] == [True, True]
    assert load_model(tmp_path / "model.safetensors")["w"].tolist() == pytest.approx([2 * step] * 3)
    saved = json.loads((tmp_path / "history.json").read_text())
    assert (saved["finished"], len(saved["rounds"]), sorted(u["client_id"] for u in saved["rounds"][1]["folded"])) == (
        True,
        2,
        ["c1", "c3"],
    )


async def test_the_fit_config_of_the_round_reaches_the_client() -> None:
    seen: list[dict[str, Scalar]] = []

    class Reading(AddingClient):
        def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> Any:
            seen.append(config)
            return super().fit(parameters, config)

    app = app_of(Reading, fit_config=lambda round_: {"lr": 0.1 / round_}, seed=5, rounds={"min_fit_clients": 1})
    async with federation(app) as story:
        await story.run("c1")
    assert seen == [{"seed": 5, "round": 1, "repeat": 0, "lr": 0.1}, {"seed": 5, "round": 2, "repeat": 0, "lr": 0.05}]


async def test_without_initial_parameters_a_client_gives_the_model() -> None:
    async with federation(app_of(initial_parameters=None, rounds={"min_fit_clients": 1, "num_rounds": 1})) as story:
        await story.run("c4")
        assert story.model()["0"].tolist() == [8, 8, 8]


async def test_an_evaluate_fn_that_raises_is_told_and_the_run_goes_on() -> None:
    def broken(round_: int, model: dict[str, Array]) -> Any:
        return {0: 3, 1: (1.0, {})}.get(round_) or model["nothing"]

    async with federation(app_of(evaluate_fn=broken)) as story:
        history = await story.run("c1", "c2")
    assert [(e.round, e.reason) for e in story.told(o.EvaluationFailed)] == [
        (0, "it returned int, (loss, metrics) is due"),
        (2, "KeyError: 'nothing'"),
    ]
    assert history.finished


# ---- clients come, go and fail ---------------------------------------------------------------------------------------


async def test_a_client_that_starts_before_the_server_waits_for_it() -> None:
    async with federation(app_of(rounds={"min_fit_clients": 1, "num_rounds": 1})) as story:
        client = story.start_client("c1")
        await story.until(o.ServerAwaited)
        assert (await story.start_server()).finished
        ended = await client
        assert ended is not None
        assert ended.finished


async def test_a_fit_that_raises_is_reported_with_its_cause_and_the_client_lives_on() -> None:
    class Failing(AddingClient):
        def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> Any:
            if config["round"] == 1 and self.number == 2:
                raise ValueError("no data\nfor today")
            if config["round"] == 2 and self.number == 2:
                raise SystemExit(3)
            return super().fit(parameters, config)

    async with federation(app_of(Failing, rounds={"num_rounds": 3, "min_fit_clients": 2})) as story:
        history = await story.run("c1", "c2")
    assert history.rounds[0].failed == {"c2": "fit raised ValueError: no data for today"}
    assert history.rounds[1].failed == {"c2": "fit raised RuntimeError: SystemExit: 3"}
    assert history.rounds[2].clients == {"c1", "c2"}


@pytest.mark.parametrize(
    ("trained", "num_examples", "reason"),
    [
        ([np.zeros(4, np.float32)], 1, "fit returned shape (4,) for tensor 'w', the model has (3,)"),
        ([np.zeros(3, np.float32)] * 2, 1, "fit returned 2 arrays, the model has 1"),
        (None, 1, "fit returned None as parameters, expected a list of arrays"),
        ([np.zeros(3, np.float32)], 0, "num_examples is 0: an update needs at least one example"),
        ([np.full(3, np.nan, np.float32)], 1, "tensor 'w' holds NaN or infinite values: did the training diverge?"),
    ],
)
async def test_what_a_client_must_not_return_is_refused_with_a_reason_and_the_run_goes_on(
    trained: Any, num_examples: int, reason: str
) -> None:
    class Odd(AddingClient):
        def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> Any:
            return (trained, num_examples, {}) if self.number == 2 else super().fit(parameters, config)

    rounds = {"min_fit_clients": 2, "min_available_clients": 3, "grace_s": 30.0}  # wait for the odd one, too
    async with federation(app_of(Odd, rounds=rounds)) as story:
        history = await story.run("c1", "c2", "c3")
        assert story.model()["w"].tolist() == pytest.approx([2 * weighted([1, 3], [10, 30])] * 3)
    assert all(record.clients == {"c1", "c3"} for record in history.rounds)
    at_client = [e.reason for e in story.events if isinstance(e, o.RefusalArrived | o.TaskErred)]
    assert reason in at_client
    in_history = {r for record in history.rounds for r in (*record.failed.values(), *record.refused.values())}
    assert reason in in_history


async def test_a_run_in_which_nothing_is_ever_accepted_fails_with_the_last_reason() -> None:
    class Failing(AddingClient):
        def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> Any:
            raise ValueError("no data")

    async with federation(app_of(Failing, rounds={"min_fit_clients": 1})) as story:
        with pytest.raises(RunFailed, match=r"no update was accepted.*c1: fit raised ValueError: no data"):
            await story.run("c1")


async def test_a_late_joiner_takes_part_and_a_client_that_is_asked_to_leave_says_goodbye() -> None:
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 2, "min_fit_clients": 2})) as story:
        serving = story.start_server()
        leaving = story.start_client("c1")
        story.start_client("c2")
        await story.until(o.TaskStarted, 2, kind="fit")
        story.clients["c1"].request_leave()
        assert await leaving is None
        left = await story.until(o.MemberLost)
        assert (left.client_id, left.left) == ("c1", True)
        story.start_client("c3")
        await story.until(o.CohortGrew)
        gate.open()
        history = await serving
    assert history.clients_left == ["c1"]
    assert history.rounds[0].clients == {"c2", "c3"}


async def test_heartbeats_go_on_while_fit_holds_its_thread() -> None:
    gate = Gate()
    rounds = {"num_rounds": 1, "min_fit_clients": 1, "heartbeat_s": 0.02, "lease_s": 0.2, "fraction_evaluate": 0}
    async with federation(app_of(gate.client_fn, rounds=rounds)) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.TaskStarted)
        loop = asyncio.get_running_loop()
        loop.call_later(0.6, gate.open)  # three leases
        history = await serving
    assert (history.clients_lost, history.updates) == ([], 1)


async def test_a_client_that_dies_is_lost_and_its_round_closes_without_it() -> None:
    gate = Gate(only="c2")
    rounds = {"num_rounds": 1, "min_fit_clients": 2, "heartbeat_s": 0.02, "lease_s": 0.2, "fraction_evaluate": 0}
    async with federation(app_of(gate.client_fn, rounds=rounds)) as story:
        serving = story.start_server()
        story.start_client("c1")
        dying = story.start_client("c2")
        await story.until(o.TaskStarted, kind="fit", client_id="c2")
        await story.kill("c2", dying)
        history = await serving
        gate.open()
    assert (history.clients_lost, history.rounds[0].lost, history.rounds[0].clients) == (["c2"], ["c2"], {"c1"})
    assert history.rounds[0].reason == "cohort_done"


async def test_a_client_killed_in_its_task_finds_it_again_when_it_comes_back() -> None:
    gate = Gate()
    rounds = {"num_rounds": 1, "min_fit_clients": 1, "lease_s": 20.0, "fraction_evaluate": 0}
    async with federation(app_of(gate.client_fn, rounds=rounds)) as story:
        serving = story.start_server()
        dying = story.start_client("c1")
        await story.until(o.TaskStarted)
        await story.kill("c1", dying)
        gate.open()
        story.start_client("c1", app_of(AddingClient))
        history = await serving
    assert [(u.client_id, u.staleness) for u in history.rounds[0].folded] == [("c1", 0)]
    assert history.clients_lost == []


async def test_a_second_client_of_the_same_name_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hold_patiently, "__kwdefaults__", {"patience_s": 0.0})
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.TaskStarted)
        with pytest.raises(QueueBusy, match="a client named c1 is connected already"):
            await story.start_client("c1")
        gate.open()
        assert (await serving).finished


async def test_the_end_of_the_connection_ends_server_and_client_with_one_clear_error() -> None:
    async with federation(app_of(rounds={"min_fit_clients": 5})) as story:
        serving, client = story.start_server(), story.start_client("c1")
        await story.until(o.MemberJoined)
        story.broker.drop_connections()
        results = await asyncio.gather(serving, client, return_exceptions=True)
        assert [type(result) for result in results] == [BrokerClosed, BrokerClosed]


# ---- hostile clients -------------------------------------------------------------------------------------------------


class Attacker:
    """Speaks to the broker itself: what no honest client runtime would send."""

    def __init__(self, bus: Bus, run_id: str) -> None:
        self.bus, self.run_id = bus, run_id

    def update(self, tensors: Tensors, **fields: Any) -> m.Update:
        schema, payload = pack(tensors)
        (only,) = cut(payload)
        values: dict[str, Any] = {
            "client_id": "c9",
            "task_id": f"{self.run_id}/fit/1/c9",
            "run_id": self.run_id,
            "transfer": "t",
            "version": 0,
            "num_examples": 1,
            "metrics": {},
            "schema": schema,
            "part_bytes": 1 << 20,
            "checksum": checksum(only),
            "payload": only,
        }
        return m.Update(**{**values, **fields})

    async def send(self, message: m.Message) -> None:
        await self.bus.publish(UPDATES, "", encode(message))


ZEROS = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    ("tensors", "fields", "reason"),
    [
        ({"w": np.zeros(4, np.float32)}, {}, "tensor 'w' has shape (4,), the model has (3,)"),
        ({"w": np.zeros(3)}, {}, "tensor 'w' came as <f8, <f4 is due"),
        ({"v": ZEROS}, {}, "the model has no tensor 'v'"),
        ({"w": ZEROS}, {"num_examples": -5}, "num_examples is -5: an update needs at least one example"),
        ({"w": ZEROS}, {"checksum": 1}, "part 0 fails its checksum"),
        ({"w": ZEROS}, {"part_bytes": 0}, "parts of 0 bytes, 65536 to 8388608 are allowed"),
        ({"w": np.array([0, np.inf, 0], np.float32)}, {}, "tensor 'w' holds NaN or infinite values"),
        ({"w": ZEROS}, {"client_id": "c8"}, "its task was given to c9"),
        ({"w": ZEROS}, {"task_id": "other/fit/1/c9"}, "its task is not one of this run, or too old"),
    ],
)
async def test_a_hostile_update_is_refused_with_a_reason_before_it_costs_anything(
    tensors: dict[str, Array], fields: dict[str, Any], reason: str
) -> None:
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        serving = story.start_server()
        story.start_client("c9")
        run_id = (await story.until(o.Welcomed)).run_id
        await story.until(o.TaskStarted)
        attacker = Attacker(story.broker.connect("server"), run_id)  # a broker whose one user all share
        await attacker.send(attacker.update(tensors, **fields))
        refused = await story.until(o.UpdateRefused)
        assert refused.reason.startswith(reason)
        gate.open()
        if "c9" in refused.task_id and run_id in refused.task_id and refused.client_id == "c9":
            with pytest.raises(RunFailed):  # it had one task and spent it; its honest update stays with the broker
                await serving
        else:
            assert (await serving).updates == 1  # the true owner's update still counts
            assert story.broker.depth(UPDATES) == 0


async def test_garbage_on_the_queues_is_set_aside_and_the_run_goes_on() -> None:
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.TaskStarted)
        bus = story.broker.connect("c1")
        for body in (b"", b"\x93\x02\xc6\xff\xff\xff\xff", encode(m.Join(client_id="../x", session="s"))):
            await bus.publish(CONTROL, "", body)
            await bus.publish(UPDATES, "", body)
            await bus.publish("fedbus.tasks", "c1", body)
        await eventually(lambda: story.broker.depth(DEAD) == 3)
        await story.until(o.MessageRejected, 2, queue=inbox("c1"))
        gate.open()
        assert (await serving).updates == 1
        assert story.broker.depth(DEAD) == 3  # for the operator to look at
    for queue in (CONTROL, UPDATES):
        told = [event.count for event in story.told(o.MessageRejected, queue=queue)]
        assert (told[0], sum(told)) == (1, 3)


async def test_an_update_sent_twice_is_folded_once() -> None:
    gate = Gate(only="c1")
    async with federation(
        app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 2, "fraction_evaluate": 0})
    ) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.MemberJoined)
        twin = story.broker.connect("c9")
        await twin.declare(client_inbox("c9"))
        await twin.publish(CONTROL, "", encode(m.Join(client_id="c9", session="s")))
        await story.until(o.RoundOpened)
        attacker = Attacker(twin, story.told(o.RunStarted)[0].run_id)
        update = attacker.update({"w": np.ones(3, np.float32)})
        await attacker.send(update)
        await story.until(o.UpdateFolded)
        await attacker.send(update)
        gate.open()
        history = await serving
        assert sorted(u.client_id for u in history.rounds[0].folded) == ["c1", "c9"]
        assert story.model()["w"].tolist() == pytest.approx([weighted([1, 1], [10, 1])] * 3)


async def test_parts_of_an_upload_that_died_are_never_mixed_with_those_of_the_next() -> None:
    start: dict[str, Array] = {"w": np.zeros(400_000, np.float32)}  # two parts
    gate = Gate(only="c1")
    app = app_of(
        gate.client_fn, initial_parameters=start, rounds={"num_rounds": 1, "min_fit_clients": 2, "fraction_evaluate": 0}
    )
    async with federation(app) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.MemberJoined)
        twin = story.broker.connect("c9")
        await twin.declare(client_inbox("c9"))
        await twin.publish(CONTROL, "", encode(m.Join(client_id="c9", session="s")))
        await story.until(o.RoundOpened)
        run_id = story.told(o.RunStarted)[0].run_id
        for transfer, value in (("dies", 5.0), ("lives", 2.0)):
            schema, payload = pack({"w": np.full(400_000, value, np.float32)})
            first, second = cut(payload)
            head = m.Update(
                client_id="c9",
                task_id=f"{run_id}/fit/1/c9",
                run_id=run_id,
                transfer=transfer,
                version=0,
                num_examples=10,
                metrics={},
                schema=schema,
                part_bytes=1 << 20,
                checksum=checksum(first),
                payload=first,
            )
            await twin.publish(UPDATES, "", encode(head))
        for transfer in ("lives", "dies"):
            part = m.Part(transfer=transfer, index=1, checksum=checksum(second), payload=second)
            await twin.publish(UPDATES, "", encode(part))
        gate.open()
        assert (await serving).updates == 2
        assert np.unique(story.model()["w"]).tolist() == [1.5]  # (1 * 10 + 2 * 10) / 20
        assert story.broker.depth(UPDATES) == 0


# ---- the end ---------------------------------------------------------------------------------------------------------


async def test_a_stopped_server_gives_uncommitted_updates_back_and_sends_the_clients_home() -> None:
    gate = Gate(only="c2")
    async with federation(app_of(gate.client_fn, rounds={"min_fit_clients": 2})) as story:
        serving = story.start_server()
        clients = [story.start_client("c1"), story.start_client("c2")]
        await story.until(o.UpdateFolded)
        assert story.server is not None
        story.server.request_stop("enough")
        with pytest.raises(RunFailed, match="enough"):
            await serving
        ended = await asyncio.gather(*clients)
        assert [(e.finished, e.reason) for e in ended if e] == [(False, "enough")] * 2
        assert story.broker.depth(UPDATES) == 1
        gate.open()


async def test_updates_of_an_earlier_run_on_the_same_broker_are_refused() -> None:
    async with federation(app_of(rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        bus = story.broker.connect("c9")
        serving = story.start_server()
        await story.until(o.RunStarted)
        attacker = Attacker(bus, "yesterday")
        await attacker.send(attacker.update({"w": ZEROS}))
        await story.until(o.UpdateRefused)
        story.start_client("c1")
        assert (await serving).updates == 1


async def test_a_strategy_that_raises_fails_the_run_in_one_line() -> None:
    class Broken(FedAvg):
        def fold(self, state: Any, update: ClientUpdate) -> None:
            raise ZeroDivisionError("by zero")

    async with federation(app_of(strategy=Broken(), rounds={"min_fit_clients": 1})) as story:
        with pytest.raises(
            RunFailed, match=r"Broken.fold raised ZeroDivisionError: by zero \(test_federation.py:\d+\)"
        ) as caught:
            await story.run("c1")
    assert isinstance(caught.value.__cause__, ZeroDivisionError), "its traceback is for whoever wrote it"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {"w": w.astype(np.float64)}, r"finish returned 'w' as float64 \(3,\), the model has float32 \(3,\)"),
        (lambda w: {"w": w[:2]}, r"finish returned 'w' as float32 \(2,\), the model has float32 \(3,\)"),
        (lambda w: {"w": w, "1": w}, r"finish gave or lacks '1': it must return the model's tensors"),
        (lambda w: [w], r"finish must return \{tensor name: array\}, the next model, not list"),
    ],
)
async def test_a_strategy_that_changes_the_model_fails_the_run_in_one_line(
    change: Callable[[Array], Any], words: str
) -> None:
    class Changing(FedAvg):
        def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
            (value,) = super().finish(state, model).values()
            changed: dict[str, Array] = change(value)
            return changed

    async with federation(app_of(strategy=Changing(), rounds={"min_fit_clients": 1})) as story:
        with pytest.raises(RunFailed, match=words):
            await story.run("c1")


async def test_a_receipt_comes_only_after_the_commit() -> None:
    async with federation(app_of(rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        await story.run("c1")
    kinds = [type(event) for event in story.events]
    assert kinds.index(o.ReceiptArrived) > kinds.index(o.ModelPublished, kinds.index(o.UpdateFolded))


async def test_a_second_server_on_the_same_broker_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedbus.server.runtime.hold_patiently", functools.partial(hold_patiently, patience_s=0.3))
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        first = story.start_server()
        story.start_client("c1")
        await story.until(o.TaskStarted)
        with pytest.raises(QueueBusy, match="another server runs on this broker"):
            await story.start_server()
        gate.open()
        assert (await first).updates == 1


async def test_what_a_client_says_reaches_the_screen_on_one_line_without_control_characters() -> None:
    class Rude(AddingClient):
        def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> Any:
            raise ValueError("red\x1b[31m\n\n\x07 alert")

    async with federation(app_of(Rude, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        with pytest.raises(RunFailed):
            await story.run("c1")
        assert story.told(o.FitFailed)[0].reason == "fit raised ValueError: red?[31m ? alert"


@pytest.mark.parametrize(
    ("setting", "queue"), [("update_queue", UPDATES), ("message_queues", CONTROL), ("message_queues", inbox("c1"))]
)
async def test_queues_of_another_kind_than_the_app_says_are_one_clear_error(setting: str, queue: str) -> None:
    there, wanted = ("quorum", "classic") if setting == "update_queue" else ("classic", "quorum")
    settings: dict[str, Any] = {setting: wanted}
    async with federation(app_of(**settings)) as story:
        bus = story.broker.connect()
        await bus.declare(ingress(**{setting: there}))  # type: ignore[arg-type]  # it is one of two words
        await bus.declare(client_inbox("c1"))
        party = story.start_client("c1") if queue == inbox("c1") else story.start_server()
        with pytest.raises(QueueMismatch, match=f"{queue} exists .*{setting}='{wanted}'.*set .* to what is there"):
            await party


async def test_a_kind_of_queue_that_there_is_not_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="message_queues must be 'quorum' or 'classic', not 'stream'"):
        app_of(message_queues="stream")


async def test_a_diverged_run_still_writes_valid_json(tmp_path: Path) -> None:
    app = app_of(
        evaluate_fn=lambda round_, model: (float("nan"), {"inf": float("inf"), "np": np.float32(0.5)}),
        rounds={"num_rounds": 1, "min_fit_clients": 1},
    )
    async with federation(app) as story:
        serving = story.start_server(run_dir=tmp_path)
        story.start_client("c1")
        await serving
    text = (tmp_path / "history.json").read_text()
    central = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["rounds"][0]["central"]
    assert (central["loss"], central["metrics"]) == (None, {"inf": None, "np": 0.5})


# ---- what an attack on it found --------------------------------------------------------------------------------------


async def join_as(story: Any, client_id: str) -> Bus:
    """A member that is only a connection: it joined, has an inbox, and does nothing by itself."""
    bus: Bus = story.broker.connect(client_id)
    await bus.declare(client_inbox(client_id))
    await bus.publish(CONTROL, "", encode(m.Join(client_id=client_id, session="s")))
    return bus


async def inbox_of(bus: Bus, client_id: str, kind: type[m.Message]) -> m.Message:
    """The first message of one kind in an inbox."""
    async with asyncio.timeout(10), bus.consume(inbox(client_id), prefetch=0) as consumer:
        async for delivery in consumer:
            if isinstance(message := decode(delivery.body), kind):
                return message
    raise AssertionError


async def test_a_flood_of_joins_without_inboxes_does_not_stop_the_run() -> None:
    async with federation(app_of(rounds={"num_rounds": 2, "min_fit_clients": 1})) as story:
        serving = story.start_server()
        await story.until(o.RunStarted)
        bus = story.broker.connect("flood")
        for number in range(3000):
            await bus.publish(CONTROL, "", encode(m.Join(client_id=f"ghost-{number}", session="s")))
        story.start_client("c1")
        history = await serving
    assert history.finished
    assert "c1" in {client for record in history.rounds for client in record.clients}


async def test_a_stranger_cannot_give_the_initial_model() -> None:
    async with federation(app_of(initial_parameters=None, rounds={"min_fit_clients": 1, "num_rounds": 1})) as story:
        serving = story.start_server()
        run_id = (await story.until(o.RunStarted)).run_id
        attacker = Attacker(story.broker.connect("evil"), run_id)
        forged = attacker.update(
            {"w": np.full(3, 666, np.float32)}, client_id="evil", task_id=f"{run_id}/parameters/0/evil"
        )
        await attacker.send(forged)
        await story.until(o.UpdateRefused)
        story.start_client("c4")
        await serving
        assert story.model()["0"].tolist() == [8, 8, 8]


async def test_metrics_that_cannot_travel_are_the_clients_failure_not_its_silence() -> None:
    class Talkative(AddingClient):
        def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> Any:
            return parameters, 1, {str(number): number for number in range(1000)}

    async with federation(app_of(Talkative, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        with pytest.raises(RunFailed, match="metrics: not a map of at most 256 entries"):
            await story.run("c1")


async def test_everybody_who_was_ever_in_is_told_of_the_end() -> None:
    rounds = {"num_rounds": 1, "min_fit_clients": 1, "min_available_clients": 2, "heartbeat_s": 0.02, "lease_s": 0.1}
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds=rounds)) as story:
        serving = story.start_server()
        await story.until(o.RunStarted)
        silent = await join_as(story, "c9")
        story.start_client("c1")
        await story.until(o.MemberLost, client_id="c9")
        gate.open()
        await serving
        ended = await inbox_of(silent, "c9", m.RunEnded)
    assert isinstance(ended, m.RunEnded)
    assert ended.finished


async def test_a_server_that_fails_sends_its_clients_home() -> None:
    class Broken(FedAvg):
        def fold(self, state: Any, update: ClientUpdate) -> None:
            raise ZeroDivisionError("by zero")

    async with federation(app_of(strategy=Broken(), rounds={"min_fit_clients": 1})) as story:
        serving, client = story.start_server(), story.start_client("c1")
        with pytest.raises(RunFailed):
            await serving
        ended = await client
    assert ended is not None
    assert not ended.finished
    assert ended.reason.startswith("Broken.fold raised ZeroDivisionError: by zero")


async def test_words_of_an_earlier_run_in_the_inbox_mean_nothing() -> None:
    async with federation(app_of(rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        bus = await join_before_the_server(story)
        task = m.FitTask(
            task_id="old/fit/1/c1",
            run_id="old",
            epoch=1,
            round=1,
            version=0,
            offset=0,
            timeout_s=1.0,
            eager_bytes=0,
            config={},
            receipt_task_id="",
            receipt_round=0,
            receipt_staleness=0,
        )
        for message in (
            m.Welcome(run_id="old", session="another process", epoch=1, heartbeat_s=1, lease_s=2),
            task,
            m.RunEnded(run_id="old", epoch=1, finished=True, reason=""),
        ):
            await bus.publish("fedbus.tasks", "c1", encode(message))
        client = story.start_client("c1")
        await story.until(o.ServerAwaited)
        assert not client.done()
        serving = story.start_server()
        await story.until(o.Welcomed)
        await bus.publish("fedbus.tasks", "c1", encode(m.RunEnded(run_id="other", epoch=1, finished=False, reason="")))
        assert (await serving).updates == 1
        ended = await client
        assert ended is not None
        assert ended.finished
        assert not story.told(o.TaskErred)


async def join_before_the_server(story: Any) -> Bus:
    bus: Bus = story.broker.connect("c1")
    await bus.declare(ingress())
    await bus.declare(client_inbox("c1"))
    return bus


async def test_a_client_outlives_its_server_and_serves_the_next_from_its_first_round() -> None:
    gate = Gate(in_round=3)
    app = app_of(gate.client_fn, rounds={"num_rounds": 4, "min_fit_clients": 1, "fraction_evaluate": 0})
    async with federation(app) as story:
        dying = story.start_server()
        client = story.start_client("c1")
        await story.until(o.TaskStarted, kind="fit", round=3)
        dying.cancel()
        await asyncio.wait([dying])
        assert story.server_bus is not None
        await story.server_bus.close()
        serving = story.start_server()
        await story.until(o.RoundOpened, 4)
        gate.open()  # training for the dead run ends while a task of the next one waits
        history = await serving
        ended = await client
    assert [record.clients for record in history.rounds] == [{"c1"}] * 4
    assert ended is not None
    assert ended.run_id == history.run_id


async def test_parts_that_come_before_their_head_are_kept_for_it() -> None:
    start: dict[str, Array] = {"w": np.zeros(400_000, np.float32)}
    app = app_of(initial_parameters=start, rounds={"num_rounds": 1, "min_fit_clients": 1, "fraction_evaluate": 0})
    async with federation(app) as story:
        serving = story.start_server()
        await story.until(o.RunStarted)
        bus = await join_as(story, "c9")
        await story.until(o.RoundOpened)
        run_id = story.told(o.RunStarted)[0].run_id
        schema, payload = pack({"w": np.ones(400_000, np.float32)})
        first, second = cut(payload)
        head = Attacker(bus, run_id).update(
            {"w": ZEROS}, transfer="late", schema=schema, checksum=checksum(first), payload=first
        )
        await bus.publish(
            UPDATES, "", encode(m.Part(transfer="late", index=1, checksum=checksum(second), payload=second))
        )
        await bus.publish(UPDATES, "", encode(head))
        assert (await serving).updates == 1
        assert np.unique(story.model()["w"]).tolist() == [1.0]


def poll_until(condition: Callable[[], bool]) -> None:
    """Wait, in a thread, for what no event tells."""
    give_up_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


async def test_uploads_whose_sender_died_are_forgotten_and_leave_the_queue() -> None:
    start: dict[str, Array] = {"w": np.zeros(400_000, np.float32)}
    gate = Gate(only="c1")
    app = app_of(gate.client_fn, initial_parameters=start, rounds={"num_rounds": 1, "min_fit_clients": 1})
    async with federation(app) as story:
        serving = story.start_server(stalled_after_s=0.05)
        story.start_client("c1")
        await story.until(o.RoundOpened)
        bus = await join_as(story, "c9")
        await story.until(o.CohortGrew)
        run_id = story.told(o.RunStarted)[0].run_id
        schema, payload = pack({"w": np.ones(400_000, np.float32)})
        first, second = cut(payload)
        head = Attacker(bus, run_id).update(
            {"w": ZEROS}, transfer="dies", schema=schema, checksum=checksum(first), payload=first
        )
        await bus.publish(UPDATES, "", encode(head))
        await bus.publish(
            UPDATES, "", encode(m.Part(transfer="lost", index=1, checksum=checksum(second), payload=second))
        )
        assert story.server is not None
        assert story.server._intake is not None
        staging = story.server._intake._staging
        await asyncio.to_thread(poll_until, lambda: "c9/lost" in staging._aborted)
        assert "c9/dies" not in staging._aborted  # its sender's lease goes on: an alarm may hold it up
        await bus.publish(CONTROL, "", encode(m.Leave(client_id="c9", session="s", run_id=run_id, reason="bye")))
        refused = await story.until(o.UpdateRefused)
        assert refused.reason.startswith("its upload stopped half-way")
        gate.open()
        assert (await serving).updates == 1
        assert story.broker.depth(UPDATES) == 0


async def test_a_strangers_message_cannot_cancel_an_upload_that_is_under_way() -> None:
    start: dict[str, Array] = {"w": np.zeros(400_000, np.float32)}
    app = app_of(initial_parameters=start, rounds={"num_rounds": 1, "min_fit_clients": 1, "fraction_evaluate": 0})
    async with federation(app) as story:
        serving = story.start_server()
        await story.until(o.RunStarted)
        bus = await join_as(story, "c9")
        await story.until(o.RoundOpened)
        attacker = Attacker(bus, story.told(o.RunStarted)[0].run_id)
        schema, payload = pack({"w": np.ones(400_000, np.float32)})
        first, second = cut(payload)
        honest = {"transfer": "honest", "schema": schema, "checksum": checksum(first), "payload": first}
        await attacker.send(attacker.update({"w": ZEROS}, **honest))
        stranger = Attacker(story.broker.connect("c8"), attacker.run_id)
        await stranger.send(stranger.update({"w": ZEROS}, client_id="c8", transfer="honest"))
        await story.until(o.UpdateRefused, client_id="c8")
        wrong = bytes(len(second))
        await stranger.send(m.Part(transfer="honest", index=1, checksum=checksum(wrong), payload=wrong))
        await attacker.send(m.Part(transfer="honest", index=1, checksum=checksum(second), payload=second))
        assert (await serving).updates == 1
        np.testing.assert_array_equal(story.model()["w"], 1)


async def test_a_stop_does_not_wait_for_a_slow_central_evaluation() -> None:
    gate = Gate()

    def slow(round_: int, model: dict[str, Array]) -> tuple[float, dict[str, Any]]:
        gate._opened.wait(30)
        return 0.0, {}

    async with federation(app_of(evaluate_fn=slow, rounds={"num_rounds": 9, "min_fit_clients": 1})) as story:
        serving, client = story.start_server(), story.start_client("c1")
        await story.until(o.RoundClosed)
        assert story.server is not None
        story.server.request_stop("enough")
        with pytest.raises(RunFailed, match="enough"):
            async with asyncio.timeout(5):
                await serving
        assert await client is not None
        gate.open()


async def test_a_forged_run_id_cannot_write_on_the_operators_screen() -> None:
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        serving = story.start_server()
        story.start_client("c9")
        run_id = (await story.until(o.Welcomed)).run_id
        await story.until(o.TaskStarted)
        attacker = Attacker(story.broker.connect("c9"), run_id)
        await attacker.send(attacker.update({"w": ZEROS}, run_id="\x1b[2J\n12:00:00  all ok"))
        refused = await story.until(o.UpdateRefused)
        gate.open()
        with pytest.raises(RunFailed) as failure:
            await serving
    for text in (refused.reason, str(failure.value), *map(sentence, story.events)):
        assert text.isprintable()


async def test_reports_that_nobody_asked_for_are_not_kept() -> None:
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        serving = story.start_server()
        story.start_client("c1")
        run_id = (await story.until(o.Welcomed)).run_id
        bus = story.broker.connect("c1")
        for number in range(50):
            report = m.EvaluateReport(
                client_id="c1",
                task_id=f"{run_id}/evaluate/1/{number}",
                run_id=run_id,
                loss=0.0,
                num_examples=1,
                metrics={},
            )
            await bus.publish(CONTROL, "", encode(report))
        await bus.publish(CONTROL, "", b"garbage")
        await story.until(o.MessageRejected)  # all of them are through
        assert story.server is not None
        assert story.server._evaluate_reports == {}
        gate.open()
        await serving


async def test_finite_updates_that_add_up_to_infinity_leave_the_model_as_it_is() -> None:
    class Huge(Client):
        def __init__(self, context: ClientContext) -> None:
            pass

        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            value = 6e4 if config["round"] == 1 else 1.0
            return FitResult(parameters={"w": np.full(3, value, np.float16)}, num_examples=1)

    app = app_of(
        Huge,
        initial_parameters={"w": np.zeros(3, np.float16)},
        strategy=FedBuff(server_learning_rate=2.0),
        rounds={"min_fit_clients": 1, "fraction_evaluate": 0},
    )
    async with federation(app) as story:
        history = await story.run("c1")
        assert story.model()["w"].tolist() == [2, 2, 2]
        assert story.told(o.AggregateDiscarded)[0].round == 1
    assert [(record.version, record.reason) for record in history.rounds] == [(0, "discarded"), (1, "min_fit_clients")]
    assert [len(record.folded) for record in history.rounds] == [0, 1]


async def test_the_clients_are_sent_home_before_the_last_central_evaluation_and_it_is_waited_for() -> None:
    gate = Gate()

    def slow(round_: int, model: dict[str, Array]) -> tuple[float, dict[str, Any]]:
        if round_ == 1:
            gate._opened.wait(30)
        return 0.25, {}

    rounds = {"num_rounds": 1, "min_fit_clients": 1}
    async with federation(app_of(evaluate_fn=slow, rounds=rounds)) as story:
        serving = story.start_server()
        ended = await story.start_client("c1")
        assert ended is not None
        assert not serving.done()
        gate.open()
        history = await serving
    assert history.rounds[0].central is not None
    assert history.rounds[0].central.loss == 0.25


async def test_a_stream_that_an_earlier_run_left_with_other_settings_is_replaced() -> None:
    async with federation(app_of(rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        await story.broker.connect("earlier").declare(model_stream(1 << 30))
        assert (await story.run("c1")).updates == 1


async def publish(publisher: ModelPublisher, model: dict[str, Array], version: int) -> tuple[int, int]:
    """Where the version begins, and its parts."""
    head: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    published = await publisher.publish(model, version, head)
    return head.result(), published.parts


def place(version: int, offset: int, epoch: int = 1) -> Place:
    return Place(run_id="run", epoch=epoch, version=version, offset=offset)


async def test_every_version_is_found_whatever_gaps_the_stream_has() -> None:
    bus = MemoryBroker().connect()
    topology = model_stream(1)
    small = dataclasses.replace(topology.queues[0], segment_bytes=(3 << 20) + 1)
    await bus.declare(dataclasses.replace(topology, queues=(small,)))
    publisher = ModelPublisher(bus, run_id="run", epoch=1)
    publisher._is_declared = True
    offsets = []
    for version in range(12):
        offset, parts = await publish(publisher, {"w": np.full(400_000, version, np.float32)}, version)
        offsets.append(offset)
        assert parts == 2
        if version % 5 == 0:  # whether it was time for it or not
            publisher._unseen_bytes = 1 << 40
            await publisher.find_end()
    assert offsets != [2 * version for version in range(12)]  # there are gaps
    one_reader = ModelReader(bus)  # keeps its subscription
    for version, offset in enumerate(offsets):
        for reader in (one_reader, ModelReader(bus)):
            model = await reader.read(place(version, offset))
            assert np.unique(model["w"]).tolist() == [version]
            if reader is not one_reader:
                await reader.close()
    assert np.unique((await one_reader.read(place(3, offsets[3])))["w"]).tolist() == [3]  # and back
    await one_reader.close()


async def test_versions_that_are_published_at_once_do_not_mix_their_parts() -> None:
    """A round that a resumed server closes at once must not put its version between the parts of the last one."""
    bus = MemoryBroker().connect()
    publisher = ModelPublisher(bus, run_id="run", epoch=1)
    found = await asyncio.gather(
        *(publish(publisher, {"w": np.full(800_000, version, np.float32)}, version) for version in (0, 1))
    )
    for version, (offset, _) in enumerate(found):
        reader = ModelReader(bus)
        assert np.unique((await reader.read(place(version, offset)))["w"]).tolist() == [version]
        await reader.close()


async def test_a_version_that_is_no_longer_in_the_stream_is_not_mistaken_for_another() -> None:
    bus = MemoryBroker().connect()
    publisher = ModelPublisher(bus, run_id="run", epoch=1)
    offsets = [(await publish(publisher, {"w": np.full(400_000, v, np.float32)}, v))[0] for v in (0, 1)]
    assert offsets == [0, 2]
    reader = ModelReader(bus)
    assert (await reader.read(place(1, offsets[1])))["w"][0] == 1
    for offset in (offsets[1], 1):
        with pytest.raises(QueueMissing, match="no longer in the stream"):
            await reader.read(place(0, offset))


async def test_parts_of_another_version_are_not_mixed_in() -> None:
    bus = MemoryBroker().connect()
    await bus.declare(model_stream(1))
    schema, payload = pack({"w": np.zeros(400_000, np.float32)})
    first, second = cut(payload)
    head = m.Model(
        run_id="run", epoch=1, version=0, schema=schema, part_bytes=1 << 20, checksum=checksum(first), payload=first
    )
    foreign = m.Part(transfer="run/1/9", index=1, checksum=checksum(second), payload=second)
    for message in (head, foreign):
        await bus.publish(BROADCAST, "", encode(message))
    with pytest.raises(QueueMissing, match="not whole"):
        await ModelReader(bus).read(place(0, 0))


async def test_a_version_that_its_server_could_not_publish_whole_is_read_from_the_next_ones_copy() -> None:
    bus = MemoryBroker().connect()
    await bus.declare(model_stream(1))
    model = {"w": np.full(400_000, 5, np.float32)}
    schema, payload = pack(model)
    first, _ = cut(payload)
    head = m.Model(
        run_id="run", epoch=1, version=5, schema=schema, part_bytes=1 << 20, checksum=checksum(first), payload=first
    )
    await bus.publish(BROADCAST, "", encode(head))  # and then it died
    reading = asyncio.create_task(ModelReader(bus).read(place(5, 0)))
    await asyncio.sleep(0)
    await publish(ModelPublisher(bus, run_id="run", epoch=2), model, 5)
    assert np.unique((await reading)["w"]).tolist() == [5]
    from_the_begin = await ModelReader(bus).read(place(5, 1))  # where the first server's is no more
    assert np.unique(from_the_begin["w"]).tolist() == [5]


async def test_a_version_of_an_earlier_server_that_the_stream_has_dropped_is_missed_at_the_next_ones_first() -> None:
    bus = MemoryBroker().connect()
    await publish(ModelPublisher(bus, run_id="run", epoch=2), {"w": np.zeros(3, np.float32)}, 5)
    with pytest.raises(QueueMissing, match="no longer in the stream"):
        await ModelReader(bus).read(place(3, 0))


@pytest.mark.parametrize(("returned", "kind"), [(None, "NoneType"), ([np.zeros(3)], "list"), ({"w": 1.0}, "dict")])
async def test_a_strategy_that_returns_something_else_than_a_model_fails_the_run_in_one_line(
    returned: Any, kind: str
) -> None:
    class Odd(FedAvg):
        def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
            found: dict[str, Array] = returned
            return found

    async with federation(app_of(strategy=Odd())) as story:
        with pytest.raises(RunFailed, match=rf"^Odd.finish must return \{{tensor name: array\}}.*, not {kind}"):
            await story.run("a", "b")


async def test_a_strategy_without_words_of_its_own_is_named_without_an_address() -> None:
    class Plain(FedAvg):
        __repr__ = object.__repr__

    async with federation(app_of(strategy=Plain())) as story:
        assert (await story.run("a", "b")).settings["strategy"] == "Plain()"


async def test_a_run_that_is_too_short_for_any_update_says_which_setting_to_raise() -> None:
    gate = Gate()
    settings = {"num_rounds": 2, "min_fit_clients": 1, "timeout_s": 0.1, "fraction_evaluate": 0}
    async with federation(app_of(gate.client_fn, rounds=settings)) as story:
        story.start_client("a")
        with pytest.raises(RunFailed, match=r"each closed at timeout_s=0\.1 before one came: raise it"):
            await story.start_server()
        gate.open()

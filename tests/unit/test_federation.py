"""Whole stories over the memory bus: real server, real clients, one event loop."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.bus.base import Bus
from fedbus.bus.topology import CONTROL, DEAD, UPDATES, client_inbox, inbox
from fedbus.errors import BrokerClosed, QueueBusy, RunFailed
from fedbus.observe import events as o
from fedbus.server.checkpoint import load_model
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.fedavg import FedAvg
from fedbus.training.base import Client, ClientContext
from fedbus.types import Array, Config, FitResult, Scalar, Tensors
from fedbus.wire import messages as m
from fedbus.wire.arrays import pack
from fedbus.wire.codec import encode
from fedbus.wire.transfer import crc32, cut
from tests.kit import AddingClient, Gate, app_of, federation, weighted

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
    assert seen == [{"seed": 5, "round": 1, "lr": 0.1}, {"seed": 5, "round": 2, "lr": 0.05}]


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

    async with federation(app_of(Odd, rounds={"min_fit_clients": 2})) as story:
        history = await story.run("c1", "c2", "c3")
        assert story.model()["w"].tolist() == pytest.approx([2 * weighted([1, 3], [10, 30])] * 3)
    assert all(record.clients == {"c1", "c3"} for record in history.rounds)
    at_client = [e.reason for e in story.events if isinstance(e, o.RefusalArrived | o.TaskErred)]
    assert reason in at_client
    assert reason in {*history.rounds[0].failed.values(), *history.rounds[0].refused.values()}


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


async def test_a_second_client_of_the_same_name_is_turned_away() -> None:
    gate = Gate()
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.TaskStarted)
        twin = story.broker.connect("c1")
        await twin.declare(client_inbox("c1"))
        with pytest.raises(QueueBusy):
            async with twin.consume(inbox("c1"), prefetch=1, exclusive=True):
                pass
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
            "crc32": crc32(only),
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
        ({"w": ZEROS}, {"crc32": 1}, "part 0 fails its checksum"),
        ({"w": ZEROS}, {"part_bytes": 0}, "parts of 0 bytes, 1 to 8388608 are allowed"),
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
        attacker = Attacker(story.broker.connect("c9"), run_id)
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
        for body in (b"", b"\x93\x01\xc6\xff\xff\xff\xff", encode(m.Join(client_id="../x", session="s"))):
            await bus.publish(CONTROL, "", body)
            await bus.publish(UPDATES, "", body)
            await bus.publish("fedbus.tasks", "c1", body)
        await story.until(o.MessageRejected, 3, queue=CONTROL)
        await story.until(o.MessageRejected, 3, queue=UPDATES)
        await story.until(o.MessageRejected, 2, queue=inbox("c1"))
        gate.open()
        assert (await serving).updates == 1
        assert story.broker.depth(DEAD) == 3  # for the operator to look at


async def test_an_update_sent_twice_is_folded_once() -> None:
    gate = Gate(only="c1")
    async with federation(app_of(gate.client_fn, rounds={"num_rounds": 1, "min_fit_clients": 2})) as story:
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
    app = app_of(gate.client_fn, initial_parameters=start, rounds={"num_rounds": 1, "min_fit_clients": 2})
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
                crc32=crc32(first),
                payload=first,
            )
            await twin.publish(UPDATES, "", encode(head))
        for transfer in ("lives", "dies"):
            part = m.Part(transfer=transfer, index=1, crc32=crc32(second), payload=second)
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
        bus = story.broker.connect("c1")
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
        with pytest.raises(RunFailed, match=r"Broken.fold raised ZeroDivisionError: by zero"):
            await story.run("c1")


async def test_a_strategy_that_changes_the_model_fails_the_run_in_one_line() -> None:
    class Widening(FedAvg):
        def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
            return {name: value.astype(np.float64) for name, value in super().finish(state, model).items()}

    async with federation(app_of(strategy=Widening(), rounds={"min_fit_clients": 1})) as story:
        with pytest.raises(RunFailed, match="changed names, order, shapes or dtypes"):
            await story.run("c1")


async def test_a_receipt_comes_only_after_the_commit() -> None:
    async with federation(app_of(rounds={"num_rounds": 1, "min_fit_clients": 1})) as story:
        await story.run("c1")
    kinds = [type(event) for event in story.events]
    assert kinds.index(o.ReceiptArrived) > kinds.index(o.ModelPublished, kinds.index(o.UpdateFolded))


async def test_a_second_server_on_the_same_broker_is_turned_away() -> None:
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

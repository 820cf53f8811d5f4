"""The methods of `fedbus.training.local` and personal layers, with servers and clients over the memory bus."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.app import App
from fedbus.client.memory import ClientMemory
from fedbus.config import RoundConfig
from fedbus.errors import AggregateRefused, UpdateRefused
from fedbus.server.history import History
from fedbus.simulation.virtual import simulate
from fedbus.simulation.virtual_time import VirtualTime
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.feddyn import FedDyn
from fedbus.strategies.fednova import FedNova
from fedbus.strategies.scaffold import Scaffold
from fedbus.training.base import Client, ClientContext
from fedbus.training.local import LocalTraining
from fedbus.training.torch import LocalTraining as TorchTraining
from fedbus.training.torch import batch_norm_names, get_parameters, set_parameters
from fedbus.types import Array, Config, EvaluateResult, FitResult, Tensors
from fedbus.wire.transfer import Outgoing
from tests.kit import QUICK, federation

# isort: split
import torch
from torch import nn

CENTERS = {"c1": -1.0, "c2": 2.0}
STEEPNESS = {"c1": 1.0, "c2": 4.0}
OPTIMUM = 1.4


class Quadratic(Client):
    """a/2 (w - b)^2, by gradient descent with steps of 0.1: as many as the client's number times `steps`."""

    steps = 5
    is_uneven = False

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        self.a, self.b = STEEPNESS[context.client_id], CENTERS[context.client_id]

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        local = LocalTraining(parameters, config, self.context)
        weights = {"w": parameters["w"].copy()}
        for _ in local.batches(range(self.steps)):
            gradients = {"w": self.a * (weights["w"] - self.b)}
            local.correct(gradients, weights, 0.1)
            weights["w"] -= 0.1 * gradients["w"]
        return local.result(weights, 1)


async def trained(strategy: Strategy, num_rounds: int, steps: int = 5) -> tuple[float, History]:
    app = App(
        client_fn=type("Its", (Quadratic,), {"steps": steps}),
        strategy=strategy,
        initial_parameters={"w": np.zeros(1)},
        rounds=RoundConfig(**{**QUICK, "num_rounds": num_rounds, "min_fit_clients": 2, "fraction_evaluate": 0}),
    )
    async with federation(app) as story:
        history = await story.run("c1", "c2")
        return float(story.model()["w"][0]), history


async def test_over_the_bus_scaffold_finds_the_optimum_that_federated_averaging_misses() -> None:
    found, history = await trained(Scaffold(), 30)
    assert found == pytest.approx(OPTIMUM, abs=0.02)
    assert {update.nbytes for record in history.rounds for update in record.folded} == {64 + 8}, "both, aligned"
    missed, _ = await trained(FedAvg(), 30)
    assert abs(missed - OPTIMUM) > 0.3


async def test_over_the_bus_feddyn_finds_the_optimum() -> None:
    found, _ = await trained(FedDyn(1.0), 25, steps=40)
    assert found == pytest.approx(OPTIMUM, abs=0.02)


async def test_over_the_bus_fednova_is_told_how_far_steps_lead() -> None:
    _, history = await trained(FedNova(), 1, steps=7)
    assert [update.metrics["a_norm"] for update in history.rounds[0].folded] == [7.0, 7.0]


class Many(Client):
    """One of ten quadratics with steps of 0.05."""

    def __init__(self, context: ClientContext) -> None:
        self.context = context

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        local = LocalTraining(parameters, config, self.context)
        weights = {"w": parameters["w"].copy()}
        for _ in local.batches(range(3)):
            gradients = {"w": (1 + self.context.partition % 5) * (weights["w"] - self.context.partition)}
            local.correct(gradients, weights, 0.05)
            weights["w"] -= 0.05 * gradients["w"]
        return local.result(weights, 1)


@pytest.mark.parametrize(
    "rounds",
    [
        RoundConfig.buffered(3, num_rounds=34, min_available_clients=10),
        RoundConfig.semi_synchronous(
            4, over_selection=2.0, num_rounds=29, max_staleness=0, min_available_clients=10, fraction_evaluate=0
        ),
    ],
    ids=["buffered", "semi-synchronous"],
)
@pytest.mark.parametrize(
    ("strategy", "ours", "theirs"),
    [(Scaffold(num_clients=10), "c/w", "sum/scaffold/w"), (FedDyn(2.0, num_clients=10), "h/w", "sum/feddyn/w")],
    ids=["SCAFFOLD", "FedDyn"],
)
def test_what_server_and_clients_remember_belongs_together_whoever_is_late_refused_or_vanishes(
    strategy: Strategy, ours: str, theirs: str, rounds: RoundConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c is the mean of all c_i, and h that of all g_k: a part that one side had lost would stay wrong for ever."""
    memories: list[ClientMemory] = []
    servers: list[Tensors] = []
    fits: list[str] = []

    def made(folder: Path | None = None) -> ClientMemory:
        memories.append(ClientMemory(folder))
        return memories[-1]

    class Watched(type(strategy)):  # type: ignore[misc]
        def verify(self, update: ClientUpdate) -> None:
            if zlib.crc32(update.task_id.encode()) % 4 == 0:
                raise UpdateRefused("a quarter of all")

        def finish(self, state: Any, model: Tensors) -> dict[str, Array]:
            moved: dict[str, Array] = super().finish(state, model)
            if self.round.number % 5 == 0:
                raise AggregateRefused("every fifth")
            servers.append(dict(self.memory))
            return moved

    class Counted(Many):
        def fit(self, parameters: Tensors, config: Config) -> FitResult:
            fits.append(self.context.client_id)
            return super().fit(parameters, config)

    monkeypatch.setattr("fedbus.simulation.virtual_client.ClientMemory", made)
    strategy = copy.copy(strategy)
    strategy.__class__ = Watched
    app = App(client_fn=Counted, strategy=strategy, initial_parameters={"w": np.zeros(1)}, rounds=rounds)
    weather = VirtualTime(
        fit_s=1, speeds="lognormal:0.5:0.5", dropout=0.3, downtime_s=2, bandwidth="40:20", availability="6:2"
    )
    history = simulate(app, num_clients=10, virtual=weather)
    assert len(fits) > history.updates + 30, "many were in vain"
    told = [float(memory.before().get(theirs, np.zeros(1))[0]) for memory in memories]
    assert len(told) == 10
    assert np.abs(told).max() > 0.1
    np.testing.assert_allclose(servers[-1][ours], np.mean(told), atol=1e-9)


# ---- personal layers -------------------------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Tensors]:
    """Every update that a client makes ready to travel."""
    updates: list[Tensors] = []

    def note(tensors: Tensors, **options: Any) -> Outgoing:
        updates.append(tensors)
        return Outgoing(tensors, **options)

    monkeypatch.setattr("fedbus.client.code.Outgoing", note)
    return updates


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


class TorchClient(Client):
    """Fits lines of opposite slopes: what one learns in its head is wrong for the other."""

    def __init__(self, context: ClientContext) -> None:
        self.context = context
        self.x = torch.from_numpy(np.random.default_rng(0).normal(size=(32, 2)).astype(np.float32))
        self.y = self.x[:, :1] * (1 if context.client_id == "c1" else -1)
        self.began: list[dict[str, bytes]] = []
        self.ended: list[dict[str, bytes]] = []

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        self.began.append({name: value.tobytes() for name, value in parameters.items()})
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        local = TorchTraining(net, optimizer, parameters, config, self.context)
        for _ in local.batches(range(10)):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(self.x), self.y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        result = local.result(32)
        self.ended.append({name: value.tobytes() for name, value in result.parameters.items()})
        return result

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        net = make_net().eval()
        set_parameters(net, parameters)
        with torch.no_grad():
            loss = nn.functional.mse_loss(net(self.x), self.y)
        return EvaluateResult(loss=loss.item(), num_examples=32)


async def personal_run(
    personal: list[str], strategy: Strategy | None = None
) -> tuple[History, dict[str, TorchClient], dict[str, bytes]]:
    clients: dict[str, TorchClient] = {}

    def client_fn(context: ClientContext) -> Client:
        return clients.setdefault(context.client_id, TorchClient(context))

    app = App(
        client_fn=client_fn,
        strategy=strategy,
        initial_parameters=get_parameters(make_net()),
        personal=personal,
        rounds=RoundConfig(**{**QUICK, "num_rounds": 6, "min_fit_clients": 2, "grace_s": float("inf")}),
    )
    async with federation(app) as story:
        history = await story.run("c1", "c2")
        return history, clients, {name: value.tobytes() for name, value in story.model().items()}


HEAD = {"3.weight", "3.bias"}
NORM = set(batch_norm_names(make_net()))


@pytest.mark.parametrize(
    ("personal", "stay"), [(["3.*"], HEAD), (sorted(NORM), NORM)], ids=["FedPer: the head", "FedBN: batch norm"]
)
async def test_personal_layers_do_not_travel_and_are_there_again_in_the_next_round(
    personal: list[str], stay: set[str], sent: list[Tensors]
) -> None:
    history, clients, model = await personal_run(personal)
    everything = set(get_parameters(make_net()))
    assert [set(update) for update in sent] == [everything - stay] * 12
    assert history.finished
    initial = get_parameters(make_net())
    for client in clients.values():
        for before, after in zip(client.ended, client.began[1:], strict=False):
            assert all(before[name] == after[name] for name in stay)
            assert any(before[name] != after[name] for name in everything - stay)
    assert all(model[name] == initial[name].tobytes() for name in stay)
    ends = [[client.ended[-1][name] for name in sorted(stay)] for client in clients.values()]
    assert ends[0] != ends[1]


async def test_a_head_of_ones_own_serves_clients_that_disagree() -> None:
    shared, _, _ = await personal_run([])
    own, _, _ = await personal_run(["3.*"])
    assert shared.rounds[-1].federated is not None
    assert own.rounds[-1].federated is not None
    assert own.rounds[-1].federated.loss < shared.rounds[-1].federated.loss / 2


@pytest.mark.parametrize("strategy", [Scaffold, lambda: FedDyn(0.1)])
async def test_methods_leave_personal_layers_alone(strategy: Callable[[], Strategy], sent: list[Tensors]) -> None:
    """No control variate tells the server what a personal layer's gradient is."""
    _, clients, _ = await personal_run(["3.*"], strategy())
    for client in clients.values():
        kept = {name for name in client.context.memory if name.endswith(tuple(HEAD))}
        assert kept == {f"personal/{name}" for name in HEAD}
    for update in sent:
        assert not HEAD & update.keys()
        assert not any(update[f"extra/c/{name}"].any() for name in HEAD if f"extra/c/{name}" in update)

"""Federated XGBoost: against XGBoost itself, against hostile trees, and as a whole run."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xgboost as xgb

import fedbus as fb
from fedbus.errors import ClientCodeError, ConfigError, UpdateRefused, UsageError
from fedbus.examples import breast_cancer
from fedbus.observe import events as o
from fedbus.strategies.xgboost_bagging import TreeStrategy
from fedbus.strategies.xgboost_trees import MOST_DEPTH, read_booster, with_trees, write_model
from fedbus.tensorfile import load_model
from fedbus.training.xgboost import XGBClient, as_booster, evaluate, initial_parameters
from fedbus.types import Array, Config, Tensors
from tests.kit import QUICK, federation

BINARY = {"objective": "binary:logistic", "eta": 0.3, "max_depth": 3, "nthread": 1}
CLASSES = {"objective": "multi:softprob", "num_class": 3, "eta": 0.3, "max_depth": 2, "nthread": 1}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(240, 5)).astype(np.float32)
X[RNG.random(X.shape) < 0.1] = np.nan
SCORE = np.nansum(X, 1) + np.nan_to_num(X[:, 0] * X[:, 1])
LABELS = {"binary:logistic": SCORE > 0, "multi:softprob": np.digitize(SCORE, [-1, 1])}


def clients(params: dict[str, Any], sizes: Sequence[int]) -> list[XGBClient]:
    """Clients with so many rows each."""
    cuts = np.cumsum([0, *sizes])
    y = LABELS[params["objective"]]
    return [XGBClient(params, xgb.DMatrix(X[a:b], y[a:b])) for a, b in itertools.pairwise(cuts)]


def update(
    client: XGBClient, model: Tensors, strategy: TreeStrategy, name: str, round_: int = 1, **more: Any
) -> fb.ClientUpdate:
    result = client.fit(model, {"round": round_, **strategy.fit_config(round_)})
    return fb.ClientUpdate(client_id=name, delta={}, num_examples=result.num_examples, extra=result.extra, **more)


def one_round(strategy: TreeStrategy, model: Tensors, updates: Iterable[fb.ClientUpdate]) -> dict[str, Array]:
    strategy.extras(model)
    state = strategy.init(model)
    for each in updates:
        strategy.verify(each)
        strategy.fold(state, each)
    return strategy.finish(state, model)


def rounds(
    strategy: TreeStrategy, party: Sequence[XGBClient], num_rounds: int, *, in_turn: bool = False
) -> dict[str, Array]:
    """So many rounds, each of all clients, or of one after the other."""
    model = dict(party[0].get_parameters())
    for n in range(num_rounds):
        strategy.extras(model)
        asked = [n % len(party)] if in_turn else range(len(party))
        model = one_round(strategy, model, [update(party[i], model, strategy, f"c{i}", n + 1) for i in asked])
    return model


def raw_json(booster: xgb.Booster) -> Any:
    return json.loads(bytes(booster.save_raw("json")))


def margins(booster: xgb.Booster, **more: Any) -> Array:
    result: Array = booster.predict(xgb.DMatrix(X), output_margin=True, **more)
    return result


# ---- against XGBoost itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [BINARY, CLASSES, {**BINARY, "num_parallel_tree": 2, "subsample": 0.7, "seed": 3}])
@pytest.mark.parametrize("local_rounds", [1, 3])
@pytest.mark.parametrize("weighting", ["examples", "uniform", "sum"])
def test_bagging_with_one_client_is_plain_xgboost_to_the_last_bit(
    params: dict[str, Any], local_rounds: int, weighting: Any
) -> None:
    (client,) = clients(params, [240])
    model = rounds(fb.XGBBagging(weighting=weighting, local_rounds=local_rounds), [client], 4)
    if "seed" in params:  # from file to file: each begins anew with its random numbers
        plain = as_booster(client.get_parameters())
        for _ in range(4):
            file = bytearray(plain.save_raw("json"))
            plain = xgb.train(params, client.train, local_rounds, xgb_model=file)
    else:
        plain = xgb.train({**params, "base_score": 0.5}, client.train, 4 * local_rounds)
    assert raw_json(as_booster(model)) == raw_json(plain)


@pytest.mark.parametrize("params", [BINARY, CLASSES])
def test_the_model_says_base_plus_the_weighted_sum_of_what_each_clients_trees_say(params: dict[str, Any]) -> None:
    sizes = [120, 90, 30]
    party = clients(params, sizes)
    strategy = fb.XGBBagging(local_rounds=2)
    model = dict(party[0].get_parameters())
    expected = margins(as_booster(model)).astype(np.float64)
    base = expected.copy()
    for _ in range(3):
        before = as_booster(model, params)
        grown = [xgb.train({**params, "seed": 1}, client.train, 2, xgb_model=before) for client in party]
        for size, booster in zip(sizes, grown, strict=True):
            expected += size / 240 * (margins(booster[before.num_boosted_rounds() :]) - base)
        strategy.extras(model)
        model = one_round(strategy, model, [update(c, model, strategy, f"c{i}") for i, c in enumerate(party)])
    merged = as_booster(model)
    assert merged.num_boosted_rounds() == 3 * 3 * 2
    np.testing.assert_allclose(margins(merged), expected, rtol=0, atol=2e-6)


def test_sums_and_discounts_are_factors_of_the_leaves() -> None:
    party = clients(BINARY, [120, 120])
    start = dict(party[0].get_parameters())
    alone = [
        margins(as_booster(one_round(fb.XGBBagging(), start, [update(c, start, fb.XGBBagging(), "c")]))) for c in party
    ]
    for weighting, factor in (("sum", 1.0), ("uniform", 0.5)):
        strategy = fb.XGBBagging(weighting=weighting)  # type: ignore[arg-type]
        updates = [update(party[0], start, strategy, "a"), update(party[1], start, strategy, "b", discount=0.5)]
        merged = margins(as_booster(one_round(strategy, start, updates)))
        np.testing.assert_allclose(merged, factor * (alone[0] + 0.5 * alone[1]), rtol=0, atol=1e-6)


def test_a_seed_samples_other_rows_in_each_round_and_the_same_ones_in_a_task_that_is_done_twice() -> None:
    (client,) = clients({**BINARY, "subsample": 0.5}, [240])
    start = client.get_parameters()
    first, again, later = (client.fit(start, {"seed": 1, "round": r}).extra["trees"] for r in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != later.tobytes()


def test_the_order_of_arrival_does_not_show() -> None:
    party = clients(BINARY, [100, 80, 60])
    start = dict(party[0].get_parameters())
    updates = [update(c, start, fb.XGBBagging(), f"c{i}", task_id=str(i)) for i, c in enumerate(party)]
    models = {
        one_round(fb.XGBBagging(), start, order)["booster"].tobytes() for order in itertools.permutations(updates)
    }
    assert len(models) == 1


def test_cyclic_is_sequential_training_on_one_clients_data_after_the_other() -> None:
    party = clients(BINARY, [100, 80, 60])
    model = rounds(fb.XGBCyclic(local_rounds=2), party, 7, in_turn=True)
    booster = as_booster(party[0].get_parameters(), BINARY)
    for n in range(7):
        booster = xgb.train(BINARY, party[n % 3].train, 2, xgb_model=booster)
    assert raw_json(as_booster(model)) == raw_json(booster)


@pytest.mark.parametrize(("strategy", "num_rounds"), [(fb.XGBBagging(), 12), (fb.XGBCyclic(), 16)], ids=repr)
def test_four_hospitals_come_close_to_what_one_with_all_the_data_would(strategy: TreeStrategy, num_rounds: int) -> None:
    contexts = [fb.ClientContext(client_id=f"h{i}", partition=i, num_partitions=4) for i in range(4)]
    party = [breast_cancer.client_fn(context) for context in contexts]
    model = rounds(strategy, party, num_rounds, in_turn=isinstance(strategy, fb.XGBCyclic))
    loss, metrics = breast_cancer.evaluate_fn(num_rounds, model)
    train, test = (breast_cancer.matrix(rows) for rows in breast_cancer.split())
    params = {**breast_cancer.PARAMS, "base_score": 0.5}
    _, pooled = evaluate(xgb.train(params, train, num_rounds), test)
    alone = [evaluate(xgb.train(params, client.train, num_rounds), test)[0] for client in party]
    assert metrics["auc"] == pytest.approx(pooled["auc"], abs=0.005)
    assert loss < min(alone)


# ---- trees that nobody would want ------------------------------------------------------------------------------------


def grown() -> tuple[dict[str, Array], Any]:
    """A model without trees, and a booster with two for it, as JSON."""
    (client,) = clients(BINARY, [240])
    start = client.get_parameters()
    return dict(start), json.loads(client.fit(start, {"local_rounds": 2}).extra["trees"].tobytes())


START, GROWN = grown()


def refused(raw: bytes, strategy: TreeStrategy | None = None) -> str:
    strategy = strategy or fb.XGBBagging(local_rounds=2)
    strategy.extras(START)
    extra = {"trees": np.frombuffer(raw, np.uint8)}
    with pytest.raises(UpdateRefused) as found:
        strategy.verify(fb.ClientUpdate(client_id="c", delta={}, num_examples=1, extra=extra))
    return str(found.value)


def changed(change: Callable[[Any, Any], object]) -> bytes:
    """The two trees, after `change(model, its last tree)`."""
    whole = json.loads(json.dumps(GROWN))
    change(whole["learner"], whole["learner"]["gradient_booster"]["model"]["trees"][-1])
    return json.dumps(whole).encode()


def put(name: str, index: int, value: object) -> Callable[[Any, Any], object]:
    return lambda learner, tree: tree[name].__setitem__(index, value)


def chain(length: int) -> dict[str, Any]:
    """A tree that is one long branch."""
    size = 2 * length + 1
    left = [i + 1 if i % 2 == 0 and i < size - 1 else -1 for i in range(size)]
    right = [i + 2 if i % 2 == 0 and i < size - 1 else -1 for i in range(size)]
    parents = [2147483647] + [(i - 1) // 2 * 2 for i in range(1, size)]
    zeros: dict[str, Any] = {
        name: [0] * size for name in ("split_indices", "default_left", "split_type", "base_weights", "loss_changes")
    }
    param = {"num_deleted": "0", "num_feature": "5", "num_nodes": str(size), "size_leaf_vector": "1"}
    links = {"left_children": left, "right_children": right, "parents": parents}
    tree = GROWN["learner"]["gradient_booster"]["model"]["trees"][0]
    return {**tree, **zeros, **links, "split_conditions": [0] * size, "sum_hessian": [1] * size, "tree_param": param}


HOSTILE: list[tuple[str, Callable[[Any, Any], object], str]] = [
    ("a feature that is not there", put("split_indices", 0, 5), "a feature that is none of the 5"),
    ("a feature before the first", put("split_indices", 0, -1), "a feature that is none of the 5"),
    ("a child out of bounds", put("left_children", 0, 10_000), "the child of one before it"),
    ("a child before the root", put("left_children", 0, -7), "a leaf of a tree has a child"),
    ("a circle", put("left_children", 1, 0), "the child of one before it"),
    ("a node with two parents", put("left_children", 0, 2), "the child of one before it"),
    ("a leaf with a child", put("right_children", -1, 1), "a leaf of a tree has a child"),
    ("false parents", put("parents", 2, 1), "the parents in a tree"),
    ("a threshold beyond float32", put("split_conditions", 0, 1e39), "not finite in float32"),
    ("a leaf beyond float32", put("split_conditions", -1, -1e300), "not finite in float32"),
    ("a number beyond all", put("split_conditions", 0, 10**400), "split_conditions of a tree is not"),
    ("a string", put("sum_hessian", 0, "1"), "sum_hessian of a tree is not"),
    ("a list", put("base_weights", 0, [1]), "base_weights of a tree is not"),
    ("a fraction of a node", put("left_children", 0, 1.5), "left_children of a tree is not"),
    ("a direction that is none", put("default_left", 0, 2), "no default direction"),
    ("a category", put("split_type", 0, 1), "splits by categories"),
    ("categories", lambda learner, tree: tree["categories"].append(1), "splits by categories"),
    ("a list too short", lambda learner, tree: tree["parents"].pop(), "parents of a tree is not"),
    ("a missing list", lambda learner, tree: tree.pop("split_indices"), "split_indices is missing"),
    ("no nodes", lambda learner, tree: tree["tree_param"].update(num_nodes="0"), "a tree has no nodes"),
    ("a count that is none", lambda learner, tree: tree["tree_param"].update(num_nodes="-3"), "num_nodes is '-3'"),
    ("other features", lambda learner, tree: tree["tree_param"].update(num_feature="6"), "for other features"),
    ("pruned nodes", lambda learner, tree: tree["tree_param"].update(num_deleted="2"), "use tree_method='hist'"),
    (
        "leaves that are vectors",
        lambda learner, tree: tree["tree_param"].update(size_leaf_vector="3"),
        "vectors as leaves",
    ),
    ("an unknown key", lambda learner, tree: tree.update(weights=[]), "a tree holds 'weights'"),
    ("too deep a tree", lambda learner, tree: tree.update(chain(MOST_DEPTH + 1)), "1001 deep, 1000 at most"),
    (
        "another objective",
        lambda learner, tree: learner["objective"].update(name="reg:squarederror"),
        "the model is binary",
    ),
    (
        "other widths",
        lambda learner, tree: learner["learner_model_param"].update(num_feature="6"),
        "it is binary:logistic of 6",
    ),
    (
        "more outputs",
        lambda learner, tree: learner["learner_model_param"].update(num_class="3"),
        "with 3 trees each time",
    ),
    (
        "outputs beyond all",
        lambda learner, tree: learner["learner_model_param"].update(num_class="9" * 30),
        "num_class is",
    ),
    ("another booster", lambda learner, tree: learner["gradient_booster"].update(name="dart"), "its booster is 'dart'"),
    ("a missing model", lambda learner, tree: learner["gradient_booster"].pop("model"), "model is missing"),
    (
        "an output that is not there",
        lambda learner, tree: learner["gradient_booster"]["model"].update(tree_info=[0, 1]),
        "tree_info does not say",
    ),
    (
        "no trees",
        lambda learner, tree: learner["gradient_booster"]["model"].update(trees=[], tree_info=[]),
        "it has no new trees",
    ),
]


@pytest.mark.parametrize(("change", "reason"), [one[1:] for one in HOSTILE], ids=[one[0] for one in HOSTILE])
def test_hostile_trees_are_refused_with_a_reason(change: Any, reason: str) -> None:
    assert reason in refused(changed(change))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "are not JSON"),
        (b"\xff\xfe{}", "are not JSON"),
        (b"[]", "learner is missing"),
        (b"3", "learner is missing"),
        (b'{"learner":{"a":NaN}}', "NaN is no finite number"),
        (b"[" * 1_000_000, "too many brackets"),
        (b'{"learner":' * 4000, "too many brackets"),
        (b"[" * 4000, "are not JSON"),
        (b"9" * 5000, "are not JSON"),
    ],
)
def test_what_is_no_booster_is_refused(raw: bytes, reason: str) -> None:
    assert reason in refused(raw)


def test_nobody_gives_more_trees_than_it_was_asked_for() -> None:
    assert refused(json.dumps(GROWN).encode(), fb.XGBBagging(local_rounds=1)) == "it has 2 new trees, 1 at most are due"


def test_a_tree_as_deep_as_may_be_can_be_used() -> None:
    raw = changed(lambda learner, tree: tree.update(chain(MOST_DEPTH)))
    start = read_booster(START["booster"].tobytes())
    booster = xgb.Booster()
    booster.load_model(bytearray(with_trees(write_model(start), start.shape, [(read_booster(raw), 0.5)])))
    assert np.isfinite(booster.predict(xgb.DMatrix(X), pred_contribs=True)).all()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"w": np.zeros(3)}, "take initial_parameters from fedbus.training.xgboost"),
        ({"booster": np.zeros(3)}, "take initial_parameters from fedbus.training.xgboost"),
        ({"booster": np.zeros(0, np.uint8)}, "XGBBagging cannot begin with this booster: its trees are not JSON"),
    ],
)
def test_a_model_that_is_no_booster_is_one_line(model: dict[str, Array], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        fb.XGBBagging().extras(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda learner: learner["learner_model_param"].update(base_score="system"),
        lambda learner: learner["objective"].update(extra={"a": "x" * 100}),
        lambda learner: learner["objective"].update(extra={"a": 3}),
        lambda learner: learner.update(feature_names=["a"]),
        lambda learner: learner.update(feature_names=[3] * 5),
        lambda learner: learner.update(feature_types=["c"] * 5),
        lambda learner: learner["gradient_booster"]["model"]["cats"].update(enc=[1]),
        lambda learner: learner["gradient_booster"]["model"]["gbtree_model_param"].update(num_parallel_tree="99999"),
    ],
)
def test_a_booster_that_a_client_gives_to_begin_with_is_looked_at_as_well(change: Any) -> None:
    whole = json.loads(START["booster"].tobytes())
    change(whole["learner"])
    model = {"booster": np.frombuffer(json.dumps(whole).encode(), np.uint8)}
    with pytest.raises(ConfigError, match="XGBBagging cannot begin with this booster"):
        fb.XGBBagging().extras(model)


def test_a_booster_that_has_trees_is_a_beginning_too_and_keeps_its_names() -> None:
    names = [f"f{i}" for i in range(5)]
    data = xgb.DMatrix(X, LABELS["binary:logistic"], feature_names=names)
    before = xgb.train({**BINARY, "base_score": 0.5}, data, 3)
    start = {"booster": np.frombuffer(bytes(before.save_raw("json")), np.uint8)}
    client = XGBClient(BINARY, data)
    strategy = fb.XGBBagging()
    model = one_round(strategy, start, [update(client, start, strategy, "c")])
    after = as_booster(model)
    assert raw_json(after) == raw_json(xgb.train(BINARY, data, 1, xgb_model=before))
    assert after.feature_names == names


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fb.XGBBagging(weighting="size"), "weighting must be 'examples', 'uniform' or 'sum', not 'size'"),  # type: ignore[arg-type]
        (lambda: fb.XGBBagging(local_rounds=0), "local_rounds must be a whole number, 1 or more, not 0"),
        (lambda: fb.XGBCyclic(max_bytes=True), "max_bytes must be a whole number"),
        (lambda: fb.XGBCyclic().check(fb.RoundConfig()), r"set rounds=RoundConfig.cyclic\(num_clients\)"),
        (lambda: fb.XGBBagging().check(fb.RoundConfig.asynchronous()), "XGBBagging does not mix models"),
        (lambda: initial_parameters({"objective": "x:y"}, 3), "XGBoost does not take these parameters: .*x:y"),
    ],
)
def test_what_cannot_work_is_one_line(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_a_client_is_told_what_the_server_would_refuse_and_what_xgboost_will_not_do() -> None:
    exact = XGBClient({**BINARY, "tree_method": "exact", "gamma": 5}, xgb.DMatrix(X, LABELS["binary:logistic"]))
    with pytest.raises(ClientCodeError, match=r"cannot be part of a federated booster: .* use tree_method='hist'"):
        exact.fit(exact.get_parameters(), {})
    odd = XGBClient({**BINARY, "tree_method": "odd"}, exact.train)
    with pytest.raises(ClientCodeError, match="XGBoost cannot train: Invalid Input: 'odd'"):
        odd.fit(START, {})
    with pytest.raises(ClientCodeError, match=r"XGBoost cannot evaluate: .*Unknown metric function odd"):
        XGBClient({**BINARY, "eval_metric": "odd"}, exact.train).evaluate(START, {})
    with pytest.raises(ClientCodeError, match="the model is w, and no booster: use XGBBagging or XGBCyclic"):
        odd.fit({"w": X}, {})
    with pytest.raises(ClientCodeError, match="XGBoost cannot train: "):
        exact.fit({"booster": np.zeros(8, np.uint8)}, {})
    with pytest.raises(ClientCodeError, match="the model is no booster that this XGBoost"):
        exact.evaluate({"booster": np.zeros(8, np.uint8)}, {})


def test_without_xgboost_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xgboost", None)
    monkeypatch.delitem(sys.modules, "fedbus.training.xgboost")
    with pytest.raises(UsageError, match=r"XGBoost is not installed: pip install 'fedbus\[xgboost\]'"):
        importlib.import_module("fedbus.training.xgboost")


# ---- runs ------------------------------------------------------------------------------------------------------------


def app_for(strategy: TreeStrategy, rounds_: fb.RoundConfig, **more: Any) -> fb.App:
    party = dict(zip(("c1", "c2", "c3"), clients(BINARY, [120, 90, 30]), strict=True))
    return fb.App(client_fn=lambda context: party[context.client_id], strategy=strategy, rounds=rounds_, **more)


def quick(**settings: Any) -> dict[str, Any]:
    return {**QUICK, "num_rounds": 4, **settings}


@pytest.mark.parametrize("begins", ["server", "client"])
async def test_a_run_of_bagging_grows_one_booster_and_survives_the_death_of_its_server(
    tmp_path: Path, begins: str
) -> None:
    initial = initial_parameters(BINARY, 5) if begins == "server" else None
    app = app_for(fb.XGBBagging(), fb.RoundConfig.synchronous(3, **quick()), initial_parameters=initial)
    async with federation(app, run_dir=tmp_path) as story:
        story.start_server()
        for client in ("c1", "c2", "c3"):
            story.start_client(client)
        await story.until(o.RoundClosed, 2)
        await story.kill_server()
        history = await story.resume_server()
    assert (history.finished, history.num_rounds, history.updates) == (True, 4, 12)
    party = clients(BINARY, [120, 90, 30])
    expected = rounds(fb.XGBBagging(), party, 4)["booster"].tobytes()
    assert load_model(tmp_path / "model.safetensors")["booster"].tobytes() == expected
    assert history.rounds[0].fit_metrics == {"new_trees": 1.0}
    losses = [record.federated.loss for record in history.rounds if record.federated]
    assert losses == sorted(losses, reverse=True)


async def test_in_a_cyclic_run_one_client_after_the_other_is_asked() -> None:
    app = app_for(fb.XGBCyclic(), fb.RoundConfig.cyclic(3, **quick(num_rounds=5)))
    async with federation(app) as story:
        history = await story.run("c1", "c2", "c3")
        model = story.model()
    assert [record.cohort for record in history.rounds] == [["c1"], ["c2"], ["c3"], ["c1"], ["c2"]]
    expected = rounds(fb.XGBCyclic(), clients(BINARY, [120, 90, 30]), 5, in_turn=True)
    assert model["booster"].tobytes() == expected["booster"].tobytes()


def one_tree_out_of_bounds(learner: Any, tree: Any) -> None:
    tree["left_children"][0] = 10_000
    learner["gradient_booster"]["model"].update(trees=[tree], tree_info=[0])


async def test_hostile_trees_cost_a_run_nothing_but_their_sender() -> None:
    party = dict(zip(("c1", "c2", "c3"), clients(BINARY, [120, 90, 30]), strict=True))

    class Hostile(XGBClient):
        def fit(self, parameters: Tensors, config: Config) -> fb.FitResult:
            raw = changed(one_tree_out_of_bounds)
            return fb.FitResult(parameters={}, num_examples=10**6, extra={"trees": np.frombuffer(raw, np.uint8)})

    def client_fn(context: fb.ClientContext) -> XGBClient:
        return Hostile(BINARY, party["c3"].train) if context.client_id == "c3" else party[context.client_id]

    app = fb.App(
        client_fn=client_fn,
        strategy=fb.XGBBagging(),
        initial_parameters=initial_parameters(BINARY, 5),
        rounds=fb.RoundConfig.synchronous(3, **quick(fraction_evaluate=0)),
    )
    async with federation(app) as story:
        history = await story.run("c1", "c2", "c3")
        model = story.model()
    assert [record.clients for record in history.rounds] == [{"c1", "c2"}] * 4
    reason = "a tree is none: each node but the first must be the child of one before it"
    assert {event.reason for event in story.told(o.RefusalArrived)} == {reason}
    assert as_booster(model).num_boosted_rounds() == 8

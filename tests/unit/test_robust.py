"""The robust strategies beside references that are written from the papers, one vector at a time; and under attack."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedbus.config import RoundConfig
from fedbus.errors import AggregateRefused, ClientCodeError, ConfigError
from fedbus.strategies import spool
from fedbus.strategies.base import ClientUpdate, RoundInfo, Strategy
from fedbus.strategies.bulyan import Bulyan
from fedbus.strategies.clipping import CentredClipping
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fedopt import FedAvgM
from fedbus.strategies.fltrust import FLTrust
from fedbus.strategies.geometric import GeometricMedian
from fedbus.strategies.krum import Krum, MultiKrum
from fedbus.strategies.norm_bound import NormBound
from fedbus.strategies.optimizers import SGD, Adam
from fedbus.strategies.order import Median, TrimmedMean
from fedbus.strategies.scaffold import Scaffold
from fedbus.strategies.spool import Spool
from fedbus.strategies.spooled import SpooledStrategy
from fedbus.strategies.step import StepStrategy
from fedbus.strategies.whole import WholeRound
from fedbus.types import Array, Tensors, delta_dtype

MIXED: dict[str, Array] = {
    "f4": np.linspace(-1, 1, 60, dtype=np.float32).reshape(12, 5),
    "bf": np.linspace(-1, 1, 9).astype(ml_dtypes.bfloat16),
    "f2": np.linspace(-1, 1, 7).astype(np.float16),
    "f8": np.linspace(-1, 1, 4),
    "c8": (np.linspace(-1, 1, 6) * (1 - 2j)).astype(np.complex64),
    "zero-d": np.array(0.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
    "i4": np.arange(5, dtype=np.int32),
    "?": np.array([True, False, True]),
}
FLOATING = [name for name, value in MIXED.items() if value.dtype.kind in "fcV"]


def update(client_id: str, delta: Tensors, n: int = 1, **fields: Any) -> ClientUpdate:
    return ClientUpdate(client_id=client_id, task_id="t", delta=delta, num_examples=n, **fields)


def vectors(rows: Sequence[Any], n: int = 1) -> list[ClientUpdate]:
    """Updates of one float64 tensor, "w"."""
    return [update(f"{i:03}", {"w": np.array(row, np.float64)}, n) for i, row in enumerate(rows)]


def mixed_updates(count: int, seed: int = 0, *, whole: bool = False) -> list[ClientUpdate]:
    """Of all dtypes, in time and late, of many sizes, some without some tensors unless they are `whole`."""
    rng = np.random.default_rng(seed)
    sent = []
    for index in range(count):
        delta = {n: random_delta(v, rng) for n, v in MIXED.items() if whole or rng.random() < 0.85}
        late = index % 3
        sent.append(
            update(f"{index:03}", delta, int(rng.integers(1, 50)), staleness=late, discount=float((1 + late) ** -0.5))
        )
    return sent


def matrices(count: int) -> list[ClientUpdate]:
    """Updates of one float32 tensor, "w"."""
    sent = mixed_updates(count, whole=True)
    return [dataclasses.replace(each, delta={"w": each.delta["f4"]}) for each in sent]


def random_delta(value: Array, rng: np.random.Generator) -> Array:
    if value.dtype.kind in "iub":
        return rng.integers(-1, 2, value.shape).astype(delta_dtype(value.dtype))
    drawn = rng.normal(0, 1, value.shape)
    return np.asarray(drawn * (1 + 2j) if value.dtype.kind == "c" else drawn).astype(value.dtype)


def run(strategy: Strategy, model: Tensors, updates: Sequence[ClientUpdate]) -> dict[str, Array]:
    state = strategy.init(model)
    for each in updates:
        strategy.fold(state, each)
    return strategy.finish(state, model)


def step_of(strategy: StepStrategy, model: Tensors, updates: Sequence[ClientUpdate]) -> dict[str, Array]:
    """The whole step, before an optimizer rounds it to the model's dtype."""
    state = strategy.init(model)
    for each in updates:
        strategy.fold(state, each)
    parts: dict[str, list[Array]] = {}
    for name, _, values in strategy.steps(state, model):
        parts.setdefault(name, []).append(values)
    return {name: np.concatenate(found).reshape(model[name].shape) for name, found in parts.items()}


def moved(strategy: StepStrategy, rows: Sequence[Any]) -> Array:
    """What a float64 vector of zeros becomes."""
    model = {"w": np.zeros(np.shape(rows[0]))}
    return run(strategy, model, vectors(rows))["w"]


# ---- references ------------------------------------------------------------------------------------------------------


def discounted(sent: Sequence[ClientUpdate], name: str) -> list[Array]:
    """What each update that holds the tensor says, in float64 or complex128; votes of bools within 0 and 1."""
    wide = np.complex128 if MIXED[name].dtype.kind == "c" else np.float64
    found = []
    for each in sent:
        if name in each.delta:
            delta = each.delta[name]
            if MIXED[name].dtype.kind == "b":
                delta = np.clip(delta, -MIXED[name].astype(int), 1 - MIXED[name].astype(int))
            found.append(np.asarray(delta).astype(wide) * each.discount)
    return found


def by_coordinate(sent: Sequence[ClientUpdate], name: str, one: Callable[[list[float]], float]) -> Array:
    """`one` of the ascending values of each coordinate."""
    values = np.array(discounted(sent, name))
    flat = values.reshape(len(values), -1)
    reals = flat.view(np.float64) if flat.dtype.kind == "c" else flat
    result = np.array([one(sorted(reals[:, j].tolist())) for j in range(reals.shape[1])])
    return np.asarray(result.view(flat.dtype).reshape(MIXED[name].shape))


def the_median(values: list[float]) -> float:
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def trimmed(beta: float) -> Callable[[list[float]], float]:
    def mean(values: list[float]) -> float:
        cut = int(beta * len(values) + 1e-9)
        kept = values[cut : len(values) - cut]
        return sum(kept) / len(kept)

    return mean


def squared_distance(one: ClientUpdate, other: ClientUpdate) -> float:
    return float((np.abs(flat(one) * one.discount - flat(other) * other.discount) ** 2).sum())


def krum_score(sent: Sequence[ClientUpdate], i: int, f: int) -> float:
    gaps = sorted(squared_distance(sent[i], sent[j]) for j in range(len(sent)) if j != i)
    return sum(gaps[: max(len(sent) - f - 2, 1)])


def best(sent: Sequence[ClientUpdate], f: int, count: int) -> list[ClientUpdate]:
    order = sorted(range(len(sent)), key=lambda i: krum_score(sent, i, f))
    return [sent[i] for i in sorted(order[:count])]


def bulyan_choice(sent: Sequence[ClientUpdate], f: int) -> list[ClientUpdate]:
    left = list(sent)
    chosen: list[ClientUpdate] = []
    while len(chosen) < len(sent) - 2 * f:
        scores = [krum_score(left, i, f) for i in range(len(left))]
        chosen.append(left.pop(scores.index(min(scores))))
    return chosen


def near_the_median(f: int) -> Callable[[list[float]], float]:
    def mean(values: list[float]) -> float:
        middle = the_median(values)
        by_distance = sorted(values, key=lambda value: (round(abs(value - middle), 9), value))  # ties to the smaller
        kept = by_distance[: max(len(values) - 2 * f, 1)]
        return sum(kept) / len(kept)

    return mean


def mean_of(sent: Sequence[ClientUpdate], name: str, weights: Sequence[float] | None = None) -> Array:
    weights = [1.0] * len(sent) if weights is None else weights
    held = [weight for each, weight in zip(sent, weights, strict=True) if name in each.delta]
    return np.asarray(sum(w * d for w, d in zip(held, discounted(sent, name), strict=True)) / sum(held))


def floating_of(sent: Sequence[ClientUpdate]) -> list[str]:
    return [name for name in FLOATING if any(name in each.delta for each in sent)]


def flat(each: ClientUpdate) -> Array:
    """All floating and complex tensors of an update in one vector, zero where it has none; without its discount."""
    parts = [np.asarray(each.delta.get(n, np.zeros(MIXED[n].shape))).astype(np.complex128) for n in FLOATING]
    return np.concatenate([part.reshape(-1) for part in parts])


def compare(step: dict[str, Array], reference: Callable[[str], Array], names: Sequence[str]) -> None:
    for name in names:
        np.testing.assert_allclose(step[name], reference(name), rtol=1e-6, atol=1e-7, err_msg=name)


# ---- coordinate by coordinate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8, 21])
def test_the_median_is_that_of_each_coordinate(count: int) -> None:
    sent = mixed_updates(count, whole=count < 5)
    compare(step_of(Median(), MIXED, sent), lambda name: by_coordinate(sent, name, the_median), list(MIXED))


@pytest.mark.parametrize(("beta", "count"), [(0.0, 4), (0.1, 19), (0.2, 5), (0.25, 20), (0.49, 13), (0.29, 100)])
def test_the_trimmed_mean_is_that_of_each_coordinate(beta: float, count: int) -> None:
    sent = mixed_updates(count)
    compare(step_of(TrimmedMean(beta), MIXED, sent), lambda name: by_coordinate(sent, name, trimmed(beta)), list(MIXED))


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=1, max_size=12),
    st.floats(0, 0.49),
)
@settings(max_examples=60)
@example([[0.0, 0.0, 0.0]], 2.2e-309)  # 1 / beta is more than float64 holds
@example([[float(i)] * 3 for i in range(7)], 0.14285714285)  # a seventh, to ten digits
def test_order_statistics_are_those_of_numpy(rows: list[list[float]], beta: float) -> None:
    ordered = np.sort(np.array(rows), axis=0)
    cut = int(beta * len(rows) + 1e-9)
    np.testing.assert_allclose(moved(Median(), rows), np.median(ordered, axis=0), rtol=1e-12, atol=1e-9)
    if beta and not cut:
        with pytest.raises(AggregateRefused, match="updates to cut off any"):
            moved(TrimmedMean(beta), rows)
        return
    wanted = ordered[cut : len(rows) - cut].mean(axis=0)
    np.testing.assert_allclose(moved(TrimmedMean(beta), rows), wanted, rtol=1e-12, atol=1e-9)


def test_half_as_many_votes_as_there_are_updates_leave_a_bool_where_it_is() -> None:
    model = {"mask": np.array([True, True, False, False])}
    votes = [[-1, -1, 1, 0], [-1, 0, 1, 1], [0, 0, 0, 1], [0, -1, 1, 0]]
    sent = [update(str(i), {"mask": np.array(row, np.int8)}) for i, row in enumerate(votes)]
    assert run(Median(), model, sent)["mask"].tolist() == [True, True, True, False]


def test_tensors_longer_than_a_block_have_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_ALONE_BYTES", 0)
    size = 2 * spool._MAX_BLOCK + 17
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(7, size)).astype(np.float32)
    model = {"w": np.zeros(size, np.float32), "v": np.zeros(3, np.float32)}
    sent = [update(str(i), {"w": d, "v": d[:3]}) for i, d in enumerate(deltas)]
    found = run(Median(), model, sent)
    np.testing.assert_array_equal(found["w"], np.median(deltas, axis=0))
    np.testing.assert_array_equal(found["v"], np.median(deltas[:, :3], axis=0))
    wide = deltas.astype(np.float64)
    scores = [sum(sorted(((wide - d) ** 2).sum(axis=1))[1:5]) for d in wide]
    np.testing.assert_array_equal(run(Krum(1), model, sent)["w"], deltas[int(np.argmin(scores))])
    mean = run(MultiKrum(1, m=3), model, sent)["w"]
    np.testing.assert_allclose(mean, wide[np.argsort(scores)[:3]].mean(axis=0), rtol=1e-6, atol=1e-7)


# ---- Krum and its like -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "f"), [(3, 0), (7, 2), (12, 3), (20, 8)])
def test_krum_takes_the_update_that_has_the_most_near_it(count: int, f: int) -> None:
    sent = mixed_updates(count, seed=count)
    (chosen,) = best(sent, f, 1)
    step = step_of(Krum(f), MIXED, sent)
    assert set(step) == set(chosen.delta)
    compare(step, lambda name: mean_of([chosen], name), list(chosen.delta))


@pytest.mark.parametrize(("count", "f", "m"), [(7, 2, None), (12, 3, 1), (12, 3, 4), (15, 4, 11)])
def test_multi_krum_averages_the_best(count: int, f: int, m: int | None) -> None:
    sent = mixed_updates(count, seed=count)
    chosen = best(sent, f, count - f if m is None else m)
    compare(step_of(MultiKrum(f, m), MIXED, sent), lambda name: mean_of(chosen, name), floating_of(chosen))


@pytest.mark.parametrize(("count", "f"), [(3, 0), (7, 1), (11, 2), (16, 3)])
def test_bulyan_selects_one_after_the_other_and_trims(count: int, f: int) -> None:
    sent = mixed_updates(count, seed=count)
    chosen = bulyan_choice(sent, f)
    step = step_of(Bulyan(f), MIXED, sent)
    compare(step, lambda name: by_coordinate(chosen, name, near_the_median(f)), floating_of(chosen))


@given(st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=7, max_size=10), st.integers(0, 1))
@settings(max_examples=60)
def test_ties_go_to_the_first_by_client(rows: list[list[int]], f: int) -> None:
    """Whole numbers have exact distances, and many of one length."""
    sent = vectors(rows)
    wide = np.array(rows, np.float64)
    scores = [sum(sorted(((wide - d) ** 2).sum(axis=1))[1 : len(rows) - f - 1]) for d in wide]
    assert moved(Krum(f), rows).tolist() == rows[scores.index(min(scores))]
    m = 3
    chosen = sorted(range(len(rows)), key=lambda i: (scores[i], i))[:m]
    np.testing.assert_allclose(moved(MultiKrum(f, m), rows), wide[chosen].mean(axis=0), rtol=1e-12)
    assert run(Krum(f), {"w": np.zeros(2)}, sent[::-1])["w"].tolist() == rows[scores.index(min(scores))]


# ---- the geometric median --------------------------------------------------------------------------------------------


def weiszfeld(sent: Sequence[ClientUpdate], weights: Array, iterations: int, nu: float) -> list[float]:
    """Shares after so many steps, with v put together anew in each; from the mean of the half around the medoid."""
    rows = [flat(each) * each.discount for each in sent]
    gaps = [[float(np.linalg.norm(a - b)) for b in rows] for a in rows]
    sums = [sum(w * gap for w, gap in zip(weights, line, strict=True)) for line in gaps]
    from_medoid = gaps[sums.index(min(sums))]
    inner, weight = [], 0.0
    for i in sorted(range(len(rows)), key=lambda i: from_medoid[i]):
        if weight <= 0.5:
            inner.append(i)
            weight += weights[i]
    shares = [weights[i] / weight if i in inner else 0.0 for i in range(len(rows))]
    for _ in range(iterations):
        v = sum(share * row for share, row in zip(shares, rows, strict=True))
        near = [w / max(nu, float(np.linalg.norm(v - row))) for w, row in zip(weights, rows, strict=True)]
        shares = [each / sum(near) for each in near]
    return shares


@pytest.mark.parametrize(("count", "iterations"), [(1, 3), (2, 3), (9, 1), (9, 3), (20, 12)])
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_geometric_median_is_weiszfelds(count: int, iterations: int, weighting: Any) -> None:
    sent = mixed_updates(count, seed=count)
    weights = np.array([each.num_examples if weighting == "examples" else 1.0 for each in sent])
    shares = weiszfeld(sent, weights / weights.sum(), iterations, 1e-6)
    step = step_of(GeometricMedian(iterations=iterations, weighting=weighting), MIXED, sent)
    compare(step, lambda name: mean_of(sent, name, shares), floating_of(sent))
    whole = [name for name in ("i4", "?") if name in step]
    compare(step, lambda name: by_coordinate(sent, name, the_median), whole)


def test_in_one_dimension_many_steps_come_to_the_weighted_median() -> None:
    points, examples = [0.0, 1.0, 2.5, 7.0, 40.0], [3, 1, 5, 2, 2]
    sent = [update(str(i), {"w": np.array([x])}, n) for i, (x, n) in enumerate(zip(points, examples, strict=True))]

    def far(v: float) -> float:
        return sum(n * abs(v - x) for x, n in zip(points, examples, strict=True))

    low, high = 0.0, 40.0
    while high - low > 1e-9:  # the sum of distances is convex
        third = (high - low) / 3
        low, high = (low, high - third) if far(low + third) < far(high - third) else (low + third, high)
    found = run(GeometricMedian(iterations=500), {"w": np.zeros(1)}, sent)["w"]
    np.testing.assert_allclose(found, [low], atol=1e-4)


def test_two_alike_meet_in_the_middle_and_equal_ones_stay_what_they_are() -> None:
    np.testing.assert_allclose(moved(GeometricMedian(), [[0.0, 2.0], [4.0, 2.0]]), [2, 2], rtol=1e-12)
    np.testing.assert_allclose(moved(GeometricMedian(), [[1.0, -2.0]] * 5), [1, -2], rtol=1e-12)
    np.testing.assert_allclose(moved(GeometricMedian(), [[0.0, 0.0]] * 3), [0, 0])


# ---- those that stream -----------------------------------------------------------------------------------------------


def root(model: Tensors) -> dict[str, Array]:
    rng = np.random.default_rng(77)
    return {name: random_delta(value, rng) for name, value in model.items() if name != "f2"}


def test_fltrust_trusts_by_angle_and_takes_the_servers_length() -> None:
    sent = mixed_updates(9)
    own = update("root", root(MIXED))

    g = flat(own)
    length = float(np.linalg.norm(g))
    trust = [max(0.0, float(np.vdot(g, flat(each)).real / length / np.linalg.norm(flat(each)))) for each in sent]
    assert 0.0 in trust
    assert max(trust) > 0

    def reference(name: str) -> Array:
        terms: Any = 0
        held = [(t, each) for t, each in zip(trust, sent, strict=True) if name in each.delta]
        for t, each in held:
            scale = length / float(np.linalg.norm(flat(each))) if name in FLOATING else 1.0
            terms = terms + t * scale * discounted([each], name)[0]
        return np.asarray(terms / sum(t for t, _ in held))

    step = step_of(FLTrust(root), MIXED, sent)
    compare(step, reference, [name for name in (*FLOATING, "i4") if MIXED[name].size])


def test_fltrust_discards_a_round_in_which_nobody_goes_its_way() -> None:
    strategy = FLTrust(lambda model: {"w": np.array([1.0, 0.0])})
    with pytest.raises(AggregateRefused, match="FLTrust trusts none of the 3 updates"):
        moved(strategy, [[-1.0, 5.0], [0.0, 1.0], [0.0, 0.0]])


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ({"w": np.zeros(2)}, r"a step of length 0.0: it must move the model"),
        ({"w": np.array([1, np.inf])}, r"a step of length inf: it must move the model"),
        ({"w": np.ones(3)}, r"root_update returned 'w' \(3,\): the model has no such tensor"),
        ({"x": np.ones(2)}, r"root_update returned 'x' \(2,\): the model has no such tensor"),
    ],
)
def test_a_root_update_that_is_no_step_is_told_of(made: Tensors, says: str) -> None:
    with pytest.raises(ClientCodeError, match=says):
        FLTrust(lambda model: made).init({"w": np.zeros(2)})


def clipped_centre(
    sent: Sequence[ClientUpdate], v: dict[str, Array], radius: float, iterations: int
) -> dict[str, Array]:
    for _ in range(iterations):
        shares = []
        for each in sent:
            gaps = [discounted([each], n)[0] - v[n] for n in FLOATING if n in each.delta]
            far = float(np.sqrt(sum((np.abs(gap) ** 2).sum() for gap in gaps)))
            shares.append(min(1.0, radius / far))
        after = {}
        for name in FLOATING:
            held = [share for each, share in zip(sent, shares, strict=True) if name in each.delta]
            pulls = [c * (d - v[name]) for c, d in zip(held, discounted(sent, name), strict=True)]
            after[name] = v[name] + sum(pulls) / len(pulls)
        v = after
    return v


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("radius", [0.5, 9.0, 1e6])
def test_centred_clipping_pulls_from_where_it_was_last_round(iterations: int, radius: float) -> None:
    strategy = CentredClipping(radius, iterations)
    v: dict[str, Array] = {name: np.zeros(MIXED[name].shape) for name in FLOATING}
    for number in range(3):
        sent = mixed_updates(8, seed=number)
        v = clipped_centre(sent, v, radius, iterations)
        model = {name: np.zeros_like(value) for name, value in MIXED.items()}
        before = dict(strategy.memory)
        copies = {name: value.copy() for name, value in before.items()}
        new = run(strategy, model, sent)
        for name in (name for name in FLOATING if MIXED[name].size):
            kept = strategy.memory[f"centre/{name}"]
            assert kept.dtype == (np.float32 if MIXED[name].dtype.itemsize == 2 else MIXED[name].dtype)
            np.testing.assert_allclose(kept, v[name], rtol=1e-4, atol=1e-5)
            coarse = 1e-2 if MIXED[name].dtype.itemsize == 2 else 1e-5
            np.testing.assert_allclose(new[name].astype(kept.dtype), v[name], rtol=coarse, atol=coarse)
        for name, value in before.items():
            np.testing.assert_array_equal(value, copies[name])  # never written to


def test_a_client_moves_the_centre_by_its_share_of_the_radius_at_most() -> None:
    rows = [[0.0, 0.0]] * 9 + [[1e15, -1e15]]
    assert np.linalg.norm(moved(CentredClipping(2.0), rows)) == pytest.approx(0.2)


def test_a_norm_bound_scales_what_is_longer_and_leaves_the_rest() -> None:
    rows = [[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]
    model = {"w": np.zeros(2)}
    new = run(NormBound(1.0), model, vectors(rows))["w"]
    np.testing.assert_allclose(new, (np.array([0.6, 0.8]) + np.array([0.3, 0.4])) / 3, rtol=1e-9)


@pytest.mark.parametrize("inner", [FedAvg(), Median(), CentredClipping(1.0), GeometricMedian()], ids=repr)
def test_a_norm_bound_is_the_inner_strategy_of_shorter_updates(inner: StepStrategy) -> None:
    sent, most = mixed_updates(7), 4.0
    shorter = []
    for each in sent:
        factor = min(1.0, most / float(np.linalg.norm(flat(each))))
        assert factor < 1
        delta = {n: v if n in ("i4", "?") else (v.astype(np.complex128) * factor) for n, v in each.delta.items()}
        cast = {n: (v if MIXED[n].dtype.kind == "c" else v.real).astype(each.delta[n].dtype) for n, v in delta.items()}
        shorter.append(update(each.client_id, cast, each.num_examples, discount=each.discount))
    wanted = run(inner, MIXED, shorter)
    inner.memory.clear()
    found = run(NormBound(most, inner), MIXED, sent)
    inner.memory.clear()
    for name, value in wanted.items():
        coarse = 1e-2 if value.dtype.itemsize == 2 else 1e-5
        np.testing.assert_allclose(found[name].astype(np.complex128), value.astype(np.complex128), rtol=coarse)


def test_a_norm_bound_is_not_put_before_what_takes_more_than_updates() -> None:
    with pytest.raises(ConfigError, match="NormBound bounds updates, and clients of Scaffold send more"):
        NormBound(1.0, Scaffold())


def test_a_copy_of_a_norm_bound_remembers_for_itself() -> None:
    bound = NormBound(1.0, FedAvgM())
    other = copy.copy(bound)
    other.attach(memory={"m/w": np.ones(1)})
    assert bound.memory == {}
    assert repr(other) == repr(bound)


def test_a_norm_bound_passes_on_what_the_server_gives_and_asks(tmp_path: Path) -> None:
    inner = CentredClipping(1.0)
    outer = NormBound(1.0, inner)
    outer.attach(memory={"centre/w": np.ones(2)}, round=RoundInfo(number=4), folder=tmp_path)
    assert outer.memory is inner.memory
    assert list(inner.memory) == ["centre/w"]
    assert (inner.round.number, outer.round.number, inner.folder) == (4, 4, tmp_path)
    with pytest.raises(ConfigError, match="needs 2f"):
        NormBound(1.0, Krum(3)).check(RoundConfig(min_fit_clients=5))


# ---- one function for the whole round --------------------------------------------------------------------------------


class Middle(WholeRound):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def aggregate(self, updates: Sequence[ClientUpdate]) -> Tensors:
        self.seen = [each.client_id for each in updates]
        return {"w": np.median([each.delta["w"] * each.discount for each in updates], axis=0)}


def test_a_strategy_of_one_function_sees_all_updates_in_canonical_order() -> None:
    model: Tensors = {"w": np.zeros((50, 2), np.float32), "rest": np.ones(3)}
    rng = np.random.default_rng(0)
    deltas: list[Tensors] = [{"w": rng.normal(size=(50, 2)).astype(np.float32), "rest": np.ones(3)} for _ in range(4)]
    sent = [update(client, delta, discount=0.5) for client, delta in zip("dacb", deltas, strict=True)]
    strategy = Middle()
    new = run(strategy, model, sent)
    assert strategy.seen == ["a", "b", "c", "d"]
    np.testing.assert_allclose(new["w"], np.median([each.delta["w"] / 2 for each in sent], axis=0), rtol=1e-6)
    np.testing.assert_array_equal(new["rest"], model["rest"])


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"w": np.zeros(3)}, r"Fixed.aggregate returned 'w' of shape \(3,\), the model has \(2,\)"),
        ({"v": np.zeros(3)}, "Fixed.aggregate returned 'v': the model has no such tensor"),
    ],
)
def test_a_step_that_does_not_fit_the_model_is_told_of(step: Tensors, says: str) -> None:
    class Fixed(WholeRound):
        def aggregate(self, updates: Sequence[ClientUpdate]) -> Tensors:
            return step

    with pytest.raises(ClientCodeError, match=says):
        moved(Fixed(), [[0.0, 0.0]])


def test_every_dtype_can_be_stepped_by_one_function() -> None:
    class First(WholeRound):
        def aggregate(self, updates: Sequence[ClientUpdate]) -> Tensors:
            return updates[0].delta

    (sent,) = mixed_updates(1, whole=True)
    wanted = run(Median(), MIXED, [sent])
    for name, value in run(First(), MIXED, [sent]).items():
        np.testing.assert_array_equal(value, wanted[name])


def test_one_who_sends_some_of_the_tensors_is_no_harm_to_a_strategy_of_one_function() -> None:
    class Mean(WholeRound):
        def aggregate(self, updates: Sequence[ClientUpdate]) -> Tensors:
            held = self.holders(updates)
            return {name: np.mean([each.delta[name] for each in held[name]], axis=0) for name in held}

    model = {"w": np.zeros(1), "v": np.zeros(1)}
    first = update("a", {"w": np.array([6.0])})
    others = [update(name, {"w": np.array([3.0]), "v": np.array([5.0])}) for name in ("b", "c")]
    assert run(Mean(), model, [first, *others]) == {"w": [4.0], "v": [5.0]}


# ---- what they ask for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "least", "words"),
    [
        (Krum(2), 7, "2f + 3 = 7 updates"),
        (MultiKrum(1), 5, "2f + 3 = 5 updates"),
        (MultiKrum(1, m=6), 7, "m + f = 7 updates"),
        (Bulyan(2), 11, "4f + 3 = 11 updates"),
    ],
    ids=repr,
)
def test_too_few_updates_are_refused_at_the_start_where_it_is_known_and_else_in_the_round(
    strategy: SpooledStrategy, least: int, words: str
) -> None:
    strategy.check(RoundConfig(min_fit_clients=least))
    strategy.check(RoundConfig(min_fit_clients=2, grace_s=5))  # more may come
    with pytest.raises(ConfigError) as config:
        strategy.check(RoundConfig(min_fit_clients=least - 1))
    begins = f"{strategy!r} needs {words} in a round, and rounds close with min_fit_clients={least - 1}: "
    assert str(config.value).startswith(begins)
    rows = [[2.0 * i, 1.0] for i in range(least)]
    moved(strategy, rows)
    with pytest.raises(AggregateRefused) as refused:
        moved(strategy, rows[1:])
    assert str(refused.value) == f"{strategy!r} needs {words}, {least - 1} came"


def test_a_trimmed_mean_that_would_trim_nobody_is_refused() -> None:
    TrimmedMean(0.2).check(RoundConfig(min_fit_clients=5))
    TrimmedMean(0.0).check(RoundConfig(min_fit_clients=1))
    with pytest.raises(ConfigError, match=r"TrimmedMean\(beta=0.2\) needs 5 updates to cut off any in a round"):
        TrimmedMean(0.2).check(RoundConfig(min_fit_clients=4))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Krum(-1), "f must be a whole number of 0 or more, not -1"),
        (lambda: Krum(True), "f must be a whole number of 0 or more, not True"),
        (lambda: MultiKrum(1, m=0), "m must be a whole number of 1 or more, not 0"),
        (lambda: Bulyan(1.5), "f must be a whole number of 0 or more, not 1.5"),  # type: ignore[arg-type]
        (lambda: TrimmedMean(0.5), "beta must be a number from 0 to less than 0.5, not 0.5"),
        (lambda: GeometricMedian(iterations=0), "iterations must be a whole number of 1 or more, not 0"),
        (lambda: GeometricMedian(nu=0), "nu must be a positive number, not 0"),
        (lambda: CentredClipping(0), "radius must be a positive number, not 0"),
        (lambda: NormBound(float("nan")), "max_norm must be a positive number, not nan"),
        (lambda: NormBound(1, "median"), "strategy must be a fedbus strategy such as FedAvg(), not 'median'"),  # type: ignore[arg-type]
    ],
)
def test_settings_that_cannot_work_are_refused(make: Callable[[], Strategy], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == says


def test_they_say_what_they_are() -> None:
    assert repr(MultiKrum(2, m=3)) == "MultiKrum(f=2, m=3)"
    assert repr(Median(optimizer=SGD(0.5))) == "Median(optimizer=SGD(learning_rate=0.5))"
    assert repr(NormBound(2.0, TrimmedMean())) == "NormBound(max_norm=2.0, strategy=TrimmedMean(beta=0.2))"
    assert repr(FLTrust(root)) == "FLTrust(root)"


def test_a_server_optimizer_takes_the_step() -> None:
    rows = [[1.0], [2.0], [9.0]]
    assert moved(Median(optimizer=SGD(0.5)), rows).tolist() == [1.0]
    strategy = Median(optimizer=Adam())
    moved(strategy, rows)
    assert strategy.memory  # its moments


@pytest.mark.parametrize("make", [Median, lambda: Krum(0), lambda: CentredClipping(1.0, 2), Middle])
def test_the_disk_is_given_back_when_a_round_is_finished_refused_or_dropped(
    make: Callable[[], StepStrategy], tmp_path: Path
) -> None:
    strategy = make()
    strategy.attach(folder=tmp_path)

    def open_files() -> int:
        links = Path("/proc/self/fd").iterdir()
        return sum(str(tmp_path) in str(link.readlink()) for link in links if link.is_symlink())

    model = {"w": np.zeros(2)}
    state = strategy.init(model)
    for each in vectors([[1.0, 1.0]] * 3):
        strategy.fold(state, each)
    assert open_files() == 1
    assert list(tmp_path.iterdir()) == []
    strategy.finish(state, model)
    assert open_files() == 0
    dropped = strategy.init(model)
    strategy.fold(dropped, vectors([[1.0, 1.0]])[0])
    assert open_files() == 1
    if isinstance(strategy, Krum):
        with pytest.raises(AggregateRefused):
            strategy.finish(dropped, model)
    del dropped
    assert open_files() == 0


# ---- the order of arrival --------------------------------------------------------------------------------------------

SPOOLED: list[SpooledStrategy] = [
    Median(),
    TrimmedMean(0.2),
    Krum(5),
    MultiKrum(5),
    Bulyan(4),
    GeometricMedian(),
    GeometricMedian(weighting="uniform"),
]
STREAMED: list[Strategy] = [FLTrust(root), CentredClipping(3.0), NormBound(3.0)]


def digest(tensors: Tensors) -> str:
    found = hashlib.sha256()
    for name, value in tensors.items():
        found.update(name.encode() + value.tobytes())
    return found.hexdigest()


def orders(sent: list[ClientUpdate], count: int) -> list[list[ClientUpdate]]:
    order = random.Random(1)
    return [order.sample(sent, len(sent)) for _ in range(count)]


def test_a_thousand_orders_give_one_digest_for_each_that_spools() -> None:
    """Folding is the same for all of them, so that each order is written once."""
    model: Tensors = {"w": MIXED["f4"]}
    sent = matrices(20)
    found: dict[str, set[str]] = {repr(strategy): set() for strategy in SPOOLED}
    for each in orders(sent, 1000):
        state = Spool(model)
        for one in each:
            state.add(one)
        for strategy in SPOOLED:
            steps = {str(index): step for index, (_, _, step) in enumerate(strategy.reduced(state, model))}
            found[repr(strategy)].add(digest(steps))
        state.close()
    assert [len(digests) for digests in found.values()] == [1] * len(SPOOLED)
    assert len(set(itertools.chain(*found.values()))) == len(SPOOLED)


@pytest.mark.parametrize("strategy", STREAMED, ids=repr)
def test_a_thousand_orders_give_one_digest_for_each_that_streams(strategy: Strategy) -> None:
    model: Tensors = {"w": MIXED["f4"]}
    sent = matrices(20)
    found = set()
    for each in orders(sent, 1000):
        strategy.memory.clear()
        found.add(digest(run(strategy, model, each)) + digest(strategy.memory))
    assert len(found) == 1


@pytest.mark.parametrize("strategy", [*SPOOLED, *STREAMED, CentredClipping(3.0, 2), NormBound(3.0, Median())], ids=repr)
def test_the_order_does_not_show_in_any_dtype(strategy: Strategy) -> None:
    found = set()
    for each in orders(mixed_updates(20), 10):
        strategy.memory.clear()
        found.add(digest(run(strategy, MIXED, each)) + digest(strategy.memory))
    assert len(found) == 1


# ---- under attack ----------------------------------------------------------------------------------------------------

HOSTILE = 4
HONEST = 15


def garbage(honest: Array, rng: np.random.Generator) -> Array:
    return rng.normal(0, 50, honest.shape[1:])


def flipped(honest: Array, rng: np.random.Generator) -> Array:
    return np.asarray(-10 * honest.mean(axis=0))


def huge(honest: Array, rng: np.random.Generator) -> Array:
    return np.full(honest.shape[1:], 1e15)


ATTACKS = [garbage, flipped, huge]


def under(attack: Callable[[Array, np.random.Generator], Array], *, first: bool) -> tuple[Array, list[ClientUpdate]]:
    """Honest steps around a direction of their own, and all updates; hostile clients come first or last by name."""
    rng = np.random.default_rng(5)
    honest = (np.linspace(0.5, 2, 200) + rng.normal(0, 0.3, (HONEST, 200))).astype(np.float32)
    sent = [update(f"m{i:02}", {"w": row}) for i, row in enumerate(honest)]
    for i in range(HOSTILE):
        row = attack(honest.astype(np.float64), rng).astype(np.float32)
        sent.append(update(f"{'a' if first else 'z'}{i:02}", {"w": row}))
    return honest.astype(np.float64), sent


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize(
    "strategy", [Median(), TrimmedMean(0.25), Krum(HOSTILE), MultiKrum(HOSTILE), Bulyan(HOSTILE)], ids=repr
)
def test_each_coordinate_stays_within_the_honest_range(
    strategy: StepStrategy, attack: Callable[[Array, np.random.Generator], Array], first: bool
) -> None:
    honest, sent = under(attack, first=first)
    step = step_of(strategy, {"w": np.zeros(200, np.float32)}, sent)["w"]
    assert (step >= honest.min(axis=0) - 1e-6).all()
    assert (step <= honest.max(axis=0) + 1e-6).all()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_geometric_median_stays_in_the_honest_ball(
    weighting: Any, attack: Callable[[Array, np.random.Generator], Array], first: bool
) -> None:
    honest, sent = under(attack, first=first)
    step = step_of(GeometricMedian(weighting=weighting), {"w": np.zeros(200, np.float32)}, sent)["w"]
    centre = honest.mean(axis=0)
    assert np.linalg.norm(step - centre) < np.linalg.norm(honest - centre, axis=1).max()


@pytest.mark.parametrize("attack", ATTACKS)
def test_fltrust_goes_the_servers_way_and_as_far(attack: Callable[[Array, np.random.Generator], Array]) -> None:
    honest, sent = under(attack, first=True)
    own = honest[0]
    step = step_of(FLTrust(lambda model: {"w": own}), {"w": np.zeros(200, np.float32)}, sent)["w"]
    assert np.linalg.norm(step) <= np.linalg.norm(own) * 1.0001
    assert step @ own / np.linalg.norm(step) / np.linalg.norm(own) > 0.9


@pytest.mark.parametrize("attack", ATTACKS)
def test_centred_clipping_comes_to_the_honest_ball_and_stays_there(
    attack: Callable[[Array, np.random.Generator], Array],
) -> None:
    """Each hostile client moves it by radius / n at most, so that it ends within f / (n - f) radii of the honest."""
    honest, sent = under(attack, first=True)
    centre, radius = honest.mean(axis=0), 6.0
    strategy = CentredClipping(radius)
    for _ in range(12):
        step = step_of(strategy, {"w": np.zeros(200, np.float32)}, sent)["w"]
    assert np.linalg.norm(step - centre) < radius * HOSTILE / HONEST + 0.1


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_norm_bound_keeps_the_mean_within_it(attack: Callable[[Array, np.random.Generator], Array]) -> None:
    _, sent = under(attack, first=True)
    step = run(NormBound(20.0), {"w": np.zeros(200, np.float32)}, sent)["w"]
    assert np.linalg.norm(step) <= 20.0


@pytest.mark.parametrize("attack", ATTACKS)
def test_plain_averaging_leaves_the_honest_range(attack: Callable[[Array, np.random.Generator], Array]) -> None:
    honest, sent = under(attack, first=True)
    step = step_of(FedAvg(), {"w": np.zeros(200, np.float32)}, sent)["w"]
    is_out = (step < honest.min(axis=0)) | (step > honest.max(axis=0))
    assert is_out.mean() > 0.5
    centre = honest.mean(axis=0)
    assert np.linalg.norm(step - centre) > 2 * np.linalg.norm(honest - centre, axis=1).max()

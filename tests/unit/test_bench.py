"""What the measurement computes, and what it measures with."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.bench import noop
from fedbus.bench.aggregate import STRATEGIES, Spec, bench_aggregate, measure
from fedbus.bench.floor import PART_BYTES, Job
from fedbus.bench.fold import Sums, bench_fold, payloads, received
from fedbus.bench.measure import Spread, bench_round, peak_rss_mib, spread
from fedbus.cli.bench import fold
from fedbus.errors import ConfigError, RunFailed
from fedbus.training.base import ClientContext
from fedbus.wire.transfer import Outgoing


def test_percentiles_lie_between_the_two_nearest_values() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0]) == Spread(p50=2.5, p95=3.85)  # ranks 1.5 and 2.85 of 0 .. 3
    assert spread([0.5]) == Spread(p50=0.5, p95=0.5)


@pytest.mark.parametrize("mib", [0.25, 1, 3.5, 1e-6])
def test_the_model_is_as_large_as_asked_in_memory_and_on_the_wire(mib: float) -> None:
    model = noop.model(mib)
    asked = max(4, 4 * round(mib * (1 << 18)))
    assert {value.dtype for value in model.values()} == {np.dtype(np.float32)}
    assert sum(value.nbytes for value in model.values()) == asked
    assert Outgoing(model).nbytes == asked


def test_the_model_is_the_same_in_every_process_and_has_large_and_small_tensors() -> None:
    one, other = noop.model(1), noop.model(1)
    assert list(one) == list(other)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    sizes = sorted(value.nbytes for value in one.values())
    assert sizes[0] < 5_000
    assert sizes[-1] > 300_000


def test_the_client_returns_the_very_arrays_that_it_got(tmp_path: Path) -> None:
    client = noop.NoOpClient(ClientContext(client_id="c"), tmp_path, gated=(1,))
    model = noop.model(0.25)
    result = client.fit(model, {"round": 2})
    assert all(result.parameters[name] is model[name] for name in model)
    assert noop.arrivals(tmp_path, 2) == []


def test_a_client_waits_at_the_gate_of_its_round_and_says_who_it_is(tmp_path: Path) -> None:
    client = noop.NoOpClient(ClientContext(client_id="c"), tmp_path, gated=(1,))
    noop.gate(tmp_path, 1).touch()
    client.fit({}, {"round": 1})
    (arrival,) = noop.arrivals(tmp_path, 1)
    assert int(arrival.read_text()) == os.getpid()


@pytest.mark.parametrize(("model_bytes", "parts"), [(4, 1), (PART_BYTES, 1), (PART_BYTES + 4, 2)])
def test_the_floor_cuts_a_model_into_parts(model_bytes: int, parts: int) -> None:
    assert Job(url="", clients=1, model_bytes=model_bytes, rounds=3).parts == parts


def test_two_floors_on_one_broker_have_queues_of_their_own() -> None:
    one = Job(url="", clients=1, model_bytes=4, rounds=3)
    other = Job(url="", clients=1, model_bytes=4, rounds=3)
    assert dataclasses.asdict(one) | {"prefix": ""} == dataclasses.asdict(other) | {"prefix": ""}
    assert {one.model, one.updates, one.joins, one.inbox(0)}.isdisjoint(
        {other.model, other.updates, other.joins, other.inbox(0)}
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_the_peak_of_a_process_includes_what_it_has_freed() -> None:
    block = np.ones(32 << 20, np.uint8)
    del block
    peak = peak_rss_mib(os.getpid())
    assert peak is not None
    assert peak > 32


def test_the_peak_of_no_process_is_unknown() -> None:
    assert peak_rss_mib(2**30) is None


@pytest.mark.parametrize("mib", [0.0, -1.0, float("nan"), float("inf")])
def test_a_model_of_no_size_is_refused(mib: float) -> None:
    with pytest.raises(ConfigError, match="--model-mib must be more than 0"):
        asyncio.run(bench_round(clients=1, model_mib=mib, rounds=3, broker=None, run_dir=None))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize("strategy", ["trimmed-mean", "krum"])
def test_a_round_of_many_updates_takes_the_memory_of_a_few(strategy: str, tmp_path: Path) -> None:
    found = asyncio.run(bench_aggregate(Spec(strategy=strategy, clients=64, mib=4.0, folder=str(tmp_path))))
    assert found.peak_mib - found.start_mib < 64 * 4 / 2  # a dozen buffers for each core, and the next model
    assert found.read_s is not None
    assert list(tmp_path.iterdir()) == []


async def test_a_measurement_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"the measurement failed: .*cannot be kept in .*gone: No such file"):
        await bench_aggregate(Spec(strategy="median", clients=3, mib=0.1, folder=str(tmp_path / "gone")))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_can_be_measured(strategy: str) -> None:
    found = measure(Spec(strategy=strategy, clients=11, mib=0.02))
    assert (found.strategy, found.clients) == (strategy, 11)
    assert found.fold_s >= 0
    assert found.finish_s >= 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strategy": "mode"}, "--strategy 'mode' is not known: take one of fedavg, median"),
        ({"clients": 2}, "--clients must be 3 or more"),
        ({"mib": float("nan")}, "--mib more than 0"),
    ],
)
def test_an_aggregation_that_cannot_be_measured_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Spec(**settings)


# ---- the fold --------------------------------------------------------------------------------------------------------


def test_every_way_to_fold_gives_the_same_sums() -> None:
    model = noop.model(0.3)
    sums = Sums(model)
    for num_examples in (1, 5):
        update = received(model, payloads(model), num_examples)
        for way in sums.ways(model, update).values():
            way()
    new = sums.strategy.finish(sums.exact, {name: np.zeros_like(value) for name, value in model.items()})
    for name, value in model.items():
        np.testing.assert_array_equal(sums.copies[name], value)
        np.testing.assert_allclose(new[name], value, rtol=1e-6, atol=1e-9)
        for other in (sums.narrow, sums.whole, sums.wide):
            np.testing.assert_allclose(other[name], 6 * value, rtol=1e-6)


def test_the_fold_is_told_beside_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    fold(mib=0.01, clients=2, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["mib"], found["clients"]) == (0.01, 2)
    for name, ratio in found["ratios"].items():
        assert ratio == pytest.approx(found[name] / found["exact"], abs=0.01)
    fold(mib=0.01, clients=1, as_json=False)
    assert "memcpy" in capsys.readouterr().out


@pytest.mark.parametrize("mib", [0.0, -1.0, float("nan")])
def test_a_fold_of_nothing_is_refused(mib: float) -> None:
    with pytest.raises(ConfigError, match="--mib must be a positive number"):
        bench_fold(mib=mib, clients=1)

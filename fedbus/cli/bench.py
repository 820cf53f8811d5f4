"""`fedbus bench`: how fast it is on this machine, and how far from what the broker allows."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from rich.table import Table

from fedbus.bench import fedprox as prox
from fedbus.bench.aggregate import STRATEGIES, AggregateBench, bench_aggregate
from fedbus.bench.aggregate import Spec as AggregateSpec
from fedbus.bench.codecs import bench_codecs, bench_memcpy
from fedbus.bench.compression import CODECS as COMPRESSIONS
from fedbus.bench.compression import Outcome as CompressedRun
from fedbus.bench.compression import bench_compression
from fedbus.bench.fold import FoldBench, bench_fold
from fedbus.bench.heart_disease import SEEDS, bench_heart_disease
from fedbus.bench.heart_disease import Outcome as HeartDisease
from fedbus.bench.measure import RoundBench, Spread, bench_round
from fedbus.bench.regimes import Outcome, bench_regimes
from fedbus.bench.stragglers import Spec, bench_stragglers
from fedbus.cli.options import Broker, Debug, Json, Plaintext, RunDir, run_async
from fedbus.cli.tables import console_for_tables
from fedbus.data.heart_disease import FOLDER

bench_app = typer.Typer(name="bench", help="Measure fedbus on this machine.", no_args_is_help=True)


@bench_app.callback()
def bench() -> None:
    """Measure fedbus on this machine."""


@bench_app.command(name="round")
def round_(
    clients: Annotated[int, typer.Option("--clients", min=1, max=1000, help="Client processes to start.")] = 4,
    model_mib: Annotated[float, typer.Option("--model-mib", help="Size of the model; 0.25 is fine, too.")] = 1.0,
    rounds: Annotated[int, typer.Option("--rounds", min=3, help="Rounds to measure; the first is a warm-up.")] = 10,
    broker: Broker = None,
    plaintext: Plaintext = False,
    run_dir: RunDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time rounds of a federation whose clients do nothing, and the same bytes moved by bare aiormq.

    On a private RabbitMQ, or on --broker URL, where memory and octets of the broker stay unknown.
    """
    found = run_async(bench_round(clients=clients, model_mib=model_mib, rounds=rounds, broker=broker, run_dir=run_dir))
    if as_json:
        typer.echo(found.to_json())
    else:
        _show(found)


@bench_app.command()
def stragglers(
    fast: Annotated[int, typer.Option("--fast", help="Clients that are quick; a round waits for so many updates.")] = 8,
    slow: Annotated[int, typer.Option("--slow", help="Clients that are slow.")] = 2,
    fast_s: Annotated[float, typer.Option("--fast-s", help="Seconds that a quick client trains.")] = 0.5,
    slow_s: Annotated[float, typer.Option("--slow-s", help="Seconds that a slow client trains.")] = 5.0,
    model_mib: Annotated[float, typer.Option("--model-mib", help="Size of the model.")] = 1.0,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds to run.")] = 10,
    broker: Broker = None,
    plaintext: Plaintext = False,
    run_dir: RunDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a federation with slow clients in it, and tell what became of their updates."""
    spec = Spec(fast=fast, slow=slow, fast_s=fast_s, slow_s=slow_s, model_mib=model_mib, rounds=rounds)
    found = run_async(bench_stragglers(spec, broker=broker, run_dir=run_dir))
    if as_json:
        typer.echo(found.to_json())
        return
    typer.echo(
        f"{rounds} rounds, {fast} clients of {fast_s:g} s and {slow} of {slow_s:g} s, a model of {model_mib:g} MiB: "
        f"{found.seconds:.2f} s from the first task to the last commit (the quick ones train for {found.at_best_s:g} s)"
    )
    late = ", ".join(map(str, found.staleness)) or "none"
    typer.echo(f"{found.updates} updates, {found.slow_updates} of slow clients; versions late: {late}")


@bench_app.command()
def aggregate(
    clients: Annotated[int, typer.Option("--clients", help="Updates in the round.")] = 64,
    mib: Annotated[float, typer.Option("--mib", help="Size of the model, and of each update.")] = 100.0,
    strategy: Annotated[str, typer.Option("--strategy", help=f"One of {', '.join(STRATEGIES)}.")] = "trimmed-mean",
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Where updates are spooled; else where temporary files go.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time one round of aggregation in a process of its own, without a bus, and tell its memory.

    Strategies that must see all updates spool them to disk: as many times the model's size as there are clients.
    """
    spec = AggregateSpec(strategy=strategy, clients=clients, mib=mib, folder=None if folder is None else str(folder))
    found = run_async(bench_aggregate(spec))
    if as_json:
        typer.echo(found.to_json())
    else:
        _show_aggregate(found)


def _show_aggregate(found: AggregateBench) -> None:
    gib = found.clients * found.mib / 1024
    typer.echo(f"{found.strategy}: {found.clients} updates of {found.mib:g} MiB, {gib:.2f} GiB in all")
    table = Table.grid(padding=(0, 2))
    table.add_row("fold", f"{_duration(found.fold_s)}, {gib / max(found.fold_s, 1e-3):.2f} GiB/s")
    finish_gib_s = gib / max(found.finish_s, 1e-3)
    cores = found.finish_cpu_s / max(found.finish_s, 1e-3)
    table.add_row("finish", f"{_duration(found.finish_s)}, {finish_gib_s:.2f} GiB/s, on {cores:.1f} cores")
    if found.read_s is not None:
        ratio = found.finish_s / max(found.read_s, 1e-3)
        table.add_row("reading the spool once", f"{_duration(found.read_s)}; finish takes {ratio:.1f} times as long")
    table.add_row("peak memory", f"{_mib(found.peak_mib)}; {_mib(found.start_mib)} before the round")
    console_for_tables().print(table)


@bench_app.command(name="regimes")
def regimes_(
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each regime.")] = 3,
    trainings: Annotated[int, typer.Option("--trainings", help="Fits in each run, about.")] = 1500,
    target: Annotated[float, typer.Option("--target", help="The accuracy that is waited for.")] = 0.85,
    speeds: Annotated[str, typer.Option("--speeds", help="As in 'fedbus simulate'.")] = "lognormal:0:1",
    data_seed: Annotated[int, typer.Option("--data-seed", help="Of the data, which are those of FedProx.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare synchronous, over-selected, FedBuff and FedAsync rounds, in virtual time.

    FedProx's synthetic(1, 1), 30 clients, logistic regression, five local epochs. A fit takes 1 s at the median; with
    the default speeds each draws its own duration, lognormal:1 gives each client a speed of its own.
    """

    def words(outcome: Outcome) -> str:
        reached = "never" if outcome.seconds_to_target is None else f"after {outcome.seconds_to_target:.0f} s"
        return f"{outcome.regime}, seed {outcome.seed}: {target:.0%} {reached}"

    found = bench_regimes(seeds=seeds, trainings=trainings, target=target, speeds=speeds, data_seed=data_seed)
    outcomes = _told(found, words, as_json=as_json)
    if not as_json:
        console_for_tables().print(_regimes_table(outcomes, target))


T = TypeVar("T", Outcome, prox.Outcome)


def _told(outcomes: Iterable[T], words: Callable[[T], str], *, as_json: bool) -> list[T]:
    """Dataclasses as they come, each told in a line; or at the end all of them as JSON."""
    found = []
    for outcome in outcomes:
        found.append(outcome)
        if not as_json:
            typer.echo(words(outcome), err=True)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(outcome) for outcome in found]))
    return found


@bench_app.command()
def fold(
    mib: Annotated[float, typer.Option("--mib", help="Size of an update.")] = 64.0,
    clients: Annotated[int, typer.Option("--clients", min=1, help="Updates to fold; the quickest counts.")] = 20,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the fold of updates, whose sums do not depend on their order, beside plain sums and memcpy, on one core."""
    found = bench_fold(mib=mib, clients=clients)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found) | {"ratios": found.ratios}))
    else:
        _show_fold(found)


_FOLDS: Final = {
    "read": "read once",
    "memcpy": "memcpy",
    "plain_float32": "plain sums, float32, block by block",
    "whole_float32": "plain sums, float32, tensor by tensor",
    "plain_float64": "plain sums, float64",
}


def _show_fold(found: FoldBench) -> None:
    typer.echo(f"updates of {found.mib:g} MiB of float32, the best of {found.clients}, one core")
    table = _table("", "GiB/s", "the exact fold takes")
    for name, words in _FOLDS.items():
        table.add_row(words, f"{getattr(found, name):.2f}", f"{found.ratios[name]:.2f} times as long")
    table.add_row("exact sums, as the server folds", f"{found.exact:.2f}", "")
    console_for_tables().print(table)


@bench_app.command()
def codecs(
    mib: Annotated[float, typer.Option("--mib", help="Size of the update.")] = 64.0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time each codec on one core, beside a copy of the same bytes."""
    memcpy = bench_memcpy(mib)
    found = list(bench_codecs(mib))
    if as_json:
        typer.echo(json.dumps({"memcpy_gib_s": memcpy, "codecs": [dataclasses.asdict(speed) for speed in found]}))
        return
    table = _table("codec", "smaller by", "encode, GiB/s", "decode, GiB/s")
    table.add_row("memcpy", "", f"{memcpy:.2f}", f"{memcpy:.2f}")
    for speed in found:
        table.add_row(speed.codec, f"{speed.ratio:.2f}", f"{speed.encode_gib_s:.2f}", f"{speed.decode_gib_s:.2f}")
    console_for_tables().print(table)


@bench_app.command()
def compression(
    clients: Annotated[int, typer.Option("--clients", help="Client processes; each is in every round.")] = 10,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of each run.")] = 30,
    seed: Annotated[int, typer.Option("--seed", help="Of batches and of what is rounded at random.")] = 0,
    only: Annotated[
        list[str] | None, typer.Option("--codec", help="This one; may be given again. Default: one of each kind.")
    ] = None,
    broker: Broker = None,
    plaintext: Plaintext = False,
    run_dir: RunDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the demo's digits with each codec, and tell what it saves and what it costs."""
    asked = tuple(only) if only else COMPRESSIONS
    given = {"clients": clients, "rounds": rounds, "seed": seed, "codecs": asked, "broker": broker, "run_dir": run_dir}

    async def run() -> list[CompressedRun]:
        found = []
        async for outcome in bench_compression(**given):  # type: ignore[arg-type]  # as they are above
            found.append(outcome)
            if not as_json:
                typer.echo(f"{outcome.codec or 'no codec'}: accuracy {outcome.accuracy:.4f}", err=True)
        return found

    found = run_async(run())
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(outcome) for outcome in found]))
        return
    table = _table("codec", "KiB per update", "KiB per round", "smaller by", f"accuracy after {rounds}", "best")
    for outcome in found:
        table.add_row(
            outcome.codec or "none",
            f"{outcome.bytes_per_update / 1024:.2f}",
            f"{outcome.bytes_per_round / 1024:.1f}",
            f"{outcome.ratio:.2f}",
            f"{outcome.accuracy:.4f}",
            f"{outcome.best:.4f}",
        )
    console_for_tables().print(table)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _regimes_table(outcomes: list[Outcome], target: float) -> Table:
    table = _table("regime", f"s to {target:.0%}", "quicker", "final accuracy", "s in all", "late")
    names = list(dict.fromkeys(outcome.regime for outcome in outcomes))
    first = _median_to_target([outcome for outcome in outcomes if outcome.regime == names[0]])
    for name in names:
        runs = [outcome for outcome in outcomes if outcome.regime == name]
        each = " ".join("never" if run.seconds_to_target is None else f"{run.seconds_to_target:.0f}" for run in runs)
        table.add_row(
            name,
            each,
            _times(first, _median_to_target(runs)),
            " ".join(f"{run.final_accuracy:.3f}" for run in runs),
            f"{statistics.median(run.seconds for run in runs):.0f}",
            f"{statistics.fmean(run.mean_staleness for run in runs):.1f}",
        )
    return table


@bench_app.command()
def fedprox(
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of each run; the last ten are averaged.")] = 200,
    data_seeds: Annotated[int, typer.Option("--data-seeds", min=1, help="Data to make: of the seeds 0, 1, ...")] = 3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare FedProx, which counts what stragglers come to, with FedAvg, which drops them, in virtual time.

    FedProx's synthetic(1, 1), logistic regression, 10 of 30 users in each round, 20 local epochs, 90 % of stragglers.
    """

    def words(outcome: prox.Outcome) -> str:
        return f"{outcome.method}, data seed {outcome.data_seed}: {outcome.accuracy:.3f}"

    outcomes = _told(prox.bench_fedprox(rounds=rounds, data_seeds=range(data_seeds)), words, as_json=as_json)
    if not as_json:
        console_for_tables().print(_fedprox_table(outcomes))
        typer.echo("accuracy (loss), means of the last ten rounds")


def _fedprox_table(outcomes: list[prox.Outcome]) -> Table:
    data_seeds = sorted({outcome.data_seed for outcome in outcomes})
    table = _table("method", *(f"data {data_seed}" for data_seed in data_seeds))
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        runs = [outcome for outcome in outcomes if outcome.method == method]
        table.add_row(method, *(f"{run.accuracy:.3f} ({run.loss:.2f})" for run in runs))
    return table


@bench_app.command(name="heart-disease")
def heart_disease(
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", envvar=FOLDER, help="Where cleveland.csv and the three others are."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=len(SEEDS), help="Of FLamby's five, the first N.")] = 5,
    broker: Broker = None,
    plaintext: Plaintext = False,
    run_dir: RunDir = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train FLamby's Fed-Heart-Disease by each strategy, and compare the accuracies with the published ones.

    Four hospitals, four client processes, over a private RabbitMQ or --broker URL. Logistic regression, 15 rounds of
    100 local steps, FLamby's settings and seeds; accuracy of the last model on all hospitals' 254 test patients.
    """

    def tell(method: str, seed: int, accuracy: float) -> None:
        if not as_json:
            typer.echo(f"{method}, seed {seed}: {accuracy:.4f}", err=True)

    outcomes = run_async(bench_heart_disease(data=data, seeds=SEEDS[:seeds], broker=broker, run_dir=run_dir, tell=tell))
    if as_json:
        typer.echo(json.dumps([outcome.to_json() for outcome in outcomes]))
        return
    console_for_tables().print(_heart_disease_table(outcomes))
    typer.echo("published: FLamby's mean of seeds 42 to 46 (Ogier du Terrail et al. 2022)")


def _heart_disease_table(outcomes: list[HeartDisease]) -> Table:
    table = _table("strategy", "published", "ours", "difference", "by seed")
    for outcome in outcomes:
        by_seed = " ".join(f"{accuracy:.4f}" for accuracy in outcome.accuracies.values())
        ours = f"{outcome.mean:.4f}"
        table.add_row(outcome.method, f"{outcome.published:.4f}", ours, f"{outcome.difference:+.4f}", by_seed)
    return table


def _times(seconds: float, other: float) -> str:
    return f"{seconds / other:.1f}" if math.isfinite(seconds) and math.isfinite(other) else ""


def _median_to_target(runs: list[Outcome]) -> float:
    return statistics.median(math.inf if run.seconds_to_target is None else run.seconds_to_target for run in runs)


def _show(found: RoundBench) -> None:
    processes = "1 client process" if found.clients == 1 else f"{found.clients} client processes"
    typer.echo(f"{processes}, a model of {found.model_mib:g} MiB, {found.rounds} rounds, {found.loop} loops")
    table = Table.grid(padding=(0, 2))
    table.add_row("round", _seconds(found.round_s))
    table.add_row("last update to next model", _seconds(found.turnaround_s))
    table.add_row("floor", _seconds(found.floor_round_s))
    table.add_row("ratio of the p50s", f"{found.ratio:.2f}")
    table.add_row("tight floor, ratio", f"p50 {_duration(found.tight_floor_s)}, {found.tight_ratio:.2f}")
    table.add_row("peak memory of the server", _mib(found.server_rss_mib))
    table.add_row("peak memory of the largest client", _mib(found.client_rss_mib))
    table.add_row("peak memory of the broker", _mib(found.broker_rss_mib))
    table.add_row("server sends, per round", _mib(found.server_egress_mib_per_round))
    table.add_row("server receives, per round", _mib(found.server_ingress_mib_per_round))
    console_for_tables().print(table)
    typer.echo("floor: bare aiormq moves the same bytes through the same kinds of queues, and nothing else is done;")
    typer.echo("the tight floor also keeps its subscriptions open, and reads a model before it is asked to")


def _seconds(spread: Spread) -> str:
    return f"p50 {_duration(spread.p50)}, p95 {_duration(spread.p95)}"


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _mib(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f} MiB"

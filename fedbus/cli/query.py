"""`fedbus query`: figures of the clients' data, which stay where they are."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbus.analytics.result import Bins, QueryResult, Summary, Top
from fedbus.analytics.run import query as ask_clients
from fedbus.analytics.statistics import (
    QUARTILES,
    Count,
    Describe,
    Extremes,
    Histogram,
    Mean,
    Quantiles,
    Statistic,
    TopValues,
    Variance,
)
from fedbus.app import App, check_exists, load_app
from fedbus.cli.options import (
    AppReference,
    Broker,
    Bundle,
    Debug,
    Json,
    LogJson,
    Plaintext,
    access_of,
    load_bundle,
    log_level,
    run_async,
)
from fedbus.cli.tables import console_for_tables
from fedbus.errors import FedbusError, UsageError, one_line
from fedbus.observe import events as o
from fedbus.observe.logs import log_event, set_up
from fedbus.simulation.processes import query_federation

_BAR: Final = 40
_MOST_CHARS: Final = 40

_Columns: TypeAlias = list[str] | None


def _columns(name: str, metavar: str, text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(name, metavar=metavar, help=text)
    return option


def query(
    reference: AppReference,
    count: Annotated[_Columns, _columns("--count", "COLUMNS", "Records with and without a value.")] = None,
    mean: Annotated[_Columns, _columns("--mean", "COLUMNS", "Sum and mean; COLUMNS: age,chol.")] = None,
    variance: Annotated[_Columns, _columns("--variance", "COLUMNS", "Mean and standard deviation.")] = None,
    extremes: Annotated[_Columns, _columns("--extremes", "COLUMNS", "Lowest and highest value.")] = None,
    quantiles: Annotated[_Columns, _columns("--quantiles", "COLUMN[:Q,...]", "Exact ones; the quartiles.")] = None,
    histogram: Annotated[
        _Columns, _columns("--histogram", "COLUMN[:BINS[:LOW,HIGH]]", "So many bins (10); or COLUMN:EDGE,EDGE,...")
    ] = None,
    top: Annotated[_Columns, _columns("--top", "COLUMN[:K]", "The K (10) most frequent values.")] = None,
    describe: Annotated[
        _Columns, _columns("--describe", "COLUMNS", "What suits each; without any option, that of all columns.")
    ] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="COLUMN", help="For each value of it, too.")] = None,
    broker: Broker = None,
    bundle: Bundle = None,
    plaintext: Plaintext = False,
    clients: Annotated[
        int | None, typer.Option("--clients", min=1, max=1000, help="Start so many client processes, for a try.")
    ] = None,
    virtual_clients: Annotated[
        int, typer.Option("--virtual-clients", min=0, help="Clients without a process, for 'fedbus worker' to play.")
    ] = 0,
    wait_for: Annotated[
        int | None, typer.Option("--wait-for", metavar="N", min=1, help="Begin once N clients are there.")
    ] = None,
    min_clients: Annotated[
        int, typer.Option("--min-clients", min=1, help="What fewer clients contribute to is not shown.")
    ] = 2,
    min_count: Annotated[
        int, typer.Option("--min-count", min=1, help="A client leaves out cells of fewer records.")
    ] = 5,
    timeout_s: Annotated[
        float, typer.Option("--timeout", metavar="S", min=0.1, help="Seconds for clients to come, and to answer.")
    ] = 60.0,
    as_json: Json = False,
    log_json: LogJson = False,
    debug: Debug = False,
) -> None:
    """Ask the clients of APP about their data: only sums leave them. COLUMNS are names with commas between them.

    It takes the place of a server: clients that wait for one answer (their method `query` gives the columns), and wait
    for the next one. Without --broker it uses the node that 'fedbus broker start' left running on this machine; with
    --clients it starts clients, and a private node.
    """
    wanted = [
        *(Count(name) for name in _names(count)),
        *(Mean(name) for name in _names(mean)),
        *(Variance(name) for name in _names(variance)),
        *(Extremes(name) for name in _names(extremes)),
        *map(_quantiles, quantiles or []),
        *map(_histogram, histogram or []),
        *map(_top, top or []),
        *(Describe(name) for name in _names(describe)),
    ] or [Describe()]

    questions = functools.partial(
        ask_clients,
        ask=wanted,
        by=by,
        min_clients=min_clients,
        min_count=min_count,
        timeout_s=timeout_s,
        virtual_clients=virtual_clients,
    )
    with _progress(is_quiet=not (debug or log_json), log_json=log_json) as observers:
        if clients is None:
            access = access_of(broker, load_bundle(bundle, "server"))
            result = run_async(questions(load_app(reference), broker=access, wait_for=wait_for, observers=observers))
        else:
            if bundle is not None:
                raise UsageError("--clients is for a try on this machine: give --broker, or no broker at all")
            result = _among_processes(reference, clients, broker, questions, observers)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        show(result)


def _among_processes(
    reference: str,
    clients: int,
    broker: str | None,
    questions: Callable[..., Coroutine[Any, Any, QueryResult]],
    observers: Sequence[o.Observe],
) -> QueryResult:
    """A federation that lives as long as the query; of a failure the clients' logs stay."""
    check_exists(reference)
    folder = Path(tempfile.mkdtemp(prefix="fedbus-query-"))

    def ask(app: App, url: str) -> Coroutine[Any, Any, QueryResult]:
        return questions(app, broker=url, wait_for=clients, observers=observers)

    try:
        result = run_async(
            query_federation(reference, ask, num_clients=clients, broker=broker, log_dir=folder / "logs")
        )
    except FedbusError:
        if not any(folder.rglob("*.log")):
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return result


# ---- what is asked ---------------------------------------------------------------------------------------------------


def _names(given: list[str] | None) -> list[str]:
    return [name for text in given or [] for name in text.split(",") if name]


def _numbers(text: str) -> list[float] | None:
    """Numbers with commas between them; None when it is something else, such as the end of a column's name."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError:
        return None


def _split(text: str) -> tuple[str, list[float] | None]:
    """A column, and the numbers behind its last colon."""
    column, colon, behind = text.rpartition(":")
    numbers = _numbers(behind) if colon else None
    return (text, None) if numbers is None else (column, numbers)


def _whole(option: str, text: str, number: float) -> int:
    if number != int(number):
        raise UsageError(f"{option} {text}: {number:g} is no whole number")
    return int(number)


def _quantiles(text: str) -> Statistic:
    column, shares = _split(text)
    return Quantiles(column, QUARTILES if shares is None else shares)


def _top(text: str) -> Statistic:
    column, numbers = _split(text)
    if numbers is None:
        return TopValues(column)
    if len(numbers) > 1:
        raise UsageError(f"--top {text}: give one number of values")
    return TopValues(column, _whole("--top", text, numbers[0]))


def _histogram(text: str) -> Statistic:
    column, numbers = _split(text)
    if numbers is None:
        return Histogram(column)
    column, bins = _split(column)
    if bins is None:
        is_count = len(numbers) == 1
        return Histogram(column, _whole("--histogram", text, numbers[0]) if is_count else numbers)
    if len(numbers) != 2 or len(bins) != 1:
        raise UsageError(f"--histogram {text}: COLUMN:BINS:LOW,HIGH is due")
    return Histogram(column, _whole("--histogram", text, bins[0]), (numbers[0], numbers[1]))


# ---- meanwhile -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(*, is_quiet: bool, log_json: bool) -> Iterator[list[o.Observe]]:
    """A line on stderr that says how far it is, or all events when they are wanted."""
    if not is_quiet:
        set_up(sys.stderr, as_json=log_json, level=log_level())
        yield [log_event]
        return
    set_up(None, level=log_level())
    console = Console(stderr=True)
    if not console.is_terminal:
        yield []
        return
    here: set[str] = set()
    with console.status("waiting for clients") as status:

        def observe(event: object) -> None:
            match event:
                case o.MemberJoined():
                    here.add(event.client_id)
                case o.MemberLost():
                    here.discard(event.client_id)
                case o.RoundOpened():
                    status.update(f"{_plural(len(here), 'client')}, question {event.round}")
                    return
                case _:
                    return
            status.update(f"waiting for clients: {len(here)} here")

        yield [observe]


# ---- the result ------------------------------------------------------------------------------------------------------


def show(result: QueryResult) -> None:
    """Print it for people."""
    console = console_for_tables()
    rows = list(_rows(result))
    console.print(_table(result, rows))
    for column, group, summary in rows:
        title = _title(result, column, group)
        if summary.histogram is not None:
            console.print(Text(f"\n{title}: histogram", style="bold"), _bars(summary.histogram), sep="\n")
        if summary.top is not None:
            console.print(Text(f"\n{title}: top values", style="bold"), _top_table(summary.top), sep="\n")
    console.print()
    for line in _footnotes(result, rows):
        console.print(Text(line))


def _rows(result: QueryResult) -> Iterator[tuple[str, str | None, Summary]]:
    for column, summary in result.items():
        yield column, None, summary
        for value, group in (summary.groups or {}).items():
            yield column, _shown(value), group


def _title(result: QueryResult, column: str, group: str | None) -> str:
    """Names come from the clients, and may be anything."""
    return _shown(column) if group is None else f"{_shown(column)}, {result.by} {group}"


def _table(result: QueryResult, rows: Sequence[tuple[str, str | None, Summary]]) -> Table:
    """A line for each column and group; a figure that nobody asked for has no place."""
    shares = sorted({share for *_, summary in rows for share in summary.quantiles or {}})
    names = [name for name in ("mean", "std", "min") if any(getattr(summary, name) is not None for *_, summary in rows)]
    has_max = any(summary.max is not None for *_, summary in rows)
    heads = ["clients", "count", "missing", *names, *(f"{100 * share:g} %" for share in shares), *["max"] * has_max]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("column", *([result.by] if result.by is not None else [])):
        table.add_column(Text(head), no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for column, group, summary in rows:
        figures: list[object] = [summary.clients, summary.count, summary.missing]
        figures += [getattr(summary, name) for name in names]
        figures += [(summary.quantiles or {}).get(share) for share in shares]
        figures += [summary.max] * has_max
        where = [_shown(column)] if result.by is None else [_shown(column), "" if group is None else group]
        table.add_row(*map(Text, where), *("" if value is None else _figure(value) for value in figures))
    return table


def _bars(histogram: Bins) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    edges = [_figure(edge) for edge in histogram.edges]
    lines = [(f"{low} to {high}", count) for low, high, count in zip(edges, edges[1:], histogram.counts, strict=False)]
    lines = [*[("below", histogram.below)] * (histogram.below > 0), *lines]
    lines += [("above", histogram.above)] * (histogram.above > 0)
    most = max([1, *(count for _, count in lines)])
    for name, count in lines:
        table.add_row(name, str(count), "█" * round(_BAR * count / most))
    return table


def _top_table(top: Top) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for value, count in top.values:
        table.add_row(Text(_shown(value)), str(count))
    return table


def _footnotes(result: QueryResult, rows: Sequence[tuple[str, str | None, Summary]]) -> Iterator[str]:
    for column, group, summary in rows:
        where = _title(result, column, group)
        notes = [*([f"not shown: {summary.hidden}"] if summary.hidden else []), *summary.notes]
        if summary.not_at:
            notes.append(f"no such column at {', '.join(summary.not_at)}")
        if summary.top is not None and not summary.top.is_exact:
            notes.append(f"top values: one may be missing, or a count too low, by {summary.top.off_by} at most")
        yield from (f"{where}: {note}" for note in notes)
    for client_id, reason in result.left_out.items():
        yield f"without {client_id}: {reason}"
    if result.min_count > 1:
        yield f"clients left out cells of fewer than {result.min_count} records: counts are lower bounds"
    yield f"{_plural(len(result.clients), 'client')}, {_plural(result.rounds, 'question')}, {result.seconds:.1f} s"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _figure(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shown(value: object) -> str:
    text = one_line(str(value), _MOST_CHARS + 1)
    return text if len(text) <= _MOST_CHARS else f"{text[: _MOST_CHARS - 3]}..."

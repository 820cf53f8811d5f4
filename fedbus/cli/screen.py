"""Where a command's words go: a live board on a terminal, plain lines elsewhere, JSON where it is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedbus.cli.options import log_level
from fedbus.cli.tables import console_for_tables
from fedbus.errors import FedbusError, RunFailed
from fedbus.observe import events as o
from fedbus.observe.curves import save_curves
from fedbus.observe.logs import Clock, also_into, log_event, number, set_up
from fedbus.observe.progress import LiveProgress
from fedbus.server.checkpoint import RunFolder
from fedbus.server.history import Evaluation, History, plain

_MAX_CLIENTS = 24


@dataclass
class Screen:
    """`observers` take the events; `announce` puts in a line of the command's own."""

    observers: list[o.Observe]
    announce: Callable[[str], None]


@contextlib.contextmanager
def screen(
    run_dir: Path, *, as_json: bool, log_json: bool, resume: bool = False, clock: Clock | None = None
) -> Iterator[Screen]:
    """Show a run whose folder is `run_dir`, and keep its log there. With `as_json` stdout is left to the result.

    With a `clock` the times shown are those of a simulation.
    """
    is_new = not run_dir.exists()
    RunFolder(run_dir, resume=resume)  # before anything is started
    console = Console(stderr=as_json)
    if log_json or not console.is_terminal:
        stream = sys.stderr if as_json or log_json else sys.stdout
        set_up(stream, as_json=log_json, level=log_level(), clock=clock)
        also_into(run_dir / "server.log", clock)
        with _folder_named(run_dir, is_new=is_new):
            yield Screen(observers=[log_event], announce=_say(log_json, to_stderr=as_json))
        return
    set_up(None, level=log_level())
    also_into(run_dir / "server.log", clock)
    with _folder_named(run_dir, is_new=is_new), LiveProgress(console, clock) as progress:
        yield Screen(observers=[progress.observe, log_event], announce=progress.board.announce)


@contextlib.contextmanager
def _folder_named(run_dir: Path, *, is_new: bool) -> Iterator[None]:
    """A run that fails leaves its folder: say where. One that never began leaves none."""
    try:
        yield
    except RunFailed as exc:
        if not run_dir.exists():
            raise
        raise RunFailed(f"{exc} (run folder: {run_dir})") from exc
    except FedbusError:
        if not any((run_dir / name).exists() for name in ("history.json", "ledger.sqlite")):
            (run_dir / "server.log").unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):
                    run_dir.rmdir()
        raise


def _say(log_json: bool, *, to_stderr: bool) -> Callable[[str], None]:
    def announce(text: str) -> None:
        if log_json:
            log_event(o.Announcement(text=text))
        else:
            typer.echo(f"--> {text}", err=to_stderr)

    return announce


def result(history: History, run_dir: Path) -> dict[str, object]:
    """What `--json` prints of a finished run."""
    summary: dict[str, object] = {
        "rounds": len(history.rounds),
        "clients_joined": len(history.clients_joined),
        "clients_lost": len(set(history.clients_lost)),
        "updates": history.updates,
        "seconds": history.seconds,
    }
    for where, evaluation in (("central", history.central), ("federated", history.federated)):
        if evaluation is not None:
            summary[where] = {"loss": evaluation.loss, **evaluation.metrics}
    summary["clients"] = {name: dataclasses.asdict(record) for name, record in sorted(history.clients.items())}
    summary["run_dir"] = str(run_dir)
    return summary


def report(
    history: History, run_dir: Path, *, as_json: bool, took: str = "", more: Mapping[str, object] | None = None
) -> None:
    """Tell the result of a run, for people or as one JSON line.

    `took` says how long it took where `history.seconds` would not; `more` stands beside the rest in the JSON.
    """
    if as_json:
        typer.echo(json.dumps(plain({**result(history, run_dir), **(more or {})})))
        return
    rounds = len(history.rounds)
    took = took or f"{history.seconds:.1f} s"
    typer.echo(f"{rounds} round{'s' * (rounds != 1)}, {history.updates} updates in {took}")
    for round_, evaluation in _last_evaluations(history):
        count = evaluation.clients
        by = "central" if count is None else f"by {count} client{'s' * (count != 1)}"
        metrics = {"loss": evaluation.loss, **evaluation.metrics}
        figures = ", ".join(f"{name} {number(value)}" for name, value in metrics.items())
        typer.echo(f"model of round {round_}, {by}: {figures}")
    show_clients(history)
    typer.echo(f"run folder: {run_dir}")


def show_clients(history: History) -> None:
    """A line for each client: what it did in the run."""
    if not history.clients:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("client", no_wrap=True)
    for name in ("updates", "late", "most late", "mean s", "failed", "stopped", "lost", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = sorted(history.clients.items())
    for name, record in rows[:_MAX_CLIENTS]:
        mean_s = "" if record.mean_seconds is None else f"{record.mean_seconds:.2f}"
        table.add_row(
            Text(name),  # not markup
            *(f"{count}" for count in (record.folded, record.late, record.max_staleness)),
            mean_s,
            *(f"{count}" for count in (record.failed, record.stopped, record.lost)),
            f"{record.nbytes / (1 << 20):.1f}",
        )
    console_for_tables().print(table)
    if len(rows) > _MAX_CLIENTS:
        typer.echo(f"and {len(rows) - _MAX_CLIENTS} more clients, in history.json")


def _last_evaluations(history: History) -> Iterator[tuple[int, Evaluation]]:
    for kind in ("central", "federated"):
        found = [(record.round, getattr(record, kind)) for record in history.rounds if getattr(record, kind)]
        yield from found[-1:]


def draw_curves(history: History, run_dir: Path) -> None:
    """Leave curves.png in the run folder, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is not None:
        save_curves(history, run_dir / "curves.png")

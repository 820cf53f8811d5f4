"""Where a command's words go: a live board on a terminal, plain lines elsewhere, JSON where it is asked for."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from fedbus.cli.options import log_level
from fedbus.observe import events as o
from fedbus.observe.logs import log_event, number, set_up
from fedbus.observe.progress import LiveProgress
from fedbus.server.history import History, plain


@dataclass
class Screen:
    """`observers` take the events; `announce` puts in a line of the command's own."""

    observers: list[o.Observe]
    announce: Callable[[str], None]


@contextlib.contextmanager
def screen(*, as_json: bool, log_json: bool) -> Iterator[Screen]:
    """Show a run. With `as_json` standard output is left to the result."""
    console = Console(stderr=as_json)
    if log_json or not console.is_terminal:
        set_up(sys.stderr if as_json or log_json else sys.stdout, as_json=log_json, level=log_level())
        yield Screen(observers=[log_event], announce=_say(log_json, to_stderr=as_json))
        return
    with LiveProgress(console) as progress:
        yield Screen(observers=[progress.observe], announce=progress.board.announce)


def _say(log_json: bool, *, to_stderr: bool) -> Callable[[str], None]:
    def announce(text: str) -> None:
        if log_json:
            typer.echo(json.dumps({"event": "announcement", "message": text}), err=True)
        else:
            typer.echo(f"--> {text}", err=to_stderr)

    return announce


def result(history: History, run_dir: Path | None) -> dict[str, object]:
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
    summary["run_dir"] = None if run_dir is None else str(run_dir)
    return summary


def report(history: History, run_dir: Path | None, *, as_json: bool) -> None:
    """Tell the result of a run, for people or as one JSON line."""
    if as_json:
        typer.echo(json.dumps(plain(result(history, run_dir))))
        return
    evaluation = history.central or history.federated
    figures = ""
    if evaluation is not None:
        metrics = {"loss": evaluation.loss, **evaluation.metrics}
        figures = ": " + ", ".join(f"{name} {number(value)}" for name, value in metrics.items())
    rounds = f"{len(history.rounds)} rounds, {history.updates} updates in {history.seconds:.1f} s"
    typer.echo(f"{rounds}{figures}" + (f"; run folder {run_dir}" if run_dir else ""))

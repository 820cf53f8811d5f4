"""`fedbus demo`: digits, ten client processes, one of which dies and an eleventh of which comes late."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Callable

import typer

from fedbus.app import App, load_app
from fedbus.cli.options import Broker, Debug, Json, LogJson, Plaintext, RunDir, run_async
from fedbus.cli.screen import result, screen
from fedbus.errors import UsageError
from fedbus.observe import events as o
from fedbus.observe.curves import save_curves
from fedbus.server.history import plain
from fedbus.simulation.processes import ClientProcesses, Director, client_names, new_run_dir, run_federation

_REFERENCE = "fedbus.examples.digits:demo_app"
_CLIENTS = 10
_KILL_IN_ROUND = 3
_JOIN_IN_ROUND = 5


def demo(
    broker: Broker = None,
    plaintext: Plaintext = False,
    run_dir: RunDir = None,
    as_json: Json = False,
    log_json: LogJson = False,
    debug: Debug = False,
) -> None:
    """Train one model on digits that ten client processes do not share.

    Through a private RabbitMQ (or --broker URL). One client is killed in the middle of a round and another one
    arrives late; the run goes on. Ends with the accuracy on held-out digits and a run folder.
    """
    missing = [name for name in ("torch", "sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {', '.join(missing)}: pip install 'fedbus[demo]'")
    folder = run_dir or new_run_dir()
    with screen(folder, as_json=as_json, log_json=log_json) as shown:
        shown.announce("starting a private RabbitMQ and ten client processes" if broker is None else "starting clients")
        director = _DemoDirector(shown.announce)
        history = run_async(
            run_federation(
                _REFERENCE,
                _app,
                num_clients=_CLIENTS,
                num_partitions=_CLIENTS + 1,
                broker=broker,
                run_dir=folder,
                observers=shown.observers,
                director=director,
            )
        )
        save_curves(history, folder / "curves.png")
    central = history.central
    accuracy = central.metrics.get("accuracy") if central else None
    if as_json:
        typer.echo(json.dumps(plain({**result(history, folder), "test_accuracy": accuracy})))
        return
    lost, late = director.killed, director.newcomer
    typer.echo(f"{lost} was killed in round {_KILL_IN_ROUND}; {late} joined in round {director.joined_in_round}.")
    typer.echo(
        f"test accuracy {accuracy:.4f} after {len(history.rounds)} rounds, {history.updates} updates, "
        f"{history.seconds:.1f} s of training"
    )
    typer.echo(f"run folder: {folder} (history.json, model.safetensors, curves.png, logs/)")


def _app() -> App:
    return load_app(_REFERENCE)


class _DemoDirector(Director):
    """Kills one client as soon as it has its task in one round, starts another one in a later round."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._starting: asyncio.Task[None] | None = None
        self.killed = ""
        self.newcomer = ""
        self.joined_in_round = 0

    def begin(self, clients: ClientProcesses, broker: str, num_partitions: int) -> None:
        super().begin(clients, broker, num_partitions)
        self.newcomer = client_names(num_partitions)[-1]

    def observe(self, event: object) -> None:
        match event:
            case o.RoundOpened() if event.round >= _KILL_IN_ROUND and not self.killed:
                self.killed = event.cohort[0]
                self.clients.kill(self.killed)
                self._announce(f"SIGKILL to {self.killed} in the middle of round {event.round}")
            case o.RoundOpened() if event.round >= _JOIN_IN_ROUND and self._starting is None:
                self._announce(f"starting {self.newcomer}, which was not there from the beginning")
                self._starting = asyncio.ensure_future(
                    self.clients.spawn(
                        self.newcomer,
                        broker=self.broker,
                        partition=self.num_partitions - 1,
                        num_partitions=self.num_partitions,
                    )
                )
            case o.MemberJoined() if event.client_id == self.newcomer:
                self.joined_in_round = event.round
            case _:
                pass

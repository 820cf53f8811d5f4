"""The `fedbus` command: one line for every error, and the exit code that goes with it."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fedbus.api import join, serve, work
from fedbus.app import App, check_exists, load_app
from fedbus.bus.bundle import Bundle as LoadedBundle
from fedbus.cli.bench import bench_app
from fedbus.cli.broker import broker_app
from fedbus.cli.demo import demo
from fedbus.cli.options import (
    AppReference,
    Broker,
    Bundle,
    Debug,
    Json,
    LogJson,
    Metrics,
    Plaintext,
    Resume,
    RunDir,
    access_of,
    interrupt_as_error,
    is_debug,
    is_json,
    load_bundle,
    log_level,
    run_async,
)
from fedbus.cli.query import query
from fedbus.cli.screen import draw_curves, report, screen
from fedbus.cli.simulate import simulate
from fedbus.cli.status import status
from fedbus.errors import FedbusError, UsageError, one_line
from fedbus.observe.logs import log_event, set_up
from fedbus.simulation.processes import new_run_dir, run_federation

app = typer.Typer(
    name="fedbus",
    help="Federated learning whose server and clients meet only on a message broker.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(broker_app)
app.add_typer(bench_app)
app.command()(demo)
app.command()(simulate)
app.command()(status)
app.command()(query)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"fedbus {installed_version('fedbus')}")
        raise typer.Exit


@app.callback()
def fedbus(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Federated learning whose server and clients meet only on a message broker."""


@app.command()
def run(
    reference: AppReference,
    clients: Annotated[int, typer.Option("--clients", min=1, max=1000, help="Client processes to start.")] = 2,
    broker: Broker = None,
    plaintext: Plaintext = False,
    run_dir: RunDir = None,
    as_json: Json = False,
    log_json: LogJson = False,
    debug: Debug = False,
) -> None:
    """Run a whole federation of APP on this machine: a private RabbitMQ, the server, client processes."""
    folder = run_dir or new_run_dir()

    check_exists(reference)

    def load() -> App:
        loaded = load_app(reference)
        _check_enough(loaded, clients)
        return loaded

    with screen(folder, as_json=as_json, log_json=log_json) as shown:
        processes = "one client process" if clients == 1 else f"{clients} client processes"
        shown.announce(f"starting {processes}" + (" and a private RabbitMQ" if broker is None else ""))
        history = run_async(
            run_federation(
                reference, load, num_clients=clients, broker=broker, run_dir=folder, observers=shown.observers
            )
        )
        draw_curves(history, folder)
    report(history, folder, as_json=as_json)


def _check_enough(app: App, clients: int) -> None:
    if app.rounds.start_clients > clients:
        raise UsageError(
            f"the app waits for {app.rounds.start_clients} clients before its first round: "
            f"give --clients {app.rounds.start_clients} or more, or lower min_fit_clients"
        )


@app.command()
def server(
    reference: AppReference,
    broker: Broker = None,
    bundle: Bundle = None,
    plaintext: Plaintext = False,
    run_dir: RunDir = None,
    resume: Resume = False,
    virtual_clients: Annotated[
        int, typer.Option("--virtual-clients", min=0, help="Clients without a process, for 'fedbus worker' to play.")
    ] = 0,
    keep_clients: Annotated[
        bool, typer.Option("--keep-clients", help="At the end clients wait for the next server, or query.")
    ] = False,
    metrics: Metrics = None,
    as_json: Json = False,
    log_json: LogJson = False,
    debug: Debug = False,
) -> None:
    """Run the server of APP, until its rounds are done.

    Without --broker it uses the node that 'fedbus broker start' left running on this machine.
    """
    if resume and run_dir is None:
        raise UsageError("--resume needs --run-dir: the folder of the run that is to go on")
    loaded = load_app(reference)
    access = access_of(broker, load_bundle(bundle, "server"))
    folder = run_dir or new_run_dir()
    with screen(folder, as_json=as_json, log_json=log_json, resume=resume) as shown:
        history = run_async(
            serve(
                loaded,
                broker=access,
                run_dir=folder,
                resume=resume,
                virtual_clients=virtual_clients,
                keeps_clients=keep_clients,
                observers=shown.observers,
                metrics=metrics,
            )
        )
        draw_curves(history, folder)
    report(history, folder, as_json=as_json)


@app.command()
def client(
    reference: AppReference,
    client_id: Annotated[
        str | None, typer.Option("--id", metavar="NAME", help="The client's stable name; a bundle has it.")
    ] = None,
    broker: Broker = None,
    bundle: Bundle = None,
    plaintext: Plaintext = False,
    partition: Annotated[int, typer.Option("--partition", min=0, help="Which part of split data is this one's.")] = 0,
    num_partitions: Annotated[int, typer.Option("--num-partitions", min=1, help="Into how many it is split.")] = 1,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="DIR",
            help="Where it keeps what its method must remember, beyond a restart.",
            envvar="FEDBUS_STATE",
        ),
    ] = None,
    metrics: Metrics = None,
    as_json: Json = False,
    log_json: LogJson = False,
    debug: Debug = False,
) -> None:
    """Take part in a run of APP as the client NAME, until the run ends; waits for the server if need be.

    Without --broker it uses the node that 'fedbus broker start' left running on this machine.
    """
    if partition >= num_partitions:
        raise UsageError(f"--partition {partition} of --num-partitions {num_partitions}: they count from 0")
    loaded_bundle = load_bundle(bundle, "client")
    client_id = _client_id(client_id, loaded_bundle)
    loaded = load_app(reference)
    access = access_of(broker, loaded_bundle)
    set_up(sys.stderr if as_json or log_json else sys.stdout, as_json=log_json, level=log_level())
    finished = run_async(
        join(
            loaded,
            broker=access,
            client_id=client_id,
            partition=partition,
            num_partitions=num_partitions,
            state_dir=state_dir,
            observers=[log_event],
            metrics=metrics,
        )
    )
    if as_json:
        typer.echo(json.dumps({"client_id": client_id, "finished": finished}))


def _client_id(given: str | None, bundle: LoadedBundle | None) -> str:
    known = bundle.client_id if bundle else None
    if given is not None and known not in (None, given):
        raise UsageError(f"the bundle is that of {known}, not of {given}: leave --id out, or take the other's bundle")
    client_id = given or known
    if client_id is None:
        raise UsageError("say who this client is: --id NAME, or --bundle FILE")
    return client_id


@app.command()
def worker(
    reference: AppReference,
    broker: Broker = None,
    bundle: Bundle = None,
    plaintext: Plaintext = False,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Tasks at a time, in a thread each.")] = 1,
    grace_s: Annotated[
        float,
        typer.Option("--grace", min=0, help="Seconds for the tasks in hand, at SIGTERM; then they are given back."),
    ] = 30.0,
    until_idle_s: Annotated[
        float | None, typer.Option("--until-idle", min=0, help="End once no task has come for so many seconds.")
    ] = None,
    metrics: Metrics = None,
    as_json: Json = False,
    log_json: LogJson = False,
    debug: Debug = False,
) -> None:
    """Do the tasks of the virtual clients of APP's server, beside any number of other workers.

    The server enrols them: 'fedbus server APP --virtual-clients N'. A worker waits for it, and stays for the next run,
    until SIGTERM. Without --broker it uses the node that 'fedbus broker start' left running on this machine.
    """
    loaded = load_app(reference)
    access = access_of(broker, load_bundle(bundle, "worker"))
    set_up(sys.stderr if as_json or log_json else sys.stdout, as_json=log_json, level=log_level())
    done = run_async(
        work(
            loaded,
            broker=access,
            slots=slots,
            grace_s=grace_s,
            until_idle_s=until_idle_s,
            observers=[log_event],
            metrics=metrics,
        )
    )
    if as_json:
        typer.echo(json.dumps({"tasks": done}))


def main() -> NoReturn:
    """What the console script runs. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    interrupt_as_error()
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # what it complains of reaches the user as ours
    try:
        app()
    except FedbusError as exc:
        _fail(str(exc), exc, 2 if isinstance(exc, UsageError) else 1)
    except KeyboardInterrupt as exc:
        _fail("interrupted", exc, 1)
    except Exception as exc:  # noqa: BLE001  # a bug of ours: still one line, and how to see more
        _fail(f"internal error: {type(exc).__name__}: {exc} (run it again with --debug and report it)", exc, 1)
    sys.exit(0)


def _fail(message: str, exc: BaseException, code: int) -> NoReturn:
    if is_debug():
        traceback.print_exception(exc)
    if is_json():
        typer.echo(json.dumps({"error": one_line(message, 2000), "exit_code": code}))
    sys.stdout.flush()
    sys.stderr.write(f"fedbus: {one_line(message, 2000)}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()

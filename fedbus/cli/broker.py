"""`fedbus broker`: the private node that outlives its terminal."""

from __future__ import annotations

import json
import os
import time
from typing import Annotated, Any

import typer

from fedbus.bus.node import NodeState, detached_state, start_detached, stop_detached

broker_app = typer.Typer(name="broker", help="Start, stop and look at a private RabbitMQ node.", no_args_is_help=True)

_Name = Annotated[str, typer.Option("--name", help="Which node, where there are several.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object (the URL holds the password).")]
_ShowUrl = Annotated[bool, typer.Option("--show-url", help="Print the URL, password included.")]
_Port = Annotated[int | None, typer.Option("--port", help="AMQP port on 127.0.0.1; default: a free one.")]


@broker_app.command()
def start(port: _Port = None, name: _Name = "default", as_json: _Json = False, show_url: _ShowUrl = False) -> None:
    """Start the node, or say where it runs already."""
    began = time.time()
    state = start_detached(name=name, port=port)
    if as_json:
        _echo_json(state)
        return
    verb = "started" if state.started_at >= began else "is already running"
    typer.echo(f"broker {name!r} {verb} on 127.0.0.1:{state.port} (pid {state.pid}, data in {state.data_dir})")
    if name == "default":
        typer.echo("other terminals of this user find it by themselves; stop it with: fedbus broker stop")
    else:
        typer.echo(f"stop it with: fedbus broker stop --name {name}; its URL: fedbus broker status --show-url")
    if show_url:
        typer.echo(state.url)


@broker_app.command()
def stop(name: _Name = "default", as_json: _Json = False) -> None:
    """Stop the node; its data stays for the next start."""
    stopped = stop_detached(name)
    if as_json:
        typer.echo(json.dumps({"running": False, "stopped": stopped}))
    else:
        typer.echo(f"broker {name!r} stopped" if stopped else f"broker {name!r} is not running")


@broker_app.command()
def status(name: _Name = "default", as_json: _Json = False, show_url: _ShowUrl = False) -> None:
    """Say whether the node runs: exit code 0 when it does, 1 when not."""
    state = detached_state(name)
    if as_json:
        _echo_json(state)
    elif state is None:
        typer.echo(f"broker {name!r} is not running; start it with: fedbus broker start")
    else:
        typer.echo(f"broker {name!r} runs on 127.0.0.1:{state.port} (pid {state.pid}, data in {state.data_dir})")
        typer.echo(f"since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(state.started_at))}")
    if state is not None and show_url and not as_json:
        typer.echo(state.url)
    if state is None:
        raise typer.Exit(1)


def _echo_json(state: NodeState | None) -> None:
    fields: dict[str, Any] = {"url": None, "port": None, "pid": None, "data_dir": None}
    if state is not None:
        fields = {"url": state.url, "port": state.port, "pid": state.pid, "data_dir": os.fspath(state.data_dir)}
    typer.echo(json.dumps({**fields, "running": state is not None}))

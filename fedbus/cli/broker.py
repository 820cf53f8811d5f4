"""`fedbus broker`: the private node that outlives its terminal."""

from __future__ import annotations

import json
import os
import time
from typing import Annotated, Any

import typer

from fedbus.bus.node import NodeState, detached_folder, detached_state, start_detached, stop_detached
from fedbus.cli.options import set_json
from fedbus.cli.provision import (
    Ca,
    CaKey,
    Certificate,
    Door,
    DoorLogin,
    Hosts,
    Key,
    Listen,
    TlsPort,
    add_provisioning,
    is_provisioned,
    listener_for,
)

broker_app = typer.Typer(
    name="broker", help="A private RabbitMQ node, and who may do what on a broker.", no_args_is_help=True
)

_Name = Annotated[str, typer.Option("--name", help="Which node, where there are several.")]
_Json = Annotated[bool, typer.Option("--json", callback=set_json, help="Print one JSON object, password included.")]
_ShowUrl = Annotated[bool, typer.Option("--show-url", help="Print the URL, password included.")]
_Port = Annotated[int | None, typer.Option("--port", help="AMQP port on 127.0.0.1; default: a free one.")]
_ManagementPort = Annotated[
    int | None, typer.Option("--management-port", min=0, help="Port of the management API on 127.0.0.1; 0: a free one.")
]


@broker_app.command()
def start(
    port: _Port = None,
    name: _Name = "default",
    listen: Listen = None,
    tls_port: TlsPort = 5671,
    hosts: Hosts = None,
    login: DoorLogin = "certificate",
    ca: Ca = None,
    ca_key: CaKey = None,
    certificate: Certificate = None,
    key: Key = None,
    management_port: _ManagementPort = None,
    as_json: _Json = False,
    show_url: _ShowUrl = False,
) -> None:
    """Start the node, or say where it runs already.

    Other machines reach it where --listen says, by TLS alone; 'fedbus broker provision' makes their bundles.
    """
    began = time.time()
    door = Door(
        listen=listen,
        tls_port=tls_port,
        hosts=hosts or (),
        login=login,
        ca=ca,
        ca_key=ca_key,
        certificate=certificate,
        key=key,
    )
    listener = listener_for(detached_folder(name), door)
    state = start_detached(name=name, port=port, listener=listener, management_port=management_port)
    if as_json:
        _echo_json(state)
        return
    verb = "started" if state.started_at >= began else "is already running"
    typer.echo(f"broker {name!r} {verb} on 127.0.0.1:{state.port} (pid {state.pid}, data in {state.data_dir})")
    _echo_doors(state)
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
        _echo_doors(state)
        typer.echo(f"since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(state.started_at))}")
    if state is not None and show_url and not as_json:
        typer.echo(state.url)
    if state is None:
        raise typer.Exit(1)


def _echo_doors(state: NodeState) -> None:
    if state.tls_address is not None:
        typer.echo(f"other machines reach it by TLS at {state.tls_address}, port {state.tls_port}")
    elif is_provisioned(state.data_dir):
        typer.echo("only this machine reaches it, and no member of its federations: start it with --listen ADDRESS")
    if state.management_port is not None:
        typer.echo(f"management API: http://127.0.0.1:{state.management_port}")


def _echo_json(state: NodeState | None) -> None:
    shown = ("url", "port", "tls_address", "tls_port", "management_port", "pid", "data_dir")
    fields: dict[str, Any] = {name: getattr(state, name, None) for name in shown}
    typer.echo(json.dumps({**fields, "running": state is not None}, default=os.fspath))


add_provisioning(broker_app)

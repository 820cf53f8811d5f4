"""The options that several commands share."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fedbus.bus.access import Access, access_to
from fedbus.bus.bundle import Bundle as LoadedBundle
from fedbus.bus.node import detached_state
from fedbus.errors import BrokerUnreachable, RunFailed, UsageError

T = TypeVar("T")


class _Settings:
    debug = False
    json = False


def is_debug() -> bool:
    """Whether --debug was given."""
    return _Settings.debug


def is_json() -> bool:
    """Whether --json was given."""
    return _Settings.json


def _set_debug(value: bool) -> bool:
    _Settings.debug = _Settings.debug or value
    return value


def set_json(value: bool) -> bool:
    _Settings.json = _Settings.json or value
    return value


AppReference = Annotated[str, typer.Argument(metavar="APP", help="module:attr or file.py:attr, a fedbus.App.")]
Broker = Annotated[
    str | None,
    typer.Option("--broker", envvar="FEDBUS_BROKER", metavar="URL", help="amqp://USER:PASSWORD@HOST/VHOST"),
]
Json = Annotated[bool, typer.Option("--json", callback=set_json, help="Print one JSON object as the last line.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Write the log as JSON, one event per line, to stderr.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show details, and the traceback of an error.")
]


Bundle = Annotated[
    Path | None,
    typer.Option("--bundle", envvar="FEDBUS_BUNDLE", metavar="FILE", help="As fedbus broker provision wrote it."),
]


def _set_plaintext(value: bool) -> bool:
    if value:
        os.environ["FEDBUS_PLAINTEXT"] = "1"  # for the processes that we start, too
    return value


Plaintext = Annotated[
    bool,
    typer.Option(
        "--plaintext", callback=_set_plaintext, envvar="FEDBUS_PLAINTEXT", help="Allow amqp:// to another machine."
    ),
]


RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder for history.json and model.safetensors; default: by the time.")
]
Metrics = Annotated[
    str | None,
    typer.Option(
        "--metrics",
        envvar="FEDBUS_METRICS",
        metavar="[HOST:]PORT",
        help="Serve /metrics (Prometheus), /healthz and /livez here; without HOST for this machine only.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run in --run-dir; begin one if it holds none."),
]


def log_level() -> int:
    """What --debug means for the log."""
    return logging.DEBUG if _Settings.debug else logging.INFO


def run_async(story: Coroutine[Any, Any, T]) -> T:
    """asyncio.run, with a Ctrl-C or SIGTERM that nobody else handles as an error like others."""

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await story

    signal.signal(signal.SIGINT, signal.default_int_handler)  # asyncio.run replaces no other
    try:
        return asyncio.run(main())
    except (KeyboardInterrupt, asyncio.CancelledError) as exc:
        raise RunFailed("interrupted") from exc


def interrupt_as_error() -> None:
    """Make Ctrl-C and SIGTERM errors like others, outside of asyncio."""

    def interrupted(*_: object) -> None:
        raise RunFailed("interrupted")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)


def load_bundle(path: Path | None, *roles: str) -> LoadedBundle | None:
    """The bundle given, which must have been made for one of `roles`."""
    if path is None:
        return None
    bundle = LoadedBundle.load(path)
    if bundle.role not in roles:
        raise UsageError(f"the bundle {path} is for a {bundle.role}: this command needs that of a {roles[0]}")
    return bundle


def access_of(broker: str | None, bundle: LoadedBundle | None) -> Access:
    """The way to the broker: by the bundle, or to the URL, or to the node which `fedbus broker start` left running.

    Raises `BrokerUnreachable` when there is none, `UsageError` when there are two.
    """
    if bundle is not None:
        if broker is not None:
            raise UsageError("--broker (FEDBUS_BROKER) and --bundle both name a broker: give one of them")
        return bundle.access
    if broker is not None:
        return access_to(broker)
    state = detached_state("default")
    if state is None:
        raise BrokerUnreachable("no broker runs here: start one with 'fedbus broker start', or give --broker URL")
    return access_to(state.url)

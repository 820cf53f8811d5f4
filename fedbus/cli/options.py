"""The options that several commands share."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from fedbus.bus.node import detached_state
from fedbus.errors import BrokerUnreachable


class _Settings:
    debug = False


def is_debug() -> bool:
    """Whether --debug was given."""
    return _Settings.debug


def _set_debug(value: bool) -> bool:
    _Settings.debug = _Settings.debug or value
    return value


AppReference = Annotated[str, typer.Argument(metavar="APP", help="module:attr or file.py:attr, a fedbus.App.")]
Broker = Annotated[
    str | None,
    typer.Option("--broker", envvar="FEDBUS_BROKER", metavar="URL", help="amqp://user:password@host:5672/vhost"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Write the log as JSON, one event per line, to stderr.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, help="Show details, and the traceback of an error.")
]


def log_level() -> int:
    """What --debug means for the log."""
    return logging.DEBUG if _Settings.debug else logging.INFO


def broker_or_detached(broker: str | None) -> str:
    """The URL given, else that of the node which `fedbus broker start` left running. Raises `BrokerUnreachable`."""
    if broker is not None:
        return broker
    state = detached_state("default")
    if state is None:
        raise BrokerUnreachable("no broker runs here: start one with 'fedbus broker start', or give --broker URL")
    return state.url

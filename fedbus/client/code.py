"""The user's own code as the runtimes call it: what it raises, or returns and must not, is a `ClientCodeError`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from fedbus.app import App
from fedbus.errors import ClientCodeError, one_line
from fedbus.training.base import (
    Client,
    ClientContext,
    as_client,
    check_evaluate_result,
    check_fit_result,
    check_tensors,
)
from fedbus.training.delta import update_delta
from fedbus.training.thread import Caller
from fedbus.types import Config, EvaluateResult, Metrics, Tensors
from fedbus.wire.transfer import Outgoing

_LOGGER = logging.getLogger("fedbus.client")


class Trained(NamedTuple):
    """What a client answers: a delta, or its initial model, ready to travel."""

    outgoing: Outgoing
    num_examples: int
    metrics: Metrics


class UserCode:
    """The `Client` of one context, made when it is needed first.

    Args:
        app: whose `client_fn` makes it.
        context: what `client_fn` is given.
        caller: runs all of it.
    """

    def __init__(self, app: App, context: ClientContext, caller: Caller) -> None:
        self._app = app
        self._context = context
        self._caller = caller
        self._client: Client | None = None

    async def make(self) -> Client:
        """The client; `client_fn` is called once."""
        if self._client is None:
            self._client = as_client(await self._call("client_fn", self._app.client_fn, self._context))
        return self._client

    async def parameters(self) -> Trained:
        """The model to begin with, copied: the client's own arrays may change."""
        client = await self.make()
        parameters = await self._call("get_parameters", client.get_parameters)
        check_tensors("get_parameters", parameters)
        return Trained(Outgoing({name: value.copy() for name, value in parameters.items()}), 0, {})

    async def fit(self, model: Tensors, config: Config) -> Trained:
        """What training from `model` changed."""
        trained: Trained = await self._call("fit", _fit, await self.make(), model, config)
        return trained

    async def evaluate(self, model: Tensors, config: Config) -> EvaluateResult:
        """What `model` is worth on the client's data."""
        client = await self.make()
        return check_evaluate_result(await self._call("evaluate", client.evaluate, model, dict(config)))

    async def _call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return await self._caller.call(what, function, *args)
        except ClientCodeError:
            raise
        except Exception as exc:
            _LOGGER.debug("%s failed", what, exc_info=exc)
            raise ClientCodeError(f"{what} raised {one_line(f'{type(exc).__name__}: {exc}')}") from exc


def _fit(client: Client, model: Tensors, config: Config) -> Trained:
    result = check_fit_result(client.fit(model, dict(config)))
    return Trained(Outgoing(update_delta(model, result.parameters)), result.num_examples, result.metrics)

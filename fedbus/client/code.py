"""The user's own code as the runtimes call it: what it raises, or returns and must not, is a `ClientCodeError`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

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
from fedbus.types import EXTRA, SUMS, Array, Config, EvaluateResult, Metrics, Tensors
from fedbus.wire.compression import Codec
from fedbus.wire.floats import Noise
from fedbus.wire.messages import FitTask
from fedbus.wire.transfer import Outgoing

_LOGGER = logging.getLogger("fedbus.client")


PERSONAL: Final = "personal/"
"""Under this prefix the client's memory holds the tensors that it shares with nobody."""


RESIDUAL: Final = f"{SUMS}residual/"
"""Under this prefix it holds what a codec has left out so far, tensor by tensor."""


class Trained(NamedTuple):
    """What a client answers: a delta, or its initial model, ready to travel; and what it remembers of it."""

    outgoing: Outgoing
    num_examples: int
    metrics: Metrics
    memory: dict[str, Array]


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
        context.is_personal = app.is_personal
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
        return Trained(Outgoing({name: value.copy() for name, value in parameters.items()}), 0, {}, {})

    async def answer(self, task: FitTask, model: Tensors, memory: Tensors) -> Trained:
        """What the task asks for: what training from `model` changed, or what the client's data say to a query.

        `model`: as it came, with what was broadcast beside it; `memory`: what the client remembers.
        """
        client = await self.make()
        parameters = self._prepare(model, memory)
        if task.purpose == "query":
            answered: Trained = await self._call(task.purpose, _query, client, parameters, task)
            return answered
        trained: Trained = await self._call(task.purpose, self._fit, client, parameters, task, memory)
        return trained

    async def evaluate(self, model: Tensors, config: Config, memory: Tensors) -> EvaluateResult:
        """What `model` is worth on the client's data."""
        client = await self.make()
        parameters = self._prepare(model, memory)
        return check_evaluate_result(await self._call("evaluate", client.evaluate, parameters, dict(config)))

    def _prepare(self, model: Tensors, memory: Tensors) -> Tensors:
        """Lay everything ready for a task: the model as this client sees it."""
        self._context.memory = dict(memory)
        beside = {name: value for name, value in model.items() if name.startswith(EXTRA)}
        self._context.broadcast = {name.removeprefix(EXTRA): value for name, value in beside.items()}
        if not beside and not self._app.personal:
            return model
        return {name: memory.get(PERSONAL + name, value) for name, value in model.items() if name not in beside}

    def _fit(self, client: Client, parameters: Tensors, task: FitTask, before: Tensors) -> Trained:
        result = check_fit_result(client.fit(parameters, dict(task.config)))
        personal = {name: value for name, value in result.parameters.items() if self._app.is_personal(name)}
        shared = {name: value for name, value in result.parameters.items() if name not in personal}
        delta = update_delta(parameters, shared)
        update_delta(parameters, personal)  # raises when it cannot be what it stands for
        memory = self._context.memory | {PERSONAL + name: np.array(value) for name, value in personal.items()}
        beside = {EXTRA + name: value for name, value in result.extra.items()}
        residual = {name.removeprefix(RESIDUAL): value for name, value in before.items() if name.startswith(RESIDUAL)}
        outgoing = Outgoing(
            delta | beside, codec=Codec.parse(task.codec), noise=self._noise(task.config), residual=residual
        )
        memory |= {RESIDUAL + name: value for name, value in (residual | outgoing.residual).items()}
        return Trained(outgoing, result.num_examples, result.metrics, memory)

    def _noise(self, config: Config) -> Noise:
        """The same for the same task: one that is done twice gives the same update."""
        return Noise(self._context.client_id, *(repr(config.get(key)) for key in ("seed", "round", "repeat")))

    async def _call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return await self._caller.call(what, function, *args)
        except ClientCodeError:
            raise
        except Exception as exc:
            _LOGGER.debug("%s failed", what, exc_info=exc)
            raise ClientCodeError(f"{what} raised {one_line(f'{type(exc).__name__}: {exc}')}") from exc


def _query(client: Client, question: Tensors, task: FitTask) -> Trained:
    from fedbus.analytics.local import answer  # most clients are never asked, and need not pay for it

    extra = answer(client.query(dict(task.config)), question, task.config)
    outgoing = Outgoing({EXTRA + name: value for name, value in extra.items()}, codec=Codec.parse(task.codec))
    return Trained(outgoing, 1, {}, {})

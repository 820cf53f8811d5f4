"""What a user writes to train on a client: a `Client`, or a `NumPyClient` as Flower's users know it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from fedbus.errors import ClientCodeError
from fedbus.types import Array, Config, EvaluateResult, FitResult, Metrics, Scalar, Tensors, as_tensors


@dataclass(kw_only=True, eq=False)
class ClientContext:
    """Who the client is, and what it remembers from one task to the next.

    Args:
        client_id: the client's stable name.
        partition: which part of the data is this client's, 0 .. num_partitions - 1.
        num_partitions: parts in all.
        state: the client's own memory between tasks; it never leaves the client. That of a virtual client is empty at
            each task, for whichever worker has it knows nothing of the last one.
        config: further settings for `client_fn`.
        memory: tensors that the client's half of a method keeps (a control variate, personal layers). What a fit leaves
            there counts once the server has committed its update, and is dropped when that is refused; it is empty
            when a run begins. Assign new arrays, and do not write into old ones. What is named "sum/..." is a sum, to
            which each fit adds: when a fit is refused after the next one has begun, its share is taken out of that.
        broadcast: tensors that came with the model, by the strategy's names; read-only.
        is_personal: whether a tensor of that name stays with this client, as the app says.
    """

    client_id: str
    partition: int = 0
    num_partitions: int = 1
    state: dict[str, Any] = field(default_factory=dict)
    config: Config = field(default_factory=dict)
    memory: dict[str, Array] = field(default_factory=dict)
    broadcast: Tensors = field(default_factory=dict)
    is_personal: Callable[[str], bool] = lambda name: False
    _cancelled: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    @property
    def cancelled(self) -> bool:
        """Whether the result of the running task is no longer wanted, so that long training may end early."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Say, from any thread, that the result of the running task is no longer wanted."""
        self._cancelled.set()

    def _reset(self) -> None:
        """Make ready for the next task; the client runtime calls it before each."""
        self._cancelled.clear()


class Client:
    """Trains and evaluates on named tensors; override what your run needs.

    The `parameters` given are the caller's cached copy of the global model: read them, do not write into them.
    """

    def get_parameters(self) -> Tensors:
        """Return the tensors to begin from, where the app has no `initial_parameters`."""
        _missing(self, "get_parameters")

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        """Train from `parameters` on the client's own data."""
        _missing(self, "fit")

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        """Measure `parameters` on the client's own data."""
        _missing(self, "evaluate")

    def query(self, config: Config) -> Mapping[str, Array]:
        """Return the columns that federated queries may see, 1-d arrays of one length: only sums of them are sent."""
        _missing(self, "query")


class NumPyClient:
    """Trains and evaluates on a plain list of arrays, in the model's order; override what your run needs.

    The arrays given are the client's own: training may write into them.
    """

    def get_parameters(self, config: dict[str, Scalar]) -> list[Array]:
        """Return the arrays to begin from, where the app has no `initial_parameters`."""
        _missing(self, "get_parameters")

    def fit(self, parameters: list[Array], config: dict[str, Scalar]) -> tuple[list[Array], int, dict[str, Scalar]]:
        """Train from `parameters`; return (trained arrays, num_examples, metrics)."""
        _missing(self, "fit")

    def evaluate(self, parameters: list[Array], config: dict[str, Scalar]) -> tuple[float, int, dict[str, Scalar]]:
        """Measure `parameters`; return (loss, num_examples, metrics)."""
        _missing(self, "evaluate")

    def query(self, config: dict[str, Scalar]) -> Mapping[str, Array]:
        """Return the columns that federated queries may see, 1-d arrays of one length: only sums of them are sent."""
        _missing(self, "query")


def as_client(obj: object) -> Client:
    """Return `obj` as a `Client`, adapting a `NumPyClient`.

    The adapter raises `ClientCodeError` when the user's method returns something else than it must.

    Raises:
        ClientCodeError: `obj` is neither.
    """
    if isinstance(obj, Client):
        return obj
    if isinstance(obj, NumPyClient):
        return _NumPyAdapter(obj)
    raise ClientCodeError(f"client_fn must return a Client or a NumPyClient, not {_kind(obj)}")


def check_fit_result(result: object) -> FitResult:
    """Return what `Client.fit` returned with Python scalars throughout, ready for the wire.

    The tensors are checked by `update_delta`, which knows the model.

    Raises:
        ClientCodeError: `result` is not a `FitResult`, or a value in it is of the wrong type.
    """
    if not isinstance(result, FitResult):
        raise ClientCodeError(f"fit returned {_kind(result)}, expected a FitResult")
    if not isinstance(result.parameters, Mapping):
        raise ClientCodeError(f"fit returned {_kind(result.parameters)} as parameters, expected a mapping")
    return FitResult(
        parameters=result.parameters,
        num_examples=_num_examples("fit", result.num_examples),
        metrics=check_metrics("fit", result.metrics),
        extra=_extra(result.extra),
    )


def check_tensors(method: str, tensors: object) -> None:
    """Raise `ClientCodeError` unless `tensors` is a mapping from names to arrays, as `method` must return it."""
    if not isinstance(tensors, Mapping):
        raise ClientCodeError(f"{method} returned {_kind(tensors)} as parameters, expected a mapping")
    for name, value in tensors.items():
        _array(method, name, value)


def check_evaluate_result(result: object) -> EvaluateResult:
    """Return what `Client.evaluate` returned with Python scalars throughout, ready for the wire.

    Raises:
        ClientCodeError: `result` is not an `EvaluateResult`, or a value in it is of the wrong type.
    """
    if not isinstance(result, EvaluateResult):
        raise ClientCodeError(f"evaluate returned {_kind(result)}, expected an EvaluateResult")
    return EvaluateResult(
        loss=_loss(result.loss),
        num_examples=_num_examples("evaluate", result.num_examples),
        metrics=check_metrics("evaluate", result.metrics),
    )


class _NumPyAdapter(Client):
    """Speaks lists of arrays to a `NumPyClient`, names to everybody else."""

    def __init__(self, client: NumPyClient) -> None:
        self._client = client

    def __repr__(self) -> str:
        return f"as_client({self._client!r})"

    def get_parameters(self) -> Tensors:
        arrays = _arrays("get_parameters", self._client.get_parameters({}))
        return as_tensors([_array("get_parameters", str(i), value) for i, value in enumerate(arrays)])

    def fit(self, parameters: Tensors, config: Config) -> FitResult:
        result = self._client.fit(_copies(parameters), dict(config))
        arrays, num_examples, metrics = _triple("fit", "(parameters, num_examples, metrics)", result)
        trained = _zip_onto(parameters, _arrays("fit", arrays))
        return check_fit_result(FitResult(parameters=trained, num_examples=num_examples, metrics=metrics))

    def evaluate(self, parameters: Tensors, config: Config) -> EvaluateResult:
        result = self._client.evaluate(_copies(parameters), dict(config))
        loss, num_examples, metrics = _triple("evaluate", "(loss, num_examples, metrics)", result)
        return check_evaluate_result(EvaluateResult(loss=loss, num_examples=num_examples, metrics=metrics))

    def query(self, config: Config) -> Mapping[str, Array]:
        return self._client.query(dict(config))


def _missing(client: object, method: str) -> NoReturn:
    without = {"evaluate": " (or set fraction_evaluate=0)", "get_parameters": " (or give the app initial_parameters)"}
    raise ClientCodeError(f"{type(client).__name__} has no {method} method: define it{without.get(method, '')}")


def _copies(parameters: Tensors) -> list[Array]:
    # Flower hands out fresh arrays, and its users train in place on them: on the cached global model that
    # would turn every delta into zero without a word.
    return [np.array(value) for value in parameters.values()]


def _extra(extra: object) -> dict[str, Array]:
    if not isinstance(extra, Mapping):
        raise ClientCodeError(f"fit returned {_kind(extra)} as extra, expected a mapping")
    return {str(name): np.array(_array("fit", str(name), value)) for name, value in extra.items()}


def _triple(method: str, expected: str, result: object) -> tuple[Any, Any, Any]:
    if not isinstance(result, tuple):
        raise ClientCodeError(f"{method} returned {_kind(result)}, expected a tuple {expected}")
    if len(result) != 3:
        raise ClientCodeError(f"{method} returned a tuple of {len(result)}, expected {expected}")
    return result


def _arrays(method: str, value: object) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise ClientCodeError(f"{method} returned {_kind(value)} as parameters, expected a list of arrays")
    return value


def _array(method: str, name: str, value: object) -> Array:
    # float32 arithmetic on a 0-d array gives a numpy scalar, which is as good.
    if not isinstance(value, np.ndarray | np.generic):
        raise ClientCodeError(f"{method} returned {_kind(value)} for tensor {name!r}, expected a numpy array")
    return np.asarray(value)


def _zip_onto(parameters: Tensors, arrays: Sequence[object]) -> dict[str, Array]:
    if len(arrays) != len(parameters):
        raise ClientCodeError(f"fit returned {len(arrays)} arrays, the model has {len(parameters)}")
    trained = {name: _array("fit", name, value) for name, value in zip(parameters, arrays, strict=True)}
    for name, value in trained.items():
        if value.shape != parameters[name].shape:
            raise ClientCodeError(
                f"fit returned shape {value.shape} for tensor {name!r}, the model has {parameters[name].shape}"
            )
    return trained


def _num_examples(method: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ClientCodeError(f"{method} returned {_kind(value)} as num_examples, expected an int")
    return int(value)


def _loss(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ClientCodeError(f"evaluate returned {_kind(value)} as loss, expected a float")
    return float(value)


def check_metrics(method: str, metrics: object) -> Metrics:
    """Return the metrics that `method` returned as Python scalars.

    Raises:
        ClientCodeError: they are no dict of bools, ints, floats, strs and bytes under strs.
    """
    if not isinstance(metrics, Mapping):
        raise ClientCodeError(f"{method} returned {_kind(metrics)} as metrics, expected a dict")
    return {_metric_name(method, name): _scalar(method, name, value) for name, value in metrics.items()}


def _metric_name(method: str, name: object) -> str:
    if not isinstance(name, str):
        raise ClientCodeError(f"{method} returned a metric named {name!r}, expected a str as its name")
    return str(name)


def _scalar(method: str, name: str, value: object) -> Scalar:
    for kinds, python in _SCALARS:
        if isinstance(value, kinds):
            return python(value)
    raise ClientCodeError(
        f"{method} returned {_kind(value)} as metric {name!r}, expected a bool, int, float, str or bytes"
    )


# Subclasses too become plain (np.float64 is a float, np.str_ a str): the wire takes exact types only.
_SCALARS: tuple[tuple[Any, type[Scalar]], ...] = (
    (bool | np.bool_, bool),
    (int | np.integer, int),
    (float | np.floating, float),
    (str, str),
    (bytes, bytes),
)


def _kind(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"

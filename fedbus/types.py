"""The words that cross module borders: tensors, metrics and what client code returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedbus.errors import ConfigError

Array: TypeAlias = NDArray[Any]

Tensors: TypeAlias = Mapping[str, Array]
"""A model or an update: tensor name -> ndarray, in the model's own order."""

Piece: TypeAlias = tuple[str, int, Array]
"""A run of a tensor's elements: the tensor's name, the flat index of the first of them, and they themselves, 1-d."""

Scalar: TypeAlias = bool | int | float | str | bytes

Metrics: TypeAlias = Mapping[str, Scalar]
"""What a client or an evaluation reports beside the loss."""

Config: TypeAlias = Mapping[str, Scalar]
"""Settings that travel with a task to the client's code."""

EXTRA: Final = "extra/"
"""Tensors of this prefix travel beside the model's own, in either direction: no model may use it."""

SUMS: Final = "sum/"
"""Tensors of this prefix in a client's memory are sums, to which each fit adds what it also told the server."""

EvaluateFn: TypeAlias = Callable[[int, dict[str, Array]], "tuple[float, Metrics] | None"]
"""Central evaluation: (round, model) -> (loss, metrics); round 0 is the initial model, None skips a round."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What `Client.fit` returns: the trained tensors (same names, shapes and dtypes as given; a subset is
    allowed) and the number of examples behind them, which is the weight of the update.

    `extra`: what the strategy asks for beside them (`Strategy.extras`), which travels as it is, not as a difference.
    """

    parameters: Tensors
    num_examples: int
    metrics: Metrics = field(default_factory=dict)
    extra: Tensors = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """What `Client.evaluate` returns: mean loss over `num_examples` examples, with further metrics."""

    loss: float
    num_examples: int
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExtraSpec:
    """What one tensor beside the delta must be.

    `shape` None: one dimension of any length, of at most `max_bytes`; else `max_bytes` is not looked at.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...] | None = None
    max_bytes: int = 1 << 20


def as_tensors(parameters: Tensors | Sequence[Array]) -> dict[str, Array]:
    """Name the arrays of a plain list "0", "1", ...; a mapping keeps its names and order."""
    if isinstance(parameters, Mapping):
        return {str(name): np.asarray(value) for name, value in parameters.items()}
    return {str(index): np.asarray(value) for index, value in enumerate(parameters)}


def delta_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype in which the update of a tensor of `dtype` travels.

    Floating and complex tensors keep theirs; integer tensors travel as int64, bool tensors as int8.

    Raises:
        ConfigError: for a dtype that a model cannot have.
    """
    native = dtype.newbyteorder("=")
    if native in _FLOATING:
        return native
    if native.kind in "iu":
        return np.dtype(np.int64)
    if native.kind == "b":
        return np.dtype(np.int8)
    allowed = "bool, integers, float16, bfloat16, float32, float64, complex64, complex128"
    raise ConfigError(f"dtype {dtype} cannot be part of a model: use one of {allowed}")


def kept_dtype(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """Return the dtype in which a method keeps what goes with a tensor of `dtype` (momentum, control variates): float32
    at least; None for integer and bool tensors, which have no gradient."""
    if delta_dtype(dtype).kind in "iu":
        return None
    return np.dtype(np.float32) if dtype.itemsize < 4 else dtype.newbyteorder("=")


_FLOATING = frozenset(map(np.dtype, ("f2", "f4", "f8", "c8", "c16", ml_dtypes.bfloat16)))

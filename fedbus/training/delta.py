"""What travels after training: trained tensors minus the tensors they began from."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbus.errors import ClientCodeError
from fedbus.types import Array, Tensors, delta_dtype


def update_delta(base: Tensors, trained: Tensors) -> dict[str, Array]:
    """Return trained - base for each tensor in `trained`, in the model's order, in `delta_dtype` of its dtype.

    Floating and complex tensors lose at most a rounding; float16 and bfloat16 are subtracted in float32, and a
    difference that overflows is inf, which the server refuses. Integer differences are exact modulo 2**64.
    Other precisions of the same kind are first cast to the model's dtype: numpy makes float64 by accident.

    Raises:
        ClientCodeError: a tensor that the model has not, or another shape or kind of dtype.
    """
    for name in trained:
        if name not in base:
            raise ClientCodeError(f"fit returned tensor {name!r}, which the model does not have")
    return {name: _delta(name, base[name], trained[name]) for name in base if name in trained}


def _delta(name: str, base: Array, trained: object) -> Array:
    if not isinstance(trained, np.ndarray | np.generic):
        kind = type(trained).__name__
        raise ClientCodeError(f"fit returned {kind} for tensor {name!r}, expected a numpy array")
    if trained.shape != base.shape:
        raise ClientCodeError(f"fit returned shape {trained.shape} for tensor {name!r}, the model has {base.shape}")
    after = _as_model_dtype(name, np.asarray(trained), base.dtype)
    dtype = delta_dtype(base.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        # numpy and ml_dtypes themselves subtract half precision in float32 and round once.
        return np.asarray(after.astype(dtype) - base.astype(dtype))


def _as_model_dtype(name: str, trained: Array, dtype: np.dtype[Any]) -> Array:
    if _kind(trained.dtype) != _kind(dtype):
        raise ClientCodeError(f"fit returned dtype {trained.dtype} for tensor {name!r}, the model has {dtype}")
    if dtype.kind in "iu" and trained.size and not _fits(trained, dtype):
        raise ClientCodeError(f"fit returned {trained.dtype} values for tensor {name!r} that do not fit {dtype}")
    with np.errstate(over="ignore", invalid="ignore"):
        return trained.astype(dtype, copy=False)


def _fits(values: Array, dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return limits.min <= int(values.min()) and int(values.max()) <= limits.max


def _kind(dtype: np.dtype[Any]) -> str:
    """Say which dtypes may stand for one another; anything unknown stands for itself alone."""
    if dtype.name == "bfloat16":
        return "f"
    return {"u": "i", "V": dtype.name}.get(dtype.kind, dtype.kind)

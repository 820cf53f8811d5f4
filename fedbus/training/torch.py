"""PyTorch models as named numpy tensors, and back."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fedbus.errors import ClientCodeError, UsageError
from fedbus.types import Array, Tensors

try:
    import torch
except ImportError as exc:
    raise UsageError("PyTorch is not installed: pip install 'fedbus[torch]'") from exc


def get_parameters(source: torch.nn.Module | Mapping[str, Any]) -> dict[str, Array]:
    """Copy a module's state dict (or a state dict) to numpy arrays in its order, each in its own dtype.

    bfloat16 becomes `ml_dtypes.bfloat16`. Tied tensors appear under each of their names.

    Raises:
        ClientCodeError: an entry that is not a tensor, or whose dtype or layout numpy does not know.
    """
    state = source.state_dict() if isinstance(source, torch.nn.Module) else source
    return {name: _to_numpy(name, value) for name, value in state.items()}


def set_parameters(module: torch.nn.Module, parameters: Tensors | Sequence[Array], strict: bool = True) -> None:
    """Copy arrays into a module's parameters and buffers, in place and on the module's device.

    Args:
        module: the module to load.
        parameters: a mapping of names, or a list of all arrays in the state dict's order.
        strict: names must match exactly; otherwise the names that both sides have are loaded.

    Raises:
        ClientCodeError: names or their number, a shape or a dtype that is not the module's; then nothing has
            been loaded.
    """
    state = module.state_dict()
    named = _named(parameters, state)
    if strict:
        _check_names(named, state)
    tensors = {name: _to_torch(name, value, state[name]) for name, value in named.items() if name in state}
    with torch.no_grad():
        module.load_state_dict(tensors, strict=strict)


def _to_numpy(name: str, value: object) -> Array:
    if not isinstance(value, torch.Tensor):
        kind = type(value).__name__
        raise ClientCodeError(f"entry {name!r} of the state dict is not a tensor but {kind}")
    try:
        tensor = value.detach().cpu().resolve_conj().resolve_neg()
        if tensor.dtype == torch.bfloat16:
            return np.array(tensor.view(torch.int16).numpy(), order="C").view(ml_dtypes.bfloat16)
        return np.array(tensor.numpy(), order="C")
    except (TypeError, ValueError, RuntimeError) as exc:
        raise ClientCodeError(
            f"tensor {name!r} ({value.dtype}, {value.layout}, {value.device.type}) cannot become a numpy array"
        ) from exc


def _named(parameters: Tensors | Sequence[Array], state: Mapping[str, Any]) -> Tensors:
    if isinstance(parameters, Mapping):
        if not parameters or list(parameters) != [str(index) for index in range(len(parameters))]:
            return parameters
        parameters = list(parameters.values())  # a model that a client gave as a plain list
    if len(parameters) != len(state):
        raise ClientCodeError(f"set_parameters was given {len(parameters)} arrays, the module has {len(state)}")
    return dict(zip(state, parameters, strict=True))


def _check_names(named: Tensors, state: Mapping[str, Any]) -> None:
    missing = [name for name in state if name not in named]
    unexpected = [name for name in named if name not in state]
    if missing:
        raise ClientCodeError(f"set_parameters was not given {_list(missing)}, which the module has")
    if unexpected:
        raise ClientCodeError(f"set_parameters was given {_list(unexpected)}, which the module does not have")


def _to_torch(name: str, value: Array, target: torch.Tensor) -> torch.Tensor:
    array = np.asarray(value)
    if array.shape != tuple(target.shape):
        raise ClientCodeError(f"tensor {name!r} was given shape {array.shape}, the module has {tuple(target.shape)}")
    tensor = _from_numpy(name, array)
    if tensor.dtype != target.dtype:
        raise ClientCodeError(f"tensor {name!r} was given {array.dtype}, the module has {_dtype(target)}")
    return tensor


def _from_numpy(name: str, array: Array) -> torch.Tensor:
    # A fresh array: torch warns of read-only ones and refuses negative strides and foreign byte order.
    own = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    try:
        if own.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(own.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(own)
    except TypeError as exc:
        raise ClientCodeError(f"tensor {name!r} was given {array.dtype}, which PyTorch does not have") from exc


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _list(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def warm_up() -> None:
    """Import what torch puts off until the first optimizer step: a second that forked clients then share.

    Starts no thread: a process that forks may call it.
    """
    importlib.import_module("torch._dynamo")

"""PyTorch models as named numpy tensors, and back; local training and personal layers for them."""

from __future__ import annotations

import contextlib
import importlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from fedbus.errors import ClientCodeError, UsageError
from fedbus.training import local
from fedbus.training.base import ClientContext
from fedbus.types import Array, Config, FitResult, Metrics, Tensors

try:
    import torch
except ImportError as exc:
    raise UsageError("PyTorch is not installed: pip install 'fedbus[torch]'") from exc

T = TypeVar("T")


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


# ---- local training --------------------------------------------------------------------------------------------------


class LocalTraining:
    """A fit of `net` as the server's strategy wants it: FedProx, SCAFFOLD, FedDyn and FedNova in two lines.

        local = LocalTraining(net, optimizer, parameters, config, context)  # loads the parameters
        for x, y in local.batches(loader):
            optimizer.zero_grad()
            loss_fn(net(x), y).backward()
            optimizer.step()
        return local.result(num_examples, {"loss": ...})

    Hooks on the optimizer add what the method adds to each gradient, and count the steps with their learning rates and
    momenta, until `result`, or until the optimizer gets another. See `fedbus.training.local.LocalTraining` for the
    methods and their papers. Where the strategy asks for none, nothing is added.

    Raises:
        ClientCodeError: for parameters that are not the net's; where the method counts steps of SGD (SCAFFOLD,
            FedNova), for another optimizer; and at a step with a closure, whose gradients the hooks would not see.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Tensors,
        config: Config,
        context: ClientContext,
    ) -> None:
        set_parameters(net, parameters)
        self._net = net
        self._local = local.LocalTraining(parameters, config, context)
        if self._local.counts_steps:
            _check_plain_sgd(optimizer)
        self._names = {parameter: name for name, parameter in net.named_parameters()}
        shared = {parameter: name for parameter, name in self._names.items() if not context.is_personal(name)}
        pull = _Pull(shared, self._local.pull, self._local.drift)
        _attach(optimizer, before=pull.correct, after=self._count)
        self._optimizer = optimizer

    def batches(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches` until they end, the task is no longer wanted, or its "budget_s" is spent: partial work counts."""
        return self._local.batches(batches)

    def result(self, num_examples: int, metrics: Metrics | None = None) -> FitResult:
        """What `fit` returns: the net as it is now, and what the method sends beside it."""
        _detach(self._optimizer)
        return self._local.result(get_parameters(self._net), num_examples, metrics)

    def _count(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            stepped = [p for p in group["params"] if p in self._names and p.grad is not None]
            names = [self._names[parameter] for parameter in stepped]
            self._local.stepped(names, float(group["lr"]), float(group.get("momentum", 0.0)))


class PersonalTraining:
    """Ditto: `net` becomes the client's own model, which is trained beside the federation's and pulled towards it.

        personal = PersonalTraining(own_net, own_optimizer, parameters, config, context)  # loads v
        ... train own_net with own_optimizer as usual ...
        personal.keep()

    See `fedbus.training.local.PersonalTraining`; `personal_parameters` of that module finds v for an evaluation.
    """

    def __init__(
        self,
        net: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Tensors,
        config: Config,
        context: ClientContext,
    ) -> None:
        self._net = net
        self._personal = local.PersonalTraining(parameters, config, context)
        set_parameters(net, parameters)
        pull = _Pull({parameter: name for name, parameter in net.named_parameters()}, self._personal.pull, {})
        set_parameters(net, self._personal.start)
        _attach(optimizer, before=pull.correct)
        self._optimizer = optimizer

    def keep(self) -> None:
        """Remember the net as v."""
        _detach(self._optimizer)
        self._personal.keep(get_parameters(self._net))


class _Pull:
    """Adds strength (w - w_t) + drift to the gradients; w_t is what the parameters are when it is made."""

    def __init__(self, names: Mapping[torch.nn.Parameter, str], strength: float, drift: Tensors) -> None:
        self._strength = strength
        self._anchors = {parameter: parameter.detach().clone() for parameter in names} if strength else {}
        self._drifts = {
            parameter: torch.from_numpy(np.array(drift[name])).to(parameter)
            for parameter, name in names.items()
            if name in drift
        }

    @torch.no_grad()
    def correct(self) -> None:
        for parameter, anchor in self._anchors.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=self._strength)
        for parameter, drift in self._drifts.items():
            if parameter.grad is not None:
                parameter.grad.add_(drift)


_HOOKS: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[Any]] = weakref.WeakKeyDictionary()
"""Those of each optimizer's present training: one that failed must not go on correcting in the next."""


def _attach(
    optimizer: torch.optim.Optimizer,
    before: Callable[[], None],
    after: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None,
) -> None:
    def correct(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _, *closures = [*args, *kwargs.values()]
        if any(closures):
            raise ClientCodeError("local training sees no gradients of a closure: call backward(), then step()")
        before()

    def count(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        after(optimizer)

    _detach(optimizer)
    _HOOKS[optimizer] = [optimizer.register_step_pre_hook(correct), optimizer.register_step_post_hook(count)]


def _detach(optimizer: torch.optim.Optimizer) -> None:
    for hook in _HOOKS.pop(optimizer, []):
        hook.remove()


def _check_plain_sgd(optimizer: torch.optim.Optimizer) -> None:
    is_plain = isinstance(optimizer, torch.optim.SGD) and not any(
        group["nesterov"] or group["dampening"] for group in optimizer.param_groups
    )
    if not is_plain:
        raise ClientCodeError(
            f"SCAFFOLD and FedNova count the steps of torch.optim.SGD, plain or with momentum: {_one_line(optimizer)} "
            "cannot be counted"
        )


def _one_line(optimizer: torch.optim.Optimizer) -> str:
    return " ".join(repr(optimizer).split())[:80]


# ---- personal layers -------------------------------------------------------------------------------------------------


def batch_norm_names(net: torch.nn.Module) -> list[str]:
    """The names of everything that belongs to batch normalisation, for `App(personal=...)`: that is FedBN.

    Scales, shifts and running statistics stay with the client whose data they describe. Li et al. 2021 (FedBN:
    Federated Learning on Non-IID Features via Local Batch Normalization), algorithm 1.
    """
    norms = [name for name, module in net.named_modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    prefixes = tuple(f"{name}." if name else "" for name in norms)
    return [name for name in net.state_dict() if norms and name.startswith(prefixes)]


@contextlib.contextmanager
def frozen(net: torch.nn.Module, *names: str) -> Iterator[None]:
    """Leave the parameters of these names as they are; names may be patterns such as "head.*".

    FedRep trains the head while the body rests, and then the body while the head does. Collins et al. 2021 (Exploiting
    Shared Representations for Personalized Federated Learning), algorithm 1:

        app = fedbus.App(personal=["head.*"], ...)
        with frozen(net, "body.*"):
            ... some epochs ...
        with frozen(net, "head.*"):
            ... one epoch ...

    One optimizer of all parameters does for both: it passes over those without a gradient.

    Raises:
        ClientCodeError: for a name that no parameter has.
    """
    resting = [parameter for name in names for parameter in _parameters_of(net, name) if parameter.requires_grad]
    for parameter in resting:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


def _parameters_of(net: torch.nn.Module, pattern: str) -> list[torch.nn.Parameter]:
    found = [parameter for name, parameter in net.named_parameters() if fnmatchcase(name, pattern)]
    if not found:
        raise ClientCodeError(f"the net has no parameter {pattern!r}: {_list([n for n, _ in net.named_parameters()])}")
    return found

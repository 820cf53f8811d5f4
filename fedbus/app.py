"""What a user hands over: the `App`, and finding it by name."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Final, Literal, TypeAlias, overload

from fedbus.after_evaluation import AfterEvaluation, BestModel
from fedbus.config import RoundConfig
from fedbus.errors import AppError, ConfigError, RunFailed, one_line, place_of
from fedbus.strategies.base import Strategy
from fedbus.strategies.fedasync import FedAsync
from fedbus.strategies.fedavg import FedAvg
from fedbus.strategies.fedbuff import FedBuff
from fedbus.strategies.metrics import weighted_mean
from fedbus.training.base import Client, ClientContext, NumPyClient
from fedbus.types import Array, Config, EvaluateFn, Metrics, Tensors, as_tensors
from fedbus.wire.compression import Codec

Parameters: TypeAlias = Tensors | Sequence[Array]
ConfigFn: TypeAlias = Config | Callable[[int], Config]
AggregateMetrics: TypeAlias = Callable[[Iterable[tuple[int, Metrics]]], Metrics]
"""[(num_examples, metrics), ...], one for each client, to what they say together."""

_FED_AVG: Final = FedAvg()
_FED_BUFF: Final = FedBuff()
_FED_ASYNC: Final = FedAsync()
_DEFAULTS: Final = (_FED_AVG, _FED_BUFF, _FED_ASYNC)
"""What an App without a strategy of its own takes. They are recognised when `dataclasses.replace` hands them to another
App, which may have other rounds."""


class _StrategyField:
    """An App's `strategy`: takes None for the one that suits its rounds, and gives that one."""

    @overload
    def __get__(self, app: None, owner: type[App]) -> None: ...

    @overload
    def __get__(self, app: App, owner: type[App]) -> Strategy: ...

    def __get__(self, app: App | None, owner: type[App]) -> Strategy | None:
        if app is None:
            return None  # the field's default
        given: Strategy | None = vars(app)["strategy"]
        return _default_strategy(app.rounds) if given is None else given

    def __set__(self, app: App, given: Strategy | None) -> None:
        is_default = any(given is default for default in _DEFAULTS)
        vars(app)["strategy"] = None if is_default else given


@dataclass(kw_only=True)
class App:
    """A federated application: the same object serves server and clients, each takes its half.

    Args:
        client_fn: makes a client's `Client` or `NumPyClient`; called once in each client process, and in a worker for
            each task.
        strategy: how updates become the next model; None takes what suits the rounds: FedAsync for
            `RoundConfig.asynchronous`, FedBuff for other asynchronous ones, FedAvg else.
        initial_parameters: the model to begin with (name -> array, or a list of arrays), or a function that makes
            it; None asks one of the clients for its `get_parameters`.
        evaluate_fn: central evaluation, (round, {name: array}) -> (loss, metrics); runs beside the rounds.
        after_evaluation: what is done with each evaluation: `EarlyStopping`, `BestModel`, or your own
            `AfterEvaluation`.
        aggregate_fit_metrics, aggregate_evaluate_metrics: what the metrics of a round's clients say together, in the
            order of their names: [(num_examples, metrics), ...] -> metrics. The loss of an evaluation is the mean
            weighted by num_examples whatever these are. Where one raises, that is noted and the round goes on.
        rounds: how rounds open and close.
        fit_config, evaluate_config: settings sent with the tasks; a mapping, or a function of the round.
        update_queue: the kind of queue that updates wait in: "quorum" outlives the loss of a broker node, "classic"
            is quicker where there is only one. It is settled when the queue is made.
        message_queues: the kind of queue that everything else waits in, one for each client and two more: "classic"
            is quick, for any number of clients, and out of use while its node is down; "quorum" is for clusters, up to
            some thousand clients, and goes on without one of three nodes. It is settled when the queues are made.
        personal: names of tensors (or patterns, "head.*") that each client keeps to itself: they begin as in the
            initial model, are trained and evaluated in place of the shared ones, and never leave the client again.
        compression: how updates travel: "float16", "bfloat16", "int8", "qsgd:LEVELS", "topk:SHARE", "zstd", or such as
            "topk:0.01+float16+zstd"; "": as they are. Clients keep what topk leaves out, and send it later.
        model_compression: the same for the model, without topk; clients train from what they got.
        seed: of the cohorts; also sent to clients as "seed" in the fit config unless that is set there.

    Raises:
        ConfigError: when an argument is of the wrong kind, or the strategy makes no sense with the rounds.
    """

    client_fn: Callable[[ClientContext], Client | NumPyClient]
    strategy: _StrategyField = _StrategyField()
    initial_parameters: Parameters | Callable[[], Parameters] | None = None
    evaluate_fn: EvaluateFn | None = None
    after_evaluation: Sequence[AfterEvaluation] = ()
    aggregate_fit_metrics: AggregateMetrics = weighted_mean
    aggregate_evaluate_metrics: AggregateMetrics = weighted_mean
    rounds: RoundConfig = field(default_factory=RoundConfig)
    fit_config: ConfigFn = field(default_factory=dict)
    evaluate_config: ConfigFn = field(default_factory=dict)
    update_queue: Literal["quorum", "classic"] = "quorum"
    message_queues: Literal["classic", "quorum"] = "classic"
    personal: Sequence[str] = ()
    compression: str = ""
    model_compression: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        if not callable(self.client_fn):
            raise ConfigError(f"client_fn must be a function of a ClientContext, not {self.client_fn!r}")
        if not isinstance(self.rounds, RoundConfig):
            raise ConfigError(f"rounds must be a RoundConfig, not {self.rounds!r}")
        if not isinstance(self.strategy, Strategy):
            raise ConfigError(f"strategy must be a fedbus Strategy such as FedAvg(), not {self.strategy!r}")
        self.strategy.check(self.rounds)
        if isinstance(self.personal, str) or not all(isinstance(pattern, str) for pattern in self.personal):
            raise ConfigError(f"personal must be a list of tensor names or patterns, not {self.personal!r}")
        for setting in ("compression", "model_compression"):
            given = getattr(self, setting)
            if not isinstance(given, str):
                raise ConfigError(f"{setting} must be the name of a codec, such as 'int8', not {given!r}")
        Codec.parse(self.compression)
        self.model_codec.check_carries_models()
        if self.strategy.needs_exact_updates and self.update_codec.is_lossy:
            raise ConfigError(
                f"{type(self.strategy).__name__} needs updates as they are, and {self.compression!r} rounds them: take "
                "'zstd', or none"
            )
        for setting in ("update_queue", "message_queues"):
            if getattr(self, setting) not in ("quorum", "classic"):
                raise ConfigError(f"{setting} must be 'quorum' or 'classic', not {getattr(self, setting)!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed must be a whole number, not {self.seed!r}")
        for name in ("fit_config", "evaluate_config"):
            if not callable(getattr(self, name)):
                _config(name, getattr(self, name), 1)
        _check_takes(self.client_fn, "client_fn", "(context)", 1)
        if self.evaluate_fn is not None:
            if not callable(self.evaluate_fn):
                raise ConfigError(f"evaluate_fn must be a function, not {self.evaluate_fn!r}")
            _check_takes(self.evaluate_fn, "evaluate_fn", "(round, model)", 2)
        for name in ("aggregate_fit_metrics", "aggregate_evaluate_metrics"):
            if not callable(getattr(self, name)):
                raise ConfigError(f"{name} must be a function, not {getattr(self, name)!r}")
            _check_takes(getattr(self, name), name, "(reports)", 1)
        self._check_after_evaluation()

    def _check_after_evaluation(self) -> None:
        given: object = self.after_evaluation
        if not isinstance(given, list | tuple) or not all(isinstance(piece, AfterEvaluation) for piece in given):
            raise ConfigError(
                f"after_evaluation must be a list of EarlyStopping(...), BestModel(...), ..., not {given!r}"
            )
        for piece in self.after_evaluation:
            piece.check(has_central=self.evaluate_fn is not None, has_federated=self.rounds.fraction_evaluate > 0)
        names = [piece.name for piece in self.after_evaluation if isinstance(piece, BestModel)]
        if len(set(names)) < len(names):
            raise ConfigError("each BestModel needs a name of its own: BestModel(..., name='best-accuracy')")

    @property
    def update_codec(self) -> Codec:
        """How answers to fit and query tasks travel."""
        codec = Codec.parse(self.compression)
        return codec if self.strategy.asks == "fit" else codec.without_loss()

    @property
    def model_codec(self) -> Codec:
        """How versions of the model travel."""
        return Codec.parse(self.model_compression)

    def is_personal(self, name: str) -> bool:
        """Whether a tensor of that name stays with its client."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.personal)

    def check_personal(self, model: Iterable[str]) -> None:
        """Raise `ConfigError` for a personal name that no tensor of `model` has: its layer would be everybody's."""
        names = list(model)
        for pattern in self.personal:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                raise ConfigError(f"personal: no tensor matches {pattern!r}; the model has {shown}")

    def initial_model(self) -> dict[str, Array] | None:
        """The model to begin with; None when a client is to be asked for it."""
        parameters = self.initial_parameters() if callable(self.initial_parameters) else self.initial_parameters
        return None if parameters is None else as_tensors(parameters)

    def fit_config_of(self, round: int, repeat: int = 0, *, of_strategy: Config | None = None) -> Config:
        """The settings that go with a fit task of `round`: "seed", "round" and "repeat" are always among them.

        `repeat`: how many tasks the same client was given in that round before; asynchronous rounds do that.
        `of_strategy`: what the strategy says, where the app's own settings do not say otherwise.
        """
        ours: Config = {"seed": self.seed, "round": round, "repeat": repeat}
        return {**ours, **(of_strategy or {}), **_config("fit_config", self.fit_config, round)}

    def evaluate_config_of(self, round: int) -> Config:
        """The settings that go with the evaluate tasks of `round`."""
        return {"round": round, **_config("evaluate_config", self.evaluate_config, round)}


def _default_strategy(rounds: RoundConfig) -> Strategy:
    if rounds.mixing is not None:
        return _FED_ASYNC
    return _FED_BUFF if rounds.is_asynchronous else _FED_AVG


def _check_takes(function: Callable[..., object], name: str, arguments: str, count: int) -> None:
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        raise ConfigError(f"{name} must take {arguments}: {getattr(function, '__name__', function)} does not") from None
    except ValueError:
        pass  # a builtin that does not tell


def _config(name: str, config: ConfigFn, round: int) -> Config:
    try:
        value = config(round) if callable(config) else config
    except Exception as exc:
        raise RunFailed(f"{name} raised {one_line(f'{type(exc).__name__}: {exc}')} for round {round}") from exc
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping or a function that returns one, not {type(value).__name__}")
    for key, item in value.items():
        if not isinstance(key, str):
            raise ConfigError(f"{name}: the key {key!r} is no string")
        if not isinstance(item, bool | int | float | str | bytes):
            raise ConfigError(f"{name}: {key!r} is a {type(item).__name__}: use a bool, number, string or bytes")
    return value


def load_app(reference: str) -> App:
    """The `App` that `reference` names: "module:attr" or "file.py:attr" (attr defaults to "app").

    Raises `AppError`, in one line, when it cannot be found or imported, or is something else.
    """
    target, _, attribute = reference.partition(":")
    attribute = attribute or "app"
    module = _import_file(Path(target)) if target.endswith(".py") else _import_module(target)
    if not hasattr(module, attribute):
        apps = [name for name, value in vars(module).items() if isinstance(value, App)]
        hint = f": it has {', '.join(apps)}" if apps else ": make one with app = fedbus.App(...)"
        raise AppError(f"{target} has no attribute {attribute!r}{hint}")
    app = getattr(module, attribute)
    if not isinstance(app, App):
        raise AppError(f"{target}:{attribute} is not a fedbus.App but {type(app).__name__}: name the App itself")
    return app


def check_exists(reference: str) -> None:
    """Raise `AppError` for a file that is not there, before anything else is started for it."""
    target = reference.partition(":")[0]
    if target.endswith(".py") and not Path(target).is_file():
        raise AppError(f"there is no file {target}: APP is file.py:attr or module:attr")


def _import_file(path: Path) -> ModuleType:
    check_exists(str(path))
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for the imports among the user's own files
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as exc:
        sys.modules.pop(path.stem, None)
        if isinstance(exc, KeyboardInterrupt):
            raise
        raise _import_failed(str(path), exc) from exc
    return module


def _import_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is not None and (name == exc.name or name.startswith(f"{exc.name}.")):
            raise AppError(f"there is no module {exc.name!r}: APP is module:attr or file.py:attr") from exc
        raise _import_failed(name, exc) from exc
    except (Exception, SystemExit) as exc:
        raise _import_failed(name, exc) from exc


def _import_failed(name: str, exc: BaseException) -> AppError:
    reason = one_line(str(exc)) or "no reason given"
    return AppError(f"{name} cannot be imported: {type(exc).__name__}: {reason}{place_of(exc)}")

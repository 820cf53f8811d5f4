"""Settings of a run, checked when they are made."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from fedbus.errors import ConfigError

_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VIRTUAL_PREFIX: Final = "virtual-"
"""Every id that begins so is kept for virtual clients."""
_VIRTUAL_ID = re.compile(r"virtual-([0-9]{5,12})-of-([0-9]{5,12})")


def is_client_id(name: str) -> bool:
    """Whether `name` can name a queue and a broker user."""
    return _CLIENT_ID.fullmatch(name) is not None


def check_client_id(client_id: str) -> str:
    """Return `client_id` when it can name a queue and a broker user, else raise `ConfigError`."""
    if not is_client_id(client_id):
        raise ConfigError(
            f"client id {client_id[:80]!r} cannot be used: take 1 to 64 letters, digits, '.', '_' or '-', "
            "beginning with a letter or digit"
        )
    return client_id


def virtual_id(partition: int, num_partitions: int) -> str:
    """The name of the virtual client that has this part of the data: virtual-00007-of-01000 has part 7 of 0 to 999."""
    return f"virtual-{partition:05d}-of-{num_partitions:05d}"


def parse_virtual_id(client_id: str) -> tuple[int, int] | None:
    """(partition, num_partitions) of the virtual client of that name; None for the name of any other client."""
    found = _VIRTUAL_ID.fullmatch(client_id)
    if found is None:
        return None
    partition, num_partitions = int(found[1]), int(found[2])
    is_one = partition < num_partitions and virtual_id(partition, num_partitions) == client_id
    return (partition, num_partitions) if is_one else None


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{name} must be a whole number, not {value!r}")
        if value < least:
            raise ConfigError(f"{name} must be {least} or more, not {value}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(_number(name, value)) and value > 0):
            raise ConfigError(f"{name} must be a positive number of seconds, not {value}")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(_number(name, value)) and value >= 0):
            raise ConfigError(f"{name} must be 0 or more, not {value}")


def _share(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= _number(name, value) <= 1:
            raise ConfigError(f"{name} must be in [0, 1], not {value}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} must be a number, not {value!r}")
    return value


# ---- staleness -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Constant:
    """s(tau) = 1: a late update counts in full."""

    def __call__(self, staleness: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Polynomial:
    """s(tau) = (1 + tau)^-a, Xie et al. 2019 (Asynchronous Federated Optimization), section 5.2.

    With a = 0.5 it is the 1 / sqrt(1 + tau) of Nguyen et al. 2022 (FedBuff), section 5.

    Raises:
        ConfigError: when `a` is negative or not finite.
    """

    a: float = 0.5

    def __post_init__(self) -> None:
        _not_negative(a=self.a)

    def __call__(self, staleness: int) -> float:
        return float((1 + staleness) ** -self.a)


@dataclass(frozen=True)
class Hinge:
    """s(tau) = 1 while tau <= b, then 1 / (a (tau - b) + 1), Xie et al. 2019, section 5.2.

    Raises:
        ConfigError: when `a` or `b` is negative or not finite.
    """

    a: float = 10.0
    b: float = 4.0

    def __post_init__(self) -> None:
        _not_negative(a=self.a, b=self.b)

    def __call__(self, staleness: int) -> float:
        return 1.0 if staleness <= self.b else 1.0 / (self.a * (staleness - self.b) + 1.0)


Staleness: TypeAlias = Constant | Polynomial | Hinge
"""s(tau): what an update that is tau versions late still counts, in (0, 1]; s(0) = 1."""


# ---- selection -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uniform:
    """Every idle client is equally likely to be asked."""


@dataclass(frozen=True, kw_only=True)
class Oort:
    """Clients that are quick and have much to teach are asked more often, after Lai et al. 2021 (Oort), algorithm 1.

    A client's utility is num_examples times the training loss that it reported last (metric "loss_rms", the root mean
    square over its examples, else "loss"; 1 without either), as a share of the largest (of their 95 % quantile, so
    that an outlier counts no more), plus sqrt(0.1 ln R / L) when it was asked last in round L and this is round R. When
    its last duration t is longer than T the sum is multiplied with (T / t)^alpha. Drawn in proportion to their utility
    are those that come within 95 % of the best.

    Two things differ from the paper. T is a quantile of the durations that are known, in place of a pacer. Nobody is
    left out for good: who was not asked for ten times as long as an even share would take is explored again.

    Args:
        alpha: how much slowness costs; 0 looks at the utility alone. The paper's default is 2.
        duration_quantile: T is the duration that this share of the clients stays below.
        exploration: share of the places that go to clients never tried (all, while nobody was), in round 1.
        exploration_decay: its factor from round to round.
        min_exploration: what it never falls below.

    Raises:
        ConfigError: when a value is out of its range.
    """

    alpha: float = 2.0
    duration_quantile: float = 0.5
    exploration: float = 0.9
    exploration_decay: float = 0.98
    min_exploration: float = 0.2

    def __post_init__(self) -> None:
        _not_negative(alpha=self.alpha)
        _share(
            duration_quantile=self.duration_quantile,
            exploration=self.exploration,
            exploration_decay=self.exploration_decay,
            min_exploration=self.min_exploration,
        )


@dataclass(frozen=True)
class Tiers:
    """The cohort of a round comes from one group of about equally quick clients, after Chai et al. 2020 (TiFL).

    Clients are sorted by mean duration into `num_tiers` groups of about one size, those that have never answered into
    the slowest; each round draws a group, the same chance for each, and fills up from the groups next to it. Whoever
    was never tried comes first.

    Args:
        num_tiers: how many groups.

    Raises:
        ConfigError: when `num_tiers` is less than 2.
    """

    num_tiers: int = 5

    def __post_init__(self) -> None:
        _at_least(2, num_tiers=self.num_tiers)


@dataclass(frozen=True)
class Cyclic:
    """Clients are asked in turn: first whoever was asked longest ago, by name among those asked in the same round.

    With the same clients all the time that is round robin in the order of their names; who joins is next.
    """


Selection: TypeAlias = Uniform | Oort | Tiers | Cyclic


# ---- rounds ----------------------------------------------------------------------------------------------------------


_NOBODY_WAITS: Final[Mapping[str, Any]] = {
    "fraction_evaluate": 0.0,
    "staleness": Polynomial(0.5),
    "max_staleness": 1000,
    "timeout_s": 86_400.0,
}
"""What the asynchronous presets take for granted: an unfinished version keeps nobody waiting, and with n clients an
update is about n / k versions late as a matter of course."""


@dataclass(frozen=True, kw_only=True)
class RoundConfig:
    """How rounds open and close. Five presets set what belongs together: `synchronous`, `semi_synchronous`, `cyclic`,
    `buffered` (FedBuff) and `asynchronous` (FedAsync).

    Args:
        num_rounds: rounds to run; each that had an update makes a new model version.
        min_fit_clients: a round closes once this many updates are folded (then `grace_s`).
        min_available_clients: clients that must have joined before the first round opens; None means
            `min_fit_clients`, and 1 when rounds are asynchronous.
        fraction_fit: share of the living clients that is tasked in a round (at least `min_fit_clients`).
        over_selection: task `over_selection` times `min_fit_clients` clients in a round, in place of `fraction_fit`
            (Bonawitz et al. 2019, section 9, takes 1.3).
        is_asynchronous: whoever is idle is tasked at once, with the newest model, whether or not a round has closed.
        concurrency: at most so many clients train at a time, when rounds are asynchronous; None: all.
        fraction_evaluate: share of the living clients that evaluates each new model; 0 turns it off.
        timeout_s: a round that is still open after this many seconds closes with what came.
        grace_s: seconds that a round stays open for more updates once `min_fit_clients` are folded; `inf`
            waits for the whole cohort, as Flower does.
        evaluate_timeout_s: seconds after which a federated evaluation closes with what came; None means
            `timeout_s`, 600 at most.
        heartbeat_s: seconds between a client's signs of life.
        lease_s: seconds of silence after which a client is taken for lost.
        staleness: s(tau), what an update that is tau versions late still counts.
        max_staleness: versions beyond which a late update is refused, and its client told to stop training for it.
        mixing: alpha of FedAsync, in (0, 1]; None for other strategies.
        selection: who is asked when there are more idle clients than places.

    Raises:
        ConfigError: when the values cannot work together.
    """

    num_rounds: int = 10
    min_fit_clients: int = 2
    min_available_clients: int | None = None
    fraction_fit: float = 1.0
    over_selection: float | None = None
    is_asynchronous: bool = False
    concurrency: int | None = None
    fraction_evaluate: float = 1.0
    timeout_s: float = 600.0
    grace_s: float = 0.0
    evaluate_timeout_s: float | None = None
    heartbeat_s: float = 5.0
    lease_s: float = 20.0
    staleness: Staleness = Polynomial()
    max_staleness: int = 20
    mixing: float | None = None
    selection: Selection = Uniform()

    @classmethod
    def synchronous(cls, clients: int, **settings: Any) -> RoundConfig:
        """`clients` are asked in each round, and it closes when all of them have answered (or at `timeout_s`).

        Who leaves or fails is replaced while there is somebody to ask.
        """
        return cls._preset("synchronous", {"min_fit_clients": clients, "over_selection": 1.0}, settings)

    @classmethod
    def semi_synchronous(cls, clients: int, over_selection: float = 1.3, **settings: Any) -> RoundConfig:
        """`over_selection` times as many as `clients` are asked in each round, and the first `clients` close it.

        The others' updates count in a later round, discounted; with `max_staleness=0` they are told to stop instead.
        `grace_s` lets more of them into their own round.
        """
        fixed = {"min_fit_clients": clients, "over_selection": over_selection}
        return cls._preset("semi_synchronous", fixed, settings)

    @classmethod
    def cyclic(cls, clients: int, **settings: Any) -> RoundConfig:
        """One client is asked in each round, all of them in turn; the first round waits for `clients` of them.

        Who leaves or fails is replaced by the next one.
        """
        fixed = {"min_fit_clients": 1, "min_available_clients": clients, "over_selection": 1.0, "selection": Cyclic()}
        return cls._preset("cyclic", fixed, settings)

    @classmethod
    def buffered(cls, k: int = 10, **settings: Any) -> RoundConfig:
        """FedBuff (Nguyen et al. 2022): all idle clients train on the newest model; `k` updates make the next one.

        An update that is tau versions late counts 1 / sqrt(1 + tau). Unless you say otherwise there is no federated
        evaluation, `max_staleness` is 1000, and `timeout_s`, after which a version is made of fewer updates, is a day.
        """
        fixed = {"min_fit_clients": k, "is_asynchronous": True}
        return cls._preset("buffered", fixed, {**_NOBODY_WAITS, **settings})

    @classmethod
    def asynchronous(cls, alpha: float = 0.6, **settings: Any) -> RoundConfig:
        """FedAsync (Xie et al. 2019): all idle clients train on the newest model; each update makes the next one.

        The model becomes (1 - a) of itself plus a of the client's, a = `alpha` * s(tau). Unless you say otherwise there
        is no federated evaluation, `max_staleness` is 1000 and `timeout_s` a day.
        """
        fixed = {"min_fit_clients": 1, "is_asynchronous": True, "mixing": alpha}
        return cls._preset("asynchronous", fixed, {**_NOBODY_WAITS, **settings})

    @classmethod
    def _preset(cls, name: str, fixed: dict[str, Any], settings: dict[str, Any]) -> RoundConfig:
        unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
        if unknown:
            near = difflib.get_close_matches(unknown[0], cls.__dataclass_fields__, 1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ConfigError(f"RoundConfig.{name} knows no setting {unknown[0]!r}{hint}")
        if "over_selection" in fixed and "fraction_fit" in settings:
            raise ConfigError(f"RoundConfig.{name} says itself how many clients are asked: leave fraction_fit out")
        twice = sorted(set(fixed) & set(settings))
        if twice:
            raise ConfigError(f"RoundConfig.{name} sets {twice[0]} itself: leave it out, or use RoundConfig(...)")
        return cls(**fixed, **settings)

    def __post_init__(self) -> None:
        _at_least(1, num_rounds=self.num_rounds, min_fit_clients=self.min_fit_clients)
        _at_least(0, max_staleness=self.max_staleness)
        if self.min_available_clients is not None:
            _at_least(1, min_available_clients=self.min_available_clients)
        _positive(timeout_s=self.timeout_s)
        if self.evaluate_timeout_s is not None:
            _positive(evaluate_timeout_s=self.evaluate_timeout_s)
        _positive(heartbeat_s=self.heartbeat_s, lease_s=self.lease_s)
        if not isinstance(self.is_asynchronous, bool):
            raise ConfigError(f"is_asynchronous must be True or False, not {self.is_asynchronous!r}")
        if not 0 < _number("fraction_fit", self.fraction_fit) <= 1:
            raise ConfigError(f"fraction_fit must be in (0, 1], not {self.fraction_fit}")
        _share(fraction_evaluate=self.fraction_evaluate)
        if math.isnan(_number("grace_s", self.grace_s)) or self.grace_s < 0:
            raise ConfigError(f"grace_s must be 0 or more, not {self.grace_s}")
        if self.mixing is not None and not 0 < _number("mixing (alpha)", self.mixing) <= 1:
            raise ConfigError(f"mixing (alpha) must be in (0, 1], not {self.mixing}")
        if not isinstance(self.staleness, Staleness):
            raise ConfigError(f"staleness must be Constant(), Polynomial(a) or Hinge(a, b), not {self.staleness!r}")
        if not isinstance(self.selection, Selection):
            raise ConfigError(f"selection must be Uniform(), Oort(...), Tiers(...) or Cyclic(), not {self.selection!r}")
        if self.lease_s < 2 * self.heartbeat_s:
            raise ConfigError(
                f"lease_s ({self.lease_s}) must be at least twice heartbeat_s ({self.heartbeat_s}), "
                "or one late heartbeat costs a client its place"
            )
        self._check_regime()

    def _check_regime(self) -> None:
        """What would contradict one another is refused: neither wish could be kept."""
        if self.over_selection is not None:
            if not (math.isfinite(_number("over_selection", self.over_selection)) and self.over_selection >= 1):
                raise ConfigError(f"over_selection must be 1 or more, not {self.over_selection}")
            if self.fraction_fit != 1:
                raise ConfigError(
                    "over_selection and fraction_fit both say how many clients are asked in a round: set one of them"
                )
        if self.mixing is not None and not (self.is_asynchronous and self.min_fit_clients == 1):
            raise ConfigError(
                f"mixing={self.mixing} (alpha) is FedAsync's, which makes a version of each update: use "
                "RoundConfig.asynchronous(alpha)"
            )
        if not self.is_asynchronous:
            if self.concurrency is not None:
                raise ConfigError(
                    "concurrency limits asynchronous rounds; in others over_selection or fraction_fit says how many "
                    "clients train at a time"
                )
            return
        if self.concurrency is not None:
            _at_least(1, concurrency=self.concurrency)
        if self.over_selection is not None or self.fraction_fit != 1:
            name = "fraction_fit" if self.over_selection is None else "over_selection"
            raise ConfigError(
                f"asynchronous rounds have no cohort for {name} to size, every idle client trains: "
                "limit that with concurrency"
            )
        if self.grace_s:
            raise ConfigError(
                "grace_s waits for the rest of a cohort, and asynchronous rounds have none: "
                "raise min_fit_clients (k) to fold more updates into each"
            )

    @property
    def start_clients(self) -> int:
        """Clients that must be there before the first round opens."""
        if self.min_available_clients is not None:
            return self.min_available_clients
        return 1 if self.is_asynchronous else self.min_fit_clients

    def discount(self, staleness: int) -> float:
        """What an update so many versions late counts: s(tau), times alpha where there is one."""
        return self.staleness(staleness) * (1.0 if self.mixing is None else self.mixing)

    @property
    def evaluation_s(self) -> float:
        """Seconds that a federated evaluation stays open."""
        return min(self.timeout_s, 600.0) if self.evaluate_timeout_s is None else self.evaluate_timeout_s

    def cohort_size(self, living: int) -> int:
        """How many clients a round asks when `living` are there; those that it cannot have yet may come later."""
        if self.is_asynchronous:
            return living if self.concurrency is None else self.concurrency
        if self.over_selection is not None:
            return math.ceil(self.over_selection * self.min_fit_clients - 1e-9)
        return max(self.min_fit_clients, math.ceil(self.fraction_fit * living - 1e-9))

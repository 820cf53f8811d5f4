"""Ways to share one dataset out among clients, as lists of indices."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbus.errors import ConfigError

Indices: TypeAlias = NDArray[np.int64]

_MAX_DRAWS = 1000


def iid(labels: ArrayLike, num_partitions: int, seed: int) -> list[Indices]:
    """Share examples out at random, in partitions whose sizes differ by one at most.

    Returns one sorted int64 array of indices per partition; each index is in exactly one.

    Raises:
        ConfigError: arguments that cannot work, or fewer examples than partitions.
    """
    labels = _check(labels, num_partitions, 1, seed)
    order = np.random.default_rng(seed).permutation(len(labels)).astype(np.int64)
    return [np.sort(part) for part in np.array_split(order, num_partitions)]


def dirichlet(labels: ArrayLike, num_partitions: int, alpha: float, seed: int, min_size: int = 10) -> list[Indices]:
    """Share each class out in proportions drawn from Dir(alpha): the smaller alpha, the more unlike the clients.

    Yurochkin et al. 2019 (section 4) and Hsu et al. 2019. A draw that leaves a partition with fewer than
    `min_size` examples is thrown away and drawn again.

    Returns one sorted int64 array of indices per partition; each index is in exactly one.

    Raises:
        ConfigError: arguments that cannot work, or no draw in 1000 that gives every partition `min_size`.
    """
    labels = _check(labels, num_partitions, min_size, seed)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha must be a positive number, not {alpha}")
    rng = np.random.default_rng(seed)
    for _ in range(_MAX_DRAWS):
        parts = _draw(labels, num_partitions, alpha, rng)
        if min(len(part) for part in parts) >= min_size:
            return parts
    raise ConfigError(
        f"Dir({alpha}) over {num_partitions} partitions of {len(labels)} examples leaves one with fewer than "
        f"{min_size} each time: raise alpha, or lower num_partitions or min_size"
    )


def _draw(labels: NDArray[Any], num_partitions: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(num_partitions)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label).astype(np.int64))
        proportions = rng.dirichlet(np.full(num_partitions, alpha))
        cuts = (np.cumsum(proportions)[:-1] * len(members)).astype(np.int64)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def _check(labels: ArrayLike, num_partitions: int, min_size: int, seed: int) -> NDArray[Any]:
    array = np.asarray(labels)
    if array.ndim != 1:
        raise ConfigError(f"labels must be one-dimensional, not of shape {array.shape}")
    for name, value, least in (
        ("num_partitions", num_partitions, 1),
        ("min_size", min_size, 0),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ConfigError(f"{name} must be a whole number of {least} or more, not {value!r}")
    if len(array) < num_partitions * max(min_size, 1):
        raise ConfigError(
            f"{len(array)} examples are too few for {num_partitions} partitions of at least {max(min_size, 1)}: "
            "lower num_partitions" + (" or min_size" if min_size > 1 else "")
        )
    return array

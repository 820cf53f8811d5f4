"""Datasets that are small enough to come with a package, so that nothing is downloaded."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedbus.errors import ConfigError, UsageError
from fedbus.types import Array


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples `x` ([n, ...]) and their labels `y` ([n])."""

    x: Array
    y: Array

    def __post_init__(self) -> None:
        if self.y.ndim != 1 or len(self.x) != len(self.y):
            raise ConfigError(f"x of shape {self.x.shape} and y of shape {self.y.shape} do not belong together")

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: ArrayLike) -> Dataset:
        """Return the examples at `indices`, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Dataset(self.x[chosen], self.y[chosen])

    def split(self, test_fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Return (train, test), disjoint, with `test_fraction` of each class, rounded, in the test part.

        Raises:
            ConfigError: `test_fraction` is not in [0, 1].
        """
        if not 0 <= test_fraction <= 1:
            raise ConfigError(f"test_fraction must be in [0, 1], not {test_fraction}")
        rng = np.random.default_rng(seed)
        in_test = np.zeros(len(self), dtype=np.bool_)
        for label in np.unique(self.y):
            members = rng.permutation(np.flatnonzero(self.y == label))
            in_test[members[: round(test_fraction * len(members))]] = True
        return self.take(np.flatnonzero(~in_test)), self.take(np.flatnonzero(in_test))


def digits() -> Dataset:
    """Return 1797 handwritten digits: `x` float32 [1797, 1, 8, 8] in 0 .. 1, `y` int64 [1797] in 0 .. 9.

    The test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998), as scikit-learn
    brings it.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    rows = _bundled_digits()
    x = (rows[:, :-1] / 16).reshape(-1, 1, 8, 8)
    return Dataset(x, rows[:, -1].astype(np.int64))


def _bundled_digits() -> NDArray[np.float32]:
    # Importing sklearn.datasets costs 0.65 s and 60 MB in every client process; the file it would read, 4 ms.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("scikit-learn is not installed: pip install 'fedbus[demo]'")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if path.exists():
        return np.loadtxt(path, delimiter=",", dtype=np.float32)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.column_stack([images, labels]).astype(np.float32)

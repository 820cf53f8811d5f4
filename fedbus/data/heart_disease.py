"""Heart disease in four hospitals: the UCI data of Detrano et al. 1989, prepared as FLamby's benchmark has them.

The files are not part of the package: cleveland.csv, hungarian.csv, switzerland.csv and va.csv, each with a header and
the 14 usual columns, are the "processed" ones of archive.ics.uci.edu/dataset/45. "?" and nothing are missing values.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedbus.data.sources import Dataset
from fedbus.errors import ConfigError, UsageError

HOSPITALS: Final = ("cleveland", "hungarian", "switzerland", "va")
FOLDER: Final = "FEDBUS_HEART_DISEASE"
"""The environment variable that says where the files are."""

NUM_FEATURES: Final = 13
_NUMBERS: Final = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak")
_LEVELS: Final = {"cp": (2.0, 3.0, 4.0), "restecg": (1.0, 2.0)}
"""What is told apart by one feature for each level but the first, over all hospitals: none of them has all."""
_TARGET: Final = "target"
_COLUMNS: Final = (*_NUMBERS, *_LEVELS, _TARGET)
"""slope, ca and thal are left out: most of their values are missing."""
_TRAIN_SHARE: Final = 0.66
_TEST_SHARE: Final = 0.34
_SPLIT_SEED: Final = 43

Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Hospital:
    """What one hospital has: `x` float64 [n, 13], as they are in the file, `y` int64 [n]: 1 for a disease."""

    name: str
    train: Dataset
    test: Dataset


@dataclass(frozen=True)
class Scale:
    """Means and deviations of features, taken of some examples, by which others become comparable with them."""

    mean: Matrix
    deviation: Matrix

    @classmethod
    def of(cls, x: Matrix) -> Scale:
        """That of `x` [n, features]; a feature that is the same everywhere is only shifted, and not divided by 0."""
        return cls(x.mean(axis=0), x.std(axis=0, ddof=1) + 1e-9)

    def apply(self, x: Matrix) -> Matrix:
        """`x` with mean 0 and deviation 1, were it what this was taken of."""
        return (x - self.mean) / self.deviation


def data_folder(folder: Path | str | None = None) -> Path:
    """`folder`, or else where FEDBUS_HEART_DISEASE says that the files are.

    Raises:
        ConfigError: when neither is given, or a file is missing there.
    """
    given = folder or os.environ.get(FOLDER)
    if not given:
        raise ConfigError(f"where are the heart-disease files? Set {FOLDER} to the folder of cleveland.csv and others")
    missing = [f"{name}.csv" for name in HOSPITALS if not (Path(given) / f"{name}.csv").is_file()]
    if missing:
        raise ConfigError(f"{given} has no {', '.join(missing)}: the heart-disease files of UCI, one for each hospital")
    return Path(given)


def load_hospital(name: str, folder: Path) -> Hospital:
    """The patients of one hospital without missing values, split 66 to 34, each class alike, always in the same way.

    A hospital with a class of two at the most is split without regard to classes.

    Raises:
        ConfigError: for a file that is none of these.
        UsageError: scikit-learn is not installed.
    """
    try:
        from sklearn.model_selection import train_test_split
    except ImportError as exc:
        raise UsageError("scikit-learn is not installed: pip install 'fedbus[demo]'") from exc
    everyone = _read(folder / f"{name}.csv")
    classes = np.bincount(everyone.y, minlength=2)
    train, test = train_test_split(
        np.arange(len(everyone)),
        train_size=_TRAIN_SHARE,
        test_size=_TEST_SHARE,
        random_state=_SPLIT_SEED,
        shuffle=True,
        stratify=everyone.y if classes.min() > 2 else None,
    )
    return Hospital(name, everyone.take(train), everyone.take(test))


def _read(path: Path) -> Dataset:
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        absent = [column for column in _COLUMNS if column not in (rows.fieldnames or ())]
        if absent:
            raise ConfigError(f"{path} has no column {', '.join(absent)}: is it a heart-disease file of UCI?")
        texts = [[row[column] for column in _COLUMNS] for row in rows]
    try:
        values = np.array([row for row in texts if not {"", "?", None} & set(row)], np.float64)
    except ValueError as exc:
        raise ConfigError(f"{path} holds something that is no number: {exc}") from None
    if not values.size:
        raise ConfigError(f"{path} has no row without missing values")
    column = {name: values[:, index] for index, name in enumerate(_COLUMNS)}
    levels = [(column[name] == level).astype(np.float64) for name, known in _LEVELS.items() for level in known]
    x = np.column_stack([*(column[name] for name in _NUMBERS), *levels])
    return Dataset(x, (column[_TARGET] > 0).astype(np.int64))

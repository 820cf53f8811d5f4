"""Synthetic(alpha, beta): users whose models and data differ as much as one likes, made and not downloaded."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedbus.data.sources import Dataset
from fedbus.errors import ConfigError

NUM_FEATURES = 60
NUM_CLASSES = 10


def synthetic(alpha: float, beta: float, *, num_users: int = 30, seed: int = 0) -> list[Dataset]:
    """Return each user's examples: `x` float64 [n_k, 60], `y` int64 [n_k] in 0 .. 9.

    Li et al. 2020 (Federated Optimization in Heterogeneous Networks), section 5.1 and appendix C.1: user k labels its
    examples y = argmax(softmax(x W_k + b_k)), with

    - W_k [60, 10] and b_k [10] from N(u_k, 1), u_k from N(0, alpha);
    - x from N(v_k, Sigma), Sigma diagonal with Sigma_jj = j^-1.2 (a variance), v_k [60] from N(B_k, 1), B_k from
      N(0, beta);
    - n_k a power law: 50 plus lognormal(4, 2), rounded down.

    u_k adds the same to every class's score, so alpha changes no label; the users' models differ by N(., 1) even at
    alpha 0, and their data by N(., 1) at beta 0.

    alpha and beta are standard deviations, as in the program that the authors published; at 0 and 1, the paper's own
    values, they are the variances as well. A seed gives the data that their program makes of it, so that results can
    be compared: from numpy's old generator, whose numbers are the same for ever, and in their order.

    Raises:
        ConfigError: when an argument is out of its range.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{name} must be 0 or more, not {value}")
    if num_users < 1:
        raise ConfigError(f"num_users must be 1 or more, not {num_users}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be from 0 to 2**32 - 1, not {seed}")
    rng = np.random.RandomState(seed)
    sizes = 50 + rng.lognormal(4, 2, num_users).astype(np.int64)
    model_means, data_means = rng.normal(0, alpha, num_users), rng.normal(0, beta, num_users)
    centers = rng.normal(data_means[:, None], 1, (num_users, NUM_FEATURES))
    return [_user(*of_user, rng) for of_user in zip(sizes, model_means, centers, strict=True)]


def _user(size: int, model_mean: float, center: NDArray[np.float64], rng: np.random.RandomState) -> Dataset:
    weights = rng.normal(model_mean, 1, (NUM_FEATURES, NUM_CLASSES))
    bias = rng.normal(model_mean, 1, NUM_CLASSES)
    x = rng.normal(center, _DEVIATIONS, (size, NUM_FEATURES))
    y: NDArray[np.int64] = (x @ weights + bias).argmax(axis=1)  # softmax keeps the order
    return Dataset(x, y)


_DEVIATIONS = np.arange(1, NUM_FEATURES + 1) ** (-1.2 / 2)
"""Square roots of Sigma's diagonal."""

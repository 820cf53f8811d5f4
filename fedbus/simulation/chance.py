"""Randomness as a function of its key and nothing else: the same in every process, whoever draws before."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist
from typing import Final

_NORMAL: Final = NormalDist()


def uniform(*key: object) -> float:
    """In (0, 1), both ends excluded."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52


def lognormal(sigma: float, *key: object) -> float:
    """exp(sigma Z), Z standard normal: median 1."""
    return math.exp(sigma * _NORMAL.inv_cdf(uniform(*key))) if sigma else 1.0


def exponential(mean: float, *key: object) -> float:
    """Greater than 0, `mean` on average."""
    return -mean * math.log(uniform(*key))

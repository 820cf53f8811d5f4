"""An example to see the deployment at work: put your own app here.

Each client learns the mean of numbers that stay where it is. FEDBUS_PAUSE_S makes it train for as long as a real one.
"""

from __future__ import annotations

import os
import time

import numpy as np

import fedbus as fb


class Mean(fb.NumPyClient):
    """Gradient descent on the distance to its own data, whose mean is 5."""

    def __init__(self, context: fb.ClientContext) -> None:
        seed = [ord(letter) for letter in context.client_id]
        self.data = np.random.default_rng(seed).normal(5.0, 1.0, size=(200, 3))
        self.pause_s = float(os.environ.get("FEDBUS_PAUSE_S", "1"))

    def fit(self, parameters, config):  # type: ignore[no-untyped-def]
        (w,) = parameters
        time.sleep(self.pause_s)
        for _ in range(10):
            w = w - 0.1 * (w - self.data.mean(axis=0))
        return [w], len(self.data), {}

    def evaluate(self, parameters, config):  # type: ignore[no-untyped-def]
        return float(((self.data - parameters[0]) ** 2).mean()), len(self.data), {}


app = fb.App(
    client_fn=Mean,
    initial_parameters=[np.zeros(3)],
    rounds=fb.RoundConfig.synchronous(
        int(os.environ.get("FEDBUS_COHORT", "8")), num_rounds=int(os.environ.get("FEDBUS_ROUNDS", "1000"))
    ),
)

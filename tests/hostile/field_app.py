"""The app under attack: honest clients whose fit takes a moment, in rounds that close on them alone.

`python -m tests.hostile.field_app URL...` runs one honest client for each URL, h1, h2, ..., until the run ends.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Any

import numpy as np

import fedbus as fb
from fedbus.bus.access import user_of
from fedbus.training.base import Client, ClientContext
from fedbus.types import EvaluateResult, FitResult

HONEST = ("h1", "h2", "h3")
MODEL_BYTES = int(os.environ.get("HOSTILE_MODEL_BYTES", "262144"))
_FIT_S = float(os.environ.get("HOSTILE_FIT_S", "0.4"))


class Honest(Client):
    """Takes its time, and adds a little."""

    def __init__(self, context: ClientContext) -> None:
        self._id = context.client_id

    def fit(self, parameters: Any, config: Any) -> FitResult:
        time.sleep(_FIT_S)
        return FitResult(parameters={"w": parameters["w"] + np.float32(0.001)}, num_examples=10, metrics={"loss": 0.5})

    def evaluate(self, parameters: Any, config: Any) -> EvaluateResult:
        return EvaluateResult(loss=1.0, num_examples=10, metrics={"accuracy": 0.5})


app = fb.App(
    client_fn=Honest,
    initial_parameters=lambda: {"w": np.zeros(MODEL_BYTES // 4, np.float32)},
    rounds=fb.RoundConfig(
        num_rounds=100_000,
        min_fit_clients=len(HONEST),
        min_available_clients=len(HONEST),
        timeout_s=30.0,
        evaluate_timeout_s=0.5,
        heartbeat_s=0.5,
        lease_s=8.0,
    ),
)


async def _take_part(urls: list[str]) -> None:
    ids = (user_of(url).partition(".")[2] for url in urls)
    await asyncio.gather(*(fb.join(app, broker=url, client_id=each) for url, each in zip(urls, ids, strict=True)))


if __name__ == "__main__":
    asyncio.run(_take_part(sys.argv[1:]))

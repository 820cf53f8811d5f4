"""The strategies that the README shows, copied from it: they work, and in every kind of rounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedbus as fb
from fedbus.config import RoundConfig
from fedbus.strategies.base import Strategy
from tests.kit import QUICK, AddingClient, federation

_README = (Path(__file__).parents[2] / "README.md").read_text()


def shown(name: str) -> type[Strategy]:
    """The class of that name, as the README has it."""
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", _README, re.S) if f"class {name}(" in block)
    scope: dict[str, Any] = {"fb": fb, "np": np}
    exec(source, scope)
    strategy: type[Strategy] = scope[name]
    return strategy


_KINDS = {
    "synchronous": RoundConfig.synchronous(3, **QUICK),
    "semi-synchronous": RoundConfig.semi_synchronous(3, 1.0, **QUICK),
    "asynchronous": RoundConfig.buffered(3, **QUICK, min_available_clients=3),
}


@pytest.mark.parametrize("rounds", _KINDS.values(), ids=_KINDS)
@pytest.mark.parametrize(("name", "step"), [("Middle", np.median), ("Sum", np.sum)])
async def test_a_strategy_of_ones_own_runs_in_every_kind_of_rounds(
    name: str, step: Callable[[list[float]], float], rounds: RoundConfig
) -> None:
    app = fb.App(
        client_fn=AddingClient, strategy=shown(name)(), initial_parameters=[np.zeros(3, np.float32)], rounds=rounds
    )
    async with federation(app) as story:
        history = await story.run("c1", "c2", "c4")
        model = story.model()["0"]
    expected = 0.0
    for record in history.rounds:  # in asynchronous rounds some are late, and a client may be in one twice
        assert len(record.folded) == 3
        expected += step([int(each.client_id[1]) * rounds.staleness(each.staleness) for each in record.folded])
    np.testing.assert_allclose(model, [expected] * 3, rtol=1e-6)

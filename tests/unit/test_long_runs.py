"""However many rounds a run has, the server holds few of them in memory; the rest is on the disk, and in the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedbus.observe import events as o
from fedbus.server import runtime
from tests.kit import Federation, app_of, federation

ROUNDS = 14


@pytest.fixture(autouse=True)
def two_rounds_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_ROUNDS_IN_MEMORY", 2)


@pytest.mark.parametrize("killed_after", [None, 7])
async def test_few_rounds_are_held_and_all_are_told(tmp_path: Path, killed_after: int | None) -> None:
    held: list[int] = []
    app = app_of(rounds={"num_rounds": ROUNDS, "min_fit_clients": 2})
    async with federation(app, run_dir=tmp_path) as story:

        def observe(event: object) -> None:
            Federation.observe(story, event)
            if isinstance(event, o.RoundClosed) and story.server is not None:
                held.append(len(story.server.history.rounds))

        story.observe = observe  # type: ignore[method-assign]
        serving = story.start_server()
        for name in ("c1", "c2"):
            story.start_client(name)
        if killed_after is not None:
            await story.until(o.RoundClosed, round=killed_after)
            await story.kill_server()
            serving = story.resume_server()
        history = await serving
    assert max(held) <= 4
    assert [record.round for record in history.rounds] == list(range(1, ROUNDS + 1))
    assert history.updates == 2 * ROUNDS
    assert all(record.federated is not None for record in history.rounds)
    written = (tmp_path / "history.json").read_text()
    assert written == history.to_json()
    assert [record["round"] for record in json.loads(written)["rounds"]] == list(range(1, ROUNDS + 1))


async def test_an_evaluation_of_a_round_that_is_held_no_more_is_in_the_result(tmp_path: Path) -> None:
    done: list[int] = []

    def evaluate(round_: int, _: object) -> tuple[float, dict[str, float]]:
        done.append(round_)
        return float(round_), {}

    app = app_of(rounds={"num_rounds": ROUNDS, "min_fit_clients": 1, "fraction_evaluate": 0}, evaluate_fn=evaluate)
    async with federation(app, run_dir=tmp_path) as story:
        history = await story.run("c1")
    assert done == list(range(ROUNDS + 1))
    assert [record.central and record.central.loss for record in history.rounds] == list(range(1, ROUNDS + 1))


async def test_without_a_run_folder_everything_stays_in_memory() -> None:
    async with federation(app_of(rounds={"num_rounds": ROUNDS, "min_fit_clients": 1})) as story:
        history = await story.run("c1")
    assert [record.round for record in history.rounds] == list(range(1, ROUNDS + 1))

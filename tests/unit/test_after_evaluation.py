"""Early stopping, best models and users' own: by hand, in runs, and over the death of servers."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedbus as fb
import fedbus.server.runtime
from fedbus.errors import ConfigError
from fedbus.observe import events as o
from fedbus.observe.logs import sentence
from fedbus.server.checkpoint import RunFolder
from fedbus.server.history import Best
from fedbus.server.runtime import Server
from fedbus.tensorfile import load_model, map_model
from fedbus.types import Array
from tests.kit import Counting, Pause, app_of, federation

CLIENTS = ("c1", "c2", "c3")


@pytest.fixture(autouse=True)
def _tidy_after_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a checkpoint that nobody asks to be kept is gone at once."""
    monkeypatch.setattr(fedbus.server.runtime, "_TIDY_EVERY_S", 0.0)


# ---- by hand ---------------------------------------------------------------------------------------------------------


def seen(piece: fb.AfterEvaluation, values: Iterable[object], metric: str = "accuracy") -> list[object]:
    """What it says to such a series, one evaluation a round."""
    piece.begin()
    return [
        piece.see(
            fb.EvaluatedModel(round=n, version=n, where="central", loss=0.0, metrics={} if v is None else {metric: v})
        )
        for n, v in enumerate(values)
    ]


def stops_at(piece: fb.AfterEvaluation, *values: object) -> int | None:
    said = seen(piece, values)
    return next((n for n, word in enumerate(said) if isinstance(word, fb.Stop)), None)


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ((0.1, 0.2, 0.3, 0.4), None),
        ((0.5, 0.4, 0.4), 2),
        ((0.5, 0.4, 0.6, 0.6, 0.6), 4),
        ((0.5, float("nan"), float("inf")), 2),
        ((float("nan"), float("nan")), 1),
        ((0.5, "good", 0.4), 2),
        ((0.5, None, 0.4, None, 0.3), 4),  # what does not come is no evaluation of it
        ((0, True, True, True), 3),
    ],
)
def test_it_stops_after_so_many_evaluations_that_are_no_better_than_the_best(
    values: tuple[object, ...], at: int | None
) -> None:
    assert stops_at(fb.EarlyStopping("accuracy", patience=2), *values) == at


def test_what_is_better_by_too_little_is_no_better() -> None:
    assert stops_at(fb.EarlyStopping("accuracy", patience=2, min_delta=0.1), 0.5, 0.55, 0.59, 0.8) == 2
    assert stops_at(fb.EarlyStopping("accuracy", patience=2, min_delta=0.1), 0.5, 0.55, 0.65, 0.8) is None


def test_a_loss_falls_and_everything_else_rises_unless_it_is_said() -> None:
    assert fb.EarlyStopping("loss").mode == fb.BestModel("loss").mode == "min"
    assert stops_at(fb.EarlyStopping("accuracy", patience=1, mode="min"), 0.5, 0.4, 0.3, 0.3) == 3
    said = seen(fb.EarlyStopping("perplexity", patience=1, mode="min"), [2.0, 2.0], "perplexity")
    assert said == [None, fb.Stop("perplexity has not fallen for 1 evaluation")]


def test_it_forgets_one_run_in_the_next() -> None:
    stopping = fb.EarlyStopping("accuracy", patience=2)
    assert stops_at(stopping, 0.9, 0.1, 0.1) == 2
    assert stops_at(stopping, 0.2, 0.1, 0.3) is None


def test_the_first_of_the_best_is_kept() -> None:
    keeps = seen(fb.BestModel("accuracy", name="top"), [float("nan"), 0.5, 0.7, 0.7, 0.6, 0.8])
    assert keeps == [None, *(v and fb.Keep("top", "accuracy", v) for v in (0.5, 0.7, None, None, 0.8))]


def test_a_metric_that_does_not_come_is_told_once_with_those_that_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert stops_at(fb.EarlyStopping("accuracy", patience=1), *[None] * 5) is None
    assert caplog.messages == ["the central evaluation of round 0 has no metric 'accuracy', only loss"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fb.EarlyStopping("loss", patience=0), "patience must be a whole number of evaluations"),
        (lambda: fb.EarlyStopping("loss", min_delta=-1), "min_delta must be a number, 0 or more"),
        (lambda: fb.EarlyStopping("loss", mode="down"), "mode must be 'max' or 'min', not 'down'"),  # type: ignore[arg-type]
        (lambda: fb.EarlyStopping(3), "metric must be the name of one"),  # type: ignore[arg-type]
        (lambda: fb.BestModel("loss", name="../x"), "name must be letters"),
        (lambda: fb.BestModel("loss", name="model"), "name must be letters"),
        (lambda: app_of(after_evaluation=fb.EarlyStopping("loss")), "after_evaluation must be a list"),
        (lambda: app_of(after_evaluation=[fb.EarlyStopping("loss", where="central")]), "give the App an evaluate_fn"),
        (lambda: app_of(after_evaluation=[fb.EarlyStopping("loss", where="x")]), "where must be"),  # type: ignore[arg-type]
        (
            lambda: app_of(after_evaluation=[fb.BestModel("loss")], rounds={"fraction_evaluate": 0}),
            "BestModel waits for evaluations, and there are none: give the App an evaluate_fn, or set",
        ),
        (
            lambda: app_of(
                after_evaluation=[fb.BestModel("loss", where="federated")],
                evaluate_fn=lambda round_, model: None,
                rounds={"fraction_evaluate": 0},
            ),
            "set RoundConfig.fraction_evaluate above 0",
        ),
        (lambda: app_of(after_evaluation=[fb.BestModel("loss"), fb.BestModel("x")]), "needs a name of its own"),
    ],
)
def test_what_cannot_work_is_one_line(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


# ---- in a run --------------------------------------------------------------------------------------------------------


def scores(*values: float) -> Any:
    """An evaluate_fn that gives these accuracies, round after round; the last one for all further rounds."""
    return lambda round_, model: (float(round_), {"accuracy": values[min(round_, len(values) - 1)]})


@pytest.mark.parametrize("regime", [{"min_fit_clients": 2}, {"min_fit_clients": 1, "is_asynchronous": True}])
async def test_a_run_that_has_what_it_is_for_is_finished_and_everybody_is_told(
    tmp_path: Path, regime: dict[str, Any]
) -> None:
    app = app_of(
        evaluate_fn=scores(0.1, 0.5, 0.9, 0.8, 0.7),
        after_evaluation=[fb.EarlyStopping("accuracy", patience=2), fb.BestModel("accuracy")],
        rounds={"num_rounds": 500, "fraction_evaluate": 0, **regime},
    )
    async with federation(app, run_dir=tmp_path) as story:
        serving = story.start_server()
        clients = [story.start_client("c1"), story.start_client("c2")]
        history = await serving
        goodbyes = [await client for client in clients]
    reason = "accuracy has not risen for 2 evaluations"
    assert (history.finished, history.reason) == (True, reason)
    assert 4 <= history.num_rounds < 500  # rounds do not wait for evaluations
    assert [bye and (bye.finished, bye.reason) for bye in goodbyes] == [(True, reason)] * 2
    best = Best(round=2, version=2, metric="accuracy", value=0.9)
    assert history.best == {"best": best}
    saved = json.loads((tmp_path / "history.json").read_text())
    assert saved["best"] == {"best": {"round": 2, "version": 2, "metric": "accuracy", "value": 0.9}}
    assert map_model(tmp_path / "best.safetensors").metadata["version"] == "2"
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == [f"model-{history.num_rounds}.safetensors"]
    kept = story.told(o.ModelKept)[-1]
    assert sentence(kept) == "round 2: model 2 is the best so far: accuracy 0.9000 (best.safetensors)"


async def test_what_clients_report_ends_a_run_as_well_and_central_evaluations_are_none_of_its_business() -> None:
    app = app_of(
        evaluate_fn=scores(0.1, 0.2, 0.3),
        after_evaluation=[fb.EarlyStopping("half", patience=3, where="federated"), fb.BestModel("loss", mode="max")],
        rounds={"num_rounds": 50},
    )
    async with federation(app) as story:
        history = await story.run("c1", "c2")
    assert (history.finished, history.reason) == (True, "half has not risen for 3 evaluations")
    assert 4 <= history.num_rounds < 50
    assert history.best["best"].round == history.num_rounds  # of the central ones, which go on to the last version


async def test_without_a_central_evaluation_those_of_the_clients_are_meant() -> None:
    app = app_of(after_evaluation=[fb.BestModel("loss")], rounds={"num_rounds": 3})
    async with federation(app) as story:
        history = await story.run("c1", "c2")
    assert history.best["best"].round == 1
    assert history.rounds[0].federated is not None
    assert history.best["best"].value == history.rounds[0].federated.loss


async def test_a_checkpoint_waits_for_its_evaluation_however_late_that_is(tmp_path: Path) -> None:
    """Rounds go on meanwhile, and would delete it."""
    counting = Counting()
    may_answer = threading.Event()

    def slow(round_: int, model: dict[str, Array]) -> tuple[float, dict[str, Any]]:
        if round_ == 1:
            assert may_answer.wait(30)
        return 0.0, {"accuracy": float(round_ == 1), "first": float(model["w"][0])}

    app = counting.app(num_rounds=5, evaluate_fn=slow, after_evaluation=[fb.BestModel("accuracy")])
    async with federation(app, run_dir=tmp_path) as story:
        serving = story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.RoundClosed, 2)
        may_answer.set()
        history = await serving
    assert history.best["best"].version == 1
    assert history.rounds[0].central is not None
    assert load_model(tmp_path / "best.safetensors")["w"][0] == np.float32(history.rounds[0].central.metrics["first"])


class Threshold(fb.AfterEvaluation):
    """A user's own, in a few lines."""

    def see(self, model: fb.EvaluatedModel) -> fb.Stop | None:
        return fb.Stop("good enough") if model.metrics["accuracy"] > 0.6 else None


async def test_a_users_own_ends_a_run_before_its_first_round() -> None:
    app = app_of(evaluate_fn=scores(0.7), after_evaluation=[Threshold()])
    async with federation(app) as story:
        history = await story.run()
    assert (history.finished, history.reason, history.num_rounds) == (True, "good enough", 0)


async def test_a_users_own_that_fails_is_told_and_the_others_still_see(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(fb.AfterEvaluation):
        def see(self, model: fb.EvaluatedModel) -> Any:
            return "stop" if model.round else model.metrics["nothing"]

    app = app_of(evaluate_fn=scores(0.5), after_evaluation=[Odd(), fb.BestModel("accuracy")], rounds={"num_rounds": 1})
    async with federation(app) as story:
        history = await story.run("c1", "c2")
    assert history.finished
    assert history.best["best"].value == 0.5
    assert caplog.messages == [
        "Odd raised KeyError: 'nothing' (round 0)",
        "Odd returned str, a Stop, a Keep or None is due",
    ]


# ---- servers die -----------------------------------------------------------------------------------------------------


def stopping_app(counting: Counting, evaluate_fn: Any) -> fb.App:
    pieces = [fb.EarlyStopping("accuracy", patience=2), fb.BestModel("accuracy")]
    return counting.app(num_rounds=8, evaluate_fn=evaluate_fn, after_evaluation=pieces)


async def test_a_resumed_run_knows_how_long_it_has_waited_and_which_was_the_best(tmp_path: Path) -> None:
    counting = Counting()
    third, fourth = threading.Event(), threading.Event()  # nobody gets beyond round 4, and nobody should
    gates = {("c1", 3): third, ("c1", 4): fourth}
    counting.hooks.append(lambda client, round_: gates[client, round_].wait(30) if (client, round_) in gates else None)
    async with federation(stopping_app(counting, scores(0.1, 0.9, 0.8)), run_dir=tmp_path) as story:
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.Evaluated, round=2)
        await story.kill_server()
        third.set()
        history = await story.resume_server()
        fourth.set()
    assert (history.finished, history.reason) == (True, "accuracy has not risen for 2 evaluations")
    assert history.num_rounds == 3
    assert history.best["best"].version == 1
    assert map_model(tmp_path / "best.safetensors").metadata["version"] == "1"


async def test_a_model_that_was_best_and_not_kept_yet_is_kept_by_the_next_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pause, keep_model = Pause(), RunFolder.keep_model

    def hanging(self: RunFolder, version: int, name: str, *, run_id: str) -> bool:
        if version == 1 and not pause._released.is_set():
            pause.in_thread()
            return False  # this process is dead
        return keep_model(self, version, name, run_id=run_id)

    monkeypatch.setattr(RunFolder, "keep_model", hanging)
    async with federation(stopping_app(Counting(), scores(0.1, 0.9, 0.8)), run_dir=tmp_path) as story:
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await pause.reached()
        await story.until(o.RoundClosed, 3)
        await story.kill_server()
        pause.go_on()
        history = await story.resume_server()
    assert history.best["best"].version == 1
    assert map_model(tmp_path / "best.safetensors").metadata["version"] == "1"


async def test_an_evaluation_that_a_server_died_in_is_made_up_for(tmp_path: Path) -> None:
    pause = Pause()

    def evaluate_fn(round_: int, model: dict[str, Array]) -> tuple[float, dict[str, Any]]:
        if round_ == 1:
            pause.in_thread()
        return 0.0, {"accuracy": 1.0 - round_, "first": float(model["w"][0])}

    async with federation(stopping_app(Counting(), evaluate_fn), run_dir=tmp_path) as story:
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await pause.reached()
        await story.until(o.RoundClosed, 2)
        await story.kill_server()
        pause.go_on()
        history = await story.resume_server()
    assert [record.round for record in history.rounds if record.central is None] == []
    first = [record.central.metrics["first"] for record in history.rounds if record.central is not None]
    assert len(set(first)) == len(first)  # each with its own model


async def test_a_goal_that_was_reached_when_the_server_died_is_not_passed_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counting = Counting()
    held = threading.Event()
    counting.hooks.append(lambda client, round_: held.wait(30) if (client, round_) == ("c1", 4) else None)
    async with federation(stopping_app(counting, scores(0.9, 0.8, 0.7, 0.6)), run_dir=tmp_path) as story:
        with monkeypatch.context() as patched:
            patched.setattr(Server, "_goal_reached", lambda self, reason: None)
            story.start_server()
            for client in CLIENTS:
                story.start_client(client)
            await story.until(o.Evaluated, round=3)
            await story.kill_server()
        history = await story.resume_server()
        held.set()
    assert (history.finished, history.num_rounds, history.best["best"].version) == (True, 3, 0)


async def test_a_best_model_whose_file_is_gone_is_not_claimed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counting = Counting()
    held = threading.Event()
    counting.hooks.append(lambda client, round_: held.wait(30) if (client, round_) == ("c1", 4) else None)
    app = counting.app(num_rounds=4, evaluate_fn=scores(0.1, 0.9, 0.8))
    async with federation(app, run_dir=tmp_path) as story:
        story.start_server()
        for client in CLIENTS:
            story.start_client(client)
        await story.until(o.Evaluated, round=3)
        await story.kill_server()
        held.set()
        story.app = replace(app, after_evaluation=[fb.BestModel("accuracy")])  # an afterthought
        history = await story.resume_server()
    assert history.best == {}
    assert caplog.messages == ["model 1 was the best so far (best), and is not kept any more"]

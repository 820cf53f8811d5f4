"""What the engine decides is what the transcripts say."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedbus.rounds import commands as c
from tests.scenarios.player import play
from tests.scenarios.script import FOLDER, BadScenario, parse, read
from tests.scenarios.words import Tasks, say

PATHS = sorted(FOLDER.glob("*.txt"))
HEAD = "A title\n\nsettings: RoundConfig(num_rounds=1, fraction_evaluate=0)\n"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_engine_does_what_the_transcript_says(path: Path) -> None:
    written, played = path.read_text(), play(read(path))
    if written != played:
        diff = difflib.unified_diff(
            written.splitlines(), played.splitlines(), f"{path.name} as written", "as played", lineterm="", n=8
        )
        pytest.fail(
            "\n".join([*diff, "", f"if that is meant: python -m tests.scenarios.record {path.stem}"]), pytrace=False
        )


def test_there_are_scenarios() -> None:
    assert len(PATHS) >= 10


def test_answers_that_are_missing_or_wrong_are_written_anew() -> None:
    script = HEAD + "\n      0  the model is ready\n      0  a, b join\n      3  a's update for round 1 arrives\n"
    played = play(parse("x", script))
    assert "             fold a's update for round 1\n" in played
    assert play(parse("x", played)) == played
    assert play(parse("x", played.replace("fold a", "fold b"))) == played


def test_what_there_are_no_words_for_is_shown_as_it_is() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Sing:
        client_id: str

    assert "Sing(client_id='a')" in say(Sing(client_id="a"), Tasks())  # type: ignore[arg-type]


def test_an_event_may_be_written_as_its_constructor() -> None:
    words = play(parse("x", HEAD + "      0  a joins\n      1  a leaves: tired\n"))
    event = "ClientLeft(client_id='a', session='a/1', reason='tired')"
    assert play(parse("x", HEAD + f"      0  a joins\n      1  {event}\n")) == words.replace("a leaves: tired", event)


def test_the_second_task_of_a_client_in_a_round_has_a_number() -> None:
    tasks = Tasks()
    task = c.SendFitTask(client_id="a", task_id="one", round=3, version=2, timeout_s=60.0)
    again = c.SendFitTask(client_id="a", task_id="two", round=3, version=2, timeout_s=50.0)
    for sent in (task, again, task):
        tasks.note(sent)
    assert [say(sent, tasks) for sent in (task, again)] == [
        "task a: fit version 2 in round 3 (60 s)",
        "task a: fit version 2 in round 3 #2 (50 s)",
    ]
    assert (tasks.find("a", 3, 1), tasks.find("a", 3, 2), tasks.find("a", 3, 3)) == ("one", "two", None)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A title\n\n      0  a joins\n", "no line 'settings"),
        ("settings: RoundConfig(cohort=3)\n", "settings cannot be read"),
        ("settings: 3\n", "no RoundConfig"),
        (HEAD + "      5  a joins\n      4  b joins\n", "line 5: 4 comes after 5"),
        (HEAD + "      5  a joins\nhow come?\n", "line 5: neither"),
        (HEAD + "      5  a sings\n", "line 4: there is no such event: 'a sings'"),
        (HEAD + "      5  a's update for round 1 arrives\n", "line 4: a has no such task in round 1"),
        (HEAD + "      5  a falls silent\n", "line 4: a is silent already"),
        (HEAD + "      5  Unheard(client_id='a')\n", "line 4: name 'Unheard' is not defined"),
    ],
)
def test_a_scenario_that_cannot_be_read_says_where(text: str, wrong: str) -> None:
    with pytest.raises(BadScenario, match=f"^x.*{wrong}"):
        play(parse("x", text))

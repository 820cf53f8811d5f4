"""The engine as people see it: who does what, on which version, since when."""

from __future__ import annotations

from typing import Any

from fedbus.rounds import commands as c
from fedbus.rounds import events as e
from fedbus.rounds.snapshot import MemberSnapshot
from tests.unit.test_engine import Story, all_of, one


def members(story: Story) -> dict[str, MemberSnapshot]:
    return {member.client_id: member for member in story.engine.snapshot(story.now).members}


def story_with_a_straggler(**settings: Any) -> Story:
    """a and b have answered round 1 after 3 s, slow has not, and round 2 is open."""
    story = Story(min_available_clients=3, num_rounds=9, **settings)
    story.join("a", "b", "slow")
    story.now = 3.0
    story.update("a", 1)
    story.update("b", 1)
    story.commit()
    return story


def test_before_the_first_round_it_tells_for_how_many_clients_it_waits() -> None:
    story = Story(min_available_clients=3)
    story.join("a")
    story.now = 4.0
    seen = story.engine.snapshot(story.now)
    assert (seen.phase, seen.open_round, seen.open_s, seen.closes_in_s) == ("waiting", None, None, None)
    assert (seen.clients_missing, seen.version, seen.committed_rounds) == (2, 0, 0)
    assert seen.members == (
        MemberSnapshot(client_id="a", state="idle", version=None, round=None, working_s=None, silent_s=4.0),
    )


def test_it_tells_what_the_open_round_has_and_when_it_closes() -> None:
    story = story_with_a_straggler()
    story.now = 10.0
    story.update("a", 2)
    seen = story.engine.snapshot(story.now)
    assert (seen.phase, seen.open_round, seen.open_s, seen.closes_in_s) == ("open", 2, 7.0, 93.0)
    assert (seen.folded, seen.needed, seen.version, seen.committed_rounds) == (1, 2, 1, 1)


def test_a_member_is_training_then_late_then_overdue_and_idle_without_a_task() -> None:
    story = story_with_a_straggler(lease_s=1000.0)
    story.now = 10.0
    seen = members(story)
    assert (seen["slow"].state, seen["slow"].version, seen["slow"].round) == ("late", 0, 1)
    assert (seen["slow"].working_s, seen["slow"].silent_s) == (10.0, 10.0)
    assert (seen["a"].state, seen["a"].version, seen["a"].round, seen["a"].working_s) == ("training", 1, 2, 7.0)
    story.now = 100.0
    assert {name: member.state for name, member in members(story).items()} == {
        "a": "training",
        "b": "training",
        "slow": "overdue",
    }
    assert story.engine.counts(story.now) == (0, 2, 1)
    story.update("slow", 1)
    seen = members(story)
    assert (seen["slow"].state, seen["slow"].round, seen["slow"].working_s) == ("training", 2, 0.0)
    assert story.engine.counts(story.now) == (0, 3, 0)
    story.happens(e.TaskFailed(client_id="slow", task_id="run/fit/2/slow", reason="no"))
    assert (members(story)["slow"].state, members(story)["slow"].version) == ("idle", 1)
    assert story.engine.counts(story.now) == (1, 2, 0)


def test_whoever_evaluates_a_version_holds_it() -> None:
    story = Story(num_rounds=1, fraction_evaluate=1.0)
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    assert {member.version for member in members(story).values()} == {0}
    story.commit()
    assert {member.version for member in members(story).values()} == {1}


def test_a_look_changes_nothing() -> None:
    story = story_with_a_straggler()
    before = story.engine.snapshot(story.now)
    assert story.engine.snapshot(story.now) == before
    assert all_of(story.wait(0), c.MemberLost) == []


def test_a_loss_has_its_cause() -> None:
    story = Story()
    story.join("left", "lease", "unreachable")
    said = story.happens(e.ClientLeft(client_id="left", session="left", reason="bye"))
    assert (one(said, c.MemberLost).cause, one(said, c.MemberLost).left) == ("left", True)
    said = story.happens(e.ClientUnreachable(client_id="unreachable", reason="gone", seen_at=None))
    assert (one(said, c.MemberLost).cause, one(said, c.MemberLost).left) == ("unreachable", False)
    story.happens(e.EchoHeard(sent_at=1000.0))
    assert one(story.wait(30), c.MemberLost).cause == "lease"


def test_a_refused_update_is_in_the_record_of_its_client() -> None:
    story = Story()
    story.join("a", "b")
    story.happens(e.UpdateInvalid(client_id="a", task_id="run/fit/1/a", delivery=1, reason="NaN"))
    story.happens(e.TaskFailed(client_id="b", task_id="run/fit/1/b", reason="no"))
    records = story.engine.records
    assert [(records[name].failed, records[name].refused) for name in "ab"] == [(1, 1), (1, 0)]

"""The engine where rounds do not wait: asynchronous regimes, over-selection, stragglers that are told to stop."""

from __future__ import annotations

from typing import Any

import pytest

from fedbus.config import Hinge, Polynomial, RoundConfig
from fedbus.rounds import commands as c
from fedbus.rounds import events as e
from fedbus.rounds.clients import ClientRecord
from fedbus.rounds.commands import CloseReason, Outcome
from fedbus.rounds.engine import Engine, Phase
from fedbus.rounds.restored import Restored, RestoredTask
from tests.unit.test_engine import Story, all_of, one, settled, tasked


def buffered(k: int, **settings: Any) -> Story:
    return Story(min_fit_clients=k, is_asynchronous=True, **{"num_rounds": 10, **settings})


def answer(story: Story, task: c.SendFitTask) -> list[c.Command]:
    return story.update(task.client_id, task.round, task.task_id)


# ---- asynchronous ----------------------------------------------------------------------------------------------------


def test_every_idle_client_trains_at_once_and_again_when_it_has_answered() -> None:
    story = buffered(3, min_available_clients=1)
    first = one(story.join("a"), c.SendFitTask)
    assert tasked(story.join("b")) == {"b"}
    again = one(answer(story, first), c.SendFitTask)
    assert (again.client_id, again.version, again.round, again.repeat) == ("a", 0, 1, 1)
    assert again.task_id != first.task_id
    assert (first.repeat, one(answer(story, again), c.SendFitTask).repeat) == (0, 2)


def test_a_buffered_round_closes_on_exactly_k_updates_of_whatever_version() -> None:
    story = buffered(2)
    tasks = {task.client_id: task for task in all_of(story.join("a", "b", "slow"), c.SendFitTask)}
    again = one(answer(story, tasks["a"]), c.SendFitTask)
    commit = one(answer(story, again), c.Commit)
    assert [(update.client_id, update.staleness) for update in commit.folded] == [("a", 0), ("a", 0)]
    assert commit.reason is CloseReason.MIN_FIT_CLIENTS
    newest = one(story.commit(), c.SendFitTask)
    assert (newest.client_id, newest.version) == ("a", 1)
    assert one(answer(story, tasks["slow"]), c.Fold).staleness == 1
    said = answer(story, tasks["b"])
    assert one(said, c.Fold).discount == pytest.approx(2**-0.5)
    assert len(one(said, c.Commit).folded) == 2


def test_updates_that_wait_for_a_commit_are_folded_k_by_k() -> None:
    story = buffered(2, fraction_evaluate=0)
    tasks = all_of(story.join(*"abcdefg"), c.SendFitTask)
    for task in tasks:
        answer(story, task)  # two close the round, five wait
    assert len(all_of(story.said, c.Commit)) == 1
    sizes = []
    for _ in range(3):
        said = story.commit()
        sizes.append(len(all_of(said, c.Fold)))
        assert {fold.round - 1 for fold in all_of(said, c.Fold)} == {fold.staleness for fold in all_of(said, c.Fold)}
    assert sizes == [2, 2, 1]
    assert len(all_of(said, c.Commit)) == 0


def test_the_client_of_the_kth_update_gets_the_version_that_it_made() -> None:
    story = buffered(1)
    (task,) = all_of(story.join("a"), c.SendFitTask)
    assert all_of(answer(story, task), c.SendFitTask) == []
    assert one(story.commit(), c.SendFitTask).version == 1


def test_concurrency_limits_how_many_train_and_the_free_place_goes_to_anybody() -> None:
    story = buffered(100, concurrency=2)
    tasks = all_of(story.join(*"abcdefgh"), c.SendFitTask)
    assert len(tasks) == 2
    for _ in range(60):
        task = tasks.pop(0)
        tasks.append(one(answer(story, task), c.SendFitTask))
    assert {record.client_id for record in story.engine.records.values()} == set("abcdefgh")


def test_a_client_whose_fit_fails_is_asked_again_only_for_the_next_version() -> None:
    story = buffered(2, min_available_clients=1)
    tasks = {task.client_id: task for task in all_of(story.join("a", "b"), c.SendFitTask)}
    said = story.happens(e.TaskFailed(client_id="a", task_id=tasks["a"].task_id, reason="no"))
    assert all_of(said, c.SendFitTask) == []
    again = one(answer(story, tasks["b"]), c.SendFitTask)
    answer(story, again)
    assert tasked(story.commit()) == {"a", "b"}


def test_an_asynchronous_round_does_not_close_while_anybody_is_at_work() -> None:
    story = buffered(3, min_available_clients=1)
    tasks = {task.client_id: task for task in all_of(story.join("a", "b"), c.SendFitTask)}
    said = story.happens(e.TaskFailed(client_id="a", task_id=tasks["a"].task_id, reason="no"))
    assert all_of(said, c.Commit) == []
    said = story.happens(e.TaskFailed(client_id="b", task_id=tasks["b"].task_id, reason="no"))
    assert one(said, c.Commit).reason is CloseReason.COHORT_DONE


def test_an_asynchronous_round_names_nobody_unfinished() -> None:
    story = buffered(1)
    (a, b) = all_of(story.join("a", "b"), c.SendFitTask)
    assert one(answer(story, a), c.Commit).unfinished == ()
    assert b.timeout_s == story.config.timeout_s


def test_a_restarted_client_gets_the_newest_version_not_its_old_task() -> None:
    story = buffered(1)
    (a, b) = all_of(story.join("a", "b"), c.SendFitTask)
    answer(story, a)
    story.commit()
    said = story.happens(e.ClientJoined(client_id=b.client_id, session="new"))
    assert one(said, c.SendFitTask).version == 1
    assert one(answer(story, b), c.Fold).staleness == 1  # should the old one come after all, it counts


def test_fedasyncs_discount_is_alpha_times_s_of_tau() -> None:
    story = buffered(1, mixing=0.6, staleness=Hinge(10, 4), max_staleness=20)
    tasks = {task.client_id: task for task in all_of(story.join("a", "b"), c.SendFitTask)}
    task = tasks["a"]
    for _ in range(6):
        answer(story, task)
        task = one(story.commit(), c.SendFitTask)
    fold = one(answer(story, tasks["b"]), c.Fold)
    assert fold.staleness == 6
    assert fold.discount == pytest.approx(0.6 / (10 * (6 - 4) + 1))
    assert fold.version == 0


def test_after_a_resume_tasks_of_one_client_go_on_counting() -> None:
    tasks = tuple(
        RestoredTask(task_id=task_id, client_id="a", round=2, version=1, state="working")
        for task_id in ("run/fit/2/a", "run/fit/2/a/1")
    )
    config = RoundConfig.buffered(3, num_rounds=5)
    restored = Restored(rounds=1, version=1, clients=("a",), tasks=tasks)
    engine = Engine(config, seed=0, run_id="run", restored=restored, now=0.0)
    assert all_of(engine.handle(e.ModelReady(), 0.0), c.SendFitTask) == []  # the answers may be on their way
    again = one(engine.handle(e.TasksInDoubt(), 1.0), c.SendFitTask)
    assert (again.task_id, again.repeat) == ("run/fit/2/a/1", 1)
    said = engine.handle(e.UpdateReceived(client_id="a", task_id="run/fit/2/a", delivery=1), 2.0)
    assert one(said, c.Fold).round == 2
    assert all_of(said, c.SendFitTask) == []  # it is at work on the other one
    said = engine.handle(e.UpdateReceived(client_id="a", task_id="run/fit/2/a/1", delivery=2), 2.0)
    assert (one(said, c.SendFitTask).task_id, one(said, c.SendFitTask).repeat) == ("run/fit/2/a/2", 2)


def test_after_a_resume_a_client_says_whether_it_works_on_a_task_of_an_earlier_round() -> None:
    tasks = tuple(
        RestoredTask(task_id=f"run/fit/1/{name}", client_id=name, round=1, version=0, state="working") for name in "ab"
    )
    restored = Restored(rounds=2, version=2, clients=("a", "b"), tasks=tasks)
    engine = Engine(RoundConfig.buffered(3, num_rounds=5), seed=0, run_id="run", restored=restored, now=0.0)
    assert all_of(engine.handle(e.ModelReady(), 0.0), c.SendFitTask) == []
    assert all_of(engine.handle(e.TasksInDoubt(), 1.0), c.SendFitTask) == []
    at_work = e.ClientHeard(client_id="a", session="a", fit_task="run/fit/1/a")
    assert all_of(engine.handle(at_work, 2.0), c.SendFitTask) == []
    said = engine.handle(e.ClientHeard(client_id="b", session="b"), 2.0)
    assert (one(said, c.SendFitTask).client_id, one(said, c.SendFitTask).version) == ("b", 2)
    said = engine.handle(e.UpdateReceived(client_id="b", task_id="run/fit/1/b", delivery=1), 3.0)
    assert one(said, c.Fold).staleness == 2  # it had been on its way


def resumed_in_round_2(*clients: str, k: int = 2) -> Story:
    """A server that goes on where round 2 was open, its clients at work; the model is not ready yet."""
    tasks = tuple(
        RestoredTask(task_id=f"run/fit/2/{name}", client_id=name, round=2, version=1, state="working")
        for name in clients
    )
    restored = Restored(rounds=1, version=1, clients=clients, tasks=tasks)
    return Story(restored=restored, min_fit_clients=k, over_selection=1.0, num_rounds=5)


def test_a_fit_that_fails_before_the_model_is_ready_again_is_not_waited_for() -> None:
    story = resumed_in_round_2("a", "b")
    story.happens(e.TaskFailed(client_id="a", task_id="run/fit/2/a", reason="no"))
    story.happens(e.ModelReady())
    assert one(story.update("b", 2), c.Commit).failed == {"a": "no"}


def test_an_invalid_update_before_the_model_is_ready_again_gives_its_place_away() -> None:
    story = resumed_in_round_2("a", "b")
    story.join("c")
    story.happens(e.UpdateInvalid(client_id="a", task_id="run/fit/2/a", delivery=1, reason="NaN"))
    assert tasked(story.happens(e.ModelReady())) == {"c"}


def test_who_restarts_before_the_model_is_ready_again_gets_its_task_again_and_is_at_work_on_it() -> None:
    story = resumed_in_round_2("a", "b")
    story.join("a")
    story.happens(e.ClientJoined(client_id="a", session="another"))
    assert one(story.happens(e.ModelReady()), c.SendFitTask).task_id == "run/fit/2/a"
    story.update("b", 2)
    left = story.happens(e.ClientLeft(client_id="a", session="another", reason="bye"))
    assert one(left, c.Commit).lost == ("a",)


def test_tasks_that_are_in_doubt_before_the_model_is_ready_again_are_sent_when_it_is() -> None:
    story = resumed_in_round_2("a", "b")
    assert all_of(story.happens(e.TasksInDoubt(client_id="a")), c.SendFitTask) == []
    assert tasked(story.happens(e.ModelReady())) == {"a"}
    story.join("a")  # it says nothing of a task yet: that it has none in hand is no news
    story.update("b", 2)
    assert one(story.update("a", 2), c.Commit).unfinished == ()


def test_who_had_failed_and_leaves_before_the_model_is_ready_again_leaves_one_place_not_two() -> None:
    failed = RestoredTask(task_id="run/fit/2/a", client_id="a", round=2, version=1, state="failed", reason="no")
    story = Story(restored=Restored(rounds=1, version=1, tasks=(failed,)), over_selection=1.0, num_rounds=5)
    story.happens(e.ClientLeft(client_id="a", session="a", reason="bye"))
    story.join("b", "c", "d")
    assert len(tasked(story.happens(e.ModelReady()))) == 2


def test_an_update_that_waits_for_the_model_of_a_run_that_is_done_is_settled_at_its_end() -> None:
    late = RestoredTask(task_id="run/fit/1/a", client_id="a", round=1, version=0, state="working")
    story = Story(restored=Restored(rounds=3, version=2, tasks=(late,)), num_rounds=3)
    assert story.update("a", 1) == []
    assert settled(story.happens(e.ModelReady())) == [(1, Outcome.SURPLUS)]


def test_a_doubt_about_an_old_task_is_none_about_the_new_one() -> None:
    story = Story(min_fit_clients=2)
    story.join("a", "b", "c")
    story.update("a", 1)
    story.update("b", 1)
    story.commit()
    story.happens(e.TasksInDoubt())
    assert tasked(story.update("c", 1)) == {"c"}
    story.beat("c")  # on its way when the new task was given
    story.happens(e.ClientLeft(client_id="c", session="c", reason="bye"))
    assert one(story.update("a", 2), c.Commit).lost == ("c",)


def test_a_client_that_hangs_in_its_fit_does_not_hold_a_place_for_ever() -> None:
    story = buffered(2, concurrency=1, timeout_s=10.0, lease_s=1000.0)
    task = one(story.join("a"), c.SendFitTask)
    story.join("b")
    story.happens(e.ClientHeard(client_id="a", session="a", fit_task=task.task_id))
    said = story.wait(10) + story.commit()
    assert tasked(said) == {"b"}


def test_whoever_names_a_task_that_it_was_told_to_stop_is_told_again_once_and_asked_when_it_has() -> None:
    failed = RestoredTask(
        task_id="run/fit/1/a", client_id="a", round=1, version=0, state="failed", reason="2 versions late"
    )
    restored = Restored(rounds=2, version=2, clients=("a", "b"), tasks=(failed,))
    engine = Engine(RoundConfig.buffered(2, num_rounds=5), seed=0, run_id="run", restored=restored, now=0.0)
    at_work = e.ClientHeard(client_id="a", session="a", fit_task="run/fit/1/a")
    assert one(engine.handle(at_work, 1.0), c.CancelTask).reason == "2 versions late"
    assert all_of(engine.handle(at_work, 2.0), c.CancelTask) == []
    assert tasked(engine.handle(e.ModelReady(), 3.0)) == {"b"}
    stopped = e.TaskFailed(client_id="a", task_id="run/fit/1/a", reason="it was told to stop")
    assert tasked(engine.handle(stopped, 4.0)) == {"a"}


# ---- over-selection --------------------------------------------------------------------------------------------------


def test_over_selection_asks_more_than_it_needs_and_no_more() -> None:
    story = Story(min_fit_clients=10, over_selection=1.3)
    story.join(*(f"c{n:02d}" for n in range(9)))
    said = story.join("c09")
    assert len(tasked(said)) == 10
    late = story.join(*(f"c{n}" for n in range(10, 20)))
    assert len(tasked(late)) == 3


def test_of_an_over_selected_cohort_the_slow_ones_count_in_a_later_round() -> None:
    story = Story(min_fit_clients=2, over_selection=1.5)
    tasks = all_of(story.join("a", "b", "c"), c.SendFitTask)
    for task in tasks[:2]:
        answer(story, task)
    story.commit()
    assert one(answer(story, tasks[2]), c.Fold).staleness == 1


def test_who_leaves_an_over_selected_cohort_is_replaced() -> None:
    story = Story(min_fit_clients=2, over_selection=1.0)
    tasks = all_of(story.join("a", "b", "c", "d"), c.SendFitTask)
    assert len(tasks) == 2
    gone = tasks[0].client_id
    said = story.happens(e.ClientLeft(client_id=gone, session=gone, reason="bye"))
    assert len(tasked(said)) == 1
    assert not tasked(said) & {task.client_id for task in tasks}


# ---- stragglers ------------------------------------------------------------------------------------------------------


def late_by_two(story: Story) -> tuple[list[c.Command], c.SendFitTask]:
    """Two rounds close without the slow client: what the engine said at the second commit, and its task."""
    tasks = {task.client_id: task for task in all_of(story.join("a", "b", "slow"), c.SendFitTask)}
    said: list[c.Command] = []
    for round_ in (1, 2):
        story.update("a", round_)
        story.update("b", round_)
        said = story.commit()
    return said, tasks["slow"]


def test_a_straggler_beyond_max_staleness_is_told_to_stop_and_stays_busy_until_it_has_heard() -> None:
    story = Story(max_staleness=1, num_rounds=9)
    said, task = late_by_two(story)
    assert one(said, c.CancelTask).task_id == task.task_id
    assert one(said, c.FitCancelled).reason == "2 versions late, max_staleness is 1"
    assert "slow" not in tasked(said)
    said = story.happens(e.TaskFailed(client_id="slow", task_id=task.task_id, reason="it was told to stop"))
    assert tasked(said) == {"slow"}
    assert all_of(said, c.FitFailed) == []
    assert all_of(said, c.SendFitTask)[0].version == 2


def test_the_update_of_a_cancelled_task_is_refused_with_the_reason_and_frees_its_client() -> None:
    story = Story(max_staleness=1, num_rounds=9)
    _, task = late_by_two(story)
    said = answer(story, task)
    assert one(said, c.Settle).reason == "2 versions late, max_staleness is 1"
    assert settled(said) == [(story.deliveries, Outcome.REFUSED)]
    assert tasked(said) == {"slow"}


def test_the_place_of_a_client_that_was_told_to_stop_and_leaves_is_filled() -> None:
    story = buffered(1, max_staleness=0, concurrency=2, min_available_clients=3)
    (first, _) = all_of(story.join("a", "b", "c"), c.SendFitTask)
    answer(story, first)
    cancelled = one(story.commit(), c.CancelTask).client_id
    said = story.happens(e.ClientLeft(client_id=cancelled, session=cancelled, reason="bye"))
    assert len(tasked(said)) == 1


def test_a_client_that_was_told_to_stop_and_restarts_is_idle() -> None:
    story = buffered(1, max_staleness=0)
    (first, second) = all_of(story.join("a", "b"), c.SendFitTask)
    answer(story, first)
    assert one(story.commit(), c.CancelTask).client_id == second.client_id
    said = story.happens(e.ClientJoined(client_id=second.client_id, session="another"))
    assert tasked(said) == {second.client_id}


def test_a_task_is_cancelled_once() -> None:
    story = Story(max_staleness=1, num_rounds=9)
    late_by_two(story)
    story.update("a", 3)
    story.update("b", 3)
    story.commit()
    assert len(all_of(story.said, c.CancelTask)) == 1


def test_with_max_staleness_0_whoever_is_out_at_the_commit_is_told_to_stop() -> None:
    story = Story(max_staleness=0, min_fit_clients=2)
    story.join("a", "b", "c")
    story.update("a", 1)
    story.update("b", 1)
    assert one(story.commit(), c.CancelTask).client_id == "c"


def test_a_client_that_says_it_is_at_work_is_not_asked_again_however_long_it_takes() -> None:
    story = Story(min_fit_clients=1, timeout_s=10.0, lease_s=1000.0, num_rounds=50)
    task = one(story.join("a"), c.SendFitTask)
    story.wait(5)
    story.happens(e.ClientHeard(client_id="a", session="a", fit_task=task.task_id))
    for _ in range(3):
        story.wait(10)
        assert story.commit()  # an empty round
    assert len(all_of(story.said, c.SendFitTask)) == 1
    said = answer(story, task)
    assert one(said, c.Fold).client_id == "a"
    assert len(all_of(story.commit(), c.SendFitTask)) == 1


def test_a_client_beyond_its_time_that_says_it_has_nothing_in_hand_is_asked_again_at_once() -> None:
    story = Story(min_fit_clients=1, timeout_s=10.0, lease_s=1000.0, num_rounds=50)
    task = one(story.join("a"), c.SendFitTask)
    story.happens(e.ClientHeard(client_id="a", session="a", fit_task=task.task_id))
    story.wait(10)
    assert all_of(story.commit(), c.SendFitTask) == []
    assert one(story.happens(e.ClientHeard(client_id="a", session="a")), c.SendFitTask).round == 2


def test_in_asynchronous_rounds_too_who_never_answers_is_asked_again_when_its_time_is_up() -> None:
    story = buffered(1, lease_s=1000.0, min_available_clients=2)
    (a, b) = all_of(story.join("a", "b"), c.SendFitTask)
    story.wait(50)
    answer(story, a)
    story.commit()
    story.happens(e.ClientLeft(client_id=a.client_id, session=a.client_id, reason="bye"))
    assert tasked(story.wait(50)) == {b.client_id}  # the round is open for 50 s more


def test_who_is_asked_to_evaluate_the_last_model_need_not_finish_training_first() -> None:
    story = Story(min_fit_clients=1, num_rounds=2, fraction_evaluate=1.0)
    story.join("a", "b")
    story.update("a", 1)
    story.commit()  # a evaluates version 1, and trains
    story.update("b", 1)
    said = story.commit()
    stopped = one(said, c.CancelTask)
    assert (stopped.client_id, stopped.task_id, stopped.reason) == ("a", "run/fit/2/a", "the last round is over")
    assert story.happens(e.TaskFailed(client_id="a", task_id="run/fit/2/a", reason="it was told to stop")) == []
    for round_, client in ((1, "a"), (2, "b")):
        said = story.happens(e.EvaluateReported(client_id=client, task_id=f"run/evaluate/{round_}/{client}"))
    assert one(said, c.EndRun).finished


# ---- comings and goings ----------------------------------------------------------------------------------------------


def test_a_client_whose_inbox_is_gone_is_lost_and_replaced() -> None:
    story = Story(min_fit_clients=2, over_selection=1.0)
    tasks = all_of(story.join("a", "b", "c"), c.SendFitTask)
    said = story.happens(e.ClientLost(client_id=tasks[0].client_id, reason="its inbox is gone"))
    lost = one(said, c.MemberLost)
    assert (lost.client_id, lost.left) == (tasks[0].client_id, False)
    assert lost.reason == "its inbox is gone"
    assert len(tasked(said)) == 1


@pytest.mark.parametrize(
    ("heard_at", "seen_at", "noticed"), [(2.0, None, "8.0"), (2.0, 6.5, "3.5"), (8.0, 6.5, "2.0"), (12.0, 6.5, "0.0")]
)
def test_it_is_told_how_long_it_took_to_notice_that_a_client_is_gone(
    heard_at: float, seen_at: float | None, noticed: str
) -> None:
    story = Story(min_fit_clients=2)
    story.join("a", "b")
    story.wait(min(heard_at, 10.0))
    story.beat("b")
    if heard_at > 10.0:  # the word of grace after an outage of ours
        story.happens(e.Reconnected(grace_s=heard_at - 10.0))
    story.wait(10.0 - story.now)
    said = story.happens(e.ClientUnreachable(client_id="b", reason="its connection is gone", seen_at=seen_at))
    expected = f"its connection is gone (noticed {noticed} s after its last sign of life)"
    assert one(said, c.MemberLost).reason == expected


def without_connection(story: Story, client_id: str) -> list[c.Command]:
    return story.happens(e.ClientUnreachable(client_id=client_id, reason="its connection is gone"))


def test_a_round_that_has_no_other_waits_for_whoever_lost_its_connection_until_its_lease_ends() -> None:
    story = Story(min_fit_clients=2, lease_s=20.0)
    story.join("a", "b")
    story.wait(5)
    story.beat("a", "b")
    story.wait(4)
    assert not all_of(without_connection(story, "b"), c.Commit)
    assert not all_of(story.update("a", 1), c.Commit)
    story.beat("a")
    assert story.engine.next_deadline() == 25.0
    assert one(story.wait(16), c.Commit).reason is CloseReason.COHORT_DONE


def test_whoever_lost_its_connection_and_is_back_is_waited_for_as_any_other() -> None:
    story = Story(min_fit_clients=3, min_available_clients=2, lease_s=20.0)
    story.join("a", "b")
    without_connection(story, "b")
    story.join("b")
    story.update("a", 1)
    said = story.happens(e.TaskFailed(client_id="b", task_id="run/fit/1/b", reason="boom"))
    assert one(said, c.Commit).reason is CloseReason.COHORT_DONE


def test_a_round_with_another_in_its_place_does_not_wait_for_whoever_lost_its_connection() -> None:
    story = Story(min_fit_clients=2, min_available_clients=3, over_selection=1.0)
    first = [task.client_id for task in all_of(story.join("a", "b", "c"), c.SendFitTask)]
    (other,) = tasked(without_connection(story, first[0]))
    story.update(first[1], 1)
    assert one(story.update(other, 1), c.Commit).reason is CloseReason.MIN_FIT_CLIENTS


def test_whoever_owes_a_fit_task_is_at_work_until_the_rounds_are_over() -> None:
    story = Story(num_rounds=2, min_fit_clients=1)
    assert story.engine.at_work == {}
    story.join("a", "b")
    assert story.engine.at_work == {"a": "run/fit/1/a", "b": "run/fit/1/b"}
    story.update("a", 1)
    assert story.engine.at_work == {"b": "run/fit/1/b"}
    story.commit()
    assert story.engine.at_work == {"a": "run/fit/2/a", "b": "run/fit/1/b"}  # a straggler owes the old one
    story.happens(e.ClientLeft(client_id="a", session="a", reason="bye"))
    assert story.engine.at_work == {"b": "run/fit/1/b"}
    story.join("c")
    story.update("c", 2)
    story.commit()
    assert (story.engine.phase, story.engine.at_work) == (Phase.ENDED, {})


def test_whoever_was_lost_in_the_round_and_is_back_takes_its_place_again() -> None:
    story = Story(min_fit_clients=2, lease_s=20.0)
    story.join("a", "b")
    story.wait(15)
    story.beat("a")
    story.wait(10)
    assert one(story.said, c.MemberLost).client_id == "b"
    said = story.join("b")
    assert one(said, c.SendFitTask).task_id == "run/fit/1/b"
    story.update("a", 1)
    commit = one(story.update("b", 1), c.Commit)
    assert (commit.lost, len(commit.folded)) == ((), 2)


def test_nobody_is_asked_for_the_initial_model_after_the_end() -> None:
    story = Story(has_model=False)
    assert one(story.join("a"), c.RequestParameters)
    assert one(story.happens(e.StopRequested(reason="enough")), c.EndRun)
    assert story.happens(e.TasksInDoubt()) == []


def test_when_several_leases_end_at_once_no_place_goes_to_one_of_them() -> None:
    story = Story(min_fit_clients=2, over_selection=1.0, lease_s=20.0)
    story.join("a", "b", "c", "d", "e")
    story.wait(15)
    story.beat("e")
    said = story.wait(6)
    assert len(all_of(said, c.MemberLost)) == 4
    assert tasked(said) == {"e"}


def test_whoever_left_for_good_is_not_told_to_stop() -> None:
    story = Story(max_staleness=0, min_fit_clients=2)
    story.join("a", "b", "c")
    story.happens(e.ClientLeft(client_id="c", session="c", reason="bye"))
    story.update("a", 1)
    story.update("b", 1)
    assert all_of(story.commit(), c.CancelTask) == []
    assert story.engine.records["c"].stopped == 0


def test_whoever_is_back_and_still_at_work_on_a_task_of_an_earlier_round_is_given_no_other() -> None:
    story = Story(min_fit_clients=2, lease_s=20.0, timeout_s=1000.0)
    story.join("a", "b", "c")
    story.wait(15)
    story.beat("a", "b")
    story.wait(10)
    assert one(story.said, c.MemberLost).client_id == "c"
    story.update("a", 1)
    story.update("b", 1)
    story.commit()
    said = story.happens(e.ClientHeard(client_id="c", session="c", fit_task="run/fit/1/c"))
    assert all_of(said, c.SendFitTask) == []
    said = story.update("c", 1)
    assert one(said, c.Fold).staleness == 1
    assert tasked(said) == {"c"}


# ---- what each client has done ---------------------------------------------------------------------------------------


def test_the_record_of_a_client_says_what_it_did() -> None:
    story = Story(max_staleness=5, min_fit_clients=1, num_rounds=9, fraction_fit=1.0)
    tasks = {task.client_id: task for task in all_of(story.join("a", "b"), c.SendFitTask)}
    story.now += 3.0
    event = e.UpdateReceived(client_id="a", task_id=tasks["a"].task_id, delivery=1, nbytes=12, utility=7.0)
    story.happens(event)
    story.commit()
    story.now += 1.0
    story.happens(e.UpdateReceived(client_id="b", task_id=tasks["b"].task_id, delivery=2, nbytes=12))
    assert story.engine.records["a"] == ClientRecord(
        client_id="a", asked=2, folded=1, last_round=2, timed=1, seconds=3.0, mean_seconds=3.0, nbytes=12, utility=7.0
    )
    b = story.engine.records["b"]
    assert (b.asked, b.folded, b.seconds, b.staleness, b.max_staleness, b.utility) == (1, 1, 4.0, 1, 1, None)


def test_a_record_counts_failures_losses_and_cancellations() -> None:
    story = Story(max_staleness=1, num_rounds=9)
    _, task = late_by_two(story)
    assert story.engine.records["slow"].stopped == 1
    answer(story, task)
    assert story.engine.records["slow"].stopped == 1
    story.happens(e.TaskFailed(client_id="a", task_id="run/fit/3/a", reason="no"))
    assert story.engine.records["a"].failed == 1
    story.happens(e.ClientLeft(client_id="b", session="b", reason="bye"))
    assert story.engine.records["b"].lost == 1


def test_the_tasks_of_a_round_that_was_open_are_in_the_record_of_a_resumed_run() -> None:
    tasks = (
        RestoredTask(task_id="run/fit/2/a", client_id="a", round=2, version=1, state="working"),
        RestoredTask(task_id="run/fit/2/b", client_id="b", round=2, version=1, state="failed", reason="no"),
    )
    by_the_last_commit = {"a": ClientRecord(client_id="a", asked=1, folded=1, last_round=1)}
    config, restored = RoundConfig.synchronous(2), Restored(rounds=1, version=1, tasks=tasks)
    engine = Engine(config, seed=0, run_id="run", restored=restored, now=0.0, records=by_the_last_commit)
    engine.handle(e.ModelReady(), 0.0)
    engine.handle(e.UpdateReceived(client_id="a", task_id="run/fit/2/a", delivery=1), 1.0)
    a, b = engine.records["a"], engine.records["b"]
    assert (a.asked, a.folded, a.last_round) == (2, 2, 2)
    assert (b.asked, b.failed, b.last_round) == (1, 1, 2)


def test_the_polynomial_of_fedbuff_is_one_over_the_root() -> None:
    assert RoundConfig.buffered().staleness == Polynomial(0.5)
    assert [Polynomial(0.5)(tau) for tau in (0, 3)] == [1.0, 0.5]

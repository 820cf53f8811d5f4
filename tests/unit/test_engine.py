"""The round engine as function calls: time is an argument, a crash is an event that does not come."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbus.config import Polynomial, RoundConfig
from fedbus.rounds import commands as c
from fedbus.rounds import events as e
from fedbus.rounds.cohort import sample
from fedbus.rounds.commands import CloseReason, Command, Outcome
from fedbus.rounds.engine import Engine, Fate, Phase
from fedbus.rounds.restored import Restored, RestoredTask

T = TypeVar("T")


class Story:
    """An engine with a clock, and all it has ever said."""

    def __init__(
        self, *, has_model: bool = True, seed: int = 0, restored: Restored | None = None, **config: Any
    ) -> None:
        settings: dict[str, Any] = {
            "num_rounds": 3,
            "min_fit_clients": 2,
            "timeout_s": 100.0,
            "fraction_evaluate": 0,
        }
        self.config = RoundConfig(**{**settings, **config})
        self.now = 0.0
        self.engine = Engine(self.config, seed=seed, run_id="run", has_model=has_model, restored=restored, now=self.now)
        self.said: list[Command] = []
        self.deliveries = 0
        if has_model and restored is None:
            self.happens(e.ModelReady())

    def happens(self, event: e.Event) -> list[Command]:
        out = self.engine.handle(event, self.now)
        self.said += out
        return out

    def wait(self, seconds: float) -> list[Command]:
        """Let time pass, stopping at each of the engine's deadlines as the runtime does."""
        end, out = self.now + seconds, []
        while (deadline := self.engine.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            out += self.engine.advance(self.now)
        self.now = end
        self.said += out
        return out

    def join(self, *clients: str) -> list[Command]:
        return [command for client in clients for command in self.happens(joined(client))]

    def beat(self, *clients: str) -> None:
        for client in clients:
            self.happens(e.ClientHeard(client_id=client, session=client))

    def update(self, client: str, round_: int, task_id: str | None = None) -> list[Command]:
        self.deliveries += 1
        task = task_id or f"run/fit/{round_}/{client}"
        return self.happens(e.UpdateReceived(client_id=client, task_id=task, delivery=self.deliveries))

    def commit(self) -> list[Command]:
        """Answer the last Commit as the runtime does."""
        commit = all_of(self.said, c.Commit)[-1]
        version = commit.version + bool(commit.folded)
        return self.happens(e.RoundCommitted(round=commit.round, version=version))


def joined(client: str, session: str = "") -> e.ClientJoined:
    return e.ClientJoined(client_id=client, session=session or client)


def all_of(commands: Iterable[Command], kind: type[T]) -> list[T]:
    return [command for command in commands if isinstance(command, kind)]


def one(commands: Iterable[Command], kind: type[T]) -> T:
    (found,) = all_of(commands, kind)
    return found


def tasked(commands: Iterable[Command]) -> set[str]:
    return {command.client_id for command in all_of(commands, c.SendFitTask)}


def settled(commands: Iterable[Command]) -> list[tuple[int, Outcome]]:
    return [(command.delivery, command.outcome) for command in all_of(commands, c.Settle)]


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_the_first_round_waits_for_min_available_clients() -> None:
    story = Story(min_available_clients=3)
    assert not all_of(story.join("a", "b"), c.RoundOpened)
    said = story.join("c")
    assert one(said, c.RoundOpened).cohort == tuple(sorted(tasked(said), key=one(said, c.RoundOpened).cohort.index))
    assert tasked(said) == {"a", "b", "c"}


def test_no_round_opens_before_the_model_is_there() -> None:
    story = Story(has_model=False)
    said = story.join("a", "b")
    assert not all_of(said, c.RoundOpened)
    assert len(all_of(said, c.RequestParameters)) == 1


def test_one_client_is_asked_for_the_model_and_its_update_is_settled_once_the_model_is_ready() -> None:
    story = Story(has_model=False)
    request = one(story.join("a", "b"), c.RequestParameters)
    said = story.update(request.client_id, 0, request.task_id)
    assert one(said, c.AdoptParameters).delivery == 1
    assert settled(said) == []
    said = story.happens(e.ModelReady())
    assert settled(said) == [(1, Outcome.COMMITTED)]
    assert one(said, c.RoundOpened).version == 0


def test_another_client_is_asked_when_the_first_cannot_give_the_model() -> None:
    story = Story(has_model=False)
    first = one(story.join("a", "b"), c.RequestParameters)
    failed = e.TaskFailed(client_id=first.client_id, task_id=first.task_id, reason="no")
    second = one(story.happens(failed), c.RequestParameters)
    assert {first.client_id, second.client_id} == {"a", "b"}
    said = story.happens(e.TaskFailed(client_id=second.client_id, task_id=second.task_id, reason="no"))
    assert one(said, c.EndRun) == c.EndRun(finished=False, reason="no client could give the initial model: no")


def test_a_client_that_cannot_give_the_model_does_not_end_the_run_before_the_others_are_there() -> None:
    story = Story(has_model=False)
    first = one(story.join("a"), c.RequestParameters)
    said = story.happens(e.TaskFailed(client_id="a", task_id=first.task_id, reason="no"))
    assert not all_of(said, c.EndRun)
    assert one(story.join("b"), c.RequestParameters).client_id == "b"


def test_a_lost_client_is_not_waited_for_with_the_model() -> None:
    story = Story(has_model=False)
    first = one(story.join("a", "b"), c.RequestParameters)
    said = story.happens(e.ClientLeft(client_id=first.client_id, session=first.client_id, reason="bye"))
    assert one(said, c.RequestParameters).client_id != first.client_id


def test_a_fraction_of_the_clients_is_sampled_but_never_less_than_a_round_needs() -> None:
    story = Story(fraction_fit=0.5, min_available_clients=10)
    assert len(tasked(story.join(*"abcdefghij"))) == 5
    story = Story(fraction_fit=0.1, min_fit_clients=3, min_available_clients=10)
    assert len(tasked(story.join(*"abcdefghij"))) == 3


def test_the_cohort_is_a_function_of_seed_and_round_whatever_the_order_of_joining() -> None:
    def cohort(seed: int, clients: str) -> set[str]:
        return tasked(Story(seed=seed, fraction_fit=0.5, min_available_clients=10).join(*clients))

    assert cohort(1, "abcdefghij") == cohort(1, "jihgfedcba")
    assert len({frozenset(cohort(seed, "abcdefghij")) for seed in range(10)}) > 5


def test_a_longer_list_of_clients_only_extends_the_draw() -> None:
    names = [f"c{i}" for i in range(20)]
    drawn = sample(3, 1, "fit", names, 20)
    assert [name for name in drawn if name in names[:10]] == list(sample(3, 1, "fit", names[:10], 10))


def test_every_client_is_equally_likely_to_be_drawn() -> None:
    counts = Counter(name for round_ in range(3000) for name in sample(0, round_, "fit", "abcde", 2))
    assert all(1000 < counts[name] < 1400 for name in "abcde")  # 1200 expected, 6 standard deviations


# ---- closing ---------------------------------------------------------------------------------------------------------


def test_a_round_closes_as_soon_as_min_fit_clients_are_folded() -> None:
    story = Story()
    story.join("a", "b", "c")
    assert not all_of(story.update("a", 1), c.Commit)
    said = story.update("c", 1)
    commit = one(said, c.Commit)
    assert commit.reason is CloseReason.MIN_FIT_CLIENTS
    assert [folded.client_id for folded in commit.folded] == ["a", "c"]
    assert commit.unfinished == ("b",)


def test_grace_leaves_the_round_open_for_more_and_is_not_prolonged() -> None:
    story = Story(grace_s=10.0, min_available_clients=4)
    story.join(*"abcd")
    story.update("a", 1)
    assert not all_of(story.update("b", 1), c.Commit)
    story.wait(6)
    assert not all_of(story.update("c", 1), c.Commit)
    story.beat(*"abcd")
    commit = one(story.wait(4), c.Commit)
    assert (story.now, len(commit.folded), commit.reason) == (10, 3, CloseReason.MIN_FIT_CLIENTS)


def test_grace_ends_when_nobody_is_left_to_wait_for() -> None:
    story = Story(grace_s=10.0, min_available_clients=3)
    story.join(*"abc")
    story.update("a", 1)
    story.update("b", 1)
    assert all_of(story.update("c", 1), c.Commit)


def test_infinite_grace_waits_for_the_whole_cohort() -> None:
    story = Story(grace_s=float("inf"), min_available_clients=3)
    story.join(*"abc")
    story.update("a", 1)
    assert not all_of(story.update("b", 1), c.Commit)
    assert len(one(story.update("c", 1), c.Commit).folded) == 3


def test_a_round_closes_when_every_living_member_of_the_cohort_is_done() -> None:
    story = Story(min_fit_clients=3)
    story.join(*"abc")
    story.update("a", 1)
    story.happens(e.TaskFailed(client_id="b", task_id="run/fit/1/b", reason="boom"))
    said = story.happens(e.ClientLeft(client_id="c", session="c", reason="bye"))
    commit = one(said, c.Commit)
    assert commit.reason is CloseReason.COHORT_DONE
    assert ([f.client_id for f in commit.folded], dict(commit.failed), commit.lost) == (["a"], {"b": "boom"}, ("c",))


def test_a_timeout_closes_with_what_came() -> None:
    story = Story(lease_s=1000.0)
    story.join("a", "b")
    story.update("a", 1)
    commit = one(story.wait(100), c.Commit)
    assert (commit.reason, len(commit.folded), commit.unfinished) == (CloseReason.TIMEOUT, 1, ("b",))


def test_a_round_without_any_update_is_recorded_as_empty_and_the_model_stays() -> None:
    story = Story(lease_s=1000.0)
    story.join("a", "b")
    commit = one(story.wait(100), c.Commit)
    assert commit.folded == ()
    said = story.commit()
    assert (one(said, c.RoundOpened).round, one(said, c.RoundOpened).version) == (2, 0)


def test_a_round_in_which_every_client_fails_ends_at_once() -> None:
    story = Story()
    story.join("a", "b")
    story.happens(e.TaskFailed(client_id="a", task_id="run/fit/1/a", reason="boom"))
    said = story.happens(e.TaskFailed(client_id="b", task_id="run/fit/1/b", reason="boom"))
    assert one(said, c.Commit).folded == ()


def test_a_round_whose_clients_are_all_gone_waits_for_newcomers_until_its_timeout() -> None:
    story = Story()
    story.join("a", "b")
    assert not all_of(story.wait(50), c.Commit)
    assert story.engine.members == ()
    assert tasked(story.join("c")) == {"c"}
    assert one(story.wait(49), c.MemberLost).client_id == "c"
    assert one(story.wait(1), c.Commit).reason is CloseReason.TIMEOUT


def test_the_next_round_opens_with_the_clients_that_are_left() -> None:
    story = Story(min_fit_clients=3)
    story.join(*"abc")
    story.update("a", 1)
    story.update("b", 1)
    story.happens(e.ClientLeft(client_id="c", session="c", reason="bye"))
    assert tasked(story.commit()) == {"a", "b"}


# ---- late joiners, leavers, stragglers -------------------------------------------------------------------------------


def test_a_late_joiner_takes_a_free_place_in_the_open_round() -> None:
    story = Story()
    story.join("a", "b")
    said = story.join("c")
    assert tasked(said) == {"c"}
    assert one(said, c.CohortGrew).clients == ("c",)


def test_a_lost_clients_place_is_taken_by_another() -> None:
    story = Story(fraction_fit=0.5, min_available_clients=4)
    first = tasked(story.join(*"abcd"))
    gone = min(first)
    said = story.happens(e.ClientLeft(client_id=gone, session=gone, reason="bye"))
    assert len(tasked(said)) == 1
    assert tasked(said).isdisjoint(first)


def test_a_client_known_to_be_gone_is_lost_before_its_lease_ends_and_not_taken_for_one_that_left() -> None:
    story = Story(fraction_fit=0.5, min_available_clients=4)
    first = tasked(story.join(*"abcd"))
    gone = e.ClientLost(client_id=min(first), reason="silent for 20.0 s")
    said = story.happens(gone)
    lost = one(said, c.MemberLost)
    assert (lost.client_id, lost.left, lost.reason) == (min(first), False, "silent for 20.0 s")
    assert len(tasked(said)) == 1
    assert tasked(said).isdisjoint(first)
    assert story.happens(gone) == []


def test_a_failed_client_is_replaced_and_not_asked_again_in_the_round() -> None:
    story = Story(fraction_fit=0.5, min_available_clients=4)
    first = sorted(tasked(story.join(*"abcd")))
    said = story.happens(e.TaskFailed(client_id=first[0], task_id=f"run/fit/1/{first[0]}", reason="boom"))
    assert len(tasked(said)) == 1
    assert first[0] not in tasked(said)


def test_a_silent_client_loses_its_lease_and_a_heartbeat_keeps_it() -> None:
    story = Story(lease_s=20.0, heartbeat_s=5.0)
    story.join("a", "b")
    for _ in range(4):
        story.wait(5)
        story.beat("a")
    lost = one(story.said, c.MemberLost)
    assert (lost.client_id, lost.left, lost.reason) == ("b", False, "silent for 20.0 s")
    assert story.engine.members == ("a",)


def test_a_heartbeat_of_somebody_unknown_is_a_welcome() -> None:
    story = Story()
    said = story.happens(e.ClientHeard(client_id="a", session="a"))
    assert one(said, c.WelcomeClient).client_id == "a"
    assert not all_of(story.happens(e.ClientHeard(client_id="a", session="a")), c.WelcomeClient)


def test_a_restarted_client_is_given_its_task_again_while_the_round_is_open() -> None:
    story = Story(min_fit_clients=3)
    story.join("a", "b", "c")
    said = story.happens(joined("b", "second process"))
    assert one(said, c.WelcomeClient).session == "second process"
    again = one(said, c.SendFitTask)
    assert (again.client_id, again.task_id) == ("b", "run/fit/1/b")


def test_a_restarted_client_whose_round_has_closed_is_asked_in_the_open_one() -> None:
    story = Story()
    story.join("a", "b", "c")
    story.update("a", 1)
    story.update("b", 1)
    story.commit()
    assert one(story.happens(joined("c", "second process")), c.SendFitTask).task_id == "run/fit/2/c"


def test_a_client_that_never_answers_is_asked_again_once_its_time_is_up() -> None:
    story = Story(lease_s=1000.0)
    story.join("a", "b", "c")
    story.update("a", 1)
    story.update("b", 1)
    assert tasked(story.commit()) == {"a", "b"}
    story.update("a", 2)
    said = story.wait(100)  # b does not answer; the round ends
    assert one(said, c.Commit).reason is CloseReason.TIMEOUT
    assert tasked(story.commit()) == {"a", "b", "c"}
    assert one(story.update("c", 1), c.Fold).staleness == 2  # and the old update counts all the same


def test_a_straggler_whose_time_is_up_is_asked_at_once_where_the_round_has_room() -> None:
    story = Story(lease_s=1000.0, min_fit_clients=2)
    story.join("a", "b")
    story.wait(50)
    story.join("late")  # due at 150
    story.update("a", 1)
    story.happens(e.ClientLeft(client_id="b", session="b", reason="bye"))
    story.wait(50)  # round 1 times out
    assert tasked(story.commit()) == {"a"}
    story.update("a", 2)
    assert not all_of(story.wait(49), c.SendFitTask)
    assert tasked(story.wait(1)) == {"late"}


def test_a_client_that_does_not_send_the_model_in_time_is_given_up_for_another() -> None:
    story = Story(has_model=False, lease_s=1000.0)
    first = one(story.join("a", "b"), c.RequestParameters)
    second = one(story.wait(100), c.RequestParameters)
    assert {first.client_id, second.client_id} == {"a", "b"}


def test_the_model_of_somebody_who_was_not_asked_is_refused() -> None:
    story = Story(has_model=False)
    asked = one(story.join("a", "b"), c.RequestParameters).client_id
    other = "b" if asked == "a" else "a"
    assert not story.engine.awaits(f"run/parameters/0/{other}", other)
    assert settled(story.update(other, 0, f"run/parameters/0/{other}")) == [(1, Outcome.REFUSED)]


def test_the_goodbye_of_a_former_process_does_not_throw_its_successor_out() -> None:
    story = Story()
    story.happens(joined("a", "first"))
    story.happens(joined("a", "second"))
    story.happens(e.ClientLeft(client_id="a", session="first", reason="bye"))
    assert story.engine.members == ("a",)


def test_the_update_of_a_client_that_left_still_counts() -> None:
    story = Story()
    story.join(*"abc")
    story.happens(e.ClientLeft(client_id="a", session="a", reason="bye"))
    story.update("a", 1)
    commit = one(story.update("b", 1), c.Commit)
    assert {folded.client_id for folded in commit.folded} == {"a", "b"}
    assert commit.lost == ()


def test_a_straggler_is_folded_into_the_open_round_with_its_discount_and_then_gets_the_newest_task() -> None:
    story = Story(staleness=Polynomial(0.5))
    story.join(*"abc")
    story.update("a", 1)
    story.update("b", 1)
    assert tasked(story.commit()) == {"a", "b"}  # c still trains: it gets no backlog
    said = story.update("c", 1)
    fold = one(said, c.Fold)
    assert (fold.round, fold.staleness) == (2, 1)
    assert fold.discount == pytest.approx(0.5**0.5)
    task = one(said, c.SendFitTask)
    assert (task.client_id, task.round, task.version) == ("c", 2, 1)


def test_an_update_that_comes_during_a_commit_waits_for_the_next_round() -> None:
    story = Story()
    story.join(*"abc")
    story.update("a", 1)
    story.update("b", 1)
    assert story.engine.phase is Phase.CLOSING
    assert story.update("c", 1) == []
    fold = one(story.commit(), c.Fold)
    assert (fold.client_id, fold.round, fold.staleness) == ("c", 2, 1)


def test_an_update_beyond_max_staleness_is_refused_with_the_reason() -> None:
    story = Story(max_staleness=0, num_rounds=3)
    story.join(*"abc")
    story.update("a", 1)
    story.update("b", 1)
    story.commit()
    refusal = one(story.update("c", 1), c.Settle)
    assert (refusal.outcome, refusal.reason) == (Outcome.REFUSED, "1 version late, max_staleness is 0")


def test_the_polynomial_discount_is_the_papers() -> None:
    assert [Polynomial(0.5)(tau) for tau in (0, 3, 8)] == [1, 0.5, pytest.approx(1 / 3)]
    assert Polynomial(0)(7) == 1


def test_a_round_that_has_too_few_updates_waits_for_a_straggler_that_may_still_join_it() -> None:
    story = Story(min_fit_clients=3)
    story.join(*"abcd")
    for client in "abc":
        story.update(client, 1)
    story.commit()
    story.update("a", 2)
    story.happens(e.TaskFailed(client_id="b", task_id="run/fit/2/b", reason="boom"))
    assert not all_of(story.update("c", 2), c.Commit)  # two of three, but d is on its way
    commit = one(story.update("d", 1), c.Commit)
    assert [folded.staleness for folded in commit.folded] == [0, 0, 1]


# ---- settling --------------------------------------------------------------------------------------------------------


def test_folded_updates_are_settled_only_after_the_commit() -> None:
    story = Story()
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    assert settled(story.said) == []
    assert settled(story.commit()) == [(1, Outcome.COMMITTED), (2, Outcome.COMMITTED)]


def test_a_redelivered_update_is_folded_once() -> None:
    story = Story(min_fit_clients=3)
    story.join(*"abc")
    story.update("a", 1)
    assert settled(story.update("a", 1)) == [(2, Outcome.DUPLICATE)]
    assert len(all_of(story.said, c.Fold)) == 1


def test_a_redelivered_update_of_a_committed_round_is_not_folded_again() -> None:
    story = Story()
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    story.commit()
    assert settled(story.update("a", 1)) == [(3, Outcome.DUPLICATE)]


def test_an_update_for_somebody_elses_task_is_refused_and_costs_its_owner_nothing() -> None:
    story = Story()
    story.join("a", "b")
    assert settled(story.update("b", 1, "run/fit/1/a")) == [(1, Outcome.REFUSED)]
    assert one(story.update("a", 1), c.Fold).client_id == "a"


def test_an_update_of_another_run_is_refused() -> None:
    story = Story()
    story.join("a", "b")
    assert settled(story.update("a", 1, "other/fit/1/a")) == [(1, Outcome.REFUSED)]


def test_an_invalid_update_is_refused_and_the_round_goes_on_without_it() -> None:
    story = Story()
    story.join(*"abc")
    invalid = e.UpdateInvalid(client_id="a", task_id="run/fit/1/a", delivery=99, reason="NaN")
    assert settled(story.happens(invalid)) == [(99, Outcome.REFUSED)]
    story.update("b", 1)
    commit = one(story.update("c", 1), c.Commit)
    assert dict(commit.failed) == {"a": "NaN"}


def test_nobody_waits_for_updates_of_tasks_that_are_done_or_unknown() -> None:
    story = Story(min_fit_clients=3)
    story.join(*"abc")
    assert story.engine.awaits("run/fit/1/a", "a")
    assert not story.engine.awaits("run/fit/1/a", "b")
    assert not story.engine.awaits("run/fit/2/a", "a")
    story.update("a", 1)
    assert not story.engine.awaits("run/fit/1/a", "a")


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_the_next_rounds_tasks_go_out_before_the_evaluation_of_the_last() -> None:
    story = Story(fraction_evaluate=1.0)
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    kinds = [type(command) for command in story.commit() if isinstance(command, c.SendFitTask | c.SendEvaluateTask)]
    assert kinds == [c.SendFitTask] * 2 + [c.SendEvaluateTask] * 2


def test_an_evaluation_closes_when_all_have_answered_and_counts_failures_as_missing() -> None:
    story = Story(fraction_evaluate=1.0)
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    story.commit()
    story.happens(e.EvaluateReported(client_id="a", task_id="run/evaluate/1/a"))
    said = story.happens(e.TaskFailed(client_id="b", task_id="run/evaluate/1/b", reason="boom"))
    assert one(said, c.CloseEvaluation) == c.CloseEvaluation(round=1, version=1, reported=("a",), missing=("b",))


def test_the_run_ends_after_its_last_evaluation_and_an_evaluation_ends_at_its_timeout() -> None:
    story = Story(fraction_evaluate=1.0, num_rounds=1, evaluate_timeout_s=7.0)
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    assert not all_of(story.commit(), c.EndRun)
    said = story.wait(7)
    assert set(one(said, c.CloseEvaluation).missing) == {"a", "b"}
    assert one(said, c.EndRun).finished


def test_stragglers_are_not_asked_to_evaluate() -> None:
    story = Story(fraction_evaluate=1.0)
    story.join(*"abc")
    story.update("a", 1)
    story.update("b", 1)
    assert {task.client_id for task in all_of(story.commit(), c.SendEvaluateTask)} == {"a", "b"}


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_the_run_finishes_after_num_rounds_and_what_comes_then_is_surplus() -> None:
    story = Story(num_rounds=1)
    story.join(*"abc")
    story.update("a", 1)
    story.update("b", 1)
    assert one(story.commit(), c.EndRun).finished
    assert settled(story.update("c", 1)) == [(3, Outcome.SURPLUS)]
    assert story.engine.next_deadline() is None


def test_a_stop_in_an_open_round_gives_its_updates_back() -> None:
    story = Story(min_fit_clients=3)
    story.join(*"abc")
    story.update("a", 1)
    said = story.happens(e.StopRequested(reason="enough"))
    assert settled(said) == [(1, Outcome.RELEASED)]
    assert one(said, c.EndRun) == c.EndRun(finished=False, reason="enough")


def test_a_stop_during_a_commit_lets_it_finish() -> None:
    story = Story()
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    assert not all_of(story.happens(e.StopRequested(reason="enough")), c.EndRun)
    said = story.commit()
    assert settled(said) == [(1, Outcome.COMMITTED), (2, Outcome.COMMITTED)]
    assert not one(said, c.EndRun).finished


REACHED = e.GoalReached(reason="it is good enough")


def test_a_goal_reached_in_an_open_round_ends_the_run_as_finished_and_its_updates_are_of_no_use() -> None:
    story = Story(min_fit_clients=3)
    story.join(*"abc")
    story.update("a", 1)
    said = story.happens(REACHED)
    assert settled(said) == [(1, Outcome.SURPLUS)]
    assert one(said, c.EndRun) == c.EndRun(finished=True, reason="it is good enough")
    assert settled(story.update("b", 1)) == [(2, Outcome.SURPLUS)]


def test_a_goal_reached_during_a_commit_makes_that_round_the_last() -> None:
    story = Story(fraction_evaluate=1.0)
    story.join(*"abc")
    story.update("a", 1)
    story.update("b", 1)
    assert not story.happens(REACHED)
    assert settled(story.update("c", 1)) == []  # it waits for a next round
    said = story.commit()
    assert settled(said) == [(1, Outcome.COMMITTED), (2, Outcome.COMMITTED), (3, Outcome.SURPLUS)]
    assert not all_of(said, c.EndRun)
    assert {command.client_id for command in all_of(said, c.SendEvaluateTask)} == {"a", "b", "c"}  # it counts, too
    for command in all_of(said, c.SendEvaluateTask):
        said = story.happens(e.EvaluateReported(client_id=command.client_id, task_id=command.task_id))
    assert one(said, c.EndRun) == c.EndRun(finished=True, reason="it is good enough")


def test_a_goal_reached_while_others_still_evaluate_waits_for_them_and_takes_their_training_away() -> None:
    story = Story(fraction_evaluate=1.0)
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    asked = all_of(story.commit(), c.SendEvaluateTask)
    said = story.happens(REACHED)
    assert {command.task_id for command in all_of(said, c.CancelTask)} == {"run/fit/2/a", "run/fit/2/b"}
    assert not all_of(said, c.EndRun)
    for command in asked:
        said = story.happens(e.EvaluateReported(client_id=command.client_id, task_id=command.task_id))
    assert one(said, c.EndRun).finished


@pytest.mark.parametrize("tasks", [(), ("a", "b", "c")])
def test_a_goal_that_the_last_server_had_reached_ends_the_resumed_run_before_its_next_round(
    tasks: tuple[str, ...],
) -> None:
    story = resumed(*(was(client, 2) for client in tasks))
    assert not story.happens(REACHED)
    said = story.happens(e.ModelReady())
    assert not all_of(said, c.RoundOpened)
    assert one(said, c.EndRun) == c.EndRun(finished=True, reason="it is good enough")


def test_a_goal_reached_after_the_last_round_or_a_stop_changes_nothing() -> None:
    story = Story(num_rounds=1, fraction_evaluate=1.0)
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    story.commit()
    story.happens(REACHED)
    assert one(story.wait(700), c.EndRun).reason == "all rounds are done"
    stopped = Story(fraction_evaluate=1.0)
    stopped.join("a", "b")
    stopped.happens(e.StopRequested(reason="enough"))
    stopped.happens(REACHED)
    assert not one(stopped.said, c.EndRun).finished


# ---- whatever happens ------------------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "num_rounds": draw(st.integers(1, 4)),
        "min_fit_clients": draw(st.integers(1, 4)),
        "min_available_clients": draw(st.none() | st.integers(1, 4)),
        "fraction_fit": draw(st.sampled_from([0.3, 0.5, 1.0])),
        "fraction_evaluate": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "grace_s": draw(st.sampled_from([0.0, 3.0, float("inf")])),
        "max_staleness": draw(st.integers(0, 2)),
    }


@given(configs(), st.randoms(use_true_random=False), st.sampled_from([None, e.StopRequested(reason="enough"), REACHED]))
@settings(max_examples=300, deadline=None)
def test_whatever_happens_deliveries_settle_once_tasks_fold_once_and_rounds_end(
    config: dict[str, Any], rng: random.Random, end: e.Event | None
) -> None:
    chaos = _Chaos(config, rng)
    for step in range(rng.randrange(10, 120)):
        chaos.step()
        if end is not None and step == 60:
            chaos.story.happens(end)
    chaos.finish()
    chaos.check()


class _Chaos:
    """Clients that join, leave, die, fail, answer late, twice or for others; a runtime that commits when it likes."""

    def __init__(self, config: dict[str, Any], rng: random.Random) -> None:
        self.story = Story(lease_s=20.0, timeout_s=30.0, seed=rng.randrange(5), **config)
        self.rng = rng
        self.names = "abcdef"
        self.answered_commits = 0
        self.sent: list[int] = []

    @property
    def tasks(self) -> list[c.SendFitTask]:
        return all_of(self.story.said, c.SendFitTask)

    def step(self) -> None:
        actions = [self.join, self.beat, self.answer, self.answer, self.answer, self.evaluate, self.wait, self.commit]
        self.rng.choice([*actions, self.leave, self.fail, self.invalid, self.forge])()
        self.check_state()

    def check_state(self) -> None:
        """What the engine keeps beside the tasks agrees with them, and the clock is not asked to stand still."""
        engine = self.story.engine
        round_ = engine._round
        if round_ is not None and engine.phase is Phase.OPEN:
            tasks = {client: engine._tasks[task] for client, task in round_.cohort.items()}
            assert round_.working == {client for client, task in tasks.items() if task.state.value == "working"}
        deadline = engine.next_deadline()
        if deadline is not None and deadline <= self.story.now:
            self.story.wait(0)
            deadline = engine.next_deadline()
            assert deadline is None or deadline > self.story.now

    def join(self) -> None:
        name = self.rng.choice(self.names)
        self.story.happens(joined(name, self.rng.choice(["1", "2"])))

    def beat(self) -> None:
        self.story.beat(*self.story.engine.members)

    def leave(self) -> None:
        name = self.rng.choice(self.names)
        self.story.happens(e.ClientLeft(client_id=name, session=self.rng.choice(["1", "2", name]), reason="bye"))

    def answer(self) -> None:
        if self.tasks:
            task = self.rng.choice(self.tasks[-8:])
            self.story.update(task.client_id, task.round)

    def forge(self) -> None:
        self.story.update(
            self.rng.choice(self.names), 1, f"run/fit/{self.rng.randrange(4)}/{self.rng.choice(self.names)}"
        )

    def invalid(self) -> None:
        if self.tasks:
            task = self.rng.choice(self.tasks[-8:])
            self.story.deliveries += 1
            self.story.happens(
                e.UpdateInvalid(
                    client_id=task.client_id, task_id=task.task_id, delivery=self.story.deliveries, reason="NaN"
                )
            )

    def fail(self) -> None:
        if self.tasks:
            task = self.rng.choice(self.tasks[-8:])
            self.story.happens(e.TaskFailed(client_id=task.client_id, task_id=task.task_id, reason="boom"))

    def evaluate(self) -> None:
        tasks = all_of(self.story.said, c.SendEvaluateTask)
        if tasks:
            task = self.rng.choice(tasks)
            self.story.happens(e.EvaluateReported(client_id=task.client_id, task_id=task.task_id))

    def wait(self) -> None:
        self.story.wait(self.rng.choice([0.1, 1.0, 5.0, 25.0]))

    def commit(self) -> None:
        if len(all_of(self.story.said, c.Commit)) > self.answered_commits:
            self.answered_commits += 1
            self.story.commit()

    def finish(self) -> None:
        """From here on everybody behaves: the run must come to its end."""
        for _ in range(100):
            if self.story.engine.phase is Phase.ENDED:
                return
            self.story.join("a", "b", "c", "d")
            self.commit()
            self.story.wait(10.0)
        raise AssertionError(f"the run does not end: {self.story.engine!r}")

    def check(self) -> None:
        said = self.story.said
        settlements = Counter(delivery for delivery, _ in settled(said))
        assert settlements == Counter(range(1, self.story.deliveries + 1)), "each delivery is settled exactly once"
        folds = Counter(fold.task_id for fold in all_of(said, c.Fold))
        assert all(count == 1 for count in folds.values()), "each task is folded at most once"
        committed = [f.delivery for commit in all_of(said, c.Commit) for f in commit.folded]
        outcomes = dict(settled(said))
        assert all(outcomes[delivery] is Outcome.COMMITTED for delivery in committed)
        assert sum(outcome is Outcome.COMMITTED for outcome in outcomes.values()) == len(committed)
        opened = [notice.round for notice in all_of(said, c.RoundOpened)]
        closed = [commit.round for commit in all_of(said, c.Commit)]
        assert opened[: len(closed)] == closed == list(range(1, len(closed) + 1))
        assert len(opened) - len(closed) <= 1
        assert len(all_of(said, c.EndRun)) == 1
        evaluated = [evaluation.round for evaluation in all_of(said, c.CloseEvaluation)]
        assert set(evaluated) == {task.round for task in all_of(said, c.SendEvaluateTask)}
        assert len(evaluated) == len(set(evaluated))


# ---- a run that goes on ----------------------------------------------------------------------------------------------


def was(client: str, round_: int, state: str = "working", *, folded_in: int = 0, reason: str = "") -> RestoredTask:
    return RestoredTask(
        task_id=f"run/fit/{round_}/{client}",
        client_id=client,
        round=round_,
        version=round_ - 1,
        state=state,  # type: ignore[arg-type]
        folded_in=folded_in,
        reason=reason,
    )


def resumed(*tasks: RestoredTask, rounds: int = 1, clients: str = "abc", **more: Any) -> Story:
    """A run of which `rounds` rounds were committed, each with a new version."""
    due = more.pop("evaluation_due", False)
    restored = Restored(rounds=rounds, version=rounds, clients=tuple(clients), tasks=tasks, evaluation_due=due)
    return Story(restored=restored, **{"min_fit_clients": 3, **more})


def test_a_resumed_run_opens_nothing_before_its_model_is_there_again() -> None:
    story = resumed()
    assert not all_of(story.join("a", "b", "c"), c.RoundOpened)
    opened = one(story.happens(e.ModelReady()), c.RoundOpened)
    assert (opened.round, opened.version) == (2, 1)


def test_the_round_that_was_open_goes_on_with_its_cohort_and_its_tasks_are_sent_again() -> None:
    story = resumed(was("a", 2), was("b", 2), was("c", 2), clients="abcde")
    said = story.happens(e.ModelReady())
    assert set(one(said, c.RoundOpened).cohort) >= {"a", "b", "c"}
    assert not tasked(said) & {"a", "b", "c"}  # their answers may be on their way
    said = story.happens(e.TasksInDoubt())
    assert {command.task_id for command in all_of(said, c.SendFitTask)} >= {f"run/fit/2/{x}" for x in "abc"}
    assert {command.version for command in all_of(said, c.SendFitTask)} == {1}


def test_updates_that_come_again_before_the_round_is_open_wait_for_it_and_are_not_asked_for() -> None:
    story = resumed(was("a", 2), was("b", 2), was("c", 2))
    assert settled(story.update("a", 2)) == []
    said = story.happens(e.ModelReady())
    assert [command.client_id for command in all_of(said, c.Fold)] == ["a"]
    assert tasked(story.happens(e.TasksInDoubt())) == {"b", "c"}
    story.update("b", 2)
    story.update("c", 2)
    assert {folded.client_id for folded in one(story.said, c.Commit).folded} == {"a", "b", "c"}


def test_a_failure_that_was_known_is_in_the_round_and_is_not_asked_for_again() -> None:
    story = resumed(was("a", 2, "failed", reason="no data"), was("b", 2), was("c", 2))
    story.happens(e.ModelReady())
    assert tasked(story.happens(e.TasksInDoubt())) == {"b", "c"}
    story.update("b", 2)
    story.update("c", 2)
    commit = one(story.said, c.Commit)
    assert (commit.failed, commit.reason) == ({"a": "no data"}, CloseReason.COHORT_DONE)


def test_an_update_that_is_committed_already_is_settled_with_the_round_that_it_is_in() -> None:
    story = resumed(was("a", 1, "folded", folded_in=1), was("b", 2))
    settle = one(story.update("a", 1), c.Settle)
    assert (settle.outcome, settle.round) == (Outcome.DUPLICATE, 1)
    assert story.engine.fate("run/fit/1/a", "a") is Fate.COMMITTED


def test_a_straggler_of_before_is_folded_late_and_is_not_given_a_second_task_meanwhile() -> None:
    story = resumed(was("a", 1), was("b", 1, "folded", folded_in=1), was("c", 1, "folded", folded_in=1))
    assert tasked(story.happens(e.ModelReady())) == {"b", "c"}
    assert one(story.update("a", 1), c.Fold).staleness == 1


def test_members_of_before_have_a_lease_and_are_lost_when_they_never_come_back() -> None:
    story = resumed(was("a", 2), was("b", 2), was("c", 2), lease_s=20.0, heartbeat_s=1.0)
    story.happens(e.ModelReady())
    story.wait(19)
    story.beat("a", "b")
    assert [lost.client_id for lost in all_of(story.wait(2), c.MemberLost)] == ["c"]
    assert story.engine.members == ("a", "b")


def test_a_member_of_before_is_welcomed_at_its_first_word_and_is_no_new_one() -> None:
    story = resumed(was("a", 2), was("b", 2), was("c", 2))
    story.happens(e.ModelReady())
    said = story.happens(e.ClientHeard(client_id="a", session="s"))
    assert [command.session for command in all_of(said, c.WelcomeClient)] == ["s"]
    assert not all_of(said, c.MemberJoined)
    assert not tasked(said)
    assert not story.happens(e.ClientHeard(client_id="a", session="s"))


def test_a_member_of_before_that_says_goodbye_is_gone() -> None:
    story = resumed(was("a", 2), was("b", 2), was("c", 2))
    story.happens(e.ModelReady())
    said = story.happens(e.ClientLeft(client_id="a", session="s", reason="bye"))
    assert one(said, c.MemberLost).left


def test_nobody_is_waited_for_before_the_first_round_of_a_resumed_run() -> None:
    story = resumed(clients="a", min_available_clients=3)
    assert one(story.happens(e.ModelReady()), c.RoundOpened).cohort == ("a",)


def test_a_run_that_was_committed_to_its_end_only_ends() -> None:
    story = resumed(rounds=3)
    said = story.happens(e.ModelReady())
    assert not all_of(said, c.RoundOpened)
    assert one(said, c.EndRun).finished


def test_a_run_that_was_committed_to_its_end_ends_though_nobody_is_there() -> None:
    story = resumed(rounds=3, clients="", evaluation_due=True, fraction_evaluate=1.0)
    assert one(story.happens(e.ModelReady()), c.EndRun).finished


@pytest.mark.parametrize("tasks", [(), (was("a", 2), was("b", 2), was("c", 2))])
def test_an_evaluation_that_was_not_complete_is_asked_for_behind_the_new_tasks_of_the_round(
    tasks: tuple[RestoredTask, ...],
) -> None:
    story = resumed(*tasks, evaluation_due=True, fraction_evaluate=1.0)
    said = story.happens(e.ModelReady())
    sent = [command for command in said if isinstance(command, c.SendFitTask | c.SendEvaluateTask)]
    new = [] if tasks else [c.SendFitTask] * 3
    assert [type(command) for command in sent] == new + [c.SendEvaluateTask] * 3
    assert {command.client_id for command in sent[-3:]} == {"a", "b", "c"}
    assert {(command.round, command.version) for command in all_of(said, c.SendEvaluateTask)} == {(1, 1)}
    assert not all_of(story.happens(e.TasksInDoubt(client_id="x")), c.SendEvaluateTask)


def test_the_last_evaluation_of_a_run_is_done_before_it_ends() -> None:
    story = resumed(rounds=3, evaluation_due=True, fraction_evaluate=1.0)
    said = story.happens(e.ModelReady())
    asked = all_of(said, c.SendEvaluateTask)
    assert {command.client_id for command in asked} == {"a", "b", "c"}
    assert not all_of(said, c.EndRun)
    for command in asked:
        said = story.happens(e.EvaluateReported(client_id=command.client_id, task_id=command.task_id))
    assert one(said, c.CloseEvaluation).round == 3
    assert one(said, c.EndRun).finished


def test_a_resumed_run_without_a_model_takes_it_from_whoever_was_asked_before() -> None:
    restored = Restored(rounds=0, version=0, clients=("a", "b"))
    story = Story(has_model=False, restored=restored)
    assert story.engine.awaits("run/parameters/0/b", "b")
    assert not story.engine.awaits("run/parameters/0/b", "a")
    assert one(story.update("b", 0, "run/parameters/0/b"), c.AdoptParameters).client_id == "b"


def test_cohorts_of_a_resumed_run_are_those_of_one_that_was_never_interrupted() -> None:
    config: dict[str, Any] = {"fraction_fit": 0.5, "min_fit_clients": 3, "min_available_clients": 6}
    whole = Story(seed=4, **config)
    whole.join(*"abcdef")
    for client in one(whole.said, c.RoundOpened).cohort:
        whole.update(client, 1)
    second = one(whole.commit(), c.RoundOpened).cohort
    story = resumed(clients="fedcba", seed=4, **config)
    assert one(story.happens(e.ModelReady()), c.RoundOpened).cohort == second


# ---- silence that proves nothing -------------------------------------------------------------------------------------


def test_no_lease_ends_on_silence_that_was_not_listened_to() -> None:
    story = Story(lease_s=20.0, heartbeat_s=1.0)
    story.join("a", "b")
    story.happens(e.EchoHeard(sent_at=0.0))
    assert not all_of(story.wait(90), c.MemberLost)  # nothing has been heard at all, not even of ourselves
    story.happens(e.EchoHeard(sent_at=19.0))
    assert not all_of(story.wait(0), c.MemberLost)
    story.beat("a")
    story.happens(e.EchoHeard(sent_at=20.5))
    assert [lost.client_id for lost in all_of(story.wait(0), c.MemberLost)] == ["b"]


def test_a_lease_that_cannot_end_yet_is_no_deadline() -> None:
    story = Story(lease_s=20.0, heartbeat_s=1.0, min_fit_clients=3)
    story.join("a")
    assert story.engine.next_deadline() == 20.0
    story.happens(e.EchoHeard(sent_at=5.0))
    assert story.engine.next_deadline() is None
    story.happens(e.EchoHeard(sent_at=20.0))
    assert story.engine.next_deadline() == 20.0


# ---- tasks in doubt --------------------------------------------------------------------------------------------------


def test_tasks_in_doubt_are_sent_again_to_those_who_have_not_answered() -> None:
    story = Story(min_fit_clients=3)
    story.join("a", "b", "c")
    story.update("a", 1)
    assert tasked(story.happens(e.TasksInDoubt())) == {"b", "c"}
    assert tasked(story.happens(e.TasksInDoubt(client_id="b"))) == {"b"}
    assert tasked(story.happens(e.TasksInDoubt(client_id="a"))) == set()
    story.happens(e.TaskFailed(client_id="b", task_id="run/fit/1/b", reason="no"))
    story.happens(e.ClientLeft(client_id="c", session="c", reason="bye"))
    assert tasked(story.happens(e.TasksInDoubt())) == set()


def test_tasks_sent_again_have_the_time_that_is_left_and_change_nothing() -> None:
    story = Story(min_fit_clients=2, lease_s=1000.0)
    story.join("a", "b")
    story.wait(30)
    before = story.engine.next_deadline()
    (first, _) = all_of(story.happens(e.TasksInDoubt()), c.SendFitTask)
    assert first.timeout_s == 70.0
    assert story.engine.next_deadline() == before
    story.update("a", 1)
    story.update("b", 1)
    assert len(one(story.said, c.Commit).folded) == 2


def test_nothing_is_sent_again_while_a_round_is_being_committed() -> None:
    story = Story()
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    assert story.engine.phase is Phase.CLOSING
    assert story.happens(e.TasksInDoubt()) == []


def test_evaluations_and_the_initial_model_in_doubt_are_asked_for_again() -> None:
    story = Story(has_model=False)
    request = one(story.join("a", "b"), c.RequestParameters)
    assert one(story.happens(e.TasksInDoubt()), c.RequestParameters) == request
    story = Story(num_rounds=1, fraction_evaluate=1.0)
    story.join("a", "b")
    story.update("a", 1)
    story.update("b", 1)
    asked = all_of(story.commit(), c.SendEvaluateTask)
    assert len(asked) == 2
    story.happens(e.EvaluateReported(client_id=asked[0].client_id, task_id=asked[0].task_id))
    again = all_of(story.happens(e.TasksInDoubt()), c.SendEvaluateTask)
    assert [command.task_id for command in again] == [asked[1].task_id]


# ---- what has become of an update ------------------------------------------------------------------------------------


def test_the_fate_of_an_update_at_each_point_of_its_life() -> None:
    story = Story(min_fit_clients=2)
    story.join("a", "b")
    task = "run/fit/1/a"
    assert story.engine.fate(task, "a") is Fate.AWAITED
    assert story.engine.fate(task, "b") is Fate.UNWANTED
    assert story.engine.fate("run/fit/9/a", "a") is Fate.UNWANTED
    story.update("a", 1)
    assert story.engine.fate(task, "a") is Fate.HERE
    story.update("b", 1)
    assert story.engine.fate(task, "a") is Fate.HERE  # its commit may still fail
    story.commit()
    assert story.engine.fate(task, "a") is Fate.COMMITTED
    story.happens(e.TaskFailed(client_id="a", task_id="run/fit/2/a", reason="no"))
    assert story.engine.fate("run/fit/2/a", "a") is Fate.UNWANTED


def test_an_update_that_is_held_is_here_and_one_of_a_lost_client_is_awaited() -> None:
    story = Story(min_fit_clients=2, min_available_clients=3)
    story.join("a", "b", "c")
    story.update("a", 1)
    story.update("b", 1)
    story.update("c", 1)  # while the commit is under way
    assert story.engine.fate("run/fit/1/c", "c") is Fate.HERE
    story.commit()
    story.happens(e.ClientLeft(client_id="a", session="a", reason="bye"))
    assert story.engine.fate("run/fit/2/a", "a") is Fate.AWAITED


def test_a_client_is_busy_with_its_newest_task_not_with_one_that_was_lost_long_ago() -> None:
    story = resumed(
        was("a", 1), was("a", 2, "folded", folded_in=2), was("b", 2, "folded", folded_in=2), rounds=2, clients="ab"
    )
    assert tasked(story.happens(e.ModelReady())) == {"a", "b"}


def test_after_an_outage_everybody_has_a_fresh_lease_and_the_time_to_find_the_broker_again() -> None:
    story = Story(lease_s=20.0, heartbeat_s=5.0)
    story.join("a", "b")
    story.happens(e.EchoHeard(sent_at=0.0))
    story.now = 40.0
    story.happens(e.Reconnected(grace_s=10.0))
    story.happens(e.EchoHeard(sent_at=41.0))
    assert not all_of(story.wait(1.0), c.MemberLost)
    story.beat("a")
    story.now = 71.0
    story.happens(e.EchoHeard(sent_at=70.5))
    assert {lost.client_id for lost in all_of(story.wait(0.1), c.MemberLost)} == {"a", "b"}


# ---- virtual clients -------------------------------------------------------------------------------------------------


def virtual(*clients: str) -> e.VirtualClientsHeard:
    return e.VirtualClientsHeard(client_ids=clients)


def test_virtual_clients_join_all_at_once_and_nobody_is_there_to_be_welcomed() -> None:
    story = Story(min_available_clients=3)
    said = story.happens(virtual("v1", "v2", "v3"))
    assert [(joined.client_id, joined.needed) for joined in all_of(said, c.MemberJoined)] == [
        ("v1", 2),
        ("v2", 1),
        ("v3", 0),
    ]
    assert not all_of(said, c.WelcomeClient)
    assert tasked(said) == {"v1", "v2", "v3"}


def test_virtual_clients_that_come_in_an_open_round_take_its_free_places_beside_others() -> None:
    story = Story(min_fit_clients=3, min_available_clients=1)
    story.join("a")
    said = story.happens(virtual("v1", "v2"))
    assert one(said, c.CohortGrew).clients in (("v1", "v2"), ("v2", "v1"))


def test_a_virtual_client_is_there_as_long_as_its_queue_is_heard_of() -> None:
    story = Story(lease_s=20.0, timeout_s=100.0, min_fit_clients=1)
    story.happens(virtual("v1"))
    for _ in range(4):
        story.wait(15)
        story.happens(virtual("v1"))
    assert not all_of(story.said, c.MemberLost)
    story.wait(20)
    assert one(story.said, c.MemberLost).reason == "silent for 20.0 s"


def test_a_virtual_client_whose_time_is_over_may_be_asked_again_and_its_late_update_counts() -> None:
    """Nobody says that it still works: its task may have ended in the queue."""
    story = Story(lease_s=20.0, timeout_s=100.0, min_fit_clients=1)
    assert tasked(story.happens(virtual("v1"))) == {"v1"}
    for _ in range(9):
        story.wait(10)
        story.happens(virtual("v1"))
    story.wait(10)
    assert tasked(story.commit()) == {"v1"}  # round 1 ended without an update
    (fold,) = all_of(story.update("v1", 1), c.Fold)
    assert (fold.round, fold.version) == (2, 0)


def test_a_virtual_clients_task_of_an_earlier_round_that_is_in_doubt_is_let_go_and_counts_when_it_comes() -> None:
    story = Story(min_fit_clients=1, over_selection=2.0)
    story.happens(virtual("v1", "v2"))
    story.update("v1", 1)
    assert tasked(story.commit()) == {"v1"}  # v2 is at work
    assert tasked(story.happens(e.TasksInDoubt())) == {"v1"}
    assert tasked(story.happens(virtual("v1", "v2"))) == {"v2"}
    (fold,) = all_of(story.update("v2", 1), c.Fold)
    assert fold.staleness == 1

"""Virtual time: real server, real clients, invented seconds. What is asserted is what those seconds add up to."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedbus as fb
from fedbus.clock import now
from fedbus.errors import ConfigError, RunFailed
from fedbus.observe import events as o
from fedbus.server.history import History
from fedbus.simulation.chance import exponential, lognormal, uniform
from fedbus.simulation.habits import Habits
from fedbus.simulation.traces import read_presence, read_speeds
from fedbus.simulation.virtual import STARTED_AT
from fedbus.simulation.virtual_client import VirtualCaller
from fedbus.simulation.virtual_loop import FOREVER_S, VirtualLoop
from fedbus.simulation.virtual_time import VirtualTime
from fedbus.training.base import ClientContext
from tests.kit import AddingClient

HOUR = 3600.0


def run(story: Any) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(story)


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_sleeping_takes_virtual_time_alone_and_timers_come_in_order() -> None:
    async def story() -> list[tuple[str, float]]:
        came: list[tuple[str, float]] = []

        async def one(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            came.append((name, now()))

        await asyncio.gather(one("late", 1000 * HOUR), one("soon", 1.5), one("at once", 0))
        return came

    assert run(story()) == [("at once", 0.0), ("soon", 1.5), ("late", pytest.approx(1000 * HOUR))]


@pytest.mark.parametrize("start", [0.0, 1e7 + 0.1, 3e8 + 0.7])
def test_small_steps_add_up_however_late_it_is(start: float) -> None:
    """A jump that is rounded down must not leave its timer waiting for ever."""

    async def story() -> float:
        await asyncio.sleep(start)
        for _ in range(1000):
            await asyncio.sleep(0.001)
        return now()

    assert run(story()) == pytest.approx(start + 1.0, abs=1e-3)


def test_what_goes_to_a_thread_runs_here_and_now() -> None:
    async def story() -> None:
        assert await asyncio.to_thread(threading.get_ident) == threading.get_ident()
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)

    run(story())


def test_when_nothing_can_ever_happen_the_loop_says_so() -> None:
    async def story() -> None:
        asyncio.get_running_loop().call_later(2 * FOREVER_S, print)  # as good as never
        await asyncio.Event().wait()

    with pytest.raises(RunFailed, match="stands still"):
        run(story())


def test_whoever_wants_to_is_asked_first_when_nothing_can_happen() -> None:
    async def story() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        ended = asyncio.Event()
        loop.on_standstill = ended.set
        await asyncio.sleep(7)
        await ended.wait()
        return now()

    assert run(story()) == 7


def test_a_timeout_comes_before_what_takes_longer() -> None:
    async def story() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await asyncio.sleep(11)
        return now()

    assert run(story()) == 10


def test_a_signal_is_heard_however_busy_virtual_time_is() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()

        def tick() -> None:
            loop.call_later(1, tick)

        tick()
        loop.add_signal_handler(signal.SIGUSR1, heard.set)
        os.kill(os.getpid(), signal.SIGUSR1)
        await heard.wait()

    run(story())


# ---- chance ----------------------------------------------------------------------------------------------------------


def test_draws_are_functions_of_their_key() -> None:
    assert uniform(1, "client-01", 2) == uniform(1, "client-01", 2)
    assert len({uniform(seed, client, task) for seed in (0, 1) for client in "ab" for task in range(5)}) == 20


def test_draws_have_their_distributions() -> None:
    keys = range(4000)
    assert statistics.fmean(uniform(key) for key in keys) == pytest.approx(0.5, abs=0.02)
    assert statistics.median(lognormal(1.0, key) for key in keys) == pytest.approx(1.0, abs=0.1)
    assert statistics.stdev(math.log(lognormal(0.5, key)) for key in keys) == pytest.approx(0.5, abs=0.02)
    assert statistics.fmean(exponential(30.0, key) for key in keys) == pytest.approx(30.0, rel=0.05)
    assert lognormal(0.0, "whoever") == 1.0


def test_a_client_is_there_for_its_share_of_the_time() -> None:
    there = 0.0
    for client in range(40):
        for start, end in Habits(VirtualTime(availability="600:300"), f"client-{client}").presence():
            if start > 1000 * HOUR:
                break
            there += min(end, 1000 * HOUR) - start
    assert there / (40 * 1000 * HOUR) == pytest.approx(2 / 3, abs=0.02)


def test_some_clients_are_away_when_the_run_begins() -> None:
    firsts = [next(Habits(VirtualTime(availability="600:300"), f"c{n}").presence())[0] for n in range(300)]
    assert sum(start == 0 for start in firsts) / 300 == pytest.approx(2 / 3, abs=0.1)


# ---- settings and traces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"fit_s": 0}, "fit_s must be a positive number of seconds, not 0"),
        ({"fit_s": "60"}, "fit_s must be a number, not '60'"),
        ({"evaluate_s": -1}, "evaluate_s must be 0 or more"),
        ({"downtime_s": math.inf}, "downtime_s must be a number"),
        ({"dropout": 1.5}, "dropout must be a probability"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"speeds": "lognormal"}, "speeds must be constant, lognormal:SIGMA"),
        ({"speeds": "lognormal:-1"}, "speeds must be"),
        ({"speeds": "lognormal:1:1:1"}, "speeds must be"),
        ({"speeds": "trace:"}, "speeds must be"),
        ({"speeds": "constant:2"}, "speeds must be"),
        ({"availability": "600"}, "availability must be always, ON:OFF"),
        ({"availability": "600:0"}, "availability must be"),
        ({"availability": "600:1e-9"}, "availability must be"),
        ({"speeds": "lognormal:1000"}, "speeds must be"),
        ({"bandwidth": 1e6, "bandwidth_spread": 1e6}, "bandwidth_spread must be 10 at most"),
        ({"availability": "trace:"}, "availability must be"),
        ({"bandwidth": 0}, "bandwidth must be bytes per second"),
        ({"bandwidth": "1e6:fast"}, "bandwidth must be"),
        ({"bandwidth": "1:2:3"}, "bandwidth must be"),
        ({"bandwidth_spread": -0.1}, "bandwidth_spread must be 0 or more"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        VirtualTime(**settings)


def test_traces_are_read_with_or_without_the_names_of_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("client,seconds\na,1.5\n\nb,2\na, 3\n")
    assert read_speeds(str(path)) == {"a": (1.5, 3.0), "b": (2.0,)}
    path.write_text("a,0,10\nb,5,6\na,10,1e3\n")
    assert read_presence(str(path)) == {"a": ((0, 10), (10, 1000)), "b": ((5, 6),)}


@pytest.mark.parametrize(
    ("read", "text", "says"),
    [
        (read_speeds, "client,seconds\na,fast\n", "trace.csv:2: seconds must be a number, not 'fast'"),
        (read_speeds, "a,1\nb\n", "trace.csv:2: 'b' is not client,seconds"),
        (read_speeds, "a,0\n", "trace.csv:1: a fit takes more than 0 seconds"),
        (read_speeds, "a,nan\n", "trace.csv:1: seconds must be a number"),
        (read_presence, "a,5,5\n", "trace.csv:1: a ends at 5, which is not after its start at 5"),
        (read_presence, "a,0,9\na,5,20\n", "trace.csv:2: a starts at 5, before its last span ends"),
        (read_presence, "a,-1,9\n", "trace.csv:1: a starts at -1"),
        (read_presence, "a,1\n", "trace.csv:1: 'a,1' is not client,start_s,end_s"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, read: Any, text: str, says: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read(str(path))


def test_a_trace_that_is_not_there_or_lacks_a_client_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.csv cannot be read: No such file"):
        play(2, speeds=f"trace:{tmp_path / 'gone.csv'}")
    path = tmp_path / "trace.csv"
    path.write_text("client-01,10\n")
    with pytest.raises(ConfigError, match="has no row for client-02: the clients are client-01 to client-02"):
        play(2, speeds=f"trace:{path}")


# ---- one client's calls ----------------------------------------------------------------------------------------------


def test_an_interrupted_fit_ends_at_once_and_sees_that_it_is_cancelled() -> None:
    context = ClientContext(client_id="client-01")
    caller = VirtualCaller(Habits(VirtualTime(fit_s=100), "client-01"))

    def fit(model: object, config: object) -> tuple[Any, float]:
        return np.zeros(1), now() if context.cancelled else -1.0

    def cancel() -> None:
        context.cancel()
        caller.interrupt()

    async def story() -> float:
        asyncio.get_running_loop().call_later(30, cancel)
        cancelled_at = (await caller.call("fit", fit, {"w": np.zeros(1)}, {}))[1]
        assert cancelled_at == 30
        context._reset()
        await caller.call("fit", fit, {"w": np.zeros(1)}, {})
        return now()

    assert run(story()) == 130


def test_only_fit_and_evaluate_take_time() -> None:
    caller = VirtualCaller(Habits(VirtualTime(fit_s=100, evaluate_s=7), "client-01"))

    async def story() -> list[float]:
        at = []
        for what in ("client_fn", "get_parameters", "evaluate"):
            await caller.call(what, lambda *args: None, {"w": np.zeros(1)}, {})
            at.append(now())
        return at

    assert run(story()) == [0, 0, 7]


# ---- whole runs ------------------------------------------------------------------------------------------------------


def play(
    num_clients: int = 3,
    *,
    rounds: dict[str, Any] | None = None,
    client_fn: Any = AddingClient,
    app: dict[str, Any] | None = None,
    events: list[object] | None = None,
    run_dir: Path | None = None,
    **virtual: Any,
) -> History:
    """A run in which all clients are needed in every round, unless `rounds` say otherwise."""
    settings = {"num_rounds": 2, "min_fit_clients": num_clients, "fraction_evaluate": 0, **(rounds or {})}
    made = fb.App(
        client_fn=client_fn,
        rounds=fb.RoundConfig(**settings),
        **{"initial_parameters": {"w": np.zeros(250, np.float32)}, **(app or {})},
    )
    observers = [] if events is None else [events.append]
    return fb.simulate(
        made, num_clients=num_clients, virtual=VirtualTime(**virtual), run_dir=run_dir, observers=observers
    )


def seconds_of(history: History) -> list[float]:
    return [record.seconds for record in history.rounds]


STORMY: dict[str, Any] = {
    "speeds": "lognormal:1.0:0.3",
    "evaluate_s": 5.0,
    "dropout": 0.2,
    "downtime_s": 100.0,
    "availability": "600:200",
    "bandwidth": "1e3:5e2",
    "bandwidth_spread": 0.5,
}


def play_a_storm(seed: int = 0, **settings: Any) -> History:
    rounds = {"num_rounds": 12, "min_fit_clients": 3, "fraction_evaluate": 0.5, "timeout_s": 300.0}
    return play(8, rounds=rounds, seed=seed, **{**STORMY, **settings})


def test_a_thousand_hours_are_ten_rounds_of_a_hundred() -> None:
    history = play(rounds={"num_rounds": 10, "timeout_s": 1000 * HOUR}, fit_s=100 * HOUR)
    assert history.finished
    assert seconds_of(history) == pytest.approx([100 * HOUR] * 10)
    assert history.seconds == pytest.approx(1000 * HOUR)
    assert [record.opened_s for record in history.rounds] == pytest.approx([100 * HOUR * n for n in range(10)])
    assert history.updates == 30


def test_the_model_is_the_one_that_real_processes_would_make() -> None:
    kept: list[float] = []

    def evaluate_fn(round: int, model: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        kept.append(float(model["w"][0]))
        return 0.0, {}

    play(3, app={"evaluate_fn": evaluate_fn})
    step = (10 * 1 + 20 * 2 + 30 * 3) / 60  # as in the command line's test
    assert kept == pytest.approx([0, step, 2 * step])


def test_the_speeds_of_a_trace_are_taken_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "speeds.csv"
    path.write_text("client-01,10\nclient-01,20\nclient-02,15\nclient-02,5\nclient-02,30\n")
    history = play(2, rounds={"num_rounds": 4}, speeds=f"trace:{path}")
    assert seconds_of(history) == [15, 20, 30, 20]  # max of 10 20 10 20 and 15 5 30 15


def test_a_clients_speed_is_its_own_and_the_jitter_each_tasks(tmp_path: Path) -> None:
    def fits(speeds: str) -> list[float]:
        habits = Habits(VirtualTime(speeds=speeds, fit_s=10, seed=3), "client-01")
        return [habits.fit_s(task, task) for task in range(4)]

    assert fits("constant") == [10] * 4
    assert len(set(fits("lognormal:1.0"))) == 1
    assert fits("lognormal:1.0")[0] != 10
    assert len(set(fits("lognormal:1.0:0.1"))) == 4
    assert Habits(VirtualTime(speeds="lognormal:1.0"), "client-02").fit_s(0, 0) != fits("lognormal:1.0")[0]


def test_the_model_and_the_update_take_their_time_on_the_road() -> None:
    """1000 bytes: 10 s down at 100 bytes/s, 20 s up at 50, each round anew for the model is new."""
    assert seconds_of(play(2, fit_s=60, bandwidth="100:50")) == [90, 90]
    assert seconds_of(play(2, fit_s=60, bandwidth=100)) == [80, 80]
    assert seconds_of(play(2, fit_s=60)) == [60, 60]


def test_what_is_compressed_takes_less_of_it() -> None:
    codecs = {"compression": "float16", "model_compression": "bfloat16"}
    assert seconds_of(play(2, fit_s=60, bandwidth="100:50", app=codecs)) == [75, 75]


def test_a_model_that_is_here_is_not_fetched_again() -> None:
    """Round 2 ends at 180; only then is model 1 evaluated, for 5 s without a download, and round 3 waits for that."""
    history = play(2, rounds={"num_rounds": 3, "fraction_evaluate": 1.0}, fit_s=60, evaluate_s=5, bandwidth="100:50")
    assert seconds_of(history) == [90, 90, 95]


def test_clients_drop_out_are_lost_and_come_back() -> None:
    events: list[object] = []
    rounds = {"num_rounds": 20, "min_fit_clients": 3, "lease_s": 20.0}
    history = play(6, rounds=rounds, dropout=0.3, downtime_s=200.0, events=events)
    assert history.finished
    assert len(history.rounds) == 20
    assert history.clients_lost
    assert history.clients_left == []
    lost = [event for event in events if isinstance(event, o.MemberLost)]
    assert {event.reason for event in lost} == {"silent for 20.0 s"}
    joined = [event.client_id for event in events if isinstance(event, o.MemberJoined)]
    assert len(joined) > len(set(joined))


def test_a_client_that_is_back_before_its_lease_ends_is_not_lost_and_trains_again(tmp_path: Path) -> None:
    """Round 2 begins at 20; the client is gone from 30 to 35, and trains its 20 s from then on."""
    path = tmp_path / "presence.csv"
    path.write_text("client-01,0,30\nclient-01,35,1000\nclient-02,0,1000\n")
    history = play(2, rounds={"num_rounds": 2, "lease_s": 10.0}, fit_s=20, availability=f"trace:{path}")
    assert history.clients_lost == []
    assert seconds_of(history) == [20, 35]


def test_a_client_that_is_away_for_longer_loses_its_place_to_another(tmp_path: Path) -> None:
    """client-02 is gone from 5 on and lost at 15; client-03, there by then, is asked in its place: 15 + 20 = 35."""
    path = tmp_path / "presence.csv"
    path.write_text("client-01,0,1000\nclient-02,0,5\nclient-03,12,1000\n")
    events: list[object] = []
    rounds = {"num_rounds": 1, "min_fit_clients": 2, "fraction_fit": 0.1, "lease_s": 10.0}
    history = play(3, rounds=rounds, fit_s=20, availability=f"trace:{path}", events=events)
    assert history.clients_lost == ["client-02"]
    assert history.rounds[0].clients == {"client-01", "client-03"}
    assert seconds_of(history) == [35]
    assert history.rounds[0].lost == ["client-02"]


def test_the_same_client_object_serves_all_lives_of_a_client() -> None:
    made: list[str] = []

    def client_fn(context: ClientContext) -> AddingClient:
        made.append(context.client_id)
        return AddingClient(context)

    history = play(4, rounds={"num_rounds": 10, "min_fit_clients": 2}, client_fn=client_fn, dropout=0.3)
    assert history.clients_lost
    assert sorted(made) == history.clients_joined


def test_clients_know_their_partition() -> None:
    seen: dict[str, tuple[int, int]] = {}

    def client_fn(context: ClientContext) -> AddingClient:
        seen[context.client_id] = (context.partition, context.num_partitions)
        return AddingClient(context)

    play(3, client_fn=client_fn)
    assert seen == {"client-01": (0, 3), "client-02": (1, 3), "client-03": (2, 3)}


@pytest.mark.parametrize("num_clients", [3, 20, 60])
def test_a_run_ends_however_many_clients_come_and_go_for_ever(num_clients: int) -> None:
    rounds = {"num_rounds": 5, "min_fit_clients": 3, "is_asynchronous": True, "timeout_s": 1e6}
    history = play(num_clients, rounds=rounds, speeds="lognormal:1.0", availability="600:300")
    assert len(history.rounds) == 5


def test_a_client_gives_the_initial_model_where_the_app_has_none() -> None:
    assert play(2, app={"initial_parameters": None}).finished


def test_a_fit_that_calls_exit_fails_its_task_alone() -> None:
    class Exiting(AddingClient):
        def fit(self, *args: Any) -> Any:
            if self.number == 2:
                sys.exit(3)
            return super().fit(*args)

    history = play(3, rounds={"min_fit_clients": 2, "min_available_clients": 3}, client_fn=Exiting)
    assert history.finished
    assert "SystemExit" in history.rounds[0].failed["client-02"]


def test_the_same_seed_gives_the_same_history_and_another_does_not() -> None:
    first, again, other = play_a_storm(0), play_a_storm(0), play_a_storm(1)
    assert first == again
    assert first.started_at == STARTED_AT
    assert first.run_id == "virtual-0"
    assert seconds_of(first) != seconds_of(other)
    assert first.clients_lost
    assert any(update.staleness for record in first.rounds for update in record.folded)


def test_the_same_seed_gives_the_same_history_whatever_strings_hash_to() -> None:
    code = "from tests.unit.test_virtual_time import play_a_storm; print(play_a_storm().to_json())"
    root = Path(__file__).parents[2]
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert json.loads(found[0])["finished"]


def test_the_history_shows_the_settings_of_the_app_and_of_the_simulation(tmp_path: Path) -> None:
    history = play(2, rounds={"lease_s": 30.0, "heartbeat_s": 3.0}, run_dir=tmp_path / "run", dropout=0.1)
    saved = json.loads((tmp_path / "run" / "history.json").read_text())
    for settings in (history.settings, saved["settings"]):
        assert (settings["lease_s"], settings["heartbeat_s"]) == (30.0, 3.0)
        assert settings["virtual_time"]["num_clients"] == 2
        assert settings["virtual_time"]["dropout"] == 0.1
    assert saved["seconds"] == history.seconds == 120
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_a_simulation_that_stands_still_says_so_and_ends(tmp_path: Path) -> None:
    """Round 3 is open when both have gone; it ends at its timeout, 40 + 600 s, and nobody is there for the next."""
    path = tmp_path / "presence.csv"
    path.write_text("client-01,0,50\nclient-02,0,50\n")
    says = r"after 3 rounds: the simulation stands still at 640 s: everybody waits, 0 of 2 clients are there"
    with pytest.raises(RunFailed, match=says):
        play(2, rounds={"num_rounds": 5}, fit_s=20, availability=f"trace:{path}", run_dir=tmp_path / "run")
    assert "stands still at 640 s" in json.loads((tmp_path / "run" / "history.json").read_text())["reason"]


@pytest.mark.parametrize("num_clients", [0, True, 2.0])
def test_a_number_of_clients_that_is_none_is_refused(num_clients: Any) -> None:
    app = fb.App(client_fn=AddingClient)
    with pytest.raises(ConfigError, match="num_clients must be a whole number"):
        fb.simulate(app, num_clients=num_clients, virtual=VirtualTime())


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match="the app waits for 3 clients before its first round: simulate 3 or more"):
        play(2, rounds={"min_fit_clients": 3})


async def test_it_works_where_a_loop_runs_already() -> None:
    history = play(2)
    assert (history.finished, history.seconds) == (True, 120)


def test_an_app_that_fails_fails_the_run() -> None:
    class Broken(fb.FedAvg):
        def finish(self, *args: Any) -> Any:
            raise ValueError("boom")

    with pytest.raises(RunFailed, match="finish raised ValueError: boom"):
        play(2, app={"strategy": Broken()})

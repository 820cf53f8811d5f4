"""SIGKILL and SIGSTOP at any instant: no acknowledged update lost, none folded twice, the run goes on without a hand.

Each run must end with the model of a run without faults, byte for byte. Longer campaigns: `tests.faults.campaign`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedbus.bus.node import PrivateNode
from tests.faults.adding_app import Settings
from tests.faults.campaign import disturbed
from tests.faults.expected import expected_sha
from tests.faults.fleet import SERVER, Fleet
from tests.faults.victim import POINTS

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

SMALL = Settings(clients=3, rounds=4, fit_s=0.02)
THREE_PARTS = replace(SMALL, model_bytes=2_500_000)


@pytest.fixture
def node(breakable_node: PrivateNode) -> PrivateNode:
    """The same one for all runs here: each cleans up after itself, or the next one shows it."""
    return breakable_node


def check_sound(fleet: Fleet, settings: Settings) -> None:
    """The run ends, everybody goes home, and every update is in its round exactly once."""
    assert fleet.until_done() == []
    assert fleet.verdict(expected_sha(settings)).problems == ()


# ---- kills at random instants ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "kills", "fit_s"), [("server", 5, 0.2), ("clients", 5, 0.2), ("broker", 2, 0.4)])
def test_kills_at_random_instants_lose_nothing(
    tmp_path: Path, node: PrivateNode, target: str, kills: int, fit_s: float
) -> None:
    settings = Settings(clients=4, rounds=8, fit_s=fit_s)
    sha = expected_sha(settings)
    result = disturbed(tmp_path, node, target, settings, kills=kills, seed=1, sha_expected=sha)
    assert result.all_problems == []


# ---- kills at named points -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_a_named_point_loses_nothing(tmp_path: Path, node: PrivateNode, point: str) -> None:
    nth = 1 if point == "server-while-the-ledger-begins" else 2
    faulty = "c2" if point.startswith("client") else SERVER
    with Fleet(tmp_path, THREE_PARTS, node.url) as fleet:
        fleet.start(fault=f"{point}:{nth}:SIGKILL", faulty=faulty)
        fleet.until(lambda: not fleet.is_alive(faulty), f"{point} is reached")
        assert fleet.processes[faulty].returncode == -signal.SIGKILL
        fleet.start_one(faulty)
        check_sound(fleet, THREE_PARTS)


# ---- whoever is gone, its word counts --------------------------------------------------------------------------------


def test_the_update_of_a_client_that_is_gone_for_good_survives_the_server(tmp_path: Path, node: PrivateNode) -> None:
    settings = replace(SMALL, rounds=1, gate="c1/1")
    with Fleet(tmp_path, settings, node.url) as fleet:
        fleet.start()
        for client_id in ("c2", "c3"):
            fleet.until_event(client_id, "task_completed", kind="fit", round=1)
        fleet.kill("c3")
        fleet.kill(SERVER)
        fleet.start_one(SERVER)
        fleet.open_gate()
        fleet.until(lambda: not fleet.is_alive(SERVER), "the end of the run")
        assert fleet.processes[SERVER].returncode == 0, fleet.last_words()
        assert fleet.verdict(expected_sha(settings)).problems == ()


# ---- dead, and needed ------------------------------------------------------------------------------------------------


def test_a_client_killed_while_it_trains_is_replaced_before_its_round_times_out(
    tmp_path: Path, node: PrivateNode, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(SMALL, needed=2, rounds=1, fit_s=3.0, heartbeat_s=5.0, lease_s=20.0, timeout_s=60.0)
    with Fleet(tmp_path, settings, node.url) as fleet:
        fleet.start()
        dies, stays = fleet.until_event(SERVER, "round_opened")["cohort"]
        fleet.until_event(dies, "task_started", kind="fit")
        fleet.kill(dies)
        killed_at = time.monotonic()
        lost = fleet.until_event(SERVER, "member_lost", client_id=dies)
        noticed_s = time.monotonic() - killed_at
        closed = fleet.until_event(SERVER, "round_closed")
        closed_s = time.monotonic() - killed_at
        fleet.until(lambda: not fleet.is_alive(SERVER), "the end of the run")
        assert fleet.processes[SERVER].returncode == 0, fleet.last_words()
    (spare,) = set(settings.client_ids) - {dies, stays}
    history = json.loads((fleet.run_dir / "history.json").read_text())
    (record,) = history["rounds"]
    assert (closed["reason"], closed["folded"]) == ("min_fit_clients", 2)
    assert sorted(update["client_id"] for update in record["folded"]) == sorted((stays, spare))
    assert history["clients_lost"] == [dies]
    assert "its connection is gone" in lost["reason"]  # not its lease
    with capsys.disabled():
        sys.stdout.write(
            f"\n{noticed_s:.1f} s from the kill to the notice ({lost['reason']}), {closed_s:.1f} s to the end of the "
            f"round, {settings.fit_s:.0f} s of them its replacement's fit\n"
        )


# ---- stopped, not dead -----------------------------------------------------------------------------------------------


def test_a_stopped_server_that_wakes_up_after_its_successor_took_over_harms_nothing(
    tmp_path: Path, node: PrivateNode
) -> None:
    settings = replace(SMALL, rounds=12, fit_s=0.2, lease_s=3.0, gate="c1/3")
    with Fleet(tmp_path, settings, f"{node.url}?heartbeat=2") as fleet:
        fleet.start()
        fleet.until_event(SERVER, "round_opened", round=3)
        fleet.signal(SERVER, signal.SIGSTOP)
        (fleet.run_dir / ".lock").unlink()  # the successor is on another machine: it sees the disk, and not the lock
        successor = _start_successor(fleet)
        fleet.open_gate()
        fleet.until_event(successor, "round_closed", round=4)
        fleet.signal(SERVER, signal.SIGCONT)
        code = fleet.processes[SERVER].wait(60)
        last_line = fleet.last_words()
        fleet.processes[SERVER] = fleet.processes.pop(successor)
        assert code == 1
        assert last_line.startswith("fedbus: ")
        check_sound(fleet, settings)


def _start_successor(fleet: Fleet) -> str:
    """As a supervisor does: again and again, until the broker has dropped the connection of the stopped one."""
    name = f"{SERVER}-2"
    for _ in range(8):
        fleet.start_one(name)
        fleet.until(lambda: not fleet.is_alive(name) or bool(fleet.events(name, "run_resumed")), "a successor")
        if fleet.is_alive(name):
            break
    return name


def test_a_client_stopped_beyond_its_lease_is_lost_and_comes_back(tmp_path: Path, node: PrivateNode) -> None:
    settings = replace(SMALL, rounds=8, lease_s=2.0, gate="c1/5")
    with Fleet(tmp_path, settings, node.url) as fleet:
        fleet.start()
        fleet.until_event(SERVER, "round_closed", round=1)
        fleet.signal("c3", signal.SIGSTOP)
        fleet.until_event(SERVER, "member_lost", client_id="c3")
        fleet.until_event(SERVER, "round_opened", round=5)
        fleet.signal("c3", signal.SIGCONT)
        fleet.until(lambda: len(fleet.events(SERVER, "member_joined", client_id="c3")) == 2, "c3 is back")
        fleet.open_gate()
        assert fleet.until_done() == []
        verdict = fleet.verdict("")
    assert verdict.rounds == settings.rounds
    assert (verdict.lost, verdict.duplicated, verdict.unexpected, verdict.disagreeing) == ((), (), (), ())
    assert any(event["round"] >= 5 for event in fleet.events(SERVER, "update_folded", client_id="c3"))


def test_a_broker_that_hangs_for_longer_than_the_leases_costs_nobody_its_place(
    tmp_path: Path, node: PrivateNode
) -> None:
    settings = replace(SMALL, rounds=6, lease_s=2.0, gate="c1/3")
    with Fleet(tmp_path, settings, node.url) as fleet:
        fleet.start()
        fleet.until_event(SERVER, "round_opened", round=3)
        os.kill(node.pid, signal.SIGSTOP)
        try:
            fleet.open_gate()
            time.sleep(2.5 * settings.lease_s)
        finally:
            os.kill(node.pid, signal.SIGCONT)
        check_sound(fleet, settings)
        assert fleet.events(SERVER, "member_lost") == []


# ---- alarms ----------------------------------------------------------------------------------------------------------


def test_a_memory_alarm_of_the_broker_holds_the_run_up_and_costs_nobody_its_place(
    tmp_path: Path, node: PrivateNode
) -> None:
    settings = replace(SMALL, rounds=6, lease_s=3.0, gate="c1/3")
    with Fleet(tmp_path, settings, node.url) as fleet:
        fleet.start()
        fleet.until_event(SERVER, "round_opened", round=3)
        node.rabbitmqctl("set_vm_memory_high_watermark", "absolute", "1MB")
        try:
            fleet.open_gate()
            time.sleep(1.5 * settings.lease_s)
        finally:
            node.rabbitmqctl("set_vm_memory_high_watermark", "0.4")
        check_sound(fleet, settings)
        assert fleet.events(SERVER, "member_lost") == []
        assert "alarm" in (tmp_path / "server.log").read_text()

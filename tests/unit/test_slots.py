"""Who may upload when: the slots themselves, and stories of clients whose every update is a large one."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import fedbus.client.outbox
import fedbus.server.runtime
from fedbus.bus.base import Bus
from fedbus.bus.topology import CONTROL, client_inbox, inbox
from fedbus.client.outbox import Outbox
from fedbus.observe import events as o
from fedbus.server import slots as slots_module
from fedbus.server.slots import LOW_WATER, UploadSlots, eager_share
from fedbus.wire import messages as m
from fedbus.wire.codec import decode, encode
from fedbus.wire.transfer import MIN_PART_BYTES, Outgoing
from tests.kit import Counting, Federation, federation

LARGE = LOW_WATER + 1


@pytest.fixture(autouse=True)
def _one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every upload here is as large as what may be under way at a time."""
    monkeypatch.setattr(slots_module, "STAGING_BYTES", 0)


class Desk:
    """`UploadSlots`, what it granted, and what it is told of the uploads."""

    def __init__(self) -> None:
        self.granted: list[str] = []
        self.missing: dict[str, int] = {}
        self.full = False
        self.slots = UploadSlots(
            lambda client, task: self.granted.append(task),
            missing_bytes=self.missing.get,
            is_full=lambda: self.full,
            clock=time.monotonic,
        )

    def request(self, *tasks: str, nbytes: int = LARGE) -> None:
        for task in tasks:
            self.slots.request(f"client of {task}", task, nbytes)

    def arrive(self, task: str, missing: int) -> None:
        self.missing[task] = missing
        self.slots.touch(task)

    def complete(self, task: str) -> None:
        self.missing.pop(task, None)
        self.slots.release(task)


def test_uploads_come_one_after_the_other_in_the_order_of_their_requests() -> None:
    desk = Desk()
    desk.request("a", "b", "c")
    assert desk.granted == ["a"]
    desk.complete("a")
    assert desk.granted == ["a", "b"]
    desk.complete("b")
    assert desk.granted == ["a", "b", "c"]


def test_as_many_are_let_in_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "STAGING_BYTES", 2 * LARGE)
    desk = Desk()
    desk.request("a", "b", "c")
    assert desk.granted == ["a", "b"]
    desk.arrive("a", LOW_WATER)  # what came of a still lies in memory
    assert desk.granted == ["a", "b"]
    desk.complete("a")
    assert desk.granted == ["a", "b", "c"]


def test_the_next_is_let_in_when_the_last_is_nearly_here() -> None:
    desk = Desk()
    desk.request("a", "b", "c")
    desk.arrive("a", LOW_WATER + 1)
    assert desk.granted == ["a"]
    desk.arrive("a", LOW_WATER)
    assert desk.granted == ["a", "b"]  # and not c: all of b is still to come


def test_small_uploads_share_the_low_water() -> None:
    desk = Desk()
    desk.request("a", "b", "c", "d", nbytes=LOW_WATER // 2)
    assert desk.granted == ["a", "b", "c"]


def test_nothing_is_granted_while_a_whole_update_waits_to_be_folded() -> None:
    desk = Desk()
    desk.full = True
    desk.request("a")
    assert desk.granted == []
    desk.full = False
    desk.slots.pump()
    assert desk.granted == ["a"]


def test_whoever_asks_again_is_told_again_once_granted_and_keeps_its_place_before() -> None:
    desk = Desk()
    desk.request("a", "b", "c")
    desk.request("b", "a")
    assert desk.granted == ["a", "a"]
    desk.complete("a")
    assert desk.granted == ["a", "a", "b"]


def test_a_client_that_is_gone_frees_its_slot_and_its_place() -> None:
    desk = Desk()
    desk.request("a", "b", "c")
    desk.slots.release_client("client of b")
    desk.slots.release_client("client of a")
    desk.slots.release_client("client of nothing")
    assert desk.granted == ["a", "c"]


def test_a_grant_that_nobody_uses_is_taken_back() -> None:
    desk = Desk()
    desk.request("a", "b", "c")
    desk.slots._granted["a"].touched_at = 10.0
    desk.slots._waiting["b"].touched_at = 0.0
    desk.slots.release_stalled(before=10.0)
    assert desk.granted == ["a"]
    desk.slots.release_stalled(before=11.0)
    assert desk.granted == ["a", "b"]
    desk.slots.release_stalled(before=11.0)
    assert desk.granted == ["a", "b"]  # however long it waited, its time began with its grant
    desk.slots._granted["b"].touched_at = 10.0
    desk.arrive("b", LARGE)
    desk.slots.release_stalled(before=11.0)
    assert desk.granted == ["a", "b"]
    desk.request("a")
    desk.complete("b")
    desk.complete("c")
    assert desk.granted == ["a", "b", "c", "a"]


def test_an_upload_that_takes_for_ever_holds_nobody_up() -> None:
    desk = Desk()
    desk.request("a", nbytes=10 * slots_module.SLOWEST_BYTES_PER_S)
    desk.slots._granted["a"].granted_at = 100.0
    desk.slots.release_slow(before=111.0)
    assert list(desk.slots._granted) == ["a"]  # nobody waits for its place
    desk.request("b")
    desk.arrive("a", LARGE)
    desk.slots.release_slow(before=110.0)
    assert desk.granted == ["a"]
    desk.slots.release_slow(before=111.0)
    assert desk.granted == ["a", "b"]


def test_a_task_that_was_refused_while_it_waited_is_not_granted() -> None:
    desk = Desk()
    desk.request("a", "b", "c")
    desk.complete("b")
    desk.complete("a")
    assert desk.granted == ["a", "c"]
    assert "granted=1 waiting=0" in repr(desk.slots)


@pytest.mark.parametrize(("clients", "share"), [(0, 64 << 20), (1, 64 << 20), (64, 1 << 20), (10**9, 0)])
def test_what_clients_may_send_unasked_is_shared_among_them(clients: int, share: int) -> None:
    assert eager_share(clients) == share


# ---- stories ---------------------------------------------------------------------------------------------------------

SIX = tuple(f"c{n}" for n in range(6))
SIZE = 80_000
"""Float32s: 320 kB, five parts of 64 KiB."""


@pytest.fixture
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "EAGER_BYTES", 0)
    monkeypatch.setattr(slots_module, "LOW_WATER", MIN_PART_BYTES)
    monkeypatch.setattr(fedbus.client.outbox, "_ASK_EVERY_S", 0.05)
    monkeypatch.setattr(fedbus.server.runtime, "_REDELIVERY_PAUSE_S", 0.02)
    monkeypatch.setattr(Outgoing.__init__, "__defaults__", (MIN_PART_BYTES,))


@pytest.mark.usefixtures("_everything_is_large")
async def test_never_more_is_on_its_way_than_one_update_and_the_low_water(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 0
    pump = UploadSlots.pump

    def measuring(slots: UploadSlots) -> None:
        nonlocal most
        pump(slots)
        most = max(most, slots._to_come())

    monkeypatch.setattr(UploadSlots, "pump", measuring)
    monkeypatch.setattr(fedbus.client.outbox, "_ASK_EVERY_S", 60.0)  # nobody needs to ask twice
    counting = Counting(SIZE)
    async with federation(counting.app(num_clients=6, num_rounds=3)) as story:
        history = await story.run(*SIX)
        story.check_whole(history, SIX, 3)
    assert 4 * SIZE <= most <= 4 * SIZE + MIN_PART_BYTES


@pytest.mark.usefixtures("_everything_is_large")
async def test_a_client_that_dies_after_its_grant_does_not_block_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(SIZE)
    dead = asyncio.Event()
    grant = Outbox.grant

    def dying(outbox: Outbox, task_id: str) -> None:
        if not dead.is_set():
            dead.set()
            victim.append(outbox._client_id)
        elif outbox._client_id not in victim:
            grant(outbox, task_id)

    victim: list[str] = []
    monkeypatch.setattr(Outbox, "grant", dying)
    app = counting.app(num_clients=6, num_rounds=2, rounds={"heartbeat_s": 0.02, "lease_s": 0.3})
    async with federation(app) as story:
        serving = story.start_server()
        tasks = {client: story.start_client(client) for client in SIX}
        async with asyncio.timeout(10):
            await dead.wait()
        await story.kill(victim[0], tasks[victim[0]])
        history = await serving
    others = set(SIX) - set(victim)
    assert [record.clients for record in history.rounds] == [others, others]
    assert history.clients_lost == victim


@pytest.mark.usefixtures("_everything_is_large")
async def test_a_grant_that_was_lost_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: set[str] = set()
    grant = Outbox.grant

    def losing(outbox: Outbox, task_id: str) -> None:
        if task_id in lost:
            grant(outbox, task_id)
        lost.add(task_id)

    monkeypatch.setattr(Outbox, "grant", losing)
    counting = Counting(SIZE)
    async with federation(counting.app(num_clients=3, num_rounds=2)) as story:
        history = await story.run("c1", "c2", "c3")
        story.check_whole(history, ["c1", "c2", "c3"], 2)
    assert len(lost) == 6


@pytest.mark.usefixtures("_everything_is_large")
async def test_a_grant_that_stalls_is_taken_back_and_its_client_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Event()
    grant = Outbox.grant
    first: list[str] = []

    def deaf(outbox: Outbox, task_id: str) -> None:
        first.append(task_id)
        if task_id != first[0] or asked.is_set():
            grant(outbox, task_id)

    monkeypatch.setattr(Outbox, "grant", deaf)
    monkeypatch.setattr(fedbus.client.outbox, "_ASK_EVERY_S", 0.6)
    counting = Counting(SIZE)
    async with federation(counting.app(num_clients=3, num_rounds=1)) as story:
        serving = story.start_server(stalled_after_s=0.05)
        for client in ("c1", "c2", "c3"):
            story.start_client(client)
        await story.until(o.UpdateFolded, 2)  # past the one that does not use its grant
        asked.set()
        history = await serving
        story.check_whole(history, ["c1", "c2", "c3"], 1)


@pytest.mark.usefixtures("_everything_is_large")
async def test_slots_are_asked_for_anew_after_the_server_was_resumed(tmp_path: Path) -> None:
    counting = Counting(SIZE)
    async with federation(counting.app(num_clients=6, num_rounds=3), run_dir=tmp_path) as story:
        story.start_server()
        for client in SIX:
            story.start_client(client)
        await story.until(o.UpdateFolded, 9)
        await story.kill_server()
        history = await story.resume_server()
        story.check_whole(history, SIX, 3)
    assert set(counting.asked.values()) == {1}


async def replies_to(story: Federation, client: str, *requests: m.UploadRequest) -> list[m.Message]:
    """What a client without any code of ours hears when it asks."""
    bus: Bus = story.connect(client)
    await bus.declare(client_inbox(client))
    for request in requests:
        await bus.publish(CONTROL, "", encode(request))
    replies: list[m.Message] = []
    async with asyncio.timeout(10), bus.consume(inbox(client), prefetch=0) as consumer:
        while len(replies) < len(requests):
            delivery = await consumer.receive()
            await consumer.ack(delivery)
            message = decode(delivery.body)
            if isinstance(message, m.Receipt | m.Refusal | m.UploadGrant):
                replies.append(message)
    return replies


@pytest.mark.usefixtures("_everything_is_large")
async def test_requests_for_what_nobody_waits_for_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(SIZE)
    app = counting.app(num_clients=1, num_rounds=3, rounds={"min_available_clients": 1, "lease_s": 30.0})
    go_on = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hold(client: str, round_: int) -> None:
        if round_ == 2:
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)

    counting.hooks.append(hold)
    async with federation(app) as story:
        serving = story.start_server()
        story.start_client("c1")
        await story.until(o.TaskStarted, kind="fit", round=2)
        run_id = story.told(o.RunStarted)[0].run_id

        def request(task: str, client: str) -> m.UploadRequest:
            return m.UploadRequest(client_id=client, task_id=f"{run_id}/fit/{task}", run_id=run_id, nbytes=10)

        stranger = await replies_to(story, "c9", request("1/c9", "c9"), request("2/c1", "c9"), request("1/c1", "c9"))
        assert stranger == [
            m.Refusal(task_id=f"{run_id}/fit/{task}", run_id=run_id, reason="nobody waits for it")
            for task in ("1/c9", "2/c1", "1/c1")
        ]
        assert story.server is not None
        settled = story.server._verdict(f"{run_id}/fit/1/c1", "c1")
        assert settled == m.Receipt(task_id=f"{run_id}/fit/1/c1", run_id=run_id, round=1, staleness=0)
        settled_again = asyncio.Event()
        settle = Outbox.settle

        def noting(outbox: Outbox, task_id: str) -> None:
            settle(outbox, task_id)
            if task_id == f"{run_id}/fit/1/c1":
                settled_again.set()

        monkeypatch.setattr(Outbox, "settle", noting)
        await story.links["c1"].publish(CONTROL, "", encode(request("1/c1", "c1")))
        async with asyncio.timeout(10):
            await settled_again.wait()
        go_on.set()
        history = await serving
    assert history.updates == 3

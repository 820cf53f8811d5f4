"""Who is at work and still connected: told apart from brokers that are away, from hangs, and from moments without."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fedbus.bus.base import QueueState
from fedbus.bus.memory import MemoryBroker, MemoryBus
from fedbus.bus.topology import CONTROL, client_inbox, inbox
from fedbus.clock import now
from fedbus.errors import BrokerDenied, BrokerError, BrokerUnreachable, QueueMissing
from fedbus.observe import events as o
from fedbus.rounds import events as e
from fedbus.server import presence as module
from fedbus.server.presence import Presence
from fedbus.wire import messages as m
from fedbus.wire.codec import encode
from tests.faults.failing import Fault
from tests.kit import Federation, Gate, app_of, federation
from tests.unit.test_engine import Story

EVERY_S = 0.02
MISSING = QueueMissing("no such inbox")
AWAY = BrokerUnreachable("its node is away")
DENIED = BrokerDenied("no")


class Answering(MemoryBus):
    """A broker whose answers are given; a number is how many listen, a float the seconds that the next one takes."""

    def __init__(self, answers: Iterable[int | float | BrokerError]) -> None:
        super().__init__(MemoryBroker(), "server")
        self.asked: list[str] = []
        self._answers = iter(answers)
        self._news = asyncio.Event()

    async def queue_state(self, queue: str) -> QueueState:
        self.asked.append(queue)
        self._news.set()
        answer = next(self._answers)
        while isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = next(self._answers)
        if isinstance(answer, BrokerError):
            raise answer
        return QueueState(messages=0, consumers=answer)

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(10):
            while len(self.asked) < times:
                self._news.clear()
                await self._news.wait()


class Watch:
    """A presence over an engine whose clients are all at work, and what it told."""

    def __init__(self, bus: MemoryBus, *clients: str, echoes: bool = True, every_s: float = EVERY_S) -> None:
        self.story = Story(min_fit_clients=len(clients))
        self.story.happens(e.EchoHeard(sent_at=now()))
        self.story.join(*clients)
        self.echoes = echoes
        self.told: asyncio.Queue[e.Event] = asyncio.Queue()
        self.without_inbox: asyncio.Queue[str] = asyncio.Queue()
        self.presence = Presence(
            bus,
            self.story.engine,
            put=self.told.put_nowait,
            inbox_gone=self.without_inbox.put_nowait,
            ask_for_echo=self._echo,
            every_s=every_s,
            grace_s=1000.0,
        )

    def _echo(self) -> None:
        if self.echoes:
            self.story.happens(e.EchoHeard(sent_at=now()))

    async def next_told(self) -> e.Event:
        async with asyncio.timeout(10):
            return await self.told.get()

    async def unreachable(self) -> e.ClientUnreachable:
        event = await self.next_told()
        assert isinstance(event, e.ClientUnreachable)
        return event


@asynccontextmanager
async def watching(bus: MemoryBus, *clients: str, **settings: Any) -> AsyncIterator[Watch]:
    watch = Watch(bus, *clients, **settings)
    task = asyncio.create_task(watch.presence.watch())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.wait([task])


# ---- one client, look by look ----------------------------------------------------------------------------------------


async def test_whoever_is_gone_for_a_while_is_told_to_be_unreachable_once() -> None:
    bus = Answering(itertools.chain([1], itertools.repeat(0)))
    async with watching(bus, "c1") as watch:
        lost = await watch.unreachable()
        assert (lost.client_id, lost.reason) == ("c1", "its connection is gone")
        assert lost.seen_at is not None
        assert now() - lost.seen_at >= 3 * EVERY_S
        watch.story.happens(lost)
        seen = len(bus.asked)
        assert seen >= 3
        await asyncio.sleep(5 * EVERY_S)
        assert watch.told.empty()


@pytest.mark.parametrize("comes_back", [True, False])
async def test_who_was_told_to_be_unreachable_is_looked_at_for_a_while_for_its_inbox(comes_back: bool) -> None:
    answer: int | BrokerError = 1

    def answers() -> Iterator[int | BrokerError]:
        while True:
            yield answer

    bus = Answering(answers())
    async with watching(bus, "c1") as watch:
        await bus.until_asked(1)
        answer = 0
        watch.story.happens(await watch.unreachable())
        if comes_back:
            answer = 1
            await bus.until_asked(len(bus.asked) + 1)
        answer = MISSING
        async with asyncio.timeout(10):
            if not comes_back:
                assert await watch.without_inbox.get() == "c1"
        seen = len(bus.asked)
        await asyncio.sleep(5 * EVERY_S)
        assert (len(bus.asked), watch.without_inbox.empty()) == (seen, True)


@pytest.mark.parametrize(
    "answers", [(1, 0), (0, AWAY), (MISSING, 1), (MISSING, 0, 1)], ids=["back", "unknown", "inbox back", "inbox anew"]
)
async def test_a_moment_without_costs_nothing(answers: tuple[Any, ...]) -> None:
    bus = Answering(itertools.cycle(answers))
    async with watching(bus, "c1") as watch:
        await bus.until_asked(20)
        assert watch.told.empty()


async def test_an_inbox_that_is_gone_is_told_at_the_second_look() -> None:
    bus = Answering(itertools.repeat(MISSING))
    async with watching(bus, "c1") as watch:
        async with asyncio.timeout(10):
            assert await watch.without_inbox.get() == "c1"
        assert len(bus.asked) == 2
        assert watch.told.empty()


async def test_nobody_is_told_to_be_unreachable_before_a_word_to_ourselves_came_back() -> None:
    bus = Answering(itertools.repeat(0))
    async with watching(bus, "c1", echoes=False) as watch:
        await bus.until_asked(10)
        assert watch.told.empty()
        watch.story.happens(e.EchoHeard(sent_at=now()))
        assert (await watch.unreachable()).client_id == "c1"


async def test_a_word_to_ourselves_that_takes_too_long_makes_it_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD_UP_S", 0.2)
    bus = Answering(itertools.repeat(0))
    async with watching(bus, "c1", echoes=False) as watch:
        await bus.until_asked(4)
        await until(lambda: not watch.presence._watches)
        watch.story.happens(e.EchoHeard(sent_at=now()))
        await nothing_more(bus, watch)


async def test_an_answer_that_takes_too_long_makes_it_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD_UP_S", 0.2)
    bus = Answering(itertools.chain([1, 0, 0.5], itertools.repeat(0)))  # we slept, or the broker did
    async with watching(bus, "c1") as watch:
        await bus.until_asked(3)
        await until(lambda: not watch.presence._watches)
        await nothing_more(bus, watch)


async def test_an_answer_to_what_was_asked_before_a_disturbance_means_nothing() -> None:
    bus = Answering(itertools.chain([0, MISSING, 0.05], itertools.repeat(MISSING)))
    async with watching(bus, "c1") as watch:
        await bus.until_asked(3)
        watch.presence.disturbed()
        await asyncio.sleep(0.1)
        await nothing_more(bus, watch)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110  # nobody tells when it comes true
            await asyncio.sleep(0.001)


async def nothing_more(bus: Answering, watch: Watch) -> None:
    asked = len(bus.asked)
    await asyncio.sleep(5 * EVERY_S)
    assert (len(bus.asked), watch.told.empty()) == (asked, True)


async def test_a_broker_that_does_not_let_us_look_is_asked_no_more(caplog: pytest.LogCaptureFixture) -> None:
    bus = Answering(itertools.repeat(DENIED))
    watch = Watch(bus, "c1")
    async with asyncio.timeout(10):
        with caplog.at_level(logging.WARNING):
            await watch.presence.watch()
    assert len(bus.asked) == 1
    assert "noticed by their lease alone" in caplog.text


# ---- many clients ----------------------------------------------------------------------------------------------------


async def test_only_those_are_looked_at_who_are_at_the_same_task_as_one_tour_before() -> None:
    watch = Watch(Answering([]), "a", "b")
    assert watch.presence._tour() == []
    assert watch.presence._tour() == ["a", "b"]
    watch.story.update("a", 1)
    assert watch.presence._tour() == ["b"]
    watch.story.update("b", 1)
    watch.story.commit()
    assert watch.presence._tour() == []
    assert watch.presence._tour() == ["a", "b"]


@pytest.mark.parametrize(("clients", "pause_s"), [(1, 1.0), (4, 0.25), (200, 0.02)])
async def test_looks_are_spread_over_a_tour_and_never_more_than_fifty_a_second(
    monkeypatch: pytest.MonkeyPatch, clients: int, pause_s: float
) -> None:
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    names = [f"c{number:03}" for number in range(clients)]
    bus = Answering(itertools.repeat(1))
    async with watching(bus, *names, every_s=1.0):
        monkeypatch.setattr(asyncio, "sleep", note)
        await bus.until_asked(2 * clients)
        monkeypatch.undo()
    assert bus.asked[: 2 * clients] == [inbox(name) for name in names] * 2
    assert slept[1 : 2 * clients] == [pytest.approx(pause_s)] * (2 * clients - 1)


# ---- whole stories ---------------------------------------------------------------------------------------------------

ROUNDS = {"num_rounds": 1, "lease_s": 1000.0, "heartbeat_s": 0.05, "timeout_s": 1000.0, "fraction_evaluate": 0}


def gated(gate: Gate, **rounds: Any) -> Any:
    return app_of(gate.client_fn, rounds={**ROUNDS, **rounds})


async def until_looked(fault: Fault, times: int) -> None:
    """Wait for so many more looks."""
    before = looks(fault)
    await until(lambda: looks(fault) >= before + times)


def looks(fault: Fault) -> int:
    return sum(kind == "queue_state" for kind, _ in fault.effects)


def counted(story: Federation) -> Fault:
    """Note what the server asks its bus for."""
    fault = Fault(1_000_000_000)
    story.wrap = lambda user, bus: fault.wrap(bus) if user == "server" else bus
    return fault


async def test_the_place_of_a_client_that_dies_while_it_trains_is_refilled_long_before_its_lease_ends() -> None:
    gate = Gate()
    app = gated(gate, min_fit_clients=2, min_available_clients=3, over_selection=1.0)
    async with federation(app) as story:
        serving = story.start_server(look_every_s=EVERY_S)
        clients = {name: story.start_client(name) for name in ("c1", "c2", "c3")}
        opened = await story.until(o.RoundOpened)
        dies, stays = opened.cohort
        await story.until(o.TaskStarted, client_id=dies)
        await story.kill(dies, clients[dies])
        grew = await story.until(o.CohortGrew)
        gate.open()
        history = await serving
    (spare,) = set(clients) - set(opened.cohort)
    assert grew.clients == (spare,)
    assert history.rounds[0].clients == {stays, spare}
    assert (history.rounds[0].reason, history.clients_lost) == ("min_fit_clients", [dies])
    assert story.told(o.MemberLost)[0].reason.startswith("its connection is gone (noticed ")


async def test_a_client_that_is_back_after_it_was_given_up_takes_its_place_again() -> None:
    gate = Gate()
    async with federation(gated(gate, min_fit_clients=2), supervised=True) as story:
        serving = story.start_server(look_every_s=EVERY_S)
        for name in ("c1", "c2"):
            story.start_client(name)
        await story.until(o.TaskStarted, 2)
        let_back = story.cut_off("c1")
        await story.until(o.MemberLost, client_id="c1")
        let_back.set()
        await story.until(o.MemberJoined, 2, client_id="c1")
        gate.open()
        history = await serving
    assert history.rounds[0].clients == {"c1", "c2"}
    assert history.rounds[0].lost == []


@pytest.mark.parametrize("what", ["restarted", "blocked"])
async def test_a_broker_that_is_away_or_blocked_costs_nobody_a_place(what: str) -> None:
    gate = Gate()
    async with federation(gated(gate, min_fit_clients=2), supervised=True) as story:
        fault = counted(story)
        serving = story.start_server(look_every_s=EVERY_S)
        for name in ("c1", "c2"):
            story.start_client(name)
        await story.until(o.TaskStarted, 2)
        await until_looked(fault, 3)
        if what == "blocked":
            story.broker.block()
        let_back = [story.cut_off(name) for name in ("c1", "c2")]
        if what == "restarted":
            story.broker.stop()
            story.broker.start()
        await asyncio.sleep(20 * EVERY_S)  # several times what makes a client unreachable
        for event in let_back:
            event.set()
        await until(lambda: all(readers(story, name) for name in ("c1", "c2")))
        if what == "blocked":
            await until_looked(fault, 4)
            story.broker.unblock()
            await until_looked(fault, 4)
        gate.open()
        history = await serving
    assert (story.told(o.MemberLost), history.clients_lost) == ([], [])
    assert history.rounds[0].clients == {"c1", "c2"}


def readers(story: Federation, client_id: str) -> int:
    return len(story.broker._queue(inbox(client_id)).consumers)


async def test_a_server_that_goes_on_with_a_run_gives_its_clients_time_to_come_back(tmp_path: Path) -> None:
    gate = Gate()
    async with federation(gated(gate, min_fit_clients=2), run_dir=tmp_path, supervised=True) as story:
        story.start_server(look_every_s=EVERY_S)
        for name in ("c1", "c2"):
            story.start_client(name)
        await story.until(o.TaskStarted, 2)
        let_back = story.cut_off("c1")
        await story.kill_server()
        serving = story.resume_server(look_every_s=EVERY_S)
        await story.until(o.RoundOpened, 2)
        await asyncio.sleep(20 * EVERY_S)  # several times what makes a client unreachable
        let_back.set()
        await until(lambda: bool(readers(story, "c1")))
        gate.open()
        history = await serving
    assert (story.told(o.MemberLost), history.clients_lost) == ([], [])


async def test_a_client_that_is_connected_and_says_nothing_is_lost_by_its_lease() -> None:
    app = app_of(rounds={**ROUNDS, "min_fit_clients": 1, "lease_s": 0.5})
    async with federation(app) as story:
        fault = counted(story)
        story.start_server(look_every_s=EVERY_S)
        await story.until(o.RunStarted)
        bus = story.broker.connect("c1")
        await bus.declare(client_inbox("c1"))
        async with bus.consume(inbox("c1"), prefetch=0):
            await bus.publish(CONTROL, "", encode(m.Join(client_id="c1", session="s")))
            await story.until(o.RoundOpened)
            await until_looked(fault, 5)
            lost = await story.until(o.MemberLost)
        await bus.close()
    assert lost.reason.startswith("silent for ")


async def test_with_a_huge_time_between_looks_nobody_is_looked_at() -> None:
    gate = Gate()
    async with federation(gated(gate, min_fit_clients=1)) as story:
        fault = counted(story)
        serving = story.start_server(look_every_s=float("inf"))
        story.start_client("c1")
        await story.until(o.TaskStarted)
        await asyncio.sleep(0.1)
        gate.open()
        assert (await serving).finished
    assert looks(fault) == 0

"""A client that its operator turns out: its open update is refused, and its place is another's at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedbus.bus.base import Body, Bus, QueueState
from fedbus.bus.memory import MemoryBus
from fedbus.bus.supervised import LinkState, no_observer
from fedbus.bus.topology import CONTROL, TASKS, UPDATES, inbox
from fedbus.errors import BrokerUnreachable, Unroutable
from fedbus.observe import events as o
from fedbus.wire import messages as m
from fedbus.wire.codec import encode
from fedbus.wire.transfer import checksum
from tests.kit import Federation, Gate, app_of, cut, pack
from tests.unit.test_federation import poll_until

REVOKED = "its rights were revoked"
TWO_PARTS = np.zeros(400_000, np.float32)


class Provisioned(Federation):
    """Everybody has a user of its own, as provisioning names them."""

    def connect(
        self, user: str, on_state: Callable[[LinkState], None] = no_observer, *, login: str | None = None
    ) -> Bus:
        return super().connect(user, on_state, login=login or f"fed.{user}")

    async def join_by_hand(self, client_id: str) -> Bus:
        """A member that is only a connection, and does nothing by itself."""
        bus = self.broker.connect(f"fed.{client_id}", may_declare=False)
        await bus.publish(CONTROL, client_id, encode(m.Join(client_id=client_id, session="s")))
        await self.until(o.MemberJoined, client_id=client_id)
        return bus

    async def until_staged(self, transfer: str) -> None:
        """Wait until the server has the head of this transfer."""
        server = self.server
        assert server is not None
        assert server._intake is not None
        staging = server._intake._staging
        await asyncio.to_thread(poll_until, lambda: staging.head_of(transfer) is not None)

    def revoke(self, client_id: str) -> None:
        """As the operator does, once the broker has closed the client's connections."""
        self.broker._delete(inbox(client_id))


@asynccontextmanager
async def provisioned(run_dir: Path | None = None, **settings: Any) -> AsyncIterator[Provisioned]:
    story = Provisioned(app_of(**settings), run_dir=run_dir)
    try:
        async with asyncio.timeout(30):
            yield story
    finally:
        for task in story.tasks:
            task.cancel()
        await asyncio.gather(*story.tasks, return_exceptions=True)
        for bus in story.all_buses:
            await bus.close()


def half_an_update(client_id: str, run_id: str) -> tuple[m.Update, m.Part]:
    """Head and last part of what answers the client's task of round 1."""
    schema, payload = pack({"w": np.ones_like(TWO_PARTS)})
    first, second = cut(payload)
    head = m.Update(
        client_id=client_id, task_id=f"{run_id}/fit/1/{client_id}", run_id=run_id, transfer="open", version=0,
        num_examples=1, metrics={}, schema=schema, part_bytes=1 << 20, checksum=checksum(first), payload=first,
    )  # fmt: skip
    return head, m.Part(transfer="open", index=1, checksum=checksum(second), payload=second)


async def test_the_open_update_of_a_revoked_client_is_refused_and_another_takes_its_place_at_once(
    tmp_path: Path,
) -> None:
    rounds = {"num_rounds": 1, "min_fit_clients": 1, "over_selection": 1.0, "lease_s": 600.0, "timeout_s": 600.0}
    async with provisioned(tmp_path, rounds=rounds, initial_parameters={"w": TWO_PARTS}) as story:
        serving = story.start_server(look_every_s=0.02)
        await story.until(o.RunStarted)
        bus = await story.join_by_hand("c9")
        await story.until(o.RoundOpened)
        head, rest = half_an_update("c9", story.told(o.RunStarted)[0].run_id)
        await bus.publish(UPDATES, "c9", encode(head))
        await story.until_staged("fed.c9/open")
        story.start_client("c1")
        await story.until(o.Welcomed)
        assert story.told(o.CohortGrew) == []  # the place is c9's
        story.revoke("c9")
        refused = await story.until(o.UpdateRefused)
        assert (refused.client_id, refused.reason) == ("c9", REVOKED)
        assert story.told(o.MemberLost)[0].reason == REVOKED
        await bus.publish(UPDATES, "c9", encode(rest))  # it was on its way already
        history = await serving
    (record,) = history.rounds
    assert [update.client_id for update in record.folded] == ["c1"]
    assert record.failed == {"c9": REVOKED}
    assert record.refused == {"c9": REVOKED}
    assert story.broker.depth(UPDATES) == 0


async def test_a_whole_update_of_a_revoked_client_that_comes_behind_the_news_is_refused() -> None:
    rounds = {"num_rounds": 1, "min_fit_clients": 1, "over_selection": 1.0, "lease_s": 600.0}
    gate = Gate(only="c1")
    async with provisioned(client_fn=gate.client_fn, rounds=rounds, initial_parameters={"w": TWO_PARTS}) as story:
        serving = story.start_server(look_every_s=0.02)
        await story.until(o.RunStarted)
        bus = await story.join_by_hand("c9")
        await story.until(o.RoundOpened)
        story.start_client("c1")
        await story.until(o.Welcomed)
        story.revoke("c9")
        await story.until(o.TaskStarted)
        for message in half_an_update("c9", story.told(o.RunStarted)[0].run_id):
            await bus.publish(UPDATES, "c9", encode(message))
        assert (await story.until(o.UpdateRefused)).reason == REVOKED
        gate.open()
        assert (await serving).rounds[0].clients == {"c1"}


class NodeAway(MemoryBus):
    """The bus to a cluster one of whose nodes is away, with the classic queues that were on it."""

    async def publish(self, exchange: str, routing_key: str, body: Body, **options: Any) -> None:
        if (exchange, routing_key) == (TASKS, "c9"):
            raise Unroutable("no queue takes it")
        await super().publish(exchange, routing_key, body, **options)

    async def queue_state(self, queue: str) -> QueueState:
        if queue == inbox("c9"):
            raise BrokerUnreachable("its node is down")
        return await super().queue_state(queue)


async def test_nobody_is_turned_out_because_a_node_of_the_broker_is_away() -> None:
    async with provisioned(rounds={"num_rounds": 1, "min_fit_clients": 1, "lease_s": 600.0}) as story:
        story.wrap = lambda user, bus: NodeAway(story.broker, "fed.server") if user == "server" else bus
        serving = story.start_server()
        await story.until(o.RunStarted)
        await story.join_by_hand("c9")
        assert (await story.until(o.MemberLost)).reason == "its inbox is out of reach"
        story.start_client("c1")
        (record,) = (await serving).rounds
        assert REVOKED not in record.failed.values()


async def test_a_client_that_was_revoked_while_it_was_idle_is_turned_out_when_it_is_asked() -> None:
    async with provisioned(rounds={"num_rounds": 1, "min_fit_clients": 2, "lease_s": 600.0}) as story:
        serving = story.start_server()
        await story.until(o.RunStarted)
        await story.join_by_hand("c9")
        story.revoke("c9")
        story.start_client("c1")
        (record,) = (await serving).rounds
        assert record.clients == {"c1"}
        assert record.failed == {"c9": REVOKED}

"""Updates on their way into the engine: taken off the queue, put together, verified, settled when it says so."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Mapping

from fedbus.bus.base import Consumer, Delivery
from fedbus.bus.topology import UPDATES
from fedbus.clock import now
from fedbus.errors import ConfigError, DecodeError, UpdateRefused, one_line
from fedbus.rounds import events as e
from fedbus.rounds.engine import Engine
from fedbus.server.guard import CLIENT, COPY, ORPHAN, REFUSED_UPDATE, SHUT_OUT, Drops, Guard
from fedbus.server.identity import Identity
from fedbus.server.slots import UploadSlots
from fedbus.server.staging import (
    MAX_METRICS_BYTES,
    MAX_TRANSFERS,
    StagedUpdate,
    Staging,
    UpdateCheck,
    check_initial,
    metrics_bytes,
)
from fedbus.types import ExtraSpec, Tensors
from fedbus.wire import messages as m
from fedbus.wire.codec import decode
from fedbus.wire.compression import PLAIN, Codec

_LARGE_BYTES = 64 << 20
"""Updates up to here may come more often for nothing."""
_LOSSES = ("loss_rms", "loss")
"""The metrics that tell how much a client had to learn."""


class UpdateIntake:
    """The updates queue, as the server sees it.

    Args:
        consumer: the subscription to the updates queue.
        engine: asked whether an update is waited for, before any memory is taken for it.
        identity: knows who may speak for whom.
        guard: meters who sends what nobody waits for, and tells of what is rejected.
        run_id: updates of other runs are refused.
        put: takes the events for the engine.
        verify: raises `UpdateRefused` for a whole update that the strategy cannot use.
        grant: called with (client_id, task_id) when that upload may begin.
        stalled_after_s: seconds of silence after which an upload is asked for again, or given up if its sender is gone.
    """

    def __init__(
        self,
        consumer: Consumer,
        engine: Engine,
        identity: Identity,
        guard: Guard,
        *,
        run_id: str,
        put: Callable[[e.Event], None],
        verify: Callable[[StagedUpdate], Awaitable[None]],
        grant: Callable[[str, str], None],
        stalled_after_s: float,
    ) -> None:
        self._consumer = consumer
        self._engine = engine
        self._identity = identity
        self._run_id = run_id
        self._put = put
        self._verify = verify
        self._guard = guard
        self._drops = Drops(consumer, has_older=lambda: not self._staging.is_empty)
        self._staging = Staging()
        self._check: UpdateCheck | None = None
        self._stalled_after_s = stalled_after_s
        self._last_arrival = now()
        self.received_bytes = 0
        """Of all messages so far, whatever became of them."""
        self.slots = UploadSlots(
            grant, missing_bytes=self._staging.missing_bytes, is_full=self._staging.waits_to_be_folded
        )

    def __repr__(self) -> str:
        return f"<UpdateIntake {self._staging!r} {self.slots!r}>"

    @property
    def staged_bytes(self) -> int:
        """Payload bytes of updates in memory that are not folded."""
        return self._staging.held_bytes

    def expect(self, model: Tensors, extras: Mapping[str, ExtraSpec], codec: Codec = PLAIN) -> None:
        """From now on updates are deltas of `model` with `extras` beside them, in this `codec`; before, they are
        initial models."""
        self._check = UpdateCheck(model, extras, codec)

    def get(self, token: int) -> StagedUpdate:
        """The update behind an event's `delivery`."""
        return self._staging.get(token)

    def request_upload(self, client_id: str, task_id: str, nbytes: int) -> None:
        """Let an upload queue up; one that is said to be larger than an update can be counts as one that is."""
        self.slots.request(client_id, task_id, nbytes if self._check is None else min(nbytes, self._check.nbytes))

    async def settle(self, token: int, *, keep_in_broker: bool) -> None:
        """Forget the update and acknowledge it, or leave it with the broker.

        Left means unacknowledged: the end of our subscription gives it back, where a reject would hand it to us again.
        """
        update = self._staging.take_out(token, comes_again=keep_in_broker)
        if not keep_in_broker:
            await self._consumer.ack(*update.in_settling_order())

    async def settle_all(self, tokens: list[int]) -> None:
        """Acknowledge many updates, of a commit, in as few words as the broker allows."""
        updates = [self._staging.take_out(token) for token in tokens]
        await self._consumer.ack(*(delivery for update in updates for delivery in update.in_settling_order()))
        await self._drops.settle_if_cheap()

    async def quiet(self, pause_s: float, most_s: float) -> None:
        """Wait until nothing has come for `pause_s`, `most_s` at the most: all that had to come again is here."""
        give_up_at = now() + most_s
        rest_s = pause_s
        while rest_s > 0 and now() < give_up_at:
            await asyncio.sleep(rest_s)
            rest_s = self._last_arrival + pause_s - now()

    def disturbed(self) -> None:
        """Much may come again now: `quiet` begins to count anew."""
        self._last_arrival = now()

    async def receive(self) -> None:
        """Take in what comes, for ever."""
        async for delivery in self._consumer:
            self._last_arrival = now()
            self.received_bytes += len(delivery.body)
            if self._guard.is_shut_out(UPDATES, delivery):
                await self._give_up_all_of(delivery.user_id)
                await self._drops.add(delivery)
                continue
            await self._drops.settle_if_cheap()
            self._guard.watch()
            try:
                message = self._decode(delivery)
            except (DecodeError, ConfigError) as exc:
                await self._reject(delivery, exc)
                continue
            if isinstance(message, m.Part) and self._staging.is_aborted(message.transfer):
                self._guard.spend(delivery, self._cost_of_copy(delivery))
                await self._consumer.ack(delivery)
                continue
            if not self._staging.refresh(message, delivery):
                await self._stage(message, delivery)
            if copies := self._staging.take_copies():
                self._guard.spend(delivery, self._cost_of_copy(delivery))
                await self._consumer.ack(*copies)

    def _cost_of_copy(self, delivery: Delivery) -> float:
        """Of a part that changes nothing. An honest client sends a whole update twice when it is asked again, and goes
        on for a while with one that is refused: so much may come of each."""
        update_bytes = 0 if self._check is None else self._check.nbytes
        return COPY + CLIENT.burst * len(delivery.body) / (4 * max(update_bytes, _LARGE_BYTES))

    def _decode(self, delivery: Delivery) -> m.Update | m.Part:
        """What came, with a name of its transfer that no other user can make up.

        A part does not say whose it is: under its user's own name it can only end up in that user's own transfers.
        """
        message = decode(delivery.body)
        if not isinstance(message, m.Update | m.Part):
            raise DecodeError(f"a {type(message).__name__} does not belong here")
        if isinstance(message, m.Update):
            self._identity.check(delivery, message.client_id)
        self._identity.check_told(delivery)
        return dataclasses.replace(message, transfer=f"{delivery.user_id}/{message.transfer}")

    async def _reject(self, delivery: Delivery, exc: Exception) -> None:
        self._guard.rejected(UPDATES, delivery, str(exc))
        await self._consumer.reject(delivery, requeue=False)

    async def _stage(self, message: m.Update | m.Part, delivery: Delivery) -> None:
        arrived_at = now()
        try:
            if isinstance(message, m.Part):
                token = self._staging.add(message, delivery, arrived_at, user=self._identity.user_of(delivery))
                if self._staging.head_of(message.transfer) is None and token is None:
                    self._guard.spend(delivery, ORPHAN)
            else:
                self._check_head(message)
                if await self._forget(self._staging.of_task(message.task_id), but=message.transfer):
                    self._guard.spend(delivery, REFUSED_UPDATE)
                token = self._staging.begin(message, delivery, arrived_at)
        except UpdateRefused as exc:
            self._guard.wasted(delivery, REFUSED_UPDATE)
            self._report_invalid(self._staging.refuse(message, delivery), str(exc))
        except DecodeError as exc:
            await self._reject(delivery, exc)
        else:
            if token is not None:
                await self._take(token, delivery)
            elif (head := self._staging.head_of(message.transfer)) is not None:
                self.slots.touch(head.task_id)

    async def _take(self, token: int, delivery: Delivery) -> None:
        """Hand a whole update to the engine."""
        update = self._staging.get(token)
        try:
            if self._check is not None:
                await self._verify(update)
        except UpdateRefused as exc:
            update.drop()
            self._guard.wasted(delivery, REFUSED_UPDATE)
            self._report_invalid(token, str(exc))
            return
        self._put(
            e.UpdateReceived(
                client_id=update.client_id,
                task_id=update.task_id,
                delivery=token,
                nbytes=update.nbytes,
                utility=_utility(update),
            )
        )
        self.slots.release(update.task_id)

    def _check_head(self, update: m.Update) -> None:
        """Before any memory is taken for it."""
        if metrics_bytes(update.metrics) > MAX_METRICS_BYTES:
            raise UpdateRefused(f"metrics of {metrics_bytes(update.metrics)} bytes, {MAX_METRICS_BYTES} at most")
        if update.run_id != self._run_id:
            raise UpdateRefused(f"it belongs to run {update.run_id[:40]}, which is over")
        if not self._engine.awaits(update.task_id, update.client_id):
            raise UpdateRefused("nobody waits for it")  # the engine knows the reason, or that it is a duplicate
        others = set(self._staging.of_client(update.client_id)) - {update.transfer}
        if len(others) >= MAX_TRANSFERS:
            raise UpdateRefused(f"{len(others)} other updates of its sender are half here")
        if self._check is None:
            check_initial(update)
        else:
            self._check.head(update)

    def _report_invalid(self, token: int, reason: str) -> None:
        update = self._staging.get(token)
        self._put(
            e.UpdateInvalid(client_id=update.client_id, task_id=update.task_id, delivery=token, reason=one_line(reason))
        )
        self.slots.release(update.task_id)

    async def _forget(self, transfers: list[str], *, but: str = "") -> bool:
        """Give up transfers that will never be whole: their sender died, or has begun anew. False if there are none."""
        given_up = [transfer for transfer in transfers if transfer != but]
        for transfer in given_up:
            await self._consumer.ack(*self._staging.abort(transfer))
        return bool(given_up)

    def give_up_client(self, client_id: str, reason: str) -> None:
        """Refuse what this client has under way."""
        self.slots.release_client(client_id)
        for transfer in self._staging.of_client(client_id):
            self._report_invalid(self._staging.give_up(transfer), reason)

    async def _give_up_all_of(self, user: str | None) -> None:
        """Whoever is shut out cannot finish what it has begun.

        And what is not settled of it would stand before all that is dropped: only deliveries without a gap are
        acknowledged at once, and one by one they keep the broker as busy as the flood itself.
        """
        for transfer in self._staging.of_user(user or ""):
            if self._staging.head_of(transfer) is None:
                await self._forget([transfer])
            else:
                self._report_invalid(self._staging.give_up(transfer), SHUT_OUT)

    async def look_after_stalled(self) -> None:
        """Now and then: give up uploads whose sender is gone, and ask again for those whose sender lives."""
        while True:
            await asyncio.sleep(self._stalled_after_s / 4)
            before = now() - self._stalled_after_s
            self.slots.release_stalled(before)
            self.slots.release_slow(before)
            for transfer in self._staging.stalled(before):
                head = self._staging.head_of(transfer)
                if head is None:
                    await self._forget([transfer])
                elif self._may_go_on(head):
                    self._staging.touch(transfer, now())
                    self._put(e.TasksInDoubt(client_id=head.client_id))
                else:
                    reason = f"its upload stopped half-way, {self._stalled_after_s:.0f} s ago"
                    self._report_invalid(self._staging.give_up(transfer), reason)

    def _may_go_on(self, head: m.Update) -> bool:
        return self._engine.is_member(head.client_id) and self._engine.awaits(head.task_id, head.client_id)


def _utility(update: StagedUpdate) -> float | None:
    """num_examples times the training loss, Lai et al. 2021, section 4.2; None when the client told no loss."""
    for name in _LOSSES:
        loss = update.metrics.get(name)
        if isinstance(loss, int | float) and math.isfinite(loss):
            return update.num_examples * max(0.0, float(loss))
    return None

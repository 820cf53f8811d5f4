"""Updates on their way in: parts put together, checked against the model, kept until they are settled.

Whatever comes may come again: after a lost connection the broker delivers anew all that was not acknowledged, of
updates that are half here, waiting, or folded already. A part that is known only brings its newer delivery, for only
that one can be acknowledged. And a client that is asked again while its update is on its way sends it twice.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedbus.bus.base import Delivery
from fedbus.errors import DecodeError, UpdateRefused
from fedbus.types import EXTRA, Array, ExtraSpec, Metrics, Tensors, delta_dtype
from fedbus.wire.arrays import TensorSpec, dtype_name, payload_bytes
from fedbus.wire.codec import MAX_PART_BYTES
from fedbus.wire.compression import PLAIN, Codec, DecodedPieces
from fedbus.wire.messages import Part, Update
from fedbus.wire.transfer import MIN_PART_BYTES, PartedAssembly, PartedTensors

MAX_ORPHAN_BYTES = 64 << 20
"""What is kept of parts whose head has not come yet: the broker keeps the order, but for redeliveries."""

MAX_ORPHAN_BYTES_OF_USER = 16 << 20
"""What is kept of those of one user, where users can be told apart."""

MAX_TRANSFERS = 4
"""Updates of one client that may be half here at a time: each may take the memory of a whole one."""

MAX_METRICS_BYTES = 16 << 10
"""What the metrics of one update or evaluation may take: they go into the history of the run."""

MAX_STEP = 2.0**64
"""No training moves a weight so far in one round; sums of such steps would take memory for their many digits."""

_ORPHAN_OVERHEAD_BYTES = 4096
"""What a part that waits counts beside its payload: there could be any number of empty ones."""

MAX_EXAMPLES = 1 << 40
"""A weight beyond this is a mistake or an attack; sums of such weights stay exact in float64."""

MAX_INITIAL_BYTES = 16 << 30
"""The largest initial model that a client may send."""


@dataclass(kw_only=True, slots=True)
class StagedUpdate:
    """A whole update, with the delivery that each of its parts came in last."""

    client_id: str
    task_id: str
    transfer: str
    num_examples: int
    metrics: Metrics
    nbytes: int
    """Of its payload, as it came."""
    raw_bytes: int
    """What that stands for: the payload that it would be without a codec."""
    arrived_at: float
    """When its last part came."""
    deliveries: dict[int, Delivery]
    tensors: PartedTensors | DecodedPieces | None
    """None once folded: the memory is free, the deliveries are still to be settled."""
    extra: PartedTensors | None = None
    """What came beside the delta; it goes with `tensors`."""

    def drop(self) -> None:
        """Free the memory: the deliveries are still to be settled."""
        self.tensors = self.extra = None

    def in_settling_order(self) -> list[Delivery]:
        """The head last: a crash in the middle must not leave parts without one."""
        return [self.deliveries[index] for index in sorted(self.deliveries, reverse=True)]


@dataclass(kw_only=True, slots=True)
class _Transfer:
    head: Update
    assembly: PartedAssembly
    touched_at: float
    deliveries: dict[int, Delivery] = field(default_factory=dict)


@dataclass(slots=True)
class _Orphans:
    user: str | None
    touched_at: float
    parts: list[tuple[Part, Delivery]] = field(default_factory=list)
    size: int = 0


class Staging:
    """Puts transfers together and remembers whole updates by a token until they are taken out."""

    def __init__(self) -> None:
        self._transfers: dict[str, _Transfer] = {}
        self._orphans: dict[str, _Orphans] = {}
        self._orphan_bytes = 0
        self._orphan_bytes_of: dict[str | None, int] = {}
        self._aborted: OrderedDict[str, None] = OrderedDict()
        self._updates: dict[int, StagedUpdate] = {}
        self._by_transfer: dict[str, StagedUpdate] = {}
        self._copies: dict[tuple[int, int], Delivery] = {}  # each once, however often it was looked at
        self._tokens = itertools.count(1)

    def __repr__(self) -> str:
        return f"<Staging transfers={len(self._transfers)} updates={len(self._updates)}>"

    @property
    def is_empty(self) -> bool:
        """Whether nothing of it is to be settled."""
        return not (self._transfers or self._orphans or self._updates)

    def refresh(self, message: Update | Part, delivery: Delivery) -> bool:
        """True for a part of an update that is whole already: only its delivery is new."""
        update = self._by_transfer.get(message.transfer)
        if update is not None:
            self._renew(update.deliveries, _index(message), delivery)
        return update is not None

    def take_copies(self) -> list[Delivery]:
        """Deliveries of parts that are here already, sent twice over one connection; the caller's to settle, now."""
        copies, self._copies = self._copies, {}
        return list(copies.values())

    def _renew(self, deliveries: dict[int, Delivery], index: int, delivery: Delivery) -> None:
        """Keep the delivery by which a part can be settled: of another connection the newer, of the same the first."""
        known = deliveries.get(index)
        if known is not None and (known.generation, known.tag) == (delivery.generation, delivery.tag):
            return
        if known is not None and known.generation == delivery.generation:
            self._copies[delivery.generation, delivery.tag] = _bare(delivery)
        else:
            deliveries[index] = _bare(delivery)

    def begin(self, head: Update, delivery: Delivery, now: float) -> int | None:
        """Take the head of a transfer; the token of the update when it is whole by now.

        Memory for it is taken here, so its schema and codec have been compared with what is expected before. Raises
        `UpdateRefused` for parts that do not fit.
        """
        try:
            return self._begin(head, delivery, now)
        except (DecodeError, MemoryError) as exc:
            raise UpdateRefused(str(exc) or "the server has not enough memory for it") from exc

    def _begin(self, head: Update, delivery: Delivery, now: float) -> int | None:
        transfer = self._transfers.get(head.transfer)
        self._aborted.pop(head.transfer, None)  # it is sent again from its begin
        if transfer is None:
            transfer = _Transfer(head=head, assembly=_assembly(head), touched_at=now)
            self._transfers[head.transfer] = transfer
        self._take(transfer, head, delivery, now)
        orphans = self._orphans.get(head.transfer)
        for part, its_delivery in orphans.parts if orphans else ():
            self._take(transfer, part, its_delivery, now)
        self._pop_orphans(head.transfer)  # only now: what is refused must be found whole
        return self._finish(transfer)

    def add(self, part: Part, delivery: Delivery, now: float, *, user: str | None = None) -> int | None:
        """Take a further part, of `user` where that is known; the token of the update when it is whole by now.

        Raises `DecodeError` for a part whose head never came, `UpdateRefused` for one that does not fit its head.
        """
        transfer = self._transfers.get(part.transfer)
        if transfer is None:
            self._keep_orphan(part, delivery, now, user)
            return None
        try:
            self._take(transfer, part, delivery, now)
            return self._finish(transfer)
        except DecodeError as exc:
            raise UpdateRefused(str(exc)) from exc

    def _keep_orphan(self, part: Part, delivery: Delivery, now: float, user: str | None) -> None:
        size = len(part.payload) + _ORPHAN_OVERHEAD_BYTES
        of_user = self._orphan_bytes_of.get(user, 0) + size
        most = MAX_ORPHAN_BYTES if user is None else MAX_ORPHAN_BYTES_OF_USER
        if of_user > most or self._orphan_bytes + size > MAX_ORPHAN_BYTES:
            raise DecodeError("a part of a transfer that is not under way")
        orphans = self._orphans.setdefault(part.transfer, _Orphans(user, now))
        orphans.parts.append((part, _bare(delivery)))
        orphans.size += size
        self._orphan_bytes += size
        self._orphan_bytes_of[user] = of_user

    def _pop_orphans(self, transfer: str) -> _Orphans | None:
        orphans = self._orphans.pop(transfer, None)
        if orphans is not None:
            self._orphan_bytes -= orphans.size
            self._orphan_bytes_of[orphans.user] -= orphans.size
        return orphans

    def refuse(self, message: Update | Part, delivery: Delivery) -> int:
        """Give up the transfer of `message`: the token of an update without tensors, with all its deliveries."""
        known = self._transfers.get(message.transfer)
        head = message if isinstance(message, Update) else None
        if head is None:
            assert known is not None, "only a part of a known transfer can be refused"
            head = known.head
        orphans = self._orphans.get(message.transfer)
        deliveries = dict(known.deliveries) if known else {}
        for part, its_delivery in orphans.parts if orphans else ():
            self._renew(deliveries, part.index, its_delivery)
        self._renew(deliveries, _index(message), delivery)
        self.abort(message.transfer)
        return self.keep(head, deliveries, known.touched_at if known else 0.0)

    def head_of(self, transfer: str) -> Update | None:
        """The head of a transfer under way; None when only parts of it have come."""
        known = self._transfers.get(transfer)
        return None if known is None else known.head

    def give_up(self, transfer: str) -> int:
        """Like `refuse`, for a transfer of which nothing more comes."""
        known = self._transfers[transfer]
        self.abort(transfer)
        return self.keep(known.head, known.deliveries, known.touched_at)

    def is_aborted(self, transfer: str) -> bool:
        """True for further parts of a transfer that was given up, or settled: a part may come twice."""
        return transfer in self._aborted

    def of_task(self, task_id: str) -> list[str]:
        """The transfers under way for `task_id`."""
        return [name for name, transfer in self._transfers.items() if transfer.head.task_id == task_id]

    def of_user(self, user: str) -> list[str]:
        """The transfers under way whose parts came from this user, with or without a head."""
        begin = f"{user}/"
        return [name for name in (*self._transfers, *self._orphans) if name.startswith(begin)]

    def of_client(self, client_id: str) -> list[str]:
        """The transfers of this client under way."""
        return [name for name, transfer in self._transfers.items() if transfer.head.client_id == client_id]

    def missing_bytes(self, task_id: str) -> int | None:
        """How much of the upload for `task_id` is still to come; None when none is under way."""
        for transfer in self._transfers.values():
            if transfer.head.task_id == task_id:
                return transfer.assembly.missing * transfer.head.part_bytes
        return None

    @property
    def held_bytes(self) -> int:
        """Payload bytes in memory: what has come of transfers under way, and whole updates that are not folded."""
        coming = sum(known.assembly.received_bytes for known in self._transfers.values())
        whole = sum(update.nbytes for update in self._updates.values() if update.tensors is not None)
        return coming + whole + sum(orphans.size for orphans in self._orphans.values())

    def waits_to_be_folded(self) -> bool:
        """True while the tensors of a whole update lie here."""
        return any(update.tensors is not None for update in self._updates.values())

    def _take(self, transfer: _Transfer, message: Update | Part, delivery: Delivery, now: float) -> None:
        transfer.touched_at = now
        if transfer.assembly.take(message):
            for name, _, values in transfer.assembly.pieces_of(message):
                check_step(name, values, times=transfer.assembly.layout.reach(name))
        self._renew(transfer.deliveries, _index(message), delivery)

    def _finish(self, transfer: _Transfer) -> int | None:
        """Raises `DecodeError` for a whole that makes no sense."""
        if transfer.assembly.missing:
            return None
        tensors, extra = _split(transfer.assembly)
        del self._transfers[transfer.head.transfer]
        token = self.keep(transfer.head, transfer.deliveries, transfer.touched_at)
        update = self._updates[token]
        update.tensors, update.extra = tensors, extra
        update.nbytes = transfer.assembly.received_bytes
        return token

    def keep(self, head: Update, deliveries: dict[int, Delivery], arrived_at: float) -> int:
        """Remember an update without its tensors and give it a token."""
        token = next(self._tokens)
        update = StagedUpdate(
            client_id=head.client_id,
            task_id=head.task_id,
            transfer=head.transfer,
            num_examples=head.num_examples,
            metrics=head.metrics,
            nbytes=0,
            raw_bytes=payload_bytes(head.schema),
            arrived_at=arrived_at,
            deliveries=deliveries,
            tensors=None,
        )
        self._updates[token] = self._by_transfer[head.transfer] = update
        return token

    def get(self, token: int) -> StagedUpdate:
        return self._updates[token]

    def take_out(self, token: int, *, comes_again: bool = False) -> StagedUpdate:
        """Forget the update; its deliveries are the caller's to settle. What else comes of it has no use then, unless
        it `comes_again` as a whole.
        """
        update = self._updates.pop(token)
        if self._by_transfer.get(update.transfer) is update:
            del self._by_transfer[update.transfer]
        if not comes_again:
            self._note_aborted(update.transfer)
        return update

    def abort(self, transfer: str) -> list[Delivery]:
        """Forget a transfer that went wrong; its deliveries are the caller's to settle."""
        self._note_aborted(transfer)
        known = self._transfers.pop(transfer, None)
        orphans = self._pop_orphans(transfer)
        deliveries = list(known.deliveries.values()) if known else []
        return deliveries + [delivery for _, delivery in (orphans.parts if orphans else ())]

    def _note_aborted(self, transfer: str) -> None:
        self._aborted[transfer] = None
        if len(self._aborted) > 1024:
            self._aborted.popitem(last=False)

    def stalled(self, before: float) -> list[str]:
        """Transfers of which nothing has come since `before`: their senders are gone."""
        touched_at = {name: transfer.touched_at for name, transfer in self._transfers.items()}
        touched_at |= {name: orphans.touched_at for name, orphans in self._orphans.items()}
        return [name for name, at in touched_at.items() if at < before]

    def touch(self, transfer: str, now: float) -> None:
        """Give a stalled transfer more time."""
        self._transfers[transfer].touched_at = now


def _assembly(head: Update) -> PartedAssembly:
    return PartedAssembly(head.schema, head.part_bytes, Codec.parse(head.codec))


def _split(assembly: PartedAssembly) -> tuple[PartedTensors | DecodedPieces, PartedTensors]:
    """The delta, decoded as it is read, and what came beside it. Raises `DecodeError`."""
    own, extra = assembly.tensors().split(EXTRA)
    if not assembly.layout.rounded:
        return own, extra
    delta = DecodedPieces(own, assembly.layout)
    delta.check()
    return delta, extra


def _index(message: Update | Part) -> int:
    return message.index if isinstance(message, Part) else 0


def _bare(delivery: Delivery) -> Delivery:
    """What it takes to settle it, without the bytes: they would stay until the commit."""
    return dataclasses.replace(delivery, body=b"")


class UpdateCheck:
    """What every update must be: deltas of `model`, all or some, and behind them all of `extras`, in this `codec`."""

    def __init__(self, model: Tensors, extras: Mapping[str, ExtraSpec] | None = None, codec: Codec = PLAIN) -> None:
        self._codec = codec
        self._expected = {
            name: (dtype_name(delta_dtype(value.dtype)), tuple(value.shape)) for name, value in model.items()
        }
        self._extras = {EXTRA + name: spec for name, spec in (extras or {}).items()}
        specs = [TensorSpec(name, *kind) for name, kind in self._expected.items()]
        specs += [_largest(name, spec) for name, spec in self._extras.items()]
        self.nbytes = codec.most_bytes(tuple(specs))
        """The payload of the largest update that may come."""

    def head(self, update: Update) -> None:
        """Raise `UpdateRefused` for what can be told before the tensors are here: weight, names, dtypes, shapes."""
        check_parts(update)
        if update.codec != self._codec.text:
            raise UpdateRefused(f"it came in the codec {update.codec[:80]!r}, its task asked for {self._codec.text!r}")
        if update.num_examples < 1:
            raise UpdateRefused(f"num_examples is {update.num_examples}: an update needs at least one example")
        if update.num_examples > MAX_EXAMPLES:
            raise UpdateRefused(f"num_examples is {update.num_examples}: nobody has more than {MAX_EXAMPLES}")
        extras = tuple(itertools.dropwhile(lambda spec: not spec.name.startswith(EXTRA), update.schema))
        for spec in update.schema[: len(update.schema) - len(extras)]:
            self._check_delta(spec)
        for spec in extras:
            self._check_extra(spec)
        missing = set(self._extras) - {spec.name for spec in extras}
        if missing:
            name = min(missing).removeprefix(EXTRA)
            raise UpdateRefused(f"it came without {name!r}, which the strategy needs: give it in FitResult.extra")

    def _check_delta(self, spec: TensorSpec) -> None:
        if spec.name not in self._expected:
            raise UpdateRefused(f"the model has no tensor {spec.name[:80]!r}")
        dtype, shape = self._expected[spec.name]
        if spec.shape != shape:
            raise UpdateRefused(f"tensor {spec.name!r} has shape {spec.shape}, the model has {shape}")
        if spec.dtype != dtype:
            raise UpdateRefused(f"tensor {spec.name!r} came as {spec.dtype}, {dtype} is due")

    def _check_extra(self, spec: TensorSpec) -> None:
        name, due = spec.name.removeprefix(EXTRA)[:80], self._extras.get(spec.name)
        if due is None:
            raise UpdateRefused(f"the strategy does not ask for {name!r}, which came beside the update")
        if spec.dtype != dtype_name(due.dtype):
            raise UpdateRefused(f"{name!r} came as {spec.dtype}, {dtype_name(due.dtype)} is due")
        if due.shape is not None and spec.shape != due.shape:
            raise UpdateRefused(f"{name!r} came with shape {spec.shape}, {due.shape} is due")
        if due.shape is None and (len(spec.shape) != 1 or spec.nbytes > due.max_bytes):
            raise UpdateRefused(
                f"{name!r} came with shape {spec.shape}: one dimension, and {due.max_bytes} bytes at most, are due"
            )


def _largest(name: str, spec: ExtraSpec) -> TensorSpec:
    shape = (spec.max_bytes // spec.dtype.itemsize,) if spec.shape is None else spec.shape
    return TensorSpec(name, dtype_name(spec.dtype), shape)


def check_names(names: Iterable[str]) -> None:
    """Raise `UpdateRefused` for a model that has a tensor of a name that is ours."""
    for name in names:
        if name.startswith(EXTRA):
            raise UpdateRefused(f"tensor {name[:80]!r}: names that begin with {EXTRA!r} are fedbus's own")


def check_parts(update: Update) -> None:
    """Raise `UpdateRefused` for parts so small that the bookkeeping would outweigh them."""
    if not MIN_PART_BYTES <= update.part_bytes <= MAX_PART_BYTES:
        raise UpdateRefused(f"parts of {update.part_bytes} bytes, {MIN_PART_BYTES} to {MAX_PART_BYTES} are allowed")


def check_initial(update: Update) -> None:
    """Raise `UpdateRefused` for an initial model that is empty or larger than any that is taken."""
    check_parts(update)
    if update.codec:
        raise UpdateRefused(f"the initial model came in the codec {update.codec[:80]!r}, none is due")
    if not update.schema:
        raise UpdateRefused("get_parameters returned no tensors")
    check_names(spec.name for spec in update.schema)
    if payload_bytes(update.schema) > MAX_INITIAL_BYTES:
        raise UpdateRefused(f"an initial model of {payload_bytes(update.schema)} bytes, {MAX_INITIAL_BYTES} at most")


def metrics_bytes(metrics: Metrics) -> int:
    """About what metrics take in a record: names, texts, and 8 for a number."""
    return sum(len(name) + (len(value) if isinstance(value, str | bytes) else 8) for name, value in metrics.items())


def check_step(name: str, values: Array, *, times: float = 1.0) -> None:
    """Raise `UpdateRefused` for a piece of a delta with values that are NaN, infinite or, so many `times`, absurdly
    large."""
    if values.dtype.kind in "iub" or not values.size:
        return
    real = values.view(values.real.dtype) if values.dtype.kind == "c" else values
    with np.errstate(invalid="ignore"):
        highest, lowest = float(np.maximum.reduce(real)), float(np.minimum.reduce(real))
    if lowest * times > -MAX_STEP and highest * times < MAX_STEP:  # not so with NaN
        return
    check_finite({name: values})
    raise UpdateRefused(f"tensor {name!r} moves by {max(highest, -lowest) * times:.3g}: {MAX_STEP:.3g} is too far")


def check_finite(tensors: Tensors) -> None:
    """Raise `UpdateRefused` when any value is NaN or infinite. Reads every byte: large models off the event loop."""
    for name, value in tensors.items():
        if value.dtype.kind not in "iub" and not _all_finite(value):
            raise UpdateRefused(f"tensor {name!r} holds NaN or infinite values: did the training diverge?")


def _all_finite(value: Array) -> bool:
    flat: np.ndarray[Any, Any] = value.reshape(-1)
    # In blocks: the boolean mask stays small, and the first bad block ends it.
    with np.errstate(invalid="ignore"):  # signalling NaN
        return all(bool(np.isfinite(flat[start : start + 65_536]).all()) for start in range(0, flat.size, 65_536))

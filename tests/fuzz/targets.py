"""What is fuzzed: each target takes any bytes, and raises only where there is a mistake of ours."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedbus.analytics.inquiry import Inquiry
from fedbus.analytics.local import answer
from fedbus.analytics.statistics import Describe, Histogram, Statistic, TopValues, Variance
from fedbus.bus.access import Access
from fedbus.bus.base import Consumer, Delivery
from fedbus.bus.bundle import Bundle
from fedbus.bus.memory import MemoryBroker
from fedbus.errors import BrokerClosed, ConfigError, DecodeError, RunFailed, UpdateRefused
from fedbus.observe.glance import _parse
from fedbus.rounds import events as e
from fedbus.server.guard import Guard
from fedbus.server.history import History
from fedbus.server.identity import Identity
from fedbus.server.intake import UpdateIntake
from fedbus.server.ledger import Ledger
from fedbus.server.staging import MAX_STEP, StagedUpdate, Staging
from fedbus.strategies.xgboost_trees import read_booster, with_trees, write_model
from fedbus.tensorfile import load_model, save_model
from fedbus.types import Array, ExtraSpec, Tensors
from fedbus.wire import messages as m
from fedbus.wire.arrays import TensorSpec, check_schema, payload_bytes
from fedbus.wire.codec import decode, encode
from fedbus.wire.compression import Codec, Layout
from fedbus.wire.compression import encode as encode_tensors
from fedbus.wire.floats import Noise
from fedbus.wire.lossless import packed
from fedbus.wire.transfer import Outgoing, PartedAssembly, checksum
from tests.fuzz.draw import Draw


@dataclass(frozen=True, kw_only=True)
class Target:
    """`one` is called with any bytes; `seeds` are such as it was made for."""

    one: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


# ---- bytes -> message ------------------------------------------------------------------------------------------------

_MESSAGES: Final[tuple[m.Message, ...]] = (
    m.Join(client_id="c1", session="s"),
    m.Heartbeat(client_id="c1", session="s", run_id="r", fit_task=""),
    m.Leave(client_id="c1", session="s", run_id="r", reason="bye"),
    m.TaskFailed(client_id="c1", task_id="t", run_id="r", reason="x"),
    m.EvaluateReport(
        client_id="c1", task_id="t", run_id="r", loss=0.5, num_examples=3, metrics={"a": 1.5, "b": "x", "c": True}
    ),
    m.UploadRequest(client_id="c1", task_id="t", run_id="r", nbytes=1 << 40),
    m.Echo(run_id="r", epoch=1, sent_at=1.5),
    m.Part(transfer="t", index=3, checksum=7, payload=b"abcd"),
    m.Model(
        run_id="r", epoch=1, version=2, schema=(TensorSpec("w", "<f4", (2, 3)), TensorSpec("", "bfloat16", ()))[:1],
        part_bytes=64, checksum=1, payload=bytes(24),
    ),
    m.Welcome(run_id="r", session="s", epoch=1, heartbeat_s=1.0, lease_s=4.0),
    m.Refusal(task_id="t", run_id="r", reason="no"),
    m.RunEnded(run_id="r", epoch=1, finished=True, reason="done"),
)  # fmt: skip


def _decode(data: bytes) -> None:
    """A message, which is then the same once more, or a `DecodeError`."""
    try:
        message = decode(data)
    except DecodeError:
        return
    with contextlib.suppress(ConfigError):  # a head that is larger than our own would be
        assert repr(_plain(decode(encode(message)))) == repr(_plain(message))


def _plain(message: m.Message) -> m.Message:
    carrier: Any = message
    return replace(carrier, payload=bytes(carrier.payload)) if hasattr(message, "payload") else message


def _message_seeds() -> list[bytes]:
    return [encode(message) for message in _MESSAGES]


# ---- parts -> tensors ------------------------------------------------------------------------------------------------

_DTYPES: Final = ("<f4", "<f8", "|b1", "|u1", "bfloat16", "<c8", ">i4", "<i8")


def _parted(data: bytes) -> None:
    """Parts of any kind and order: either an error, or tensors of which every element comes once."""
    draw = Draw(data)
    schema = tuple(
        TensorSpec(f"t{number}", draw.one_of(_DTYPES), tuple(draw.below(9) for _ in range(draw.below(3))))
        for number in range(draw.below(4))
    )
    part_bytes = draw.one_of((64, 128, 1, 65, 1 << 16, 0, 1 << 40))
    try:
        check_schema(schema)
        assembly = PartedAssembly(schema, part_bytes)
    except DecodeError:
        return
    size = payload_bytes(schema)
    while not draw.is_over and assembly.missing:
        index = draw.one_of((0, 1, 2, 3, 1 << 40))
        due = max(0, min(part_bytes, size - index * part_bytes))
        payload = memoryview(bytes(draw.one_of((due, due, due, due + 1, 0))))
        with contextlib.suppress(DecodeError):
            assembly.take(m.Part(transfer="t", index=index, checksum=checksum(payload), payload=payload))
    if not assembly.missing:
        counts = dict.fromkeys((spec.name for spec in schema), 0)
        for name, start, values in assembly.tensors().pieces():
            assert start == counts[name]
            counts[name] += values.size
        assert counts == {spec.name: math.prod(spec.shape) for spec in schema}


# ---- coded updates -> deltas -----------------------------------------------------------------------------------------

_CODECS: Final = ("int8", "topk:0.1", "qsgd:1+zstd", "topk:0.01+qsgd:7+zstd", "float16", "zstd", "bfloat16+zstd")
_PART: Final = 1 << 16


def _delta() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=20_000).astype(np.float32),
        "h": rng.normal(size=300).astype(np.float16),
        "n": np.arange(4),
        "z": rng.normal(size=100).astype(np.complex64),
        "none": np.zeros((0, 2)),
    }


def _raw_payload(text: str) -> tuple[Layout, bytes]:
    encoded = encode_tensors(Codec.parse(text), _delta(), Noise())
    outgoing = Outgoing(encoded.tensors, _PART)
    return encoded.layout, b"".join(b"".join(outgoing.part(index)) for index in range(outgoing.parts))


_RAW: Final = {text: _raw_payload(text) for text in _CODECS}


def _changed(draw: Draw, raw: bytes) -> bytes:
    """With some bytes of it changed: early ones, where scales and places are, as often as any."""
    changed = bytearray(raw)
    while not draw.is_over:
        at = draw.below(draw.one_of((1 << 9, 1 << 12, 1 << 20))) % len(changed)
        few = draw.take(1 + draw.below(8))
        changed[at : at + len(few)] = few
    return bytes(changed[: len(raw)])


def _coded(data: bytes) -> None:
    """Whatever bytes come for an update: it is refused, or every number of it is there once, and within bounds."""
    draw = Draw(data)
    text, changes_frames = draw.one_of(_CODECS), draw.below(2)
    layout, raw = _RAW[text]
    codec = Codec.parse(text)
    if not changes_frames:
        raw = _changed(draw, raw)
    parts = [raw[start : start + _PART] for start in range(0, len(raw), _PART)]
    if codec.level is not None:
        parts = [packed(part, layout.stride, codec.level) for part in parts]
    if changes_frames:
        parts[-1] = _changed(draw, parts[-1])
    first, *others = (memoryview(part) for part in parts)
    head = m.Update(
        client_id="c1", task_id="t", run_id="r", transfer="x", version=0, num_examples=1, metrics={}, codec=text,
        schema=layout.schema, part_bytes=_PART, checksum=checksum(first), payload=first,
    )  # fmt: skip
    staging = Staging()
    came = Delivery(body=b"", tag=1, routing_key="", redelivered=False, offset=None, user_id="c1")
    try:
        token = staging.begin(head, came, 0.0)
        for index, part in enumerate(others, 1):
            token = staging.add(m.Part(transfer="x", index=index, checksum=checksum(part), payload=part), came, 0.0)
    except UpdateRefused:
        return
    assert token is not None
    tensors = staging.get(token).tensors
    assert tensors is not None
    looked = list(tensors.peek())
    counts = dict.fromkeys((spec.name for spec in layout.schema), 0)
    for (name, start, values), (_, _, seen) in zip(tensors.pieces(), looked, strict=True):
        assert start == counts[name]
        counts[name] += values.size
        assert values.tobytes() == seen.tobytes()
        assert values.dtype.kind == "i" or float(np.abs(values.astype(np.complex128)).max(initial=0)) < 2 * MAX_STEP
    assert counts == {spec.name: math.prod(spec.shape) for spec in layout.schema}


# ---- hostile updates -> intake ---------------------------------------------------------------------------------------

_MODEL: Final[Tensors] = {"w": np.zeros(40_000, np.float32), "b": np.zeros(3)}
_BESIDE: Final[Tensors] = {"extra/seen": np.zeros(2, np.int64), "extra/note": np.zeros(10, np.uint8)}
_EXTRAS: Final = {
    "seen": ExtraSpec(dtype=np.dtype("<i8"), shape=(2,)),
    "note": ExtraSpec(dtype=np.dtype("|u1"), max_bytes=64),
}
_DIVERGED: Final[Tensors] = {"w": np.full(40_000, np.nan, np.float32)}
_USERS: Final = ("fed.c1", "fed.c2", "fed.m1", "fed.worker", "fed.server", "other", None)


class _Scripted(Consumer):
    """Hands out what it is given, and holds that each is settled once."""

    def __init__(self, deliveries: list[Delivery]) -> None:
        self._waiting = deliveries[::-1]
        self.unsettled = {delivery.tag for delivery in deliveries}

    async def receive(self) -> Delivery:
        if not self._waiting:
            raise BrokerClosed("that was all")
        return self._waiting.pop()

    async def ack(self, *deliveries: Delivery) -> None:
        for delivery in deliveries:
            self.unsettled.remove(delivery.tag)

    async def reject(self, delivery: Delivery, *, requeue: bool) -> None:
        self.unsettled.remove(delivery.tag)


class _Engine:
    """Waits for what its tasks' clients send."""

    def awaits(self, task_id: str, client_id: str) -> bool:
        return task_id == f"task of {client_id}"

    def is_member(self, client_id: str) -> bool:
        return client_id != "c2"


def _update(client_id: str, transfer: str, part_bytes: int = 1 << 16, delta: Tensors = _MODEL) -> list[m.Message]:
    outgoing = Outgoing({**delta, **_BESIDE}, part_bytes)
    payloads = [b"".join(outgoing.part(index)) for index in range(outgoing.parts)]
    head = m.Update(
        client_id=client_id, task_id=f"task of {client_id}", run_id="r", transfer=transfer, version=0, num_examples=1,
        metrics={}, schema=outgoing.schema, part_bytes=part_bytes, checksum=checksum(payloads[0]), payload=payloads[0],
    )  # fmt: skip
    parts = [
        m.Part(transfer=transfer, index=index, checksum=checksum(payload), payload=payload)
        for index, payload in enumerate(payloads)
    ]
    return [head, *parts[1:]]


_UPDATES: Final = [
    _update(client_id, transfer, delta=delta)
    for client_id in ("c1", "c2", "virtual-1")
    for transfer in ("x", "y")
    for delta in (_MODEL, _DIVERGED)
]
_MUTATIONS: Final[tuple[dict[str, Any], ...]] = (
    {}, {}, {}, {"checksum": 5}, {"num_examples": -1}, {"num_examples": 1 << 50}, {"part_bytes": 64}, {"schema": ()},
    {"part_bytes": 1 << 20}, {"task_id": "another"}, {"run_id": "another"}, {"payload": b""}, {"index": 0},
    {"index": 1 << 40}, {"transfer": "z"}, {"schema": Outgoing({**_BESIDE, **_MODEL}).schema},
    {"schema": Outgoing({**_MODEL, "extra/note": np.zeros(65, np.uint8)}).schema},
    {"metrics": {"a" * 200 + str(i): "b" * 4000 for i in range(5)}},
)  # fmt: skip


def _bodies(draw: Draw) -> Iterator[bytes]:
    while not draw.is_over:
        message = draw.one_of(draw.one_of(_UPDATES))
        fields = {name: value for name, value in draw.one_of(_MUTATIONS).items() if hasattr(message, name)}
        body = encode(replace(message, **fields))
        if draw.below(16) == 0:  # and some that are no messages at all
            at, xor = draw.below(len(body)), draw.below(255) + 1
            body = body[:at] + bytes([body[at] ^ xor]) + body[at + 1 :]
        yield body


def _intake(data: bytes) -> None:
    """Whatever comes, from whomever: each delivery is settled once, and nothing stays when all is given up."""
    asyncio.run(_take_in(data))


async def _take_in(data: bytes) -> None:
    draw = Draw(data)
    reconnected_at = draw.one_of((1 << 30, 5, 20))
    deliveries = [
        Delivery(
            body=body, tag=tag, routing_key="", redelivered=False, offset=None, user_id=draw.one_of(_USERS),
            is_copied=draw.below(32) == 1, generation=int(tag >= reconnected_at),
        )
        for tag, body in enumerate(_bodies(Draw(data)))
    ]  # fmt: skip
    consumer = _Scripted(deliveries)
    told: list[object] = []
    identity = Identity("fed.server", {"virtual-1"})
    intake = UpdateIntake(
        consumer, _Engine(), identity, Guard(MemoryBroker().connect("fed.server"), identity, told.append),  # type: ignore[arg-type]
        run_id="r", put=told.append, verify=_take_it, grant=lambda client_id, task_id: None, stalled_after_s=60,
    )  # fmt: skip
    intake.expect(_MODEL, _EXTRAS)
    with contextlib.suppress(BrokerClosed):
        await intake.receive()
    for event in told:
        if isinstance(event, e.UpdateReceived | e.UpdateInvalid):
            await intake.settle(event.delivery, keep_in_broker=False)
    await intake._forget(intake._staging.stalled(math.inf))
    staging = intake._staging
    # What an older connection had brought comes again, and is settled then.
    assert consumer.unsettled <= set(range(reconnected_at if reconnected_at < len(deliveries) else 0))
    assert (staging._orphan_bytes, staging._transfers, staging._orphans, staging._updates) == (0, {}, {}, {})
    assert not any(staging._orphan_bytes_of.values())


async def _take_it(update: StagedUpdate) -> None:
    """What a strategy that has nothing against any says of it."""


def _scripts() -> list[bytes]:
    return [bytes(range(256)), bytes(200), bytes(i * 7 % 256 for i in range(600)), b"\x00\x00\x00\x00\x01\x00" * 40]


# ---- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[Path]:
    descriptor, name = tempfile.mkstemp(prefix="fedbus-fuzz-")  # 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        yield Path(name)
    finally:
        for path in Path(name).parent.glob(f"{Path(name).name}*"):
            path.unlink()


def _bundle(data: bytes) -> None:
    with _file(data) as path, contextlib.suppress(ConfigError):
        Bundle.load(path)


def _bundle_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c1.json"
        access = Access("amqps://fed.c1:secret@rabbit:5671/fed,amqps://fed.c1:secret@other:5671/fed?auth=external")
        Bundle(federation="fed", role="client", user="fed.c1", client_id="c1", access=access).save(path)
        return [path.read_bytes(), b"[" * 5000]


def _safetensors(data: bytes) -> None:
    with _file(data) as path, contextlib.suppress(ConfigError):
        load_model(path)


def _safetensors_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(path, {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((), np.int8)}, {"a": "b"})
        model = path.read_bytes()
    nested = b"[" * 5000
    huge = json.dumps({"w": {"dtype": "F32", "shape": [1 << 70], "data_offsets": [0, 0]}}).encode()
    return [model, *(struct.pack("<Q", len(header)) + header for header in (nested, huge))]


def _ledger(data: bytes) -> None:
    with _file(data) as path, contextlib.suppress(ConfigError, RunFailed):
        ledger = Ledger(path)
        try:
            if ledger.holds_a_run:
                ledger.take_over(max_staleness=5)
        finally:
            ledger.close()


def _ledger_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        ledger = Ledger(path)
        ledger.begin(History(run_id="r"))
        ledger.note_tasks([("r/fit/1/c1", "c1", 1, 0)])
        ledger.commit_model(0)
        ledger.close()
        db = sqlite3.connect(path)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
        whole = path.read_bytes()
        # SQLite names what is damaged, in the damaged letters.
        damaged = whole.replace(b"clientsclients", b"\x9b\x88ientsclients").replace(b"CREATE TABLE clients", b"?" * 20)
        return [whole, damaged]


# ---- trees -----------------------------------------------------------------------------------------------------------


@cache
def _boosters() -> list[bytes]:
    """A model without trees, and two trees for it."""
    import xgboost as xgb

    x = np.arange(60.0).reshape(20, 3) % 7
    data = xgb.DMatrix(x, x[:, 0] > 3)
    params = {"objective": "binary:logistic", "base_score": 0.5, "max_depth": 2, "nthread": 1}
    return [bytes(xgb.train(params, data, rounds).save_raw("json")) for rounds in (0, 2)]


def _trees(data: bytes) -> None:
    """What is let pass must be such that XGBoost, which checks little, can work with it."""
    import xgboost as xgb

    start = read_booster(_boosters()[0])
    try:
        booster = read_booster(data, like=start.shape, most_iterations=2)
    except UpdateRefused:
        return
    whole = xgb.Booster({"nthread": 1})
    whole.load_model(bytearray(with_trees(write_model(start), start.shape, [(booster, 0.5)])))
    assert whole.num_boosted_rounds() == booster.iterations
    assert whole.inplace_predict(np.full((2, 3), np.nan)).shape == (2,)


def _trees_seeds() -> list[bytes]:
    return [*_boosters(), b"[" * 5000]


# ---- a status --------------------------------------------------------------------------------------------------------


def _status(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        _parse(m.Status(run_id="r", payload=memoryview(data)))


# ---- answers to a query ----------------------------------------------------------------------------------------------


def _answers(data: bytes) -> None:
    """A client that bends its answers: each is refused, or the query comes to an end with it."""
    draw = Draw(data)
    wanted: list[Statistic] = [Describe("x"), Histogram("x", 3), Variance("x", ddof=1), TopValues("x", 2)]
    inquiry = Inquiry(wanted, by="g", min_clients=1, min_count=1)
    for _ in range(200):
        if inquiry.is_done:
            break
        honest = answer({"x": [1, 2, None, 4], "g": list("aabb")}, inquiry.question.tensors(), {})
        bent = {name: _bent(value, draw) for name, value in honest.items()}
        try:
            inquiry.check(bent)
        except UpdateRefused:
            bent = honest
        inquiry.take("c1", bent)
        inquiry.close()
    assert inquiry.is_done
    if inquiry.result is not None:
        json.dumps(inquiry.result.to_dict(), allow_nan=False)


def _bent(value: Array, draw: Draw) -> Array:
    changed = value.copy()
    for _ in range(0 if draw.is_over else draw.below(3)):
        if changed.size:
            at, new = draw.below(changed.size), draw.take(draw.below(9))
            changed[at] = int.from_bytes(new, "little", signed=True) if changed.dtype.kind == "i" else (new or b"0")[0]
    return changed


TARGETS: Final = {
    "trees": Target(one=_trees, seeds=_trees_seeds),
    "answers": Target(one=_answers, seeds=_scripts),
    "decode": Target(one=_decode, seeds=_message_seeds),
    "parted": Target(one=_parted, seeds=_scripts),
    "coded": Target(one=_coded, seeds=lambda: [bytes([number, 0]) for number in range(7)] + _scripts()),
    "intake": Target(one=_intake, seeds=_scripts),
    "bundle": Target(one=_bundle, seeds=_bundle_seeds),
    "safetensors": Target(one=_safetensors, seeds=_safetensors_seeds),
    "ledger": Target(one=_ledger, seeds=_ledger_seeds),
    "status": Target(one=_status, seeds=lambda: [b'{"run_id": "r", "members": []}', b"[" * 5000]),
}

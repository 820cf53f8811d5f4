"""Every attack, with the control that stops it: each returns how it was refused, or raises when it was not."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

from pamqp import commands, frame

from fedbus.bus.topology import BROADCAST, CONTROL, DEAD, JOBS, MODEL, TASKS, UPDATES, inbox
from fedbus.wire import messages as m
from fedbus.wire.arrays import TensorSpec
from fedbus.wire.codec import MAX_CONTROL_BYTES, MAX_HEAD_BYTES, MAX_PART_BYTES, PROTOCOL, encode
from tests.hostile.field import Field, honest_delta
from tests.hostile.raw import RawConnection, Refused

Play: TypeAlias = Callable[[Field], str]

VICTIM: Final = "h1"
RIGHTS: Final = "broker: rights of the user"
TOPICS: Final = "broker: topic permission"
BROKER_LIMITS: Final = "broker: limits of the user"
IDENTITY: Final = "Identity: user_id checked by the broker"
CODEC: Final = "codec: bounds before parsing"
CHECKS: Final = "UpdateCheck, Staging"
GUARD: Final = "Guard: allowance, then the quarantine"
ENGINE: Final = "engine: nobody waits for it"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """`is_flood`: it goes on for as long as one likes."""

    name: str
    control: str
    play: Play
    is_flood: bool = False

    @property
    def attacker(self) -> str:
        """The client id that plays it: each attack has its own, so that none is shut out for another."""
        return f"m-{self.name.replace(' ', '-')}"[:64]


ATTACKS: Final[dict[str, Attack]] = {}


def attack(control: str, *, is_flood: bool = False) -> Callable[[Play], Play]:
    """List the function as an attack, under its own name."""

    def listed(play: Play) -> Play:
        name = play.__name__.replace("_", " ")
        ATTACKS[name] = Attack(name=name, control=control, play=play, is_flood=is_flood)
        return play

    return listed


def all_of(refusals: Iterator[str], words: str) -> str:
    """The last of several refusals, all of which must say so."""
    last = ""
    for last in refusals:
        assert words in last, last
    assert last
    return last


# ---- what the broker stops -------------------------------------------------------------------------------------------


@attack(RIGHTS)
def reads_what_is_not_its_own(field: Field) -> str:
    """A peer's inbox, and the queues of the server: by subscription, by get."""
    queues = (inbox(VICTIM), CONTROL, UPDATES, DEAD)
    methods = [commands.Basic.Consume(queue=queue) for queue in queues]
    gets = [commands.Basic.Get(queue=queue) for queue in queues]
    refusal = all_of((field.refused_by_broker(method) for method in [*methods, *gets]), "ACCESS_REFUSED")
    field.in_broker_log(f"refused for user '{field.user}'")
    return refusal


@attack(RIGHTS)
def publishes_where_only_the_server_does(field: Field) -> str:
    """A model, tasks for peers, into a peer's inbox by the default exchange, around the lanes of the queues."""
    exchanges = (
        BROADCAST,
        TASKS,
        JOBS,
        "",
        "amq.topic",
        "amq.direct",
        "amq.fanout",
        DEAD,
        f"{UPDATES}.any",
        f"{CONTROL}.any",
    )
    return all_of(
        (_refusal(field, exchange, inbox(VICTIM)) for exchange in exchanges),
        "ACCESS_REFUSED",
    )


def _refusal(field: Field, exchange: str, routing_key: str, **properties: Any) -> str:
    try:
        return field.publish_refused(exchange, routing_key, b"x", **properties)
    except Refused as refused:
        return str(refused)


@attack(TOPICS)
def publishes_under_a_peers_routing_key(field: Field) -> str:
    """Which would also lead around its own quarantine."""
    keys = (VICTIM, "server", "#", "", f"{field.who}.x")
    return all_of((_refusal(field, exchange, key) for exchange in (CONTROL, UPDATES) for key in keys), "ACCESS_REFUSED")


@attack(RIGHTS)
def declares_binds_deletes_purges(field: Field) -> str:
    """Whatever would change the topology, or take what waits in it."""
    own = inbox(field.who)
    methods = [
        commands.Queue.Declare(queue="fedbus.inbox.fake"),
        commands.Queue.Declare(queue="fedbus.lock.server", exclusive=True),
        commands.Exchange.Declare(exchange="fedbus.tap", exchange_type="fanout"),
        commands.Queue.Bind(queue=own, exchange=UPDATES, routing_key="#"),
        commands.Queue.Bind(queue=own, exchange=TASKS, routing_key=VICTIM),
        commands.Queue.Unbind(queue=UPDATES, exchange=f"{UPDATES}.any"),
        commands.Exchange.Bind(destination=CONTROL, source=UPDATES, routing_key="#"),
        commands.Exchange.Bind(destination=UPDATES, source=BROADCAST, routing_key="#"),
        commands.Queue.Bind(queue=UPDATES, exchange=BROADCAST, routing_key="#"),
        commands.Queue.Bind(queue=CONTROL, exchange=TASKS, routing_key=VICTIM),
        commands.Queue.Delete(queue=UPDATES),
        commands.Queue.Delete(queue=inbox(VICTIM)),
        commands.Queue.Delete(queue="fedbus.quarantine"),
        commands.Exchange.Delete(exchange=CONTROL),
        commands.Queue.Purge(queue=UPDATES),
        commands.Queue.Purge(queue=inbox(VICTIM)),
    ]
    return all_of((field.refused_by_broker(method) for method in methods), "ACCESS_REFUSED")


@attack("broker: user_id must be the login")
def forges_the_user_id(field: Field) -> str:
    """Says that a peer, or the server, has sent it."""
    users = [field.ground.user(VICTIM), field.ground.user("server"), "guest"]
    return all_of((_refusal(field, CONTROL, field.who, user_id=user) for user in users), "user_id property set to")


@attack(RIGHTS)
def looks_into_other_vhosts(field: Field) -> str:
    """There may be other federations on the broker."""
    elsewhere = field.url.rpartition("/")[0] + "/%2F"
    refusal = ""
    try:
        RawConnection(elsewhere)
    except (Refused, ConnectionError) as exc:
        refusal = str(exc)
    assert "refused for user" in refusal, refusal
    return refusal


@attack(BROKER_LIMITS)
def opens_connections_without_end(field: Field) -> str:
    """Each costs the broker memory."""
    open_ones: list[RawConnection] = []
    try:
        for _ in range(40):
            open_ones.append(field.connect())  # noqa: PERF401
    except (Refused, ConnectionError) as exc:
        assert len(open_ones) <= 8, len(open_ones)
        return f"{exc} (after {len(open_ones)})"
    finally:
        for each in open_ones:
            each.socket.close()
    raise AssertionError("any number of connections")


@attack(BROKER_LIMITS)
def opens_channels_by_the_hundred(field: Field) -> str:
    """Each is some processes in the broker."""
    number = 1
    with RawConnection(field.url) as connection:
        try:
            for number in range(2, 300):
                connection.open_channel(number)
        except (Refused, ConnectionError) as exc:
            assert number <= 65, number
            return f"{exc} (at {number})"
    raise AssertionError("any number of channels")


@attack("broker: max_message_size")
def sends_an_oversized_message(field: Field) -> str:
    """16 MiB and a byte."""
    return all_of(iter([_refused_size(field)]), "larger than configured max size")


def _refused_size(field: Field) -> str:
    with RawConnection(field.url) as connection, suppress(OSError):
        connection.publish(UPDATES, field.who, bytes((16 << 20) + 1), user_id=field.user)
        return connection.refusal()
    return ""


@attack("broker: protocol, limits of the user")
def sends_garbage_frames(field: Field) -> str:
    """Before the handshake, and after it."""
    with socket.create_connection(("127.0.0.1", field.ground.node.port), timeout=10) as plain:
        plain.sendall(os.urandom(4096))
        with suppress(ConnectionError):
            while plain.recv(4096):
                pass
    with RawConnection(field.url) as connection:
        connection.socket.sendall(b"\x09" + os.urandom(5000))
        with suppress(OSError):
            connection.socket.sendall(os.urandom(500_000))
        try:
            return connection.refusal()
        except OSError as exc:
            return f"the connection is cut: {exc}"


HALF_OPEN: Final = 150


@attack("broker: handshake timeout")
def never_finishes_the_handshake(field: Field) -> str:
    """Slow loris: sockets that say nothing, or half a word."""
    sockets = [socket.create_connection(("127.0.0.1", field.ground.node.port), timeout=20) for _ in range(HALF_OPEN)]
    try:
        for each in sockets[::2]:
            each.sendall(b"AMQP\x00\x00")
        field.ground.rounds_go_on(2)
        if field.seconds:  # the broker's patience is ten seconds
            for each in sockets:
                with suppress(ConnectionError):
                    assert each.recv(4096) in (b"", b"AMQP\x00\x00\x09\x01"), "the broker goes on listening"
            return f"{HALF_OPEN} connections cut after 10 s"
        return f"{HALF_OPEN} connections wait for the broker to cut them, and the rounds go on"
    finally:
        for each in sockets:
            each.close()


@attack(BROKER_LIMITS)
def sends_one_byte_at_a_time(field: Field) -> str:
    """Holds a connection and half a message for as long as it likes: it has eight connections."""
    body = frame.marshal(commands.Basic.Publish(exchange=UPDATES, routing_key=field.who), 1)
    for byte in body[:-1]:
        field.connection.socket.sendall(bytes([byte]))
    field.ground.rounds_go_on(1)
    return "it holds one of its eight connections, and nobody else's"


@attack("broker: flow control by the socket, prefetch of each reader")
def never_acknowledges(field: Field) -> str:
    """Consumers of the model that take and never settle, on all the channels that it may have."""
    with RawConnection(field.url) as connection:
        for number in range(2, 61):
            connection.open_channel(number)
            connection.send(commands.Basic.Qos(prefetch_count=10), channel=number)
            connection.expect(commands.Basic.QosOk)
            arguments: dict[str, Any] = {"x-stream-offset": "first"}
            connection.send(commands.Basic.Consume(queue=MODEL, arguments=arguments), channel=number)
        field.ground.rounds_go_on(2)
    return "60 readers stand still, and the rounds go on"


# ---- who speaks for whom ---------------------------------------------------------------------------------------------


@attack(IDENTITY)
def speaks_in_a_peers_name(field: Field) -> str:
    """Joins, leaves, fails, reports and asks as somebody else; its routing key and user_id are its own."""
    said: list[m.Message] = [
        m.Join(client_id=VICTIM, session="s"),
        m.Heartbeat(client_id=VICTIM, session="s", run_id="r", fit_task=""),
        m.Leave(client_id=VICTIM, session="s", run_id="r", reason="bye"),
        m.TaskFailed(client_id=VICTIM, task_id="t", run_id="r", reason="x"),
        m.EvaluateReport(client_id=VICTIM, task_id="t", run_id="r", loss=0.0, num_examples=1, metrics={}),
        m.UploadRequest(client_id=VICTIM, task_id="t", run_id="r", nbytes=1),
    ]
    for message in said:
        field.say(message)
    refusal = field.rejected(CONTROL, f"not the user of {VICTIM}")
    field.ground.rounds_go_on(1)
    assert not [told for told in field.ground.told[field.since :] if told.get("event") == "member_lost"
                and told.get("client_id") == VICTIM]  # fmt: skip
    return refusal


@attack(IDENTITY)
def sends_updates_in_a_peers_name(field: Field) -> str:
    member = field.member()
    head = member.update(f"{member.run_id}/fit/1/{VICTIM}", client_id=VICTIM)[0]
    field.say(head, UPDATES)
    return field.rejected(UPDATES, f"not the user of {VICTIM}")


@attack(IDENTITY)
def speaks_as_the_server(field: Field) -> str:
    """Its echo would end leases; the words of the server's own are none of a client's."""
    field.say(m.Echo(run_id="r", epoch=1 << 40, sent_at=1e12))
    refusal = field.rejected(CONTROL, "only the server says")
    time.sleep(1.1)  # one word a second about each user
    field.say(m.RunEnded(run_id="r", epoch=9, finished=True, reason="go home"))
    field.rejected(CONTROL, "does not belong here")
    return refusal


@attack(IDENTITY)
def names_further_routing_keys(field: Field) -> str:
    """CC is not covered by topic permissions; of BCC there is nothing to be gained: no other queue is bound."""
    field.say(m.Join(client_id=field.who, session="s"), headers={"BCC": [VICTIM, inbox(VICTIM)]})
    field.say(m.Join(client_id=field.who, session="s"), headers={"CC": [VICTIM]})
    return field.rejected(CONTROL, "CC header")


@attack(IDENTITY)
def sends_without_a_user_id(field: Field) -> str:
    field.say(m.Join(client_id=field.who, session="s"), user_id=None)
    told = field.ground.until("message_rejected", field.since, reason="without a user_id")
    return str(told["message"])


# ---- bytes -----------------------------------------------------------------------------------------------------------


def framed(head: bytes, payload: bytes = b"", declared: int | None = None) -> bytes:
    """A message of ours around any head."""
    size = len(head) if declared is None else declared
    return (
        bytes((0x93, PROTOCOL, 0xC6))
        + size.to_bytes(4, "big")
        + head
        + b"\xc6"
        + len(payload).to_bytes(4, "big")
        + payload
    )


def bombs() -> Iterator[bytes]:
    """Heads that are small on the wire and large in memory, or endless."""
    yield framed(b"\x91" * 100_000 + b"\xc0")  # an array in an array in an array
    yield framed(b"\x81\xa1a" * 30_000 + b"\xc0")  # a map in a map
    yield framed(b"\xdd\xff\xff\xff\xff")  # an array of four billion
    yield framed(b"\xdf\xff\xff\xff\xff")  # a map
    yield framed(b"\xdb\xff\xff\xff\xff")  # a text
    yield framed(b"\xc6\xff\xff\xff\xff")  # bytes
    yield framed(b"\xdc\xff\xff" + b"\x80" * 65_535)  # many empty maps
    yield framed(b"\x92\xa4Join\xde\x10\x00" + b"".join(b"\xcd" + i.to_bytes(2, "big") + b"\xc0" for i in range(4096)))
    yield framed(b"\xc9\x00\x00\x10\x00\x05" + bytes(4096))  # an extension type
    yield framed(b"\xd6\xff\x00\x00\x00\x00")  # a timestamp
    yield framed(b"x", declared=0xFFFFFFFF)
    yield framed(b"\x92\xa4Join\x80", b"payload where none belongs")
    yield bytes((0x93, PROTOCOL + 1)) + b"\xc4\x00\xc4\x00"  # another protocol
    yield b""


@attack(CODEC)
def sends_bombs(field: Field) -> str:
    """Nested, wide, with huge declared sizes, of extension types."""
    for body in bombs():
        field.say(body)
        field.say(body, UPDATES)
    field.rejected(CONTROL, "")
    return field.rejected(UPDATES, "")


@attack(CODEC)
def sends_parts_and_heads_larger_than_allowed(field: Field) -> str:
    field.say(framed(b"\x80", bytes(MAX_PART_BYTES + 1)), UPDATES)
    refusal = field.rejected(UPDATES, "bytes declared")
    field.say(framed(bytes(MAX_HEAD_BYTES + 1)), UPDATES)
    field.say(framed(bytes(MAX_CONTROL_BYTES)))
    field.rejected(CONTROL, f"{MAX_CONTROL_BYTES} at most")
    return refusal


@attack(CODEC)
def writes_control_characters_to_the_terminal(field: Field) -> str:
    """Escape sequences in names, metrics and reasons: none may reach a screen, a log or a label as they are."""
    escape = "\x1b[2J\x1b]0;pwned\x07\n\r\u202e"
    member = field.member()
    task = member.task()
    field.say(m.TaskFailed(client_id=field.who, task_id="t", run_id=escape, reason=escape))
    field.say(encode(m.Join(client_id="x", session=escape)))
    member.send(task.task_id, honest_delta(), schema=(TensorSpec(escape, "<f4", (1,)),), checksum=0, payload=bytes(4))
    refusal = field.update_refused("the model has no tensor")
    report = encode(m.EvaluateReport(client_id=field.who, task_id="t", run_id="r", loss=0.0, num_examples=1,
                                     metrics={"harmless": 1.0}))  # fmt: skip
    field.say(report.replace(b"harmless", b"\x1b[2Jxxxx"))
    field.say(m.Leave(client_id=field.who, session=member.session, run_id=member.run_id, reason=escape))
    field.ground.until("member_lost", field.since, client_id=field.who)
    for told in field.ground.told[field.since :]:
        assert all(value.isprintable() for value in told.values() if isinstance(value, str)), told
    return refusal


# ---- updates ---------------------------------------------------------------------------------------------------------


@attack(CHECKS)
def counts_wrongly(field: Field) -> str:
    """Examples that are none, negative, or more than anybody has; parts of odd sizes; another schema."""
    fields: list[dict[str, object]] = [
        {"num_examples": 0},
        {"num_examples": -5},
        {"num_examples": 1 << 62},
        {"part_bytes": 1},
        {"part_bytes": 1 << 40},
        {"part_bytes": (1 << 16) + 1},
        {"schema": (TensorSpec("w", "<f4", (1 << 37,)),)},
        {"schema": tuple(TensorSpec(f"t{i}", "<f4", (1,)) for i in range(1000))},
        {"metrics": {f"{i:0200}": 1.0 for i in range(200)}},
    ]
    return _each_refused(field, fields)


def _each_refused(field: Field, cases: list[dict[str, object]]) -> str:
    """Each in the task of a round of its own; the last refusal."""
    member = field.member()
    reason = ""
    for case in cases:
        task_id = member.task().task_id
        head = member.update(task_id)[0]
        assert isinstance(head, m.Update)
        field.say(replace(head, **case), UPDATES)  # type: ignore[arg-type]
        verdict = member.verdict(task_id)
        assert isinstance(verdict, m.Refusal), verdict
        assert "nobody waits" not in verdict.reason, (case, verdict)
        reason = verdict.reason
    return field.update_refused(reason[:40])


@attack(CHECKS)
def sends_values_that_are_no_steps(field: Field) -> str:
    """NaN, infinity, and 1e30: finite, but no training moves a weight so far."""
    member = field.member()
    reasons = []
    for value in (math.nan, -math.inf, 1e30):
        task_id = member.task().task_id
        member.send(task_id, honest_delta(value))
        verdict = member.verdict(task_id)
        assert isinstance(verdict, m.Refusal), verdict
        reasons.append(verdict.reason)
    assert ["NaN" in reason for reason in reasons] == [True, True, False], reasons
    return field.update_refused("is too far")


@attack(CHECKS)
def damages_what_it_sends(field: Field) -> str:
    """A checksum that is wrong, parts behind the end, parts of another length."""
    member = field.member()
    damages: list[dict[str, Any]] = [{"checksum": 1}, {"index": 1 << 40}, {"payload": b"short"}]
    for damage in damages:
        task_id = member.task().task_id
        head, part, *_ = member.update(task_id)
        field.say(head, UPDATES)
        field.say(replace(part, **damage), UPDATES)
        verdict = member.verdict(task_id)
        assert isinstance(verdict, m.Refusal), verdict
    return field.update_refused("has 5 bytes")


@attack(ENGINE)
def answers_for_others_and_for_the_past(field: Field) -> str:
    """Tasks of a peer, of another run, of no run, of a round that is over."""
    member = field.member()
    own = member.task().task_id
    for task_id in (f"{member.run_id}/fit/1/{VICTIM}", f"{member.run_id}/fit/1/{field.who}", "x", "\u2028" * 9):
        member.send(task_id)
        verdict = member.verdict(task_id)
        assert isinstance(verdict, m.Refusal), verdict
    member.send(own, run_id="another")
    return field.update_refused("belongs to run another")


@attack("engine, ledger: an update counts once")
def replays_its_own_update(field: Field) -> str:
    """The very bytes, again and again, in this round and the next."""
    member = field.member()
    task_id = member.task().task_id
    messages = member.update(task_id)
    for _ in range(5):
        for message in messages:
            field.say(message, UPDATES)
    field.ground.rounds_go_on(1)
    for message in messages:
        field.say(message, UPDATES)
    field.ground.rounds_go_on(1)
    folded = [told for told in field.ground.told[field.since :] if told.get("event") == "update_folded"]
    rounds = [told["round"] for told in folded if told["client_id"] == field.who]
    assert len(rounds) <= 1, rounds
    return f"folded {len(rounds)} time, sent 6 times"


@attack("Staging: half an update costs its sender's share alone; given up when it stalls")
def never_ends_its_upload(field: Field) -> str:
    """A head, and then nothing; with parts to come for ever."""
    member = field.member()
    head, *_ = member.update(member.task().task_id)
    field.say(head, UPDATES)
    field.ground.rounds_go_on(2)
    return "the rounds close without it"


@attack(GUARD, is_flood=True)
def begins_transfers_without_end(field: Field) -> str:
    """The same task, a new transfer each time."""
    member = field.member()
    head, *_ = member.update(member.task().task_id)
    return field.flood(UPDATES, [replace(head, transfer=f"t{number}") for number in range(256)])


@attack(GUARD, is_flood=True)
def sends_parts_without_heads(field: Field) -> str:
    """Empty ones, which cost nothing but the bookkeeping."""
    return field.flood(UPDATES, [_part(f"t{number}") for number in range(256)])


@attack(GUARD, is_flood=True)
def sends_large_parts_without_heads(field: Field) -> str:
    return field.flood(UPDATES, [_part(f"t{number}", bytes(1 << 20)) for number in range(4)], most=128)


def _part(transfer: str, payload: bytes = b"", index: int = 1) -> m.Part:
    return m.Part(transfer=transfer, index=index, checksum=0, payload=payload)


@attack(GUARD, is_flood=True)
def sends_the_same_part_again_and_again(field: Field) -> str:
    member = field.member()
    head, part, *_ = member.update(member.task().task_id)
    field.say(head, UPDATES)
    return field.flood(UPDATES, [part], most=4000)


@attack(GUARD, is_flood=True)
def floods_with_updates_nobody_waits_for(field: Field) -> str:
    member = field.member()
    heads = [member.update(f"{member.run_id}/fit/{number}/{field.who}")[0] for number in range(64)]
    return field.flood(UPDATES, heads)


@attack(GUARD, is_flood=True)
def floods_updates_with_garbage(field: Field) -> str:
    return field.flood(UPDATES, [b"x" * 100])


@attack(GUARD, is_flood=True)
def floods_without_a_user_id(field: Field) -> str:
    """Nobody need say who it is: then its routing key tells."""
    return field.flood(UPDATES, [_part(f"t{number}") for number in range(64)], is_anonymous=True)


@attack(GUARD, is_flood=True)
def floods_updates_with_large_garbage(field: Field) -> str:
    return field.flood(UPDATES, [b"x" * (4 << 20)], most=32)


@attack(GUARD, is_flood=True)
def floods_updates_with_bombs(field: Field) -> str:
    """A megabyte of empty lists: fifty times as much in memory, for a moment."""
    inner = b"\xdc\xff\xff" + b"\x90" * 65_535
    return field.flood(UPDATES, [framed(b"\xdc\x00\x0f" + inner * 15)])


# ---- control messages ------------------------------------------------------------------------------------------------


@attack(GUARD, is_flood=True)
def floods_control_with_garbage(field: Field) -> str:
    return field.flood(CONTROL, [b"x" * 100])


@attack(GUARD, is_flood=True)
def floods_control_in_a_peers_name(field: Field) -> str:
    return field.flood(CONTROL, [m.Heartbeat(client_id=VICTIM, session="s", run_id="r", fit_task="")])


@attack(GUARD, is_flood=True)
def floods_control_with_heartbeats(field: Field) -> str:
    """As many as it can of what it may well send."""
    member = field.member()
    heartbeat = m.Heartbeat(client_id=field.who, session=member.session, run_id=member.run_id, fit_task="")
    return field.flood(CONTROL, [heartbeat], most=8000)


@attack(GUARD, is_flood=True)
def joins_again_and_again_with_new_sessions(field: Field) -> str:
    return field.flood(CONTROL, [m.Join(client_id=field.who, session=f"s{number}") for number in range(256)])


@attack(GUARD, is_flood=True)
def joins_and_leaves(field: Field) -> str:
    """Each time is a line in the log and in the history, and a round that counts on it."""
    member = field.member()
    leave = m.Leave(client_id=field.who, session="s", run_id=member.run_id, reason="bye")
    return field.flood(CONTROL, [m.Join(client_id=field.who, session="s"), leave])


@attack(GUARD, is_flood=True)
def asks_for_uploads_without_end(field: Field) -> str:
    """Each asks for an answer."""
    member = field.member()
    task_id = member.task().task_id
    return field.flood(
        CONTROL,
        [m.UploadRequest(client_id=field.who, task_id=task_id, run_id=member.run_id, nbytes=1 << 62)],
        most=8000,
    )


@attack("server: a report must be finite and have a weight")
def reports_nonsense_evaluations(field: Field) -> str:
    member = field.member()
    reasons = []
    for loss, examples in ((math.nan, 5), (0.0, 1 << 62), (0.0, -1)):
        task_id = member.evaluate_task().task_id
        before = len(field.ground.look())
        field.say(m.EvaluateReport(client_id=field.who, task_id=task_id, run_id=member.run_id, loss=loss,
                                   num_examples=examples, metrics={}))  # fmt: skip
        reasons.append(field.ground.until("evaluate_failed", before, client_id=field.who)["message"])
    return str(reasons[-1])


@attack("engine: a session and a task are a client's own")
def sends_heartbeats_of_nonsense(field: Field) -> str:
    """Work that it was not given, a peer's task, runs that never were."""
    member = field.member()
    for fit_task in (f"{member.run_id}/fit/1/{VICTIM}", "x" * 4096, "\x00"):
        for run_id in (member.run_id, "y" * 4096):
            field.say(m.Heartbeat(client_id=field.who, session=member.session, run_id=run_id, fit_task=fit_task))
    field.ground.rounds_go_on(1)
    return "nothing changes for anybody"


@attack("rounds close on those who answer")
def answers_everything_slowly(field: Field) -> str:
    """Takes its tasks, and lets them wait."""
    member = field.member()
    member.task()
    field.ground.rounds_go_on(2)
    return "the rounds close without it"

"""A provisioned RabbitMQ: who gets in by TLS, what each user may do there, and who is out at once."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import aiormq
import pytest
from aiormq import exceptions as amqp
from aiormq.abc import AbstractChannel
from typer.testing import CliRunner

from fedbus.bus.access import Access
from fedbus.bus.bundle import Bundle
from fedbus.bus.node import PrivateNode
from fedbus.bus.rabbitmq import connect
from fedbus.bus.topology import (
    BROADCAST,
    CONTROL,
    MODEL,
    TASKS,
    UPDATES,
    MessageQueueKind,
    client_inbox,
    inbox,
    ingress,
    model_stream,
)
from fedbus.cli import provision as commands
from fedbus.cli.broker import broker_app
from fedbus.errors import BrokerDenied, BrokerError, BrokerUnreachable, PublishUnconfirmed, QueueMissing
from fedbus.provision.admin import Admin, ManagementApi, Rabbitmqctl, password_hash
from fedbus.provision.authority import Authority
from fedbus.provision.federation import Desk, members, provision, revoke, rotate
from fedbus.provision.listener import node_office, own_listener
from fedbus.provision.records import Office
from fedbus.provision.rights import QueueBounds
from tests.brokers import MemoryAdmin

pytestmark = [pytest.mark.broker, pytest.mark.usefixtures("rabbitmq_installed")]

Attempt: TypeAlias = Callable[[AbstractChannel], Awaitable[Any]]


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class Place:
    """A reachable node, and the folders of its operator."""

    node: PrivateNode
    office: Office
    folder: Path

    @property
    def desk(self) -> Desk:
        """By the management API, which answers in milliseconds; that rabbitmqctl does the same is a test of its own."""
        return Desk(admin=self.management, office=self.office, now=now())

    @property
    def rabbitmqctl(self) -> Rabbitmqctl:
        return Rabbitmqctl.of_private_node(self.node.state)

    @property
    def management(self) -> ManagementApi:
        url = f"http://fedbus@127.0.0.1:{self.node.state.management_port}"
        password = (self.node.data_dir / "password").read_text()
        return ManagementApi(url, password=lambda: password)

    def provision(self, federation: str, *clients: str, **options: Any) -> dict[str, Bundle]:
        """All new members, by who they are."""
        host = f"127.0.0.1:{self.node.state.tls_port}"
        folder = self.folder / federation
        issue = provision(self.desk, federation, clients, hosts=[host], folder=folder, **options)
        return {path.stem: Bundle.load(path) for path in issue.bundles.values()}


@pytest.fixture(scope="module")
def place(rabbitmq_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One node that others reach, with the management API, for all tests here: take your own federation."""
    folder = tmp_path_factory.mktemp("operator")
    office = node_office(folder)
    listener = own_listener(office, "127.0.0.1", port=None, hosts=(), login="certificate", now=now())
    with PrivateNode(listener=listener, management_port=0) as node:
        yield Place(node, office, folder)


@pytest.fixture(scope="module")
def hospitals(place: Place) -> dict[str, Bundle]:
    """A federation whose server has come up once: its exchanges and queues are there."""
    bundles = place.provision("hospitals", "a", "b", workers=True)
    asyncio.run(_come_up(bundles["server"].access))
    return bundles


async def _come_up(access: Access) -> None:
    async with await connect(access) as bus:
        await bus.declare(ingress())
        await bus.declare(model_stream(1 << 20))
        for client in ("a", "b"):
            await bus.declare(client_inbox(client))


@asynccontextmanager
async def link(access: Access) -> AsyncIterator[aiormq.Connection]:
    """A bare connection, for what our own bus would never try."""
    (url,) = access.each_url
    connection = aiormq.Connection(url, context=access.tls_context(url))
    await connection.connect()
    try:
        yield connection
    finally:
        await connection.close()
        await asyncio.sleep(0.02)  # its socket is closed some turns of the loop later


def publish(exchange: str, key: str, **properties: Any) -> Attempt:
    sent = aiormq.spec.Basic.Properties(**properties)
    return lambda channel: channel.basic_publish(b"x", exchange=exchange, routing_key=key, properties=sent)


def consume(queue: str, **arguments: Any) -> Attempt:
    async def attempt(channel: AbstractChannel) -> None:
        async def ignore(_: object) -> None: ...

        await channel.basic_qos(prefetch_count=10)
        await channel.basic_consume(queue, ignore, **arguments)

    return attempt


async def refusal(connection: aiormq.Connection, attempt: Attempt) -> str:
    """What the broker says to `attempt`; "" when it lets it be."""
    channel = await connection.channel(publisher_confirms=True)
    try:
        await attempt(channel)
    except (amqp.ChannelAccessRefused, amqp.ChannelPreconditionFailed) as exc:
        return str(exc)
    await channel.close()
    return ""


# ---- who gets in -----------------------------------------------------------------------------------------------------


async def test_a_bundle_lets_its_owner_in_by_its_certificate(hospitals: dict[str, Bundle]) -> None:
    async with await connect(hospitals["a"].access) as bus:
        assert bus.user == "hospitals.a"
        await bus.publish(CONTROL, "a", b"hello")
        async with bus.consume(inbox("a"), prefetch=1, exclusive=True):
            pass


async def test_who_shows_nothing_or_the_wrong_thing_stays_out_and_is_told_why(
    place: Place, hospitals: dict[str, Bundle], tmp_path: Path
) -> None:
    access = hospitals["a"].access
    ours = Authority.load(place.office.folder)
    assert ours is not None
    theirs = Authority.create("somebody else", now=now())
    expired = ours.issue_user("hospitals.a", now=now() - datetime.timedelta(days=9), days=8)
    foreign = theirs.issue_user("hospitals.a", now=now())
    unknown = ours.issue_user("hospitals.c", now=now())
    cases: list[tuple[Access, type[BrokerError], str]] = [
        (replace(access, ca=theirs.pem), BrokerUnreachable, "cannot be trusted"),
        (replace(access, ca=None), BrokerUnreachable, "cannot be trusted"),
        (replace(access, certificate=None, key=None), BrokerDenied, "certificate"),
        (replace(access, certificate=expired.certificate, key=expired.key), BrokerDenied, "expired"),
        (replace(access, certificate=foreign.certificate, key=foreign.key), BrokerDenied, "authority"),
        (replace(access, certificate=unknown.certificate, key=unknown.key), BrokerDenied, "by this certificate"),
    ]
    for wrong, error, words in cases:
        with pytest.raises(error, match=words) as raised:
            await connect(wrong)
        assert "\n" not in str(raised.value)


async def test_another_clients_certificate_says_nothing_in_our_name(hospitals: dict[str, Bundle]) -> None:
    ours, theirs = hospitals["a"].access, hospitals["b"].access
    async with link(replace(ours, certificate=theirs.certificate, key=theirs.key)) as connection:
        assert "user_id" in await refusal(connection, publish(CONTROL, "b", user_id="hospitals.a"))
        assert "refused" in await refusal(connection, publish(CONTROL, "a"))
        assert "refused" in await refusal(connection, consume(inbox("a")))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_is_new_enough_and_its_ciphers_are_good(
    place: Place, hospitals: dict[str, Bundle], version: ssl.TLSVersion
) -> None:
    (url,) = hospitals["a"].access.each_url
    context = hospitals["a"].access.tls_context(url)
    assert context is not None
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    _, writer = await asyncio.open_connection("127.0.0.1", place.node.state.tls_port, ssl=context)
    cipher, _, bits = writer.get_extra_info("cipher")
    writer.close()
    assert re.search("GCM|CHACHA20", cipher)
    assert bits >= 128
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AES+SHA256:ECDHE+AES+SHA1:AESCCM8:@SECLEVEL=0")
    weak = [cipher["name"] for cipher in context.get_ciphers() if "TLS_" not in cipher["name"]]
    assert weak
    with pytest.raises(ssl.SSLError, match=r"(?i)handshake.failure|insufficient.security"):
        await asyncio.open_connection("127.0.0.1", place.node.state.tls_port, ssl=context)


async def test_plain_amqp_and_the_administrator_stay_on_this_machine(place: Place) -> None:
    settings = (place.node.data_dir / "rabbitmq.conf").read_text()
    tcp = [line for line in settings.splitlines() if line.startswith("listeners.tcp")]
    assert tcp == [f"listeners.tcp.1 = 127.0.0.1:{place.node.port}"]
    assert "loopback_users.fedbus = true" in settings
    assert "management.tcp.ip = 127.0.0.1" in settings


# ---- what they may do ------------------------------------------------------------------------------------------------


def what_no_client_may() -> dict[str, Attempt]:
    own, peers = inbox("a"), inbox("b")
    return {
        "declare a queue": lambda channel: channel.queue_declare("mine", durable=True),
        "declare one without a name": lambda channel: channel.queue_declare(""),
        "declare its own lock": lambda channel: channel.queue_declare("fedbus.lock.client.a", exclusive=True),
        "declare an inbox": lambda channel: channel.queue_declare(inbox("c"), durable=True),
        "declare an exchange": lambda channel: channel.exchange_declare("mine"),
        "delete its inbox": lambda channel: channel.queue_delete(own),
        "delete the queue of updates": lambda channel: channel.queue_delete(UPDATES),
        "delete an exchange": lambda channel: channel.exchange_delete(CONTROL),
        "purge the queue of updates": lambda channel: channel.queue_purge(UPDATES),
        "bind its inbox": lambda channel: channel.queue_bind(own, TASKS, "b"),
        "unbind a peer's inbox": lambda channel: channel.queue_unbind(peers, TASKS, "b"),
        "have models sent to the server": lambda channel: channel.exchange_bind(CONTROL, BROADCAST),
        "have tasks sent to the server": lambda channel: channel.exchange_bind(UPDATES, TASKS, "b"),
        "have peers' messages sent twice": lambda channel: channel.exchange_bind(UPDATES, CONTROL, "#"),
        "read a peer's inbox": consume(peers),
        "fetch from a peer's inbox": lambda channel: channel.basic_get(peers),
        "read control messages": consume(CONTROL),
        "read updates": consume(UPDATES),
        "read dead letters": consume("fedbus.dead"),
        "publish a model": publish(BROADCAST, ""),
        "publish tasks": publish(TASKS, "b"),
        "publish dead letters": publish("fedbus.dead", ""),
        "publish to a queue directly": publish("", peers),
        "publish to a topic": publish("amq.topic", "a"),
        "publish to all": publish("amq.fanout", "a"),
        "publish to a trace": publish("amq.rabbitmq.trace", "a"),
        "speak as a peer": publish(CONTROL, "b"),
        "send updates as a peer": publish(UPDATES, "b"),
        "speak with a key like its own": publish(CONTROL, "a.b"),
        "speak with a key that a line feed ends": publish(CONTROL, "a\n"),
        "speak as a user that it is not": publish(CONTROL, "a", user_id="hospitals.b"),
        "speak as the server": publish(CONTROL, "a", user_id="hospitals.server"),
    }


async def test_a_client_may_do_what_it_must_and_nothing_else(hospitals: dict[str, Bundle]) -> None:
    async with link(hospitals["a"].access) as connection:
        answers = {name: await refusal(connection, attempt) for name, attempt in what_no_client_may().items()}
        due = ("ACCESS_REFUSED", "user_id property")
        assert [name for name, answer in answers.items() if not any(words in answer for words in due)] == []
        allowed = [
            publish(CONTROL, "a", user_id="hospitals.a"),
            publish(UPDATES, "a"),
            consume(inbox("a"), exclusive=True),
            consume(MODEL, arguments={"x-stream-offset": "first"}),
        ]
        assert [await refusal(connection, attempt) for attempt in allowed] == [""] * 4


async def test_nobody_keeps_the_others_from_the_model(hospitals: dict[str, Bundle]) -> None:
    async with link(hospitals["a"].access) as greedy, link(hospitals["b"].access) as honest:
        await (consume(MODEL, exclusive=True, arguments={"x-stream-offset": "first"}))(await greedy.channel())
        assert await refusal(honest, consume(MODEL, arguments={"x-stream-offset": "first"})) == ""


async def test_a_worker_speaks_for_virtual_clients_alone(hospitals: dict[str, Bundle]) -> None:
    async with link(hospitals["worker"].access) as connection:
        for key, is_allowed in (
            ("virtual-00001-of-00100", True),
            ("virtual-00001-of-00100\n", False),
            ("a", False),
            ("server", False),
        ):
            assert (await refusal(connection, publish(CONTROL, key)) == "") is is_allowed
        for attempt in (consume(inbox("a")), consume(UPDATES), publish(TASKS, "a"), publish(BROADCAST, "")):
            assert "ACCESS_REFUSED" in await refusal(connection, attempt)


async def test_a_server_has_what_is_the_federations_and_nothing_else(hospitals: dict[str, Bundle]) -> None:
    async with link(hospitals["server"].access) as connection:
        attempts: list[Attempt] = [
            lambda channel: channel.queue_declare("elsewhere"),
            publish("", "elsewhere"),
            publish("amq.topic", "x"),
        ]
        for attempt in attempts:
            assert "ACCESS_REFUSED" in await refusal(connection, attempt)
        assert await refusal(connection, lambda channel: channel.queue_declare("fedbus.work", durable=True)) == ""
        assert await refusal(connection, publish(TASKS, "nobody")) == ""


async def test_a_client_has_eight_connections_at_most(hospitals: dict[str, Bundle]) -> None:
    access = hospitals["b"].access
    (url,) = access.each_url
    connections = [aiormq.Connection(url, context=access.tls_context(url)) for _ in range(9)]
    opened = 0
    try:
        for connection in connections:
            await connection.connect()
            opened += 1
    except amqp.AMQPError:
        pass
    finally:
        for connection in connections[:opened]:
            await connection.close()
    assert opened == 8


@pytest.mark.parametrize("kind", ["quorum", "classic"])
async def test_a_full_queue_of_updates_refuses_and_drops_nothing(place: Place, kind: MessageQueueKind) -> None:
    bundles = place.provision(f"small-{kind}", "a", bounds=QueueBounds(updates=3))
    async with await connect(bundles["server"].access) as server, await connect(bundles["a"].access) as client:
        await server.declare(ingress(update_queue=kind))
        confirmed = 0
        with contextlib.suppress(PublishUnconfirmed):
            while confirmed < 50:  # a quorum queue tells a moment later that it is full
                await client.publish(UPDATES, "a", b"%d" % confirmed)
                confirmed += 1
        async with server.consume(UPDATES, prefetch=50) as consumer:
            kept = [bytes((await consumer.receive()).body) for _ in range(confirmed)]
        assert kept == [b"%d" % number for number in range(confirmed)]
        assert 3 <= confirmed < 50


async def test_federations_on_one_broker_see_nothing_of_one_another(place: Place, hospitals: dict[str, Bundle]) -> None:
    shops = place.provision("shops", "a")
    assert shops["a"].user == "shops.a"
    for mine, theirs in ((shops["a"], "hospitals"), (hospitals["server"], "shops"), (shops["server"], "%2F")):
        urls = re.sub(r"/(hospitals|shops)\?", f"/{theirs}?", mine.access.urls)
        with pytest.raises(BrokerDenied, match="refuses the vhost"):
            await connect(replace(mine.access, urls=urls))
    async with await connect(shops["server"].access) as bus:
        await bus.declare(ingress())
        await bus.declare(client_inbox("a"))
        await bus.publish(TASKS, "a", b"for the shop")
        assert (await bus.queue_state(inbox("a"))).messages == 1
    async with await connect(hospitals["server"].access) as bus, bus.consume(inbox("a"), prefetch=1) as consumer:
        await bus.publish(TASKS, "a", b"for the hospital")
        assert bytes((await consumer.receive()).body) == b"for the hospital"


# ---- who is out ------------------------------------------------------------------------------------------------------


async def ends(connection: aiormq.Connection) -> None:
    """Wait until the broker ends the connection."""
    async with asyncio.timeout(10):
        await asyncio.wait([connection.closing])


async def test_a_revoked_client_is_out_at_once_and_for_good(place: Place) -> None:
    bundles = place.provision("clinics", "a", "b")
    async with link(bundles["a"].access) as one, link(bundles["b"].access) as two:
        listing = await asyncio.to_thread(members, replace(place.desk, admin=place.rabbitmqctl), "clinics")
        assert [member.connections for member in listing] == [0, 1, 1]
        assert await asyncio.to_thread(revoke, place.desk, "clinics", ["a"]) == ["clinics.a"]
        await ends(one)
        assert not two.closing.done()
    with pytest.raises(BrokerDenied, match="by this certificate"):
        await connect(bundles["a"].access)
    again = await asyncio.to_thread(place.provision, "clinics", "a", readmit=True)
    assert again["a"].user == "clinics.a~2"
    async with await connect(again["a"].access):
        pass
    with pytest.raises(BrokerDenied, match="by this certificate"):
        await connect(bundles["a"].access)


async def test_a_new_secret_ends_the_old_one(place: Place) -> None:
    old = place.provision("labs", "a", login="password")["a"]
    plain = f"@127.0.0.1:{place.node.port}/"  # the TLS listener here takes nobody without a certificate
    async with link(Access(re.sub("^amqps(.*)@[^/]*/", rf"amqp\1{plain}", old.access.urls))) as connection:
        await asyncio.to_thread(rotate, place.desk, "labs", [], folder=place.folder / "labs")
        await ends(connection)
    new = Bundle.load(place.folder / "labs" / "a.json")
    assert new.user == "labs.a~2"
    for bundle, is_in in ((old, False), (new, True)):
        access = Access(re.sub("^amqps(.*)@[^/]*/", rf"amqp\1{plain}", bundle.access.urls))
        if is_in:
            async with await connect(access) as bus:
                assert bus.user == "labs.a~2"
        else:
            with pytest.raises(BrokerDenied, match="refuses the user or the password"):
                await connect(access)


# ---- by rabbitmqctl, and by the management API -----------------------------------------------------------------------


@pytest.fixture(params=["memory", "rabbitmqctl", "management"])
def admin(request: pytest.FixtureRequest) -> Admin:
    if request.param == "memory":
        return MemoryAdmin()
    place: Place = request.getfixturevalue("place")
    return place.rabbitmqctl if request.param == "rabbitmqctl" else place.management


def entries(admin: Admin, category: str, **wanted: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = admin.definitions()[category]
    return [entry for entry in listed if wanted.items() <= entry.items()]


def test_what_is_imported_is_there_and_what_was_there_stays(admin: Admin) -> None:
    account = {"name": "contract.a", "tags": "", "limits": {"max-connections": 3}, **password_hash("secret")}
    grant = {"user": "contract.a", "vhost": "contract", "configure": "^$", "write": "^w$", "read": "^$"}
    admin.import_definitions({"vhosts": [{"name": "contract"}], "users": [account], "permissions": [grant]})
    admin.import_definitions({"permissions": [{**grant, "write": "^v$"}]})
    assert re.match(r"\d+\.\d+", admin.definitions()["rabbitmq_version"])
    (user,) = entries(admin, "users", name="contract.a")
    assert (user["password_hash"], user["limits"]) == (account["password_hash"], {"max-connections": 3})
    (permission,) = entries(admin, "permissions", user="contract.a")
    assert permission["write"] == "^v$"
    admin.delete_user("contract.a")
    admin.delete_user("contract.a")  # it is gone: fine
    assert entries(admin, "users", name="contract.a") == entries(admin, "permissions", user="contract.a") == []
    assert entries(admin, "vhosts", name="contract")


@pytest.mark.parametrize("by", ["rabbitmqctl", "management"])
async def test_a_queue_is_deleted_and_one_that_is_gone_is_no_error(place: Place, by: str) -> None:
    admin = place.rabbitmqctl if by == "rabbitmqctl" else place.management
    bundles = place.provision(f"queues-{by}", "a")
    async with await connect(bundles["server"].access) as server:
        await server.declare(ingress())
        await server.declare(client_inbox("a"))
        for _ in range(2):
            await asyncio.to_thread(admin.delete_queue, f"queues-{by}", inbox("a"))
        with pytest.raises(QueueMissing):
            await server.queue_state(inbox("a"))


@pytest.mark.parametrize("by", ["rabbitmqctl", "management"])
async def test_connections_are_listed_and_closed(place: Place, by: str) -> None:
    admin = place.rabbitmqctl if by == "rabbitmqctl" else place.management
    federation = f"closing-{by}"
    bundles = place.provision(federation, "a")
    async with link(bundles["a"].access) as connection:
        async with asyncio.timeout(20):  # the API tells of a connection some seconds later
            while federation not in [each.vhost for each in await asyncio.to_thread(admin.connections)]:
                pass
        await asyncio.to_thread(admin.close_connections, f"{federation}.a", "for a test")
        await ends(connection)


def test_an_administration_that_says_no_says_so_in_one_line(place: Place) -> None:
    port = place.node.state.management_port
    stranger = ManagementApi(f"http://fedbus@127.0.0.1:{port}", password=lambda: "wrong")
    with pytest.raises(BrokerDenied, match="tag administrator"):
        stranger.definitions()
    with pytest.raises(BrokerUnreachable, match="no management API answers"):
        ManagementApi("http://fedbus@127.0.0.1:1", password=lambda: "").definitions()
    with pytest.raises(BrokerUnreachable, match="no management API answers"):
        ManagementApi(f"http://fedbus@127.0.0.1:{place.node.port}", password=lambda: "").definitions()
    for admin in (place.management, place.rabbitmqctl):
        with pytest.raises(BrokerError) as raised:
            admin.import_definitions({"users": [{"name": "no-tags"}]})
        assert "\n" not in str(raised.value)


# ---- the commands ----------------------------------------------------------------------------------------------------


def run(*arguments: str) -> str:
    result = CliRunner().invoke(broker_app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_operators_day_at_the_command_line(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rabbitmqctl, then by the management API: the same broker, the same records."""
    monkeypatch.setattr(commands, "detached_state", lambda name: place.node.state)
    common = ["--authority", str(place.office.folder)]
    out = ["--out", str(tmp_path / "out")]
    shown = run("provision", "day", "--clients", "a, b", *out, *common)
    assert f"day.a: {tmp_path}/out/a.json" in shown
    assert "delete your copy" in shown
    assert Bundle.load(tmp_path / "out" / "b.json").access.urls.endswith("/day?auth=external")
    assert json.loads(run("provision", "day", "--clients", "a", "--json", *out, *common))["kept"] == [
        "day.server",
        "day.a",
    ]
    monkeypatch.setenv("FEDBUS_MANAGEMENT", f"http://fedbus@127.0.0.1:{place.node.state.management_port}")
    monkeypatch.setenv("FEDBUS_MANAGEMENT_PASSWORD", (place.node.data_dir / "password").read_text())
    assert json.loads(run("rotate", "day", "a", "--json", *out, *common))["bundles"] == {
        "day.a~2": f"{tmp_path}/out/a.json"
    }
    assert "day.b is out" in run("revoke", "day", "b", *common)
    listed = run("list", "day", *common)
    assert re.search(r"^day +a +no +20\d\d-\d\d-\d\d$", listed, re.MULTILINE)
    assert re.search(r"^day +b +- +out since ", listed, re.MULTILINE)
    assert "broker's certificate: until" in listed
    everything = json.loads(run("list", "--json", *common))
    assert {"day.server", "day.a~2"} <= {member["user"] for member in everything["members"]}

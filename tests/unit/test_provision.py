"""Provision, rotate, revoke and list against a broker in memory: what is issued, to whom, and what stays as it is."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path

import pytest
from cryptography.x509.oid import NameOID

from fedbus.bus.bundle import Bundle
from fedbus.bus.node import TlsListener
from fedbus.cli.provision import Door, listener_for
from fedbus.errors import BrokerError, ConfigError, UsageError
from fedbus.provision.admin import Definitions, ManagementApi, OpenConnection, password_hash
from fedbus.provision.authority import Authority, hosts_of, parse_certificates
from fedbus.provision.federation import Desk, check_host, members, provision, revoke, rotate
from fedbus.provision.listener import broker_certificate, node_office, own_listener
from fedbus.provision.records import Office
from fedbus.provision.rights import QueueBounds
from tests.brokers import MemoryAdmin

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
HOSTS = ("10.0.0.1",)


@pytest.fixture
def admin() -> MemoryAdmin:
    return MemoryAdmin()


@pytest.fixture
def desk(admin: MemoryAdmin, tmp_path: Path) -> Desk:
    office = Office(tmp_path / "office")
    office.found("test CA", NOW)
    return Desk(admin=admin, office=office, now=NOW)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def users(admin: MemoryAdmin) -> set[str]:
    return {user["name"] for user in admin.definitions()["users"]}


def common_name(bundle: Bundle) -> object:
    (certificate,) = parse_certificates(bundle.access.certificate or "")
    return certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value


def test_each_member_gets_a_bundle_that_is_its_own(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    issue = provision(desk, "f", ["a", "b"], workers=True, hosts=HOSTS, folder=out)
    assert {path.name for path in out.iterdir()} == {"server.json", "worker.json", "a.json", "b.json"}
    assert set(issue.bundles) == users(admin) == {"f.server", "f.worker", "f.a", "f.b"}
    for user, path in issue.bundles.items():
        assert path.stat().st_mode & 0o777 == 0o600
        bundle = Bundle.load(path)
        assert bundle.user == user == common_name(bundle)
        assert bundle.access.urls == f"amqps://{user}@10.0.0.1:5671/f?auth=external"
        assert bundle.access.ca == desk.office.trusted()
    assert Bundle.load(out / "a.json").client_id == "a"
    assert [Bundle.load(out / f"{who}.json").role for who in ("server", "worker", "b")] == [
        "server",
        "worker",
        "client",
    ]


def test_nobody_has_a_password_who_logs_in_by_certificate(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    provision(desk, "f", ["a"], hosts=HOSTS, folder=out)
    assert [user["password_hash"] for user in admin.definitions()["users"]] == ["", ""]
    assert [user["tags"] for user in admin.definitions()["users"]] == ["", ""]


def test_the_broker_never_sees_a_password_and_the_records_no_secret(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    provision(desk, "f", ["a"], hosts=HOSTS, login="password", folder=out)
    bundle = json.loads((out / "a.json").read_text())
    password = bundle["broker"].removeprefix("amqps://f.a:").partition("@")[0]
    assert len(password) >= 32
    assert bundle["certificate"] is bundle["key"] is None
    known = json.dumps(admin.definitions()) + (desk.office.folder / "records.json").read_text()
    assert password not in known
    provision(desk, "g", ["a"], hosts=HOSTS, folder=out)
    assert "PRIVATE" not in (desk.office.folder / "records.json").read_text()


def test_who_comes_later_is_added_and_the_others_keep_what_they_have(desk: Desk, out: Path) -> None:
    provision(desk, "f", ["a"], hosts=HOSTS, folder=out)
    before = {path.name: path.read_text() for path in out.iterdir()}
    issue = provision(desk, "f", ["b", "a", "b"], folder=out)
    assert set(issue.bundles) == {"f.b"}
    assert set(issue.kept) == {"f.server", "f.a"}
    assert {path.name: path.read_text() for path in out.iterdir() if path.name != "b.json"} == before
    assert "10.0.0.1" in Bundle.load(out / "b.json").access.urls  # as was said the first time


def test_rights_that_have_changed_since_are_set_again(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    provision(desk, "f", ["a"], hosts=HOSTS, folder=out)
    due = admin.definitions()["permissions"]
    admin.import_definitions({"permissions": [{**entry, "write": ".*"} for entry in due]})
    provision(desk, "f", [], folder=out)
    assert admin.definitions()["permissions"] == due


def test_bounds_stay_as_they_were_said_until_others_are_said(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    def bound() -> object:
        (policy,) = [entry for entry in admin.definitions()["parameters"] if entry["name"] == "fedbus-updates"]
        return policy["value"]["definition"]["max-length-bytes"]

    provision(desk, "f", [], hosts=HOSTS, folder=out)
    assert bound() == 4 << 30
    provision(desk, "f", [], folder=out, bounds=QueueBounds(updates_bytes=1 << 30))
    assert bound() == 1 << 30
    provision(desk, "f", ["a"], folder=out)
    assert bound() == 1 << 30


def test_only_what_is_new_is_sent_to_the_broker(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    provision(desk, "f", ["a", "b"], hosts=HOSTS, folder=out)
    sent: list[Definitions] = []
    admin.import_definitions = sent.append  # type: ignore[method-assign, assignment]
    provision(desk, "f", ["a", "c"], folder=out)
    (definitions,) = sent
    assert {category: len(entries) for category, entries in definitions.items()} == {
        "vhosts": 0,
        "policies": 0,
        "parameters": 0,
        "permissions": 1,
        "topic_permissions": 2,
        "users": 1,
    }


def test_the_cluster_is_reached_by_each_of_its_nodes(desk: Desk, out: Path) -> None:
    provision(desk, "f", ["a"], hosts=("one.example.org", "two.example.org:5673"), folder=out)
    assert Bundle.load(out / "a.json").access.each_url == tuple(
        f"amqps://f.a@{host}/f?auth=external&heartbeat=10" for host in ("one.example.org:5671", "two.example.org:5673")
    )


def test_a_new_secret_is_a_new_user_and_the_old_one_is_gone(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    provision(desk, "f", ["a", "b"], hosts=HOSTS, folder=out)
    kept = (out / "b.json").read_text()
    issue = rotate(desk, "f", ["a"], folder=out)
    assert set(issue.bundles) == {"f.a~2"}
    assert users(admin) == {"f.server", "f.a~2", "f.b"}
    assert common_name(Bundle.load(out / "a.json")) == "f.a~2"
    assert (out / "b.json").read_text() == kept
    assert set(rotate(desk, "f", [], folder=out).bundles) == {"f.server~2", "f.a~3", "f.b~2"}
    assert users(admin) == {"f.server~2", "f.a~3", "f.b~2"}


def test_a_name_that_a_certificate_was_issued_for_is_never_given_again(
    desk: Desk, admin: MemoryAdmin, out: Path
) -> None:
    provision(desk, "f", ["a"], hosts=HOSTS, folder=out)
    assert revoke(desk, "f", ["a"]) == ["f.a"]
    assert users(admin) == {"f.server"}
    assert admin.deleted_queues == [("f", "fedbus.inbox.a")]
    again = provision(desk, "f", ["a"], folder=out)  # a list that still has it
    assert (again.bundles, again.out, users(admin)) == ({}, ["a"], {"f.server"})
    assert set(provision(desk, "f", ["a"], folder=out, readmit=True).bundles) == {"f.a~2"}
    revoke(desk, "f", ["a"])
    provision(desk, "f", ["a"], login="password", folder=out, readmit=True)
    assert Bundle.load(out / "a.json").user == "f.a~3"


def test_connections_that_the_broker_leaves_open_are_closed(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    class Slow(MemoryAdmin):
        def delete_user(self, user: str) -> None:
            still = self.open
            super().delete_user(user)
            self.open = still

    admin.__class__ = Slow
    provision(desk, "f", ["a", "b"], hosts=HOSTS, folder=out)
    admin.open = [OpenConnection(user=user, vhost="f", name=user) for user in ("f.a", "f.a", "f.b")]
    revoke(desk, "f", ["a"])
    assert [user for user, _ in admin.closed] == ["f.a"]
    assert [connection.user for connection in admin.open] == ["f.b"]


def test_an_import_that_fails_leaves_bundles_as_they_were_and_may_be_tried_again(
    desk: Desk, admin: MemoryAdmin, out: Path
) -> None:
    provision(desk, "f", ["a"], hosts=HOSTS, folder=out)
    before = (out / "a.json").read_text()
    admin.fails = True
    with pytest.raises(BrokerError):
        rotate(desk, "f", ["a"], folder=out)
    assert {path.name: path.read_text() for path in out.iterdir()}["a.json"] == before
    assert {path.name for path in out.iterdir()} == {"a.json", "server.json"}
    assert "f.a" in users(admin)
    assert set(rotate(desk, "f", ["a"], folder=out).bundles) == {"f.a~3"}  # f.a~2 was noted


def test_what_an_interrupted_rotation_left_goes_with_the_next_one(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    provision(desk, "f", ["a"], hosts=HOSTS, folder=out)
    deletes, admin.delete_user = admin.delete_user, lambda user: None  # type: ignore[method-assign]
    rotate(desk, "f", ["a"], folder=out)
    admin.delete_user = deletes  # type: ignore[method-assign]
    assert users(admin) == {"f.server", "f.a", "f.a~2"}
    assert [member.user for member in members(desk, "f")] == ["f.server", "f.a~2"]
    revoke(desk, "f", ["a"])
    assert users(admin) == {"f.server"}


def test_a_vhost_of_somebody_else_is_left_alone(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    admin.import_definitions({"vhosts": [{"name": "shop"}]})
    with pytest.raises(ConfigError, match="choose another name"):
        provision(desk, "shop", ["a"], hosts=HOSTS, folder=out)
    assert users(admin) == set()


def test_overflow_is_the_operators_word_where_the_broker_knows_it(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    provision(desk, "old", [], hosts=HOSTS, folder=out)
    admin.version = "4.1.2"
    provision(desk, "new", [], hosts=HOSTS, folder=out)
    told = {
        entry["vhost"]: entry["value"]["definition"].get("overflow")
        for entry in admin.definitions()["parameters"]
        if entry["name"] == "fedbus-updates"
    }
    assert told == {"old": None, "new": "reject-publish"}


def test_the_list_says_who_is_connected_until_when_and_who_is_out(desk: Desk, admin: MemoryAdmin, out: Path) -> None:
    provision(desk, "f", ["a", "b"], workers=True, hosts=HOSTS, folder=out, days=30)
    provision(desk, "g", ["a"], hosts=HOSTS, folder=out, login="password")
    admin.open = [OpenConnection(user="f.a", vhost="f", name=str(number)) for number in range(2)]
    revoke(desk, "f", ["b"])
    listed = members(desk)
    assert [(member.federation, member.who, member.connections) for member in listed] == [
        ("f", "server", 0),
        ("f", "a", 2),
        ("f", "b", None),
        ("f", "worker", 0),
        ("g", "server", 0),
        ("g", "a", 0),
    ]
    assert listed[1].not_after == "2030-01-31T00:00:00+00:00"
    assert listed[2].revoked_at == "2030-01-01T00:00:00+00:00"
    assert listed[5].not_after is None
    provision(desk, "f", ["b"], folder=out, readmit=True)
    assert [member.revoked_at for member in members(desk, "f") if member.who == "b"] == [None]


def test_what_cannot_be_done_is_said_in_one_line(desk: Desk, out: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--host"):
        provision(desk, "f", ["a"], folder=out)
    with pytest.raises(ConfigError, match="no federation"):
        rotate(desk, "f", [], folder=out)
    provision(desk, "f", ["a"], hosts=HOSTS, folder=out)
    with pytest.raises(ConfigError, match="'x' is no member"):
        revoke(desk, "f", ["a", "x"])
    with pytest.raises(ConfigError, match="no federation 'nope'"):
        members(desk, "nope")
    elsewhere = Desk(admin=desk.admin, office=Office(tmp_path / "elsewhere"), now=NOW)
    with pytest.raises(ConfigError, match="provision it from here"):
        rotate(elsewhere, "f", [], folder=out)
    with pytest.raises(ConfigError, match="certificates need a CA"):
        provision(elsewhere, "g", [], hosts=HOSTS, login="certificate", folder=out)
    assert provision(elsewhere, "g", [], hosts=HOSTS, folder=out).login == "password"


def test_damaged_records_are_not_taken_for_empty_ones(desk: Desk, out: Path) -> None:
    provision(desk, "f", ["a"], hosts=HOSTS, folder=out)
    (desk.office.folder / "records.json").write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        members(desk, "f")


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("rabbit.example.org", "rabbit.example.org:5671"),
        ("10.0.0.1:443", "10.0.0.1:443"),
        ("::1", "[::1]:5671"),
        ("[fd00::1]:5672", "[fd00::1]:5672"),
    ],
)
def test_a_host_has_a_port(given: str, full: str) -> None:
    assert check_host(given) == full


@pytest.mark.parametrize("given", ["", "a b", "a/b", "user@a", "a:port", "a:0x", "a,b", "amqps://a", "a?b"])
def test_what_is_no_host_is_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="is no host"):
        check_host(given)


def test_a_ca_without_its_key_lets_members_know_the_broker_and_log_in_by_password(
    admin: MemoryAdmin, out: Path, tmp_path: Path
) -> None:
    office = Office(tmp_path / "brought")
    authority = Authority.create("somebody's", now=NOW)
    office.adopt(authority.pem, None)
    desk = Desk(admin=admin, office=office, now=NOW)
    assert provision(desk, "f", ["a"], hosts=HOSTS, folder=out).login == "password"
    assert Bundle.load(out / "a.json").access.ca == authority.pem
    with pytest.raises(ConfigError, match="another CA"):
        office.adopt(Authority.create("another", now=NOW).pem, None)
    with pytest.raises(ConfigError, match="kept elsewhere"):
        office.found("x", NOW)


# ---- the private node's own certificate ------------------------------------------------------------------------------


def test_a_node_makes_its_certificate_once_and_again_when_it_must(tmp_path: Path) -> None:
    office = node_office(tmp_path)

    def listen(*hosts: str, days: int = 0) -> TlsListener:
        return own_listener(office, "127.0.0.1", port=None, hosts=hosts, login="certificate", now=NOW + days * DAY)

    listener = listen()
    assert listener.require_certificate
    assert listener.key.stat().st_mode & 0o777 == 0o600
    first = listener.certificate.read_text()
    shown = broker_certificate(office)
    assert shown is not None
    assert hosts_of(shown) == {"127.0.0.1", "localhost"}
    listen(days=400)
    assert listener.certificate.read_text() == first
    listen(days=600)  # it would end soon
    second = listener.certificate.read_text()
    listen("rabbit.example.org", days=600)  # another name
    third = listener.certificate.read_text()
    assert len({first, second, third}) == 3
    listener.certificate.write_text("broken")
    listen(days=600)
    assert len(parse_certificates(listener.certificate.read_text())) == 1


def door(listen: str | None = "127.0.0.1", **given: Path) -> Door:
    brought = {name: given.get(name) for name in ("ca", "ca_key", "certificate", "key")}
    return Door(listen=listen, tls_port=5671, hosts=(), login="password", **brought)


def test_a_node_shows_a_certificate_that_was_brought_along(tmp_path: Path) -> None:
    authority = Authority.create("somebody's", now=NOW)
    issued = authority.issue_broker(["127.0.0.1"], now=NOW)
    files = {"ca": authority.pem, "certificate": issued.certificate, "key": issued.key}
    paths = {name: tmp_path / name for name in files}
    for name, text in files.items():
        paths[name].write_text(text)
    listener = listener_for(tmp_path / "node", door("127.0.0.1", **paths))
    assert listener is not None
    assert not listener.require_certificate
    assert listener.certificate.read_text() == issued.certificate
    assert listener.key.stat().st_mode & 0o777 == 0o600
    assert listener.ca.read_text() == authority.pem


def test_a_door_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    assert listener_for(tmp_path, door(None)) is None
    with pytest.raises(UsageError, match="--listen"):
        listener_for(tmp_path, door(None, ca=tmp_path))
    with pytest.raises(UsageError, match="go together"):
        listener_for(tmp_path, door(certificate=tmp_path))
    with pytest.raises(UsageError, match="needs --ca"):
        listener_for(tmp_path, door(ca_key=tmp_path))
    with pytest.raises(UsageError, match="needs --ca"):
        listener_for(tmp_path, door(certificate=tmp_path, key=tmp_path))
    with pytest.raises(UsageError, match="no IP address"):
        listener_for(tmp_path, door("localhost"))


# ---- the road to a broker --------------------------------------------------------------------------------------------


def api(url: str, *, allow_plaintext: bool = False) -> ManagementApi:
    return ManagementApi(url, password=lambda: "secret", allow_plaintext=allow_plaintext)


@pytest.mark.parametrize("url", ["http://127.0.0.1:15672", "ftp://a@b", "https://a@b:port", "rabbit", "https://@b"])
def test_a_management_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="must look like"):
        api(url)


def test_no_password_goes_in_the_clear_to_another_machine_or_onto_a_command_line() -> None:
    with pytest.raises(ConfigError, match="in the clear"):
        api("http://admin@10.0.0.1:15672")
    with pytest.raises(ConfigError, match="process lists"):
        api("https://admin:secret@10.0.0.1:15671")
    for url in ("http://admin@127.0.0.1:15672", "http://admin@[::1]:15672", "https://admin@10.0.0.1"):
        assert "secret" not in repr(api(url))
    api("http://admin@10.0.0.1:15672", allow_plaintext=True)


def test_a_password_is_salted_and_none_is_none() -> None:
    one, two = password_hash("p"), password_hash("p")
    assert one["password_hash"] != two["password_hash"]
    assert password_hash("") == {"password_hash": ""}


def test_records_that_do_not_know_the_federation_are_not_trusted_with_it(
    desk: Desk, admin: MemoryAdmin, out: Path, tmp_path: Path
) -> None:
    provision(desk, "f", ["a", "b"], hosts=HOSTS, folder=out)
    revoke(desk, "f", ["b"])
    elsewhere = dataclasses.replace(desk, office=Office(tmp_path / "typo"))
    elsewhere.office.found("fedbus CA", desk.now)
    for attempt in (
        lambda: provision(elsewhere, "f", ["b"], hosts=HOSTS, folder=out),
        lambda: revoke(elsewhere, "f", ["a"]),
        lambda: rotate(elsewhere, "f", ["a"], folder=out),
    ):
        with pytest.raises(ConfigError, match="do not know"):
            attempt()
    assert users(admin) == {"f.server", "f.a"}

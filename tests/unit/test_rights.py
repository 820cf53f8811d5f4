"""The rights of a federation's users: what the regular expressions let through, and what not."""

from __future__ import annotations

import re

import pytest

from fedbus.bus import topology
from fedbus.errors import ConfigError
from fedbus.provision.rights import (
    QueueBounds,
    User,
    access_definitions,
    check_client,
    check_federation,
    limits_of,
    permissions_of,
    policy_definitions,
)

NAMES = (
    "",
    "amq.default",
    "amq.topic",
    topology.MODEL,
    topology.BROADCAST,
    topology.TASKS,
    topology.CONTROL,
    topology.UPDATES,
    topology.DEAD,
    topology.SERVER_LOCK,
    topology.inbox("a.b"),
    topology.inbox("axb"),
    topology.inbox("a.bc"),
    topology.client_lock("a.b"),
    "fedbus.work",
    "xfedbus.control",
    "fedbusxcontrol",
    "fedbus.control.x",
)


def matching(pattern: str) -> set[str]:
    return {name for name in NAMES if re.search(pattern, name)}


def test_a_client_writes_to_the_ingress_and_reads_the_model_and_its_own_inbox() -> None:
    rights = permissions_of("a.b")
    assert matching(rights.configure) == {""}  # the empty name is nobody's: RabbitMQ makes one up for such a queue
    assert matching(rights.write) == {topology.CONTROL, topology.UPDATES}
    assert matching(rights.read) == {topology.MODEL, topology.inbox("a.b")}
    assert rights.routing_key is not None
    assert re.search(rights.routing_key, "a.b")
    assert not any(re.search(rights.routing_key, key) for key in ("axb", "a.bc", "xa.b", "", "#", "a.*", "a.b\n"))


def test_a_worker_reads_the_shared_queue_and_speaks_for_virtual_clients_alone() -> None:
    rights = permissions_of("worker")
    assert matching(rights.write) == {topology.CONTROL, topology.UPDATES}
    assert matching(rights.read) == {topology.MODEL, "fedbus.work"}
    assert rights.routing_key is not None
    assert re.search(rights.routing_key, "virtual-00007-of-01000")
    assert not any(re.search(rights.routing_key, key) for key in ("hospital-a", "virtual-00007-of-01000\n"))


@pytest.mark.parametrize("who", ["a.b", "worker"])
def test_no_name_is_let_through_that_a_line_feed_ends(who: str) -> None:
    rights = permissions_of(who)
    for pattern in (rights.configure, rights.write, rights.read):
        assert [name for name in NAMES if re.search(pattern, f"{name}\n")] == []


def test_a_server_does_what_it_likes_with_what_is_the_federations() -> None:
    rights = permissions_of("server")
    ours = {name for name in NAMES if name.startswith("fedbus.")}
    assert matching(rights.configure) == matching(rights.write) == matching(rights.read) == ours
    assert access_definitions(User(federation="f", who="server"))["topic_permissions"] == []


def test_the_definitions_of_a_client_name_its_user_in_its_vhost() -> None:
    made = access_definitions(User(federation="f", who="a", generation=2))
    assert [entry["user"] for entry in made["permissions"] + made["topic_permissions"]] == ["f.a~2"] * 3
    assert {entry["vhost"] for entry in made["permissions"] + made["topic_permissions"]} == {"f"}
    assert {(entry["exchange"], entry["write"]) for entry in made["topic_permissions"]} == {
        (topology.CONTROL, r"^a$(?!\n)"),
        (topology.UPDATES, r"^a$(?!\n)"),
    }


@pytest.mark.parametrize("who", ["a.b", "worker"])
def test_no_exchange_can_be_bound_to_where_its_members_write(who: str) -> None:
    """A right to read is for exchanges, too: whoever may read one may bind it to another that it may write to."""
    made = (topology.ingress(), topology.model_stream(1), topology.work_queue())
    exchanges = [exchange for each in made for exchange in each.exchanges]
    assert len(exchanges) >= 6
    assert [exchange.name for exchange in exchanges if re.search(permissions_of(who).read, exchange.name)] == []


def test_only_clients_are_held_to_a_few_connections() -> None:
    assert limits_of("a").connections == 8
    assert limits_of("a").channels == 64
    assert limits_of("server").connections is None
    assert (limits_of("worker").connections or 0) > 1000


@pytest.mark.parametrize("name", ["f.a", "f.a~2", "f.a.b~13", "f.server", "f.worker~2"])
def test_a_users_name_is_taken_apart_and_put_together(name: str) -> None:
    user = User.parse(name)
    assert user is not None
    assert user.name == name


def test_what_a_user_is_stands_in_its_name() -> None:
    assert User.parse("f.a.b~2") == User(federation="f", who="a.b", generation=2)
    assert (User(federation="f", who="a").role, User(federation="f", who="a").client_id) == ("client", "a")
    assert (User(federation="f", who="server").role, User(federation="f", who="server").client_id) == ("server", None)
    assert [User.parse(name) for name in ("guest", "f.", ".a", "f.a~", "f.a~x")] == [None] * 5


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "-a", "a b", "a~2", "ä", "a" * 33, "a\n"])
def test_a_federation_cannot_be_called_everything(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        check_federation(name)


@pytest.mark.parametrize("client", ["server", "worker", "virtual-1-of-10", "a~2", "a/b", ""])
def test_a_client_cannot_take_the_name_of_another_part(client: str) -> None:
    with pytest.raises(ConfigError):
        check_client(client)


@pytest.mark.parametrize("takes_overflow", [True, False])
def test_nothing_is_dropped_from_the_queues_that_the_server_must_see_whole(takes_overflow: bool) -> None:
    made = policy_definitions("f", QueueBounds(updates_bytes=7), takes_overflow=takes_overflow)
    policies = {entry["name"]: entry for entry in made["policies"]}
    bounds = {entry["name"]: entry["value"] for entry in made["parameters"]}
    assert bounds["fedbus-updates"]["definition"]["max-length-bytes"] == 7
    for name in ("fedbus-updates", "fedbus-control"):
        assert policies[name]["definition"] == {"overflow": "reject-publish"}
        assert policies[name]["pattern"] == bounds[name]["pattern"]
        assert bounds[name]["definition"].get("overflow") == ("reject-publish" if takes_overflow else None)
    assert set(bounds) == {"fedbus-updates", "fedbus-control", "fedbus-inbox", "fedbus-dead"}


def test_each_bounded_queue_has_one_policy_and_the_model_has_none() -> None:
    made = policy_definitions("f", QueueBounds(), takes_overflow=False)
    patterns = [entry["value"]["pattern"] for entry in made["parameters"]]
    hits = {name: sum(bool(re.search(pattern, name)) for pattern in patterns) for name in NAMES}
    bounded = {topology.CONTROL, topology.UPDATES, topology.DEAD, *(name for name in NAMES if ".inbox." in name)}
    assert {name for name, count in hits.items() if count == 1} == bounded
    assert max(hits.values()) == 1

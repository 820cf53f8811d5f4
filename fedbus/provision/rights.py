"""What each user of a provisioned federation may do on the broker, as data.

A federation is a vhost, in which each part has the rights that it needs and no other (RabbitMQ's access control: three
regular expressions for queues and exchanges, one more for routing keys):

    who       configure     write                          read                             routing keys
    server    fedbus.*      fedbus.*                       fedbus.*                         any
    client    nothing       fedbus.control, .updates       fedbus.model, own inbox          its client id
    worker    nothing       fedbus.control, .updates       fedbus.model, fedbus.work        virtual-*

The broker's user is `FEDERATION.WHO`. Its second secret belongs to `FEDERATION.WHO~2`, and the first user is deleted:
EXTERNAL knows a certificate by its common name alone, so that as long as a user is there, every certificate that was
ever issued to it logs in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from fedbus.bus import topology
from fedbus.config import VIRTUAL_PREFIX, check_client_id
from fedbus.errors import ConfigError

Role: TypeAlias = Literal["server", "worker", "client"]
SERVER: Final = "server"
WORKER: Final = "worker"

_FEDERATION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_USER: Final = re.compile(r"(?P<federation>[^.]+)\.(?P<who>[^~]+)(?:~(?P<generation>\d+))?")
_INGRESS: Final = (topology.CONTROL, topology.UPDATES)
_END: Final = r"$(?!\n)"  # to RabbitMQ's regular expressions "$" is before a last line feed, too
_NOTHING: Final = f"^{_END}"


@dataclass(frozen=True, kw_only=True)
class Permissions:
    """RabbitMQ's three regular expressions, and what routing keys may be published to each of the ingress exchanges."""

    configure: str
    write: str
    read: str
    routing_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class UserLimits:
    """How many connections and channels a user may have open; None is any number."""

    connections: int | None = None
    channels: int | None = None


@dataclass(frozen=True, kw_only=True)
class QueueBounds:
    """What the queues that others fill may hold.

    The server has at most 128 MiB of large uploads under way at a time; small updates are sent without asking, and an
    honest thousand of them at 1 MiB each is 1 GiB. `updates_bytes` is four times that, and what is beyond is refused,
    not lost: its sender keeps the update and sends it again. The numbers of messages bound what the broker keeps in
    memory for each (some hundred bytes), whatever their size.
    """

    updates_bytes: int = 4 << 30
    updates: int = 500_000
    control_bytes: int = 128 << 20
    control: int = 50_000
    inbox_bytes: int = 64 << 20
    inbox: int = 10_000
    dead_bytes: int = 64 << 20
    dead: int = 100_000


@dataclass(frozen=True, kw_only=True)
class User:
    """A broker user, taken apart; `who` is a client id, "server" or "worker"."""

    federation: str
    who: str
    generation: int = 1

    @property
    def name(self) -> str:
        """As the broker knows it."""
        suffix = "" if self.generation == 1 else f"~{self.generation}"
        return f"{self.federation}.{self.who}{suffix}"

    @property
    def role(self) -> Role:
        """What it is for."""
        return role_of(self.who)

    @property
    def client_id(self) -> str | None:
        """The client id; None of a server or worker."""
        return self.who if self.role == "client" else None

    @classmethod
    def parse(cls, name: str) -> User | None:
        """Take the name of a broker user apart; None when no federation's user is called like this."""
        match = _USER.fullmatch(name)
        if match is None:
            return None
        return cls(federation=match["federation"], who=match["who"], generation=int(match["generation"] or 1))


def check_federation(name: str) -> str:
    """Return `name` when it can name a federation, else raise `ConfigError`.

    No dots: client "b.c" of "a" and client "c" of "a.b" would be one user.
    """
    if not _FEDERATION.fullmatch(name):
        raise ConfigError(
            f"federation {name[:80]!r} cannot be used as a name: take 1 to 32 letters, digits, '_' or '-', beginning "
            "with a letter or digit"
        )
    return name


def check_client(client_id: str) -> str:
    """Return `client_id` when a client of a provisioned federation can have it, else raise `ConfigError`."""
    check_client_id(client_id)
    if client_id in (SERVER, WORKER) or client_id.startswith(VIRTUAL_PREFIX):
        raise ConfigError(f"client id {client_id!r} is taken by another part of the federation: choose another")
    return client_id


def role_of(who: str) -> Role:
    """What somebody called `who` within a federation is."""
    return "server" if who == SERVER else "worker" if who == WORKER else "client"


def permissions_of(who: str) -> Permissions:
    """The rights of the server, of a worker, or of the client `who`."""
    role = role_of(who)
    if role == "server":
        return Permissions(configure=r"^fedbus\..*", write=r"^fedbus\..*", read=r"^fedbus\..*")
    ingress = rf"^fedbus\.(control|updates){_END}"
    if role == "worker":
        return Permissions(
            configure=_NOTHING,
            write=ingress,
            read=rf"^fedbus\.(model|work){_END}",
            routing_key=rf"^virtual-.*{_END}",
        )
    client = _escaped(who)
    return Permissions(
        configure=_NOTHING,
        write=ingress,
        read=rf"^fedbus\.(model|inbox\.{client}){_END}",
        routing_key=f"^{client}{_END}",
    )


def limits_of(who: str) -> UserLimits:
    """A client has two connections, a channel for each consumer, and for a while those that it has just lost, too."""
    role = role_of(who)
    if role == "server":
        return UserLimits()
    if role == "worker":
        return UserLimits(connections=2048, channels=16_384)  # all worker processes together
    return UserLimits(connections=8, channels=64)


def _escaped(client_id: str) -> str:
    """`client_id` as a regular expression, for PCRE as for Python: of what client ids are made, only dots say more."""
    return client_id.replace(".", r"\.")


def access_definitions(user: User) -> dict[str, list[dict[str, Any]]]:
    """The rights of a user in the form of RabbitMQ's definitions."""
    permissions = permissions_of(user.who)
    where = {"user": user.name, "vhost": user.federation}
    routing: list[dict[str, Any]] = []
    if permissions.routing_key is not None:
        routing = [
            {**where, "exchange": exchange, "write": permissions.routing_key, "read": _NOTHING} for exchange in _INGRESS
        ]
    return {
        "permissions": [
            {
                **where,
                "configure": permissions.configure,
                "write": permissions.write,
                "read": permissions.read,
            }
        ],
        "topic_permissions": routing,
    }


def limit_definitions(limits: UserLimits) -> dict[str, int]:
    """The limits of a user in the form of RabbitMQ's definitions."""
    named = {"max-connections": limits.connections, "max-channels": limits.channels}
    return {name: value for name, value in named.items() if value is not None}


def policy_definitions(
    federation: str, bounds: QueueBounds, *, takes_overflow: bool
) -> dict[str, list[dict[str, Any]]]:
    """Bounds for the queues of a federation, in the form of RabbitMQ's definitions.

    A full queue of updates or of control messages refuses what comes: to drop from the old end would lose updates that
    the server has not seen. An inbox drops its oldest: only the server writes to it, whatever is important there is
    asked for again, and a client that does not read must not hold up what goes to the others. So do dead letters.

    `takes_overflow`: whether operator policies may say what happens when the queue is full; they may from RabbitMQ 3.12
    on. Before that a policy says so, which is imported first: a bound without it would drop. No user of the federation
    can change either: none has a tag.
    """
    policies: list[dict[str, Any]] = []
    operator_policies: list[dict[str, Any]] = []
    for name, pattern, definition, refuses in _bounded(bounds):
        common = {"vhost": federation, "name": f"fedbus-{name}"}
        selection = {"pattern": pattern, "apply-to": "queues", "priority": 10}
        overflow = {"overflow": "reject-publish"} if refuses else {}
        if overflow:
            policies.append({**common, **selection, "definition": overflow})
        value = {**selection, "definition": {**definition, **(overflow if takes_overflow else {})}}
        operator_policies.append({**common, "component": "operator_policy", "value": value})
    return {"policies": policies, "parameters": operator_policies}


def _bounded(bounds: QueueBounds) -> Iterator[tuple[str, str, dict[str, int], bool]]:
    """Name, pattern, bounds, and whether a full queue refuses."""
    yield "updates", r"^fedbus\.updates$", _bound(bounds.updates_bytes, bounds.updates), True
    yield "control", r"^fedbus\.control$", _bound(bounds.control_bytes, bounds.control), True
    yield "inbox", r"^fedbus\.inbox\.", _bound(bounds.inbox_bytes, bounds.inbox), False
    yield "dead", r"^fedbus\.dead$", _bound(bounds.dead_bytes, bounds.dead), False


def _bound(max_bytes: int, messages: int) -> dict[str, int]:
    return {"max-length-bytes": max_bytes, "max-length": messages}

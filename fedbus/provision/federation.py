"""Provision, revoke, rotate and list: what an operator does to the members of a federation.

The broker decides who is in; the records only remember. So everything here looks at the broker first, and may be run
again after it was interrupted: what is there already stays as it is.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from fedbus.bus.access import Access
from fedbus.bus.bundle import Bundle
from fedbus.bus.topology import inbox
from fedbus.errors import ConfigError
from fedbus.provision.admin import Admin, password_hash
from fedbus.provision.authority import USER_DAYS, Authority
from fedbus.provision.files import private_folder
from fedbus.provision.records import FederationRecord, Login, Office, Records, UserRecord, timestamp
from fedbus.provision.rights import (
    SERVER,
    WORKER,
    QueueBounds,
    Role,
    User,
    access_definitions,
    check_client,
    check_federation,
    limit_definitions,
    limits_of,
    policy_definitions,
)

_PASSWORD_BYTES: Final = 32
_AMQPS_PORT: Final = 5671
_OVERFLOW_SINCE: Final = (3, 12)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """Where an operator works: the broker's administration, the records that belong to it, and the time."""

    admin: Admin
    office: Office
    now: datetime.datetime


@dataclass(frozen=True, kw_only=True)
class Issue:
    """What `provision` and `rotate` have done.

    `bundles`: user to file, for whom a new one was written; `kept`: users that were there and keep what they have;
    `out`: who was revoked, and is not let in again.
    """

    federation: str
    login: Login
    bundles: Mapping[str, Path]
    kept: Sequence[str] = ()
    out: Sequence[str] = ()
    has_guest: bool = False


@dataclass(frozen=True, kw_only=True)
class Member:
    """One user of a federation as `members` finds it. Times in ISO 8601; `connections` None of who is out."""

    federation: str
    role: Role
    client_id: str | None
    user: str
    connections: int | None
    not_after: str | None = None
    revoked_at: str | None = None

    @property
    def who(self) -> str:
        """The client id, "server" or "worker"."""
        return self.client_id or self.role


@dataclass(frozen=True, kw_only=True)
class _Secret:
    """What one user logs in with: one of the two."""

    password: str = field(default="", repr=False)
    certificate: str | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)


def provision(
    desk: Desk,
    federation: str,
    clients: Sequence[str],
    *,
    workers: bool = False,
    hosts: Sequence[str] = (),
    login: Login | None = None,
    folder: Path,
    days: int = USER_DAYS,
    bounds: QueueBounds | None = None,
    readmit: bool = False,
) -> Issue:
    """Make the federation where it is not there, and add those members that are missing.

    Args:
        clients: ids of clients; those that are there already keep their secrets.
        workers: whether there is to be a user for worker processes, too.
        hosts: HOST or HOST:PORT by which members reach the broker, of a cluster all its nodes; none: as the last time.
        login: with what members log in; None: as the last time, else by certificate where there is a CA that signs.
        folder: of the bundles, one file for each new user.
        days: until certificates expire.
        bounds: of the queues; None: as the last time, else the usual ones.
        readmit: let those in again, too, who were revoked: otherwise a list that still has them would.

    Raises:
        ConfigError: a name that cannot be used, or no way to a certificate.
        BrokerError: the broker says no.
    """
    check_federation(federation)
    wanted = [SERVER, *([WORKER] if workers else []), *map(check_client, dict.fromkeys(clients))]
    with desk.office.open() as records:
        known = desk.admin.definitions()
        there = _current_users(known, federation)
        _check_ours(known, federation, there)
        _check_recorded(desk, records, federation, there)
        record = _agree(desk.office, records.federations.get(federation), hosts, login, bounds)
        missing = [who for who in wanted if who not in there]
        out = [] if readmit else [who for who in missing if _was_revoked(records, federation, who)]
        new = [_next_user(federation, who, known, records) for who in missing if who not in out]
        every = [*there.values(), *new]
        setting = _missing_in(known, _federation_definitions(federation, known, every, record.bounds))
        records.federations[federation] = record
        bundles = _issue(desk, records, record, new, setting, folder, days)
        kept = [there[who].name for who in wanted if who in there]
    return Issue(
        federation=federation,
        login=record.login,
        bundles=bundles,
        kept=kept,
        out=out,
        has_guest=any(user["name"] == "guest" for user in known["users"]),
    )


def rotate(desk: Desk, federation: str, who: Sequence[str], *, folder: Path, days: int = USER_DAYS) -> Issue:
    """Give members (all of them where `who` is empty) new secrets; the old ones are worth nothing from then on.

    A new secret is a new user of the broker, and the old user is deleted with its connections.
    """
    check_federation(federation)
    with desk.office.open() as records:
        known = desk.admin.definitions()
        there = _members_of(known, federation, who)
        record = records.federations.get(federation)
        if record is None:
            raise ConfigError(
                f"the records in {desk.office.folder} do not know federation {federation!r}: provision it from here"
            )
        new = [_next_user(federation, each, known, records) for each in there]
        setting = _merged(map(access_definitions, new))
        bundles = _issue(desk, records, record, new, setting, folder, days)
        _turn_out(desk, records, _all_of(known, there), "its secret was replaced")
    return Issue(federation=federation, login=record.login, bundles=bundles)


def _was_revoked(records: Records, federation: str, who: str) -> bool:
    """Whether somebody of that name was in, and was turned out."""
    for name, record in records.users.items():
        user = User.parse(name)
        if user is not None and (user.federation, user.who) == (federation, who) and record.revoked_at is not None:
            return True
    return False


def revoke(desk: Desk, federation: str, who: Sequence[str]) -> list[str]:
    """Turn members out, at once and for good; returns their broker users.

    Their certificates log nobody in any more: the user whom they name is gone, and its name is not given again. The
    inboxes of clients go with them: that tells the server, which refuses what they have under way.
    """
    check_federation(federation)
    if not who:
        raise ConfigError("say whom to turn out")
    with desk.office.open() as records:
        known = desk.admin.definitions()
        there = _members_of(known, federation, who)
        _check_recorded(desk, records, federation, there)
        _turn_out(desk, records, _all_of(known, there), "its rights were revoked", with_inbox=True)
    return [user.name for user in there.values()]


def members(desk: Desk, federation: str | None = None) -> list[Member]:
    """Everybody who is in a federation, or was; of all federations where none is named."""
    with desk.office.open() as records:
        known = desk.admin.definitions()
        open_connections = [connection.user for connection in desk.admin.connections()]
    found = []
    for vhost in [each["name"] for each in known["vhosts"]]:
        for user in _current_users(known, vhost).values():
            record = records.users.get(user.name)
            connections = open_connections.count(user.name)
            found.append(_member(user, connections, record))
    here = {(member.federation, member.who) for member in found}
    for name, record in reversed(records.users.items()):  # of each who is out the last that it had
        gone = User.parse(name)
        if gone is not None and (gone.federation, gone.who) not in here and record.revoked_at is not None:
            here.add((gone.federation, gone.who))
            found.append(_member(gone, None, record))
    chosen = [member for member in found if federation in (None, member.federation)]
    if federation is not None and not chosen:
        raise ConfigError(_unknown(federation))
    return sorted(chosen, key=lambda member: (member.federation, member.role != "server", member.role, member.who))


def _member(user: User, connections: int | None, record: UserRecord | None) -> Member:
    return Member(
        federation=user.federation,
        role=user.role,
        client_id=user.client_id,
        user=user.name,
        connections=connections,
        not_after=None if record is None else record.not_after,
        revoked_at=None if record is None or connections is not None else record.revoked_at,
    )


def _agree(
    office: Office,
    record: FederationRecord | None,
    hosts: Sequence[str],
    login: Login | None,
    bounds: QueueBounds | None,
) -> FederationRecord:
    """How members are to reach the broker, and what they may leave there: as asked for now, else as was said before."""
    known_hosts = () if record is None else record.hosts
    if not hosts and not known_hosts:
        raise ConfigError("say where members reach the broker: --host HOST[:PORT]")
    signs = office.authority() is not None
    chosen = login or (record.login if record is not None else "certificate" if signs else "password")
    if chosen == "certificate" and not signs:
        raise ConfigError(
            "certificates need a CA that signs them: give --ca and --ca-key, or let members log in by --login password"
        )
    return FederationRecord(
        hosts=tuple(map(check_host, hosts)) or known_hosts,
        login=chosen,
        bounds=bounds or (QueueBounds() if record is None else record.bounds),
    )


def check_host(host: str) -> str:
    """Return HOST[:PORT] (of IPv6 [HOST]:PORT) with its port, 5671 where none is given; raises `ConfigError`."""
    if host.count(":") > 1 and not host.startswith("["):
        host = f"[{host}]"
    try:
        parts = urlsplit(f"amqps://{host}")
        port = parts.port or _AMQPS_PORT
        is_host = parts.netloc == host and bool(parts.hostname) and not set("@, ") & set(host)
    except ValueError:
        is_host = False
    if not is_host:
        raise ConfigError(f"{host[:80]!r} is no host: it looks like rabbit.example.org or 10.0.0.1:5671")
    return f"[{parts.hostname}]:{port}" if ":" in (parts.hostname or "") else f"{parts.hostname}:{port}"


def _check_ours(known: Mapping[str, Any], federation: str, there: Mapping[str, User]) -> None:
    """A vhost in which we find none of ours is somebody else's."""
    if not there and any(vhost["name"] == federation for vhost in known["vhosts"]):
        raise ConfigError(
            f"the broker has a vhost {federation!r}, and no member of a federation in it: choose another name, or "
            f"delete it (rabbitmqctl delete_vhost {federation})"
        )


def _check_recorded(desk: Desk, records: Records, federation: str, there: Mapping[str, User]) -> None:
    """Without the records the names of users who are out would be given again, and old certificates log in by them."""
    if there and federation not in records.federations:
        raise ConfigError(
            f"the broker has the federation {federation!r}, and the records in {desk.office.folder} do not know it: "
            "name the folder of those that do (--authority DIR)"
        )


def _users_in(known: Mapping[str, Any], federation: str) -> list[User]:
    """All users with rights in the vhost whose names say that they are ours, older generations first."""
    names = [each["user"] for each in known["permissions"] if each["vhost"] == federation]
    users = [user for name in names if (user := User.parse(name)) is not None and user.federation == federation]
    return sorted(users, key=lambda user: user.generation)


def _current_users(known: Mapping[str, Any], federation: str) -> dict[str, User]:
    """The user that counts of everybody who is in."""
    return {user.who: user for user in _users_in(known, federation)}


def _all_of(known: Mapping[str, Any], members: Mapping[str, User]) -> list[User]:
    """Every user of these members: an interrupted rotation leaves two."""
    federations = {user.federation for user in members.values()}
    return [user for federation in federations for user in _users_in(known, federation) if user.who in members]


def _members_of(known: Mapping[str, Any], federation: str, who: Sequence[str]) -> dict[str, User]:
    there = _current_users(known, federation)
    if not there:
        raise ConfigError(_unknown(federation))
    missing = [each for each in who if each not in there]
    if missing:
        raise ConfigError(
            f"{missing[0][:80]!r} is no member of {federation!r}: 'fedbus broker list {federation}' shows who is"
        )
    return {each: there[each] for each in who or there}


def _unknown(federation: str) -> str:
    return f"the broker knows no federation {federation!r}: 'fedbus broker list' shows those it knows"


def _next_user(federation: str, who: str, known: Mapping[str, Any], records: Records) -> User:
    """The user for the next secret of `who`: none that any certificate of the past could log in."""
    names = {*records.users, *(user["name"] for user in known["users"])}
    users = [user for name in names if (user := User.parse(name)) is not None]
    used = [user.generation for user in users if (user.federation, user.who) == (federation, who)]
    return User(federation=federation, who=who, generation=max(used, default=0) + 1)


def _federation_definitions(
    federation: str, known: Mapping[str, Any], users: Iterable[User], bounds: QueueBounds
) -> dict[str, list[dict[str, Any]]]:
    """The vhost, its bounds, and the rights of all users: those who were there may have had older ones."""
    is_there = any(vhost["name"] == federation for vhost in known["vhosts"])
    policies = policy_definitions(federation, bounds, takes_overflow=_version(known) >= _OVERFLOW_SINCE)
    vhost = {"vhosts": [] if is_there else [{"name": federation}]}
    return _merged([vhost, policies, *map(access_definitions, users)])


def _missing_in(
    known: Mapping[str, Any], setting: Mapping[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """What the broker does not have yet just so: to set the rights of a thousand users again takes it seconds."""

    def missing(category: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        there = {json.dumps(entry, sort_keys=True) for entry in known.get(category, ())}
        return [entry for entry in entries if json.dumps(entry, sort_keys=True) not in there]

    return {category: missing(category, entries) for category, entries in setting.items()}


def _version(known: Mapping[str, Any]) -> tuple[int, ...]:
    numbers = str(known.get("rabbitmq_version", "0.0")).split(".")[:2]
    return tuple(int(number) for number in numbers if number.isdigit())


def _merged(parts: Iterable[Mapping[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    together: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        for category, entries in part.items():
            together.setdefault(category, []).extend(entries)
    return together


def _issue(
    desk: Desk,
    records: Records,
    federation: FederationRecord,
    users: Sequence[User],
    setting: Mapping[str, list[dict[str, Any]]],
    folder: Path,
    days: int,
) -> dict[str, Path]:
    """Secrets for `users`, and all of `setting` into the broker; returns the bundles, by user.

    The records know of a user before the broker does, so that its name is never given twice; a bundle takes the place
    of an older one when the broker knows its user, so that nobody is left with one that opens nothing.
    """
    made = [(user, *_secret_for(user, federation.login, desk, days)) for user in users]
    drafts: dict[Path, Path] = {}
    bundles: dict[str, Path] = {}
    private_folder(folder)
    for user, secret, record in made:
        path = folder / f"{user.who}.json"
        draft = path.with_suffix(".draft")
        _bundle(user, secret, federation, desk.office.trusted()).save(draft)
        bundles[user.name], drafts[draft] = path, path
        records.users[user.name] = record
    desk.office.save(records)
    accounts = [_account(user, secret) for user, secret, _ in made]
    try:
        desk.admin.import_definitions({**setting, "users": accounts})
    except BaseException:
        for draft in drafts:
            draft.unlink(missing_ok=True)
        raise
    for draft, path in drafts.items():
        draft.replace(path)
    return bundles


def _account(user: User, secret: _Secret) -> dict[str, Any]:
    limits = limit_definitions(limits_of(user.who))
    return {"name": user.name, "tags": "", "limits": limits, **password_hash(secret.password)}


def _secret_for(user: User, login: Login, desk: Desk, days: int) -> tuple[_Secret, UserRecord]:
    record = UserRecord(issued_at=timestamp(desk.now))
    if login == "password":
        return _Secret(password=secrets.token_urlsafe(_PASSWORD_BYTES)), record
    authority: Authority | None = desk.office.authority()
    assert authority is not None, "agreed on before"
    issued = authority.issue_user(user.name, now=desk.now, days=days)
    record = dataclasses.replace(record, serial=issued.serial, not_after=timestamp(issued.not_after))
    return _Secret(certificate=issued.certificate, key=issued.key), record


def _bundle(user: User, secret: _Secret, federation: FederationRecord, ca: str | None) -> Bundle:
    password, query = (f":{secret.password}", "") if secret.password else ("", "?auth=external")
    login = f"{quote(user.name)}{password}"
    urls = (f"amqps://{login}@{host}/{quote(user.federation)}{query}" for host in federation.hosts)
    return Bundle(
        federation=user.federation,
        role=user.role,
        user=user.name,
        client_id=user.client_id,
        access=Access(",".join(urls), ca=ca, certificate=secret.certificate, key=secret.key),
    )


def _turn_out(desk: Desk, records: Records, users: Sequence[User], reason: str, *, with_inbox: bool = False) -> None:
    """Delete the users; the broker ends their connections by itself, and we end what is left of them."""
    for user in users:
        records.revoke(user.name, desk.now)
    desk.office.save(records)
    for user in users:
        desk.admin.delete_user(user.name)
        if with_inbox and user.client_id is not None:
            desk.admin.delete_queue(user.federation, inbox(user.client_id))
    gone = {user.name for user in users}
    for name in gone & {connection.user for connection in desk.admin.connections()}:
        desk.admin.close_connections(name, reason)

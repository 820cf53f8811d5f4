"""What an operator has issued on one broker: who has which certificate until when, and who was turned out.

A folder, mode 0700: the CA (`ca.pem`, `ca.key`), the broker's certificate where the broker is ours (`broker.pem`,
`broker.key`), and `records.json`, in which there is no secret: those are in the bundles, and nowhere else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from fedbus.errors import ConfigError
from fedbus.provision.authority import CA_FILE, CA_KEY_FILE, Authority, parse_certificates
from fedbus.provision.files import private_folder, read_text, write_private
from fedbus.provision.rights import QueueBounds

Login: TypeAlias = Literal["certificate", "password"]

BROKER_FILE: Final = "broker.pem"
BROKER_KEY_FILE: Final = "broker.key"
_FILE: Final = "records.json"
_LOCK: Final = "lock"
_FORMAT: Final = 1


@dataclass(frozen=True, kw_only=True)
class FederationRecord:
    """How a federation's members reach the broker: HOST:PORT of each of its nodes, and what they log in with.

    `bounds`: what its queues may hold.
    """

    hosts: tuple[str, ...]
    login: Login
    bounds: QueueBounds


@dataclass(frozen=True, kw_only=True)
class UserRecord:
    """What one broker user was given; times in ISO 8601, UTC; `serial` and `not_after` of certificates only."""

    issued_at: str
    serial: str | None = None
    not_after: str | None = None
    revoked_at: str | None = None


@dataclass(kw_only=True)
class Records:
    """All federations and broker users (`FEDERATION.WHO~GENERATION`) of one broker, in the order of their coming."""

    federations: dict[str, FederationRecord] = field(default_factory=dict)
    users: dict[str, UserRecord] = field(default_factory=dict)

    def revoke(self, user: str, now: datetime.datetime) -> None:
        """Note that a user is out, whether or not it is known here."""
        record = self.users.get(user, UserRecord(issued_at=timestamp(now)))
        self.users[user] = dataclasses.replace(record, revoked_at=record.revoked_at or timestamp(now))


def timestamp(moment: datetime.datetime) -> str:
    """As records have it."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="seconds")


class Office:
    """The folder in which an operator keeps CA and records of one broker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"<Office {self.folder}>"

    @contextlib.contextmanager
    def open(self) -> Iterator[Records]:
        """The records, for one operator at a time; what was changed by the end, or by an error, is kept."""
        private_folder(self.folder)
        with open(os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            records = self._read()
            try:
                yield records
            finally:
                self.save(records)

    def save(self, records: Records) -> None:
        """Keep what was noted so far; only while the records are open."""
        content = {"fedbus_records": _FORMAT, **dataclasses.asdict(records)}
        write_private(self.folder / _FILE, json.dumps(content, indent=2) + "\n")

    def authority(self) -> Authority | None:
        """The CA that signs here; None where there is none, or its key is kept elsewhere."""
        return Authority.load(self.folder)

    def trusted(self) -> str | None:
        """The certificates (PEM) by which users know the broker; None: those that their own system trusts."""
        path = self.folder / CA_FILE
        return read_text(path, "the CA") if path.exists() else None

    def adopt(self, ca: str, ca_key: str | None) -> None:
        """Take a CA that is brought along, with its key where it is to sign here.

        Raises `ConfigError` when there is another one already: what that one signed would be worth nothing any more.
        """
        authority = None if ca_key is None else Authority.parse(ca, ca_key)
        known = self.trusted()
        if known is not None and parse_certificates(known) != parse_certificates(ca):
            raise ConfigError(f"{self.folder / CA_FILE} holds another CA, by which members know the broker already")
        private_folder(self.folder)
        if authority is not None:
            authority.save(self.folder)
        elif known is None:
            parse_certificates(ca)
            write_private(self.folder / CA_FILE, ca)

    def found(self, name: str, now: datetime.datetime) -> Authority:
        """The CA here, made now where there is none; raises `ConfigError` where one is known without its key."""
        authority = self.authority()
        if authority is not None:
            return authority
        if self.trusted() is not None:
            raise ConfigError(f"the key of the CA in {self.folder} is kept elsewhere ({CA_KEY_FILE}): give --ca-key")
        authority = Authority.create(name, now=now)
        authority.save(self.folder)
        return authority

    def _read(self) -> Records:
        path = self.folder / _FILE
        if not path.exists():
            return Records()
        try:
            return _parse(json.loads(read_text(path, "the records")))
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ConfigError(f"the records in {path} are damaged: bring them back from a backup") from exc


def _parse(content: Any) -> Records:
    if content["fedbus_records"] != _FORMAT:
        raise ValueError("another format")
    return Records(
        federations={
            name: FederationRecord(
                hosts=tuple(fields["hosts"]), login=fields["login"], bounds=QueueBounds(**fields["bounds"])
            )
            for name, fields in content["federations"].items()
        },
        users={name: UserRecord(**fields) for name, fields in content["users"].items()},
    )

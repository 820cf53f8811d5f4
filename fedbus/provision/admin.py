"""The broker's administration, as far as provisioning needs it: by `rabbitmqctl`, or by the management API.

Definitions are read and imported as a whole: a hundred clients are one call, not six hundred. They go through standard
input or a request's body, so that nothing secret is on a command line; passwords travel as salted hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shutil
import ssl
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import quote, unquote, urlsplit

from fedbus.bus.node import NodeState, rabbitmqctl, run_rabbitmqctl
from fedbus.errors import BrokerDenied, BrokerError, BrokerUnreachable, ConfigError, one_line

Definitions: TypeAlias = Mapping[str, Any]

PASSWORD_VARIABLE: Final = "FEDBUS_MANAGEMENT_PASSWORD"
_TIMEOUT_S: Final = 30.0
_LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_EXAMPLE: Final = "https://USER@HOST:15671"


@dataclass(frozen=True, kw_only=True)
class OpenConnection:
    """Somebody who is connected."""

    user: str
    vhost: str
    name: str


class Admin(ABC):
    """What an administrator may do to a broker; every call blocks, for a second or two.

    Raises `BrokerError` of some kind in one line where the broker, or the road to it, says no.
    """

    @abstractmethod
    def definitions(self) -> dict[str, Any]:
        """Every vhost, user, permission, policy and parameter of the broker, as RabbitMQ exports them."""

    @abstractmethod
    def import_definitions(self, definitions: Definitions) -> None:
        """Add what is not there and change what is; nothing is deleted."""

    @abstractmethod
    def delete_user(self, user: str) -> None:
        """Delete a user with its permissions; the broker closes its connections at once. No error when it is gone."""

    @abstractmethod
    def delete_queue(self, vhost: str, queue: str) -> None:
        """Delete a queue with what is in it. No error when it is gone."""

    @abstractmethod
    def connections(self) -> list[OpenConnection]:
        """Who is connected."""

    @abstractmethod
    def close_connections(self, user: str, reason: str) -> None:
        """Close all connections of a user; it reads the reason."""


class Rabbitmqctl(Admin):
    """By `rabbitmqctl`.

    Args:
        call: runs it with some arguments and a standard input, and returns what it prints.
    """

    def __init__(self, call: Callable[[tuple[str, ...], str], str]) -> None:
        self._call = call

    @classmethod
    def of_private_node(cls, state: NodeState) -> Rabbitmqctl:
        """Of a node that fedbus started."""
        return cls(lambda args, stdin: rabbitmqctl(state, *args, stdin=stdin))

    @classmethod
    def of_this_host(cls) -> Rabbitmqctl:
        """Of the RabbitMQ that this machine runs as a service; raises `ConfigError` when there is none."""
        program = shutil.which("rabbitmqctl", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))
        if program is None:
            raise ConfigError("there is no rabbitmqctl on this machine: run this where the broker is, or --management")
        return cls(lambda args, stdin: run_rabbitmqctl([program], args, stdin=stdin))

    def definitions(self) -> dict[str, Any]:
        return dict(json.loads(self._call(("export_definitions", "-"), "")))

    def import_definitions(self, definitions: Definitions) -> None:
        self._call(("import_definitions",), json.dumps(definitions))

    def delete_user(self, user: str) -> None:
        try:
            self._call(("delete_user", user), "")
        except BrokerError:
            if any(each["name"] == user for each in self.definitions()["users"]):
                raise

    def delete_queue(self, vhost: str, queue: str) -> None:
        try:
            self._call(("delete_queue", "--vhost", vhost, queue), "")
        except BrokerError as exc:
            if "not found" not in str(exc).lower():
                raise

    def connections(self) -> list[OpenConnection]:
        listing = json.loads(self._call(("list_connections", "--formatter", "json", "user", "vhost", "name"), ""))
        return [OpenConnection(user=each["user"], vhost=each["vhost"], name=each["name"]) for each in listing]

    def close_connections(self, user: str, reason: str) -> None:
        self._call(("close_all_user_connections", user, reason), "")


class ManagementApi(Admin):
    """By the management API over HTTP.

    Args:
        url: https://USER@HOST:15671; its certificate is verified, by the system's CAs or those in SSL_CERT_FILE.
        ca: PEM of further authorities that are trusted.
        password: says what USER's is; asked when all else is in order.
        allow_plaintext: http:// to another machine, too.

    Raises:
        ConfigError: `url` is none, or would send the password in the clear.
    """

    def __init__(
        self, url: str, *, password: Callable[[], str], allow_plaintext: bool = False, ca: str | None = None
    ) -> None:
        parts = _split(url)
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not allow_plaintext:
            raise ConfigError(
                f"http://{parts.hostname} would send the administrator's password in the clear: take https, or say "
                "--plaintext"
            )
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self.host = parts.hostname or ""
        self._base = f"{parts.scheme}://{host}" + (f":{parts.port}" if parts.port else "") + parts.path.rstrip("/")
        credentials = f"{unquote(parts.username or '')}:{password()}"
        self._authorization = "Basic " + base64.b64encode(credentials.encode()).decode()
        trusted = ssl.create_default_context()
        if ca is not None:
            trusted.load_verify_locations(cadata=ca)
        # No proxies: a plain request to loopback must stay there.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)
        )

    def __repr__(self) -> str:
        return f"<ManagementApi {self._base}>"

    def definitions(self) -> dict[str, Any]:
        return dict(self._ask("GET", "definitions"))

    def import_definitions(self, definitions: Definitions) -> None:
        self._ask("POST", "definitions", definitions)

    def delete_user(self, user: str) -> None:
        self._ask("DELETE", f"users/{quote(user, safe='')}", is_missing_fine=True)

    def delete_queue(self, vhost: str, queue: str) -> None:
        self._ask("DELETE", f"queues/{quote(vhost, safe='')}/{quote(queue, safe='')}", is_missing_fine=True)

    def connections(self) -> list[OpenConnection]:
        listing = self._ask("GET", "connections?columns=user,vhost,name")
        # One that is just being opened or closed has no user yet, or any more.
        return [
            OpenConnection(user=each["user"], vhost=each["vhost"], name=each["name"])
            for each in listing
            if {"user", "vhost", "name"} <= each.keys()
        ]

    def close_connections(self, user: str, reason: str) -> None:
        for connection in self.connections():
            if connection.user == user:
                path = f"connections/{quote(connection.name, safe='')}"
                self._ask("DELETE", path, reason=reason, is_missing_fine=True)

    def _ask(self, method: str, path: str, body: Any = None, *, reason: str = "", is_missing_fine: bool = False) -> Any:
        request = urllib.request.Request(
            f"{self._base}/api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": self._authorization, "Content-Type": "application/json"},
        )
        if reason:
            request.add_header("X-Reason", reason)
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as exc:
            with exc:
                if exc.code == 404 and is_missing_fine:
                    return None
                raise self._refusal(exc) from None
        except (OSError, ValueError) as exc:
            cause = exc.reason if isinstance(exc, urllib.error.URLError) else exc
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise BrokerUnreachable(
                    f"the management API at {self._base} cannot be trusted: {cause.verify_message.rstrip('.')}. Name "
                    "the folder with its CA (--authority DIR), or the CA itself in SSL_CERT_FILE"
                ) from None
            raise BrokerUnreachable(f"no management API answers at {self._base}: {one_line(str(cause), 200)}") from None
        return json.loads(text) if text else None

    def _refusal(self, exc: urllib.error.HTTPError) -> BrokerError:
        if exc.code in (401, 403):
            return BrokerDenied(
                f"the management API at {self._base} refuses the user or the password: it takes a user with the tag "
                f"administrator, and its password in {PASSWORD_VARIABLE}"
            )
        if exc.code == 404:
            return BrokerUnreachable(f"what answers at {self._base} is not RabbitMQ's management API")
        try:
            said = json.loads(exc.read()).get("reason", "")
        except (OSError, ValueError, AttributeError):
            said = exc.reason
        return BrokerError(f"the management API at {self._base} says {exc.code}: {one_line(str(said), 300)}")


def _split(url: str) -> Any:
    try:
        parts = urlsplit(url)
        is_readable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        is_readable = False
    if not is_readable or not parts.username:
        raise ConfigError(f"the URL of the management API must look like {_EXAMPLE}")
    if parts.password is not None:
        raise ConfigError(f"a password in the management URL shows in process lists: put it into {PASSWORD_VARIABLE}")
    return parts


def password_hash(password: str) -> dict[str, str]:
    """`password` as definitions carry it: RabbitMQ's form, a salt of four bytes and SHA-256 of salt and password.

    "" is no password at all: nobody logs in with one.
    """
    if not password:
        return {"password_hash": ""}
    salt = secrets.token_bytes(4)
    digest = hashlib.sha256(salt + password.encode()).digest()
    return {
        "password_hash": base64.b64encode(salt + digest).decode(),
        "hashing_algorithm": "rabbit_password_hashing_sha256",
    }

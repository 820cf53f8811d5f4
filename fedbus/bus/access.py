"""Where a broker is, and how one is let in: URLs, certificates, and what may be shown of them."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import os
import re
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Final
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from fedbus.errors import ConfigError

_HEARTBEAT_S: Final = 10  # a connection that swallows everything is given up after 33 to 38 s
_EXAMPLE: Final = "amqp://user:password@host:5672/vhost"
_NEXT_URL: Final = re.compile(r"\s*,\s*(?=[A-Za-z][A-Za-z0-9+.-]*://)")


@dataclass(frozen=True)
class Access:
    """The way to a broker. Its `repr` and `str` show no secret.

    Args:
        urls: one URL (amqp:// or amqps://), or several of one cluster with commas between. The user of a certificate
            login stands in it as well: amqps://USER@HOST:5671/VHOST?auth=external.
        ca: PEM of the authorities that vouch for the broker; None: those that the system trusts.
        certificate, key: PEM of our own certificate (with what leads to its authority) and its private key.
        allow_plaintext: whether amqp:// may lead to another machine, where everybody on the road can read and change
            what is said.

    Raises:
        ConfigError: for what cannot be used, in words without secrets.
    """

    urls: str = field(repr=False)
    _: KW_ONLY
    ca: str | None = field(default=None, repr=False)
    certificate: str | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)
    allow_plaintext: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("a certificate and its key go together: give both, or none")
        for url in self.each_url:
            self._check_road(urlsplit(url))

    def __repr__(self) -> str:
        return f"<Access {self}>"

    def __str__(self) -> str:
        return redacted(self.urls)

    @cached_property
    def each_url(self) -> tuple[str, ...]:
        """All, checked before the first is tried: a mistake in the last must not wait for the day it is needed."""
        return tuple(_check_url(url) for url in _NEXT_URL.split(self.urls.strip()))

    def _check_road(self, parts: SplitResult) -> None:
        if parts.scheme == "amqps" or self.allow_plaintext or is_loopback(parts.hostname or ""):
            return
        raise ConfigError(
            f"amqp:// to {parts.hostname} would cross the network in plain text, password and all: use amqps://, or "
            "say --plaintext (FEDBUS_PLAINTEXT=1) where the network itself is safe"
        )

    def tls_context(self, url: str) -> ssl.SSLContext | None:
        """What secures the connection to `url`; None for amqp://.

        Beside `ca`, `certificate` and `key` the URL may name files: cafile, capath, certfile, keyfile. The broker's
        certificate is verified unless the URL says no_verify_ssl=1.

        Raises `ConfigError` for certificates that cannot be read.
        """
        parts = urlsplit(url)
        if parts.scheme != "amqps":
            return None
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        context = _trusting(self.ca, options)
        certificate, key = self.certificate, self.key
        if certificate is None and "certfile" in options:
            certificate = _read_pem(options["certfile"])
            key = _read_pem(options.get("keyfile", options["certfile"]))
        if certificate is not None and key is not None:
            _load_own(context, certificate, key)
        return context


def access_to(broker: str | Access) -> Access:
    """`broker` itself, or the way that a URL describes; FEDBUS_PLAINTEXT=1 in the environment allows plain text.

    Raises `ConfigError` for a URL that is none.
    """
    if isinstance(broker, Access):
        return broker
    return Access(broker, allow_plaintext=os.environ.get("FEDBUS_PLAINTEXT", "0") not in ("", "0"))


def redacted(urls: str) -> str:
    """`urls` (one, or several with commas between) as they may be shown: without users, passwords and options."""
    return ", ".join(map(_redact, _NEXT_URL.split(urls.strip())))


def user_of(url: str) -> str:
    """The broker's user that `url` logs in, as the broker will name it. Checked URLs only."""
    user = urlsplit(url).username
    return unquote(user) if user else "guest"  # aiormq's own choice where none is given


def is_loopback(host: str) -> bool:
    """Whether what goes to `host` stays on this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _redact(url: str) -> str:
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "?"
    host = parts.hostname or "?"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}{parts.path if parts.path != '/' else ''}"


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        has_port = parts.port is None or parts.port > 0
    except ValueError:
        raise ConfigError(f"the broker URL cannot be read; it looks like {_EXAMPLE}") from None
    if parts.scheme not in ("amqp", "amqps") or not parts.hostname or not has_port:
        raise ConfigError(f"the broker URL must look like {_EXAMPLE} (or amqps://...)")
    if "," in parts.hostname + parts.path:
        raise ConfigError(f"each of several broker URLs must look like {_EXAMPLE}; write a comma in a vhost as %2C")
    options = parse_qs(parts.query)
    if options.get("auth", ["plain"])[-1].lower() == "external":
        if parts.scheme != "amqps":
            raise ConfigError("a login by certificate (auth=external) needs amqps://")
        if not parts.username:
            raise ConfigError(
                "a login by certificate needs its user in the URL: amqps://USER@HOST:5671/VHOST?auth=external"
            )
    if "heartbeat" in options:
        return url
    return parts._replace(query="&".join(filter(None, (parts.query, f"heartbeat={_HEARTBEAT_S}")))).geturl()


def _trusting(ca: str | None, options: Mapping[str, str]) -> ssl.SSLContext:
    cafile, capath, cadata = options.get("cafile"), options.get("capath"), ca
    if cadata is None and "cadata" in options:
        try:
            cadata = base64.b64decode(options["cadata"], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise ConfigError("cadata in the broker URL is not base64 of PEM certificates") from None
    try:
        context = ssl.create_default_context(cafile=cafile, capath=capath, cadata=cadata)
    except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
        where = cafile or capath or "the given text"
        raise ConfigError(
            f"the broker's authorities (CA) cannot be read from {where}: PEM is due ({_why(exc)})"
        ) from exc
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if options.get("no_verify_ssl", "0") != "0":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _load_own(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """OpenSSL reads them from a file only: one in memory, or one that nobody else may read and that is gone at once."""
    with _short_lived_file() as file:
        try:
            file.write(f"{certificate.rstrip()}\n{key.rstrip()}\n")
            file.flush()
            context.load_cert_chain(_path_of(file))
        except (OSError, ValueError) as exc:
            raise ConfigError(
                f"our own certificate and key cannot be used: do they belong together? ({_why(exc)})"
            ) from exc


def _short_lived_file() -> IO[str]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("fedbus"), "w")
    return tempfile.NamedTemporaryFile("w", prefix="fedbus-")  # 0600


def _path_of(file: IO[str]) -> str:
    return f"/proc/self/fd/{file.fileno()}" if hasattr(os, "memfd_create") else file.name


def _read_pem(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} cannot be read: {_why(exc)}") from exc


def _why(exc: Exception) -> str:
    return str(getattr(exc, "strerror", None) or getattr(exc, "reason", None) or exc or type(exc).__name__)

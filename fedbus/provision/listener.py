"""The TLS side of a private node: a CA in its folder, a certificate for the node, and the listener that shows it."""

from __future__ import annotations

import datetime
import ipaddress
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from fedbus.bus.node import TlsListener, check_address
from fedbus.errors import ConfigError
from fedbus.provision.authority import CA_FILE, Authority, hosts_of, parse_certificates
from fedbus.provision.files import read_text, write_private
from fedbus.provision.records import BROKER_FILE, BROKER_KEY_FILE, Login, Office

_RENEWED_BEFORE: Final = datetime.timedelta(days=240)  # of two years: whoever starts a node once a year is never late


def node_office(folder: Path) -> Office:
    """The records and the CA of the private node whose data lies in `folder`."""
    return Office(folder / "provision")


def own_listener(
    office: Office,
    address: str,
    *,
    port: int | None,
    hosts: Sequence[str],
    login: Login,
    now: datetime.datetime,
) -> TlsListener:
    """A listener at `address` whose certificate is signed by the CA of `office`, both made or renewed where need be.

    `hosts`: further names and addresses under which others reach it.
    """
    check_address(address)
    authority = office.found("fedbus CA", now)
    names = [*dict.fromkeys([*hosts, *_names_of(address)])]
    if not _is_good(office, authority, names, now):
        certify(office, authority, names, now=now)
    return listener_of(office, address, port=port, login=login)


def certify(office: Office, authority: Authority, hosts: Sequence[str], *, now: datetime.datetime) -> datetime.datetime:
    """Make a certificate for a broker that is reached under `hosts`; returns its end."""
    issued = authority.issue_broker(hosts, now=now)
    write_private(office.folder / BROKER_KEY_FILE, issued.key)
    write_private(office.folder / BROKER_FILE, issued.certificate)
    return issued.not_after


def keep_certificate(office: Office, certificate: Path, key: Path) -> None:
    """Take a certificate that is brought along, for the node to show."""
    pem = read_text(certificate, "the certificate")
    parse_certificates(pem)
    write_private(office.folder / BROKER_KEY_FILE, read_text(key, "the key"))
    write_private(office.folder / BROKER_FILE, pem)


def listener_of(office: Office, address: str, *, port: int | None, login: Login) -> TlsListener:
    """A listener with the certificate that lies in the folder."""
    return TlsListener(
        address=address,
        port=port,
        ca=office.folder / CA_FILE,
        certificate=office.folder / BROKER_FILE,
        key=office.folder / BROKER_KEY_FILE,
        require_certificate=login == "certificate",
    )


def broker_certificate(office: Office) -> x509.Certificate | None:
    """What the node shows; None where it shows nothing."""
    path = office.folder / BROKER_FILE
    return parse_certificates(read_text(path, "the broker's certificate"))[0] if path.exists() else None


def _names_of(address: str) -> list[str]:
    """Under which names a node at `address` is reached as a matter of course."""
    own = [socket.gethostname()] if ipaddress.ip_address(address).is_unspecified else [address]
    return [*own, "localhost", "127.0.0.1"]


def _is_good(office: Office, authority: Authority, hosts: Sequence[str], now: datetime.datetime) -> bool:
    try:
        certificate = broker_certificate(office)
    except ConfigError:
        return False
    if certificate is None or not (office.folder / BROKER_KEY_FILE).exists():
        return False
    try:
        certificate.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return hosts_of(certificate) >= set(hosts) and certificate.not_valid_after_utc - now > _RENEWED_BEFORE

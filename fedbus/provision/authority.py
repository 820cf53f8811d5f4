"""A private certificate authority: a CA, the broker's certificate, one certificate for each user.

Keys are on the curve P-256 (FIPS 186-5, 3.2.1.3); a CA that is brought along may have any kind. What is issued follows
RFC 5280 closely enough for verifiers that insist (Python's VERIFY_X509_STRICT): key identifiers, key usage, basic
constraints. The common name of a user's certificate is the broker's user: that is what EXTERNAL logs in.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedbus.errors import ConfigError
from fedbus.provision.files import private_folder, read_text, write_private

CA_FILE: Final = "ca.pem"
CA_KEY_FILE: Final = "ca.key"
CA_DAYS: Final = 3650
BROKER_DAYS: Final = 730
USER_DAYS: Final = 365
_LONGEST_NAME: Final = 64  # ub-common-name, RFC 5280 A.1
_CLOCKS_DIFFER: Final = datetime.timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate and its key, both PEM; `serial` in hex, `not_after` in UTC."""

    certificate: str = field(repr=False)
    key: str = field(repr=False)
    serial: str
    not_after: datetime.datetime


class Authority:
    """A CA and its key."""

    def __init__(self, pem: str, certificate: x509.Certificate, key: CertificateIssuerPrivateKeyTypes) -> None:
        self.pem = pem
        self.certificate = certificate
        self._key = key

    def __repr__(self) -> str:
        return f"<Authority {self.certificate.subject.rfc4514_string()}>"

    @classmethod
    def create(cls, name: str, *, now: datetime.datetime, days: int = CA_DAYS) -> Authority:
        """Make a new CA that calls itself `name`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        builder = _begin(subject, subject, key.public_key(), now, now + datetime.timedelta(days=days))
        usage = _usage(key_cert_sign=True, crl_sign=True, digital_signature=False)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(_pem(certificate), certificate, key)

    @classmethod
    def parse(cls, pem: str, key_pem: str) -> Authority:
        """Take a CA that is brought along; of several certificates the one that `key_pem` belongs to signs.

        Raises `ConfigError` when it cannot sign.
        """
        certificates = parse_certificates(pem)
        key = _parse_key(key_pem)
        public = _public_bytes(key)
        own = next((each for each in certificates if _public_bytes(each) == public), None)
        if own is None:
            raise ConfigError("the CA's key does not belong to its certificate: give --ca and --ca-key of one CA")
        if not _may_sign(own):
            raise ConfigError("the certificate given as --ca may not sign others: it is no CA's (basic constraints)")
        return cls(pem, own, key)

    @classmethod
    def load(cls, folder: Path) -> Authority | None:
        """The CA kept in `folder`; None where there is none with its key."""
        if not (folder / CA_KEY_FILE).exists():
            return None
        return cls.parse(read_text(folder / CA_FILE, "the CA"), read_text(folder / CA_KEY_FILE, "the CA's key"))

    def save(self, folder: Path) -> None:
        """Keep it in `folder`: mode 0700, files 0600."""
        private_folder(folder)
        write_private(folder / CA_KEY_FILE, _key_pem(self._key))
        write_private(folder / CA_FILE, self.pem)

    def issue_broker(self, hosts: Sequence[str], *, now: datetime.datetime, days: int = BROKER_DAYS) -> Issued:
        """A certificate for a broker that is reached under each of `hosts`, DNS names or IP addresses."""
        if not hosts:
            raise ConfigError("a broker's certificate needs the names or addresses under which it is reached: --host")
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        return self._issue(hosts[0][:_LONGEST_NAME], ExtendedKeyUsageOID.SERVER_AUTH, now=now, days=days, names=names)

    def issue_user(self, user: str, *, now: datetime.datetime, days: int = USER_DAYS) -> Issued:
        """A certificate that logs `user` in."""
        if len(user) > _LONGEST_NAME:
            raise ConfigError(
                f"the broker user {user} is too long for a certificate: take a federation and client ids that have "
                f"{_LONGEST_NAME} characters together, or --login password"
            )
        return self._issue(user, ExtendedKeyUsageOID.CLIENT_AUTH, now=now, days=days)

    def _issue(
        self,
        common_name: str,
        purpose: x509.ObjectIdentifier,
        *,
        now: datetime.datetime,
        days: int,
        names: x509.SubjectAlternativeName | None = None,
    ) -> Issued:
        last = self.certificate.not_valid_after_utc
        if last <= now:
            raise ConfigError(f"the CA's certificate expired on {last:%Y-%m-%d}: give a new one")
        key = ec.generate_private_key(ec.SECP256R1())
        not_after = min(now + datetime.timedelta(days=days), last)
        builder = (
            _begin(_name(common_name), self.certificate.subject, key.public_key(), now, not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(self._key_identifier(), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        certificate = builder.sign(self._key, _digest(self._key))
        return Issued(
            certificate=_pem(certificate),
            key=_key_pem(key),
            serial=f"{certificate.serial_number:x}",
            not_after=certificate.not_valid_after_utc,
        )

    def _key_identifier(self) -> x509.AuthorityKeyIdentifier:
        try:
            own = self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        except x509.ExtensionNotFound:
            return x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def parse_certificates(pem: str) -> list[x509.Certificate]:
    """All certificates in `pem`, at least one; raises `ConfigError`."""
    try:
        return x509.load_pem_x509_certificates(pem.encode())
    except ValueError as exc:
        raise ConfigError(
            "there is no certificate in PEM form where one should be: -----BEGIN CERTIFICATE-----"
        ) from exc


def hosts_of(certificate: x509.Certificate) -> set[str]:
    """The DNS names and IP addresses that a certificate stands for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    addresses = names.get_values_for_type(x509.IPAddress)
    return {*names.get_values_for_type(x509.DNSName), *map(str, addresses)}


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    not_after: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, not_after) - _CLOCKS_DIFFER)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError as exc:
        raise ConfigError(f"{host[:80]!r} is neither a host's name in ASCII nor an IP address") from exc


def _usage(*, digital_signature: bool, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _may_sign(certificate: x509.Certificate) -> bool:
    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except x509.ExtensionNotFound:
        return False


def _digest(key: CertificateIssuerPrivateKeyTypes) -> hashes.SHA256 | None:
    """The Edwards curves hash by themselves."""
    return None if isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey) else hashes.SHA256()


def _parse_key(pem: str) -> CertificateIssuerPrivateKeyTypes:
    try:
        key = serialization.load_pem_private_key(pem.encode(), password=None)
    except TypeError as exc:
        raise ConfigError("the CA's key is encrypted: give it without a passphrase (openssl pkey -in ... )") from exc
    except ValueError as exc:
        raise ConfigError("the CA's key cannot be read: it must be a private key in PEM form") from exc
    if not hasattr(key, "sign"):
        raise ConfigError("the CA's key is of a kind that cannot sign")
    return key  # type: ignore[return-value]  # those that sign


def _public_bytes(holder: x509.Certificate | CertificateIssuerPrivateKeyTypes) -> bytes:
    return holder.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: CertificateIssuerPrivateKeyTypes) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()

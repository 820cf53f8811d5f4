"""The private CA: what its certificates say, and that verifiers take them."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedbus.errors import ConfigError
from fedbus.provision.authority import CA_FILE, CA_KEY_FILE, Authority, Issued, hosts_of, parse_certificates

NOW = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("test CA", now=NOW)


def parsed(issued: Issued) -> x509.Certificate:
    (certificate,) = parse_certificates(issued.certificate)
    return certificate


def purposes(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def common_name_in_handshake(authority: Authority, broker: Issued, user: Issued, host: str, tmp_path: Path) -> str:
    """Both ends of a TLS connection in memory, with all that OpenSSL can check; whom the broker takes the user for."""
    ends = []
    for issued, protocol in ((user, ssl.PROTOCOL_TLS_CLIENT), (broker, ssl.PROTOCOL_TLS_SERVER)):
        file = tmp_path / "own.pem"
        file.write_text(issued.certificate + issued.key)
        context = ssl.SSLContext(protocol)
        context.load_cert_chain(file)
        context.load_verify_locations(cadata=authority.pem)
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        ends.append(context)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ends[0].wrap_bio(down, up, server_hostname=host)
    server = ends[1].wrap_bio(up, down, server_side=True)
    waiting = [client, server]
    while waiting:
        end = waiting.pop(0)
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(end)
    subject = (server.getpeercert() or {})["subject"]
    return str(subject[0][0][1])  # ((("commonName", ...),),)


def test_a_users_certificate_logs_in_under_its_name(tmp_path: Path) -> None:
    now = datetime.datetime.now(datetime.UTC)
    authority = Authority.create("test CA", now=now)
    broker = authority.issue_broker(["rabbit.example.org", "10.0.0.1", "::1"], now=now)
    user = authority.issue_user("f.a~2", now=now)
    for host in ("rabbit.example.org", "10.0.0.1", "::1"):
        assert common_name_in_handshake(authority, broker, user, host, tmp_path) == "f.a~2"
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        common_name_in_handshake(authority, broker, user, "10.0.0.2", tmp_path)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):  # a user's is not good for a broker
        common_name_in_handshake(authority, user, user, "f.a~2", tmp_path)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):  # nor a broker's for a user
        common_name_in_handshake(authority, broker, broker, "10.0.0.1", tmp_path)
    late = authority.issue_user("f.a", now=now - 10 * DAY, days=9)
    with pytest.raises(ssl.SSLError, match="certificate verify failed"):
        common_name_in_handshake(authority, broker, late, "10.0.0.1", tmp_path)


def test_certificates_say_what_they_are_for_and_until_when(authority: Authority) -> None:
    user = parsed(authority.issue_user("f.a", now=NOW, days=30))
    broker = parsed(authority.issue_broker(["b.example.org", "10.0.0.1"], now=NOW, days=60))
    assert purposes(user) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert purposes(broker) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert user.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "f.a"
    assert (user.not_valid_after_utc, broker.not_valid_after_utc) == (NOW + 30 * DAY, NOW + 60 * DAY)
    assert user.not_valid_before_utc < NOW  # clocks differ
    assert hosts_of(broker) == {"b.example.org", "10.0.0.1"}
    assert hosts_of(user) == set()
    for certificate in (user, broker):
        certificate.verify_directly_issued_by(authority.certificate)
        assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_serials_and_keys_are_never_the_same_twice(authority: Authority) -> None:
    one, two = authority.issue_user("f.a", now=NOW), authority.issue_user("f.a", now=NOW)
    assert one.serial != two.serial
    assert one.key != two.key
    assert int(one.serial, 16) == parsed(one).serial_number


def test_nothing_outlives_the_ca_and_an_expired_ca_signs_nothing() -> None:
    authority = Authority.create("short", now=NOW, days=10)
    assert authority.issue_user("f.a", now=NOW, days=365).not_after == NOW + 10 * DAY
    with pytest.raises(ConfigError, match="expired on 2030-01-11"):
        authority.issue_user("f.a", now=NOW + 11 * DAY)


def test_a_ca_comes_back_from_its_folder_and_others_cannot_read_it(authority: Authority, tmp_path: Path) -> None:
    folder = tmp_path / "ca"
    assert Authority.load(folder) is None
    authority.save(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {CA_FILE: 0o600, CA_KEY_FILE: 0o600}
    loaded = Authority.load(folder)
    assert loaded is not None
    parsed(loaded.issue_user("f.a", now=NOW)).verify_directly_issued_by(authority.certificate)


def test_no_key_shows_in_a_repr(authority: Authority) -> None:
    issued = authority.issue_user("f.a", now=NOW)
    assert "PRIVATE" not in f"{authority!r} {issued!r}"


def brought(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey, *, is_ca: bool = True) -> tuple[str, str]:
    """A CA as some other tool may have made it: no key identifiers."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "brought along")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + 100 * DAY)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    pem = builder.sign(key, digest).public_bytes(serialization.Encoding.PEM).decode()
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem, key_pem.decode()


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()], ids=["rsa", "ed25519"]
)
def test_a_ca_may_be_brought_along(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey, authority: Authority) -> None:
    pem, key_pem = brought(key)
    own = Authority.parse(authority.pem + pem, key_pem)  # among several the one that the key belongs to
    certificate = parsed(own.issue_user("f.a", now=NOW))
    certificate.verify_directly_issued_by(parse_certificates(pem)[0])


def test_a_ca_that_cannot_sign_is_refused_with_the_reason(authority: Authority) -> None:
    pem, key_pem = brought(ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(ConfigError, match="does not belong"):
        Authority.parse(authority.pem, key_pem)
    with pytest.raises(ConfigError, match="no certificate in PEM"):
        Authority.parse("hello", key_pem)
    with pytest.raises(ConfigError, match="key cannot be read"):
        Authority.parse(pem, "hello")
    with pytest.raises(ConfigError, match="may not sign"):
        Authority.parse(*brought(ed25519.Ed25519PrivateKey.generate(), is_ca=False))


def test_names_that_no_certificate_can_carry_are_refused(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="64 characters together"):
        authority.issue_user("f." + "a" * 63, now=NOW)
    with pytest.raises(ConfigError, match="neither"):
        authority.issue_broker(["räbbit.example.org"], now=NOW)
    with pytest.raises(ConfigError, match="--host"):
        authority.issue_broker([], now=NOW)

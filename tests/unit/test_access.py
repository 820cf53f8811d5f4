"""The way to a broker: what is refused before anything is sent, and what is never shown."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from fedbus.bus.access import Access, access_to, redacted, user_of
from fedbus.bus.bundle import Bundle
from fedbus.cli.entry import without_password
from fedbus.errors import ConfigError

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        "amqp://u:p@127.0.0.1:5672/",
        "amqp://u:p@127.1.2.3/v",
        "amqp://u:p@localhost/v",
        "amqp://u:p@[::1]:5672/v",
        "amqps://u:p@broker.example/v",
        "amqps://u@broker.example/v?auth=external",
        "amqps://u:p@a.example/v, amqps://u:p@b.example/v",
    ],
)
def test_what_stays_on_this_machine_or_is_encrypted_is_taken(url: str) -> None:
    assert len(Access(url).each_url) == url.count("://")


@pytest.mark.parametrize("host", ["10.0.0.1", "broker.example", "localhost.example", "[2001:db8::1]", "0.0.0.0"])
def test_plain_text_to_another_machine_needs_to_be_allowed(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"amqp://u:{SECRET}@{host}:5672/v"
    with pytest.raises(ConfigError, match="--plaintext") as refused:
        access_to(url)
    assert SECRET not in str(refused.value)
    with pytest.raises(ConfigError):
        access_to(f"amqps://u:p@safe.example/, {url}")
    assert Access(url, allow_plaintext=True).each_url
    monkeypatch.setenv("FEDBUS_PLAINTEXT", "0")
    with pytest.raises(ConfigError):
        access_to(url)
    monkeypatch.setenv("FEDBUS_PLAINTEXT", "1")
    assert access_to(url).each_url


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://u:p@localhost", "must look like"),
        ("amqp://u:p@[::1/v", "cannot be read"),
        ("amqps://h/v?auth=external", "needs its user"),
        ("amqp://u@localhost/v?auth=external", "needs amqps"),
        ("amqp://u:p@localhost/a,b", "comma"),
    ],
)
def test_a_url_that_cannot_work_is_refused_in_one_line(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        access_to(url)
    assert "\n" not in str(refused.value)


def test_nothing_that_is_shown_of_it_holds_a_secret() -> None:
    url = f"amqps://hospital:{SECRET}@broker.example:5671/fed?keyfile={SECRET}"
    access = Access(url, ca=f"ca {SECRET}", certificate=f"cert {SECRET}", key=f"key {SECRET}")
    bundle = Bundle(federation="fed", role="client", user="fed.h", client_id="h", access=access)
    for shown in (repr(access), str(access), repr(bundle), str(bundle), redacted(url), f"{access}", f"{[access]}"):
        assert SECRET not in shown
    assert str(access) == "amqps://broker.example:5671/fed"
    assert redacted("amqp://u:p@[::1]:5672/v") == "amqp://[::1]:5672/v"


def test_the_user_is_the_one_that_the_broker_will_name() -> None:
    assert user_of("amqps://fed.h%40x@b/v?auth=external") == "fed.h@x"
    assert user_of("amqp://b/v") == "guest"


def test_certificates_that_cannot_be_used_are_a_line_not_a_traceback(tmp_path: Path) -> None:
    url = "amqps://u:p@b.example/v"
    with pytest.raises(ConfigError, match="PEM is due"):
        Access(url, ca="no certificate").tls_context(url)
    with pytest.raises(ConfigError, match="do they belong together"):
        Access(url, certificate="-----BEGIN", key="-----BEGIN").tls_context(url)
    with pytest.raises(ConfigError, match="go together"):
        Access(url, certificate="x")
    missing = f"{url}?cafile={tmp_path}/none.pem"
    with pytest.raises(ConfigError, match=r"none\.pem"):
        Access(missing).tls_context(missing)
    unread = f"{url}?certfile={tmp_path}/none.pem"
    with pytest.raises(ConfigError, match=r"none\.pem cannot be read"):
        Access(unread).tls_context(unread)


def test_verification_is_on_unless_the_url_says_otherwise() -> None:
    strict, lax = "amqps://u:p@b.example/v", "amqps://u:p@b.example/v?no_verify_ssl=1"
    context = Access(strict).tls_context(strict)
    assert context is not None
    assert context.check_hostname
    assert context.verify_mode.name == "CERT_REQUIRED"
    assert context.minimum_version.name == "TLSv1_2"
    context = Access(lax).tls_context(lax)
    assert context is not None
    assert context.verify_mode.name == "CERT_NONE"
    assert Access("amqp://localhost/v").tls_context("amqp://localhost/v") is None


# ---- bundles ---------------------------------------------------------------------------------------------------------


def bundle() -> Bundle:
    access = Access("amqps://fed.h@b.example:5671/fed?auth=external", ca="CA", certificate="CERT", key="KEY")
    return Bundle(federation="fed", role="client", user="fed.h", client_id="h", access=access)


def test_a_bundle_comes_back_as_it_was_saved_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "h.bundle"
    path.touch(0o644)
    bundle().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert Bundle.load(path) == bundle()
    assert os.listdir(tmp_path) == ["h.bundle"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fedbus_bundle": 2}, "upgrade"),
        ({"role": "king"}, "damaged"),
        ({"role": "server"}, "damaged"),
        ({"client_id": None}, "damaged"),
        ({"broker": 5}, "damaged"),
        ({"key": 7}, "damaged"),
        ({"key": None}, "go together"),
        ({"client_id": "a\nb"}, "client"),
        ({"broker": "amqp://u:p@b.example/fed"}, "--plaintext"),
    ],
)
def test_a_damaged_bundle_is_refused_in_one_line(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "h.bundle"
    bundle().save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=words) as refused:
        Bundle.load(path)
    assert "KEY" not in str(refused.value)


def test_a_file_that_is_no_bundle_or_is_open_to_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Bundle.load(tmp_path / "none")
    path = tmp_path / "h.bundle"
    path.write_text("{}")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is no bundle"):
        Bundle.load(path)
    bundle().save(path)
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        Bundle.load(path)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broker", [["--broker", "amqp://u:p@h/v"], ["--broker=amqp://u:p@h/v"]])
def test_a_password_leaves_the_command_line(broker: list[str]) -> None:
    command, url = without_password(["python", "fedbus", "server", *broker, "app.py", "--json"])
    assert (command, url) == (["python", "fedbus", "server", "app.py", "--json"], "amqp://u:p@h/v")


def test_the_password_of_any_of_several_urls_leaves_the_command_line() -> None:
    urls = "amqp://h:1/v,amqps://u:p@i:2/v"
    assert without_password(["python", "fedbus", "client", "--broker", urls]) == (["python", "fedbus", "client"], urls)


@pytest.mark.parametrize("rest", [["--broker", "amqp://u@h:1/v,amqp://u@i:1/v"], ["--broker"], ["amqp://u:p@h/v"], []])
def test_a_command_line_without_one_stays_as_it_is(rest: list[str]) -> None:
    command = ["python", "fedbus", "server", *rest]
    assert without_password(command) == (command, None)

"""deploy/rabbitmq.conf, definitions.json and enabled_plugins, in a RabbitMQ that runs with them."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

import aiormq
import pytest

from fedbus.provision.authority import Authority
from tests.deploy.broker import DeployedNode
from tests.deploy.files import DEPLOY

_HUNG_UP = r"reset by peer|[Bb]roken pipe|alert|EOF occurred"
"""How the end of a connection looks to us: what of its last words still comes through is a matter of timing."""

_SETTING = re.compile(r"^[a-z_]+(\.[a-z0-9_]+)* += \S+$")


@pytest.mark.parametrize("name", ["rabbitmq.conf", "rabbitmq-cluster.conf"])
def test_every_block_of_settings_says_why(name: str) -> None:
    for block in (DEPLOY / name).read_text().strip().split("\n\n"):
        lines = block.splitlines()
        assert lines[0].startswith("#"), lines[0]
        settings = [line for line in lines if not line.startswith("#")]
        assert all(map(_SETTING.match, settings)), settings


def test_the_definitions_hold_no_users_and_no_secrets() -> None:
    definitions = json.loads((DEPLOY / "definitions.json").read_text())
    assert definitions["users"] == definitions["vhosts"] == definitions["permissions"] == []
    assert "password" not in (DEPLOY / "definitions.json").read_text()


@pytest.mark.broker
def test_a_fresh_broker_has_no_guest_and_listens_to_nobody_in_clear(deployed: DeployedNode) -> None:
    users = json.loads(deployed.ctl("list_users", "--formatter", "json"))
    assert "guest" not in {user["user"] for user in users}
    assert "/" not in {vhost["name"] for vhost in json.loads(deployed.ctl("list_vhosts", "--formatter", "json"))}
    found = json.loads(deployed.ctl("listeners", "--formatter", "json", script="rabbitmq-diagnostics"))
    ports = {listener["protocol"]: listener["port"] for listener in found["listeners"]}
    assert ports.pop("clustering") not in ports.values()
    assert ports == {
        "amqp/ssl": deployed.port,
        "https": deployed.management_port,
        "http/prometheus": deployed.prometheus_port,
    }


@pytest.mark.broker
def test_the_name_in_the_certificate_is_the_user(deployed: DeployedNode, home: Path, tmp_path: Path) -> None:
    deployed.ctl("add_vhost", "fed")
    deployed.ctl("add_user", "fed.a", "not used")
    deployed.ctl("clear_password", "fed.a")
    deployed.ctl("set_permissions", "-p", "fed", "fed.a", "^$", "^$", "^$")
    authority = Authority.load(home / "office")
    assert authority is not None
    certificate, key = _issue(authority, tmp_path)
    login = f"auth=external&cafile={home / 'tls' / 'ca.pem'}&certfile={certificate}&keyfile={key}"

    async def connect() -> str:
        connection = await aiormq.connect(f"amqps://localhost:{deployed.port}/fed?{login}")
        told = await asyncio.to_thread(deployed.ctl, "list_connections", "user", "--formatter", "json")
        await connection.close()
        return str(json.loads(told)[0]["user"])

    assert asyncio.run(connect()) == "fed.a"


def _issue(authority: Authority, folder: Path) -> tuple[Path, Path]:
    """A certificate for the user fed.a."""
    issued = authority.issue_user("fed.a", now=datetime.now(UTC))
    certificate, key = folder / "user.pem", folder / "user.key"
    certificate.write_text(issued.certificate)
    key.write_text(issued.key)
    return certificate, key


@pytest.mark.broker
def test_nobody_comes_in_without_a_certificate_of_our_authority(
    deployed: DeployedNode, home: Path, tmp_path: Path
) -> None:
    trust = ssl.create_default_context(cafile=str(home / "tls" / "ca.pem"))
    with pytest.raises(OSError, match=rf"certificate required|{_HUNG_UP}"):
        _say_hello(deployed, trust)
    stranger = Authority.create("another authority", now=datetime.now(UTC))
    trust.load_cert_chain(*_issue(stranger, tmp_path))
    with pytest.raises(OSError, match=rf"unknown ca|{_HUNG_UP}"):
        _say_hello(deployed, trust)


def _say_hello(node: DeployedNode, trust: ssl.SSLContext) -> None:
    """Speak TLS and wait for the first byte of AMQP: only then a TLS 1.3 server has judged our certificate."""
    with (
        socket.create_connection(("127.0.0.1", node.port), 10) as plain,
        trust.wrap_socket(plain, server_hostname="localhost") as secured,
    ):
        secured.sendall(b"AMQP\x00\x00\x09\x01")
        if not secured.recv(1):
            raise ConnectionResetError("reset by peer")


@pytest.mark.broker
def test_weak_ciphers_are_refused(deployed: DeployedNode, home: Path) -> None:
    trust = ssl.create_default_context(cafile=str(home / "tls" / "ca.pem"))
    trust.maximum_version = ssl.TLSVersion.TLSv1_2
    trust.set_ciphers("ECDHE-ECDSA-AES256-SHA384")  # CBC, which OTP's defaults take
    with pytest.raises(ssl.SSLError, match=r"(?i)handshake failure|insufficient security"):
        _say_hello(deployed, trust)


@pytest.mark.broker
def test_the_management_api_speaks_tls_and_asks_for_a_password(deployed: DeployedNode, home: Path) -> None:
    trust = ssl.create_default_context(cafile=str(home / "tls" / "ca.pem"))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"https://localhost:{deployed.management_port}/api/overview", context=trust, timeout=10)


@pytest.mark.broker
def test_the_limits_are_in_force(deployed: DeployedNode) -> None:
    wanted = {
        "channel_max": "64",
        "connection_max": "8192",
        "max_message_size": "16777216",
        "consumer_timeout": "86400000",
        "heartbeat": "30",
        "handshake_timeout": "10000",
        "ssl_handshake_timeout": "10000",
        "vm_memory_high_watermark": "0.6",
        "auth_mechanisms": "['PLAIN','EXTERNAL']",
        "loopback_users": '[<<"guest">>]',
    }
    keys = ",".join(wanted)
    shown = f'[lists:flatten(io_lib:format("~0p", [element(2, application:get_env(rabbit, K))])) || K <- [{keys}]].'
    assert dict(zip(wanted, json.loads(deployed.ctl("eval", shown)), strict=True)) == wanted

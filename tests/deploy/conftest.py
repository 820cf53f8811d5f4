"""One broker with the operators' settings for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.authority import Authority
from tests.deploy.broker import DeployedNode


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def deployed(rabbitmq_installed: None, authority: Authority) -> Iterator[DeployedNode]:
    """RabbitMQ with deploy/rabbitmq.conf, definitions.json and enabled_plugins: take your own vhost and users."""
    authority.issue("localhost", "broker")
    with DeployedNode(authority.folder) as node:
        yield node

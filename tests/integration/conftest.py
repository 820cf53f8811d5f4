"""Fixtures of the tests that need a real RabbitMQ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedbus.bus.node import PrivateNode


@pytest.fixture(scope="session")
def node(rabbitmq_installed: None) -> Iterator[PrivateNode]:
    """One private node for all integration tests: take your own vhost or queue names, and never kill it."""
    with PrivateNode() as shared:
        yield shared

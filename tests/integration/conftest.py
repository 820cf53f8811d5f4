"""Fixtures of the tests that need a real RabbitMQ."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from fedbus.bus.node import PrivateNode, find_rabbitmq
from fedbus.errors import BrokerMissing


@pytest.fixture(scope="session")
def rabbitmq_installed() -> None:
    """Skip where RabbitMQ is missing, except under CI, where a silent skip would hide everything."""
    try:
        find_rabbitmq()
    except BrokerMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def node(rabbitmq_installed: None) -> Iterator[PrivateNode]:
    """One private node for all integration tests: take your own vhost or queue names, and never kill it."""
    with PrivateNode() as shared:
        yield shared

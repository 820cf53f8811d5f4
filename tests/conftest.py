"""Fixtures of every test that needs a real RabbitMQ."""

from __future__ import annotations

import os

import pytest

from fedbus.bus.node import find_rabbitmq
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

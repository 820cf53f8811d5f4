"""Fixtures of every test that needs a real RabbitMQ."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from fedbus.bus.node import PrivateNode, find_rabbitmq
from fedbus.errors import BrokerMissing
from tests.vhosts import Vhost, Vhosts, mend

settings.register_profile("fedbus", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # time proves nothing
settings.load_profile("fedbus")

_MADE_ONCE = ("breakable_node", "cluster", "deployed", "ground", "live", "place", "site")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of several workers (`pytest -n 2 --dist loadgroup`) one gets all tests that share what takes long to make."""
    for item in items:
        for name in set(_MADE_ONCE).intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(name))


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
    """One private node for all tests: take a `vhost` or queue names of your own, and do it no harm."""
    with PrivateNode() as shared:
        yield shared


@pytest.fixture(scope="session")
def vhosts(node: PrivateNode) -> Vhosts:
    return Vhosts(node)


@pytest.fixture
def vhost(vhosts: Vhosts) -> Vhost:
    """A place on the shared node that nobody has used: a whole federation may run there."""
    return vhosts.take()


@pytest.fixture(scope="session")
def _breakable_node(rabbitmq_installed: None) -> Iterator[PrivateNode]:
    with PrivateNode() as shared:
        yield shared


@pytest.fixture
def breakable_node(_breakable_node: PrivateNode) -> PrivateNode:
    """A private node that a test may kill, stop or alarm: it is whole again at the end, or the next one shows it."""
    mend(_breakable_node)
    return _breakable_node

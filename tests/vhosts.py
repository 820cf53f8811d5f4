"""RabbitMQ for many tests: a node takes longer to boot than most of them last, a vhost next to nothing."""

from __future__ import annotations

import json
import tempfile
import uuid
from dataclasses import dataclass

from fedbus.bus._keeper import _speaks_amqp
from fedbus.bus.node import _USER, PrivateNode

_BATCH = 20


@dataclass(frozen=True)
class Vhost:
    """A federation's place on a node that others use, too: nothing is in it but what its test puts there."""

    node: PrivateNode
    name: str

    @property
    def url(self) -> str:
        """AMQP URL, password included."""
        return self.node.url + self.name

    def queues(self, prefix: str) -> list[str]:
        """The queues whose names begin so."""
        names = self.node.rabbitmqctl("list_queues", "-p", self.name, "name", "--no-table-headers").split()
        return [name for name in names if name.startswith(prefix)]


class Vhosts:
    """Makes vhosts in batches: rabbitmqctl takes a second, however many they are."""

    def __init__(self, node: PrivateNode) -> None:
        self._node = node
        self._names: list[str] = []

    def take(self) -> Vhost:
        """One that nobody has used."""
        if not self._names:
            names = [f"test-{uuid.uuid4().hex[:12]}" for _ in range(_BATCH)]
            self._make(names)
            self._names = names
        return Vhost(self._node, self._names.pop())

    def _make(self, names: list[str]) -> None:
        rights = {"user": _USER, "configure": ".*", "write": ".*", "read": ".*"}
        definitions = {
            "vhosts": [{"name": name} for name in names],
            "permissions": [{**rights, "vhost": name} for name in names],
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(definitions, file)
            file.flush()
            self._node.rabbitmqctl("import_definitions", file.name)


def mend(node: PrivateNode) -> None:
    """Start a node again that a failed test has left dead."""
    if not _speaks_amqp(node.port):
        node.restart()

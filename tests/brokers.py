"""A broker's administration in memory, for tests that need no broker; the contract is in integration/test_provision."""

from __future__ import annotations

from typing import Any

from fedbus.errors import BrokerError
from fedbus.provision.admin import Admin, Definitions, OpenConnection

_KEYS = {
    "users": ("name",),
    "vhosts": ("name",),
    "permissions": ("user", "vhost"),
    "topic_permissions": ("user", "vhost", "exchange"),
    "policies": ("vhost", "name"),
    "parameters": ("vhost", "component", "name"),
}


class MemoryAdmin(Admin):
    """Definitions as RabbitMQ keeps them: an import replaces what has the same key.

    `fails`: the next import raises, and does nothing.
    """

    def __init__(self, version: str = "3.10.8") -> None:
        self.version = version
        self.fails = False
        self.open: list[OpenConnection] = []
        self.closed: list[tuple[str, str]] = []
        self.deleted_queues: list[tuple[str, str]] = []
        self._entries: dict[str, dict[tuple[str, ...], dict[str, Any]]] = {category: {} for category in _KEYS}

    def definitions(self) -> dict[str, Any]:
        listed = {category: list(entries.values()) for category, entries in self._entries.items()}
        return {**listed, "rabbitmq_version": self.version}

    def import_definitions(self, definitions: Definitions) -> None:
        if self.fails:
            self.fails = False
            raise BrokerError("the broker says no")
        for category, keys in _KEYS.items():
            for entry in definitions.get(category, ()):
                self._entries[category][tuple(entry[key] for key in keys)] = dict(entry)

    def delete_user(self, user: str) -> None:
        self._entries["users"].pop((user,), None)
        for category in ("permissions", "topic_permissions"):
            kept = {key: entry for key, entry in self._entries[category].items() if entry["user"] != user}
            self._entries[category] = kept
        self.open = [connection for connection in self.open if connection.user != user]

    def delete_queue(self, vhost: str, queue: str) -> None:
        self.deleted_queues.append((vhost, queue))

    def connections(self) -> list[OpenConnection]:
        return list(self.open)

    def close_connections(self, user: str, reason: str) -> None:
        self.closed.append((user, reason))
        self.open = [connection for connection in self.open if connection.user != user]

"""Who may speak for whom: what a message says of its sender is held against what the broker knows of it.

The broker checks the `user_id` of each message against the login of the connection that it came over. In a provisioned
federation every client has a user of its own, so nobody else can speak in its name; where everybody shares the server's
own user nothing can be told apart, and the broker's password is all there is.
"""

from __future__ import annotations

from collections.abc import Container

from fedbus.bus.base import Delivery
from fedbus.config import VIRTUAL_PREFIX, check_client_id, is_client_id
from fedbus.errors import DecodeError, one_line

_SERVER = "server"
_WORKER = "worker"


class Identity:
    """Decides whether a delivery comes from whom it says.

    Args:
        own_user: the server's user on the broker. "FED.server" makes "FED.hospital-a" the user of hospital-a and
            "FED.worker" that of the workers; with any other name a client's user is its id. What follows a "~" counts
            the secrets that a user has had.
        virtual_clients: the ids that workers speak for.
    """

    def __init__(self, own_user: str, virtual_clients: Container[str] = ()) -> None:
        self._own_user = own_user
        name = _without_generation(own_user)
        self._prefix = name.removesuffix(_SERVER) if f".{name}".endswith(f".{_SERVER}") else ""
        self._worker = f"{self._prefix}{_WORKER}"
        self._virtual_clients = virtual_clients

    @property
    def is_provisioned(self) -> bool:
        """Whether the server's user is called as provisioning calls it: then clients have users of their own."""
        return bool(self._prefix)

    def check_ours(self, delivery: Delivery) -> None:
        """Raise `DecodeError` unless the server's own user sent it."""
        self.check_told(delivery)
        if delivery.user_id != self._own_user:
            raise DecodeError(f"{_shown(delivery.user_id)} may not say what only the server says")

    def check(self, delivery: Delivery, client_id: str) -> None:
        """Raise `DecodeError`, or `ConfigError` for a name that is none, unless the sender is this client."""
        self.check_told(delivery)
        check_client_id(client_id)  # it is about to be a routing key, and on a screen
        user = _without_generation(delivery.user_id or "")
        is_virtual = client_id in self._virtual_clients
        its_user = self._worker if is_virtual else f"{self._prefix}{client_id}"
        if delivery.user_id != self._own_user and user != its_user:
            raise DecodeError(
                f"{_shown(delivery.user_id)} is not the user of {client_id}: each client logs in as itself"
            )

    def has_own_user(self, delivery: Delivery) -> bool:
        """Whether the broker vouches for more than that its sender knows the server's own password."""
        return delivery.user_id not in (None, self._own_user)

    def is_worker(self, user: str) -> bool:
        """Whether this is the user of the worker processes."""
        return _without_generation(user) == self._worker

    def client_of(self, user: str) -> str | None:
        """The client that a user of its own is; None for the workers' and a server's, or where it can be none."""
        client_id = _without_generation(user).removeprefix(self._prefix)
        return client_id if client_id not in (_SERVER, _WORKER) and is_client_id(client_id) else None

    def user_of(self, delivery: Delivery) -> str | None:
        """The sender as it may be shown and counted; None where the broker cannot tell.

        Where a message does not name its user, a provisioned broker vouches for its routing key.
        """
        if delivery.user_id is not None:
            return one_line(delivery.user_id, 100) if self.has_own_user(delivery) else None
        if not self.is_provisioned or not is_client_id(delivery.routing_key):
            return None
        is_virtual = delivery.routing_key.startswith(VIRTUAL_PREFIX)
        return self._worker if is_virtual else f"{self._prefix}{delivery.routing_key}"

    def check_told(self, delivery: Delivery) -> None:
        """Raise `DecodeError` unless the broker can say who sent it, and to where."""
        if delivery.is_copied:
            raise DecodeError("a message with a CC header: nobody may choose further routing keys")
        if delivery.user_id is None:
            raise DecodeError("a message without a user_id: its sender cannot be told")


def _without_generation(user: str) -> str:
    return user.partition("~")[0]


def _shown(user: str | None) -> str:
    return repr(one_line(user or "", 100))

"""Who is in: leases, renewed by every sign of life."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Member:
    """A client that was heard of within its lease; `session` is empty until it was heard of at all."""

    client_id: str
    session: str
    heard_at: float
    fit_task: str | None = None
    """The fit task that it was given and has not answered."""
    at_work_on: str = ""
    """The fit task that it said it has in hand."""
    is_in_doubt: bool = False
    """Whether `fit_task` may never have reached it; its next sign of life tells."""


class Membership:
    """The living clients, the longest silent one first."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._members: OrderedDict[str, Member] = OrderedDict()
        self.heard_through = math.inf
        """The time up to which everything that clients said has been heard: silence after it proves nothing."""

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._members

    def get(self, client_id: str) -> Member | None:
        return self._members.get(client_id)

    def renew(self, client_id: str, session: str, now: float) -> bool:
        """Note a sign of life; True when the client was not a member before."""
        member = self._members.get(client_id)
        if member is None:
            self._members[client_id] = Member(client_id, session, now)
            return True
        member.session = session
        member.heard_at = max(member.heard_at, now)
        self._members.move_to_end(client_id)
        return False

    def presume(self, client_id: str, now: float) -> Member:
        """Take somebody for a member who was one before we were; its session is not known, so it is empty."""
        if client_id not in self._members:
            self._members[client_id] = Member(client_id, "", now)
        return self._members[client_id]

    def renew_all(self, heard_at: float) -> None:
        """Take everybody for heard at `heard_at`."""
        for member in self._members.values():
            member.heard_at = max(member.heard_at, heard_at)

    def remove(self, client_id: str) -> Member | None:
        return self._members.pop(client_id, None)

    def next_expiry(self) -> float | None:
        """When the longest silent member's lease ends; None while that is not known."""
        first = next(iter(self._members.values()), None)
        if first is None or first.heard_at + self._lease_s > self.heard_through:
            return None
        return first.heard_at + self._lease_s

    def expired(self, now: float) -> list[Member]:
        """The members whose lease has ended; they stay until they are removed."""
        lost = []
        for member in self._members.values():
            if member.heard_at + self._lease_s > min(now, self.heard_through):
                break
            lost.append(member)
        return lost

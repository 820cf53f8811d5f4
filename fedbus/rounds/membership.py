"""Who is in, and who is at work: leases, renewed by every sign of life, and fit tasks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Member:
    """A client that was heard of within its lease; `session` is empty until it was heard of at all."""

    client_id: str
    session: str
    heard_at: float
    fit_task: str | None = None
    """The fit task that it was given and has not answered."""
    due_at: float = math.inf
    """Until when it has time for it."""
    at_work_on: str = ""
    """The fit task that it said it has in hand."""
    version: int | None = None
    """The newest version that it was asked to train or to evaluate."""
    is_in_doubt: bool = False
    """Whether `fit_task` may never have reached it; its next sign of life tells."""

    def is_busy(self, now: float) -> bool:
        """Whether it works on a task and still has time for it, or says that it does.

        One beyond its time that does not say so may have lost its task altogether.
        """
        return self.fit_task is not None and (now < self.due_at or self.at_work_on == self.fit_task)


class Membership:
    """The living clients, the longest silent one first.

    Who is idle is known without a look at everybody: with a thousand clients that would be most of the engine's work.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._members: OrderedDict[str, Member] = OrderedDict()
        self._idle: dict[str, Member] = {}
        self._busy: OrderedDict[str, Member] = OrderedDict()  # whose time ends first comes first
        self._overdue: dict[str, Member] = {}
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
            self._add(Member(client_id, session, now))
            return True
        member.session = session
        member.heard_at = max(member.heard_at, now)
        self._members.move_to_end(client_id)
        return False

    def presume(self, client_id: str, now: float) -> Member:
        """Take somebody for a member who was one before we were; its session is not known, so it is empty."""
        if client_id not in self._members:
            self._add(Member(client_id, "", now))
        return self._members[client_id]

    def _add(self, member: Member) -> None:
        self._members[member.client_id] = self._idle[member.client_id] = member

    def renew_all(self, heard_at: float) -> None:
        """Take everybody for heard at `heard_at`."""
        for member in self._members.values():
            member.heard_at = max(member.heard_at, heard_at)

    def remove(self, client_id: str) -> Member | None:
        for place in (self._idle, self._busy, self._overdue):
            place.pop(client_id, None)
        return self._members.pop(client_id, None)

    # ---- at work -------------------------------------------------------------------------------------------------

    def give(self, member: Member, task_id: str, due_at: float, version: int) -> None:
        """Note the member's task; nobody's time ends before that of those who were given one earlier."""
        self.show(member, version)
        member.fit_task, member.due_at, member.is_in_doubt = task_id, due_at, False
        for place in (self._idle, self._busy, self._overdue):
            place.pop(member.client_id, None)
        self._busy[member.client_id] = member

    def show(self, member: Member, version: int) -> None:
        """Note that the member was asked to do something with `version`."""
        member.version = version if member.version is None else max(member.version, version)

    def free(self, member: Member) -> None:
        """Note that the member has no task any more."""
        member.fit_task, member.due_at = None, math.inf
        for place in (self._busy, self._overdue):
            place.pop(member.client_id, None)
        if member.client_id in self._members:
            self._idle[member.client_id] = member

    def idle(self, now: float) -> list[Member]:
        """The members that are not busy."""
        self._pass_time(now)
        return [*self._idle.values(), *(member for member in self._overdue.values() if not member.is_busy(now))]

    def num_in_time(self, now: float) -> int:
        """Members at work who still have time for it."""
        self._pass_time(now)
        return len(self._busy)

    def counts(self, now: float) -> tuple[int, int, int]:
        """How many are idle, are at work with time for it, and are overdue."""
        self._pass_time(now)
        return len(self._idle), len(self._busy), len(self._overdue)

    def is_anybody_busy(self, now: float) -> bool:
        self._pass_time(now)
        return bool(self._busy) or any(member.is_busy(now) for member in self._overdue.values())

    def next_due(self, now: float) -> float:
        """When the time of a member for its task ends next."""
        self._pass_time(now)
        return next((member.due_at for member in self._busy.values()), math.inf)

    def _pass_time(self, now: float) -> None:
        while self._busy:
            client_id, member = next(iter(self._busy.items()))
            if now < member.due_at:
                break
            self._overdue[client_id] = self._busy.pop(client_id)

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

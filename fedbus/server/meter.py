"""How much work each broker user may cause: token buckets, and a door that stays shut longer each time one runs dry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedbus.clock import now


@dataclass(frozen=True, slots=True)
class Allowance:
    """`burst` tokens at once, and `per_s` of them every second."""

    per_s: float
    burst: float


_SHUT_S: Final = 60.0
_LONGEST_SHUT_S: Final = 3600.0
_FORGIVEN_AFTER_S: Final = 600.0


@dataclass(slots=True)
class _Account:
    tokens: float
    filled_at: float
    shut_until: float = 0.0
    shut_s: float = 0.0
    """How long it was shut the last time."""


class Meter:
    """One account for each user that the broker vouches for: as many as were provisioned, however many connect."""

    def __init__(self, clock: Callable[[], float] = now) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def is_shut(self, user: str) -> bool:
        """Whether nothing of this user is to be looked at now."""
        account = self._accounts.get(user)
        return account is not None and account.shut_until > 0.0 and self._clock() < account.shut_until

    def spend(self, user: str, cost: float, allowance: Allowance) -> float:
        """Take `cost` tokens; the seconds for which the user is shut out because of it, 0 while there are enough.

        The first time it is a minute, and twice as long each further time until it has behaved for ten minutes.
        """
        at = self._clock()
        account = self._accounts.get(user)
        if account is None:
            account = self._accounts[user] = _Account(allowance.burst, at)
        account.tokens = min(allowance.burst, account.tokens + (at - account.filled_at) * allowance.per_s) - cost
        account.filled_at = at
        if account.tokens >= 0:
            return 0.0
        is_forgiven = at - account.shut_until > _FORGIVEN_AFTER_S
        account.shut_s = _SHUT_S if is_forgiven or not account.shut_s else min(2 * account.shut_s, _LONGEST_SHUT_S)
        account.shut_until = at + account.shut_s
        account.tokens = allowance.burst / 10  # whoever goes on as before is out again soon
        return account.shut_s

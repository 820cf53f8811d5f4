"""Who may upload now: a few large updates at a time, so that memory does not grow with the number of clients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedbus.clock import now

STAGING_BYTES: Final = 128 << 20
"""What may be under way at a time; one upload always may, however large."""

LOW_WATER: Final = 8 << 20
"""Bytes still to come when the next upload is let in all the same: the road from the broker never runs dry."""

EAGER_BYTES: Final = 64 << 20
"""What all clients together may send unasked."""


SLOWEST_BYTES_PER_S: Final = 1 << 20
"""An upload that is slower keeps its place no longer than this one would, and some."""


def eager_share(clients: int) -> int:
    """The largest update, in payload bytes, that each of so many clients may send without asking."""
    return EAGER_BYTES // max(1, clients)


@dataclass(slots=True)
class _Upload:
    client_id: str
    nbytes: int
    touched_at: float
    granted_at: float = 0.0


class UploadSlots:
    """Grants uploads, first come first served: as many as fit, and the next when those are nearly here.

    Args:
        grant: called with (client_id, task_id) for each grant.
        missing_bytes: what of an upload is still to come; None when it has not begun.
        is_full: whether an update that is not folded yet lies in memory.
    """

    def __init__(
        self,
        grant: Callable[[str, str], None],
        *,
        missing_bytes: Callable[[str], int | None],
        is_full: Callable[[], bool],
        clock: Callable[[], float] = now,
    ) -> None:
        self._grant = grant
        self._missing_bytes = missing_bytes
        self._is_full = is_full
        self._clock = clock
        self._waiting: OrderedDict[str, _Upload] = OrderedDict()
        self._granted: dict[str, _Upload] = {}

    def __repr__(self) -> str:
        return f"<UploadSlots granted={len(self._granted)} waiting={len(self._waiting)}>"

    @property
    def granted(self) -> int:
        """Uploads that may go on."""
        return len(self._granted)

    @property
    def waiting(self) -> int:
        """Uploads that wait for room."""
        return len(self._waiting)

    def request(self, client_id: str, task_id: str, nbytes: int) -> None:
        """Let an upload queue up; one that has its grant already is told again."""
        if task_id in self._granted:
            self._grant(client_id, task_id)
        elif task_id not in self._waiting:
            self._waiting[task_id] = _Upload(client_id, nbytes, self._clock())
        self.pump()

    def touch(self, task_id: str) -> None:
        """Note that something of this upload has come."""
        if task_id in self._granted:
            self._granted[task_id].touched_at = self._clock()
            self.pump()

    def release(self, task_id: str) -> None:
        """The upload is complete, or will not be."""
        self._waiting.pop(task_id, None)
        if self._granted.pop(task_id, None) is not None:
            self.pump()

    def release_client(self, client_id: str) -> None:
        """The client is gone, or has begun anew."""
        for task_id in [*self._waiting, *self._granted]:
            upload = self._waiting.get(task_id) or self._granted.get(task_id)
            if upload is not None and upload.client_id == client_id:
                self.release(task_id)

    def release_stalled(self, before: float) -> None:
        """Take grants back of which nothing has come since `before`; a client that lives asks again."""
        for task_id, upload in list(self._granted.items()):
            if upload.touched_at < before:
                self.release(task_id)

    def release_slow(self, before: float) -> None:
        """Let others in beside uploads that take for ever: those go on, but hold nobody up."""
        for task_id, upload in list(self._granted.items()):
            if self._waiting and upload.granted_at + upload.nbytes / SLOWEST_BYTES_PER_S < before:
                self.release(task_id)

    def pump(self) -> None:
        """Grant what can be granted now."""
        while self._waiting and self._has_room(next(iter(self._waiting.values())).nbytes) and not self._is_full():
            task_id, upload = self._waiting.popitem(last=False)
            upload.touched_at = upload.granted_at = self._clock()
            self._granted[task_id] = upload
            self._grant(upload.client_id, task_id)

    def _has_room(self, nbytes: int) -> bool:
        under_way = sum(upload.nbytes for upload in self._granted.values())
        return under_way + nbytes <= STAGING_BYTES or self._to_come() <= LOW_WATER

    def _to_come(self) -> int:
        """Bytes of the granted uploads that are not here yet."""
        missing = (self._missing_bytes(task_id) for task_id in self._granted)
        return sum(
            upload.nbytes if bytes_ is None else bytes_
            for bytes_, upload in zip(missing, self._granted.values(), strict=True)
        )

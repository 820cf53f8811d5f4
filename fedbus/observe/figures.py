"""What a server or a client can be asked for at any moment, as plain numbers: metrics that no event tells."""

from __future__ import annotations

import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerFigures:
    """A server as of now.

    `idle`, `busy`, `overdue`: members by what they do. `open_round`: 0 while none is open; `open_s`: for how long it
    is. `uploads_granted` go on, `uploads_waiting` wait for room. `staged_bytes`: of updates in memory that are not
    folded. `received_bytes`: of all messages on the updates queue so far, whatever became of them.
    """

    version: int
    open_round: int
    open_s: float
    idle: int
    busy: int
    overdue: int
    uploads_granted: int
    uploads_waiting: int
    staged_bytes: int
    received_bytes: int


@dataclass(frozen=True, kw_only=True)
class ClientFigures:
    """A client as of now.

    `lease_s`: 0 before the first welcome; `welcomed_at`: Unix time of the last one, 0 before it. `outbox_updates` with
    `outbox_bytes` have no receipt yet. `uploaded_bytes`: of update messages that the broker confirmed;
    `downloaded_bytes`: of messages of the model stream.
    """

    is_member: bool
    lease_s: float
    welcomed_at: float
    outbox_updates: int
    outbox_bytes: int
    uploaded_bytes: int
    downloaded_bytes: int


@dataclass(frozen=True, kw_only=True)
class WorkerFigures:
    """A worker as of now.

    `has_work`: whether there is a queue that it takes tasks from. `in_hand`: tasks that it has taken; it does
    `slots` of them at a time. The bytes are those of `ClientFigures`.
    """

    has_work: bool
    slots: int
    in_hand: int
    uploaded_bytes: int
    downloaded_bytes: int


def resident_bytes() -> int:
    """Memory that this process holds now; where the system does not tell (macOS), the most that it ever held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

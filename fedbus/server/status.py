"""The federation at a glance, as JSON, for whoever has the server's rights and asks."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Collection, Sequence
from importlib.metadata import version
from typing import Any, Final

from fedbus.config import RoundConfig
from fedbus.observe.figures import ServerFigures, resident_bytes
from fedbus.rounds.clients import ClientRecord, ClientRecords
from fedbus.rounds.snapshot import EngineSnapshot, MemberSnapshot
from fedbus.server.history import plain

MOST_MEMBERS: Final = 10_000
"""Members in one answer, some 400 bytes each: the answer must fit into one message. Those that lag come first."""
MOST_ABSENT: Final = 1_000


def regime(rounds: RoundConfig) -> str:
    """The preset that these settings come closest to."""
    if rounds.is_asynchronous:
        return "asynchronous" if rounds.mixing is not None else "buffered"
    return "semi-synchronous" if (rounds.over_selection or 1.0) > 1.0 else "synchronous"


def describe(
    *,
    run_id: str,
    epoch: int,
    rounds: RoundConfig,
    snapshot: EngineSnapshot,
    figures: ServerFigures,
    records: ClientRecords,
    joined: Collection[str],
    uptime_s: float,
) -> dict[str, Any]:
    """Everything about a run, plain enough for JSON.

    `joined`: everybody who ever was in. `lag` of a member: versions between the newest and the one it was given last.
    """
    members = sorted(snapshot.members, key=lambda member: _interest(member, snapshot.version))
    absent = sorted(set(joined) - {member.client_id for member in members})
    return {
        "run_id": run_id,
        "epoch": epoch,
        "regime": regime(rounds),
        "phase": snapshot.phase,
        "num_rounds": rounds.num_rounds,
        "rounds_committed": snapshot.committed_rounds,
        "version": snapshot.version,
        "round": {
            "open": snapshot.open_round,
            "open_s": snapshot.open_s,
            "closes_in_s": snapshot.closes_in_s,
            "folded": snapshot.folded,
            "needed": snapshot.needed,
        },
        "clients_missing": snapshot.clients_missing,
        "num_members": len(members),
        "members": [_member(member, snapshot.version, records) for member in members[:MOST_MEMBERS]],
        "num_absent": len(absent),
        "absent": absent[:MOST_ABSENT],
        "uploads": {
            "granted": figures.uploads_granted,
            "waiting": figures.uploads_waiting,
            "staged_bytes": figures.staged_bytes,
        },
        "server": {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "uptime_s": uptime_s,
            "resident_bytes": resident_bytes(),
            "fedbus": version("fedbus"),
        },
    }


def _interest(member: MemberSnapshot, version_: int) -> tuple[int, int, str]:
    """Who hangs or lags first, then by name."""
    order: Sequence[str] = ("overdue", "late", "training", "idle")
    return order.index(member.state) // 2, -_lag(member, version_), member.client_id


def _lag(member: MemberSnapshot, version_: int) -> int:
    return 0 if member.version is None else version_ - member.version


def _member(member: MemberSnapshot, version_: int, records: ClientRecords) -> dict[str, Any]:
    record = records.get(member.client_id) or ClientRecord(client_id=member.client_id)
    return {
        "client_id": member.client_id,
        "state": member.state,
        "version": member.version,
        "lag": None if member.version is None else _lag(member, version_),
        "round": member.round,
        "working_s": _rounded(member.working_s),
        "silent_s": _rounded(member.silent_s),
        "asked": record.asked,
        "folded": record.folded,
        "late": record.late,
        "failed": record.failed,
        "refused": record.refused,
        "stopped": record.stopped,
        "lost": record.lost,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def as_json(status: dict[str, Any]) -> bytes:
    """The bytes of it."""
    return json.dumps(plain(status), separators=(",", ":")).encode()

"""`python -m tests.hostile.run [ATTACK ...] [--seconds N] [--json]`: play attacks, measure what they cost the others.

Each attack is played for so many seconds (a flood three times as long), after as long a time of peace. The ratio is
that of the honest rounds' 95th percentiles in both; only the two halves of one row may be compared. The attackers run
with `nice 19`: on this one machine they would otherwise take the processors away, which from elsewhere they could not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fedbus.bus.node import PrivateNode
from tests.faults.fleet import Stalled
from tests.hostile.attacks import ATTACKS, Attack
from tests.hostile.field import Field
from tests.hostile.ground import Ground, PeakWatch
from tests.hostile.raw import Refused

_FLOOD_TIMES = 3
_CALM_ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """What became of one attack; memory in MiB, rounds in seconds."""

    attack: str
    control: str
    refused: str
    plays: int
    server_before: float
    server_peak: float
    broker_before: float
    broker_peak: float
    p95_peace: float
    p95: float
    worst: float
    rounds: int
    is_stopped: bool

    @property
    def ratio(self) -> float:
        return self.p95 / self.p95_peace


def measure(ground: Ground, attack: Attack, seconds: float) -> Row:
    """A time of peace, and then the attack for as long."""
    seconds *= _FLOOD_TIMES if attack.is_flood else 1
    _until_calm(ground)
    peace = _rounds_during(ground, seconds)
    refused, plays, is_stopped = "", 0, True
    since = len(ground.look())
    with PeakWatch(server=ground.server.pid, broker=ground.node.pid) as memory:
        over_at = time.monotonic() + seconds
        while plays == 0 or time.monotonic() < over_at:
            field = Field(ground, attack.attacker, seconds if attack.is_flood else 0.01)
            try:
                refused = attack.play(field)
            except (Refused, OSError, Stalled, AssertionError) as exc:
                if plays == 0:  # later it may be shut out, which is as good
                    refused, is_stopped = f"{type(exc).__name__}: {exc}", False
                    break
            finally:
                field.close()
            plays += 1
        ground.rounds_go_on(1, timeout_s=120)
    war = _rounds(ground, since)
    return Row(
        attack=attack.name,
        control=attack.control,
        refused=" ".join(refused.split())[:110],
        plays=plays,
        server_before=round(memory.before["server"]),
        server_peak=round(memory.peak["server"]),
        broker_before=round(memory.before["broker"]),
        broker_peak=round(memory.peak["broker"]),
        p95_peace=_p95(peace),
        p95=_p95(war),
        worst=max(war),
        rounds=len(war),
        is_stopped=is_stopped,
    )


def _until_calm(ground: Ground) -> None:
    """Wait until all that an earlier attack has left is behind us."""
    while True:
        since = len(ground.look())
        ground.rounds_go_on(_CALM_ROUNDS, timeout_s=120)
        if not any(told.get("event") == "message_rejected" for told in ground.told[since:]):
            return


def _rounds_during(ground: Ground, seconds: float) -> list[float]:
    since = len(ground.look())
    time.sleep(seconds)
    ground.rounds_go_on(1)
    return _rounds(ground, since)


def _rounds(ground: Ground, since: int) -> list[float]:
    return [told["seconds"] for told in ground.look()[since:] if told.get("event") == "round_closed"]


def _p95(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.run", description=__doc__)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"any of: {', '.join(ATTACKS)}")
    parser.add_argument("--seconds", type=float, default=4.0, help="of peace, and of attack")
    parser.add_argument("--json", action="store_true", help="one JSON object per attack")
    asked = parser.parse_args()
    unknown = [name for name in asked.attacks if not any(name in known for known in ATTACKS)]
    if unknown:
        parser.error(f"no attack is called {unknown[0]!r}")
    chosen = [attack for name, attack in ATTACKS.items() if not asked.attacks or any(a in name for a in asked.attacks)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedbus-hostile-")))
        node = stack.enter_context(PrivateNode())
        ground = stack.enter_context(Ground(folder, node, [attack.attacker for attack in chosen]))
        os.nice(19)
        rows = [_shown(measure(ground, attack, asked.seconds), as_json=asked.json) for attack in chosen]
    return 0 if all(row.is_stopped for row in rows) else 1


def _shown(row: Row, *, as_json: bool) -> Row:
    if as_json:
        print(json.dumps({**asdict(row), "ratio": row.ratio}), flush=True)  # noqa: T201
    else:
        verdict = "" if row.is_stopped else "NOT STOPPED | "
        print(  # noqa: T201
            f"{row.attack} | {row.control} | {verdict}{row.refused} | server {row.server_before:.0f} -> "
            f"{row.server_peak:.0f} MiB | broker {row.broker_before:.0f} -> {row.broker_peak:.0f} MiB | "
            f"p95 {row.p95_peace:.2f} -> {row.p95:.2f} s, x {row.ratio:.2f}, worst of {row.rounds}: {row.worst:.2f} s",
            flush=True,
        )
    return row


if __name__ == "__main__":
    sys.exit(_main())

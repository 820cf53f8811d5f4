"""Kill one party again and again while rounds are open, then count what became of each update.

    python -m tests.faults.campaign {server|broker|clients} --kills 100 --rounds 50 --clients 8

First the run without faults (its model is the one to end with, and so is that of the same run over the memory bus),
then the run with them: SIGKILL at random instants, a restart at once, until the budget of kills is used up and the run
has ended. Exit code 1 when anything is wrong, an unused budget included.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedbus.bus.node import PrivateNode
from tests.faults.adding_app import Settings
from tests.faults.checker import Verdict, model_sha
from tests.faults.expected import expected_sha
from tests.faults.fleet import SERVER, Fleet, Stalled

TARGETS = ("server", "broker", "clients")
_STARTUP_SHARE, _STARTUP_SHARE_WHEN_LATE = 0.2, 0.8
"""Of the kills, how many fall into the start of what was killed just before: more when the rounds are ahead of them."""
_STARTUP_S, _STARTUP_S_WHEN_LATE = 0.4, 0.2
_SETTLED_S = 1.5
"""A quorum queue that was declared less than a second before its node is killed can come back empty."""
_RESERVE = 1
"""Rounds that are left to the end: a kill must fall while rounds are open. In the last one before them a fit waits
until all kills are done."""
_PLANNED = 0.9
"""Share of the rounds into which the kills are planned: the rest takes those that are late."""
_STALLED_S = 90.0


@dataclass(kw_only=True)
class Result:
    """What a campaign found; `recovery_s`: from each kill to the next sign of progress."""

    target: str
    kills_wanted: int
    seed: int
    kills: int = 0
    seconds: float = 0.0
    seconds_without_faults: float = 0.0
    recovery_s: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def all_problems(self) -> list[str]:
        of_verdict = list(self.verdict.problems) if self.verdict is not None else []
        unused = [f"only {self.kills} of {self.kills_wanted} kills were done"] * (self.kills != self.kills_wanted)
        return [*self.problems, *unused, *of_verdict]

    def to_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "kills": self.kills,
            "kills_wanted": self.kills_wanted,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "seconds_without_faults": round(self.seconds_without_faults, 1),
            "recovery_s_median": round(statistics.median(self.recovery_s), 2) if self.recovery_s else None,
            "recovery_s_max": round(max(self.recovery_s), 2) if self.recovery_s else None,
            "verdict": self.verdict.to_json() if self.verdict is not None else None,
            "problems": self.all_problems,
        }


class Campaign:
    """One run with `kills` kills of `target`, spread evenly over its rounds."""

    def __init__(self, fleet: Fleet, node: PrivateNode, target: str, *, kills: int, seed: int) -> None:
        self._fleet = fleet
        self._node = node
        self._target = target
        self._rng = random.Random(seed)
        self._victim = SERVER
        self._killed_at: float | None = None
        self._progress_at_kill = 0
        self.result = Result(target=target, kills_wanted=kills, seed=seed)

    def run(self) -> Result:
        """Play it to the end; problems are in the result."""
        started_at = time.monotonic()
        try:
            self._fleet.start()
            self._await_progress(1)
            if self._target == "broker":
                self._pause(_SETTLED_S)
            while self.result.kills < self.result.kills_wanted and self._fleet.is_alive(SERVER):
                self._kill(again=self._await_instant())
            self._fleet.open_gate()
            self.result.problems += self._fleet.until_done(_STALLED_S + self._fleet.settings.rounds)
        except Stalled as exc:
            self.result.problems.append(str(exc))
        self.result.seconds = time.monotonic() - started_at
        return self.result

    @property
    def _is_at_gate(self) -> bool:
        return self._fleet.log.round >= _gate_round(self._fleet.settings)

    def _look(self) -> None:
        """Read the server's log on; note when it goes on after a kill."""
        log = self._fleet.log
        log.read()
        if self._killed_at is not None and log.progress > self._progress_at_kill:
            self.result.recovery_s.append(time.monotonic() - self._killed_at)
            self._killed_at = None

    # ---- when ----------------------------------------------------------------------------------------------------

    def _await_instant(self) -> bool:
        """During the start of what was killed last, or after some progress: so much that rounds and kills end alike.

        Whether it is the former.
        """
        planned = _PLANNED * self._fleet.settings.rounds
        late = self._fleet.log.round / planned > self.result.kills / self.result.kills_wanted
        share, most_s = (_STARTUP_SHARE_WHEN_LATE, _STARTUP_S_WHEN_LATE) if late else (_STARTUP_SHARE, _STARTUP_S)
        if self.result.kills and self._rng.random() < share:
            self._pause(self._rng.uniform(0, most_s))
            return True
        if self._is_at_gate:
            self._pause(self._rng.uniform(0, _STARTUP_S))
            return False
        kills_left = self.result.kills_wanted - self.result.kills
        lines_a_round = self._fleet.settings.clients + 2
        lines = lines_a_round * max(0.0, planned - self._fleet.log.round) / (kills_left + 1)
        self._await_progress(round(self._rng.uniform(0, 1.8 * lines)))
        self._pause(self._rng.uniform(0, 0.02))
        return False

    def _await_progress(self, lines: int) -> None:
        goal = self._fleet.log.progress + lines

        def is_reached() -> bool:
            self._look()
            self._fleet.check_alive()
            return self._fleet.log.progress >= goal or self._is_at_gate or not self._fleet.is_alive(SERVER)

        self._fleet.until(is_reached, f"progress after {self.result.kills} kills", _STALLED_S)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.01))
            self._look()

    # ---- kill ----------------------------------------------------------------------------------------------------

    def _kill(self, *, again: bool) -> None:
        self.result.kills += 1
        self._progress_at_kill = self._fleet.log.progress
        if self._killed_at is None:
            self._killed_at = time.monotonic()
        if self._target == "broker":
            self._node.kill()
            self._node.restart()
            return
        if self._target == "clients" and not again:
            self._victim = self._rng.choice(self._fleet.settings.client_ids)
        self._fleet.kill(self._victim)
        self._fleet.start_one(self._victim)


def _gate_round(settings: Settings) -> int:
    return max(1, settings.rounds - _RESERVE)


def undisturbed(folder: Path, settings: Settings) -> tuple[str, float, list[str]]:
    """The same run without faults, as real processes: its model's SHA-256, its seconds, and problems."""
    with PrivateNode() as node, Fleet(folder, settings, node.url) as fleet:
        started_at = time.monotonic()
        try:
            fleet.start()
            problems = fleet.until_done(120 + settings.rounds)
        except Stalled as exc:
            problems = [str(exc)]
        seconds = time.monotonic() - started_at
        return model_sha(fleet.run_dir), seconds, [f"without faults: {problem}" for problem in problems]


def disturbed(
    folder: Path, node: PrivateNode, target: str, settings: Settings, *, kills: int, seed: int, sha_expected: str
) -> Result:
    """The run with kills, and the checker's word on it."""
    gated = replace(settings, gate=f"c1/{_gate_round(settings)}")
    with Fleet(folder, gated, node.url) as fleet:
        result = Campaign(fleet, node, target, kills=kills, seed=seed).run()
        result.verdict = fleet.verdict(sha_expected)
    return result


def run_campaign(folder: Path, target: str, settings: Settings, *, kills: int, seed: int) -> Result:
    """A whole campaign, in `folder`."""
    sha = expected_sha(settings)
    sha_of_processes, seconds, problems = undisturbed(folder / "undisturbed", settings)
    if sha_of_processes != sha:
        problems.append(f"without faults: processes end with {sha_of_processes[:12]}, memory with {sha[:12]}")
    with PrivateNode() as node:
        result = disturbed(folder / "disturbed", node, target, settings, kills=kills, seed=seed, sha_expected=sha)
    result.seconds_without_faults = seconds
    result.problems[:0] = problems
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__.split("\n\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-mib", type=float, default=0.004)
    parser.add_argument("--fit-s", type=float, default=0.1)
    parser.add_argument("--keep", type=Path, help="folder for logs, journals and run folders; default: thrown away")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    settings = Settings(
        clients=given.clients,
        rounds=given.rounds,
        model_bytes=round(given.model_mib * (1 << 20)) // 4 * 4,
        fit_s=given.fit_s,
        seed=given.seed,
    )
    with tempfile.TemporaryDirectory(prefix="fedbus-faults-") as thrown_away:
        folder = given.keep or Path(thrown_away)
        result = run_campaign(folder, given.target, settings, kills=given.kills, seed=given.seed)
    _print(result, as_json=given.json)
    return 1 if result.all_problems else 0


def _print(result: Result, *, as_json: bool) -> None:
    figures = result.to_json()
    lines = [
        f"{result.target}: {result.kills} of {result.kills_wanted} kills in {result.seconds:.1f} s "
        f"(without faults {result.seconds_without_faults:.1f} s, seed {result.seed}); from a kill to progress: "
        f"median {figures['recovery_s_median']} s, at most {figures['recovery_s_max']} s",
        str(result.verdict),
        *(f"WRONG: {problem}" for problem in result.all_problems),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    if as_json:
        sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""An hour under fire: clients on several machines, continuous rounds, random kills and link cuts; what grows?

    python -m tests.faults.soak --minutes 60 --clients 20 --machines 3 --out FOLDER

Everything over mTLS, with provisioned bundles, in network namespaces. Clients, the server (which goes on with
--resume) and now and then the broker are killed at random instants, links of whole machines are cut for some seconds;
whoever ends is started again, as a supervisor does. Every few seconds memory, descriptors and threads of all processes
are sampled, every minute the broker's own figures. At the end the run is stopped by SIGTERM, and the checker has the
last word: no update lost, none folded twice, and a model that is, bit for bit, the one that the ledger tells.

SIGTERM makes the end come early. FOLDER receives vitals.csv, broker.csv, events.csv and summary.json. Exit code 1 when
an update was lost or counted twice, the model is another, or a process ended with something else than an error in one
line.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from tests.faults.adding_app import Settings
from tests.faults.checker import Element, Verdict, check, folded_in_ledger, rounds_in_ledger
from tests.faults.fleet import SERVER, Stalled
from tests.faults.machines import missing_for_machines
from tests.faults.replay import replayed_sha
from tests.faults.site import BROKER, Site, SpreadFleet, spread
from tests.faults.vitals import Table, Vitals, bytes_under, growth, look_at

_FEDERATION: Final = "soak"
_QUIET_S: Final = 45.0
"""Without faults, at the end: whatever is under way comes home."""
_TICK_S: Final = 0.25
_LOOK_S: Final = 12.0
_ASK_BROKER_S: Final = 60.0
_RESTART_S: Final = 1.0
_STARTED_S: Final = 120.0
_BEGUN_ROUND: Final = 3
_ENDED_S: Final = 60.0
_CUT_S: Final = (5.0, 20.0)
_LONG_CUT_S: Final = 45.0
_LONG_CUTS: Final = 0.1
_BROKER_COLUMNS: Final = (
    "at_s", "round", "version", "queue", "messages", "queue_memory", "broker_memory", "broker_descriptors",
    "broker_disk", "run_disk", "ledger", "history", "logs",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Mean seconds between two faults of a kind; each pause is drawn from an exponential distribution."""

    client_s: float = 20.0
    server_s: float = 480.0
    broker_s: float = 900.0
    link_s: float = 60.0

    def hurried(self, times: float) -> Pace:
        """So many times as quick."""
        return Pace(**{name: seconds / times for name, seconds in asdict(self).items()})


class Soak:
    """One soak.

    Args:
        site: with a broker that runs.
        fleet: nobody of it has been started.
        out: folder of what is found.
        pace: of the faults.
        seed: of their instants and victims.
    """

    def __init__(self, site: Site, fleet: SpreadFleet, *, out: Path, pace: Pace, seed: int) -> None:
        self._site = site
        self._fleet = fleet
        self._rng = random.Random(seed)
        self._began_at = time.monotonic()
        self._ends_at = self._lasted_s = 0.0
        self._vitals: list[Vitals] = []
        self._vitals_table = Table.of_vitals(out / "vitals.csv")
        self._broker_table = Table(out / "broker.csv", _BROKER_COLUMNS)
        self._events = Table(out / "events.csv", ("at_s", "what", "who", "detail"))
        self._broker_pid = site.broker_state()["pid"]
        self._restarts: dict[str, float] = {}  # name -> when
        self._cut: dict[str, float] = {}  # machine -> when it is healed
        self._counts: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()
        self._faults: dict[str, tuple[float, Callable[[], None]]] = {
            "client": (pace.client_s, self._kill_client),
            "server": (pace.server_s, self._kill_server),
            "broker": (pace.broker_s, self._kill_broker),
            "link": (pace.link_s, self._cut_link),
        }
        self._due = {name: self._pause(mean_s) for name, (mean_s, _) in self._faults.items()}
        self.problems: list[str] = []

    def _seconds(self) -> float:
        return time.monotonic() - self._began_at

    def _pause(self, mean_s: float) -> float:
        return self._seconds() + self._rng.expovariate(1 / mean_s)

    def _note(self, what: str, who: str, detail: str = "") -> None:
        self._counts[what] += 1
        self._events.add({"at_s": round(self._seconds(), 1), "what": what, "who": who, "detail": detail})

    def end_early(self) -> None:
        """Go on for the quiet time only."""
        self._ends_at = min(self._ends_at, self._seconds() + _QUIET_S)

    def run(self, seconds: float) -> None:
        """Start everybody, go on for so long, and stop."""
        self._fleet.start()
        self._fleet.until(self._has_begun, "rounds", _STARTED_S)
        self._began_at = time.monotonic()
        self._due = {name: self._pause(mean_s) for name, (mean_s, _) in self._faults.items()}
        self._ends_at = seconds
        next_look = next_question = 0.0
        while self._seconds() < self._ends_at:
            self._supervise()
            self._heal_links()
            if self._seconds() < self._ends_at - _QUIET_S:
                self._do_due_faults()
            if self._seconds() >= next_look:
                next_look = self._seconds() + _LOOK_S
                self._look()
            if self._seconds() >= next_question:
                next_question = self._seconds() + _ASK_BROKER_S
                self._ask_broker()
            time.sleep(_TICK_S)
        self._lasted_s = self._seconds()
        self._stop()

    def _has_begun(self) -> bool:
        self._fleet.log.read()
        self._fleet.check_alive()
        return self._fleet.log.round >= _BEGUN_ROUND

    def _stop(self) -> None:
        """The server ends the run; that it did so early is what everybody says then."""
        self._fleet.processes[SERVER].terminate()
        self._fleet.until(lambda: not self._fleet.is_alive(SERVER), "the end of the server", _ENDED_S)
        self._fleet.until(
            lambda: not any(map(self._fleet.is_alive, self._fleet.settings.client_ids)), "the way home", _ENDED_S
        )
        for name in (SERVER, *self._fleet.settings.client_ids):
            words = self._fleet.last_words(name)
            if "SIGTERM" not in words:
                self.problems.append(f"the last words of {name}: {words}")

    # ---- faults --------------------------------------------------------------------------------------------------

    def _do_due_faults(self) -> None:
        for name, (mean_s, fault) in self._faults.items():
            if self._seconds() >= self._due[name]:
                fault()
                self._due[name] = self._pause(mean_s)

    def _kill_client(self) -> None:
        alive = [name for name in self._fleet.settings.client_ids if self._fleet.is_alive(name)]
        if alive:
            self._kill(self._rng.choice(alive))

    def _kill_server(self) -> None:
        if self._fleet.is_alive(SERVER):
            self._kill(SERVER)

    def _kill(self, name: str) -> None:
        self._note("kill", name)
        self._fleet.kill(name)
        self._restarts[name] = self._seconds() + _RESTART_S

    def _kill_broker(self) -> None:
        self._note("kill", BROKER)
        self._site.kill_broker()
        self._site.start_broker()
        self._broker_pid = self._site.broker_state()["pid"]

    def _cut_link(self) -> None:
        machines = [name for name in self._site.network.machines if name != BROKER and name not in self._cut]
        if not machines:
            return
        name = self._rng.choice(machines)
        seconds = _LONG_CUT_S if self._rng.random() < _LONG_CUTS else self._rng.uniform(*_CUT_S)
        silently = self._rng.random() < 0.5
        self._note("cut", name, f"{seconds:.1f} s{', silently' if silently else ''}")
        self._site.network[name].cut(silently=silently)
        self._cut[name] = self._seconds() + seconds

    def _heal_links(self) -> None:
        for name in [name for name, at in self._cut.items() if self._seconds() >= at]:
            del self._cut[name]
            self._site.network[name].heal()

    def _supervise(self) -> None:
        """Start again whoever was killed, or ended with an error, after a moment."""
        for name, process in self._fleet.processes.items():
            if name not in self._restarts and process.poll() is not None:
                self._note_ending(name, process.returncode)
                self._restarts[name] = self._seconds() + _RESTART_S
        for name in [name for name, at in self._restarts.items() if self._seconds() >= at]:
            del self._restarts[name]
            self._fleet.start_one(name)

    def _note_ending(self, name: str, code: int) -> None:
        """An error in one line is an answer (no way to the broker, its predecessor still counts); the rest is not."""
        words = self._fleet.last_words(name)
        self._note("ended by itself", name, words)
        self._endings[words.split(":")[1].strip()[:60] if words.count(":") > 1 else words[:60]] += 1
        if code != 1 or not words.startswith("fedbus: ") or "internal error" in words:
            self.problems.append(f"{name} ended with {code}: {words}")

    # ---- samples -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        pids = {name: process.pid for name, process in self._fleet.processes.items() if process.poll() is None}
        for name, pid in {**pids, BROKER: self._broker_pid}.items():
            kind = name if name in (SERVER, BROKER) else "client"
            vitals = look_at(pid, at_s=self._seconds(), kind=kind, name=name)
            if vitals is not None:
                self._vitals.append(vitals)
                self._vitals_table.add(asdict(vitals))

    def _ask_broker(self) -> None:
        """What it knows of itself, and what lies on the disk."""
        try:
            status = json.loads(self._site.rabbitmqctl("status", "--formatter", "json"))
            queues = json.loads(
                self._site.rabbitmqctl(
                    "list_queues", "-p", _FEDERATION, "name", "messages", "memory", "--formatter", "json"
                )
            )
        except (OSError, ValueError) as exc:
            self._note("no figures", BROKER, str(exc)[:200])
            return
        self._fleet.log.read()
        run_dir = self._fleet.run_dir
        common = {
            "at_s": round(self._seconds(), 1),
            "round": self._fleet.log.round,
            "broker_memory": status["memory"]["total"]["rss"],
            "broker_descriptors": status.get("file_descriptors", {}).get("total_used"),
            "broker_disk": bytes_under(self._site.folder / "state"),
            "run_disk": bytes_under(run_dir),
            "ledger": bytes_under(run_dir, "ledger.sqlite*"),
            "history": bytes_under(run_dir, "history.json"),
            "logs": bytes_under(self._fleet.folder, "*.log"),
        }
        for queue in sorted(queues, key=lambda queue: str(queue["name"])):
            name = str(queue["name"])
            if not name.startswith("fedbus.lock"):
                self._broker_table.add(
                    {**common, "queue": name, "messages": queue["messages"], "queue_memory": queue["memory"]}
                )

    # ---- what was found ------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        verdict, without_answer = verdict_on(self._fleet), unanswered(self._fleet)
        if without_answer:
            self.problems.append(f"{len(without_answer)} updates without an answer: {without_answer[:8]}")
        return {
            "seconds": round(self._lasted_s),
            "faults": dict(self._counts),
            "ended by themselves": dict(self._endings),
            "growth": growth(self._vitals, until_s=self._lasted_s),
            "verdict": {**verdict.to_json(), "text": str(verdict)},
            "problems": [*self.problems, *verdict.problems],
        }


def verdict_on(fleet: SpreadFleet) -> Verdict:
    """The checker's word on a run that was stopped; its model is held against the one that the ledger tells."""
    logs = [fleet.folder / f"{client_id}.log" for client_id in fleet.settings.client_ids]
    settings = replace(fleet.settings, rounds=rounds_in_ledger(fleet.run_dir))
    sha = replayed_sha(settings, fleet.run_dir)
    return check(settings, run_dir=fleet.run_dir, client_logs=logs, sha_expected=sha)


def unanswered(fleet: SpreadFleet) -> list[Element]:
    """Updates that the broker confirmed whole, of rounds before the last, and that were neither folded nor refused."""
    last = rounds_in_ledger(fleet.run_dir)
    completed = {
        (client_id, event["round"])
        for client_id in fleet.settings.client_ids
        for event in fleet.events(client_id, "task_completed", kind="fit")
        if event["round"] < last
    }
    refused = {
        (event["client_id"], int(event["task_id"].split("/")[2])) for event in fleet.events(SERVER, "update_refused")
    }
    return sorted(completed - refused - folded_in_ledger(fleet.run_dir).keys())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--needed", type=int, default=0, help="updates in a round; default: 60 %% of the clients")
    parser.add_argument("--machines", type=int, default=3, help="beside the broker's and the server's")
    parser.add_argument("--model-kib", type=int, default=256)
    parser.add_argument("--fit-s", type=float, default=0.8)
    parser.add_argument("--hurry", type=float, default=1.0, help="so many times as many faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    missing = missing_for_machines()
    if missing:
        sys.exit(missing)
    out = arguments.out or Path(tempfile.mkdtemp(prefix="fedbus-soak-"))
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        sys.exit(f"{out} is not empty: take another folder")
    settings = Settings(
        clients=arguments.clients,
        needed=arguments.needed or max(1, round(0.6 * arguments.clients)),
        rounds=1_000_000,
        model_bytes=arguments.model_kib * 1024,
        fit_s=arguments.fit_s,
        heartbeat_s=2.0,
        lease_s=20.0,
    )
    wards = [f"ward{number}" for number in range(1, arguments.machines + 1)]
    with Site(out, "office", *wards) as site:
        bundles = site.provision(_FEDERATION, *settings.client_ids)
        network = site.network
        places = spread(settings.client_ids, network["office"], [network[name] for name in wards])
        with SpreadFleet(out, settings, bundles=bundles, places=places) as fleet:
            soak = Soak(site, fleet, out=out, pace=Pace().hurried(arguments.hurry), seed=arguments.seed)
            signal.signal(signal.SIGTERM, lambda *_: soak.end_early())
            try:
                soak.run(60 * arguments.minutes)
            except Stalled as exc:
                soak.problems.append(str(exc))
            summary = soak.summary()
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    sys.stdout.write(json.dumps(summary, indent=2) + "\n")
    return 1 if summary["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())

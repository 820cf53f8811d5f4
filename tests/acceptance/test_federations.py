"""Two federations on one broker, and everybody whom it turns away: with one line that says what to do."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fedbus.provision.authority import Authority
from tests.faults.adding_app import Settings
from tests.faults.expected import expected_sha
from tests.faults.fleet import APP, FEDBUS, SERVER
from tests.faults.site import BROKER, Site, SpreadFleet, spread

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

SMALL = Settings(clients=2, rounds=3, fit_s=0.05)


def fleet_on(site: Site, folder: Path, settings: Settings, bundles: Path) -> SpreadFleet:
    """The server in the office, the clients in the wards."""
    wards = [site.network["ward1"], site.network["ward2"]]
    places = spread(settings.client_ids, site.network["office"], wards)
    return SpreadFleet(folder, settings, bundles=bundles, places=places)


# ---- two federations -------------------------------------------------------------------------------------------------


def test_two_federations_whose_members_have_the_same_names_take_no_notice_of_each_other(
    tmp_path: Path, site: Site
) -> None:
    both = [("north", SMALL), ("south", replace(SMALL, seed=7, rounds=4))]
    fleets = [fleet_on(site, tmp_path / name, each, site.provision(name, *each.client_ids)) for name, each in both]
    with fleets[0] as north, fleets[1] as south:
        for fleet in (north, south):
            fleet.start()
        for fleet, (_, settings) in zip((north, south), both, strict=True):
            assert fleet.until_done() == []
            assert fleet.verdict(expected_sha(settings)).problems == ()
            assert fleet.events(SERVER, "message_rejected") == []
    for name, other in (("north", "south"), ("south", "north")):
        written = "".join(path.read_text() for path in (tmp_path / name).glob("*.log"))
        assert other not in written


# ---- revoked ---------------------------------------------------------------------------------------------------------


def test_a_client_that_is_revoked_in_the_middle_of_its_upload_is_out_and_the_round_goes_on(
    tmp_path: Path, site: Site
) -> None:
    settings = Settings(clients=3, needed=2, rounds=2, fit_s=0.2, model_bytes=3_000_000, lease_s=300.0)
    with fleet_on(site, tmp_path, settings, site.provision("revoked", *settings.client_ids)) as fleet:
        for ward in ("ward1", "ward2"):
            site.network[ward].limit(250_000)
        fleet.start()
        victim, stays = fleet.until_event(SERVER, "round_opened")["cohort"]
        machine = fleet.places[victim]
        fleet.until(lambda: (Path(fleet.settings.journal) / f"{victim}.jsonl").exists(), "the victim has trained")
        sent = machine.bytes_sent()
        fleet.until(lambda: machine.bytes_sent() > sent + 1_400_000, "a part of its update is out")
        for ward in ("ward1", "ward2"):
            site.network[ward].limit(20_000)  # however long the command takes, the rest of it is not out before
        site.operate("broker", "revoke", "revoked", victim)
        for ward in ("ward1", "ward2"):
            site.network[ward].limit(None)
        fleet.until(lambda: not fleet.is_alive(victim), "the end of the victim")
        assert fleet.processes[victim].returncode == 1
        (spare,) = set(settings.client_ids) - {victim, stays}
        fleet.until_event(SERVER, "member_lost", client_id=victim)
        assert fleet.until_event(SERVER, "update_refused", client_id=victim)["reason"] == "its rights were revoked"
        fleet.until(lambda: not fleet.is_alive(SERVER), "the end of the run")
        assert fleet.processes[SERVER].returncode == 0, fleet.last_words()
    rounds = json.loads((fleet.run_dir / "history.json").read_text())["rounds"]
    assert [sorted(update["client_id"] for update in each["folded"]) for each in rounds] == [sorted((stays, spare))] * 2
    assert rounds[0]["refused"] == {victim: "its rights were revoked"}


# ---- turned away -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stranger:
    """Somebody who is not let in: what it says to `fedbus client`, where, and what it is told."""

    options: Callable[[Strangers], list[str]]
    says: str
    code: int = 1
    machine: str = "ward1"


class Strangers:
    """Where strangers have their credentials from: two federations, of which they know some bundles."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.address = site.address
        self.port = site.broker_state()["port"]
        self.ca = site.data_dir / "provision"
        self.mine = site.provision("alpha", "c1", "c2", "c3")
        self.others = site.provision("beta", "c1")
        site.operate("broker", "revoke", "alpha", "c3")
        self._folder = folder
        self._written = 0

    def bundle(self, path: Path, **changes: str) -> list[str]:
        """Options for a copy of a bundle in which something is other than it was issued."""
        self._written += 1
        copy = self._folder / f"{self._written}.json"
        copy.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        copy.chmod(0o600)
        return ["--bundle", str(copy)]

    def part(self, path: Path, *names: str) -> dict[str, str]:
        content = json.loads(path.read_text())
        return {name: content[name] for name in names}

    def url(self, path: Path, old: str, new: str) -> dict[str, str]:
        (url,) = self.part(path, "broker").values()
        assert old in url
        return {"broker": url.replace(old, new)}

    def expired(self) -> dict[str, str]:
        """A certificate of the right authority, for the right user, of last year."""
        authority = Authority.load(self.ca)
        assert authority is not None
        then = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=365)
        issued = authority.issue_user("alpha.c1", now=then, days=30)
        return {"certificate": issued.certificate, "key": issued.key}

    def forged(self) -> dict[str, str]:
        """A certificate for the right user, of an authority of one's own."""
        issued = ELSEWHERE.issue_user("alpha.c1", now=datetime.datetime.now(datetime.UTC))
        return {"certificate": issued.certificate, "key": issued.key}


ELSEWHERE = Authority.create("another hospital", now=datetime.datetime.now(datetime.UTC))

STRANGERS = {
    "without credentials": Stranger(
        options=lambda s: ["--id", "c1", "--broker", f"amqps://{s.address}/alpha"],
        says="cannot be trusted: self-signed certificate in certificate chain. .* the authority .* in your bundle",
    ),
    "without a certificate": Stranger(
        options=lambda s: ["--id", "c1", "--broker", f"amqps://alpha.c1:x@{s.address}/alpha?cafile={s.ca}/ca.pem"],
        says="turns us away: it asks for a certificate, and we showed none: use --bundle FILE",
    ),
    "with a wrong CA": Stranger(
        options=lambda s: s.bundle(s.mine / "c1.json", ca=ELSEWHERE.pem),
        says="cannot be trusted: self-signed certificate in certificate chain",
    ),
    "with a certificate of another CA": Stranger(
        options=lambda s: s.bundle(s.mine / "c1.json", **s.forged()),
        says="it does not know the authority that signed our certificate: take the bundle that was made for it",
    ),
    "with an expired certificate": Stranger(
        options=lambda s: s.bundle(s.mine / "c1.json", **s.expired()),
        says="our certificate has expired: ask its operator for a new bundle",
    ),
    "with another client's certificate": Stranger(
        options=lambda s: s.bundle(s.mine / "c1.json", **s.part(s.mine / "c2.json", "certificate", "key")),
        says="does not let alpha.c1 read the inbox of c1: take the bundle, or the login, that was made for c1",
    ),
    "with another client's bundle": Stranger(
        options=lambda s: ["--bundle", str(s.mine / "c2.json"), "--id", "c1"],
        says="the bundle is that of c2, not of c1",
        code=2,
    ),
    "with another's key": Stranger(
        options=lambda s: s.bundle(s.mine / "c1.json", **s.part(s.mine / "c2.json", "key")),
        says="our own certificate and key cannot be used: do they belong together",
        code=2,
    ),
    "with a bundle of another federation": Stranger(
        options=lambda s: s.bundle(s.others / "c1.json", **s.url(s.others / "c1.json", "/beta?", "/alpha?")),
        says="refuses the vhost 'alpha' to the user 'beta.c1': .* the bundle of one federation opens no other",
    ),
    "with a revoked bundle": Stranger(
        options=lambda s: ["--bundle", str(s.mine / "c3.json")],
        says="does not let the user 'alpha.c3' in by this certificate: it was revoked or replaced",
    ),
    "in plain text, to the TLS port": Stranger(
        options=lambda s: ["--id", "c1", "--plaintext", "--broker", f"amqp://alpha.c1:x@{s.address}:5671/alpha"],
        says="hangs up before a word is said: if that port speaks TLS, .* the URL begins with amqps://",
    ),
    "in plain text, unasked": Stranger(
        options=lambda s: ["--id", "c1", "--broker", f"amqp://alpha.c1:x@{s.address}:5671/alpha"],
        says="would cross the network in plain text, password and all: use amqps://, or say --plaintext",
        code=2,
    ),
    "by TLS, to the plain port": Stranger(
        options=lambda s: s.bundle(
            s.mine / "c1.json", **s.url(s.mine / "c1.json", f"{s.address}:5671", f"127.0.0.1:{s.port}")
        ),
        says="does not speak TLS on this port: 5671 is the usual one",
        machine=BROKER,
    ),
}


@pytest.fixture(scope="module")
def turned_away(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, standard output and standard error of all strangers, who came at the same time."""
    strangers = Strangers(site, tmp_path_factory.mktemp("strangers"))
    env = {key: text for key, text in os.environ.items() if not key.startswith("FEDBUS_")}
    came = {}
    for name, stranger in STRANGERS.items():
        command = [str(FEDBUS), "client", APP, *stranger.options(strangers)]
        came[name] = subprocess.Popen(
            site.network[stranger.machine].command(*command),
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    said = {name: (process, *process.communicate(timeout=60)) for name, process in came.items()}
    return {name: (process.returncode, out, err) for name, (process, out, err) in said.items()}


@pytest.mark.parametrize("name", STRANGERS)
def test_whoever_does_not_belong_is_turned_away_with_one_line(
    name: str, turned_away: dict[str, tuple[int, str, str]], site: Site
) -> None:
    code, out, err = turned_away[name]
    (line,) = err.splitlines()
    assert line.startswith("fedbus: ")
    assert re.search(STRANGERS[name].says, line)
    assert code == STRANGERS[name].code
    assert "Traceback" not in out
    assert not [secret for secret in secrets_of(site, "alpha", "beta") if secret in out + err]


# ---- nothing secret is shown -----------------------------------------------------------------------------------------


def secrets_of(site: Site, *federations: str) -> set[str]:
    """Lines of private keys, and passwords: of all members, of the broker, of the operator."""
    found = {(site.data_dir / name).read_text().strip() for name in ("password", ".erlang.cookie")}
    keys = [(site.data_dir / "provision" / name).read_text() for name in ("ca.key", "broker.key")]
    for federation in federations:
        for path in (site.folder / f"{federation}-bundles").glob("*.json"):
            content = json.loads(path.read_text())
            keys.append(content["key"] or "")
            found |= {password for password in [urlsplit(content["broker"]).password] if password}
    return found | {line for key in keys for line in key.splitlines() if len(line) > 20 and "-----" not in line}


@contextmanager
def command_lines() -> Iterator[set[str]]:
    """Every command line that `ps` shows meanwhile, on this host."""
    seen: set[str] = set()
    is_over = threading.Event()

    def look() -> None:
        while not is_over.wait(0.02):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    seen.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def test_no_key_and_no_password_is_in_a_command_line_a_log_or_the_history(tmp_path: Path, site: Site) -> None:
    with command_lines() as seen:
        bundles = site.provision("quiet", *SMALL.client_ids)
        site.provision("whisper", "c1", login="password")
        with fleet_on(site, tmp_path, SMALL, bundles) as fleet:
            fleet.start()
            assert fleet.until_done() == []
        site.operate("broker", "revoke", "whisper", "c1")
    secrets = secrets_of(site, "quiet", "whisper")
    assert len(secrets) > 15
    for program in ("_keeper.py", "fedbus server", "fedbus client", "fedbus broker provision", "rabbitmqctl", "beam"):
        assert any(program in line for line in seen), f"{program} was never seen: look more often"
    logs = [path for path in (*tmp_path.rglob("*"), *(site.data_dir / "log").iterdir()) if path.is_file()]
    assert {"server.log", "c1.log", "history.json", "ledger.sqlite"} <= {path.name for path in logs}
    shown = "\n".join([*seen, *(path.read_bytes().decode(errors="replace") for path in logs)])
    assert [secret for secret in secrets if secret in shown] == []

"""Two federations on one broker, and everybody whom it turns away: with one line that says what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.faults.adding_app import Settings
from tests.faults.expected import expected_sha
from tests.faults.fleet import SERVER
from tests.faults.site import Site, SpreadFleet, spread

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

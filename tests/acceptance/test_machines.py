"""Machines with addresses of their own, mutual TLS, and a link that is cut in the middle of a round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.adding_app import Settings
from tests.faults.checker import json_lines
from tests.faults.expected import expected_sha
from tests.faults.fleet import SERVER
from tests.faults.site import Site, SpreadFleet, spread

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]


def notice_sooner(bundle: Path) -> None:
    """Let a dead connection be given up after 7 s, not after 35."""
    content = json.loads(bundle.read_text())
    bundle.write_text(json.dumps({**content, "broker": f"{content['broker']}&heartbeat=2"}))


def test_a_link_that_is_cut_in_the_middle_of_a_round_and_healed_costs_nothing(tmp_path: Path, site: Site) -> None:
    settings = Settings(clients=4, rounds=4, fit_s=0.2, model_bytes=3_000_000, gate="c3/2")
    bundles = site.provision("cut", *settings.client_ids)
    notice_sooner(bundles / "c1.json")
    ward1, ward2 = site.network["ward1"], site.network["ward2"]
    places = spread(settings.client_ids, site.network["office"], [ward1, ward2])
    with SpreadFleet(tmp_path, settings, bundles=bundles, places=places) as fleet:
        fleet.start()
        fleet.until_event(SERVER, "round_opened", round=2)
        ward1.limit(1_000_000)
        journal = Path(fleet.settings.journal) / "c1.jsonl"
        fleet.until(lambda: any(line["round"] == 2 for line in json_lines(journal)), "c1 has trained")
        sent = ward1.bytes_sent()
        fleet.until(lambda: ward1.bytes_sent() > sent + 500_000, "a part of c1's update is out")
        ward1.cut()  # c1 is in the middle of its upload, c3 in the middle of its fit
        assert fleet.events("c1", "task_completed", kind="fit", round=2) == []
        fleet.until_event("c1", "broker_lost", timeout_s=40)
        for client_id in ("c2", "c4"):
            fleet.until_event(client_id, "task_completed", kind="fit", round=2)
        ward1.limit(None)
        ward1.heal()
        fleet.until_event("c1", "broker_restored", timeout_s=40)
        fleet.open_gate()
        assert fleet.until_done() == []
        verdict = fleet.verdict(expected_sha(settings))
        assert verdict.problems == ()  # all four are in all four rounds, once each, and the model is that of a calm run
        assert verdict.attempts == verdict.attempted == 16  # nobody had to train again
        assert {event["client_id"] for event in fleet.events(SERVER, "member_lost")} <= {"c1"}  # the broker noticed
        assert fleet.events("c2", "broker_lost") == []

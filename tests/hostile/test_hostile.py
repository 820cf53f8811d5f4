"""Every attack in its short version: the control that it names stops it, and the rounds go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fedbus.bus.node import PrivateNode
from tests.hostile.attacks import ATTACKS
from tests.hostile.field import Field
from tests.hostile.ground import Ground, resident_mib

_AT_ONCE = 8
_SERVER_MIB = 250
"""65 when idle. What the parts of many users and the bombs take for a moment is in it."""


@pytest.fixture(scope="module")
def ground(rabbitmq_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    attackers = [attack.attacker for attack in ATTACKS.values()]
    with PrivateNode() as node, Ground(tmp_path_factory.mktemp("ground"), node, attackers) as ground:
        yield ground


def _played(ground: Ground, name: str) -> str:
    field = Field(ground, ATTACKS[name].attacker)
    try:
        return ATTACKS[name].play(field)
    finally:
        field.close()


@pytest.fixture(scope="module")
def outcomes(ground: Ground) -> dict[str, Future[str]]:
    """Those that are no floods at once, each by a user of its own; then one flood after the other."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        quiet = {name: pool.submit(_played, ground, name) for name, attack in ATTACKS.items() if not attack.is_flood}
    with ThreadPoolExecutor(1) as pool:
        floods = {name: pool.submit(_played, ground, name) for name, attack in ATTACKS.items() if attack.is_flood}
    return quiet | floods


@pytest.mark.broker
@pytest.mark.parametrize("name", ATTACKS)
def test_the_attack_is_stopped(outcomes: dict[str, Future[str]], name: str) -> None:
    assert outcomes[name].result()


@pytest.mark.broker
def test_after_all_of_them_the_rounds_go_on_and_nothing_has_grown(
    ground: Ground, outcomes: dict[str, Future[str]]
) -> None:
    ground.rounds_go_on(2)
    assert resident_mib(ground.server.pid) < _SERVER_MIB
    history = (ground.run_dir / "history.json").stat().st_size
    rounds = max(told["round"] for told in ground.told if told.get("event") == "round_closed")
    assert history < 50_000 * rounds
    lost = [told for told in ground.told if told.get("event") == "member_lost"]
    assert not [told for told in lost if re.fullmatch(r"h\d", told["client_id"])]


@pytest.mark.broker
def test_no_secret_is_in_the_logs(ground: Ground, outcomes: dict[str, Future[str]]) -> None:
    passwords = {ground.url(who).split("@")[0].rpartition(":")[2] for who in (*ground.hostile, "server", "h1")}
    for log in (*ground.folder.glob("*.log"), *Path(ground.node.data_dir / "log").glob("*.log")):
        text = log.read_text(errors="replace")
        assert not [password for password in passwords if password in text], log

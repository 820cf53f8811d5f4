"""deploy/systemd: units that systemd understands, with little left that they may do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.files import DEPLOY

_UNITS = sorted((DEPLOY / "systemd").glob("*.service"))

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def test_there_is_a_unit_for_each_role() -> None:
    assert [unit.name for unit in _UNITS] == [f"fedbus-{role}@.service" for role in ("client", "server", "worker")]


@needs_systemd
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    here = [tmp_path / unit.name.replace("@.", "@x.") for unit in _UNITS]
    for unit, copy in zip(_UNITS, here, strict=True):
        text = unit.read_text()
        assert "/opt/fedbus/bin/fedbus" in text
        copy.write_text(text.replace("/opt/fedbus/bin/fedbus", sys.executable))  # verify looks whether it is there
    told = subprocess.run(["systemd-analyze", "verify", *here], capture_output=True, text=True)
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")


@needs_systemd
@pytest.mark.parametrize("unit", _UNITS, ids=lambda unit: unit.name)
def test_a_unit_may_do_little(unit: Path) -> None:
    command = [
        "systemd-analyze",
        "security",
        "--offline=yes",
        "--json=short",
        "--threshold=15",
        "--no-pager",
        str(unit),
    ]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr  # an exposure of 1.5 of 10 at most
    is_closed = {each["json_field"]: each["set"] for each in json.loads(told.stdout)}
    for door in ("NoNewPrivileges", "UserOrDynamicUser", "ProtectSystem", "ProtectHome", "PrivateDevices", "UMask"):
        assert is_closed[door], door


def test_a_wrong_command_line_is_not_tried_for_ever() -> None:
    for unit in _UNITS:
        lines = unit.read_text().splitlines()
        restart = "Restart=always" if "client" in unit.name else "Restart=on-failure"
        assert {restart, "RestartPreventExitStatus=2", "StartLimitIntervalSec=0"} <= set(lines)

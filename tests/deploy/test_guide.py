"""deploy/README.md keeps up with the files that it tells of."""

from __future__ import annotations

import re

import yaml

from tests.deploy.files import DEPLOY

_GUIDE = (DEPLOY / "README.md").read_text()


def test_there_is_an_answer_to_each_alert() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        page, anchor = alert["annotations"]["runbook_url"].split("#")
        assert page == "deploy/README.md"
        assert f'<a id="{anchor}"></a>\n**{alert["alert"]}**' in _GUIDE


def test_every_answer_has_its_alert() -> None:
    rules = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    for anchor in re.findall(r'<a id="(alert-[^"]+)">', _GUIDE):
        assert f"#{anchor}\n" in rules, anchor


def test_every_link_leads_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", _GUIDE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(#([^)]+)\)", _GUIDE):
        assert target in anchors, target


def test_every_file_that_is_named_is_there() -> None:
    for name in set(re.findall(r"deploy/[\w@./-]+\w", _GUIDE)) - {"deploy/.env"}:  # the operator's own
        assert (DEPLOY.parent / name).exists(), name


def test_every_variable_of_compose_is_in_the_table() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    names = set(re.findall(r"\$\{([A-Z_]+)", text))
    assert [name for name in sorted(names) if f"`{name}`" not in _GUIDE] == []

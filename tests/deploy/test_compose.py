"""deploy/compose.yaml: a valid file that gives nobody more than it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.files import DEPLOY, compose

_ONE_SHOT = {"keys", "provision"}
_OF_OUR_IMAGE = {"keys", "provision", "server", "worker", "client"}
_SECRET = re.compile(r"PASS|SECRET|TOKEN|KEY|CREDENTIAL", re.IGNORECASE)


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose()["services"]
    return found


def test_it_is_a_compose_file() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="has no wheel for this machine")
    parsed = compose_spec.PyCompose.from_yaml(yaml.safe_dump(compose()))
    assert set(parsed.service_names()) == {*_OF_OUR_IMAGE, "broker", "prometheus", "grafana"}


def test_the_validator_finds_mistakes() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="has no wheel for this machine")
    wrong = compose()
    wrong["services"]["broker"]["mem_limit"] = "4 elephants"
    with pytest.raises(ValueError, match="mem_limit"):
        compose_spec.PyCompose.from_yaml(yaml.safe_dump(wrong))


def test_no_service_may_do_more_than_it_needs(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not {"privileged", "cap_add", "pid", "devices"} & service.keys(), name


def test_no_secret_is_in_an_environment(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            assert not _SECRET.search(variable) or value in ("true", "false"), (name, variable)


def test_whoever_stays_is_watched_and_started_again(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        if name in _ONE_SHOT:
            assert "restart" not in service, name
            continue
        assert service["restart"] in ("on-failure", "unless-stopped"), name
        assert name in _OF_OUR_IMAGE or service["healthcheck"]["test"], name  # the image has a check of its own


def test_workers_can_be_many(services: dict[str, dict[str, Any]]) -> None:
    assert not {"ports", "container_name", "hostname"} & services["worker"].keys()


def test_a_member_sees_its_own_bundle_and_no_other(services: dict[str, dict[str, Any]]) -> None:
    mounts = {
        name: [str(volume).split(":")[0] for volume in services[name]["volumes"]]
        for name in services
        if name in _OF_OUR_IMAGE
    }
    for name in ("server", "worker", "client"):
        assert [mount for mount in mounts[name] if "bundle" in mount or mount == "office"] == [f"bundle-{name}"]


def test_every_volume_network_and_file_is_there(services: dict[str, dict[str, Any]]) -> None:
    document = compose()
    used: set[str] = set()
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                used.add(source)
        assert set(service.get("networks", ())) <= document["networks"].keys()
        assert set(service.get("depends_on", ())) <= services.keys()
    assert used == document["volumes"].keys()


def test_members_have_no_way_out_but_the_broker(services: dict[str, dict[str, Any]]) -> None:
    assert compose()["networks"]["inside"] == {"internal": True}
    assert [services[name]["networks"] for name in ("server", "worker", "client", "provision")] == [["inside"]] * 4
    assert services["keys"]["network_mode"] == "none"
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"broker": ["0.0.0.0:5671:5671"], "grafana": ["127.0.0.1:3000:3000"]}


def test_the_apps_of_the_examples_are_one() -> None:
    shown, copied = DEPLOY / "app" / "app.py", Path("kubernetes/overlays/example/app.py")
    assert shown.read_text() == (DEPLOY / copied).read_text()

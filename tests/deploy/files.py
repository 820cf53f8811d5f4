"""The deployment files, read as their readers read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml

DEPLOY: Final = Path(__file__).parents[2] / "deploy"
KUBERNETES: Final = DEPLOY / "kubernetes"
OVERLAY: Final = KUBERNETES / "overlays" / "example"

Document: TypeAlias = dict[str, Any]

_VARIABLE = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")
_SETTING = re.compile(r"^([a-z][a-z0-9_.]*) += +(\S+)$", re.MULTILINE)


def compose(**values: str) -> Document:
    """deploy/compose.yaml with its variables filled in, merges resolved."""
    text = _VARIABLE.sub(lambda found: values.get(found[1], found[2]), (DEPLOY / "compose.yaml").read_text())
    loaded: Document = yaml.safe_load(text)
    return loaded


def kubernetes() -> list[Document]:
    """Every resource of the base and of the example overlay, without what kustomize generates."""
    names = [name for folder in (KUBERNETES / "base", OVERLAY) for name in sorted(folder.glob("*.yaml"))]
    found = [each for name in names for each in yaml.safe_load_all(name.read_text())]
    return [each for each in found if each["kind"] != "Kustomization"]


def pods(documents: list[Document]) -> list[tuple[str, Document]]:
    """The pod templates, by the name of what makes them."""
    makers = ("Deployment", "StatefulSet", "Job")
    return [(each["metadata"]["name"], each["spec"]["template"]) for each in documents if each["kind"] in makers]


def settings(text: str) -> dict[str, str]:
    """Keys and values of a rabbitmq.conf."""
    return dict(_SETTING.findall(text))

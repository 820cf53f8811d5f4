"""Every YAML file in deploy/ reads as it looks."""

from __future__ import annotations

from pathlib import Path

import pytest
from yamllint import linter
from yamllint.config import YamlLintConfig

from tests.deploy.files import DEPLOY

_FILES = sorted(path for kind in ("*.yaml", "*.yml") for path in DEPLOY.rglob(kind))


@pytest.mark.parametrize("path", _FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_yamllint_finds_nothing(path: Path) -> None:
    config = YamlLintConfig(file=str(DEPLOY.parent / ".yamllint"))
    assert [str(problem) for problem in linter.run(path.read_text(), config, str(path))] == []

"""One broker for all tests of this folder, made as deploy/compose.yaml makes it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.broker import DeployedNode
from tests.deploy.files import DEPLOY


def script(path: Path, *args: str, **env: str) -> str:
    """What a shell script of ours prints; `fedbus` and `python3` are those that run the tests."""
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: os.environ[name] for name in ("HOME", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        ["sh", path, *args], env={**kept, "PATH": here, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volumes of deploy/compose.yaml after `keys`: office, tls, definitions; the others empty."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("office", "tls", "definitions", "bundles", "for/server", "for/worker", "for/client"):
        (folder / name).mkdir(parents=True)
    script(DEPLOY / "compose" / "keys.sh", "localhost", FEDBUS_HOME=str(folder))
    return folder


@pytest.fixture(scope="session")
def deployed(rabbitmq_installed: None, home: Path) -> Iterator[DeployedNode]:
    """RabbitMQ with deploy/rabbitmq.conf, definitions.json and enabled_plugins, and the administrator of `keys`."""
    with DeployedNode(home / "tls", home / "definitions") as node:
        yield node

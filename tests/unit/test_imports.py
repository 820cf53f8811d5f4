"""The house: which room may import what. Read with ast, so that nothing needs to be imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedbus

PACKAGE = Path(fedbus.__file__).parent
LEAVES = {"fedbus.errors", "fedbus.types", "fedbus.config"}
ROOMS_OF_LEAVES = ("wire", "bus", "rounds", "strategies")
_ABOVE = ("cli", "simulation", "api", "analytics.run")
_COMPOSING = {"server": ("client", "worker"), "client": ("server", "worker"), "worker": ("server",)}
"""Rooms that put others together, each with those that it knows nothing of: a worker is made of a client's parts."""


def imports(source: str) -> Iterator[str]:
    """Every module that `source` imports, wherever in it the import stands."""
    for found in ast.walk(ast.parse(source)):
        if isinstance(found, ast.Import):
            yield from (alias.name for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, "imports are absolute here"
            yield found.module or ""
            yield from (f"{found.module}.{alias.name}" for alias in found.names)


def is_under(module: str, roof: str) -> bool:
    return module == roof or module.startswith(f"{roof}.")


def violations(path: str, source: str) -> list[str]:
    """What `path` (relative to the package) imports and must not."""
    room = path.split("/")[0].removesuffix(".py")
    return [module for module in imports(source) if not is_allowed(path, room, module)]


def is_allowed(path: str, room: str, module: str) -> bool:
    top = module.split(".")[0]
    if top == "aiormq":
        return path in ("bus/rabbitmq.py", "bench/floor.py")  # the floor is what aiormq does without us
    if top in ("torch", "xgboost"):
        return path == f"training/{top}.py" or room == "examples"
    is_ours = top == "fedbus"
    if f"fedbus.{room}" in LEAVES:
        return not is_ours or any(is_under(module, leaf) for leaf in LEAVES)
    if room == "rounds" and not is_ours:
        return top in sys.stdlib_module_names and top != "asyncio"
    if room == "rounds" and is_under(module, "fedbus.types"):
        return False  # it knows numpy
    if room in ROOMS_OF_LEAVES and is_ours:
        return is_under(module, f"fedbus.{room}") or any(is_under(module, leaf) for leaf in LEAVES)
    if room == "analytics" and is_ours and path != "analytics/run.py":  # half of it is the client's
        homes = {"fedbus.analytics", "fedbus.strategies.base"} | LEAVES
        return any(is_under(module, home) for home in homes) and not is_under(module, "fedbus.analytics.run")
    if room in _COMPOSING:
        return not any(is_under(module, f"fedbus.{above}") for above in (*_ABOVE, *_COMPOSING[room]))
    return True


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_room_may(file: Path) -> None:
    assert violations(file.relative_to(PACKAGE).as_posix(), file.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rounds/engine.py", "import asyncio"),
        ("rounds/engine.py", "def f():\n    import numpy as np"),
        ("rounds/cohort.py", "from fedbus.types import Tensors"),
        ("rounds/cohort.py", "from fedbus.wire import codec"),
        ("bus/memory.py", "import aiormq"),
        ("bench/measure.py", "import aiormq"),
        ("server/runtime.py", "from aiormq.exceptions import AMQPError"),
        ("training/base.py", "import torch"),
        ("training/torch.py", "import xgboost"),
        ("strategies/xgboost_trees.py", "import xgboost"),
        ("strategies/xgboost_bagging.py", "from fedbus.training.xgboost import XGBClient"),
        ("server/runtime.py", "from torch import nn"),
        ("wire/codec.py", "from fedbus.bus import base"),
        ("bus/base.py", "from fedbus import rounds"),
        ("strategies/fedavg.py", "import fedbus.server.runtime"),
        ("errors.py", "from fedbus.wire.codec import decode"),
        ("client/runtime.py", "from fedbus.cli.main import app"),
        ("worker/runtime.py", "from fedbus.api import work"),
        ("worker/runtime.py", "from fedbus.server.virtual import VirtualClients"),
        ("client/runtime.py", "from fedbus.worker.runtime import WorkerRuntime"),
        ("client/code.py", "from fedbus.analytics.run import query"),
        ("analytics/local.py", "from fedbus.wire import codec"),
        ("analytics/inquiry.py", "from fedbus.analytics.run import query"),
    ],
)
def test_the_rule_catches(path: str, source: str) -> None:
    assert violations(path, source)


def test_the_rule_lets_the_designed_homes_be() -> None:
    assert not violations("bus/rabbitmq.py", "import aiormq")
    assert not violations("bench/floor.py", "import aiormq")
    assert not violations("training/torch.py", "import torch")
    assert not violations("training/xgboost.py", "import xgboost as xgb")
    assert not violations("examples/digits.py", "from torch import nn")
    assert not violations("worker/runtime.py", "from fedbus.client.upload import Upload")
    assert not violations("rounds/engine.py", "import math\nfrom fedbus.config import RoundConfig")


def test_importing_fedbus_is_cheap() -> None:
    """The keeper, the shell's completion and `fedbus --help` must not pay for torch."""
    import subprocess

    heavy = {"torch", "xgboost", "sklearn", "matplotlib", "scipy", "cryptography"}
    code = f"import sys, fedbus.cli.main; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_provisioning_without_cryptography_says_what_to_install() -> None:
    import subprocess

    code = (
        "import sys; sys.modules['cryptography'] = None; sys.argv = ['fedbus', 'broker', 'list', '--system']; "
        "from fedbus.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "fedbus: certificates need the package cryptography: pip install 'fedbus[provision]'"
    ]

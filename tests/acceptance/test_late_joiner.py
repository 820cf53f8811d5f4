"""What a client costs the server that comes late, or comes again: nothing but small words."""

from __future__ import annotations

import time

import pytest

from tests.acceptance.conftest import QuickShell, Shell, poll
from tests.vhosts import Vhost

pytestmark = [pytest.mark.broker, pytest.mark.acceptance]

MIB = 1 << 20

APP = '''
import time
from pathlib import Path
import numpy as np
import fedbus as fb


class Waiting(fb.Client):
    """Says that it has the model, and keeps it until the gate opens."""

    def __init__(self, context):
        self.name = context.client_id

    def fit(self, parameters, config):
        Path(f"has-model-{self.name}").touch()
        while not Path("gate").exists():
            time.sleep(0.02)
        return fb.FitResult(parameters=parameters, num_examples=1)


app = fb.App(
    client_fn=Waiting,
    initial_parameters={"w": np.ones(12 << 18, np.float32)},
    rounds=fb.RoundConfig(num_rounds=1, min_fit_clients=3, min_available_clients=2, fraction_evaluate=0),
)
'''


@pytest.fixture
def shell(quick_shell: QuickShell) -> QuickShell:
    """What happens before `fedbus` is imported is none of these tests' business."""
    return quick_shell


def octets_from_server(vhost: Vhost) -> int:
    """What the broker has received over the server's connections."""
    rows = vhost.node.rabbitmqctl("list_connections", "recv_oct", "vhost", "client_properties").splitlines()
    return sum(int(row.split("\t")[0]) for row in rows if vhost.name in row and "fedbus server" in row)


def test_a_late_joiners_first_model_costs_the_server_nothing(shell: Shell, vhost: Vhost) -> None:
    (shell.folder / "app.py").write_text(APP)
    server = shell.start("server", "app.py", "--broker", vhost.url, "--run-dir", "out")
    first = [shell.start("client", "app.py", "--id", name, "--broker", vhost.url) for name in ("c1", "c2")]
    poll(lambda: all((shell.folder / f"has-model-{name}").exists() for name in ("c1", "c2")), 30)
    time.sleep(0.5)
    before = octets_from_server(vhost)
    assert before > 12 * MIB  # the model itself, once
    late = shell.start("client", "app.py", "--id", "c3", "--broker", vhost.url)
    poll(lambda: (shell.folder / "has-model-c3").exists(), 30)
    spent = octets_from_server(vhost) - before
    assert spent < 10_000, f"{spent} bytes: its task, its welcome and heartbeats are all there should be"
    (shell.folder / "gate").touch()
    assert [terminal.end() for terminal in (server, *first, late)] == [0, 0, 0, 0]

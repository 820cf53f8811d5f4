"""A worker on a secured RabbitMQ: it may read the model and the queue of work, speak for virtual clients, no more."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbus.api import serve
from fedbus.app import App
from fedbus.bus.node import PrivateNode
from fedbus.bus.rabbitmq import connect_supervised
from fedbus.config import RoundConfig
from fedbus.observe import events as o
from fedbus.provision.admin import password_hash
from fedbus.provision.rights import SERVER, WORKER, User, access_definitions
from fedbus.worker.runtime import WorkerRuntime
from tests.kit import AddingClient

pytestmark = pytest.mark.broker


def provision(node: PrivateNode, federation: str, folder: Path) -> dict[str, str]:
    """A vhost with a server and a worker, each with no more rights than it is given: their URLs."""
    definitions: dict[str, Any] = {"vhosts": [{"name": federation}], "users": [], "permissions": []}
    definitions["topic_permissions"] = []
    urls = {}
    for who in (SERVER, WORKER):
        user, password = User(federation=federation, who=who), uuid.uuid4().hex
        definitions["users"].append({"name": user.name, "tags": [], **password_hash(password)})
        for kind, entries in access_definitions(user).items():
            definitions[kind] += entries
        urls[who] = f"amqp://{user.name}:{password}@127.0.0.1:{node.port}/{federation}"
    file = folder / "definitions.json"
    file.write_text(json.dumps(definitions))
    node.rabbitmqctl("import_definitions", str(file))
    return urls


async def test_a_worker_with_its_own_rights_waits_for_the_server_and_does_its_tasks(
    node: PrivateNode, tmp_path: Path
) -> None:
    urls = await asyncio.to_thread(provision, node, f"fed-{uuid.uuid4().hex[:8]}", tmp_path)
    app = App(
        client_fn=AddingClient,
        initial_parameters=[np.zeros(3, np.float32)],
        rounds=RoundConfig.synchronous(2, num_rounds=2, heartbeat_s=0.5, lease_s=4),
    )
    events: list[object] = []
    awaited = asyncio.Event()

    def observe(event: object) -> None:
        events.append(event)
        if isinstance(event, o.WorkAwaited):
            awaited.set()

    async with await connect_supervised(urls[WORKER], name="worker") as bus:
        worker = WorkerRuntime(app, bus, observers=[observe])
        working = asyncio.create_task(worker.run())
        async with asyncio.timeout(20):
            await awaited.wait()
        history = await serve(app, broker=urls[SERVER], virtual_clients=2, observers=[observe])
        worker.request_stop()
        assert await working == 8  # to fit and to evaluate
    assert history.updates == 4
    assert [event for event in events if isinstance(event, o.MessageRejected)] == []

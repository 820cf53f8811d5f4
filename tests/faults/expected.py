"""What the adding app must end with: the same run without faults, in this process, over the memory bus."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tests.faults.adding_app import Settings, digest, make_app
from tests.kit import federation


def expected_sha(settings: Settings) -> str:
    """SHA-256 of the final model of a run in which nothing goes wrong."""
    return asyncio.run(_run(replace(settings, fit_s=0.0, journal="", gate="", heartbeat_s=5.0, lease_s=60.0)))


async def _run(settings: Settings) -> str:
    async with federation(make_app(settings)) as story:
        await story.run(*settings.client_ids)
        return digest(story.model())

"""The kind of event loop that is measured: federation and floor run on the same one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

T = TypeVar("T")

KIND: Final = "asyncio"


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a loop of `KIND`, which is what the rest of fedbus runs on."""
    return asyncio.run(main)

"""Where the user's code runs: in a thread of its own, so that the event loop stays free for heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Caller(Protocol):
    """Calls the user's code, one call after the other."""

    async def call(self, what: str, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`, or what it raised; `what` names it: "fit", "evaluate", ..."""

    def interrupt(self) -> None:
        """The result of the call that is running is not wanted any more; the call may not know that."""

    def close(self) -> None:
        """There will be no further call."""


class UserThread:
    """Runs the user's calls one after the other, always in the same thread.

    A daemon thread: training that nobody waits for any more does not keep the process alive. Some libraries tie
    their state to the thread that made it, so a pool would not do.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def call(self, what: str, function: Callable[..., T], *args: Any) -> T:
        """The result of `function(*args)`, or what it raised (SystemExit and the like as RuntimeError)."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.put(_Call(function, args, loop, future))
        return await future

    def interrupt(self) -> None:
        """Nothing: a thread cannot be interrupted, and the user's code looks at `ClientContext.cancelled`."""

    def close(self) -> None:
        """Let the thread end after the call that is running."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call.run()
            del call  # a model must not stay alive until the next call


class _Call:
    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        future: asyncio.Future[Any],
    ) -> None:
        self._function, self._args, self._loop, self._future = function, args, loop, future

    def run(self) -> None:
        try:
            result = self._function(*self._args)
        except Exception as exc:  # noqa: BLE001  # handed to whoever awaits the call
            self._answer(self._future.set_exception, exc)
        except BaseException as exc:  # noqa: BLE001  # exit() in a client's fit ends that task, not the client
            self._answer(self._future.set_exception, RuntimeError(f"{type(exc).__name__}: {exc}"))
        else:
            self._answer(self._future.set_result, result)

    def _answer(self, setter: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._set, setter, value)

    def _set(self, setter: Callable[[Any], None], value: Any) -> None:
        if not self._future.done():
            setter(value)

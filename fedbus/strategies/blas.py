"""How many threads numpy's linear algebra takes."""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

_LOCK = threading.Lock()
_USERS: list[int] = []
"""How many threads it had, once for each who is in `calls_in_one_thread`."""


@contextmanager
def calls_in_one_thread() -> Iterator[None]:
    """Meanwhile, OpenBLAS computes in the threads that call it, in this whole process.

    Where several threads call it, its own come on top and wait for one another by spinning: products of the shape of
    ours take twice the time on an idle machine, and twenty times on a busy one. Another library than OpenBLAS, or one
    that hides its settings, is left as it is.
    """
    with _LOCK:
        _USERS.append(_USERS[0] if _USERS else _get_threads()())
        _set_threads()(1)
    try:
        yield
    finally:
        with _LOCK:
            before = _USERS.pop()
            if not _USERS:
                _set_threads()(before)


def _none() -> int:
    return 1


def _nothing(threads: int) -> None:
    pass


@functools.cache
def _get_threads() -> Callable[[], int]:
    return _symbol("get_num_threads") or _none


@functools.cache
def _set_threads() -> Callable[[int], object]:
    return _symbol("set_num_threads") or _nothing


def _symbol(name: str) -> Callable[..., int] | None:
    """A function of the OpenBLAS that numpy was linked with; a wheel's has a prefix and a suffix of its own."""
    module = getattr(np.linalg, "_umath_linalg", None)
    try:
        library = ctypes.CDLL(module.__file__) if module else None  # what it is linked with is found through it
    except OSError:
        return None
    for prefix, suffix in itertools.product(("scipy_openblas_", "openblas_"), ("64_", "")):
        found: Callable[..., int] | None = getattr(library, f"{prefix}{name}{suffix}", None)
        if found is not None:
            return found
    return None

"""A query as a strategy: its model is the question, updates are the answers, the next model is the next question."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Literal

import numpy as np

from fedbus.analytics.inquiry import Inquiry
from fedbus.analytics.question import ENDS, SUMS, WORDS, WORDS_BYTES
from fedbus.config import RoundConfig
from fedbus.errors import ConfigError
from fedbus.strategies.base import ClientUpdate, Strategy
from fedbus.types import Array, ExtraSpec, Tensors


class QueryStrategy(Strategy):
    """Asks the clients about their data, round by round, until an inquiry has its result.

    Args:
        inquiry: what is asked. It lives in memory: a query whose server dies is asked anew.
        on_done: called once the inquiry is done, maybe from another thread.
    """

    asks: ClassVar[Literal["fit", "query"]] = "query"
    may_resize: ClassVar[bool] = True

    def __init__(self, inquiry: Inquiry, on_done: Callable[[], None]) -> None:
        self._inquiry = inquiry
        self._on_done = on_done

    def __repr__(self) -> str:
        return f"QueryStrategy({self._inquiry!r})"

    @property
    def is_quick(self) -> bool:
        """What is summed up is as small as the question."""
        return True

    def check(self, rounds: RoundConfig) -> None:
        if rounds.is_asynchronous or rounds.max_staleness:
            raise ConfigError("an answer to another question is of no use: queries take max_staleness=0")

    def extras(self, model: Tensors) -> Mapping[str, ExtraSpec]:
        """The three arrays of an answer."""
        question = self._inquiry.question
        return {
            SUMS: ExtraSpec(dtype=np.dtype(np.int64), shape=(question.size,)),
            ENDS: ExtraSpec(dtype=np.dtype(np.int64), shape=(question.ends,)),
            WORDS: ExtraSpec(dtype=np.dtype(np.uint8), max_bytes=WORDS_BYTES),
        }

    def verify(self, update: ClientUpdate) -> None:
        self._inquiry.check(update.extra)

    def init(self, model: Tensors) -> None:
        """What is summed up lies in the inquiry."""

    def fold(self, state: None, update: ClientUpdate) -> None:
        self._inquiry.take(update.client_id, update.extra)

    def finish(self, state: None, model: Tensors) -> dict[str, Array]:
        self._inquiry.close()
        if self._inquiry.is_done:
            self._on_done()
        return self._inquiry.question.tensors()

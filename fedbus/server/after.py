"""An app's `after_evaluation` at work: what each has to say, in the order in which evaluations are recorded.

An evaluation is recorded first, and seen then. Whatever dies in between, the next server shows all recorded ones again;
and a checkpoint stays until whoever may want to keep it has seen its evaluations.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable

from fedbus.after_evaluation import AfterEvaluation, EvaluatedModel, Keep, Stop, Where
from fedbus.app import App
from fedbus.errors import one_line
from fedbus.observe import events as o
from fedbus.server.checkpoint import RunFolder
from fedbus.server.history import Best, Evaluation, History, RoundRecord

_LOGGER = logging.getLogger("fedbus.server")


class AfterEvaluations:
    """Shows evaluations to the app's `after_evaluation`.

    Args:
        app: whose they are.
        folder: where kept models go; None: nowhere.
        stop: called with a reason when the run has what it was for.
        tell: called with events.
    """

    def __init__(
        self, app: App, folder: RunFolder | None, *, stop: Callable[[str], None], tell: Callable[[object], None]
    ) -> None:
        self._pieces = [copy.copy(piece) for piece in app.after_evaluation]
        self._default: Where = "federated" if app.evaluate_fn is None else "central"
        self._folder = folder
        self._stop = stop
        self._tell = tell
        self._run_id = ""
        self._best: dict[str, Best] = {}
        self._recorded = 0
        self._is_over = False
        self._awaited: set[tuple[Where, int]] = set()
        self._queue: asyncio.Queue[EvaluatedModel] = asyncio.Queue()

    @property
    def versions(self) -> set[int]:
        """Those whose evaluations are not seen yet."""
        return {version for _, version in self._awaited}

    def begin(self, run_id: str, history: History, records: Iterable[RoundRecord]) -> None:
        """Begin a run, or go on with one, of which `records` are all that is known."""
        self._run_id = run_id
        history.best = self._best
        if not self._pieces:
            return
        for piece in self._pieces:
            piece.begin()
        for model in self._recorded_ones(history.initial, records):
            for piece in self._of(model):
                self._act(model, self._said_by(piece, model), is_news=False)
        for name, best in list(self._best.items()):
            if not self._keep(best.version, name):
                del self._best[name]
                _LOGGER.warning("model %d was the best so far (%s), and is not kept any more", best.version, name)

    def _recorded_ones(self, initial: Evaluation | None, records: Iterable[RoundRecord]) -> list[EvaluatedModel]:
        found = [] if initial is None else [(initial.number, _seen(0, 0, "central", initial))]
        for record in records:
            if record.central is not None:
                found.append((record.central.number, _seen(record.round, record.version, "central", record.central)))
            if record.federated is not None:
                seen = _seen(record.round, record.version, "federated", record.federated)
                found.append((record.federated.number, seen))
        found.sort(key=lambda one: (one[0], one[1].round))
        self._recorded = max((number for number, _ in found), default=0)
        return [model for _, model in found]

    def number(self) -> int:
        """What the evaluation that is recorded next is to have as its `number`."""
        self._recorded += 1
        return self._recorded

    def expect(self, where: Where, version: int) -> None:
        """This version is being evaluated: its checkpoint stays."""
        if self._pieces:
            self._awaited.add((where, version))

    def give_up(self, where: Where, version: int) -> None:
        """There will be no evaluation of it."""
        self._awaited.discard((where, version))

    def show(self, round: int, version: int, where: Where, evaluation: Evaluation) -> None:
        """An evaluation is recorded."""
        if self._pieces:
            self._awaited.add((where, version))
            self._queue.put_nowait(_seen(round, version, where, evaluation))

    async def work(self) -> None:
        """See what is shown, for ever."""
        while True:
            model = await self._queue.get()
            for piece in self._of(model):
                is_ours = type(piece).__module__.startswith("fedbus.")
                said = self._said_by(piece, model) if is_ours else await asyncio.to_thread(self._said_by, piece, model)
                if isinstance(said, Keep):
                    await asyncio.to_thread(self._keep, model.version, said.name)
                self._act(model, said, is_news=True)
            self._awaited.discard((model.where, model.version))
            self._queue.task_done()

    async def join(self) -> None:
        """Wait until all that was shown is seen."""
        await self._queue.join()

    def _of(self, model: EvaluatedModel) -> list[AfterEvaluation]:
        return [piece for piece in self._pieces if (piece.where or self._default) == model.where]

    def _said_by(self, piece: AfterEvaluation, model: EvaluatedModel) -> Stop | Keep | None:
        name = type(piece).__name__
        try:
            said: object = piece.see(model)
        except Exception as exc:  # the user's own code
            _LOGGER.debug("%s failed", name, exc_info=exc)
            _LOGGER.warning("%s raised %s", name, one_line(f"{type(exc).__name__}: {exc} (round {model.round})"))
            return None
        if said is None or isinstance(said, Stop | Keep):
            return said
        _LOGGER.warning("%s returned %s, a Stop, a Keep or None is due", name, type(said).__name__)
        return None

    def _act(self, model: EvaluatedModel, said: Stop | Keep | None, *, is_news: bool) -> None:
        if isinstance(said, Stop) and not self._is_over:
            self._is_over = True
            self._stop(one_line(said.reason))
        elif isinstance(said, Keep):
            best = Best(round=model.round, version=model.version, metric=said.metric, value=said.value)
            self._best[said.name] = best
            if is_news:
                self._tell(o.ModelKept(name=said.name, **dataclasses.asdict(best)))

    def _keep(self, version: int, name: str) -> bool:
        """Whether NAME.safetensors is that version now. In a thread: it waits for the disk."""
        return self._folder is None or self._folder.keep_model(version, name, run_id=self._run_id)


def _seen(round: int, version: int, where: Where, evaluation: Evaluation) -> EvaluatedModel:
    loss = math.nan if evaluation.loss is None else evaluation.loss  # as JSON has it
    return EvaluatedModel(round=round, version=version, where=where, loss=loss, metrics=dict(evaluation.metrics))

"""Federated evaluations that are out: who was asked about which version, who has answered, until when it matters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fedbus.rounds import commands as c


@dataclass(slots=True)
class _Evaluation:
    round: int
    version: int
    closes_at: float
    outstanding: dict[str, str]  # task_id -> client_id
    reported: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class Evaluations:
    """The open evaluations, of one round each; they run beside the rounds and hold nothing up."""

    def __init__(self) -> None:
        self._open: dict[int, _Evaluation] = {}

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, round: int, version: int, closes_at: float, asked: Mapping[str, str]) -> None:
        """The model `version` that `round` led to is evaluated by those `asked` (task_id -> client_id)."""
        self._open[round] = _Evaluation(round, version, closes_at, dict(asked))

    def awaits(self, task_id: str, client_id: str) -> bool:
        """Whether this client's answer is due."""
        return any(evaluation.outstanding.get(task_id) == client_id for evaluation in self._open.values())

    def outstanding(self) -> set[str]:
        """The clients that owe an answer."""
        return {client_id for evaluation in self._open.values() for client_id in evaluation.outstanding.values()}

    def answered(self, task_id: str, client_id: str, *, reported: bool) -> int | None:
        """Take an answer; the round whose model it is about, None for an answer nobody waits for."""
        for evaluation in self._open.values():
            if evaluation.outstanding.get(task_id) == client_id:
                del evaluation.outstanding[task_id]
                (evaluation.reported if reported else evaluation.missing).append(client_id)
                return evaluation.round
        return None

    def forget_client(self, client_id: str) -> None:
        """It is gone: nobody waits for its answers."""
        for evaluation in self._open.values():
            for task_id in [task_id for task_id, asked in evaluation.outstanding.items() if asked == client_id]:
                self.answered(task_id, client_id, reported=False)

    def tasks(self, version: int, now: float, *, only: str | None = None) -> Iterator[c.SendEvaluateTask]:
        """The tasks about `version` that are not answered, of all or of one client."""
        for evaluation in self._open.values():
            for task_id, client_id in evaluation.outstanding.items():
                if evaluation.version == version and only in (None, client_id):
                    yield c.SendEvaluateTask(
                        client_id=client_id,
                        task_id=task_id,
                        round=evaluation.round,
                        version=version,
                        timeout_s=max(0.0, evaluation.closes_at - now),
                    )

    def deadlines(self) -> list[float]:
        return [evaluation.closes_at for evaluation in self._open.values()]

    def close_due(self, now: float, *, is_stopped: bool) -> Iterator[c.CloseEvaluation]:
        """Those that are complete, or whose time is over; all when the run is stopped."""
        for round_, evaluation in list(self._open.items()):
            if evaluation.outstanding and now < evaluation.closes_at and not is_stopped:
                continue
            del self._open[round_]
            yield c.CloseEvaluation(
                round=round_,
                version=evaluation.version,
                reported=tuple(evaluation.reported),
                missing=(*evaluation.missing, *evaluation.outstanding.values()),
            )

"""What tasks say of themselves, and how an evaluation is answered."""

from __future__ import annotations

from fedbus.client.reader import Place
from fedbus.types import EvaluateResult
from fedbus.wire import messages as m


def kind_of(task: m.Task) -> str:
    """ "parameters", "fit", "query" or "evaluate": an owner of data reads in the log what was asked of them."""
    if isinstance(task, m.FitTask) and task.purpose == "query":
        return "query"
    return type(task).__name__.removesuffix("Task").lower()


def round_of(task: m.Task) -> int:
    """The round that it belongs to; 0 before the first."""
    return 0 if isinstance(task, m.ParametersTask) else task.round


def place_of(task: m.FitTask | m.EvaluateTask) -> Place:
    """Where its model is."""
    return Place(run_id=task.run_id, epoch=task.epoch, version=task.version, offset=task.offset)


def report_of(client_id: str, task: m.EvaluateTask, result: EvaluateResult) -> m.EvaluateReport:
    """The answer to an evaluate task."""
    return m.EvaluateReport(
        client_id=client_id,
        task_id=task.task_id,
        run_id=task.run_id,
        loss=result.loss,
        num_examples=result.num_examples,
        metrics=result.metrics,
    )

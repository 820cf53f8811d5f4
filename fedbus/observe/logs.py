"""Events as log lines: a sentence for people, or one JSON object per line for machines."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO, TypeAlias

from fedbus.config import parse_virtual_id
from fedbus.errors import one_line
from fedbus.observe import events as e

_LOGGER = logging.getLogger("fedbus")

Clock: TypeAlias = Callable[[], float]
"""Seconds of a simulation, which the log shows in place of the time of day."""

_MAX_METRICS = 8
_MAX_NAMES = 16

_WARNINGS = (
    e.BrokerLost,
    e.BrokerBlocked,
    e.MemberLost,
    e.FitFailed,
    e.FitCancelled,
    e.EvaluateFailed,
    e.UpdateRefused,
    e.EvaluationFailed,
    e.MetricsFailed,
    e.AggregateDiscarded,
    e.MessageRejected,
    e.UserShutOut,
    e.TaskErred,
    e.RefusalArrived,
)
_DETAILS = (e.RunClosing, e.ModelPublished, e.UpdateRepeated, e.TaskStarted, e.ReceiptArrived)


def log_event(event: object) -> None:
    """Write `event` to the logger "fedbus": an `Observe` function."""
    if isinstance(event, e.MemberLost) and event.left:
        level = logging.INFO
    elif isinstance(event, e.MemberJoined) and parse_virtual_id(event.client_id) is not None:
        level = logging.DEBUG  # they come by the thousand, all at once
    elif isinstance(event, _WARNINGS):
        level = logging.WARNING
    else:
        level = logging.DEBUG if isinstance(event, _DETAILS) else logging.INFO
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, "%s", sentence(event), extra={"event": event})


def set_up(
    stream: TextIO | None, *, as_json: bool = False, level: int = logging.INFO, clock: Clock | None = None
) -> None:
    """Send fedbus's log lines to `stream`, one event per line; None keeps them off every screen."""
    handler = logging.NullHandler() if stream is None else logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(clock) if as_json else _ForPeople(clock))
    _LOGGER.handlers[:] = [handler]
    _LOGGER.propagate = False
    _LOGGER.setLevel(level)
    # aiormq's DEBUG level prints whole payloads, and its errors, like those of lost tasks, reach the user as ours.
    for name in ("aiormq", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL if level > logging.DEBUG else logging.ERROR)


def also_into(path: Path, clock: Clock | None = None) -> None:
    """Write the log lines into the file at `path`, too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(_ForPeople(clock))
    _LOGGER.addHandler(handler)


def hours(seconds: float) -> str:
    """Seconds as H:MM:SS, however many hours they are."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _ForPeople(logging.Formatter):
    """The time of day, or that of the simulation, and the sentence."""

    def __init__(self, clock: Clock | None) -> None:
        super().__init__("%(asctime)s  %(message)s", "%H:%M:%S")
        self._clock = clock

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """What stands before the sentence."""
        return super().formatTime(record, datefmt) if self._clock is None else f"{hours(self._clock()):>8}"


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC, ISO 8601), level, event, message and the event's own fields.

    With a clock "virtual_s" follows the time: seconds of the simulation.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        super().__init__()
        self._clock = clock

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        if self._clock is not None:
            entry["virtual_s"] = round(self._clock(), 6)
        event = getattr(record, "event", None)
        if event is not None:
            entry["event"] = _snake_case(type(event).__name__)
        entry["message"] = record.getMessage()
        if dataclasses.is_dataclass(event) and not isinstance(event, type):
            entry |= dataclasses.asdict(event)
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def number(value: object) -> str:
    """A metric as people read it."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _metrics(metrics: Mapping[str, object]) -> str:
    shown = "".join(f", {name} {number(value)[:80]}" for name, value in list(metrics.items())[:_MAX_METRICS])
    return shown + (f" and {len(metrics) - _MAX_METRICS} more" if len(metrics) > _MAX_METRICS else "")


def _names(clients: Sequence[str]) -> str:
    more = len(clients) - _MAX_NAMES
    return ", ".join(clients[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def sentence(event: object) -> str:
    """What happened, in one line that no client can break."""
    return one_line(_sentence(event), 2000)


def _sentence(event: object) -> str:
    match event:
        case e.Announcement():
            return event.text
        case e.MetricsExposed():
            return f"metrics at {event.url}"
        case e.ConnectedToBroker():
            return f"{event.role} connected to {event.broker}"
        case e.BrokerLost():
            return f"the broker at {event.broker} is lost ({event.reason}): connecting again"
        case e.BrokerRestored():
            return f"the broker at {event.broker} is back after {event.outage_s:.1f} s"
        case e.BrokerBlocked():
            return f"the broker at {event.broker} holds publishes back: {event.reason}. Nothing is lost, all wait"
        case e.BrokerUnblocked():
            return f"the broker at {event.broker} takes publishes again after {event.outage_s:.1f} s"
        case e.RunStarted():
            waiting = _plural(event.start_clients, "client")
            return f"run {event.run_id} of {_plural(event.num_rounds, 'round')}: waiting for {waiting}"
        case e.VirtualClientsEnrolled():
            return f"{_plural(event.clients, 'virtual client')} enrolled, for workers to play ('fedbus worker APP')"
        case e.WorkersCounted():
            if not event.workers:
                return "no worker takes tasks: start one with 'fedbus worker APP'"
            return f"{_plural(event.workers, 'worker')} {'takes' if event.workers == 1 else 'take'} tasks"
        case e.RunResumed():
            return f"run {event.run_id} goes on after {_plural(event.rounds, 'round')} (epoch {event.epoch})"
        case e.MemberJoined():
            wanted = f", {event.needed} more needed" if event.needed else ""
            late = f" during round {event.round}" if event.round else ""
            return f"{event.client_id} joined{late} ({_plural(event.members, 'client')}{wanted})"
        case e.MemberLost():
            verb = "left" if event.left else "is lost"
            return f"{event.client_id} {verb}: {event.reason} ({_plural(event.members, 'client')} remaining)"
        case e.RoundOpened():
            tasked = _plural(len(event.cohort), "client")
            return f"round {event.round}: {tasked} tasked with model {event.version}"
        case e.CohortGrew():
            return f"round {event.round}: also tasked: {_names(event.clients)}"
        case e.UpdateFolded():
            late = f", {_plural(event.staleness, 'version')} late" if event.staleness else ""
            examples = _plural(event.num_examples, "example")
            return f"round {event.round}: update of {event.client_id} folded ({examples}{late})"
        case e.UpdateRefused():
            return f"update of {event.client_id} refused: {event.reason}"
        case e.UpdateRepeated():
            return f"update of {event.client_id} came once more"
        case e.FitFailed():
            return f"round {event.round}: {event.client_id} failed to fit: {event.reason}"
        case e.FitCancelled():
            return f"{event.client_id} is told to stop training: {event.reason}"
        case e.EvaluateFailed():
            return f"round {event.round}: {event.client_id} failed to evaluate: {event.reason}"
        case e.RoundClosed():
            waits = f", still out: {_names(event.unfinished)}" if event.unfinished else ""
            return (
                f"round {event.round} closed ({event.reason}) with {_plural(event.folded, 'update')} "
                f"in {event.seconds:.2f} s: model {event.version}{_metrics(event.fit_metrics)}{waits}"
            )
        case e.Evaluated():
            by = (
                "central evaluation"
                if event.where == "central"
                else f"{_plural(event.clients or 0, 'client')} evaluated"
            )
            return f"round {event.round}: {by}: loss {number(event.loss)}{_metrics(event.metrics)}"
        case e.EvaluationFailed():
            return f"round {event.round}: evaluate_fn failed: {event.reason}"
        case e.MetricsFailed():
            return f"round {event.round}: aggregate_{event.of}_metrics failed: {event.reason}"
        case e.ModelKept():
            what = f"{event.metric} {number(event.value)}"
            return f"round {event.round}: model {event.version} is the best so far: {what} ({event.name}.safetensors)"
        case e.ModelPublished():
            return f"model {event.version} published: {event.payload_bytes} bytes, {_plural(event.parts, 'part')}"
        case e.AggregationProgressed():
            return f"round {event.round}: {event.share:.0%} aggregated"
        case e.AggregateDiscarded():
            return f"round {event.round}: its aggregate is discarded, the model stays: {event.reason}"
        case e.MessageRejected():
            who = "" if event.user is None else f" of {event.user}"
            if event.count > 1:
                return f"{event.count} messages{who} on {event.queue} were rejected, the last one: {event.reason}"
            return f"a message{who} on {event.queue} was rejected: {event.reason}"
        case e.UserShutOut():
            return f"{event.user} sends too much: shut out for {event.seconds:.0f} s"
        case e.RunClosing():
            return f"the clients are sent home: {event.reason}"
        case e.RunFinished():
            verb = "finished" if event.finished else "ended early"
            return f"run {verb}: {event.reason} ({_plural(event.rounds, 'round')}, {event.seconds:.1f} s)"
        case e.ServerAwaited():
            return f"{event.client_id}: waiting for a server on this broker"
        case e.WorkAwaited():
            return "waiting for a server with virtual clients on this broker ('fedbus server APP --virtual-clients N')"
        case e.WorkerDone():
            back = f", {_plural(event.given_back, 'task')} given back" if event.given_back else ""
            return f"worker ends: {event.reason} ({_plural(event.tasks, 'task')} answered{back})"
        case e.Welcomed():
            return f"{event.client_id}: member of run {event.run_id}"
        case e.ClientDone():
            return f"{event.client_id}: {'the run is done' if event.finished else event.reason}"
        case e.TaskStarted():
            return f"{event.client_id}: {event.kind} for round {event.round} started"
        case e.TaskCompleted():
            return f"{event.client_id}: {event.kind} for round {event.round} done in {event.seconds:.2f} s"
        case e.TaskErred():
            return f"{event.client_id}: {event.kind} for round {event.round} failed: {event.reason}"
        case e.TaskCancelled():
            return f"{event.client_id}: fit for round {event.round} is not wanted any more: {event.reason}"
        case e.ReceiptArrived():
            late = f", {_plural(event.staleness, 'version')} late" if event.staleness else ""
            return f"{event.client_id}: update is in round {event.round}{late}"
        case e.RefusalArrived():
            return f"{event.client_id}: the server refused the update: {event.reason}"
        case _:
            return repr(event)

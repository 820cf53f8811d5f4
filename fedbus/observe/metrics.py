"""What happens, as Prometheus counts it: an observer of the events, and figures that are read when it scrapes.

The labels are few and bounded: reasons, outcomes and queues are ours; users are those that the broker knows, up to a
limit. No client has a label of its own: with thousands of them, that is `fedbus status`'s and the history's affair.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from typing import Any, Final, Literal, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedbus.bus.base import QueueState
from fedbus.observe import events as o
from fedbus.observe.figures import ClientFigures, ServerFigures, WorkerFigures
from fedbus.observe.health import Health

Role: TypeAlias = Literal["server", "client", "worker"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_ROUND_BUCKETS: Final = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0),
    *(120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 43200.0, 86400.0),
)
"""10 ms to a day: a bench round takes 30 ms, a night's training hours."""
_TURNAROUND_BUCKETS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_LAG_BUCKETS: Final = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_STALENESS_BUCKETS: Final = (0, 1, 2, 3, 5, 8, 13, 20, 50, 100, 300, 1000)
_MOST_USERS: Final = 256
_OUTCOMES: Final = ("folded", "late", "refused", "duplicate", "failed", "cancelled")
_KINDS: Final = ("parameters", "fit", "evaluate")


class Metrics:
    """What servers, clients and workers have in common: the connection to the broker, the event loop, the process.

    Args:
        role: whose they are.
        health: where the connection and the event loop stand.
        clock: seconds that only grow.
    """

    def __init__(self, role: Role, health: Health, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=False)
        self.figures: Callable[[], Any] = lambda: None
        """Gives what is read at each scrape, as the role has it; None: there is nothing yet."""
        self._health = health
        self._clock = clock
        self._lost_at: float | None = None
        self._blocked_at: float | None = None
        self._outage_s = 0.0
        self._blocked_s = 0.0
        self._users: set[str] = set()
        ProcessCollector(registry=registry)
        build = Gauge("fedbus_build_info", "Always 1.", ("version", "python", "role"), registry=registry)
        build.labels(version("fedbus"), platform.python_version(), role).set(1)
        self._reconnects = Counter("fedbus_broker_reconnects", "Connections made anew.", registry=registry)
        self._lag = Histogram(
            "fedbus_event_loop_lag_seconds",
            "By how much the event loop was late, looked at twice a second.",
            buckets=_LAG_BUCKETS,
            registry=registry,
        )
        self._rejected = Counter(
            "fedbus_messages_rejected",
            "Messages that are none, or not their sender's to send, by the user that the broker vouches for.",
            ("queue", "user"),
            registry=registry,
        )
        self._shut_out = Counter(
            "fedbus_users_shut_out",
            "How often a user was shut out for a while because it sent too much.",
            ("user",),
            registry=registry,
        )
        self._depth = Gauge(
            "fedbus_queue_messages",
            "Messages that wait in a queue; of a stream roughly what it keeps.",
            ("queue",),
            registry=registry,
        )
        self._consumers = Gauge("fedbus_queue_consumers", "Who reads a queue.", ("queue",), registry=registry)
        registry.register(_Reading(self._read))

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(_Plain(self.registry))

    def lagged(self, seconds: float) -> None:
        """The event loop ran, so many seconds late."""
        self._lag.observe(max(0.0, seconds))

    def queue(self, name: str, state: QueueState | None) -> None:
        """Note how a queue is; None: nobody knows, or there is none of that name."""
        if state is None:
            self._depth.remove(name)
            self._consumers.remove(name)
        else:
            self._depth.labels(name).set(state.messages)
            self._consumers.labels(name).set(state.consumers)

    def observe(self, event: object) -> None:
        """Take in one event: an `Observe` function."""
        match event:
            case o.BrokerLost():
                self._depth.clear()
                self._consumers.clear()
                self._unblock()
                self._lost_at = self._clock()
            case o.BrokerRestored():
                self._reconnects.inc()
                self._outage_s, self._lost_at = self._outage_s + self._since(self._lost_at), None
            case o.BrokerBlocked():
                self._blocked_at = self._clock()
            case o.BrokerUnblocked():
                self._unblock()
            case o.MessageRejected():
                queue = "fedbus.inbox" if event.queue.startswith("fedbus.inbox.") else event.queue
                self._rejected.labels(queue, self._bounded(event.user)).inc(event.count)
            case o.UserShutOut():
                self._shut_out.labels(self._bounded(event.user)).inc()
            case _:
                pass

    def _unblock(self) -> None:
        self._blocked_s, self._blocked_at = self._blocked_s + self._since(self._blocked_at), None

    def _since(self, then: float | None) -> float:
        return 0.0 if then is None else max(0.0, self._clock() - then)

    def _bounded(self, user: str | None) -> str:
        """The user, as long as there are not too many of them."""
        if user is None:
            return "none"
        if len(self._users) < _MOST_USERS:
            self._users.add(user)
        return user if user in self._users else "other"

    def _read(self) -> Iterator[Metric]:
        """What goes on at this moment counts, too: an outage shows while it lasts."""
        lost_at, blocked_at = self._lost_at, self._blocked_at
        yield GaugeMetricFamily(
            "fedbus_broker_connected", "1 while there is a connection.", float(self._health.is_connected)
        )
        yield CounterMetricFamily(
            "fedbus_broker_outage_seconds", "Seconds without a connection.", self._outage_s + self._since(lost_at)
        )
        yield GaugeMetricFamily(
            "fedbus_broker_blocked", "1 while an alarm makes publishes wait.", float(blocked_at is not None)
        )
        yield CounterMetricFamily(
            "fedbus_broker_blocked_seconds", "Seconds under an alarm.", self._blocked_s + self._since(blocked_at)
        )
        yield GaugeMetricFamily(
            "fedbus_event_loop_silence_seconds", "Seconds since the event loop ran.", self._health.silence_s
        )


class ServerMetrics(Metrics):
    """Those of a server: feed it events, tell it of queues, and say where its figures come from."""

    def __init__(self, health: Health, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("server", health, clock)
        registry = self.registry
        self._run = Gauge("fedbus_run_info", "1 for the run that goes on.", ("run_id",), registry=registry)
        self._num_rounds = Gauge("fedbus_run_rounds", "Rounds that the run has in all.", registry=registry)
        self._timeout = Gauge("fedbus_round_timeout_seconds", "timeout_s of the open round.", registry=registry)
        self._closed = Counter("fedbus_rounds_closed", "Rounds closed, by reason.", ("reason",), registry=registry)
        self._last_closed = Gauge(
            "fedbus_round_last_closed_timestamp_seconds",
            "When a round closed last; before that, when the run began.",
            registry=registry,
        )
        self._seconds = Histogram(
            "fedbus_round_seconds",
            "From the first task of a round to the model that it led to.",
            buckets=_ROUND_BUCKETS,
            registry=registry,
        )
        self._turnaround = Histogram(
            "fedbus_round_turnaround_seconds",
            "From the update that closed a round to the begin of the next version at the broker.",
            buckets=_TURNAROUND_BUCKETS,
            registry=registry,
        )
        self._updates = Counter(
            "fedbus_updates",
            "Updates by what became of them; late ones are folded, too.",
            ("outcome",),
            registry=registry,
        )
        self._staleness = Histogram(
            "fedbus_update_staleness_versions",
            "Versions that a folded update was late.",
            buckets=_STALENESS_BUCKETS,
            registry=registry,
        )
        self._folded_bytes = Counter(
            "fedbus_update_folded_bytes", "Payload bytes of folded updates, as they came.", registry=registry
        )
        self._folded_raw_bytes = Counter(
            "fedbus_update_folded_raw_bytes",
            "Payload bytes that folded updates would have without a codec.",
            registry=registry,
        )
        self._model_bytes = Gauge("fedbus_model_bytes", "Payload bytes of the model as it travels.", registry=registry)
        self._published = Counter(
            "fedbus_model_published_bytes", "Payload bytes of versions put into the stream.", registry=registry
        )
        self._joins = Counter("fedbus_member_joins", "Clients that joined.", registry=registry)
        self._losses = Counter(
            "fedbus_member_losses", "Members that are none any more, by cause.", ("cause",), registry=registry
        )
        self._workers = Gauge("fedbus_workers", "Workers that take tasks of virtual clients.", registry=registry)
        self._loss = Gauge("fedbus_evaluation_loss", "Of the newest model evaluated.", ("where",), registry=registry)
        self._evaluated_round: dict[str, int] = {}
        self._accuracy = Gauge(
            "fedbus_evaluation_accuracy",
            'Of the newest model evaluated, where there is a metric "accuracy".',
            ("where",),
            registry=registry,
        )
        self._evaluations_failed = Counter(
            "fedbus_evaluations_failed", "Evaluations that gave nothing.", ("where",), registry=registry
        )
        for reason in ("min_fit_clients", "cohort_done", "timeout"):
            self._closed.labels(reason)
        for outcome in _OUTCOMES:
            self._updates.labels(outcome)
        for cause in ("left", "lease", "unreachable", "expelled"):
            self._losses.labels(cause)
        for where in ("central", "federated"):
            self._evaluations_failed.labels(where)

    def observe(self, event: object) -> None:
        super().observe(event)
        match event:
            case o.RunStarted():
                self._run.clear()
                self._run.labels(event.run_id).set(1)
                self._num_rounds.set(event.num_rounds)
                self._last_closed.set_to_current_time()
            case o.RoundOpened():
                self._timeout.set(event.timeout_s)
            case o.RoundClosed():
                self._close(event)
            case o.ModelPublished():
                self._model_bytes.set(event.payload_bytes)
                self._published.inc(event.payload_bytes)
            case o.UpdateFolded():
                self._updates.labels("late" if event.staleness else "folded").inc()
                self._staleness.observe(event.staleness)
                self._folded_bytes.inc(event.nbytes)
                self._folded_raw_bytes.inc(event.raw_bytes)
            case o.UpdateRefused():
                self._updates.labels("refused").inc()
            case o.UpdateRepeated():
                self._updates.labels("duplicate").inc()
            case o.FitFailed():
                self._updates.labels("failed").inc()
            case o.FitCancelled():
                self._updates.labels("cancelled").inc()
            case o.MemberJoined():
                self._joins.inc()
            case o.MemberLost():
                self._losses.labels(event.cause).inc()
            case o.WorkersCounted():
                self._workers.set(event.workers)
            case o.Evaluated():
                self._evaluated(event)
            case o.EvaluateFailed():
                self._evaluations_failed.labels("federated").inc()
            case o.EvaluationFailed():
                self._evaluations_failed.labels("central").inc()
            case _:
                pass

    def _close(self, event: o.RoundClosed) -> None:
        self._closed.labels(event.reason).inc()
        self._last_closed.set_to_current_time()
        self._seconds.observe(event.seconds)
        if event.turnaround_s is not None:
            self._turnaround.observe(event.turnaround_s)

    def _evaluated(self, event: o.Evaluated) -> None:
        """Evaluations of several models go on at the same time, and that of an older one may end later."""
        if event.round < self._evaluated_round.get(event.where, 0):
            return
        self._evaluated_round[event.where] = event.round
        self._loss.labels(event.where).set(event.loss)
        accuracy = event.metrics.get("accuracy")
        if isinstance(accuracy, int | float):
            self._accuracy.labels(event.where).set(accuracy)

    def _read(self) -> Iterator[Metric]:
        yield from super()._read()
        now: ServerFigures | None = self.figures()
        if now is None:
            return
        yield GaugeMetricFamily("fedbus_model_version", "The newest committed version.", now.version)
        yield GaugeMetricFamily("fedbus_round_open", "The round that takes updates; 0: none does.", now.open_round)
        yield GaugeMetricFamily("fedbus_round_open_seconds", "For how long it is open.", now.open_s)
        members = {"idle": now.idle, "busy": now.busy, "overdue": now.overdue}
        yield _labelled("fedbus_members", "Living clients by what they do.", "state", members)
        uploads = {"granted": now.uploads_granted, "waiting": now.uploads_waiting}
        yield _labelled("fedbus_upload_slots", "Large uploads that go on, and that wait for room.", "state", uploads)
        yield GaugeMetricFamily(
            "fedbus_staging_bytes", "Payload bytes of updates in memory that are not folded.", now.staged_bytes
        )
        yield CounterMetricFamily(
            "fedbus_update_received_bytes", "Of all that came on the updates queue.", now.received_bytes
        )


class _TaskMetrics(Metrics):
    """What those who do tasks have in common."""

    def __init__(self, role: Role, health: Health, clock: Callable[[], float]) -> None:
        super().__init__(role, health, clock)
        self._tasks = Counter(
            "fedbus_tasks",
            "Tasks by kind and by what became of them.",
            ("kind", "outcome"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "fedbus_task_seconds",
            "From the begin of a task to its answer at the broker.",
            ("kind",),
            buckets=_ROUND_BUCKETS,
            registry=self.registry,
        )
        for kind in _KINDS:
            self._seconds.labels(kind)
            for outcome in ("completed", "failed", *(("cancelled",) if kind == "fit" else ())):
                self._tasks.labels(kind, outcome)

    def observe(self, event: object) -> None:
        super().observe(event)
        match event:
            case o.TaskCompleted():
                self._tasks.labels(event.kind, "completed").inc()
                self._seconds.labels(event.kind).observe(event.seconds)
            case o.TaskErred():
                self._tasks.labels(event.kind, "failed").inc()
            case o.TaskCancelled():
                self._tasks.labels("fit", "cancelled").inc()
            case _:
                pass


def _bytes_moved(now: ClientFigures | WorkerFigures) -> Iterator[Metric]:
    yield CounterMetricFamily("fedbus_uploaded_bytes", "Update messages that the broker confirmed.", now.uploaded_bytes)
    yield CounterMetricFamily("fedbus_downloaded_bytes", "Messages of the model stream.", now.downloaded_bytes)


class ClientMetrics(_TaskMetrics):
    """Those of a client."""

    def __init__(self, health: Health, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("client", health, clock)
        self._receipts = Counter("fedbus_client_receipts", "Updates that are committed.", registry=self.registry)
        self._refusals = Counter("fedbus_client_refusals", "Updates that the server refused.", registry=self.registry)

    def observe(self, event: object) -> None:
        super().observe(event)
        match event:
            case o.ReceiptArrived():
                self._receipts.inc()
            case o.RefusalArrived():
                self._refusals.inc()
            case _:
                pass

    def _read(self) -> Iterator[Metric]:
        yield from super()._read()
        now: ClientFigures | None = self.figures()
        if now is None:
            return
        yield from _bytes_moved(now)
        yield GaugeMetricFamily("fedbus_client_member", "1 once a server has welcomed it.", float(now.is_member))
        yield GaugeMetricFamily("fedbus_client_lease_seconds", "Silence after which it is given up.", now.lease_s)
        yield GaugeMetricFamily(
            "fedbus_client_last_welcome_timestamp_seconds", "When a server welcomed it last; 0: none.", now.welcomed_at
        )
        yield GaugeMetricFamily("fedbus_client_outbox_updates", "Updates without a receipt.", now.outbox_updates)
        yield GaugeMetricFamily("fedbus_client_outbox_bytes", "Their payload bytes.", now.outbox_bytes)


class WorkerMetrics(_TaskMetrics):
    """Those of a worker."""

    def __init__(self, health: Health, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("worker", health, clock)

    def _read(self) -> Iterator[Metric]:
        yield from super()._read()
        now: WorkerFigures | None = self.figures()
        if now is None:
            return
        yield from _bytes_moved(now)
        yield GaugeMetricFamily("fedbus_worker_has_work", "1 while there is a queue of work.", float(now.has_work))
        yield GaugeMetricFamily("fedbus_worker_slots", "Tasks that it does at a time.", now.slots)
        yield GaugeMetricFamily("fedbus_worker_tasks_in_hand", "Tasks that it has taken.", now.in_hand)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, count in values.items():
        family.add_metric((value,), count)
    return family


class _Plain(Collector):
    """A registry without the times at which its counters were made: they would be as many again."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _Reading(Collector):
    """Metrics that are read when they are asked for."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()

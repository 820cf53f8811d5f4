"""A run on the terminal, live: the round, who has reported, who is late or lost, loss and accuracy."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedbus.observe import events as o
from fedbus.observe.logs import Clock, hours, number, sentence

_MAX_CLIENT_ROWS = 16
_MAX_ROUND_ROWS = 12
_MAX_NEWS = 5
_WIDE = 100  # columns; below it the notes beside the clients give way

_STYLES = {
    "idle": "dim",
    "training": "yellow",
    "reported": "green",
    "late": "magenta",
    "failed": "red",
    "refused": "red",
    "cancelled": "red",
    "lost": "bold red",
    "left": "dim",
}


@dataclass
class _ClientRow:
    state: str = "idle"
    updates: int = 0
    late: int = 0
    note: str = ""


@dataclass
class _RoundRow:
    updates: str = ""
    seconds: str = ""
    reason: str = ""
    central: Mapping[str, object] = field(default_factory=dict)
    federated: Mapping[str, object] = field(default_factory=dict)


class Board:
    """What is known of a run, as a screenful; feed it events, render it at any time.

    With a `clock` it shows the time of a simulation.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock
        self.broker = ""
        self._run: o.RunStarted | None = None
        self._started_at = time.monotonic()
        self._round = 0
        self._opened: o.RoundOpened | None = None
        self._folded = 0
        self._aggregated = 0.0  # share of a `finish` that takes long
        self._needed = 0
        self._clients: OrderedDict[str, _ClientRow] = OrderedDict()
        self._rounds: OrderedDict[int, _RoundRow] = OrderedDict()
        self._news: deque[Text] = deque(maxlen=_MAX_NEWS)
        self._end: o.RunFinished | None = None
        self._committed_before = 0
        self._trouble = ""

    def announce(self, text: str, style: str = "bold") -> None:
        """Put a line of the caller's own among the news."""
        at = time.strftime("%H:%M:%S") if self._clock is None else hours(self._clock())
        self._news.append(Text(f"{at}  {text}", style=style))

    def observe(self, event: object) -> None:
        """Take in one event."""
        match event:
            case o.ConnectedToBroker():
                self.broker = event.broker
            case o.RunStarted():
                self._run, self._needed = event, event.start_clients
            case o.MemberJoined():
                self._row(event.client_id).state = "idle"
                self._row(event.client_id).note = ""
                self._needed = event.needed
                if event.round:
                    self.announce(sentence(event), "cyan")
            case o.MemberLost():
                self._row(event.client_id).state = "left" if event.left else "lost"
                self._row(event.client_id).note = event.reason
                self.announce(sentence(event), "dim" if event.left else "red")
            case o.RoundOpened():
                self._open(event)
            case o.CohortGrew():
                for client_id in event.clients:
                    self._row(client_id).state = "training"
            case o.UpdateFolded():
                self._folded += 1
                row = self._row(event.client_id)
                row.updates += 1
                row.late += event.staleness > 0
                row.state = "reported"
                row.note = f"{event.staleness} late" if event.staleness else ""
            case o.UpdateRefused():
                self._row(event.client_id).state = "refused"
                self.announce(sentence(event), "red")
            case o.FitCancelled():
                self._row(event.client_id).state = "cancelled"
                self.announce(sentence(event), "red")
            case o.FitFailed():
                self._row(event.client_id).state = "failed"
                self.announce(sentence(event), "red")
            case (
                o.EvaluateFailed()
                | o.EvaluationFailed()
                | o.MetricsFailed()
                | o.MessageRejected()
                | o.AggregateDiscarded()
                | o.UserShutOut()
            ):
                self.announce(sentence(event), "red")
            case o.AggregationProgressed():
                self._aggregated = event.share
            case o.RoundClosed():
                self._close(event)
            case o.Evaluated():
                row_of_round = self._rounds.setdefault(event.round, _RoundRow())
                figures = {"loss": event.loss, **event.metrics}
                if event.where == "central":
                    row_of_round.central = figures
                else:
                    row_of_round.federated = figures
            case o.RunFinished():
                self._end = event
            case o.RunResumed():
                self._committed_before = event.rounds
                self.announce(sentence(event), "cyan")
            case o.BrokerLost():
                self._trouble = "the broker is lost, connecting again"
                self.announce(sentence(event), "red")
            case o.BrokerBlocked():
                self._trouble = f"the broker holds publishes back: {event.reason}"
                self.announce(sentence(event), "red")
            case o.BrokerRestored() | o.BrokerUnblocked():
                self._trouble = ""
                self.announce(sentence(event), "green")
            case _:
                pass

    def _row(self, client_id: str) -> _ClientRow:
        return self._clients.setdefault(client_id, _ClientRow())

    def _open(self, event: o.RoundOpened) -> None:
        self._opened, self._round, self._folded, self._aggregated = event, event.round, 0, 0.0
        for row in self._clients.values():
            if row.state == "training":
                row.state = "training" if self._run is not None and self._run.is_asynchronous else "late"
            elif row.state in ("reported", "failed", "refused"):
                row.state, row.note = "idle", ""
        for client_id in event.cohort:
            self._row(client_id).state = "training"

    def _close(self, event: o.RoundClosed) -> None:
        row = self._rounds.setdefault(event.round, _RoundRow())
        row.updates = str(event.folded)
        row.seconds = f"{event.seconds:.2f}"
        row.reason = event.reason

    # ---- the screen ----------------------------------------------------------------------------------------------

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        side_by_side = Table.grid(padding=(0, 3))
        side_by_side.add_row(self._client_table(with_notes=options.max_width >= _WIDE), self._round_table())
        yield Group(*self._headline(), Text(), side_by_side, Text(), *self._news)

    def _headline(self) -> Iterator[RenderableType]:
        total = self._run.num_rounds if self._run else 0
        line = Table.grid(padding=(0, 2))
        closed = self._committed_before + sum(1 for row in self._rounds.values() if row.reason)
        line.add_row(
            Text("fedbus", style="bold"),
            ProgressBar(total=total, completed=closed, width=24) if total else Text(),
            Text(self._status(total), no_wrap=True),
            Text(self._elapsed(), style="dim"),
            Text(self.broker, style="dim", no_wrap=True, overflow="ellipsis"),
        )
        yield line
        if self._trouble and self._end is None:
            yield Text(self._trouble, style="bold red")
        if self._end is not None and not self._end.finished:
            yield Text(f"ended early: {self._end.reason}", style="red")

    def _elapsed(self) -> str:
        seconds = f"{time.monotonic() - self._started_at:.0f} s"
        return seconds if self._clock is None else f"{hours(self._clock())} simulated in {seconds}"

    def _status(self, total: int) -> str:
        if self._end is not None:
            return "finished" if self._end.finished else "ended early"
        if not self._round or self._opened is None:
            return f"waiting for {self._needed} more clients" if self._needed else "starting"
        aggregated = f", {self._aggregated:.0%} aggregated" if self._aggregated else ""
        return f"round {self._round}/{total}: {self._folded} of {self._opened.min_fit_clients} updates{aggregated}"

    def _client_table(self, *, with_notes: bool) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("client", "state", "updates", *([""] if with_notes else [])):
            table.add_column(name, no_wrap=True)
        # The interesting ones first, where there are more than fit.
        order = {"lost": 0, "refused": 1, "cancelled": 1, "failed": 1, "late": 2, "training": 3}
        rows = list(self._clients.items())
        if len(rows) > _MAX_CLIENT_ROWS:
            rows.sort(key=lambda item: order.get(item[1].state, 9))
        for client_id, row in rows[:_MAX_CLIENT_ROWS]:
            updates = f"{row.updates}" + (f" ({row.late} late)" if row.late else "")
            note = [Text(row.note[:24])] if with_notes else []  # Text: what clients say must not be read as markup
            table.add_row(Text(client_id), Text(row.state, style=_STYLES.get(row.state, "")), updates, *note)
        if len(rows) > _MAX_CLIENT_ROWS:
            table.add_row(Text(f"and {len(rows) - _MAX_CLIENT_ROWS} more", style="dim"))
        return table

    def _round_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        shown = list(self._rounds.items())[-_MAX_ROUND_ROWS:]
        figures = [row.central or row.federated for _, row in shown]
        names = list(dict.fromkeys(name for values in figures for name in values))[:4]
        for name in ("round", "updates", "s", *names):
            table.add_column(Text(name[:16]), justify="right", no_wrap=True)
        for (round_, row), values in zip(shown, figures, strict=True):
            cells = [Text(number(values[name])[:16]) if name in values else "" for name in names]
            table.add_row(str(round_), row.updates, row.seconds, *cells)
        return table


class LiveProgress:
    """A `Board` that redraws itself on the terminal; a context manager."""

    def __init__(self, console: Console, clock: Clock | None = None) -> None:
        self.board = Board(clock)
        self._live = Live(self.board, console=console, refresh_per_second=8)

    def __enter__(self) -> LiveProgress:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def observe(self, event: object) -> None:
        """Take in one event: an `Observe` function."""
        self.board.observe(event)

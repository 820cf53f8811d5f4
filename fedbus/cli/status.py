"""`fedbus status`: the federation at a glance, for whoever has the server's rights."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, TypeAlias
from urllib.parse import unquote, urlsplit

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedbus.api import on_signals
from fedbus.bus.access import Access, is_loopback, user_of
from fedbus.bus.base import Bus, QueueState
from fedbus.bus.node import NodeState, detached_state, rabbitmqctl
from fedbus.bus.rabbitmq import connect
from fedbus.cli.options import Broker, Bundle, Debug, Json, Plaintext, access_of, load_bundle, run_async
from fedbus.cli.tables import console_for_tables
from fedbus.errors import BrokerError, DecodeError, one_line
from fedbus.observe.broker import BrokerFigures, MonitoringApi, NodeFigures, parse_ctl_status
from fedbus.observe.glance import ask_queues, ask_server
from fedbus.observe.logs import hours

_BROKER_EVERY_S: Final = 10.0
"""rabbitmqctl is a program of half a second: not with every look."""
_STYLES: Final = {"idle": "dim", "training": "yellow", "late": "magenta", "overdue": "bold red"}

_Watch = Annotated[bool, typer.Option("--watch", help="Look again every SECONDS, until Ctrl-C.")]
_Seconds = Annotated[float, typer.Argument(metavar="SECONDS", min=0.2, help="Between two looks, with --watch.")]
_Management = Annotated[
    str | None,
    typer.Option(
        "--management",
        envvar="FEDBUS_MANAGEMENT",
        metavar="URL",
        help="Its management API, https://USER@HOST:15671, for memory and disk (FEDBUS_MANAGEMENT_PASSWORD).",
    ),
]

_Figures: TypeAlias = Callable[[], BrokerFigures]


@dataclass(kw_only=True)
class Glance:
    """One look. `trouble`: why the broker cannot be asked, "" when it can; `alarm`: why it lets nobody ask the server;
    `unknown`: why its memory is not known.
    """

    broker: str
    server: dict[str, Any] | None = None
    queues: Mapping[str, QueueState | None] = field(default_factory=dict)
    figures: BrokerFigures | None = None
    unknown: str = ""
    trouble: str = ""
    alarm: str = ""

    @property
    def is_served(self) -> bool:
        return self.server is not None

    def to_json(self) -> str:
        """One object: "server" is null when none answers, the broker's "nodes" are null when they are not known."""
        nodes = None if self.figures is None else [dataclasses.asdict(node) for node in self.figures.nodes]
        broker = {
            "url": self.broker,
            "error": self.trouble or None,
            "alarm": self.alarm or None,
            "version": self.figures and self.figures.version,
            "connections": self.figures and self.figures.connections,
            "nodes": nodes,
            "unknown": self.unknown or None,
        }
        queues = {name: None if state is None else dataclasses.asdict(state) for name, state in self.queues.items()}
        return json.dumps({"server": self.server, "queues": queues, "broker": broker})


def status(
    seconds: _Seconds = 2.0,
    broker: Broker = None,
    bundle: Bundle = None,
    plaintext: Plaintext = False,
    management: _Management = None,
    watch: _Watch = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show who is in, which round is open, what lags, and how the queues and the broker are.

    It takes the server's own user, or its bundle. Exit code 1 when no server answers.
    """
    access = access_of(broker, load_bundle(bundle, "server"))
    looker = _Looker(access, _source_of_figures(access, management, allow_plaintext=plaintext))
    if watch:
        run_async(_watch(looker, seconds, as_json=as_json))
        return
    glance = run_async(looker.once())
    typer.echo(glance.to_json()) if as_json else console_for_tables().print(render(glance, console_for_tables().width))
    if not glance.is_served:
        raise typer.Exit(1)


def _source_of_figures(access: Access, management: str | None, *, allow_plaintext: bool) -> _Figures | str:
    """Where the broker's memory and disk are to be had, or why they are not."""
    if management is not None:
        user, password = _login(access, management)
        return MonitoringApi(management, user, password, ca=access.ca, allow_plaintext=allow_plaintext).figures
    state = detached_state("default")
    if state is not None and any(_leads_to(url, state) for url in access.each_url):
        return lambda: parse_ctl_status(rabbitmqctl(state, "status", "--formatter", "json"), "private node")
    return "give --management URL (RabbitMQ's management plugin) to see them"


def _leads_to(url: str, state: NodeState) -> bool:
    parts = urlsplit(url)
    port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
    return (is_loopback(parts.hostname or "") and port in (state.port, state.tls_port)) or (
        (parts.hostname, port) == (state.tls_address, state.tls_port)
    )


def _login(access: Access, management: str) -> tuple[str, str]:
    """Who asks the management API: the user that its URL names, else the broker's own, whose password is known."""
    broker = urlsplit(access.each_url[0])
    known = os.environ.get("FEDBUS_MANAGEMENT_PASSWORD")
    try:
        named = urlsplit(management).username
    except ValueError:  # said where the URL is used
        named = None
    user = unquote(named or broker.username or "guest")
    if known is None and user == user_of(access.each_url[0]):
        known = unquote(broker.password or "")
    return user, known or ""


class _Looker:
    """Looks again and again, over one connection as long as it lasts."""

    def __init__(self, access: Access, source: _Figures | str) -> None:
        self._access = access
        self._source = source
        self._figures: BrokerFigures | None = None
        self._unknown = source if isinstance(source, str) else ""
        self._figures_due_at = 0.0
        self._bus: Bus | None = None
        self._alarm = ""

    async def once(self) -> Glance:
        """One look, of which failures are raised."""
        async with await self._connect() as bus:
            return await self._look(bus)

    async def again(self) -> Glance:
        """One look; a broker that is away shows as trouble."""
        try:
            if self._bus is None:
                self._bus = await self._connect()
            return await self._look(self._bus)
        except (BrokerError, DecodeError) as exc:
            await self.close()
            return Glance(broker=str(self._access), trouble=one_line(str(exc)))

    async def _connect(self) -> Bus:
        bus = await connect(self._access, name="fedbus status")
        self._alarm = ""
        bus.on_blocked = self._note_alarm
        return bus

    def _note_alarm(self, reason: str | None) -> None:
        self._alarm = "" if reason is None else one_line(reason, 200)

    async def close(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            with contextlib.suppress(BrokerError):
                await bus.close()

    async def _look(self, bus: Bus) -> Glance:
        figures = asyncio.ensure_future(self._ask_broker())
        try:
            server, queues = await ask_server(bus), await ask_queues(bus)
            await figures
        finally:
            figures.cancel()
        return Glance(
            broker=str(self._access),
            server=server,
            queues=queues,
            figures=self._figures,
            unknown=self._unknown,
            alarm=self._alarm,
        )

    async def _ask_broker(self) -> None:
        if isinstance(self._source, str) or time.monotonic() < self._figures_due_at:
            return
        try:
            self._figures, self._unknown = await asyncio.to_thread(self._source), ""
        except BrokerError as exc:
            self._figures, self._unknown = None, one_line(str(exc))
        self._figures_due_at = time.monotonic() + _BROKER_EVERY_S


async def _watch(looker: _Looker, seconds: float, *, as_json: bool) -> None:
    stopped = asyncio.Event()
    console = console_for_tables()
    with on_signals(lambda _: stopped.set()), _screen(console, as_json=as_json) as show:
        while not stopped.is_set():
            show(await looker.again())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await stopped.wait()
    await looker.close()


@contextlib.contextmanager
def _screen(console: Console, *, as_json: bool) -> Iterator[Callable[[Glance], None]]:
    if as_json:
        yield lambda glance: typer.echo(glance.to_json())
    elif not console.is_terminal:
        yield lambda glance: console.print(render(glance, console.width), Text())
    else:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            yield lambda glance: live.update(
                render(glance, console.width, most_rows=max(3, console.height - 16)), refresh=True
            )


# ---- what it looks like ----------------------------------------------------------------------------------------------


def render(glance: Glance, width: int, *, most_rows: int | None = None) -> RenderableType:
    """A screenful: the run, the broker, the queues, the clients; of them `most_rows` at most."""
    queues: list[RenderableType] = [Text(), _queue_table(glance.queues)] if any(glance.queues.values()) else []
    return Group(
        *_run_lines(glance),
        *_broker_lines(glance),
        *queues,
        *([] if glance.server is None else [Text(), *_member_table(glance.server, width, most_rows)]),
    )


def _line(label: str, *words: str, style: str = "") -> Text:
    return Text.assemble((f"{label:<8}", "bold"), (", ".join(filter(None, words)), style))


def _run_lines(glance: Glance) -> Iterator[Text]:
    if glance.trouble:
        yield _line("broker", glance.trouble, style="bold red")
        return
    found = glance.server
    if found is None and glance.alarm:
        yield _line("server", f"cannot be asked, the broker lets nobody publish: {glance.alarm}", style="bold red")
        return
    if found is None:
        yield _line(
            "server",
            "none answers (or this user is not its own: of a provisioned federation give --bundle server.json)",
            style="bold red",
        )
        return
    yield _line(
        "run",
        f"{found['run_id']} ({found['regime']})",
        f"{found['rounds_committed']} of {found['num_rounds']} rounds",
        f"model {found['version']}",
        f"epoch {found['epoch']}" if found["epoch"] > 1 else "",
    )
    yield _line("round", *_round_words(found))
    yield _line("clients", *_client_words(found))
    host, uploads = found["server"], found["uploads"]
    large = (
        f"uploads: {uploads['granted']} going on, {uploads['waiting']} waiting, {size(uploads['staged_bytes'])} staged"
    )
    yield _line(
        "server",
        f"{host['host']} (pid {host['pid']}, fedbus {host['fedbus']})",
        f"up {hours(host['uptime_s'])}",
        f"memory {size(host['resident_bytes'])}",
        large if any(uploads.values()) else "",
    )


def _round_words(found: dict[str, Any]) -> list[str]:
    round_ = found["round"]
    if round_["open"] is None:
        missing = found["clients_missing"]
        return [f"waiting for {missing} more client{'s' * (missing != 1)}" if missing else found["phase"]]
    return [
        f"{round_['open']} is {found['phase']} for {_span(round_['open_s'])}",
        f"{round_['folded']} of {round_['needed']} updates",
        f"closes in {_span(round_['closes_in_s'])} at the latest",
    ]


def _client_words(found: dict[str, Any]) -> list[str]:
    states = [member["state"] for member in found["members"]]
    counts = [f"{states.count(state)} {state}" for state in ("training", "late", "overdue", "idle")]
    absent = f"{found['num_absent']} gone" if found["num_absent"] else ""
    return [f"{found['num_members']} in", *(words for words in counts if not words.startswith("0 ")), absent]


def _broker_lines(glance: Glance) -> Iterator[Text]:
    if glance.trouble:
        return
    figures = glance.figures
    if figures is None:
        yield _line("broker", glance.broker, f"memory, disk and connections unknown: {glance.unknown}")
        return
    connections = "" if figures.connections is None else f"{figures.connections} connections"
    yield _line("broker", glance.broker, f"RabbitMQ {figures.version}", connections)
    for node in figures.nodes:
        yield _node_line(node)


def _node_line(node: NodeFigures) -> Text:
    if not node.running:
        return _line("", f"{node.name} does not run", style="bold red")
    words = [
        node.name,
        f"memory {size(node.memory_bytes)} of {size(node.memory_limit_bytes)}",
        f"disk {size(node.disk_free_bytes)} free",
        f"files {node.open_files} of {node.open_files_limit}" if node.open_files is not None else "",
    ]
    if node.alarms:
        return _line("", *words, f"ALARM: {', '.join(node.alarms)}: nobody can publish", style="bold red")
    return _line("", *words, "no alarm")


def _queue_table(queues: Mapping[str, QueueState | None]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("queue", no_wrap=True)
    table.add_column("messages", justify="right")
    table.add_column("consumers", justify="right")
    for name, state in queues.items():
        if state is not None:
            table.add_row(name, str(state.messages), str(state.consumers))
    return table


_COLUMNS: Final = ("version", "lag", "heard", "asked", "folded", "late", "failed", "refused", "stopped", "lost")
_NARROW: Final = ("version", "lag", "heard", "folded", "late", "failed", "lost")


def _member_table(found: dict[str, Any], width: int, most_rows: int | None) -> Iterator[RenderableType]:
    columns = _COLUMNS if width >= 110 else _NARROW
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("client", no_wrap=True, max_width=40)
    table.add_column("state", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    members = found["members"]
    for member in members[:most_rows]:
        row = {**member, "heard": _span(member["silent_s"])}
        table.add_row(
            Text(one_line(member["client_id"], 64)),  # not markup
            Text(_state(member), style=_STYLES.get(member["state"], "")),
            *("" if row[name] is None else str(row[name]) for name in columns),
        )
    yield table
    hidden = found["num_members"] - len(members[:most_rows])
    if hidden:
        yield Text(f"and {hidden} more", style="dim")
    if found["absent"]:
        names = ", ".join(one_line(name, 64) for name in found["absent"][:8])
        more = found["num_absent"] - len(found["absent"][:8])
        yield Text(f"gone: {names}" + (f" and {more} more" if more > 0 else ""), style="red")


def _state(member: dict[str, Any]) -> str:
    state, working_s = str(member["state"]), member["working_s"]
    return state if state == "idle" or working_s is None else f"{state} {_span(working_s)}"


def _span(seconds: float | None) -> str:
    if seconds is None:
        return "ever"
    return f"{seconds:.1f} s" if seconds < 100 else hours(seconds)


def size(nbytes: int | None) -> str:
    """Bytes for people."""
    if nbytes is None:
        return "?"
    power = min(4, max(0, nbytes.bit_length() - 1) // 10)
    amount, unit = nbytes / 1024**power, ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{amount:.0f} {unit}" if amount >= 100 or not power else f"{amount:.1f} {unit}"

"""One measurement: a federation of real processes, then the floor, on the same broker."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fedbus.bench import loop, noop
from fedbus.bench.floor import Job
from fedbus.bus.node import PrivateNode
from fedbus.errors import ConfigError, RunFailed, one_line
from fedbus.simulation.processes import ClientProcesses, client_names, client_processes

_APP: Final = "fedbus.bench.noop:app"
_POLL_S: Final = 0.05
_PATIENCE_S: Final = 10.0
_MIB: Final = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and 95th percentile, in seconds."""

    p50: float
    p95: float


def spread(seconds: Sequence[float]) -> Spread:
    """Percentiles of `seconds`, linearly interpolated between the two nearest values."""
    p50, p95 = np.percentile(seconds, [50, 95])
    return Spread(p50=round(float(p50), 6), p95=round(float(p95), 6))


@dataclass(frozen=True, kw_only=True)
class RoundBench:
    """What `fedbus bench round` tells. Memory is the peak resident set of a process, in MiB; None where unknown.

    `round_s`: from the opening of a round to that of the next, without the first round. `client_rss_mib`: of the
    largest client. Egress and ingress: octets on the server's two connections, as the broker counts them, per round.
    `ratio`: the federation's median round over the floor's; `tight_ratio`: over the tight floor's (see `floor`).
    `turnaround_s`: from the last part of the update that closes a round to the broker's word that it has the first part
    of the next version.
    """

    clients: int
    model_mib: float
    rounds: int
    loop: str
    round_s: Spread
    turnaround_s: Spread
    floor_s: float
    floor_round_s: Spread
    ratio: float
    tight_floor_s: float
    tight_ratio: float
    server_rss_mib: float | None
    client_rss_mib: float | None
    broker_rss_mib: float | None
    server_egress_mib_per_round: float | None
    server_ingress_mib_per_round: float | None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


async def bench_round(
    *, clients: int, model_mib: float, rounds: int, broker: str | None, run_dir: Path | None
) -> RoundBench:
    """Measure. Without `broker` on a private node; without `run_dir` in a folder that is deleted at the end.

    Raises:
        BrokerError: when there is no broker, or it goes away.
        RunFailed: when a process of the measurement fails.
    """
    if not (np.isfinite(model_mib) and model_mib > 0):
        raise ConfigError(f"--model-mib must be more than 0, not {model_mib}")
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(run_folder(run_dir))
        node = None if broker is not None else await stack.enter_async_context(PrivateNode())
        url = broker or (node.url if node else "")
        federation = _Federation(clients, model_mib, rounds, url, folder, node)
        await federation.run()
        round_s, turnaround_s = spread(federation.seconds()), spread(federation.turnarounds())
        plain_s, tight_s = [
            spread((await _floor(clients, model_mib, rounds, url, is_tight=is_tight))[1:]) for is_tight in (False, True)
        ]
    return RoundBench(
        clients=clients,
        model_mib=model_mib,
        rounds=rounds,
        loop=loop.KIND,
        round_s=round_s,
        turnaround_s=turnaround_s,
        floor_s=plain_s.p50,
        floor_round_s=plain_s,
        ratio=round(round_s.p50 / plain_s.p50, 3),
        tight_floor_s=tight_s.p50,
        tight_ratio=round(round_s.p50 / tight_s.p50, 3),
        server_rss_mib=federation.server_rss_mib,
        client_rss_mib=federation.client_rss_mib,
        broker_rss_mib=federation.broker_rss_mib,
        server_egress_mib_per_round=federation.egress_mib,
        server_ingress_mib_per_round=federation.ingress_mib,
    )


@contextmanager
def run_folder(run_dir: Path | None) -> Iterator[Path]:
    """`run_dir`, new or empty and kept; or a folder in the current one that is deleted at the end."""
    try:
        if run_dir is None:
            folder = Path(tempfile.mkdtemp(prefix="fedbus-bench-", dir=".")).resolve()
        else:
            folder = run_dir.resolve()
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(f"{run_dir} is not empty: give another --run-dir, or none")
    except OSError as exc:
        raise ConfigError(f"the folder of the measurement cannot be made: {exc.strerror or exc}") from exc
    try:
        yield folder
    finally:
        if run_dir is None:
            shutil.rmtree(folder, ignore_errors=True)


class _Federation:
    """A no-op federation of one round more than is measured.

    Its clients stop at a gate in the first round and in the last, when their server has nothing to do: there octets
    are read, so that their difference is what `rounds` whole rounds took, and peaks of memory, which include them.
    """

    def __init__(
        self, clients: int, model_mib: float, rounds: int, url: str, folder: Path, node: PrivateNode | None
    ) -> None:
        self._clients = clients
        self._rounds = rounds
        self._url = url
        self._folder = folder
        self._gates = folder / "gates"
        self._node = node
        self._env = {
            noop.MODEL_MIB: repr(model_mib),
            noop.CLIENTS: str(clients),
            noop.ROUNDS: str(rounds + 1),
            noop.GATES: os.fspath(self._gates),
        }
        self.server_rss_mib: float | None = None
        self.client_rss_mib: float | None = None
        self.broker_rss_mib: float | None = None
        self.egress_mib: float | None = None
        self.ingress_mib: float | None = None

    async def run(self) -> None:
        """From the start of the processes to their end."""
        self._gates.mkdir()
        with environment(self._env):
            async with client_processes(_APP, log_dir=self._folder / "logs") as clients, self._server() as server:
                await clients.load()
                for number, name in enumerate(client_names(self._clients)):
                    await clients.spawn(name, broker=self._url, partition=number, num_partitions=self._clients)
                await self._at_gate(1, clients, server)
                before = await self._octets()
                noop.gate(self._gates, 1).touch()
                await self._at_gate(self._rounds + 1, clients, server)
                after = await self._octets()
                self._look_at_memory(server.pid)
                noop.gate(self._gates, self._rounds + 1).touch()
                if await server.wait() != 0:
                    raise self._server_failed()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PATIENCE_S):
                        await clients.all_exited()
        if before is not None and after is not None:
            self.ingress_mib, self.egress_mib = (
                round((now - then) / self._rounds / _MIB, 6) for then, now in zip(before, after, strict=True)
            )

    def seconds(self) -> list[float]:
        """How long each round took, but for the first, from its opening to the opening of the next."""
        history = json.loads((self._folder / "history.json").read_text())
        opened_s = [record["opened_s"] for record in history["rounds"]]
        return [later - earlier for earlier, later in itertools.pairwise(opened_s)]

    def turnarounds(self) -> list[float]:
        """How long the server took from the last update of each round, but for the first, to the next version."""
        lines = (self._folder / "server.out").read_text().splitlines()
        events = [json.loads(line) for line in lines if line.startswith("{")]
        return [event["turnaround_s"] for event in events if event.get("event") == "round_closed"][1:]

    @asynccontextmanager
    async def _server(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """The server, in a process of its own: its memory is only its own there."""
        with (self._folder / "server.out").open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "fedbus.cli.main", "server", _APP, "--broker", self._url),
                *("--run-dir", os.fspath(self._folder), "--json", "--log-json"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            await _end(process)

    async def _at_gate(self, round: int, clients: ClientProcesses, server: asyncio.subprocess.Process) -> None:
        """Wait until all clients stand at the gate of `round`."""
        deserted = asyncio.ensure_future(clients.any_exited())
        try:
            while len(noop.arrivals(self._gates, round)) < self._clients:
                if server.returncode is not None:
                    raise self._server_failed()
                if deserted.done():
                    words = last_words(self._folder / "logs")
                    raise RunFailed(f"a client ended in the middle of the measurement: {words}")
                await asyncio.sleep(_POLL_S)
        finally:
            deserted.cancel()

    def _server_failed(self) -> RunFailed:
        return RunFailed(f"the server of the measurement failed: {_last_line(self._folder / 'server.out')}")

    def _look_at_memory(self, server_pid: int) -> None:
        pids = [int(path.read_text()) for path in noop.arrivals(self._gates, self._rounds + 1)]
        peaks = [peak for peak in map(peak_rss_mib, pids) if peak is not None]
        self.server_rss_mib = peak_rss_mib(server_pid)
        self.client_rss_mib = max(peaks, default=None)
        self.broker_rss_mib = None if self._node is None else peak_rss_mib(self._node.pid)

    async def _octets(self) -> tuple[int, int] | None:
        """Octets to the server and from it, on all of its connections; only a node of our own tells."""
        if self._node is None:
            return None
        columns = ("client_properties", "send_oct", "recv_oct")
        listing = await asyncio.to_thread(self._node.rabbitmqctl, "list_connections", *columns, "--formatter", "json")
        rows = [row for row in json.loads(listing) if _connection_name(row).startswith("fedbus server ")]
        return sum(row["send_oct"] for row in rows), sum(row["recv_oct"] for row in rows)


def _connection_name(row: dict[str, list[list[str]]]) -> str:
    """Out of [[name, type, value], ...]."""
    return next((value for name, _, value in row["client_properties"] if name == "connection_name"), "")


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set `variables` for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


async def _floor(clients: int, model_mib: float, rounds: int, url: str, *, is_tight: bool) -> list[float]:
    """The seconds of each round of the floor."""
    model_bytes = 4 * max(1, round(model_mib * (1 << 18)))
    job = Job(url=url, clients=clients, model_bytes=model_bytes, rounds=rounds, is_tight=is_tight)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fedbus.bench.floor", *job.arguments()),
        env=job.environment(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us: it ends, queues and all, when its stdin does
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        out, err = await asyncio.gather(process.stdout.read(), process.stderr.read())
        code = await process.wait()
    finally:
        process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                await process.wait()
        await _end(process)
    if code != 0:
        raise RunFailed(f"the floor of the measurement failed: {one_line(err.decode().strip()[-300:])}")
    return [float(value) for value in json.loads(out)]


def last_words(logs: Path) -> str:
    """The last line of a client that printed something, out of its log."""
    words = (_last_line(path) for path in sorted(logs.glob("*.log")))
    return next(filter(None, words), "it said nothing")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    return one_line(next((line for line in reversed(lines) if line.strip()), ""))


def peak_rss_mib(pid: int) -> float | None:
    """The largest resident set that process `pid` ever had; None where the system has no /proc, or no such process."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kib = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if kib is None else round(int(kib) / 1024, 1)

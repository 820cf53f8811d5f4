"""`fedbus simulate`: a federation in virtual time, in this process and without a broker."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from fedbus.app import load_app
from fedbus.cli.options import AppReference, Debug, Json, LogJson, RunDir
from fedbus.cli.screen import draw_curves, report, screen
from fedbus.clock import now
from fedbus.errors import UsageError
from fedbus.observe.logs import hours
from fedbus.simulation.processes import new_run_dir
from fedbus.simulation.virtual import simulate as run_simulation
from fedbus.simulation.virtual_time import VirtualTime

_Fit = Annotated[float, typer.Option("--fit-seconds", metavar="S", help="Seconds of a fit: the clients' median.")]
_Evaluate = Annotated[float, typer.Option("--evaluate-seconds", metavar="S", help="Seconds of an evaluation.")]
_Speeds = Annotated[
    str,
    typer.Option("--speeds", metavar="SPEC", help="constant, lognormal:SIGMA, lognormal:SIGMA:JITTER or trace:FILE."),
]
_Dropout = Annotated[float, typer.Option("--dropout", metavar="P", help="Chance that a client vanishes during a fit.")]
_Downtime = Annotated[float, typer.Option("--downtime", metavar="S", help="Mean seconds until it is back.")]
_Availability = Annotated[
    str, typer.Option("--availability", metavar="SPEC", help="always, ON:OFF in mean seconds, or trace:FILE.")
]
_Bandwidth = Annotated[
    str | None, typer.Option("--bandwidth", metavar="RATE", help="Bytes per second of each client, or DOWN:UP.")
]
_Spread = Annotated[
    float, typer.Option("--bandwidth-spread", metavar="SIGMA", help="Of each client's lognormal factor on it.")
]


def simulate(
    reference: AppReference,
    virtual: Annotated[bool, typer.Option("--virtual", help="In virtual time: nothing is waited for.")] = False,
    clients: Annotated[int, typer.Option("--clients", min=1, help="How many clients to simulate.")] = 10,
    fit_seconds: _Fit = VirtualTime.fit_s,
    evaluate_seconds: _Evaluate = VirtualTime.evaluate_s,
    speeds: _Speeds = VirtualTime.speeds,
    dropout: _Dropout = VirtualTime.dropout,
    downtime: _Downtime = VirtualTime.downtime_s,
    availability: _Availability = VirtualTime.availability,
    bandwidth: _Bandwidth = None,
    bandwidth_spread: _Spread = VirtualTime.bandwidth_spread,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn; the app's own draws the cohorts.")] = 0,
    run_dir: RunDir = None,
    as_json: Json = False,
    log_json: LogJson = False,
    debug: Debug = False,
) -> None:
    """Run a federation of APP in virtual time: real training, but its seconds pass at once.

    Server and clients are the real ones; how long clients take and when they are there is drawn from the seed or read
    from traces. The same command gives the same history again.
    """
    if not virtual:
        raise UsageError("simulate needs --virtual (virtual time, one process); for real processes use: fedbus run APP")
    settings = VirtualTime(
        fit_s=fit_seconds,
        evaluate_s=evaluate_seconds,
        speeds=speeds,
        dropout=dropout,
        downtime_s=downtime,
        availability=availability,
        bandwidth=bandwidth,
        bandwidth_spread=bandwidth_spread,
        seed=seed,
    )
    app = load_app(reference)
    folder = run_dir or new_run_dir()
    clock = _VirtualClock()
    began_at = time.monotonic()
    with screen(folder, as_json=as_json, log_json=log_json, clock=clock) as shown:
        shown.announce(f"simulating {clients} client{'s' * (clients != 1)} in virtual time")
        observers = [clock.observe, *shown.observers]
        history = run_simulation(app, num_clients=clients, virtual=settings, run_dir=folder, observers=observers)
        draw_curves(history, folder)
    wall_s = time.monotonic() - began_at
    more = {"simulated_s": history.seconds, "wall_s": round(wall_s, 3)}
    took = f"{hours(history.seconds)} of virtual time ({wall_s:.1f} s)"
    report(history, folder, as_json=as_json, took=took, more=more)


class _VirtualClock:
    """The virtual time of the last event, for those who show it: they run outside of the simulation's loop."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def observe(self, event: object) -> None:
        """Look at the loop's clock: an `Observe` function."""
        self._seconds = now()

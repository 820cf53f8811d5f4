"""The console script: Ctrl-C while the rest is still being imported ends in one line, too."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Import the command line and run it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    from fedbus.cli.main import main as run

    run()


def _interrupted(*_: object) -> None:
    # No exception: numpy's import turns one into an ImportError and pages of advice.
    os.write(2, b"fedbus: interrupted\n")
    os._exit(1)

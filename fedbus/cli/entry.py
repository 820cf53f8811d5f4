"""The console script: Ctrl-C while the rest is still being imported ends in one line, too."""

from __future__ import annotations

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from fedbus.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("fedbus: interrupted\n")
        sys.exit(1)
    run()

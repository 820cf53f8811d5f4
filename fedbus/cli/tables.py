"""Tables on a screen or in a file."""

from __future__ import annotations

from typing import Final

from rich.console import Console

_PLAIN_COLUMNS: Final = 200


def console_for_tables() -> Console:
    """On a terminal as wide as that is; else, in a file or a pipe, as wide as the lines are."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_COLUMNS)

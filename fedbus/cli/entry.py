"""The console script: Ctrl-C while the rest is still being imported ends in one line, too."""

from __future__ import annotations

import os
import signal
import sys

_BROKER = "--broker"


def main() -> None:
    """Import the command line and run it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupted)
    _hide_password()
    from fedbus.cli.main import main as run

    run()


def _hide_password() -> None:
    """Begin anew, in this process, with the broker's URL in the environment: everybody may list command lines."""
    command, url = without_password(sys.orig_argv)
    if url is not None:
        os.environ["FEDBUS_BROKER"] = url
        os.execv(sys.executable, [sys.executable, *command[1:]])


def without_password(command: list[str]) -> tuple[list[str], str | None]:
    """`command` without a broker's URL (or several) that holds a password, and that URL."""
    for index, word in enumerate(command):
        option, equals, url = word.partition("=")
        if option != _BROKER:
            continue
        after = index + 1
        if not equals:
            url, after = (command[after] if after < len(command) else ""), after + 1
        logins = (each.partition("/")[0].rpartition("@")[0] for each in url.split("://")[1:])
        if any(":" in login for login in logins):
            return [*command[:index], *command[after:]], url
    return command, None


def _interrupted(*_: object) -> None:
    # No exception: numpy's import turns one into an ImportError and pages of advice.
    os.write(2, b"fedbus: interrupted\n")
    os._exit(1)

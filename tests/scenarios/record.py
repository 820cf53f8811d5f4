"""Writes the answers into the scenario files anew, after a change of the engine that was meant."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.scenarios.player import play
from tests.scenarios.script import FOLDER, BadScenario, read


def main(names: list[str]) -> None:
    """The scenarios of these names, or all."""
    paths = [FOLDER / f"{Path(name).stem}.txt" for name in names] or sorted(FOLDER.glob("*.txt"))
    for path in paths:
        try:
            text = play(read(path))
        except BadScenario as exc:
            raise SystemExit(str(exc)) from None
        if text != path.read_text():
            path.write_text(text)
            sys.stdout.write(f"{path.name} is written anew: read the difference before you commit it\n")


if __name__ == "__main__":
    main(sys.argv[1:])

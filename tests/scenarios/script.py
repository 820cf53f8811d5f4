"""A scenario file, read: its settings, and what happens when."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import fedbus.config

FOLDER = Path(__file__).parent

_STEP = re.compile(r" {0,6}(\d+(?:\.\d+)?)  (\S.*)")
_SETTING = re.compile(r"(settings|seed|commits take|initial model): (.*)")
_BY_ITSELF = re.compile(r"time is up|round \d+ is committed: .*|[\w.-]+ beats")


class BadScenario(ValueError):
    """A line that cannot be read, or cannot be played."""


@dataclass(frozen=True)
class Step:
    line: int
    time: float
    text: str


@dataclass(frozen=True)
class Scenario:
    """`head` is the file up to its first step, as it stands."""

    name: str
    head: str
    config: fedbus.config.RoundConfig
    seed: int
    commit_s: float
    has_model: bool
    steps: tuple[Step, ...]


def read(path: Path) -> Scenario:
    """Take what people wrote; the answers and what happens by itself are left out."""
    return parse(path.stem, path.read_text())


def parse(name: str, text: str) -> Scenario:
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if _STEP.fullmatch(line)), len(lines))
    head = "\n".join(lines[:first]).rstrip()
    settings = dict(_SETTING.findall("\n".join(lines[:first])))
    if "settings" not in settings:
        raise BadScenario(f"{name}: there is no line 'settings: RoundConfig(...)' before the first step")
    return Scenario(
        name=name,
        head=head,
        config=_config(name, settings["settings"]),
        seed=int(settings.get("seed", 0)),
        commit_s=float(settings.get("commits take", "0.5 s").removesuffix(" s")),
        has_model=settings.get("initial model") != "from a client",
        steps=tuple(_steps(name, lines, first)),
    )


def _steps(name: str, lines: list[str], first: int) -> list[Step]:
    steps: list[Step] = []
    for number, line in enumerate(lines[first:], first + 1):
        match = _STEP.fullmatch(line)
        if match is None:
            if line and not line.startswith(" " * 9):
                raise BadScenario(f"{name}, line {number}: neither a time and an event nor an answer: {line!r}")
            continue
        time, text = float(match[1]), match[2]
        if _BY_ITSELF.fullmatch(text):
            continue
        if steps and time < steps[-1].time:
            raise BadScenario(f"{name}, line {number}: {time:g} comes after {steps[-1].time:g}")
        steps.append(Step(number, time, text))
    return steps


def _config(name: str, text: str) -> fedbus.config.RoundConfig:
    try:
        config = eval(text, {"__builtins__": {}, "inf": math.inf, **vars(fedbus.config)})
    except Exception as exc:
        raise BadScenario(f"{name}: the settings cannot be read: {exc}") from exc
    if not isinstance(config, fedbus.config.RoundConfig):
        raise BadScenario(f"{name}: the settings are no RoundConfig")
    return config

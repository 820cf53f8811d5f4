"""`python -m tests.fuzz TARGET --seconds N [--corpus DIR]`: coverage-guided, by atheris (the extra `fuzz`).

What it finds is a mistake: the input is left in the corpus folder as crash-*, and `--replay FILE` runs it once more.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

_INSTRUMENTED = ["fedbus.wire", "fedbus.server", "fedbus.bus.bundle", "fedbus.bus.access", "fedbus.observe.glance"]


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="folder that keeps what reaches further")
    parser.add_argument("--replay", type=Path, help="run this input alone, without atheris")
    asked = parser.parse_args()
    if asked.replay is not None:
        _targets(asked.target, parser).one(asked.replay.read_bytes())
        return
    try:
        atheris = importlib.import_module("atheris")
    except ImportError:
        parser.error("atheris is missing: pip install 'fedbus[fuzz]' (Linux; the suite replays the seeds without it)")
    with atheris.instrument_imports(include=_INSTRUMENTED):
        target = _targets(asked.target, parser)
    folder = asked.corpus or Path(tempfile.mkdtemp(prefix=f"fedbus-fuzz-{asked.target}-"))
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (folder / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={asked.seconds}", "-max_len=65536", "-rss_limit_mb=1024", "-timeout=20"]
    atheris.Setup(
        [sys.argv[0], str(folder), f"-artifact_prefix={folder}/", "-print_final_stats=1", *options], target.one
    )
    atheris.Fuzz()


def _targets(name: str, parser: argparse.ArgumentParser):  # type: ignore[no-untyped-def]
    from tests.fuzz.targets import TARGETS

    if name not in TARGETS:
        parser.error(f"no target is called {name!r}: {', '.join(TARGETS)}")
    return TARGETS[name]


if __name__ == "__main__":
    _main()

"""Forked commands are processes like others: what they are given, what they print, how they end."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests import forked


def start(folder: Path, *args: str, **env: str) -> forked.Process:
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        return forked.start(
            forked.FEDBUS, *args, cwd=folder, env={**os.environ, **env}, out=out.fileno(), err=err.fileno()
        )


def test_a_fork_has_its_own_arguments_folder_and_outputs_and_tells_its_exit_code(tmp_path: Path) -> None:
    assert start(tmp_path, "--version").wait() == 0
    assert (tmp_path / "out").read_text().startswith("fedbus ")
    (tmp_path / "app.py").write_text("1 / 0")
    assert start(tmp_path, "server", "app.py").wait() == 2
    assert "app.py cannot be imported: ZeroDivisionError" in (tmp_path / "err").read_text()


def test_a_fork_has_an_environment_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import os\nos._exit(int(os.environ['MINE']))")
    processes = [start(tmp_path, "server", "app.py", MINE=str(number)) for number in (3, 4)]
    assert [process.wait() for process in processes] == [3, 4]


def test_a_fork_can_be_waited_for_in_vain_and_killed(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("import time\ntime.sleep(60)")
    process = start(tmp_path, "server", "app.py")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.kill()  # it is gone: nothing happens

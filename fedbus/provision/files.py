"""Files that only their owner may read, written so that a reader sees all of one or nothing."""

from __future__ import annotations

import os
from pathlib import Path

from fedbus.errors import ConfigError


def private_folder(path: Path) -> Path:
    """Make the folder, mode 0700, where it is not there; raises `ConfigError` when it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as exc:
        raise ConfigError(f"the folder {path} cannot be used: {exc.strerror}") from exc
    return path


def write_private(path: Path, text: str) -> None:
    """Write `text`, mode 0600, and keep what was there before if that fails; raises `ConfigError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror}") from exc


def read_text(path: Path, what: str) -> str:
    """Return the text of `path`; raises `ConfigError`, which calls it `what`."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is no text"
        raise ConfigError(f"{what} {path} cannot be read: {reason}") from exc

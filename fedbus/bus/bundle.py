"""A bundle: one file with everything that one party needs to be let in by the broker."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from fedbus.bus.access import Access
from fedbus.config import check_client_id
from fedbus.errors import ConfigError

Role: TypeAlias = Literal["client", "server", "worker"]

_FORMAT: Final = 1
_ROLES: Final = ("client", "server", "worker")


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """What provisioning hands to one party.

    `user` is its account on the broker; `client_id` the client's stable name, None for a server or worker.
    """

    federation: str
    role: Role
    user: str
    client_id: str | None
    access: Access

    @classmethod
    def load(cls, path: Path | str) -> Bundle:
        """The bundle in the file at `path`.

        Raises `ConfigError` when it cannot be read, holds something else, or is open to everybody on the machine.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                content = json.load(file)
        except OSError as exc:
            raise ConfigError(f"the bundle {path} cannot be read: {exc.strerror}") from exc
        except (ValueError, RecursionError) as exc:
            raise ConfigError(f"{path} is no bundle: fedbus broker provision writes them") from exc
        if mode & stat.S_IROTH:
            raise ConfigError(f"everybody on this machine can read the bundle {path}: chmod 600 {path}")
        return cls._parse(path, content)

    @classmethod
    def _parse(cls, path: Path, content: Any) -> Bundle:
        if not isinstance(content, dict) or "fedbus_bundle" not in content:
            raise ConfigError(f"{path} is no bundle: fedbus broker provision writes them")
        if content["fedbus_bundle"] != _FORMAT:
            raise ConfigError(f"the bundle {path} has format {content['fedbus_bundle']!r}, {_FORMAT} is known: upgrade")
        texts = {name: content.get(name) for name in ("federation", "role", "user", "broker")}
        optional = {name: content.get(name) for name in ("client_id", "ca", "certificate", "key")}
        wrong = [name for name, value in texts.items() if not isinstance(value, str)]
        wrong += [name for name, value in optional.items() if not isinstance(value, str | None)]
        if texts["role"] not in _ROLES or (texts["role"] == "client") != (optional["client_id"] is not None):
            wrong.append("role")
        if wrong:
            raise ConfigError(f"the bundle {path} is damaged ({wrong[0]}): ask for a new one")
        if optional["client_id"] is not None:
            check_client_id(optional["client_id"])
        return cls(
            federation=content["federation"],
            role=content["role"],
            user=content["user"],
            client_id=optional["client_id"],
            access=Access(
                content["broker"], ca=optional["ca"], certificate=optional["certificate"], key=optional["key"]
            ),
        )

    def save(self, path: Path | str) -> None:
        """Write it, for its owner's eyes only (mode 0600): all of it or nothing."""
        path = Path(path)
        content = {
            "fedbus_bundle": _FORMAT,
            "federation": self.federation,
            "role": self.role,
            "user": self.user,
            "client_id": self.client_id,
            "broker": self.access.urls,
            "ca": self.access.ca,
            "certificate": self.access.certificate,
            "key": self.access.key,
        }
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file, indent=2)
                file.write("\n")
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

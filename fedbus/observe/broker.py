"""How a broker is: memory, disk, alarms, connections; told by its management API or by `rabbitmqctl`."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from fedbus.bus.access import is_loopback
from fedbus.errors import BrokerDenied, BrokerError, BrokerUnreachable, ConfigError, one_line

_TIMEOUT_S: Final = 5.0
_MOST_BYTES: Final = 8 << 20
_NODE_FIELDS: Final = (
    "name,running,mem_used,mem_limit,mem_alarm,disk_free,disk_free_limit,disk_free_alarm,fd_used,fd_total,uptime"
)
_EXAMPLE: Final = "https://USER@HOST:15671"


@dataclass(frozen=True, kw_only=True)
class NodeFigures:
    """One node of a broker; None stands for what it does not tell. It lets nobody publish while it has an alarm."""

    name: str
    running: bool
    memory_bytes: int | None
    memory_limit_bytes: int | None
    disk_free_bytes: int | None
    disk_limit_bytes: int | None
    open_files: int | None
    open_files_limit: int | None
    uptime_s: float | None
    alarms: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BrokerFigures:
    """A broker as of now; `connections` of all its vhosts."""

    version: str
    connections: int | None
    nodes: tuple[NodeFigures, ...]


# ---- by the management API -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MonitoringApi:
    """RabbitMQ's management API, to look at only.

    Args:
        url: https://HOST:15671, or http:// on this machine.
        user, password: of a user with the tag "monitoring".
        ca: PEM of authorities that may vouch for it, beside those that the system trusts.
        allow_plaintext: whether http:// may lead to another machine.

    Raises:
        ConfigError: for a URL that cannot be used.
    """

    url: str
    user: str
    password: str = field(repr=False)
    ca: str | None = field(default=None, repr=False)
    allow_plaintext: bool = False

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:
            is_usable = False
        if not is_usable:
            raise ConfigError(f"the URL of the management API must look like {_EXAMPLE}")
        if parts.password is not None:
            raise ConfigError(
                "a password in the management URL shows in process lists: put it into FEDBUS_MANAGEMENT_PASSWORD"
            )
        if parts.scheme == "http" and not (is_loopback(parts.hostname or "") or self.allow_plaintext):
            raise ConfigError(
                f"http:// to {parts.hostname} would show the password to the network: use https://, or say --plaintext "
                "where the network itself is safe"
            )

    @property
    def where(self) -> str:
        """The URL as it may be shown."""
        parts = urlsplit(self.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path.rstrip('/')}"

    def figures(self) -> BrokerFigures:
        """Ask. Blocks, for seconds where nobody answers. Raises `BrokerUnreachable`, `BrokerDenied`."""
        overview, nodes = self._get("overview"), self._get(f"nodes?columns={_NODE_FIELDS}")
        try:
            return BrokerFigures(
                version=one_line(str(overview["rabbitmq_version"]), 40),
                connections=_int(overview.get("object_totals", {}).get("connections")),
                nodes=tuple(_node_of_api(node) for node in nodes),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise BrokerUnreachable(f"what answers at {self.where} is no RabbitMQ management API") from exc

    def _get(self, path: str) -> Any:
        parts = urlsplit(self.url)
        connection = self._connection(parts)
        try:
            connection.request("GET", f"{parts.path.rstrip('/')}/api/{path}", headers=self._login())
            answer = connection.getresponse()
            body = answer.read(_MOST_BYTES)
        except (OSError, http.client.HTTPException) as exc:
            reason = getattr(exc, "strerror", None) or exc
            raise BrokerUnreachable(f"no management API answers at {self.where}: {reason}") from exc
        finally:
            connection.close()
        if answer.status in (401, 403):
            raise BrokerDenied(
                f"the management API at {self.where} refuses the user: it needs the right password and the tag "
                "'monitoring' (rabbitmqctl set_user_tags USER monitoring)"
            )
        try:
            if answer.status != 200:
                raise ValueError(f"HTTP {answer.status}")
            return json.loads(body)
        except ValueError as exc:
            raise BrokerUnreachable(f"what answers at {self.where} is no RabbitMQ management API ({exc})") from exc

    def _connection(self, parts: SplitResult) -> http.client.HTTPConnection:
        host = parts.hostname or ""
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, parts.port or 15672, timeout=_TIMEOUT_S)
        context = ssl.create_default_context()
        if self.ca is not None:
            context.load_verify_locations(cadata=self.ca)
        return http.client.HTTPSConnection(host, parts.port or 15671, timeout=_TIMEOUT_S, context=context)

    def _login(self) -> dict[str, str]:
        token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return {"Authorization": f"Basic {token}", "Accept": "application/json"}


def _node_of_api(node: dict[str, Any]) -> NodeFigures:
    alarms = [kind for kind, field in (("memory", "mem_alarm"), ("disk", "disk_free_alarm")) if node.get(field) is True]
    uptime_ms = _int(node.get("uptime"))
    return NodeFigures(
        name=one_line(str(node["name"]), 80),
        running=bool(node.get("running")),
        memory_bytes=_int(node.get("mem_used")),
        memory_limit_bytes=_int(node.get("mem_limit")),
        disk_free_bytes=_int(node.get("disk_free")),
        disk_limit_bytes=_int(node.get("disk_free_limit")),
        open_files=_int(node.get("fd_used")),
        open_files_limit=_int(node.get("fd_total")),
        uptime_s=None if uptime_ms is None else uptime_ms / 1000,
        alarms=tuple(alarms),
    )


# ---- by rabbitmqctl --------------------------------------------------------------------------------------------------


def parse_ctl_status(text: str, name: str) -> BrokerFigures:
    """What `rabbitmqctl status --formatter json` says of the node `name`. Raises `BrokerError`."""
    try:
        found = json.loads(text)
        files = found["file_descriptors"]
        node = NodeFigures(
            name=name,
            running=True,
            memory_bytes=_total(found["memory"]),
            memory_limit_bytes=_int(found["vm_memory_high_watermark_limit"]),
            disk_free_bytes=_int(found["disk_free"]),
            disk_limit_bytes=_int(found["disk_free_limit"]),
            open_files=_int(files.get("total_used")),
            open_files_limit=_int(files.get("total_limit")),
            uptime_s=_int(found["uptime"]),
            alarms=_ctl_alarms(found["alarms"]),
        )
        return BrokerFigures(
            version=str(found["rabbitmq_version"]), connections=_int(found["totals"]["connection_count"]), nodes=(node,)
        )
    except (KeyError, TypeError, AttributeError, ValueError) as exc:
        raise BrokerError("rabbitmqctl status says what cannot be read") from exc


def _total(memory: dict[str, Any]) -> int | None:
    """As the strategy that the node itself compares with its limit."""
    total = memory["total"]
    return _int(total.get(memory.get("strategy", "rss"), total.get("rss")) if isinstance(total, dict) else total)


def _ctl_alarms(alarms: Iterable[Any]) -> tuple[str, ...]:
    names = (
        str(alarm.get("resource", alarm.get("type", "?"))) if isinstance(alarm, dict) else str(alarm)
        for alarm in alarms
    )
    return tuple(sorted({one_line(name, 40) for name in names}))


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

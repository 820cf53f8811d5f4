"""`fedbus broker provision`, `revoke`, `rotate`, `list`, `certificate`: who is let in, and what for."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import getpass
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

import typer

from fedbus.bus.node import NodeState, TlsListener, detached_folder, detached_state
from fedbus.cli.options import set_json
from fedbus.errors import BrokerUnreachable, ConfigError, UsageError

if TYPE_CHECKING:
    from fedbus.provision.federation import Desk, Issue, Member
    from fedbus.provision.records import Office

_USER_DAYS = 365
_WILDCARDS = ("0.0.0.0", "::")

_Login: TypeAlias = Literal["certificate", "password"]
_Federation = Annotated[str, typer.Argument(metavar="FED", help="The federation's name: its vhost on the broker.")]
_Name = Annotated[str, typer.Option("--name", help="The private node, where there are several.")]
_Management = Annotated[
    str | None,
    typer.Option(
        "--management",
        envvar="FEDBUS_MANAGEMENT",
        metavar="URL",
        help="Any RabbitMQ: https://USER@HOST:15671, its management API; the password in FEDBUS_MANAGEMENT_PASSWORD.",
    ),
]
_System = Annotated[bool, typer.Option("--system", help="The RabbitMQ service of this machine, by its rabbitmqctl.")]
_Plaintext = Annotated[
    bool,
    typer.Option("--plaintext", envvar="FEDBUS_PLAINTEXT", help="Allow http:// to another machine: a safe network."),
]
_Authority = Annotated[
    Path | None,
    typer.Option("--authority", metavar="DIR", help="Folder of CA and records; default: one for each broker."),
]
_Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Folder for the bundles; default: FED-bundles.")
]
_Days = Annotated[int, typer.Option("--days", min=1, help="Until new certificates expire.")]
_Json = Annotated[bool, typer.Option("--json", callback=set_json, help="Print one JSON object.")]
Ca = Annotated[Path | None, typer.Option("--ca", metavar="FILE", help="CA that members know the broker by (PEM).")]
CaKey = Annotated[Path | None, typer.Option("--ca-key", metavar="FILE", help="Key of that CA, to sign with.")]


Listen = Annotated[
    str | None,
    typer.Option("--listen", metavar="ADDRESS", help="Let other machines in at this IP address, by TLS; or 0.0.0.0."),
]
TlsPort = Annotated[int, typer.Option("--tls-port", min=1, max=65535, help="With --listen: the port.")]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", metavar="HOST", help="With --listen: a name or address that others use; repeatable."),
]
DoorLogin = Annotated[
    _Login,
    typer.Option("--login", help="With --listen: 'certificate' turns away whoever has none; 'password' lets both in."),
]
Certificate = Annotated[
    Path | None, typer.Option("--certificate", metavar="FILE", help="The node's own certificate (PEM); with --key.")
]
Key = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Key of that certificate.")]


@dataclass(frozen=True, kw_only=True)
class Door:
    """What `fedbus broker start` was told about other machines."""

    listen: str | None
    tls_port: int
    hosts: Sequence[str]
    login: _Login
    ca: Path | None
    ca_key: Path | None
    certificate: Path | None
    key: Path | None


def listener_for(folder: Path, door: Door) -> TlsListener | None:
    """What the node in `folder` needs to let other machines in; None where it is not to."""
    brought = (door.ca, door.ca_key, door.certificate, door.key)
    if door.listen is None:
        if any(brought) or door.hosts:
            raise UsageError("certificates and --host are for a node that other machines reach: give --listen ADDRESS")
        return None
    if (door.certificate is None) != (door.key is None):
        raise UsageError("--certificate and --key go together")
    with _cryptography():
        from fedbus.provision import listener
    office = listener.node_office(folder)
    _adopt(office, door.ca, door.ca_key)
    if door.certificate is None or door.key is None:
        return listener.own_listener(
            office, door.listen, port=door.tls_port, hosts=door.hosts, login=door.login, now=_now()
        )
    if office.trusted() is None:
        raise UsageError("--certificate needs --ca: members must know who vouches for the node")
    listener.keep_certificate(office, door.certificate, door.key)
    return listener.listener_of(office, door.listen, port=door.tls_port, login=door.login)


def is_provisioned(folder: Path) -> bool:
    """Whether the node in `folder` has let other machines in before."""
    return (folder / "provision" / "ca.pem").exists()


def add_provisioning(app: typer.Typer) -> None:
    """Hang the commands under `fedbus broker`."""
    app.command()(provision)
    app.command()(revoke)
    app.command()(rotate)
    app.command("list")(list_members)
    app.command()(certificate)


def provision(
    federation: _Federation,
    clients: Annotated[
        str | None, typer.Option("--clients", metavar="A,B,C", help="Ids of clients; commas between.")
    ] = None,
    workers: Annotated[bool, typer.Option("--workers", help="A user for worker processes, too.")] = False,
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host", metavar="HOST[:PORT]", help="Where members reach the broker; repeat it for a cluster's nodes."
        ),
    ] = None,
    login: Annotated[
        _Login | None, typer.Option("--login", help="What members log in with; default: certificates, if we have a CA.")
    ] = None,
    out: _Out = None,
    days: _Days = _USER_DAYS,
    max_updates_bytes: Annotated[
        int | None,
        typer.Option("--max-updates-bytes", min=1 << 20, help="What the queue of updates may hold; default: 4 GiB."),
    ] = None,
    readmit: Annotated[bool, typer.Option("--readmit", help="Let those in again who were revoked.")] = False,
    ca: Ca = None,
    ca_key: CaKey = None,
    name: _Name = "default",
    management: _Management = None,
    system: _System = False,
    authority: _Authority = None,
    plaintext: _Plaintext = False,
    as_json: _Json = False,
) -> None:
    """Make a federation on a broker, or add members to it: a vhost, users with the least rights, a bundle for each.

    It may be run again at any time: who is there already keeps what it has.
    """
    desk, node = _desk(name, management, system, authority, plaintext)
    with _cryptography():
        from fedbus.provision import federation as work
        from fedbus.provision.rights import QueueBounds
    _adopt(desk.office, ca, ca_key)
    issue = work.provision(
        desk,
        federation,
        _client_ids(clients),
        workers=workers,
        hosts=hosts or _own_hosts(node),
        login=login,
        folder=out or Path(f"{federation}-bundles"),
        days=days,
        readmit=readmit,
        bounds=None if max_updates_bytes is None else QueueBounds(updates_bytes=max_updates_bytes),
    )
    _show_issue(issue, as_json)
    if not as_json and issue.bundles:
        _say_what_is_next(issue, desk.office, is_ours=node is not None)


def rotate(
    federation: _Federation,
    who: Annotated[list[str] | None, typer.Argument(metavar="[CLIENT]...", help="Default: everybody.")] = None,
    out: _Out = None,
    days: _Days = _USER_DAYS,
    name: _Name = "default",
    management: _Management = None,
    system: _System = False,
    authority: _Authority = None,
    plaintext: _Plaintext = False,
    as_json: _Json = False,
) -> None:
    """Give members new secrets; what they had opens nothing any more, and ends their connections at once."""
    desk, _ = _desk(name, management, system, authority, plaintext)
    with _cryptography():
        from fedbus.provision import federation as work
    issue = work.rotate(desk, federation, who or [], folder=out or Path(f"{federation}-bundles"), days=days)
    _show_issue(issue, as_json)


def revoke(
    federation: _Federation,
    who: Annotated[list[str], typer.Argument(metavar="CLIENT...", help="Client ids, or 'server', 'worker'.")],
    name: _Name = "default",
    management: _Management = None,
    system: _System = False,
    authority: _Authority = None,
    plaintext: _Plaintext = False,
    as_json: _Json = False,
) -> None:
    """Turn members out: their connections end at once, and nothing that they have lets them in again."""
    desk, _ = _desk(name, management, system, authority, plaintext)
    with _cryptography():
        from fedbus.provision import federation as work
    users = work.revoke(desk, federation, who)
    if as_json:
        typer.echo(json.dumps({"federation": federation, "revoked": users}))
    for user in () if as_json else users:
        typer.echo(f"{user} is out: its user is deleted, its connections are closed")


def list_members(
    federation: Annotated[str | None, typer.Argument(metavar="[FED]", help="Default: all of them.")] = None,
    name: _Name = "default",
    management: _Management = None,
    system: _System = False,
    authority: _Authority = None,
    plaintext: _Plaintext = False,
    as_json: _Json = False,
) -> None:
    """Show who is in a federation: connected or not, until when its certificate is good, or since when it is out."""
    desk, _ = _desk(name, management, system, authority, plaintext)
    with _cryptography():
        from fedbus.provision import federation as work
    found = work.members(desk, federation)
    ends = _ends(desk.office)
    if as_json:
        typer.echo(json.dumps({"members": [dataclasses.asdict(member) for member in found], "expiry": ends}))
        return
    for line in _table([("FEDERATION", "MEMBER", "CONNECTED", "UNTIL"), *map(_row, found)]):
        typer.echo(line)
    for what, end in ends.items():
        typer.echo(f"{what}: until {end[:10]}")


def certificate(
    hosts: Annotated[list[str], typer.Argument(metavar="HOST...", help="Names and addresses of the broker.")],
    authority: Annotated[
        Path, typer.Option("--authority", metavar="DIR", help="Folder of the CA; made where missing.")
    ],
    ca: Ca = None,
    ca_key: CaKey = None,
    as_json: _Json = False,
) -> None:
    """Make a certificate for a broker that somebody else starts, and the CA where there is none.

    DIR then holds ca.pem, broker.pem and broker.key for it; ca.key stays with the operator.
    """
    with _cryptography():
        from fedbus.provision import listener
        from fedbus.provision.records import Office
    office, now = Office(authority), _now()
    _adopt(office, ca, ca_key)
    until = listener.certify(office, office.found("fedbus CA", now), hosts, now=now)
    if as_json:
        typer.echo(json.dumps({"authority": os.fspath(authority), "hosts": hosts, "not_after": until.isoformat()}))
    else:
        typer.echo(f"a certificate for {', '.join(hosts)}, good until {until:%Y-%m-%d}, is in {authority}")


# ---- what the commands share ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cryptography() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as exc:
        if (exc.name or "").split(".")[0] != "cryptography":
            raise
        raise UsageError("certificates need the package cryptography: pip install 'fedbus[provision]'") from exc


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _desk(
    name: str, management: str | None, system: bool, authority: Path | None, plaintext: bool
) -> tuple[Desk, NodeState | None]:
    """The broker that is meant, the records that belong to it, and the private node where it is one."""
    with _cryptography():
        from fedbus.provision.admin import ManagementApi, Rabbitmqctl
        from fedbus.provision.federation import Desk
        from fedbus.provision.listener import node_office
        from fedbus.provision.records import Office
    if management is not None and system:
        raise UsageError("--management and --system are two ways to two brokers: give one of them")
    if management is not None:
        office = Office(authority or _folder_for(urlsplit(management).hostname or "broker"))
        api = ManagementApi(management, password=_password, allow_plaintext=plaintext, ca=office.trusted())
        return Desk(admin=api, office=office, now=_now()), None
    if system:
        admin = Rabbitmqctl.of_this_host()
        return Desk(admin=admin, office=Office(authority or _folder_for("localhost")), now=_now()), None
    state = detached_state(name)
    if state is None:
        raise BrokerUnreachable(
            f"no private node {name!r} runs here: start it with 'fedbus broker start', or say which broker is meant "
            "(--management URL, --system)"
        )
    office = node_office(detached_folder(name)) if authority is None else Office(authority)
    return Desk(admin=Rabbitmqctl.of_private_node(state), office=office, now=_now()), state


def _password() -> str:
    """The administrator's, from where `ps` does not show it."""
    from fedbus.provision.admin import PASSWORD_VARIABLE

    known = os.environ.get(PASSWORD_VARIABLE)
    if known is None and sys.stdin.isatty():
        return getpass.getpass("password of the management API: ")
    if known is None:
        raise ConfigError(f"the management API wants a password: put it into {PASSWORD_VARIABLE}")
    return known


def _folder_for(host: str) -> Path:
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "fedbus" / "provision" / host.replace(":", "_")


def _adopt(office: Office, ca: Path | None, ca_key: Path | None) -> None:
    if ca is None and ca_key is not None:
        raise UsageError("--ca-key needs --ca, the certificate that it belongs to")
    if ca is None:
        return
    from fedbus.provision.files import read_text

    office.adopt(read_text(ca, "the CA"), None if ca_key is None else read_text(ca_key, "the CA's key"))


def _own_hosts(node: NodeState | None) -> list[str]:
    """Where others reach a private node, unless it listens at every address: then only its operator knows."""
    if node is None or node.tls_address in (None, *_WILDCARDS):
        return []
    host = f"[{node.tls_address}]" if ":" in str(node.tls_address) else node.tls_address
    return [f"{host}:{node.tls_port}"]


def _client_ids(clients: str | None) -> list[str]:
    ids = [client.strip() for client in (clients or "").split(",") if client.strip()]
    if clients is not None and not ids:
        raise UsageError("--clients names nobody: --clients hospital-a,hospital-b")
    return ids


def _show_issue(issue: Issue, as_json: bool) -> None:
    if as_json:
        bundles = {user: os.fspath(path) for user, path in issue.bundles.items()}
        shown = {
            "federation": issue.federation,
            "login": issue.login,
            "bundles": bundles,
            "kept": list(issue.kept),
            "out": list(issue.out),
        }
        typer.echo(json.dumps(shown))
        return
    for user, path in issue.bundles.items():
        typer.echo(f"{user}: {path}")
    if issue.out:
        typer.echo(f"revoked, and left out: {', '.join(issue.out)} (--readmit lets them in again)")
    if issue.kept:
        typer.echo(f"there already, and as they were: {', '.join(issue.kept)} ('fedbus broker rotate' for new bundles)")


def _say_what_is_next(issue: Issue, office: Office, *, is_ours: bool) -> None:
    typer.echo(f"members log in by {issue.login}. Next:")
    typer.echo("  hand each bundle to its owner in confidence, and delete your copy: it is a key")
    typer.echo("  at the server:  fedbus server APP --bundle server.json")
    typer.echo("  at each client: fedbus client APP --bundle CLIENT.json")
    if any(path.name == "worker.json" for path in issue.bundles.values()):
        typer.echo("  at each worker: fedbus worker APP --bundle worker.json")
    if issue.login == "certificate" and not is_ours:
        typer.echo(f"  at the broker:  trust {office.folder / 'ca.pem'}, enable rabbitmq_auth_mechanism_ssl, and set")
        typer.echo("                  auth_mechanisms.1 = EXTERNAL and ssl_cert_login_from = common_name")
    if issue.has_guest:
        typer.echo("  at the broker:  delete the user 'guest', whose password everybody knows")


def _ends(office: Office) -> Mapping[str, str]:
    """Until when the broker's certificate and the CA are good."""
    from fedbus.provision.authority import parse_certificates
    from fedbus.provision.listener import broker_certificate
    from fedbus.provision.records import timestamp

    ends = {}
    shown, trusted = broker_certificate(office), office.trusted()
    if shown is not None:
        ends["broker's certificate"] = timestamp(shown.not_valid_after_utc)
    if trusted is not None:
        ends["CA"] = timestamp(min(each.not_valid_after_utc for each in parse_certificates(trusted)))
    return ends


def _row(member: Member) -> tuple[str, ...]:
    connected = "-" if member.connections is None else str(member.connections) if member.connections else "no"
    if member.revoked_at is not None:
        until = f"out since {member.revoked_at[:10]}"
    else:
        until = "-" if member.not_after is None else member.not_after[:10]
    return member.federation, member.who, connected, until


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()

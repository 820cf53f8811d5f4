"""Every `fedbus` command line in the deployment files, as the process that it would start."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.deploy.files import DEPLOY, compose, kubernetes, pods

ROLES = ("server", "worker", "client")


@dataclass(frozen=True)
class Command:
    """What stands in one file: where, and the arguments of `fedbus`, options as --name=value."""

    where: str
    args: tuple[str, ...]

    @property
    def role(self) -> str:
        return self.args[0]

    def here(self, **options: str) -> list[str]:
        """The same command line with other values for some of its options, all of which must stand in it."""
        given = {arg.partition("=")[0] for arg in self.args}
        missing = {f"--{name.replace('_', '-')}" for name in options} - given
        assert not missing, (self, missing)
        return [_with(arg, options) for arg in self.args]


def _with(arg: str, options: dict[str, str]) -> str:
    name, equals, _ = arg.partition("=")
    key = name.removeprefix("--").replace("-", "_")
    return f"{name}={options[key]}" if equals and key in options else arg


def _joined(args: list[str]) -> tuple[str, ...]:
    """`--name value` as `--name=value`."""
    joined: list[str] = []
    flags = ("--resume", "--log-json")
    for arg in args:
        before = joined[-1] if joined else ""
        if before.startswith("--") and "=" not in before and before not in flags and not arg.startswith("--"):
            joined[-1] = f"{before}={arg}"
        else:
            joined.append(arg)
    return tuple(joined)


def of_compose() -> Iterator[Command]:
    services = compose()["services"]
    for name, service in services.items():
        if service["image"] == "localhost/fedbus" and "entrypoint" not in service:
            yield Command(f"compose.yaml, {name}", _joined(service["command"]))


def of_kubernetes() -> Iterator[Command]:
    for name, pod in pods(kubernetes()):
        for container in pod["spec"]["containers"]:
            if container["image"] == "fedbus" and "command" not in container:
                yield Command(f"kubernetes, {name}", _joined(container["args"]))


def of_systemd() -> Iterator[Command]:
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        for line in unit.read_text().splitlines():
            if line.startswith("ExecStart="):
                program, *args = shlex.split(line.removeprefix("ExecStart="))
                assert program == "/opt/fedbus/bin/fedbus", unit
                yield Command(
                    f"systemd, {unit.name}", _joined(["app:app" if arg == "${FEDBUS_APP}" else arg for arg in args])
                )


def of_containerfile() -> tuple[list[str], list[str]]:
    """ENTRYPOINT with CMD, and the check of health."""
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", "")
    final = text.split("FROM ${BASE}\n")[1]
    found = {line.split()[0]: yaml.safe_load(line[line.index("[") :]) for line in final.splitlines() if "[" in line}
    return [*found["ENTRYPOINT"], *found["CMD"]], found["HEALTHCHECK"]


def scripts() -> list[Path]:
    """The shell scripts that have `fedbus` commands in them: they run as they are."""
    return [path for path in sorted(DEPLOY.rglob("*.sh")) if "\nfedbus " in path.read_text()]

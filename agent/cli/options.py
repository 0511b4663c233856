"""Options shared by many commands. They may come before or after the command's name; the last one counts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from agent.core.types import SECOND_NS

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_HOME = "/var/lib/hibernode"
_KEY = "agent.cli.options"


@dataclass(frozen=True, slots=True)
class CliOptions:
    """Values of the shared options. An empty address or path is read from `home`."""

    home: Path
    agent: str
    scheduler: str
    gateway: str
    token_file: str
    insecure: bool
    output: Literal["table", "json", "csv", "yaml"]

    @property
    def json(self) -> bool:
        """Whether to print JSON."""
        return self.output == "json"

    @property
    def csv(self) -> bool:
        """Whether to print CSV; few commands offer it."""
        return self.output == "csv"


def cli_options() -> CliOptions:
    """The shared options of the running command."""
    values = click.get_current_context().find_root().meta.get(_KEY, {})
    return CliOptions(
        home=Path(values.get("home") or os.environ.get("HIBERNODE_HOME") or DEFAULT_HOME),
        agent=values.get("agent", ""),
        scheduler=values.get("scheduler", ""),
        gateway=values.get("gateway", ""),
        token_file=values.get("token_file", ""),
        insecure=values.get("insecure", False),
        output=values.get("output", "table"),
    )


def _keep(context: click.Context, parameter: click.Parameter, value: object) -> None:
    if value not in (None, False):
        assert parameter.name is not None
        context.find_root().meta.setdefault(_KEY, {})[parameter.name] = value


def _shared(*names: str, **attributes: Any) -> Callable[[F], F]:
    return click.option(*names, expose_value=False, callback=_keep, **attributes)


home_option = _shared(
    "--home",
    metavar="DIR",
    help=f"Folder of the state directories agent/ and scheduler/ [HIBERNODE_HOME; {DEFAULT_HOME}].",
)
agent_option = _shared("--agent", metavar="ADDRESS", help="Agent, host:port or unix:/path; default: from --home.")
scheduler_option = _shared("--scheduler", metavar="ADDRESS", help="Scheduler, host:port; default: from --home.")
gateway_option = _shared("--gateway", metavar="ADDRESS", help="Gateway, host:port; default: from --home.")
token_option = _shared("--token-file", metavar="FILE", help="File with the daemon's token; default: from --home.")
insecure_option = _shared(
    "--insecure", is_flag=True, help="Send the token to another machine unencrypted (trusted networks only)."
)
output_option = _shared(
    "-o", "--output", type=click.Choice(["table", "json"]), help="table for people (default), json for programs."
)

output_or_csv_option = _shared(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "csv"]),
    help="table for people (default), json for programs, csv for spreadsheets.",
)

output_or_yaml_option = _shared(
    "-o",
    "--output",
    type=click.Choice(["table", "json", "yaml"]),
    help="table for people (default), json for programs, yaml as `s` prints it.",
)

json_option = _shared("--json", "output", flag_value="json", help="The same as --output json.")


def grouped(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """A decorator that adds all these options in their order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


locator_options = grouped(home_option, agent_option, scheduler_option, token_option)
"""Addresses and token of all daemons; for the group itself."""
agent_options = grouped(home_option, agent_option, token_option, insecure_option)
"""For a command that calls the agent of one node."""
scheduler_options = grouped(home_option, scheduler_option, token_option, insecure_option)
"""For a command that calls the scheduler."""
fleet_or_node_options = grouped(home_option, agent_option, scheduler_option, token_option, insecure_option)
"""For a command that can call the agent or the scheduler."""
s_options = grouped(
    _shared("-a", "--access", "s_access", metavar="NAME", hidden=True),
    _shared("--skip-push", "s_skip_push", metavar="BOOLEAN", hidden=True),
)
"""Hidden options of Serverless Devs' `s`, accepted and ignored."""


def seconds_of(value: str) -> float:
    """Parses `10s`, `2m`, `1h30m`, or a bare number of seconds."""
    from agent.config import parse_duration_ns  # imports msgspec and YAML, which --help does not need

    text = f"{value}s" if value.replace(".", "", 1).isdecimal() else value
    try:
        return parse_duration_ns(text) / SECOND_NS
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def bytes_of(value: str) -> int:
    """Parses `64KiB`, `1MiB`, or a bare number of bytes; at least one byte."""
    from agent.config import parse_size_bytes

    try:
        size = parse_size_bytes(f"{value}B" if value.isdecimal() else value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if not size:
        raise click.BadParameter("must be at least one byte")
    return size


def timeout_option(default: str) -> Callable[[F], F]:
    """The --timeout option: how long the command waits for the daemon's answer."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=seconds_of,
        default=default,
        show_default=True,
        metavar="DURATION",
        help="Longest wait.",
    )

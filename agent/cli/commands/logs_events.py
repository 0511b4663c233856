"""`hibernode logs|events`: an instance's output, and past events."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click

from agent.cli.console.log_text import stdout_writer
from agent.cli.console.output import show_json, show_table
from agent.cli.console.units import clock, wall_ns
from agent.cli.daemon_calls import pages, with_agent, with_scheduler
from agent.cli.options import agent_options, bytes_of, cli_options, fleet_or_node_options, output_option, seconds_of
from agent.core.types import SECOND_NS
from agent.v1 import instance_service_pb2 as pb
from agent.v1 import scheduler_service_pb2, types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.convert_time import time_to_proto
from agent.wire.json_view import short_name, to_json

MAX_LINES = 1_000_000_000
READ_S = 60.0
FOLLOW_S = 86_400.0
_COLUMNS = ("function", "node")


@dataclass(frozen=True, slots=True)
class Tail:
    """How much of a log to print: its last lines, or its last bytes; None and 0 mean all of it."""

    lines: int | None = None
    size_bytes: int = 0


def tail_of(value: str) -> Tail:
    """Parses a number of lines (`100`, `0`), a size (`64KiB`) or `all`."""
    if value == "all":
        return Tail()
    if value.isdecimal() and value.isascii():
        return Tail(lines=min(int(value), MAX_LINES) if len(value) < 20 else MAX_LINES)
    try:
        return Tail(size_bytes=bytes_of(value))
    except click.BadParameter as error:
        raise click.BadParameter(f"{value[:60]!r} is neither a number of lines nor a size such as 64KiB") from error


@click.command()
@click.argument("uid")
@click.option(
    "--tail", "-n", type=tail_of, metavar="LINES", help="Only the last LINES, or a size such as 64KiB; default: all."
)
@click.option("--follow", "-f", is_flag=True, help="Continue with new output until the instance ends or Ctrl-C.")
@click.option(
    "--timeout",
    "timeout_s",
    type=seconds_of,
    metavar="DURATION",
    help="Longest wait; default: 1m, with --follow a day.",
)
@agent_options
def logs(uid: str, tail: Tail | None, follow: bool, timeout_s: float | None) -> None:
    """Print what an instance wrote to stdout and stderr, oldest first.

    Pipes get every byte; on a terminal, control characters other than colours are shown as `?`. At most the last 8 MiB
    are printed, or less if the node's runtime.log_limit is smaller. Output of recently ended instances is available
    unless another program removed the container.

    \b
    Examples:
      hibernode logs i-3f9a
      hibernode logs i-3f9a --tail 100
      hibernode logs -f i-3f9a | grep --line-buffered ERROR
    """
    limit_s = timeout_s if timeout_s is not None else FOLLOW_S if follow else READ_S

    async def copy_output(channel: DaemonChannel) -> None:
        wanted = tail or Tail()
        request = pb.GetInstanceLogsRequest(
            uid=uid, tail_bytes=wanted.size_bytes, tail_lines=wanted.lines, follow=follow
        )
        writer = stdout_writer()
        async for chunk in channel.stream(channel.instances.GetInstanceLogs, request, limit_s):
            writer.write(chunk.data)
        writer.end()

    # A spinner would mix with the instance's lines.
    with_agent(copy_output, "" if follow or sys.stdout.isatty() else f"reading the output of {uid}")


@click.command()
@click.argument("uid", default="")
@click.option("--fleet", is_flag=True, help="Events of the scheduler: of functions, provisioning and nodes.")
@click.option("--function", default="", metavar="NAME", help="With --fleet: only events of this function.")
@click.option("--node", default="", metavar="NAME", help="With --fleet: only events of this node.")
@click.option("--since", "since_s", type=seconds_of, metavar="DURATION", help="Only events newer than that, e.g. 10m.")
@fleet_or_node_options
@output_option
def events(uid: str, fleet: bool, function: str, node: str, since_s: float | None) -> None:
    """Show the events of the node or of one instance, or with --fleet those of the scheduler, oldest first.

    An instance's own events are on its node. The scheduler's say what it decided and could not do: a deploy, an
    instance placed or not, a schedule that it can't read, a node lost. Both daemons keep the newest 5,000 until they
    are restarted.

    \b
    Examples:
      hibernode events --since 10m
      hibernode events i-3f9a
      hibernode events --fleet --function ocr
      hibernode events --fleet --node gpu-1 --since 1h
      hibernode events --output json | jq -r '.events[] | select(.name == "instance.frozen") | .time'
      hibernode events --fleet -o json | jq -r '.events[] | select(.level == "ERROR") | .message'
    """
    if fleet and uid:
        raise click.UsageError(f"events of an instance are on its node; leave out --fleet, or leave out {uid}")
    if not fleet and (function or node):
        option = "--function" if function else "--node"
        raise click.UsageError(f"{option} chooses among the events of the scheduler; add --fleet")
    since = None if since_s is None else time_to_proto(max(0, wall_ns() - round(since_s * SECOND_NS)))

    async def list_events(channel: DaemonChannel) -> list[types_pb2.Event]:
        listing = pages(channel, channel.instances.ListEvents, pb.ListEventsRequest(instance_uid=uid, since=since))
        return [event async for page in listing for event in page.events]

    async def list_fleet_events(channel: DaemonChannel) -> list[types_pb2.Event]:
        request = scheduler_service_pb2.ListFleetEventsRequest(function=function, node=node, since=since)
        listing = pages(channel, channel.scheduler.ListFleetEvents, request)
        return [event async for page in listing for event in page.events]

    doing = "listing the events"
    found = with_scheduler(list_fleet_events, doing) if fleet else with_agent(list_events, doing)
    if cli_options().json:
        show_json({"events": [to_json(one) for one in found]})
    elif fleet:
        show_table(("TIME", "LEVEL", "FUNCTION", "NODE", "INSTANCE", "EVENT", "MESSAGE"), map(_fleet_row, found))
    else:
        show_table(
            ("TIME", "INSTANCE", "EVENT", "MESSAGE"),
            ((clock(one.time), one.instance_uid or "-", one.name, _message(one)) for one in found),
        )


def _fleet_row(event: types_pb2.Event) -> tuple[str, ...]:
    level = short_name(types_pb2.Event.Level.DESCRIPTOR, event.level)
    about = (event.attributes.get(key, "") or "-" for key in _COLUMNS)
    return clock(event.time), level, *about, event.instance_uid or "-", event.name, _message(event, _COLUMNS)


def _message(event: types_pb2.Event, elsewhere: Sequence[str] = ()) -> str:
    """`elsewhere`: the attributes that have a column of their own."""
    data = " ".join(f"{key}={event.attributes[key]}" for key in sorted(event.attributes) if key not in elsewhere)
    often = f"({event.count} times since {clock(event.first_time)})" if event.count > 1 else ""
    return " ".join(filter(None, (event.message, data, often))) or "-"

"""`hibernode ps`: lists the instances of a node or of the fleet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import click

from agent.cli.console.output import show_json, show_table
from agent.cli.console.units import age, duration, gpu_names, size, wall_ns
from agent.cli.daemon_calls import pages, with_agent, with_scheduler
from agent.cli.options import cli_options, fleet_or_node_options, output_option
from agent.core.gpu_holders import GpuUser, held_by, holders
from agent.v1 import instance_service_pb2, scheduler_service_pb2, types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.gpu_users import gpu_user
from agent.wire.json_view import short_name, to_json


@click.command()
@click.option("--function", default="", metavar="NAME", help="Only instances of this function.")
@click.option("--all", "-a", "include_ended", is_flag=True, help="Include ended instances.")
@click.option("--fleet", is_flag=True, help="Instances of all nodes, from the scheduler.")
@click.option("--quiet", "-q", is_flag=True, help="Print only the uids, one per line.")
@fleet_or_node_options
@output_option
def ps(function: str, include_ended: bool, fleet: bool, quiet: bool) -> None:
    """List instances, oldest first.

    \b
    Examples:
      hibernode ps
      hibernode ps --fleet --function ocr
      hibernode rm $(hibernode ps -q --function ocr)
      hibernode ps --output json | jq -r '.instances[] | select(.state == "FROZEN") | .uid'
    """
    if fleet and include_ended:
        raise click.UsageError("--all lists ended instances of one node; leave out --fleet")

    doing = "listing the instances"
    if fleet:
        every = with_scheduler(list_fleet, doing)
    else:
        every = with_agent(lambda channel: list_instances(channel, "", include_ended), doing)
    found = [one for one in every if function in ("", one.function)]
    if cli_options().json:
        show_instances_json(found)
    elif quiet:
        click.echo("\n".join(one.uid for one in found), nl=bool(found))
    else:
        users = [user for one in every if (user := gpu_user(one, one.node)) is not None]
        show_instances(found, with_node=fleet, waits=holders(users))


async def list_instances(
    channel: DaemonChannel, function: str = "", include_ended: bool = False
) -> list[types_pb2.Instance]:
    """All instances of the agent's node."""
    request = instance_service_pb2.ListInstancesRequest(function=function, include_ended=include_ended)
    listing = pages(channel, channel.instances.ListInstances, request)
    return [instance async for page in listing for instance in page.instances]


async def list_fleet(channel: DaemonChannel, function: str = "", node: str = "") -> list[types_pb2.Instance]:
    """All instances of the fleet, from the scheduler."""
    request = scheduler_service_pb2.ListFleetInstancesRequest(function=function, node=node)
    listing = pages(channel, channel.scheduler.ListFleetInstances, request)
    return [instance async for page in listing for instance in page.instances]


def state_of(instance: types_pb2.Instance) -> str:
    """The instance's state, such as RUNNING."""
    return short_name(types_pb2.Instance.State.DESCRIPTOR, instance.state)


def show_instances_json(found: Iterable[types_pb2.Instance]) -> None:
    """Prints `{"instances": [...]}` on stdout."""
    show_json({"instances": [to_json(one) for one in found]})


def show_instances(
    found: Iterable[types_pb2.Instance], with_node: bool = False, waits: Mapping[str, GpuUser] | None = None
) -> None:
    """Prints the table of instances on stdout. `waits`: who holds the GPU that an instance waits for, by uid."""
    waits, now_ns = waits or {}, wall_ns()
    columns = ("UID", "FUNCTION", "STATE", "SINCE", "IN", "GPU", "VRAM", "HOST", "WAKES", "LAST WAKE", "AGE", "REASON")
    rows = (
        (
            one.uid,
            one.function,
            state_of(one),
            age(one.state_time),
            f"{one.in_flight}+{one.waiting}" if one.waiting else str(one.in_flight),
            gpu_names(one.gpu_uuids),
            size(one.vram_bytes),
            size(one.frozen_bytes),
            str(one.wake_count),
            duration(one.last_wake.total_ns),
            age(one.create_time),
            held_by(waits[one.uid], now_ns) if one.uid in waits else one.state_reason or one.progress or "-",
        )
        for one in found
    )
    if with_node:
        nodes = [one.node for one in found]
        show_table(("NODE", *columns), ((name, *row) for name, row in zip(nodes, rows, strict=True)), right=_RIGHT)
    else:
        show_table(columns, rows, right=_RIGHT)


_RIGHT = ("SINCE", "IN", "VRAM", "HOST", "WAKES", "LAST WAKE", "AGE")

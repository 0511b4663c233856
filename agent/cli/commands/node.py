"""`hibernode node`: shows a node or the nodes of the fleet; cordons and drains nodes."""

from __future__ import annotations

import click

from agent.cli.commands.node_drain import list_nodes, wait_until_drained
from agent.cli.console.output import note, show_json, show_pairs, show_table, show_text
from agent.cli.console.units import age, clock, gpu_names, size
from agent.cli.daemon_calls import SHORT_S, with_agent, with_scheduler
from agent.cli.options import cli_options, fleet_or_node_options, output_option, scheduler_options, timeout_option
from agent.core.provisioning.model import Scheduling
from agent.v1 import node_service_pb2, scheduler_service_pb2, types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.json_view import short_name, to_json


@click.group(invoke_without_command=True)
@click.option("--fleet", is_flag=True, help="All nodes of the scheduler.")
@fleet_or_node_options
@output_option
@click.pass_context
def node(context: click.Context, fleet: bool) -> None:
    """Show a node, its GPUs with their holders, host memory and capabilities, or take a node out of use.

    \b
    Examples:
      hibernode node
      hibernode node --fleet
      hibernode node drain gpu-1 --wait
      hibernode node --output json | jq '.gpus[].holder_uids'
    """
    if context.invoked_subcommand is not None:
        if fleet:
            raise click.UsageError(f"--fleet lists nodes; leave it out before {context.invoked_subcommand}")
        return
    if fleet:
        _show_fleet(with_scheduler(list_nodes, "listing the nodes"))
        return
    found = with_agent(get_node, "getting the node")
    if cli_options().json:
        show_json(to_json(found))
        return
    _show_node(found)


@node.command()
@click.argument("name")
@scheduler_options
@output_option
def cordon(name: str) -> None:
    """Place no new instances on a node. Its instances keep serving. Lasts until `uncordon`, across restarts.

    \b
    Example:
      hibernode node cordon gpu-1
    """
    _report(_schedule(name, types_pb2.Node.SCHEDULING_CORDONED), "is cordoned: it gets no new instances")


@node.command()
@click.argument("name")
@scheduler_options
@output_option
def uncordon(name: str) -> None:
    """Use a cordoned or drained node again.

    \b
    Example:
      hibernode node uncordon gpu-1
    """
    _report(_schedule(name, types_pb2.Node.SCHEDULING_NORMAL), "is in use again")


@node.command()
@click.argument("name")
@click.option("--wait", is_flag=True, help="Return once the node has no instances left.")
@click.option("--force", is_flag=True, help="Also drain instances that no other node has room for.")
@timeout_option("30m")
@scheduler_options
@output_option
def drain(name: str, wait: bool, force: bool, timeout_s: float) -> None:
    """Move a node's instances to other nodes.

    New instances start first; then the old ones finish their requests and end. No request is interrupted. An instance
    stays if no other node has room for it, and its function shows why; --force ends it anyway. The node gets no new
    instances until `uncordon`.

    \b
    Examples:
      hibernode node drain gpu-1 --wait
      hibernode node drain gpu-1 --wait --force --timeout 2h
      hibernode node uncordon gpu-1
    """
    found = _schedule(name, types_pb2.Node.SCHEDULING_EMPTIED if force else types_pb2.Node.SCHEDULING_DRAINED)
    if not wait:
        _report(found, "is being drained; `hibernode ps --fleet` shows what is left")
        return
    found = with_scheduler(lambda channel: wait_until_drained(channel, name, timeout_s), f"draining {name}")
    _report(found, "is drained")


def _schedule(name: str, scheduling: types_pb2.Node.Scheduling.ValueType) -> types_pb2.Node:
    async def set_scheduling(channel: DaemonChannel) -> types_pb2.Node:
        request = scheduler_service_pb2.SetNodeSchedulingRequest(name=name, scheduling=scheduling)
        return (await channel.call(channel.scheduler.SetNodeScheduling, request, SHORT_S)).node

    return with_scheduler(set_scheduling, f"updating {name}")


def _report(found: types_pb2.Node, what: str) -> None:
    if cli_options().json:
        show_json(to_json(found))
    note(f"{found.name} {what}")


async def get_node(channel: DaemonChannel) -> types_pb2.Node:
    """The agent's own node."""
    request = node_service_pb2.GetNodeRequest()
    return (await channel.call(channel.nodes.GetNode, request, SHORT_S)).node


def _show_fleet(nodes: list[types_pb2.Node]) -> None:
    if cli_options().json:
        show_json({"nodes": [to_json(one) for one in nodes]})
        return
    show_table(
        ("NODE", "STATE", "SCHEDULING", "GPUS", "INSTANCES", "MEMORY", "RESERVED", "DRIVER", "REPORTED"),
        (
            (
                one.name,
                _state(one),
                _scheduling(one) or "-",
                str(len(one.gpus)),
                str(one.instance_count),
                size(one.host_memory.total_bytes),
                size(one.host_memory.reserved_bytes),
                one.driver_version or "-",
                f"{age(one.report_time)} ago" if one.HasField("report_time") else "never",
            )
            for one in nodes
        ),
        right=("GPUS", "INSTANCES"),
    )


def _show_node(found: types_pb2.Node) -> None:
    memory = found.host_memory
    show_pairs(
        (
            ("Node", found.name),
            ("State", " ".join(filter(None, (_state(found), found.state_reason)))),
            ("Scheduling", _scheduling(found)),
            ("Driver", f"{found.driver_version or 'none'} (CUDA {found.cuda_version or '-'})"),
            (
                "Host memory",
                ", ".join(
                    (
                        size(memory.total_bytes),
                        f"{size(memory.available_bytes)} available",
                        f"{size(memory.reserved_bytes)} reserved for frozen instances",
                    )
                ),
            ),
            ("Instances", f"{found.instance_count}, at most {found.instances_per_gpu} assigned to a GPU"),
            ("Runtimes", ", ".join(found.runtimes)),
            ("Ingress", found.ingress_address),
            ("gRPC", found.grpc_address),
            ("Labels", ", ".join(f"{key}={found.labels[key]}" for key in sorted(found.labels))),
            ("Agent", f"{found.agent_version}, since {clock(found.start_time)}"),
        )
    )
    show_text("\n")
    _show_gpus(list(found.gpus))
    show_text("\n")
    show_table(
        ("ABILITY", "LEVEL", "FOUND", "FIX"),
        ((one.name, level(one), one.reason, one.fix or "-") for one in found.capabilities),
    )


def _show_gpus(gpus: list[types_pb2.Gpu]) -> None:
    """The GPUs with the values of nvidia-smi, holders and waiters; then the reasons of cordoned ones in full."""
    show_table(
        ("GPU", "MODEL", "UUID", "HEALTH", "USED", "TOTAL", "SM", "MEM", "ENC", "DEC", "TEMP", "POWER", "HELD BY")
        + ("WAITING",),
        (
            (
                str(gpu.index),
                gpu.model,
                gpu_names([gpu.uuid]),
                _health(gpu),
                size(gpu.memory_used_bytes) if gpu.HasField("memory_used_bytes") else "-",
                size(gpu.memory_total_bytes),
                f"{gpu.sm_percent}%" if gpu.HasField("sm_percent") else "-",
                f"{gpu.memory_percent}%" if gpu.HasField("memory_percent") else "-",
                f"{gpu.encoder_percent}%" if gpu.HasField("encoder_percent") else "-",
                f"{gpu.decoder_percent}%" if gpu.HasField("decoder_percent") else "-",
                f"{gpu.temperature_celsius} C" if gpu.HasField("temperature_celsius") else "-",
                f"{gpu.power_milliwatts / 1000:.0f} W" if gpu.HasField("power_milliwatts") else "-",
                ",".join(gpu.holder_uids) or "-",
                ",".join(gpu.waiter_uids) or "-",
            )
            for gpu in gpus
        ),
        right=("GPU", "USED", "TOTAL", "SM", "MEM", "ENC", "DEC", "TEMP", "POWER"),
    )
    cordoned = [gpu for gpu in gpus if gpu.cordoned_reason]
    if cordoned:
        show_text("\n")
        show_table(("GPU", "CORDONED BECAUSE"), ((str(gpu.index), gpu.cordoned_reason) for gpu in cordoned))


def level(capability: types_pb2.Capability) -> str:
    """OK, WARN or FAIL."""
    return short_name(types_pb2.Capability.Level.DESCRIPTOR, capability.level)


def _state(found: types_pb2.Node) -> str:
    return short_name(types_pb2.Node.State.DESCRIPTOR, found.state)


def _scheduling(found: types_pb2.Node) -> str:
    """The scheduling mode, such as CORDONED; "" in an agent's answer, which does not have it."""
    if found.scheduling == types_pb2.Node.SCHEDULING_UNSPECIFIED:
        return ""
    name = short_name(types_pb2.Node.Scheduling.DESCRIPTOR, found.scheduling)
    known = name in Scheduling.__members__  # else a newer scheduler's
    return Scheduling[name].shown(found.instance_count) if known else name


def _health(gpu: types_pb2.Gpu) -> str:
    return short_name(types_pb2.Gpu.Health.DESCRIPTOR, gpu.health)

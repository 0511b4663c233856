"""`hibernode node`: one node as its agent sees it, or the nodes of the fleet."""

from __future__ import annotations

import click

from agent.cli.connection import PAGE_SIZE, SHORT_S, with_agent, with_scheduler
from agent.cli.options import asked, fleet_or_node_options, output_option
from agent.cli.output import show_json, show_pairs, show_table, show_text
from agent.cli.units import age, clock, gpu_names, size
from agent.v1 import node_service_pb2, scheduler_service_pb2, types_pb2
from agent.wire.clients import DaemonChannel
from agent.wire.json_view import short_name, to_json

MAX_PAGES = 1000


@click.command()
@click.option("--fleet", is_flag=True, help="All nodes the scheduler knows.")
@fleet_or_node_options
@output_option
def node(fleet: bool) -> None:
    """Show the node: its GPUs and who holds them, its host memory, what it can do.

    \b
    Examples:
      hibernode node
      hibernode node --fleet
      hibernode node --output json | jq '.gpus[].holder_uids'
    """
    if fleet:
        _show_fleet(with_scheduler(list_nodes, "asking for the nodes"))
        return
    found = with_agent(get_node, "asking for the node")
    if asked().json:
        show_json(to_json(found))
        return
    _show_node(found)


async def get_node(channel: DaemonChannel) -> types_pb2.Node:
    """The agent's own node."""
    request = node_service_pb2.GetNodeRequest()
    return (await channel.call(channel.nodes.GetNode, request, SHORT_S)).node


async def list_nodes(channel: DaemonChannel) -> list[types_pb2.Node]:
    """Every node of the fleet."""
    found: list[types_pb2.Node] = []
    token = ""
    for _ in range(MAX_PAGES):
        request = scheduler_service_pb2.ListNodesRequest(page_size=PAGE_SIZE, page_token=token)
        page = await channel.call(channel.scheduler.ListNodes, request, SHORT_S)
        found += page.nodes
        token = page.next_page_token
        if not token:
            break
    return found


def _show_fleet(nodes: list[types_pb2.Node]) -> None:
    if asked().json:
        show_json({"nodes": [to_json(one) for one in nodes]})
        return
    show_table(
        ("NODE", "STATE", "GPUS", "INSTANCES", "MEMORY", "RESERVED", "DRIVER", "REPORTED"),
        (
            (
                one.name,
                _state(one),
                str(len(one.gpus)),
                str(one.instance_count),
                size(one.host_memory.total_bytes),
                size(one.host_memory.reserved_bytes),
                one.driver_version or "-",
                f"{age(one.report_time)} ago" if one.HasField("report_time") else "-",
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
            ("Driver", f"{found.driver_version or 'none'} (CUDA {found.cuda_version or '-'})"),
            (
                "Host memory",
                ", ".join(
                    (
                        size(memory.total_bytes),
                        f"{size(memory.available_bytes)} available",
                        f"{size(memory.reserved_bytes)} reserved for sleeping instances",
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
    """What nvidia-smi shows and who has them; then, at length, why some are not in use."""
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


def _health(gpu: types_pb2.Gpu) -> str:
    return short_name(types_pb2.Gpu.Health.DESCRIPTOR, gpu.health)

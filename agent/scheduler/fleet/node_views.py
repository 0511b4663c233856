"""The fleet as placement sees it: each node's GPUs with their instances, memory, runtimes and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from agent.core.dispatch.model import NodeStanding
from agent.core.provisioning.model import Scheduling
from agent.core.provisioning.placement import GpuView, NodeView
from agent.core.types import FunctionSpec
from agent.scheduler.fleet.fleet import ENDED, Fleet, NodeRecord
from agent.v1.types_pb2 import Gpu

_UNAVAILABLE = {
    NodeStanding.SUSPECT: "is silent",
    NodeStanding.LOST: "is lost",
    NodeStanding.DRAINING: "is shutting down",
}
_ANYTHING = FunctionSpec("")
"""Stands for a function that is not deployed any more: one GPU."""


def node_views(
    fleet: Fleet, pending: Iterable[tuple[str, FunctionSpec]], functions: Mapping[str, FunctionSpec]
) -> list[NodeView]:
    """Views of all nodes. `pending`: node and spec of instances that are not reported yet. `functions`: specs for
    instances whose reports do not name their GPUs."""
    extra: dict[str, list[FunctionSpec]] = {}
    for name, spec in pending:
        extra.setdefault(name, []).append(spec)
    return [_view(node, fleet.scheduling(node.name), extra.get(node.name, []), functions) for node in fleet.nodes()]


def usable_gpus(node: NodeRecord) -> list[Gpu]:
    """GPUs that instances can be assigned to."""
    return [gpu for gpu in node.gpus if gpu.health == Gpu.HEALTH_OK and not gpu.mig]


def _view(
    node: NodeRecord, scheduling: Scheduling, pending: list[FunctionSpec], functions: Mapping[str, FunctionSpec]
) -> NodeView:
    registration = node.registration
    memory = node.load.host_memory if node.load.HasField("host_memory") else registration.host_memory
    sharers: dict[str, int] = {}
    unassigned: list[FunctionSpec] = []
    for load in node.instances.values():
        if load.state in ENDED:
            continue
        for uuid in load.gpu_uuids:
            sharers[uuid] = sharers.get(uuid, 0) + 1
        if not load.gpu_uuids:
            unassigned.append(replace(functions.get(load.function, _ANYTHING), memory_bytes=0))
    view = NodeView(
        name=node.name,
        gpus=tuple(
            GpuView(gpu.uuid, gpu.model, sharers.get(gpu.uuid, 0), gpu.memory_total_bytes) for gpu in usable_gpus(node)
        ),
        gpu_types=dict(registration.gpu_types),
        instances_per_gpu=max(1, registration.instances_per_gpu),
        migrates=registration.gpu_migration,
        memory_free_bytes=memory.available_bytes - memory.reserved_bytes if memory.total_bytes else None,
        runtimes=frozenset(registration.runtimes),
        labels=dict(registration.labels),
        unavailable=_unavailable(node, scheduling),
    )
    for spec in (*unassigned, *pending):
        if spec.gpu.count or spec.memory_bytes:
            view = view.with_instance(spec)
    return view


def _unavailable(node: NodeRecord, scheduling: Scheduling) -> str:
    if scheduling is not Scheduling.NORMAL:
        return "is cordoned" if scheduling is Scheduling.CORDONED else "is drained"
    if node.standing is NodeStanding.DRAINING and node.recovering:
        return "is recovering"
    return _UNAVAILABLE.get(node.standing, "")

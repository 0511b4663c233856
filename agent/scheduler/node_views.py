"""The fleet as placement sees it: free slots, memory, runtimes and labels of the nodes that take work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from agent.core.leases import Standing
from agent.core.placement import NodeView
from agent.scheduler.fleet import ENDED, Fleet, NodeRecord
from agent.v1.types_pb2 import Gpu


def node_views(fleet: Fleet, pending: Iterable[tuple[str, int]], gpu_counts: Mapping[str, int]) -> list[NodeView]:
    """Views of all READY nodes. `pending`: (node, GPUs) of instances asked for and not reported yet. `gpu_counts`:
    GPUs of an instance by function, for those that hold none at the moment; one where it is not known."""
    extra: dict[str, int] = {}
    for node, gpus in pending:
        extra[node] = extra.get(node, 0) + gpus
    return [
        _view(node, extra.get(node.name, 0), gpu_counts) for node in fleet.nodes() if node.standing is Standing.READY
    ]


def usable_gpus(node: NodeRecord) -> list[Gpu]:
    """GPUs that instances can be given."""
    gpus = node.load.gpus or node.registration.gpus
    return [gpu for gpu in gpus if gpu.health == Gpu.HEALTH_OK and not gpu.mig]


def _view(node: NodeRecord, pending: int, gpu_counts: Mapping[str, int]) -> NodeView:
    registration = node.registration
    memory = node.load.host_memory if node.load.HasField("host_memory") else registration.host_memory
    return NodeView(
        name=node.name,
        gpu_models=tuple(gpu.model for gpu in usable_gpus(node)),
        instances_per_gpu=max(1, registration.instances_per_gpu),
        assigned=pending
        + sum(
            max(gpu_counts.get(load.function, 1), len(load.gpu_uuids))
            for load in node.instances.values()
            if load.state not in ENDED
        ),
        memory_free_bytes=memory.available_bytes - memory.reserved_bytes if memory.total_bytes else None,
        runtimes=frozenset(registration.runtimes),
        labels=dict(registration.labels),
    )

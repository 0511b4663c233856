"""Checks at a deploy whether the fleet has the GPUs that a function asks for."""

from __future__ import annotations

from agent.core.errors import PreconditionError
from agent.core.gpu_fit import NO_SUCH_GPU, NodeGpus, misfit, unmapped_type
from agent.core.provisioning.placement import GpuView
from agent.core.types import FunctionSpec
from agent.scheduler.fleet.fleet import Fleet, NodeRecord

_NAMED = 3


class GpuCheck:
    """The GPUs of every node that has registered since the scheduler started count, whatever its state is now: a node
    that is silent, lost, cordoned or drained comes back."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def __call__(self, spec: FunctionSpec, runs: bool) -> list[str]:
        """Warnings about the function's GPUs.

        Raises PreconditionError NO_SUCH_GPU if no node can ever run it. That is only a warning if a known node has not
        registered yet, as it may be the right one, or if the function is to have no instances (`runs` False).
        """
        if not spec.gpu.count:
            return []
        nodes = self._fleet.nodes()
        labels = ", ".join(f"{key}={value}" for key, value in spec.node_labels)
        known = [_gpus(node) for node in nodes if _registered(node) and _has_labels(spec, node)]
        unknown = [node.name for node in nodes if not _registered(node)]
        if not known:
            with_labels = f" with {labels}" if any(map(_registered, nodes)) else ""
            return [f"no node{with_labels} has registered yet, so that GPU type and memory are not checked"]
        why = misfit(spec.gpu, known, f"the part of the fleet with {labels}" if labels else "the fleet")
        if why and runs and not unknown:
            raise PreconditionError(NO_SUCH_GPU, f"{spec.name}: {why}", function=spec.name)
        if not why:
            warning = unmapped_type(spec.gpu, known)
            return [warning] if warning else []
        return [f"{why} (not refused: {_names(unknown)} may have it)" if unknown and runs else why]


def _has_labels(spec: FunctionSpec, node: NodeRecord) -> bool:
    labels = node.registration.labels
    return all(labels.get(key) == value for key, value in spec.node_labels)


def _registered(node: NodeRecord) -> bool:
    return bool(node.registration.ingress_address)


def _gpus(node: NodeRecord) -> NodeGpus:
    """All its GPUs but those in MIG mode, which are never used."""
    gpus = [GpuView(gpu.uuid, gpu.model, memory_bytes=gpu.memory_total_bytes) for gpu in node.gpus if not gpu.mig]
    return NodeGpus(gpus, dict(node.registration.gpu_types))


def _names(nodes: list[str]) -> str:
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return f"{', '.join(nodes[:_NAMED])}{more}, not heard since the scheduler started,"

"""Which node gets a new instance: one with free slots (GPUs x instances_per_gpu), memory, the runtime and the labels.

Pure. The node's own agent has the last word (it refuses what it cannot hold); this only avoids asking in vain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from agent.core.function_rules import HOST_IMAGE
from agent.core.types import FunctionSpec


@dataclass(frozen=True, slots=True)
class NodeView:
    """What placement knows of a node. `assigned` counts GPU slots taken by instances, or by creates under way.

    `gpu_models`: the model of each usable GPU. `memory_free_bytes`: available less reserved; None = not said.
    """

    name: str
    gpu_models: tuple[str, ...] = ()
    instances_per_gpu: int = 1
    assigned: int = 0
    memory_free_bytes: int | None = None
    runtimes: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)

    def free_slots(self) -> int:
        """Slots not yet assigned; one GPU of one instance is one slot."""
        return len(self.gpu_models) * self.instances_per_gpu - self.assigned

    def with_instance(self, spec: FunctionSpec) -> NodeView:
        """The node once it has been asked for one more."""
        memory = self.memory_free_bytes
        left = None if memory is None else memory - spec.memory_bytes
        return replace(self, assigned=self.assigned + spec.gpu.count, memory_free_bytes=left)


@dataclass(frozen=True, slots=True)
class Placed:
    """The node that gets it."""

    node: str


@dataclass(frozen=True, slots=True)
class Unplaceable:
    """No node can. `reason` is stable UPPER_SNAKE, `message` for people."""

    reason: str
    message: str


Placement: TypeAlias = Placed | Unplaceable


def place(spec: FunctionSpec, nodes: Iterable[NodeView], labels: Mapping[str, str] | None = None) -> Placement:
    """The node with the most free slots that can take one instance of `spec`; ties by free memory, then by name.

    `nodes`: only those that are ready. `labels`: what the function asks of its node.
    The reason names the first requirement that no node meets: NO_NODE, IMAGE_RUNTIME_UNAVAILABLE, NO_MATCHING_NODE,
    NO_FREE_GPU, HOST_MEMORY_SHORT.
    """
    candidates = list(nodes)
    if not candidates:
        return Unplaceable("NO_NODE", "no node is ready; start an agent whose configuration names this scheduler")
    runtime = "process" if spec.image == HOST_IMAGE else "engine"
    candidates = [node for node in candidates if runtime in node.runtimes]
    if not candidates:
        return Unplaceable("IMAGE_RUNTIME_UNAVAILABLE", _no_runtime(spec))
    wanted = labels or {}
    fitting = [node for node in candidates if _matches(spec, node, wanted)]
    if not fitting:
        return Unplaceable("NO_MATCHING_NODE", _no_match(spec, wanted))
    free = [node for node in fitting if node.free_slots() >= spec.gpu.count]
    if not free:
        return Unplaceable(
            "NO_FREE_GPU",
            f"every GPU that fits {spec.name} has its full number of instances; add GPUs, raise "
            "gpu.instances_per_gpu, or lower a target",
        )
    roomy = [node for node in free if node.memory_free_bytes is None or node.memory_free_bytes >= spec.memory_bytes]
    if not roomy:
        return Unplaceable(
            "HOST_MEMORY_SHORT",
            f"no node with a free GPU has {spec.memory_bytes} bytes of memory left for an instance of {spec.name}",
        )
    best = min(roomy, key=lambda node: (-node.free_slots(), -(node.memory_free_bytes or 0), node.name))
    return Placed(best.name)


def _matches(spec: FunctionSpec, node: NodeView, labels: Mapping[str, str]) -> bool:
    if any(node.labels.get(key) != value for key, value in labels.items()):
        return False
    if not spec.gpu.count:
        return True
    fitting = [model for model in node.gpu_models if spec.gpu.model in ("", model)]
    return len(fitting) >= spec.gpu.count


def _no_runtime(spec: FunctionSpec) -> str:
    if spec.image == HOST_IMAGE:
        return f"{spec.name} runs on the host, but no node enables the process runtime (runtime.process.enabled)"
    return f"{spec.name} needs a container engine for its image, and no ready node has one"


def _no_match(spec: FunctionSpec, labels: Mapping[str, str]) -> str:
    gpus = f"{spec.gpu.count} GPU(s){f' of model {spec.gpu.model}' if spec.gpu.model else ''}"
    asked = "".join(f", label {key}={value}" for key, value in labels.items())
    return f"no ready node has what {spec.name} needs: {gpus}{asked}"

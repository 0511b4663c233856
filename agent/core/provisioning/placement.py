"""Placement: the node for a new instance, by GPUs that suit it and have a free place, memory, runtime and labels.

Pure. The node's agent decides in the end, and refuses what does not fit; placement avoids useless creates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TypeAlias

from agent.core.function_rules import HOST_IMAGE
from agent.core.gpu_fit import suits, wanted
from agent.core.sizes import size_text
from agent.core.types import FunctionSpec, GpuNeed


@dataclass(frozen=True, slots=True)
class GpuView:
    """A usable GPU. `sharers`: instances assigned to it, awake or not. `memory_bytes`: NVML's total; 0 = unknown."""

    uuid: str
    model: str = ""
    sharers: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node.

    - `gpus`: the usable ones. `gpu_types`: what its agent's `gpu.types` says (core/gpu_fit.py).
    - `migrates`: a frozen instance may wake on another GPU, so that `instances_per_gpu` bounds the average of its GPUs.
    - `memory_free_bytes`: available less reserved; None if unknown.
    - `unavailable`: why it takes no instances now, "is ..." or "has ..."; "" if it does.
    """

    name: str
    gpus: tuple[GpuView, ...] = ()
    instances_per_gpu: int = 1
    migrates: bool = False
    memory_free_bytes: int | None = None
    runtimes: frozenset[str] = frozenset()
    labels: Mapping[str, str] = field(default_factory=dict)
    unavailable: str = ""
    gpu_types: Mapping[str, str] = field(default_factory=dict)

    def suiting(self, need: GpuNeed) -> list[GpuView]:
        """The usable GPUs of the wanted type with enough memory."""
        return [gpu for gpu in self.gpus if suits(need, gpu, self.gpu_types)]

    def free_places(self, need: GpuNeed) -> int:
        """How many more instances with one such GPU fit."""
        free = [self.instances_per_gpu - gpu.sharers for gpu in self.suiting(need)]
        return max(0, sum(free)) if self.migrates else sum(places for places in free if places > 0)

    def has_places(self, need: GpuNeed) -> bool:
        """Whether one more instance fits."""
        open_gpus = sum(gpu.sharers < self.instances_per_gpu for gpu in self.suiting(need))
        return open_gpus >= need.count and self.free_places(need) >= need.count

    def has_memory(self, size: int) -> bool:
        """Whether `size` more bytes fit; any size if memory is unknown."""
        return self.memory_free_bytes is None or self.memory_free_bytes >= size

    def with_instance(self, spec: FunctionSpec) -> NodeView:
        """The node with one more instance, on the fitting GPUs with the fewest sharers, as agents choose them."""
        chosen = {gpu.uuid for gpu in sorted(self.suiting(spec.gpu), key=lambda gpu: gpu.sharers)[: spec.gpu.count]}
        gpus = tuple(replace(gpu, sharers=gpu.sharers + (gpu.uuid in chosen)) for gpu in self.gpus)
        return replace(self, gpus=gpus, memory_free_bytes=_less(self.memory_free_bytes, spec.memory_bytes))

    def without(self, gpu_uuids: Iterable[str], memory_bytes: int) -> NodeView:
        """The node with one instance less, which was on those GPUs."""
        left = set(gpu_uuids)
        gpus = tuple(replace(gpu, sharers=max(0, gpu.sharers - (gpu.uuid in left))) for gpu in self.gpus)
        return replace(self, gpus=gpus, memory_free_bytes=_less(self.memory_free_bytes, -memory_bytes))


@dataclass(frozen=True, slots=True)
class Placed:
    node: str


@dataclass(frozen=True, slots=True)
class Unplaceable:
    reason: str
    message: str


Placement: TypeAlias = Placed | Unplaceable


@dataclass(frozen=True, slots=True)
class Occupant:
    """An instance that may be stopped. `gpus`: those it is assigned to."""

    uid: str
    node: str
    gpus: tuple[str, ...] = ()


class _Lacks(IntEnum):
    """What a node lacks, in the order of the checks: the later the check, the closer the node is to fitting."""

    RUNTIME = 1
    MATCH = 2
    READINESS = 3
    SLOT = 4
    MEMORY = 5


_REASONS = {
    _Lacks.RUNTIME: "IMAGE_RUNTIME_UNAVAILABLE",
    _Lacks.MATCH: "NO_MATCHING_NODE",
    _Lacks.READINESS: "NO_NODE",
    _Lacks.SLOT: "NO_FREE_GPU",
    _Lacks.MEMORY: "HOST_MEMORY_SHORT",
}
PASSING = frozenset({"NO_NODE", "NO_FREE_GPU", "HOST_MEMORY_SHORT"})
"""Reasons that time may remove: an instance ends, a node comes back."""
_PLURALS = {"has": "have", "is": "are", "lacks": "lack"}


def place(spec: FunctionSpec, nodes: Iterable[NodeView]) -> Placement:
    """The node that can take an instance of `spec` and has the most free GPU places; ties by free memory, then name.

    `nodes`: all known ones. If none can, the reason is what the closest node lacks (NO_NODE, IMAGE_RUNTIME_UNAVAILABLE,
    NO_MATCHING_NODE, NO_FREE_GPU, HOST_MEMORY_SHORT), and the message counts the nodes by what they lack.
    """
    known = list(nodes)
    lacking: list[tuple[_Lacks, str, str]] = []
    fitting: list[NodeView] = []
    for node in known:
        lack = _lack(spec, node)
        if lack is None:
            fitting.append(node)
        else:
            lacking.append((*lack, node.name))
    if fitting:
        best = min(fitting, key=lambda node: (-node.free_places(spec.gpu), -(node.memory_free_bytes or 0), node.name))
        return Placed(best.name)
    if not known:
        return Unplaceable("NO_NODE", "no node is ready; start an agent whose configuration names this scheduler")
    closest = max(lack for lack, _, _ in lacking)
    return Unplaceable(_REASONS[closest], f"{_headline(spec, closest)}: {_tally(lacking)}; {_fix(spec, closest)}")


def instances_to_stop(spec: FunctionSpec, nodes: Iterable[NodeView], occupants: Iterable[Occupant]) -> tuple[str, ...]:
    """The uids to stop so that an instance of `spec` fits: on one node, in the order given, and none needlessly.

    Empty if stopping does not help. An occupant's memory is assumed to be that of `spec`.
    """
    by_node: dict[str, list[Occupant]] = {}
    for one in occupants:
        by_node.setdefault(one.node, []).append(one)
    best: list[Occupant] = []
    for node in nodes:
        chosen: list[Occupant] = []
        for one in by_node.get(node.name, []):
            if _fits_without(spec, node, chosen):
                break
            chosen.append(one)
        for one in list(chosen):  # leave out those on GPUs that are not needed
            others = [other for other in chosen if other is not one]
            chosen = others if _fits_without(spec, node, others) else chosen
        if chosen and _fits_without(spec, node, chosen) and (not best or len(chosen) < len(best)):
            best = chosen
    return tuple(one.uid for one in best)


def _fits_without(spec: FunctionSpec, node: NodeView, gone: list[Occupant]) -> bool:
    for one in gone:
        node = node.without(one.gpus, spec.memory_bytes)
    return _lack(spec, node) is None


def _lack(spec: FunctionSpec, node: NodeView) -> tuple[_Lacks, str] | None:
    """What `node` lacks to take the instance, permanent lacks first; None if it can take it.

    The words follow "it"; `_tally` turns them into the plural.
    """
    registered = bool(node.runtimes)
    if registered and _runtime(spec) not in node.runtimes:
        engine = _runtime(spec) == "engine"
        return _Lacks.RUNTIME, "has no container engine" if engine else "has no process runtime enabled"
    missing = [f"{key}={value}" for key, value in spec.node_labels if node.labels.get(key) != value]
    if registered and missing:
        return _Lacks.MATCH, f"lacks label {', '.join(missing)}"
    gpus = len(node.suiting(spec.gpu))
    if registered and gpus < spec.gpu.count:
        return _Lacks.MATCH, f"has {gpus} of {_gpus(spec)}"
    if node.unavailable or not registered:
        return _Lacks.READINESS, node.unavailable or "has not registered"
    if spec.gpu.count and not node.has_places(spec.gpu):
        return _Lacks.SLOT, "has no free GPU" if spec.gpu.count == 1 else f"has no {spec.gpu.count} free GPUs"
    if not node.has_memory(spec.memory_bytes):
        return _Lacks.MEMORY, "has too little host memory left"
    return None


def _tally(lacking: list[tuple[_Lacks, str, str]]) -> str:
    """`node gpu-1 has no free GPU`, or `3 nodes: 2 have no free GPU, 1 lacks label zone=a`."""
    if len(lacking) == 1:
        return f"node {lacking[0][2]} {lacking[0][1]}"
    counts: dict[str, int] = {}
    for _, words, _ in sorted(lacking, key=lambda one: -one[0]):
        counts[words] = counts.get(words, 0) + 1
    parts = [f"{count} {words if count == 1 else _plural(words)}" for words, count in counts.items()]
    return f"{len(lacking)} nodes: {', '.join(parts)}"


def _plural(words: str) -> str:
    verb, _, rest = words.partition(" ")
    return f"{_PLURALS[verb]} {rest}"


def _headline(spec: FunctionSpec, lack: _Lacks) -> str:
    match lack:
        case _Lacks.READINESS:
            return f"no node that fits {spec.name} is ready"
        case _Lacks.SLOT:
            return f"every GPU that fits {spec.name} has its full number of instances"
        case _Lacks.MEMORY:
            return f"no node with a free GPU has {size_text(spec.memory_bytes)} of memory left for {spec.name}"
        case _:
            return f"no node has what {spec.name} needs"


def _fix(spec: FunctionSpec, lack: _Lacks) -> str:
    match lack:
        case _Lacks.RUNTIME if _runtime(spec) == "process":
            return "set runtime.process.enabled at an agent"
        case _Lacks.RUNTIME:
            return "install Docker or Podman on a node"
        case _Lacks.MATCH:
            return "change what the function asks for, or add such a node"
        case _Lacks.READINESS:
            return "`hibernode node --fleet` shows the nodes"
        case _Lacks.SLOT:
            return "add GPUs, raise gpu.instances_per_gpu, or lower a target"
        case _Lacks.MEMORY:
            return "free memory, lower memorySize, or lower a target"


def _runtime(spec: FunctionSpec) -> str:
    return "process" if spec.image == HOST_IMAGE else "engine"


def _gpus(spec: FunctionSpec) -> str:
    return f"{spec.gpu.count} usable GPU(s){wanted(spec.gpu)}"


def _less(free: int | None, size: int) -> int | None:
    return None if free is None else free - size

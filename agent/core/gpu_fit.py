"""Whether a GPU is what a function asks for: one rule for deploys, placement and a node's own creates. Pure.

- Type: `gpu.types` of the agent maps a type to an NVML model name. Without an entry, a type that begins with `fc.` is
  one of Function Compute's: it means any GPU on a node whose `gpu.types` is empty, and none on a node that maps others.
  Any other type is words of the model name: `H100` means `NVIDIA H100 80GB HBM3`, and `L4` is not `NVIDIA L40`.
- Memory: at most the nominal size of the GPU, because NVML's total is smaller than what its vendor sells
  (`nominal_bytes`).
- Count: so many such GPUs on one node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from agent.core.sizes import size_text
from agent.core.types import GIB, GpuNeed

NO_SUCH_GPU = "NO_SUCH_GPU"
FC_TYPES = "fc."
_ECC_STEP = 8 * GIB
_WORDS = re.compile(r"[^\s-]+")


class Device(Protocol):
    """A GPU: NVML's model name and total memory; 0 bytes = unknown, which is enough for any function."""

    @property
    def model(self) -> str: ...
    @property
    def memory_bytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class NodeGpus:
    """The GPUs of one node and the `gpu.types` of its agent."""

    gpus: Sequence[Device]
    types: Mapping[str, str] = field(default_factory=dict)


def nominal_bytes(total_bytes: int) -> int:
    """The size that a GPU is sold with, from NVML's total.

    ECC takes a sixteenth of GDDR memory: 15360 MiB of a T4 are 16 GiB, 46068 MiB of an L20 are 48 GiB. So a total
    within 1 % of 15/16 of a multiple of 8 GiB has that multiple. Any other is rounded up to whole GiB: 81559 MiB of an
    H100 are 80 GiB.
    """
    sold = -(-total_bytes // _ECC_STEP) * _ECC_STEP
    without_ecc = sold * 15 // 16
    if abs(total_bytes - without_ecc) <= sold // 100:
        return sold
    return -(-total_bytes // GIB) * GIB


def suits(need: GpuNeed, gpu: Device, types: Mapping[str, str]) -> bool:
    """Whether this GPU of a node with these `gpu.types` has the type and the memory."""
    return _is_of_type(need, gpu.model, types) and _has_memory(need, gpu)


def suiting(need: GpuNeed, node: NodeGpus) -> list[Device]:
    """The GPUs of the node that have the type and the memory."""
    return [gpu for gpu in node.gpus if suits(need, gpu, node.types)]


def misfit(need: GpuNeed, nodes: Sequence[NodeGpus], where: str) -> str:
    """Why none of the nodes can ever run the function, with what there is and the fix; "" if one can.

    `where` is their name in the sentence: "the fleet" or "this node".
    """
    if not need.count or any(len(suiting(need, node)) >= need.count for node in nodes):
        return ""
    every = [gpu for node in nodes for gpu in node.gpus]
    if not every:
        return f"{where} has no GPU, and the function needs {need.count}; add one, or leave gpuConfig out"
    typed = [gpu for node in nodes for gpu in node.gpus if _is_of_type(need, gpu.model, node.types)]
    if not typed:
        have = ", ".join(sorted({gpu.model for gpu in every}))
        fix = "change gpuType, add such a GPU, or set gpu.types at an agent"
        return f"{where} has no GPU of {_wanted_type(need)}; it has {have}; {fix}"
    such = f" of {_wanted_type(need)}" if need.model or need.gpu_type else ""
    if not any(_has_memory(need, gpu) for gpu in typed):
        largest = max(typed, key=lambda gpu: (gpu.memory_bytes, gpu.model))
        has = f"the largest is {largest.model} with {size_text(nominal_bytes(largest.memory_bytes))}"
        size = size_text(need.memory_bytes)
        return f"{where} has no GPU{such} with {size}; {has}; lower gpuMemorySize, or add such a GPU"
    most = max(len(suiting(need, node)) for node in nodes)
    fix = "lower hibernode.gpus, or add such GPUs"
    return f"the function needs {need.count} GPUs{such} on one node; {where} has at most {most} that fit; {fix}"


def unmapped_type(need: GpuNeed, nodes: Iterable[NodeGpus]) -> str:
    """A warning if the type is Function Compute's and no node says what it means, so that any GPU is used; else ""."""
    if need.model or not need.count or not need.gpu_type.startswith(FC_TYPES):
        return ""
    if any(node.types for node in nodes):
        return ""
    return f"gpuType {need.gpu_type} means any GPU here: no agent's gpu.types says which model it is"


def wanted(need: GpuNeed) -> str:
    """What is asked for of each GPU, as words after "GPU": " of type 'H100' with 80 GiB", or ""."""
    kind = f" of {_wanted_type(need)}" if need.model or need.gpu_type else ""
    return kind + (f" with {size_text(need.memory_bytes)}" if need.memory_bytes else "")


def _is_of_type(need: GpuNeed, model: str, types: Mapping[str, str]) -> bool:
    if need.model:
        return model == need.model
    if not need.gpu_type:
        return True
    mapped = types.get(need.gpu_type)
    if mapped is not None:
        return model == mapped
    if need.gpu_type.startswith(FC_TYPES):
        return not types
    asked, words = _words(need.gpu_type), _words(model)
    starts = range(len(words) - len(asked) + 1) if asked else ()  # a type of no words, such as "-", is none
    return any(words[start : start + len(asked)] == asked for start in starts)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _has_memory(need: GpuNeed, gpu: Device) -> bool:
    return not gpu.memory_bytes or need.memory_bytes <= nominal_bytes(gpu.memory_bytes)


def _wanted_type(need: GpuNeed) -> str:
    return f"model {need.model}" if need.model else f"type {need.gpu_type!r}"

"""Which of several equally good instances takes a request or is woken: the dispatch policies.

`DispatchPolicy` (core/types.py) names them; a new one gets its order in `in_order`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterator
from typing import assert_never

from agent.core.dispatch.model import DispatchInstance, NodeEntry
from agent.core.types import DispatchPolicy


def in_order(policy: DispatchPolicy, group: OrderedDict[str, DispatchInstance]) -> Iterator[DispatchInstance]:
    """The instances of `group`, the preferred first. `group` is in the order of last use: PACK prefers the most
    recently used one, so that the others can freeze; SPREAD the least recently used."""
    match policy:
        case DispatchPolicy.PACK:
            return reversed(group.values())
        case DispatchPolicy.SPREAD:
            return iter(group.values())
    assert_never(policy)


def wake_candidate(
    policy: DispatchPolicy,
    frozen: OrderedDict[str, DispatchInstance],
    node: NodeEntry,
    held: int,
    gpus_in_use: Container[str],
) -> DispatchInstance | None:
    """Which instance to wake next among `frozen`, those of one function on `node`; None if none should be.

    The function holds `held` GPUs of the node; `gpus_in_use` are all that it holds, on any node. An instance on a GPU
    that the function does not hold comes first, then one that can migrate to another. A wake that could only freeze an
    awake instance of the same function is useless. The agent decides which instance of another function gives way.
    """
    fallback: DispatchInstance | None = None
    for instance in in_order(policy, frozen):
        fits = not node.gpu_count or held + len(instance.gpus) <= node.gpu_count
        if not any(gpu in gpus_in_use for gpu in instance.gpus):
            if fits:
                return instance
        elif fallback is None and node.migrates and held + len(instance.gpus) <= node.gpu_count:
            fallback = instance
    return fallback

"""Early dispatch: requests that wait at a node before a slot there is free.

When a slot becomes free, the next request is there already and need not come through scheduler and network first.
`Dispatcher(early_dispatch=...)` switches it on; `scripts/bench dispatch` measures it.
"""

from __future__ import annotations

from collections import OrderedDict

from agent.core.dispatch.index import InstanceIndex
from agent.core.dispatch.model import DispatchInstance, NodeEntry, Request
from agent.core.types import MILLISECOND_NS, SECOND_NS

MIN_SLOTS = 4
"""A node with fewer awake slots of the function gets none: requests that wait there may be lost if the agent dies."""
MAX_NODES = 8
"""A function awake on more nodes gets none: its queue would have to be longer than the slots of all other nodes."""
DISPATCH_LATENCY_NS = 4 * MILLISECOND_NS
"""From the end of a request to the arrival of the next at its node: usually 1 ms, this much on a busy host. (With half
of it, 1 % of the freed slots found no request waiting: measured on two cores with requests of 20 ms.)"""
PAUSE_NS = SECOND_NS // 10
"""A node that refused an early dispatch gets none for this long."""


class EarlyDispatches:
    """The requests of one function that wait at nodes, by node in the order of their dispatch."""

    def __init__(self) -> None:
        self.count = 0
        self._at: dict[str, OrderedDict[int, Request]] = {}

    def oldest_at(self, node: NodeEntry) -> Request | None:
        """The request that the node's agent gives the next free slot to."""
        there = self._at.get(node.name)
        return next(iter(there.values())) if there else None

    def add(self, request: Request, node: NodeEntry) -> None:
        request.early_node = node
        self._at.setdefault(node.name, OrderedDict())[request.request] = request
        self.count += 1

    def remove(self, request: Request) -> NodeEntry:
        """Take out `request` and return its node."""
        node, request.early_node = request.early_node, None
        assert node is not None
        there = self._at[node.name]
        del there[request.request]
        if not there:
            del self._at[node.name]
        self.count -= 1
        return node

    def next_instance(self, queued: int, index: InstanceIndex, service_ns: float, at: int) -> DispatchInstance | None:
        """Find a node to dispatch the oldest of `queued` requests to early; return an awake instance there, or None.

        Early dispatch binds the request to that node. So there are only as many as make up for the latency (`_limit`),
        none while an instance wakes, and at least as many requests stay queued as other nodes have slots.
        """
        if not queued or index.waking or len(index.awake_by_node) > MAX_NODES:
            return None
        for name, awake in index.awake_by_node.items():
            instance = next(iter(awake.values()))
            slots = len(awake) * instance.concurrency
            if len(self._at.get(name, ())) >= _limit(slots, service_ns):
                continue
            if queued > index.awake_slots - slots and at >= instance.node.no_early_until_ns:
                return instance
        return None


def _limit(slots: int, service_ns: float) -> int:
    """How many may wait at a node with `slots`: one, plus twice the slots that become free within the latency (they do
    so unevenly), but at most half of `slots`. One for requests of a second, half of `slots` for a few milliseconds."""
    if slots < MIN_SLOTS:
        return 0
    freed = slots * DISPATCH_LATENCY_NS / service_ns if service_ns else 0.0
    return min(slots // 2, 1 + round(2 * freed))

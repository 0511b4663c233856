"""The dispatcher's index of instances: which one has a free slot, which one can be woken.

Each function's `InstanceIndex` sorts its instances by `Availability`, so that the next one is found without scanning
all others: awake ones in buckets by outstanding requests, frozen ones by node, in a heap by predicted wake time. A
change is O(1) or O(log nodes), plus a search among the function's frozen instances of one node. No clock, no I/O.
"""

from __future__ import annotations

from collections import OrderedDict
from heapq import heapify, heappop, heappush

from agent.core.dispatch.model import AVERAGE_WEIGHT, Availability, DispatchInstance, NodeEntry
from agent.core.dispatch.policy import in_order, wake_candidate
from agent.core.types import SECOND_NS, DispatchPolicy, InstanceState

WAKE_UNKNOWN_NS = SECOND_NS
"""Predicted wake time of a function on a node for which there is neither a measurement nor an estimate."""


class InstanceIndex:
    """The instances of one function, by availability."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.policy = DispatchPolicy.PACK
        self.count = 0
        self.lost = 0
        self.awake_slots = 0
        self.waking = 0
        self.waking_slots = 0
        self.direct_wakes = 0  # direct wakes in progress
        self.awake_by_node: dict[str, dict[str, DispatchInstance]] = {}
        self._buckets: dict[int, OrderedDict[str, DispatchInstance]] = {}
        self._occupied = 0  # bit k is set while bucket k has an instance
        self._freezing: OrderedDict[str, DispatchInstance] = OrderedDict()
        self._frozen: dict[str, OrderedDict[str, DispatchInstance]] = {}
        self._gpus_held: dict[str, int] = {}  # number of GPUs of awake, freezing and waking instances, by node
        self._gpu_holders: dict[str, int] = {}  # number of those instances, by GPU
        self._wake_ns: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._heap_entry: dict[str, tuple[float, NodeEntry]] = {}  # by node; other entries of the heap are stale

    # ---- choosing ---------------------------------------------------------------------------------------------

    def free(self) -> DispatchInstance | None:
        """The instance for the next request: awake with the fewest requests, else in a freeze that can be cancelled."""
        if self._occupied:
            fewest = (self._occupied & -self._occupied).bit_length() - 1
            return next(in_order(self.policy, self._buckets[fewest]))
        return next(iter(self._freezing.values()), None)

    def wake_candidate(self) -> DispatchInstance | None:
        """The frozen instance that would be awake first; None if its wake would only freeze another of the function."""
        heap = self._heap
        while heap:
            cost, name = heap[0]
            entry = self._heap_entry.get(name)
            if entry is None or entry[0] != cost:
                heappop(heap)
                continue
            return self._candidate_on(entry[1])
        return None

    def direct_wake_candidate(self) -> DispatchInstance | None:
        """The frozen instance that a lone request may be dispatched to: no other of the function could serve it sooner.

        That is: no instance of the function is awake, waking or in a freeze that can be cancelled, and all instances
        on its GPUs are frozen, so that its wake starts at once.
        """
        if self.awake_slots or self.waking or self._freezing:
            return None
        instance = self.wake_candidate()
        if instance is None or instance.outstanding >= instance.concurrency:
            return None
        return None if any(gpu in instance.node.gpu_users for gpu in instance.gpus) else instance

    def predicted_wake_ns(self, node: NodeEntry) -> float:
        """The function's average wake time on the node, multiplied by (1 + wakes in progress there)."""
        return self._wake_ns.get(node.name, WAKE_UNKNOWN_NS) * (1 + node.wakes)

    def _candidate_on(self, node: NodeEntry) -> DispatchInstance | None:
        frozen = self._frozen.get(node.name)
        if not frozen:
            return None
        return wake_candidate(self.policy, frozen, node, self._gpus_held.get(node.name, 0), self._gpu_holders)

    # ---- changing ---------------------------------------------------------------------------------------------

    def reclassify(self, instance: DispatchInstance) -> None:
        """File `instance` again after any change; an awake one goes to the end of its bucket (most recently used)."""
        uses_gpu = instance.state is not InstanceState.FROZEN or instance.wake_requested_ns >= 0
        if uses_gpu is not instance.uses_gpu:
            _count_gpu_user(instance, uses_gpu)
        availability = instance.classify()
        if availability is not instance.availability:
            self._leave(instance)
            self._enter(instance, availability)
        elif availability is Availability.AWAKE:
            self._leave_bucket(instance)
            self._enter_bucket(instance)

    def remove(self, instance: DispatchInstance) -> None:
        self._leave(instance)
        instance.availability = Availability.NONE
        if instance.uses_gpu:
            _count_gpu_user(instance, False)

    def resize(self, instance: DispatchInstance, concurrency: int, gpus: tuple[str, ...]) -> None:
        """Change the concurrency and the GPUs of `instance`, and the sums here that include them."""
        availability, uses_gpu = instance.availability, instance.uses_gpu
        self.remove(instance)
        instance.concurrency, instance.gpus = concurrency, gpus
        if uses_gpu:
            _count_gpu_user(instance, True)
        self._enter(instance, availability)

    def clear_wake(self, instance: DispatchInstance) -> None:
        """Record that its wake is no longer in progress. The caller has to call `reclassify` afterwards."""
        if instance.direct_wake >= 0 and instance.availability is Availability.WAKING:
            self.direct_wakes -= 1
        instance.wake_requested_ns = instance.direct_wake = -1

    def record_wake(self, node: NodeEntry, took_ns: float) -> None:
        """Add a wake on `node` that took `took_ns` to the average."""
        before = self._wake_ns.get(node.name)
        self._wake_ns[node.name] = took_ns if before is None else before + AVERAGE_WEIGHT * (took_ns - before)
        self.reindex(node)

    def estimate_wake(self, node: NodeEntry, estimate_ns: int) -> None:
        """Start the average with the agent's first estimate, unless a wake on the node has been measured already."""
        if estimate_ns > 0 and node.name not in self._wake_ns:
            self._wake_ns[node.name] = float(estimate_ns)
            self.reindex(node)

    def reindex(self, node: NodeEntry) -> None:
        """Renew the node's entry in the heap: its predicted wake time or its candidate may have changed."""
        if self._candidate_on(node) is None:
            self._heap_entry.pop(node.name, None)
            return
        cost = self.predicted_wake_ns(node)
        entry = self._heap_entry.get(node.name)
        if entry is not None and entry[0] == cost:
            return
        self._heap_entry[node.name] = (cost, node)
        heappush(self._heap, (cost, node.name))
        if len(self._heap) > 4 * len(self._heap_entry) + 64:
            self._heap = [(entry[0], name) for name, entry in self._heap_entry.items()]
            heapify(self._heap)

    def _enter(self, instance: DispatchInstance, availability: Availability) -> None:
        instance.availability = availability
        match availability:
            case Availability.AWAKE:
                self.awake_slots += instance.concurrency
                self.awake_by_node.setdefault(instance.node.name, {})[instance.uid] = instance
                self._count_gpus(instance, 1)
                self._enter_bucket(instance)
            case Availability.FREEZING:
                self._freezing[instance.uid] = instance
                self._count_gpus(instance, 1)
            case Availability.WAKING:
                self.waking += 1
                self.waking_slots += instance.concurrency
                self.direct_wakes += instance.direct_wake >= 0
                self._count_gpus(instance, 1)
            case Availability.FROZEN:
                self._frozen.setdefault(instance.node.name, OrderedDict())[instance.uid] = instance
                instance.node.frozen_in[self.function] = self
                self.reindex(instance.node)
            case Availability.LOST:
                self.lost += 1
            case Availability.NONE:
                pass

    def _leave(self, instance: DispatchInstance) -> None:
        match instance.availability:
            case Availability.AWAKE:
                self.awake_slots -= instance.concurrency
                awake = self.awake_by_node[instance.node.name]
                del awake[instance.uid]
                if not awake:
                    del self.awake_by_node[instance.node.name]
                self._leave_bucket(instance)
                self._count_gpus(instance, -1)
            case Availability.FREEZING:
                del self._freezing[instance.uid]
                self._count_gpus(instance, -1)
            case Availability.WAKING:
                self.waking -= 1
                self.waking_slots -= instance.concurrency
                self.direct_wakes -= instance.direct_wake >= 0
                self._count_gpus(instance, -1)
            case Availability.FROZEN:
                group = self._frozen[instance.node.name]
                del group[instance.uid]
                if not group:
                    del self._frozen[instance.node.name]
                    instance.node.frozen_in.pop(self.function, None)
                self.reindex(instance.node)
            case Availability.LOST:
                self.lost -= 1
            case Availability.NONE:
                pass

    def _enter_bucket(self, instance: DispatchInstance) -> None:
        outstanding = instance.leased + instance.external_in_flight
        if outstanding >= instance.concurrency:
            instance.bucket = -1
            return
        bucket = self._buckets.get(outstanding)
        if bucket is None:
            bucket = self._buckets[outstanding] = OrderedDict()
        bucket[instance.uid] = instance
        instance.bucket = outstanding
        self._occupied |= 1 << outstanding

    def _leave_bucket(self, instance: DispatchInstance) -> None:
        if instance.bucket < 0:
            return
        bucket = self._buckets[instance.bucket]
        del bucket[instance.uid]
        if not bucket:
            self._occupied &= ~(1 << instance.bucket)
        instance.bucket = -1

    def _count_gpus(self, instance: DispatchInstance, sign: int) -> None:
        if not instance.gpus:
            return
        name = instance.node.name
        self._gpus_held[name] = self._gpus_held.get(name, 0) + sign * len(instance.gpus)
        if not self._gpus_held[name]:
            del self._gpus_held[name]
        for gpu in instance.gpus:
            self._gpu_holders[gpu] = self._gpu_holders.get(gpu, 0) + sign
            if not self._gpu_holders[gpu]:
                del self._gpu_holders[gpu]
        if name in self._frozen:
            self.reindex(instance.node)


def _count_gpu_user(instance: DispatchInstance, uses_gpu: bool) -> None:
    """Add `instance` to the users of its GPUs, or take it out."""
    instance.uses_gpu = uses_gpu
    users = instance.node.gpu_users
    for gpu in instance.gpus:
        users[gpu] = users.get(gpu, 0) + (1 if uses_gpu else -1)
        if not users[gpu]:
            del users[gpu]

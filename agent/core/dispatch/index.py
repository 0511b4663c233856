"""Who has a free slot, who could be woken: the dispatcher's index of instances.

One `InstanceIndex` per function keeps its instances sorted by what they are good for right now (`Availability`), so
that the next instance is found without looking at the others: awake ones in buckets by outstanding leases, frozen ones
in a heap of nodes by predicted wake. Every change is O(1) or O(log nodes); none grows with the number of instances.

Mutable and pure: no clock, no I/O. Only `dispatch.Dispatcher` calls it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from agent.core.dispatch.events import InstanceReported
from agent.core.types import SECOND_NS, DispatchPolicy, InstanceState

if TYPE_CHECKING:
    from agent.core.dispatch.queue import Request

EXTERNAL_AFTER_NS = SECOND_NS
WAKE_UNKNOWN_NS = SECOND_NS
"""Predicted wake of a function on a node where none has been seen yet."""
AVERAGE_WEIGHT = 0.2
"""Share of the newest sample in a moving average."""


class NodeStanding(Enum):
    """What the scheduler thinks of a node. Only READY gets new work."""

    READY = "READY"
    DRAINING = "DRAINING"
    SUSPECT = "SUSPECT"
    LOST = "LOST"


class Availability(Enum):
    """What an instance is good for: take a request now, take one by cancelling its freeze, be woken, or nothing; LOST
    is nothing that waiting would help, until its node is heard again."""

    NONE = "NONE"
    LOST = "LOST"
    AWAKE = "AWAKE"
    FREEZING = "FREEZING"
    FROZEN = "FROZEN"
    WAKING = "WAKING"


@dataclass(slots=True, eq=False)
class NodeEntry:
    """A node as the dispatcher sees it. `gpu_count` 0 = not said: no limit. `wakes` = wakes under way, of anyone.

    `migrates`: a frozen instance may wake on another GPU than the one it froze on. `stirring`: by GPU, the instances of
    any function that share it and do anything but sleep; a wake on any other GPU waits for nobody.
    """

    name: str
    standing: NodeStanding = NodeStanding.READY
    epoch: int = 0
    gpu_count: int = 0
    migrates: bool = True
    wakes: int = 0
    slots: dict[str, DispatchInstance] = field(default_factory=dict)
    aside: dict[str, DispatchInstance] = field(default_factory=dict)
    frozen_in: dict[str, InstanceIndex] = field(default_factory=dict)
    stirring: dict[str, int] = field(default_factory=dict)
    no_ahead_until_ns: int = 0

    def recall(self, at: int) -> list[DispatchInstance]:
        """The node is heard: what was set aside may be tried again, but for those whose time has not come."""
        back = [slot for slot in self.aside.values() if at >= slot.aside_until_ns]
        for slot in back:
            slot.aside = False
            del self.aside[slot.uid]
        return back


@dataclass(slots=True, eq=False)
class DispatchInstance:
    """One instance. `leased` slots are ours, `foreign` are requests of others seen by its agent.

    `aside`: it refused a request or a wake and gets nothing until its node is heard again, after a failed wake not
    before `aside_until_ns`. `retired`: it is being drained. `woken_ns`, `wake_took_ns`: the last wake we asked for, for
    the answer's x-hibernode-wake-ms. `bound`: the request that was sent to it as it slept, whose wake is under way; -1
    for none. `holders`: the requests of the leases. `term` counts how often its leases ended with its node; those of an
    earlier term are void.
    """

    uid: str
    function: str
    node: NodeEntry
    concurrency: int
    state: InstanceState
    cancellable: bool = False
    healthy: bool = True
    gpus: tuple[str, ...] = ()
    leased: int = 0
    holders: dict[int, Request] = field(default_factory=dict)
    term: int = 0
    foreign: int = 0
    aside: bool = False
    aside_until_ns: int = 0
    failed_wakes: int = 0
    retired: bool = False
    wake_asked_ns: int = -1
    woken_ns: int = -1
    wake_took_ns: int = 0
    bound: int = -1
    changed_ns: int = 0
    place: Availability = Availability.NONE
    bucket: int = -1
    stirs: bool = False

    def take_in(self, event: InstanceReported, at: int) -> None:
        """What its agent says of it. More in flight there than we have leases counts only where no lease has changed
        for `EXTERNAL_AFTER_NS`: younger ones race with the report."""
        self.state, self.cancellable, self.healthy = event.state, event.cancellable, event.healthy
        quiet = at - self.changed_ns >= EXTERNAL_AFTER_NS or not self.changed_ns
        self.foreign = max(0, event.in_flight - self.leased) if quiet else 0
        if event.state is not InstanceState.FROZEN or at >= self.aside_until_ns:
            self.aside = False
            self.node.aside.pop(self.uid, None)

    def fitting_place(self) -> Availability:
        """Where it belongs. Late binding: nothing is bound to an instance that is not awake or about to be again."""
        if self.node.standing is NodeStanding.LOST:
            return Availability.LOST
        if self.node.standing is not NodeStanding.READY or self.aside or self.retired or not self.healthy:
            return Availability.NONE
        match self.state:
            case InstanceState.RUNNING:
                return Availability.AWAKE
            case InstanceState.FREEZING if self.cancellable:
                return Availability.FREEZING if self.leased + self.foreign < self.concurrency else Availability.AWAKE
            case InstanceState.WAITING_GPU | InstanceState.RESTORING:
                return Availability.WAKING
            case InstanceState.FROZEN:
                return Availability.WAKING if self.wake_asked_ns >= 0 else Availability.FROZEN
            case InstanceState.FREEZING:
                return Availability.WAKING if self.wake_asked_ns >= 0 else Availability.NONE
            case _:
                return Availability.NONE


class InstanceIndex:
    """The instances of one function, by place."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.policy = DispatchPolicy.PACK
        self.count = 0
        self.lost = 0
        self.awake_slots = 0
        self.waking = 0
        self.waking_slots = 0
        self.bound = 0  # requests that wait at waking instances: to them they are queued
        self.awake_on: dict[str, dict[str, DispatchInstance]] = {}
        self._buckets: dict[int, OrderedDict[str, DispatchInstance]] = {}
        self._occupied = 0  # bit k is set while bucket k has an instance
        self._freezing: OrderedDict[str, DispatchInstance] = OrderedDict()
        self._frozen: dict[str, OrderedDict[str, DispatchInstance]] = {}
        self._holding: dict[str, int] = {}  # GPUs that awake and waking instances hold, by node
        self._gpu_holders: dict[str, int] = {}  # the same by GPU
        self._wake_ns: dict[str, float] = {}
        self._heap: list[tuple[float, str]] = []
        self._listed: dict[str, tuple[float, NodeEntry]] = {}  # the entry of the heap that counts, by node

    # ---- choosing ---------------------------------------------------------------------------------------------

    def free(self) -> DispatchInstance | None:
        """The instance for the next request: awake with the fewest outstanding, else a freeze that can be undone."""
        if self._occupied:
            lowest = (self._occupied & -self._occupied).bit_length() - 1
            return self._tie(self._buckets[lowest])
        return next(iter(self._freezing.values()), None)

    def wakeable(self) -> DispatchInstance | None:
        """The frozen instance that would be awake first, or None where a wake would only rob the function itself."""
        heap = self._heap
        while heap:
            cost, name = heap[0]
            listed = self._listed.get(name)
            if listed is None or listed[0] != cost:
                heappop(heap)
                continue
            return self._candidate(listed[1])
        return None

    def bindable(self) -> DispatchInstance | None:
        """The instance that a lone request may be sent to as it sleeps: nothing of the function could free before it.

        Nothing is awake, waking or to be had by cancelling a freeze, and whoever shares the GPUs of the one that would
        be woken sleeps as well, so that its wake begins at once.
        """
        if self.awake_slots or self.waking or self._freezing:
            return None
        slot = self.wakeable()
        if slot is None or slot.leased + slot.foreign >= slot.concurrency:
            return None
        return None if any(gpu in slot.node.stirring for gpu in slot.gpus) else slot

    def predicted_wake_ns(self, node: NodeEntry) -> float:
        """Moving average of wakes of this function on the node, once for itself and once per wake queued there."""
        return self._wake_ns.get(node.name, WAKE_UNKNOWN_NS) * (1 + node.wakes)

    def _tie(self, bucket: OrderedDict[str, DispatchInstance]) -> DispatchInstance:
        """A bucket is in the order of last use: its end was busy last (pack), its start rested longest (spread)."""
        keys = reversed(bucket) if self.policy is DispatchPolicy.PACK else iter(bucket)
        return bucket[next(keys)]

    def _candidate(self, node: NodeEntry) -> DispatchInstance | None:
        """The frozen instance to wake on `node`: one whose GPUs this function does not hold already.

        Where every GPU of the node works for this function, one more wake would only put an awake instance of the
        same function to sleep: none. The agent decides about the GPUs of other functions (it preempts by age).
        """
        group = self._frozen.get(node.name)
        if not group:
            return None
        held = self._holding.get(node.name, 0)
        slots: Iterator[DispatchInstance] = (
            reversed(group.values()) if self.policy is DispatchPolicy.PACK else iter(group.values())
        )
        fallback: DispatchInstance | None = None
        for slot in slots:
            if not slot.gpus or not any(gpu in self._gpu_holders for gpu in slot.gpus):
                if not node.gpu_count or held + len(slot.gpus) <= node.gpu_count:
                    return slot
            elif fallback is None and node.migrates and held + len(slot.gpus) <= node.gpu_count:
                fallback = slot
        return fallback

    # ---- changing ---------------------------------------------------------------------------------------------

    def settle(self, slot: DispatchInstance) -> None:
        """Put `slot` where it belongs after any change; it goes to the end of its bucket (most recently used)."""
        stirs = slot.state is not InstanceState.FROZEN or slot.wake_asked_ns >= 0
        if stirs is not slot.stirs:
            _stir(slot, stirs)
        place = slot.fitting_place()
        if place is not slot.place:
            self._leave(slot)
            self._enter(slot, place)
        elif place is Availability.AWAKE:
            self._unbucket(slot)
            self._bucket(slot)

    def remove(self, slot: DispatchInstance) -> None:
        """Forget `slot`."""
        self._leave(slot)
        slot.place = Availability.NONE
        if slot.stirs:
            _stir(slot, False)

    def regear(self, slot: DispatchInstance, concurrency: int, gpus: tuple[str, ...]) -> None:
        """Change what the counts are made of; the slot is out of them meanwhile."""
        place, stirs = slot.place, slot.stirs
        self.remove(slot)
        slot.concurrency, slot.gpus = concurrency, gpus
        if stirs:
            _stir(slot, True)
        self._enter(slot, place)

    def learn_wake(self, node: NodeEntry, took_ns: float) -> None:
        """A wake on `node` took so long."""
        before = self._wake_ns.get(node.name)
        self._wake_ns[node.name] = took_ns if before is None else before + AVERAGE_WEIGHT * (took_ns - before)
        self.relist(node)

    def expect_wake(self, node: NodeEntry, estimate_ns: int) -> None:
        """What the agent predicts counts until we have measured ourselves."""
        if estimate_ns > 0 and node.name not in self._wake_ns:
            self._wake_ns[node.name] = float(estimate_ns)
            self.relist(node)

    def relist(self, node: NodeEntry) -> None:
        """Renew the node's entry in the heap of wakes: its cost or its room changed."""
        candidate = self._candidate(node)
        if candidate is None:
            self._listed.pop(node.name, None)
            return
        cost = self.predicted_wake_ns(node)
        listed = self._listed.get(node.name)
        if listed is not None and listed[0] == cost:
            return
        self._listed[node.name] = (cost, node)
        heappush(self._heap, (cost, node.name))
        if len(self._heap) > 4 * len(self._listed) + 64:
            self._heap = [(entry[0], name) for name, entry in self._listed.items()]
            heapify(self._heap)

    def _enter(self, slot: DispatchInstance, place: Availability) -> None:
        slot.place = place
        match place:
            case Availability.AWAKE:
                self.awake_slots += slot.concurrency
                self.awake_on.setdefault(slot.node.name, {})[slot.uid] = slot
                self._hold(slot, 1)
                self._bucket(slot)
            case Availability.FREEZING:
                self._freezing[slot.uid] = slot
                self._hold(slot, 1)
            case Availability.WAKING:
                self.waking += 1
                self.waking_slots += slot.concurrency
                self.bound += slot.bound >= 0
                self._hold(slot, 1)
            case Availability.FROZEN:
                self._frozen.setdefault(slot.node.name, OrderedDict())[slot.uid] = slot
                slot.node.frozen_in[self.function] = self
                self.relist(slot.node)
            case Availability.LOST:
                self.lost += 1
            case Availability.NONE:
                pass

    def _leave(self, slot: DispatchInstance) -> None:
        match slot.place:
            case Availability.AWAKE:
                self.awake_slots -= slot.concurrency
                awake = self.awake_on[slot.node.name]
                del awake[slot.uid]
                if not awake:
                    del self.awake_on[slot.node.name]
                self._unbucket(slot)
                self._hold(slot, -1)
            case Availability.FREEZING:
                del self._freezing[slot.uid]
                self._hold(slot, -1)
            case Availability.WAKING:
                self.waking -= 1
                self.waking_slots -= slot.concurrency
                self.bound -= slot.bound >= 0
                self._hold(slot, -1)
            case Availability.FROZEN:
                group = self._frozen[slot.node.name]
                del group[slot.uid]
                if not group:
                    del self._frozen[slot.node.name]
                    slot.node.frozen_in.pop(self.function, None)
                self.relist(slot.node)
            case Availability.LOST:
                self.lost -= 1
            case Availability.NONE:
                pass

    def _bucket(self, slot: DispatchInstance) -> None:
        outstanding = slot.leased + slot.foreign
        if outstanding >= slot.concurrency:
            slot.bucket = -1
            return
        bucket = self._buckets.get(outstanding)
        if bucket is None:
            bucket = self._buckets[outstanding] = OrderedDict()
        bucket[slot.uid] = slot
        slot.bucket = outstanding
        self._occupied |= 1 << outstanding

    def _unbucket(self, slot: DispatchInstance) -> None:
        if slot.bucket < 0:
            return
        bucket = self._buckets[slot.bucket]
        del bucket[slot.uid]
        if not bucket:
            self._occupied &= ~(1 << slot.bucket)
        slot.bucket = -1

    def _hold(self, slot: DispatchInstance, sign: int) -> None:
        if not slot.gpus:
            return
        name = slot.node.name
        self._holding[name] = self._holding.get(name, 0) + sign * len(slot.gpus)
        if not self._holding[name]:
            del self._holding[name]
        for gpu in slot.gpus:
            self._gpu_holders[gpu] = self._gpu_holders.get(gpu, 0) + sign
            if not self._gpu_holders[gpu]:
                del self._gpu_holders[gpu]
        if name in self._frozen:
            self.relist(slot.node)


def _stir(slot: DispatchInstance, stirs: bool) -> None:
    """Count `slot` among those who use, or are about to use, the GPUs it shares; or no longer."""
    slot.stirs = stirs
    stirring = slot.node.stirring
    for gpu in slot.gpus:
        stirring[gpu] = stirring.get(gpu, 0) + (1 if stirs else -1)
        if not stirring[gpu]:
            del stirring[gpu]

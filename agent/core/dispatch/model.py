"""What the dispatcher knows: requests, nodes and instances. Mutable records, without clock or I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from agent.core.dispatch.events import InstanceReported
from agent.core.types import SECOND_NS, InstanceState

EXTERNAL_AFTER_NS = SECOND_NS
"""Requests in a report beyond the instance's leases count as external if no lease has changed for this long."""
AVERAGE_WEIGHT = 0.2
"""Weight of the newest sample in a moving average."""


class NodeStanding(Enum):
    """What the scheduler thinks of a node. Only READY gets new work."""

    READY = "READY"
    DRAINING = "DRAINING"
    SUSPECT = "SUSPECT"
    LOST = "LOST"


class Availability(Enum):
    """What an instance can do for the next request.

    - AWAKE: take it now, if a slot is free; FREEZING: take it, which cancels the freeze.
    - FROZEN: be woken; WAKING: take it once awake.
    - NONE: nothing for now; LOST: its node is lost, so no request waits for it.
    """

    NONE = "NONE"
    LOST = "LOST"
    AWAKE = "AWAKE"
    FREEZING = "FREEZING"
    FROZEN = "FROZEN"
    WAKING = "WAKING"


class WakeIndex(Protocol):
    """A function's index, which sorts the nodes of its frozen instances by predicted wake time."""

    def reindex(self, node: NodeEntry) -> None:
        """Recompute the node's predicted wake time: something that it depends on has changed."""


@dataclass(slots=True, eq=False)
class NodeEntry:
    """A node.

    - `gpu_count`: 0 if unknown, and then it is no limit. `migrates`: a frozen instance can wake on another GPU.
    - `wakes`: wakes in progress, of all functions.
    - `quarantined`: its quarantined instances. `frozen_in`: indexes of the functions with frozen instances here.
    - `gpu_users`: by GPU, how many of its instances are waking or not frozen. A wake on any other GPU starts at once.
    - `no_early_until_ns`: until then it gets no early dispatch.
    """

    name: str
    standing: NodeStanding = NodeStanding.READY
    epoch: int = 0
    gpu_count: int = 0
    migrates: bool = True
    wakes: int = 0
    instances: dict[str, DispatchInstance] = field(default_factory=dict)
    quarantined: dict[str, DispatchInstance] = field(default_factory=dict)
    frozen_in: dict[str, WakeIndex] = field(default_factory=dict)
    gpu_users: dict[str, int] = field(default_factory=dict)
    no_early_until_ns: int = 0

    def end_quarantines(self, at: int) -> list[DispatchInstance]:
        """Release the instances whose quarantine is over now that the node has reported, and return them."""
        released = [found for found in self.quarantined.values() if at >= found.quarantined_until_ns]
        for instance in released:
            instance.quarantined = False
            del self.quarantined[instance.uid]
        return released

    def count_wakes(self, change: int) -> None:
        """Add `change` to the wakes in progress; the more there are, the longer each takes."""
        self.wakes += change
        self.reindex()

    def reindex(self) -> None:
        """Recompute the predicted wake time for every function with frozen instances here."""
        for index in list(self.frozen_in.values()):
            index.reindex(self)


@dataclass(slots=True, eq=False)
class Request:
    """A request, until its answer: with a lease of `instance`, dispatched early to `early_node`, or queued here."""

    request: int
    function: str
    order: int
    arrived_ns: int
    deadline_ns: int
    attempts: int = 0
    instance: DispatchInstance | None = None
    early_node: NodeEntry | None = None
    lease_epoch: int = 0
    leased_ns: int = 0


@dataclass(slots=True, eq=False)
class DispatchInstance:
    """An instance with `concurrency` slots.

    - `leased`: slots that the dispatcher has leased; `holders`: the requests that hold them.
    - `lease_epoch`: counts the losses and restarts of its agent; leases of an earlier epoch are void.
    - `external_in_flight`: requests without a lease that its agent has reported.
    - `quarantined`: it refused a request or a wake and gets nothing until a report of it or its node at
      `quarantined_until_ns` or later, or a report that it is not frozen. `retired`: it is about to be drained.
    - `wake_requested_ns`: when its wake in progress was requested; -1 for none.
    - `direct_wake`: the request that was dispatched to wake it; -1 for none.
    - `woken_ns`, `wake_took_ns`: end and duration of its last wake, for the answer's x-hibernode-wake-ms.
    - `availability`, `bucket` and `uses_gpu`: where the index has filed it.
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
    lease_epoch: int = 0
    external_in_flight: int = 0
    quarantined: bool = False
    quarantined_until_ns: int = 0
    failed_wakes: int = 0
    retired: bool = False
    wake_requested_ns: int = -1
    woken_ns: int = -1
    wake_took_ns: int = 0
    direct_wake: int = -1
    changed_ns: int = 0
    availability: Availability = Availability.NONE
    bucket: int = -1
    uses_gpu: bool = False

    @property
    def outstanding(self) -> int:
        """Its requests, with and without a lease."""
        return self.leased + self.external_in_flight

    def apply_report(self, event: InstanceReported, at: int) -> None:
        """Apply its agent's report. Requests in flight beyond the leases count only if no lease has changed for
        `EXTERNAL_AFTER_NS`: the report may not yet contain a more recent change."""
        self.state, self.cancellable, self.healthy = event.state, event.cancellable, event.healthy
        quiet = at - self.changed_ns >= EXTERNAL_AFTER_NS or not self.changed_ns
        self.external_in_flight = max(0, event.in_flight - self.leased) if quiet else 0
        if event.state is not InstanceState.FROZEN or at >= self.quarantined_until_ns:
            self.quarantined = False
            self.node.quarantined.pop(self.uid, None)

    def classify(self) -> Availability:
        """Derive its availability from its state, its node and a wake in progress."""
        if self.node.standing is NodeStanding.LOST:
            return Availability.LOST
        if self.node.standing is not NodeStanding.READY or self.quarantined or self.retired or not self.healthy:
            return Availability.NONE
        match self.state:
            case InstanceState.RUNNING:
                return Availability.AWAKE
            case InstanceState.FREEZING if self.cancellable:
                return Availability.FREEZING if self.outstanding < self.concurrency else Availability.AWAKE
            case InstanceState.WAITING_GPU | InstanceState.RESTORING:
                return Availability.WAKING
            case InstanceState.FROZEN:
                return Availability.WAKING if self.wake_requested_ns >= 0 else Availability.FROZEN
            case InstanceState.FREEZING:
                return Availability.WAKING if self.wake_requested_ns >= 0 else Availability.NONE
            case _:
                return Availability.NONE

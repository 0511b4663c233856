"""What the dispatcher knows: requests, nodes and instances. Mutable records without rules, clock or I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from agent.core.dispatch.events import InstanceReported
from agent.core.types import SECOND_NS, InstanceState

EXTERNAL_AFTER_NS = SECOND_NS
"""A report of more requests in flight than we have leases counts if no lease changed for this long before it."""
AVERAGE_WEIGHT = 0.2
"""Share of the newest sample in a moving average."""


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
    - NONE: nothing for now; LOST: its node is lost, so it is no capacity to wait for.
    """

    NONE = "NONE"
    LOST = "LOST"
    AWAKE = "AWAKE"
    FREEZING = "FREEZING"
    FROZEN = "FROZEN"
    WAKING = "WAKING"


class WakeIndex(Protocol):
    """A function's index, which sorts the nodes of its frozen instances by predicted wake."""

    def reindex(self, node: NodeEntry) -> None:
        """Recompute the node's predicted wake: something it depends on has changed."""


@dataclass(slots=True, eq=False)
class NodeEntry:
    """A node.

    - `gpu_count`: 0 if unknown, then it sets no limit. `migrates`: a frozen instance can wake on another GPU.
    - `wakes`: wakes in progress, of all functions.
    - `quarantined`: its quarantined instances. `frozen_in`: indexes of the functions with frozen instances here.
    - `gpu_users`: by GPU, how many instances that share it are not frozen. A wake on any other GPU starts at once.
    - `no_early_until_ns`: it gets no early dispatch before.
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
        """The node has reported: release the instances whose quarantine is over, and return them."""
        released = [found for found in self.quarantined.values() if at >= found.quarantined_until_ns]
        for instance in released:
            instance.quarantined = False
            del self.quarantined[instance.uid]
        return released

    def count_wakes(self, change: int) -> None:
        """`change` more wakes are in progress, so that any other takes longer."""
        self.wakes += change
        self.reindex()

    def reindex(self) -> None:
        """What a wake here depends on has changed."""
        for index in list(self.frozen_in.values()):
            index.reindex(self)


@dataclass(slots=True, eq=False)
class Request:
    """A request from arrival to answer: leased on `instance`, dispatched early to `early_node`, or queued here."""

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

    - `leased`: slots that our requests hold; `holders`: those requests.
    - `lease_epoch`: counts how often all leases ended with the node; leases of an earlier epoch are void.
    - `external_in_flight`: requests of others that its agent sees there.
    - `quarantined`: it refused a request or a wake and gets nothing until a report of it or its node at
      `quarantined_until_ns` or later, or a report that it is not frozen. `retired`: it is about to be drained.
    - `wake_requested_ns`: when its wake in progress was requested; -1 for none.
    - `direct_wake`: the request whose dispatch is that wake; -1 for none.
    - `woken_ns`, `wake_took_ns`: our last wake, for the answer's x-hibernode-wake-ms.
    - `availability`, `bucket` and `uses_gpu`: where the index has it.
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
        """Requests it has, ours and others."""
        return self.leased + self.external_in_flight

    def apply_report(self, event: InstanceReported, at: int) -> None:
        """Take over its agent's report. Its requests in flight count only if no lease has changed for
        `EXTERNAL_AFTER_NS`: a younger change races with the report."""
        self.state, self.cancellable, self.healthy = event.state, event.cancellable, event.healthy
        quiet = at - self.changed_ns >= EXTERNAL_AFTER_NS or not self.changed_ns
        self.external_in_flight = max(0, event.in_flight - self.leased) if quiet else 0
        if event.state is not InstanceState.FROZEN or at >= self.quarantined_until_ns:
            self.quarantined = False
            self.node.quarantined.pop(self.uid, None)

    def classify(self) -> Availability:
        """Its availability by state, node and wake in progress."""
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

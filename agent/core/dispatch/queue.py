"""One function at the dispatcher: its rules, and the requests that wait for it, first in, first out.

A request that was dispatched and came back untouched is older than everything that still waits, so it is put in order
among those that came back, ahead of the rest. Pure; every operation is O(1) but the return of a refused request, which
is O(log n) in the requests that came back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from agent.core.dispatch.events import Dispatch, FunctionSet
from agent.core.dispatch.index import DispatchInstance, InstanceIndex, NodeEntry
from agent.core.types import MILLISECOND_NS, SECOND_NS

AHEAD_SLOTS = 4
"""With fewer awake slots of the function on a node nothing is sent ahead there: each one is one more that a dying agent
may take along."""
WAY_NS = 4 * MILLISECOND_NS
"""From the end of a request to the arrival of the next at its node, through scheduler and network: 1 ms usually, this
on a busy host. (On two cores, with requests of 20 ms, 1 % of the slots found nobody waiting there at half of it.)"""
AHEAD_PAUSE_NS = SECOND_NS // 10
"""After a node refused what was sent ahead nothing is sent there for so long."""
AHEAD_NODES = 8
"""Functions awake on more nodes send nothing ahead: their queue would have to be longer than all other nodes' slots."""

_BY_ORDER = attrgetter("order")


@dataclass(slots=True, eq=False)
class Request:
    """One request from arrival to answer: holding a lease on `slot`; else waiting, at the node `ahead` where it was
    sent there, here otherwise."""

    request: int
    function: str
    order: int
    arrived_ns: int
    deadline_ns: int
    attempts: int = 0
    slot: DispatchInstance | None = None
    ahead: NodeEntry | None = None
    term: int = 0
    leased_ns: int = 0


class RequestQueue:
    """The queue. `len()` is what `queueLength` bounds."""

    def __init__(self) -> None:
        self._fresh: OrderedDict[int, Request] = OrderedDict()
        self._returned: list[Request] = []

    def __len__(self) -> int:
        return len(self._fresh) + len(self._returned)

    def __iter__(self) -> Iterator[Request]:
        yield from self._returned
        yield from self._fresh.values()

    def append(self, request: Request) -> None:
        """A new request, younger than all."""
        self._fresh[request.request] = request

    def give_back(self, request: Request) -> None:
        """A request whose lease came to nothing."""
        insort(self._returned, request, key=_BY_ORDER)

    def pop(self) -> Request:
        """The oldest."""
        if self._returned:
            return self._returned.pop(0)
        return self._fresh.popitem(last=False)[1]

    def discard(self, request: Request) -> None:
        """Its client left or its deadline passed."""
        if self._fresh.pop(request.request, None) is None:
            at = bisect_left(self._returned, request.order, key=_BY_ORDER)
            del self._returned[at]


@dataclass(slots=True, eq=False)
class FunctionQueueState:
    """A function's rules, queue and instances. `known` is false for instances of something never deployed.

    `leases` are out now, and `lease_time_ns` is their sum over time up to `leases_since_ns`. `void_leases` ended with
    their node; their requests have not been answered yet. `ahead`: requests that wait at a node, by its name.
    """

    slots: InstanceIndex
    backlog: RequestQueue
    known: bool = False
    expects_instances: bool = False
    wake_factor: float = 0.0
    queue_length: int = 0
    service_ns: float = 0.0
    leases: int = 0
    lease_time_ns: int = 0
    leases_since_ns: int = 0
    void_leases: int = 0
    ahead: dict[str, OrderedDict[int, Request]] = field(default_factory=dict)
    ahead_count: int = 0

    def follow(self, event: FunctionSet) -> None:
        """It is deployed, with these rules."""
        self.known = True
        self.expects_instances = event.expects_instances
        self.slots.policy = event.policy
        self.wake_factor = event.wake_factor
        self.queue_length = event.queue_length

    def queue_state(self) -> QueueState:
        """For reports."""
        return QueueState(self.queued, self.slots.count, self.slots.awake_slots, self.slots.waking)

    def count_leases(self, change: int, at: int) -> None:
        """So many more leases from `at` on: accrue, then change."""
        self.lease_time_ns += self.leases * (at - self.leases_since_ns)
        self.leases_since_ns = at
        self.leases += change

    @property
    def queued(self) -> int:
        """Requests that wait, here or at a node."""
        return len(self.backlog) + self.ahead_count

    @property
    def forgettable(self) -> bool:
        """Neither deployed, nor is anything of it left."""
        return not (self.known or self.slots.count or self.leases or self.void_leases or self.queued)

    @property
    def hopeless(self) -> bool:
        """Nobody serves it, and nobody will: those on a lost node count no more than if there were none."""
        return self.slots.count == self.slots.lost and not self.expects_instances

    def to_wake(self) -> DispatchInstance | None:
        """The instance to wake next for those who wait. WakeCalls under way are capacity for them and for those who
        were sent to a waking instance: at most ceil(queued / concurrency) of them.

        With nobody awake or waking, always; else where waiting is predicted to take longer than waking.
        """
        slots = self.slots
        queued = self.queued + slots.bound
        if slots.waking_slots >= queued:
            return None
        slot = slots.wakeable()
        working = slots.awake_slots + slots.waking_slots
        if slot is None or not working or not self.wake_factor or not self.service_ns:
            return slot
        predicted_wait = queued * self.service_ns / working
        return slot if predicted_wait > slots.predicted_wake_ns(slot.node) * self.wake_factor else None

    def to_bind(self) -> DispatchInstance | None:
        """The sleeping instance that the one request that waits may be sent to at once (`InstanceIndex.bindable`).

        Only at its first attempt: after a wake that failed, whichever instance frees first shall have it.
        """
        if len(self.backlog) != 1 or next(iter(self.backlog)).attempts:
            return None
        return self.slots.bindable()

    def to_send_ahead(self, at: int) -> DispatchInstance | None:
        """An awake instance of the node to which the oldest request may be sent before a slot there is free.

        The next request is then there when a slot becomes free, and not a way through scheduler and network later. That
        binds it to the node, so: as few as make up for the way (`_ahead_at_most`); none while anything wakes elsewhere;
        and only while at least one more request waits here than there are slots on other nodes, so that none of those
        misses it.
        """
        slots = self.slots
        waiting = len(self.backlog)
        if not waiting or slots.waking or len(slots.awake_on) > AHEAD_NODES:
            return None
        for name, awake in slots.awake_on.items():
            slot = next(iter(awake.values()))
            room = len(awake) * slot.concurrency
            if len(self.ahead.get(name, ())) >= self._ahead_at_most(room):
                continue
            if waiting > slots.awake_slots - room and at >= slot.node.no_ahead_until_ns:
                return slot
        return None

    def _ahead_at_most(self, room: int) -> int:
        """One, and twice as many as become free on the way of the next, for they do not do so evenly: one for requests
        of a second, half of the node's `room` slots for those of a few milliseconds."""
        if room < AHEAD_SLOTS:
            return 0
        meanwhile = room * WAY_NS / self.service_ns if self.service_ns else 0.0
        return min(room // 2, 1 + round(2 * meanwhile))

    def send_ahead(self, at: int) -> list[Dispatch]:
        """All that may go ahead now."""
        sent: list[Dispatch] = []
        while (slot := self.to_send_ahead(at)) is not None:
            request = self.backlog.pop()
            request.attempts += 1
            self.put_ahead(request, slot.node)
            sent.append(Dispatch(request.request, slot.uid, slot.node.name, at - request.arrived_ns, ahead=True))
        return sent

    def put_ahead(self, request: Request, node: NodeEntry) -> None:
        """It waits at `node` from now on."""
        request.ahead = node
        self.ahead.setdefault(node.name, OrderedDict())[request.request] = request
        self.ahead_count += 1

    def take_ahead(self, request: Request) -> NodeEntry:
        """It waits at its node no more."""
        node, request.ahead = request.ahead, None
        assert node is not None
        there = self.ahead[node.name]
        del there[request.request]
        if not there:
            del self.ahead[node.name]
        self.ahead_count -= 1
        return node


@dataclass(frozen=True, slots=True)
class QueueState:
    """For reports: requests that wait, instances known, and those awake or waking."""

    queued: int
    instances: int
    awake_slots: int
    waking: int

"""One function at the dispatcher: its rules, its instances, and the bounded FIFO of requests that wait for them.

A request that was dispatched and came back is older than all that were never dispatched, so it goes before them, in
order of arrival. No clock, no I/O. The queue's operations are O(1), those on returned requests O(n) in their number.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from agent.core.dispatch.early_dispatch import EarlyDispatches
from agent.core.dispatch.events import Dispatch, FunctionSet
from agent.core.dispatch.index import InstanceIndex
from agent.core.dispatch.model import DispatchInstance, Request

_BY_ORDER = attrgetter("order")


class RequestQueue:
    """The queue, oldest first. `queueLength` bounds it, early dispatches included, for new requests only."""

    def __init__(self) -> None:
        self._fresh: OrderedDict[int, Request] = OrderedDict()
        self._returned: list[Request] = []

    def __len__(self) -> int:
        return len(self._fresh) + len(self._returned)

    def __iter__(self) -> Iterator[Request]:
        yield from self._returned
        yield from self._fresh.values()

    def append(self, request: Request) -> None:
        self._fresh[request.request] = request

    def put_back(self, request: Request) -> None:
        """Add a request that was dispatched and refused."""
        insort(self._returned, request, key=_BY_ORDER)

    def pop(self) -> Request:
        if self._returned:
            return self._returned.pop(0)
        return self._fresh.popitem(last=False)[1]

    def discard(self, request: Request) -> None:
        """Take out a request whose client disconnected or whose deadline passed."""
        if self._fresh.pop(request.request, None) is None:
            at = bisect_left(self._returned, request.order, key=_BY_ORDER)
            del self._returned[at]


@dataclass(slots=True, eq=False)
class FunctionQueueState:
    """A function's rules, queue and instances. `known`: it is deployed, not only reported by agents.

    - `service_ns`: moving average of how long a request is served.
    - `leases`: leases now; `lease_time_ns`: their sum over time up to `leases_since_ns`.
    - `void_leases`: leases that ended with their node while their requests go on.
    - `early`: requests that were dispatched early and wait at nodes.
    """

    index: InstanceIndex
    queue: RequestQueue = field(default_factory=RequestQueue)
    early: EarlyDispatches = field(default_factory=EarlyDispatches)
    known: bool = False
    expects_instances: bool = False
    wake_factor: float = 0.0
    queue_length: int = 0
    service_ns: float = 0.0
    leases: int = 0
    lease_time_ns: int = 0
    leases_since_ns: int = 0
    void_leases: int = 0

    def apply_rules(self, event: FunctionSet) -> None:
        self.known = True
        self.expects_instances = event.expects_instances
        self.index.policy = event.policy
        self.wake_factor = event.wake_factor
        self.queue_length = event.queue_length

    def queue_state(self) -> QueueState:
        return QueueState(self.queued, self.index.count, self.index.awake_slots, self.index.waking)

    def count_leases(self, change: int, at: int) -> None:
        """Add `change` to the leases from `at` on; the time before counts with the old number."""
        self.lease_time_ns += self.leases * (at - self.leases_since_ns)
        self.leases_since_ns = at
        self.leases += change

    @property
    def queued(self) -> int:
        """Requests that wait, here or at a node."""
        return len(self.queue) + self.early.count

    @property
    def unused(self) -> bool:
        """Whether it is not deployed and has no instances, leases or requests left."""
        return not (self.known or self.index.count or self.leases or self.void_leases or self.queued)

    @property
    def no_capacity_expected(self) -> bool:
        """Whether it has no instances, apart from those on lost nodes, and expects none."""
        return self.index.count == self.index.lost and not self.expects_instances

    def instance_to_wake(self) -> DispatchInstance | None:
        """The instance to wake next for the waiting requests, including those that wait for a direct wake.

        Waking instances count as capacity: at most ceil(queued / concurrency) wake at a time. If one is awake or waking
        and a service time is known, the predicted wait must exceed the predicted wake time multiplied by `wakeFactor`.
        """
        index = self.index
        queued = self.queued + index.direct_wakes
        if index.waking_slots >= queued:
            return None
        instance = index.wake_candidate()
        slots = index.awake_slots + index.waking_slots
        if instance is None or not slots or not self.wake_factor or not self.service_ns:
            return instance
        predicted_wait = queued * self.service_ns / slots
        return instance if predicted_wait > index.predicted_wake_ns(instance.node) * self.wake_factor else None

    def direct_wake_candidate(self) -> DispatchInstance | None:
        """The frozen instance that a lone queued request may be dispatched to.

        Only on its first attempt: after a failed one it gets whichever instance becomes free first.
        """
        if len(self.queue) != 1 or next(iter(self.queue)).attempts:
            return None
        return self.index.direct_wake_candidate()

    def dispatch_early(self, at: int) -> list[Dispatch]:
        dispatched: list[Dispatch] = []
        while (to := self.early.next_instance(len(self.queue), self.index, self.service_ns, at)) is not None:
            request = self.queue.pop()
            request.attempts += 1
            self.early.add(request, to.node)
            dispatched.append(Dispatch(request.request, to.uid, to.node.name, at - request.arrived_ns, early=True))
        return dispatched


@dataclass(frozen=True, slots=True)
class QueueState:
    """For reports: the numbers of waiting requests, instances, slots of awake instances, and waking instances."""

    queued: int
    instances: int
    awake_slots: int
    waking: int

"""The dispatcher: one bounded FIFO per function, late binding, a lease per slot (agent/docs/facts/dispatch.md).

State changes only in `Dispatcher.step(event, at) -> effects`. A request is queued here until an instance has a free
slot; then it holds a lease, one of the instance's slots, until its response has ended. Instances are woken for the
queue, not for a request: whichever has a free slot first takes the oldest request. Two exceptions save the trip to the
agent and back:

- direct wake: while no instance is awake or waking, a lone request is dispatched to a frozen one, which it wakes;
- early dispatch: while all slots are taken, a few requests wait at a node (`early_dispatch.py`).

Every request that arrived is queued, dispatched or answered. The caller ends each Dispatch with LeaseEnded,
RequestGone or LeaseRefused; after LeaseRefused the request gets another Dispatch, or a Refuse. Late answers are
ignored. No clock, no I/O; no event walks through all instances.
"""

from __future__ import annotations

from typing import assert_never

from agent.core.dispatch.early_dispatch import PAUSE_NS
from agent.core.dispatch.events import (
    DeadlinePassed,
    Dispatch,
    Effect,
    Event,
    FunctionRemoved,
    FunctionSet,
    InstanceGone,
    InstanceReported,
    InstanceRetired,
    LeaseAnswered,
    LeaseEnded,
    LeaseRefused,
    NodeLost,
    NodeReported,
    NodeSuspect,
    RefusalReason,
    Refuse,
    RequestArrived,
    RequestGone,
    Wake,
    WakeAnswered,
    WakeFailed,
)
from agent.core.dispatch.index import InstanceIndex
from agent.core.dispatch.model import AVERAGE_WEIGHT, DispatchInstance, NodeEntry, NodeStanding, Request
from agent.core.dispatch.queue import FunctionQueueState, QueueState
from agent.core.types import SECOND_NS, InstanceState

MAX_ATTEMPTS = 50
"""A request that was dispatched and refused this often is answered NO_CAPACITY."""
BACK_OFF_NS = SECOND_NS // 2
BACK_OFF_MAX_NS = 30 * SECOND_NS
"""Quarantine of an instance after a failed wake: `BACK_OFF_NS`, doubled with each failure in a row up to this."""


class Dispatcher:
    def __init__(self, *, early_dispatch: bool = False) -> None:
        """`early_dispatch`: the caller supports `Dispatch.early`."""
        self._early_dispatch = early_dispatch
        self._functions: dict[str, FunctionQueueState] = {}
        self._nodes: dict[str, NodeEntry] = {}
        self._instances: dict[str, DispatchInstance] = {}
        self._requests: dict[int, Request] = {}
        self._order = 0
        self._effects: list[Effect] = []  # of the current step

    def step(self, event: Event, at: int) -> list[Effect]:  # noqa: C901 -- one arm an event
        """Apply what happened at `at` (monotonic ns) and return what to do about it."""
        self._effects = []
        match event:
            case RequestArrived():
                self._arrived(event, at)
            case LeaseAnswered(request, waited_ns):
                self._answered(request, waited_ns, at)
            case LeaseEnded(request, uid):
                self._ended(request, at, served=True, uid=uid)
            case RequestGone(request):
                self._ended(request, at, served=False)
            case LeaseRefused(request):
                self._refused(request, at)
            case DeadlinePassed(request):
                self._deadline_passed(request)
            case InstanceReported():
                self._reported(event, at)
            case InstanceGone(uid):
                self._gone(uid, at)
            case InstanceRetired(uid, retired):
                self._retired(uid, retired, at)
            case WakeAnswered(uid) | WakeFailed(uid):
                self._wake_answered(uid, at, failed=isinstance(event, WakeFailed))
            case NodeReported():
                self._node_reported(event, at)
            case NodeSuspect(node):
                self._set_standing(self._node(node), NodeStanding.SUSPECT, at)
            case NodeLost(node):
                self._void_leases(self._node(node), at)
                self._set_standing(self._node(node), NodeStanding.LOST, at)
            case FunctionSet():
                self._function_set(event, at)
            case FunctionRemoved(name):
                self._function_removed(name)
            case _:
                assert_never(event)
        return self._effects

    # ---- reading ----------------------------------------------------------------------------------------------

    def queue_state(self, function: str) -> QueueState:
        found = self._functions.get(function)
        return QueueState(0, 0, 0, 0) if found is None else found.queue_state()

    def lease_time_ns(self, function: str, at: int) -> int:
        """The function's number of leases, integrated over time up to `at`: differences give its utilisation."""
        found = self._functions.get(function)
        return 0 if found is None else found.lease_time_ns + found.leases * (at - found.leases_since_ns)

    def leased(self, uid: str) -> int:
        instance = self._instances.get(uid)
        return 0 if instance is None else instance.leased

    # ---- requests ---------------------------------------------------------------------------------------------

    def _arrived(self, event: RequestArrived, at: int) -> None:
        function = self._functions.get(event.function)
        if function is None or not function.known:
            self._effects.append(Refuse(event.request, RefusalReason.UNKNOWN_FUNCTION))
            return
        if event.request in self._requests:
            return
        self._order += 1
        request = Request(event.request, event.function, self._order, at, event.deadline_ns)
        instance = None if function.queue else function.index.free()
        if instance is not None:
            self._requests[event.request] = request
            self._dispatch(function, request, instance, at)
            return
        if function.no_capacity_expected:
            self._effects.append(Refuse(event.request, RefusalReason.NO_CAPACITY))
            return
        if function.queued >= function.queue_length:
            self._effects.append(Refuse(event.request, RefusalReason.QUEUE_FULL))
            return
        self._requests[event.request] = request
        function.queue.append(request)
        self._wake(function, at)

    def _answered(self, number: int, waited_ns: int, at: int) -> None:
        request = self._requests.get(number)
        if request is None or request.instance is None:
            return
        request.leased_ns += waited_ns  # the average service time leaves wakes out
        instance = request.instance
        if instance.direct_wake == number:
            function = self._functions[request.function]
            self._awake(function, instance, at, waited_ns)
            self._drain(function, at)

    def _ended(self, number: int, at: int, *, served: bool, uid: str = "") -> None:
        request = self._requests.pop(number, None)
        if request is None:
            return
        function = self._functions[request.function]
        if request.instance is None and request.early_node is None:
            function.queue.discard(request)
            return
        if request.instance is None:
            function.early.remove(request)
        else:
            if uid in self._instances:
                _move_lease(request, self._instances[uid])
            self._end_lease(function, request, at)
            if served:
                took = at - request.leased_ns
                average = function.service_ns
                function.service_ns = took if not average else average + AVERAGE_WEIGHT * (took - average)
        self._drain(function, at)
        self._drop_unused(request.function)

    def _refused(self, number: int, at: int) -> None:
        request = self._requests.get(number)
        if request is None or (request.instance is None and request.early_node is None):
            return
        instance, function = request.instance, self._functions[request.function]
        if instance is None:
            function.early.remove(request).no_early_until_ns = at + PAUSE_NS
        else:
            did_not_wake = instance.direct_wake == number
            valid = self._end_lease(function, request, at)
            if did_not_wake:
                self._wake_failed(function, instance, at)
            elif valid and instance.uid in self._instances:
                self._quarantine(function, instance, at)
        reason: RefusalReason | None = None
        if not function.known:
            reason = RefusalReason.UNKNOWN_FUNCTION
        elif at >= request.deadline_ns:
            reason = RefusalReason.QUEUE_TIMEOUT
        elif request.attempts >= MAX_ATTEMPTS or function.no_capacity_expected:
            reason = RefusalReason.NO_CAPACITY
        if reason is None:
            function.queue.put_back(request)
        else:
            del self._requests[number]
            self._effects.append(Refuse(number, reason))
        self._drain(function, at)
        self._drop_unused(request.function)

    def _deadline_passed(self, number: int) -> None:
        request = self._requests.get(number)
        if request is None or request.instance is not None or request.early_node is not None:
            return
        del self._requests[number]
        self._functions[request.function].queue.discard(request)
        self._effects.append(Refuse(number, RefusalReason.QUEUE_TIMEOUT))

    def _drain(self, function: FunctionQueueState, at: int) -> None:
        """Dispatch waiting requests to free slots, oldest first; wake instances for the rest, or refuse them."""
        queue, early = function.queue, function.early
        while early.count or queue:
            instance = function.index.free()
            if instance is None:
                break
            request = early.oldest_at(instance.node)
            if request is not None:  # its agent has given the slot to it
                early.remove(request)
                self._begin_lease(function, request, instance, at)
            elif queue:
                self._dispatch(function, queue.pop(), instance, at)
            else:
                break
        if queue and function.no_capacity_expected:
            self._refuse_all(function, RefusalReason.NO_CAPACITY)
        elif queue:
            self._wake(function, at)

    def _refuse_all(self, function: FunctionQueueState, reason: RefusalReason) -> None:
        while function.queue:
            request = function.queue.pop()
            del self._requests[request.request]
            self._effects.append(Refuse(request.request, reason))

    # ---- leases -----------------------------------------------------------------------------------------------

    def _dispatch(self, function: FunctionQueueState, request: Request, instance: DispatchInstance, at: int) -> None:
        request.attempts += 1
        self._begin_lease(function, request, instance, at)
        queued_ns = at - request.arrived_ns
        wake_ns = instance.wake_took_ns if instance.woken_ns >= request.arrived_ns else 0
        direct = instance.direct_wake == request.request
        self._effects.append(Dispatch(request.request, instance.uid, instance.node.name, queued_ns, wake_ns, direct))

    def _begin_lease(self, function: FunctionQueueState, request: Request, instance: DispatchInstance, at: int) -> None:
        instance.holders[request.request] = request
        instance.leased += 1
        instance.changed_ns = at
        function.count_leases(1, at)
        request.instance, request.lease_epoch, request.leased_ns = instance, instance.lease_epoch, at
        function.index.reclassify(instance)

    def _end_lease(self, function: FunctionQueueState, request: Request, at: int) -> bool:
        """Free the slot; False if the lease was void."""
        instance, request.instance = request.instance, None
        assert instance is not None
        if request.lease_epoch != instance.lease_epoch:
            function.void_leases -= 1
            return False
        del instance.holders[request.request]
        instance.leased -= 1
        instance.changed_ns = at
        function.count_leases(-1, at)
        if instance.uid in self._instances:
            if instance.direct_wake == request.request:
                self._end_wake(function, instance)
            function.index.reclassify(instance)
        return True

    def _void_leases(self, node: NodeEntry, at: int) -> None:
        """End all leases and wakes of a node whose agent is gone; the requests end with their own connections."""
        for instance in node.instances.values():
            function = self._functions[instance.function]
            self._end_wake(function, instance)
            function.void_leases += instance.leased
            function.count_leases(-instance.leased, at)
            instance.holders.clear()
            instance.leased, instance.changed_ns = 0, at
            instance.lease_epoch += 1
            function.index.reclassify(instance)

    # ---- wakes ------------------------------------------------------------------------------------------------

    def _wake(self, function: FunctionQueueState, at: int) -> None:
        """Wake instances for queued requests: by dispatching a lone one, else by wake calls; then dispatch early."""
        instance = function.direct_wake_candidate()
        if instance is not None:
            request = function.queue.pop()
            instance.direct_wake = request.request
            self._begin_wake(function, instance, at)
            self._dispatch(function, request, instance, at)
            return
        while (instance := function.instance_to_wake()) is not None:
            self._begin_wake(function, instance, at)
            self._effects.append(Wake(instance.uid, instance.node.name))
        if self._early_dispatch:
            self._effects += function.dispatch_early(at)

    def _begin_wake(self, function: FunctionQueueState, instance: DispatchInstance, at: int) -> None:
        instance.wake_requested_ns = at
        function.index.reclassify(instance)
        instance.node.count_wakes(1)

    def _end_wake(self, function: FunctionQueueState, instance: DispatchInstance) -> None:
        """End its wake, if one is in progress. The caller has to call `reclassify` afterwards."""
        if instance.wake_requested_ns >= 0:
            function.index.clear_wake(instance)
            instance.node.count_wakes(-1)

    def _wake_answered(self, uid: str, at: int, *, failed: bool) -> None:
        instance = self._instances.get(uid)
        if instance is None or instance.wake_requested_ns < 0:
            return
        function = self._functions[instance.function]
        if failed:
            self._wake_failed(function, instance, at)
        else:
            self._awake(function, instance, at, at - instance.wake_requested_ns)
        self._drain(function, at)

    def _awake(self, function: FunctionQueueState, instance: DispatchInstance, at: int, took_ns: int) -> None:
        instance.state = InstanceState.RUNNING
        self._wake_succeeded(function, instance, at, took_ns)
        function.index.reclassify(instance)

    def _wake_succeeded(self, function: FunctionQueueState, instance: DispatchInstance, at: int, took_ns: int) -> None:
        """Record a wake that its answer or a report has confirmed. The caller has to call `reclassify` afterwards."""
        instance.woken_ns, instance.wake_took_ns, instance.failed_wakes = at, took_ns, 0
        self._end_wake(function, instance)
        if took_ns:  # else it was awake before it was asked to wake
            function.index.record_wake(instance.node, took_ns)

    def _wake_failed(self, function: FunctionQueueState, instance: DispatchInstance, at: int) -> None:
        self._end_wake(function, instance)
        wait = min(BACK_OFF_NS << min(instance.failed_wakes, 16), BACK_OFF_MAX_NS)
        instance.failed_wakes += 1
        self._quarantine(function, instance, at + wait)

    def _quarantine(self, function: FunctionQueueState, instance: DispatchInstance, until: int) -> None:
        """Give it no request or wake until a report at `until` or later, or a report that it is not frozen."""
        instance.quarantined, instance.quarantined_until_ns = True, until
        instance.node.quarantined[instance.uid] = instance
        function.index.reclassify(instance)

    # ---- instances --------------------------------------------------------------------------------------------

    def _reported(self, event: InstanceReported, at: int) -> None:
        if event.state.terminal:
            self._gone(event.uid, at)
            return
        function = self._function(event.function)
        instance = self._instances.get(event.uid)
        if instance is None:
            node = self._node(event.node)
            instance = DispatchInstance(
                event.uid, event.function, node, event.concurrency, event.state, gpus=event.gpus
            )
            self._instances[event.uid] = node.instances[event.uid] = instance
            function.index.count += 1
        elif instance.function != event.function or instance.node.name != event.node:
            return  # uids are never used again: this report is wrong
        elif instance.concurrency != event.concurrency or instance.gpus != event.gpus:
            function.index.resize(instance, event.concurrency, event.gpus)
        instance.apply_report(event, at)
        if instance.wake_requested_ns >= 0 and event.state is InstanceState.RUNNING:
            self._wake_succeeded(function, instance, at, at - instance.wake_requested_ns)
        function.index.estimate_wake(instance.node, event.wake_estimate_ns)
        function.index.reclassify(instance)
        self._drain(function, at)

    def _gone(self, uid: str, at: int) -> None:
        instance = self._instances.pop(uid, None)
        if instance is None:
            return
        function = self._functions[instance.function]
        self._end_wake(function, instance)
        function.index.remove(instance)
        function.index.count -= 1
        instance.node.instances.pop(uid, None)
        instance.node.quarantined.pop(uid, None)
        self._drain(function, at)
        self._drop_unused(instance.function)

    def _retired(self, uid: str, retired: bool, at: int) -> None:
        instance = self._instances.get(uid)
        if instance is None:
            return
        instance.retired = retired
        function = self._functions[instance.function]
        function.index.reclassify(instance)
        self._drain(function, at)

    # ---- nodes and functions ----------------------------------------------------------------------------------

    def _node(self, name: str) -> NodeEntry:
        """A node is SUSPECT until its first report."""
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = NodeEntry(name, NodeStanding.SUSPECT)
        return node

    def _node_reported(self, event: NodeReported, at: int) -> None:
        node = self._node(event.node)
        if (node.gpu_count, node.migrates) != (event.gpu_count, event.migrates):
            node.gpu_count, node.migrates = event.gpu_count, event.migrates
            node.reindex()
        changed = node.end_quarantines(at)
        if node.epoch != event.epoch:
            node.epoch = event.epoch
            self._void_leases(node, at)
            changed = list(node.instances.values())
        standing = NodeStanding.DRAINING if event.draining else NodeStanding.READY
        if node.standing is standing:
            self._reclassify(changed, at)
        else:
            self._set_standing(node, standing, at)

    def _set_standing(self, node: NodeEntry, standing: NodeStanding, at: int) -> None:
        if node.standing is not standing:
            node.standing = standing
            self._reclassify(list(node.instances.values()), at)

    def _reclassify(self, instances: list[DispatchInstance], at: int) -> None:
        for instance in instances:
            self._functions[instance.function].index.reclassify(instance)
        for name in dict.fromkeys(instance.function for instance in instances):
            self._drain(self._functions[name], at)

    def _function(self, name: str) -> FunctionQueueState:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = FunctionQueueState(InstanceIndex(name))
        return function

    def _function_set(self, event: FunctionSet, at: int) -> None:
        function = self._function(event.function)
        function.apply_rules(event)
        self._drain(function, at)

    def _function_removed(self, name: str) -> None:
        function = self._functions.get(name)
        if function is None:
            return
        function.known = function.expects_instances = False
        self._refuse_all(function, RefusalReason.UNKNOWN_FUNCTION)
        self._drop_unused(name)

    def _drop_unused(self, name: str) -> None:
        function = self._functions.get(name)
        if function is not None and function.unused:
            del self._functions[name]


def _move_lease(request: Request, actual: DispatchInstance) -> None:
    """Swap the leases of `request` and of a request dispatched to `actual`: the agent had `actual` serve `request`,
    instead of the instance that it was dispatched to."""
    assumed = request.instance
    if assumed is None or assumed is actual or request.lease_epoch != assumed.lease_epoch:
        return
    if actual.node is not assumed.node or assumed.function != actual.function or not actual.holders:
        return
    if assumed.direct_wake >= 0 or actual.direct_wake >= 0:
        return
    other = next(iter(actual.holders.values()))
    del actual.holders[other.request], assumed.holders[request.request]
    actual.holders[request.request], assumed.holders[other.request] = request, other
    request.instance, request.lease_epoch = actual, actual.lease_epoch
    other.instance, other.lease_epoch = assumed, assumed.lease_epoch

"""The dispatcher: one bounded FIFO per function, late binding, a lease per slot (DESIGN section 9, facts/dispatch.md).

`Dispatcher.step(event, at_ns) -> effects` is the only code that changes it. A request waits here, bound to nobody,
until an instance has a free slot; then it holds a lease until its response has ended. Instances are woken for the
queue, not for a request: whichever frees first takes the oldest request. Two exceptions save the way there and back: a
request that is alone, with nothing awake or on its way, goes to the instance that it would wake (`to_bind`); and where
all slots are taken the next request waits at the node for any of them (`to_send_ahead`).

Every request that arrived is waiting, leased or answered; exactly one of Dispatch (then one of LeaseEnded,
LeaseRefused, RequestGone from the shell) and Refuse speaks about it at a time. Late answers are ignored. No clock,
no I/O; the cost of one event does not grow with the number of instances.
"""

from __future__ import annotations

from typing import assert_never

from agent.core.dispatch import leases, wakes
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
from agent.core.dispatch.index import AVERAGE_WEIGHT, DispatchInstance, InstanceIndex, NodeEntry, NodeStanding
from agent.core.dispatch.queue import AHEAD_PAUSE_NS, FunctionQueueState, QueueState, Request, RequestQueue
from agent.core.types import InstanceState

MAX_ATTEMPTS = 50
"""A request that was refused so often is answered NO_CAPACITY."""


class Dispatcher:
    """All functions, nodes and requests of one scheduler."""

    def __init__(self, *, sends_ahead: bool = False) -> None:
        """`sends_ahead`: whoever does what the effects say can let a request wait at a node (`Dispatch.ahead`)."""
        self._sends_ahead = sends_ahead
        self._functions: dict[str, FunctionQueueState] = {}
        self._nodes: dict[str, NodeEntry] = {}
        self._slots: dict[str, DispatchInstance] = {}
        self._requests: dict[int, Request] = {}
        self._order = 0

    def step(self, event: Event, at: int) -> list[Effect]:  # noqa: C901 -- one arm an event
        """Take in what happened at `at` (monotonic ns) and say what to do about it."""
        effects: list[Effect] = []
        match event:
            case RequestArrived():
                self._arrived(event, at, effects)
            case LeaseAnswered(request, waited_ns):
                self._answered(request, waited_ns, at, effects)
            case LeaseEnded(request, uid):
                self._ended(request, at, effects, served=True, uid=uid)
            case RequestGone(request):
                self._ended(request, at, effects, served=False)
            case LeaseRefused(request):
                self._refused(request, at, effects)
            case DeadlinePassed(request):
                self._deadline(request, effects)
            case InstanceReported():
                self._reported(event, at, effects)
            case InstanceGone(uid):
                self._gone(uid, at, effects)
            case InstanceRetired(uid, retired):
                self._retired(uid, retired, at, effects)
            case WakeAnswered(uid) | WakeFailed(uid):
                self._woken(uid, at, effects, failed=isinstance(event, WakeFailed))
            case NodeReported():
                self._node_reported(event, at, effects)
            case NodeSuspect(node):
                self._stand(self._node(node), NodeStanding.SUSPECT, at, effects)
            case NodeLost(node):
                leases.end_all(self._node(node), self._functions, at)
                self._stand(self._node(node), NodeStanding.LOST, at, effects)
            case FunctionSet():
                self._function_set(event, at, effects)
            case FunctionRemoved(name):
                self._function_removed(name, effects)
            case _:
                assert_never(event)
        return effects

    # ---- reading ----------------------------------------------------------------------------------------------

    def queue_state(self, function: str) -> QueueState:
        """A snapshot of one function."""
        found = self._functions.get(function)
        return QueueState(0, 0, 0, 0) if found is None else found.queue_state()

    def lease_time_ns(self, function: str, at: int) -> int:
        """Leases out, summed over the time from the beginning to `at`: differences make a utilisation."""
        found = self._functions.get(function)
        return 0 if found is None else found.lease_time_ns + found.leases * (at - found.leases_since_ns)

    def leased(self, uid: str) -> int:
        """Leases out on an instance."""
        slot = self._slots.get(uid)
        return 0 if slot is None else slot.leased

    # ---- requests ---------------------------------------------------------------------------------------------

    def _arrived(self, event: RequestArrived, at: int, effects: list[Effect]) -> None:
        function = self._functions.get(event.function)
        if function is None or not function.known:
            effects.append(Refuse(event.request, RefusalReason.UNKNOWN_FUNCTION))
            return
        if event.request in self._requests:
            return
        self._order += 1
        request = Request(event.request, event.function, self._order, at, event.deadline_ns)
        slot = None if function.backlog else function.slots.free()
        if slot is not None:
            self._requests[event.request] = request
            self._lease(function, request, slot, at, effects)
            return
        if function.hopeless:
            effects.append(Refuse(event.request, RefusalReason.NO_CAPACITY))
            return
        if function.queued >= function.queue_length:
            effects.append(Refuse(event.request, RefusalReason.QUEUE_FULL))
            return
        self._requests[event.request] = request
        function.backlog.append(request)
        self._wake(function, at, effects)

    def _lease(
        self, function: FunctionQueueState, request: Request, slot: DispatchInstance, at: int, effects: list[Effect]
    ) -> None:
        request.attempts += 1
        leases.begin(function, request, slot, at)
        wake_ns = slot.wake_took_ns if slot.woken_ns >= request.arrived_ns else 0
        wakes = slot.bound == request.request
        effects.append(Dispatch(request.request, slot.uid, slot.node.name, at - request.arrived_ns, wake_ns, wakes))

    def _release(self, request: Request, at: int) -> tuple[FunctionQueueState, bool]:
        """Take the lease back. Also whether it was one still (`leases.end`)."""
        function = self._functions[request.function]
        assert request.slot is not None
        return function, leases.end(function, request, at, forgotten=request.slot.uid not in self._slots)

    def _answered(self, number: int, waited_ns: int, at: int, effects: list[Effect]) -> None:
        request = self._requests.get(number)
        if request is None or request.slot is None:
            return
        request.leased_ns += waited_ns  # the average is of service, not of wakes
        slot = request.slot
        if slot.bound == number:
            function = self._functions[request.function]
            self._awake(function, slot, at, waited_ns)
            self._drain(function, at, effects)

    def _ended(self, number: int, at: int, effects: list[Effect], *, served: bool, uid: str = "") -> None:
        request = self._requests.pop(number, None)
        if request is None:
            return
        if request.slot is None:
            self._left(request, at, effects)
            return
        if uid in self._slots:
            leases.served_by(request, self._slots[uid])
        function, _ = self._release(request, at)
        if served:
            took = at - request.leased_ns
            average = function.service_ns
            function.service_ns = took if not average else average + AVERAGE_WEIGHT * (took - average)
        self._drain(function, at, effects)
        self._tidy(request.function)

    def _left(self, request: Request, at: int, effects: list[Effect]) -> None:
        """It waits no more, here or where it was sent ahead."""
        function = self._functions[request.function]
        if request.ahead is None:
            function.backlog.discard(request)
            return
        function.take_ahead(request)
        self._drain(function, at, effects)
        self._tidy(request.function)

    def _refused(self, number: int, at: int, effects: list[Effect]) -> None:
        request = self._requests.get(number)
        if request is None or (request.slot is None and request.ahead is None):
            return
        slot, function = request.slot, self._functions[request.function]
        if slot is None:
            function.take_ahead(request).no_ahead_until_ns = at + AHEAD_PAUSE_NS
        else:
            did_not_wake = slot.bound == number
            function, valid = self._release(request, at)
            if did_not_wake:
                wakes.failed(function.slots, slot, at)
            elif valid and slot.uid in self._slots:
                wakes.set_aside(function.slots, slot, at)
        reason: RefusalReason | None = None
        if not function.known:
            reason = RefusalReason.UNKNOWN_FUNCTION
        elif at >= request.deadline_ns:
            reason = RefusalReason.QUEUE_TIMEOUT
        elif request.attempts >= MAX_ATTEMPTS or function.hopeless:
            reason = RefusalReason.NO_CAPACITY
        if reason is None:
            function.backlog.give_back(request)
        else:
            del self._requests[number]
            effects.append(Refuse(number, reason))
        self._drain(function, at, effects)
        self._tidy(request.function)

    def _deadline(self, number: int, effects: list[Effect]) -> None:
        request = self._requests.get(number)
        if request is None or request.slot is not None or request.ahead is not None:
            return
        del self._requests[number]
        self._functions[request.function].backlog.discard(request)
        effects.append(Refuse(number, RefusalReason.QUEUE_TIMEOUT))

    def _drain(self, function: FunctionQueueState, at: int, effects: list[Effect]) -> None:
        """Bind waiting requests to free slots, oldest first; wake for those that are left, or send them away."""
        backlog, slots = function.backlog, function.slots
        while function.ahead_count or backlog:
            slot = slots.free()
            there = None if slot is None else function.ahead.get(slot.node.name)
            if slot is None or not (there or backlog):
                break
            if there:  # its agent has given the slot to who waits there
                request = next(iter(there.values()))
                function.take_ahead(request)
                leases.begin(function, request, slot, at)
            else:
                self._lease(function, backlog.pop(), slot, at, effects)
        if backlog and function.hopeless:
            self._refuse_all(function, RefusalReason.NO_CAPACITY, effects)
        elif backlog:
            self._wake(function, at, effects)

    # ---- wakes ------------------------------------------------------------------------------------------------

    def _wake(self, function: FunctionQueueState, at: int, effects: list[Effect]) -> None:
        slot = function.to_bind()
        if slot is not None:
            request = function.backlog.pop()
            wakes.begin(function.slots, slot, at, bound=request.request)
            self._lease(function, request, slot, at, effects)
            return
        while (slot := function.to_wake()) is not None:
            wakes.begin(function.slots, slot, at)
            effects.append(Wake(slot.uid, slot.node.name))
        if self._sends_ahead:
            effects += function.send_ahead(at)

    def _woken(self, uid: str, at: int, effects: list[Effect], *, failed: bool) -> None:
        slot = self._slots.get(uid)
        if slot is None or slot.wake_asked_ns < 0:
            return
        function = self._functions[slot.function]
        if failed:
            wakes.failed(function.slots, slot, at)
        else:
            self._awake(function, slot, at, at - slot.wake_asked_ns)
        self._drain(function, at, effects)

    def _awake(self, function: FunctionQueueState, slot: DispatchInstance, at: int, took_ns: int) -> None:
        slot.state = InstanceState.RUNNING
        wakes.came_awake(function.slots, slot, at, took_ns)
        function.slots.settle(slot)

    # ---- instances --------------------------------------------------------------------------------------------

    def _reported(self, event: InstanceReported, at: int, effects: list[Effect]) -> None:
        if event.state.terminal:
            self._gone(event.uid, at, effects)
            return
        function = self._function(event.function)
        slot = self._slots.get(event.uid)
        if slot is None:
            node = self._node(event.node)
            slot = DispatchInstance(event.uid, event.function, node, event.concurrency, event.state, gpus=event.gpus)
            self._slots[event.uid] = node.slots[event.uid] = slot
            function.slots.count += 1
        elif slot.function != event.function or slot.node.name != event.node:
            return  # uids are never used again: somebody else's instance under the name of this one
        elif slot.concurrency != event.concurrency or slot.gpus != event.gpus:
            function.slots.regear(slot, event.concurrency, event.gpus)
        slot.take_in(event, at)
        if slot.wake_asked_ns >= 0 and event.state is InstanceState.RUNNING:
            wakes.came_awake(function.slots, slot, at, at - slot.wake_asked_ns)
        function.slots.expect_wake(slot.node, event.wake_estimate_ns)
        function.slots.settle(slot)
        self._drain(function, at, effects)

    def _gone(self, uid: str, at: int, effects: list[Effect]) -> None:
        slot = self._slots.pop(uid, None)
        if slot is None:
            return
        function = self._functions[slot.function]
        wakes.end(function.slots, slot)
        function.slots.remove(slot)
        function.slots.count -= 1
        slot.node.slots.pop(uid, None)
        slot.node.aside.pop(uid, None)
        self._drain(function, at, effects)
        self._tidy(slot.function)

    def _retired(self, uid: str, retired: bool, at: int, effects: list[Effect]) -> None:
        slot = self._slots.get(uid)
        if slot is None:
            return
        slot.retired = retired
        function = self._functions[slot.function]
        function.slots.settle(slot)
        self._drain(function, at, effects)

    # ---- nodes and functions ----------------------------------------------------------------------------------

    def _node(self, name: str) -> NodeEntry:
        """A node is SUSPECT until it is reported itself."""
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = NodeEntry(name, NodeStanding.SUSPECT)
        return node

    def _node_reported(self, event: NodeReported, at: int, effects: list[Effect]) -> None:
        node = self._node(event.node)
        if (node.gpu_count, node.migrates) != (event.gpu_count, event.migrates):
            node.gpu_count, node.migrates = event.gpu_count, event.migrates
            for slots in list(node.frozen_in.values()):
                slots.relist(node)
        back = node.recall(at)
        if node.epoch != event.epoch:
            node.epoch = event.epoch
            leases.end_all(node, self._functions, at)
            back = list(node.slots.values())
        standing = NodeStanding.DRAINING if event.draining else NodeStanding.READY
        if node.standing is standing:
            self._resettle(back, at, effects)
        else:
            self._stand(node, standing, at, effects)

    def _stand(self, node: NodeEntry, standing: NodeStanding, at: int, effects: list[Effect]) -> None:
        if node.standing is not standing:
            node.standing = standing
            self._resettle(list(node.slots.values()), at, effects)

    def _resettle(self, slots: list[DispatchInstance], at: int, effects: list[Effect]) -> None:
        for slot in slots:
            self._functions[slot.function].slots.settle(slot)
        for name in dict.fromkeys(slot.function for slot in slots):
            self._drain(self._functions[name], at, effects)

    def _function(self, name: str) -> FunctionQueueState:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = FunctionQueueState(InstanceIndex(name), RequestQueue())
        return function

    def _function_set(self, event: FunctionSet, at: int, effects: list[Effect]) -> None:
        function = self._function(event.function)
        function.follow(event)
        self._drain(function, at, effects)

    def _function_removed(self, name: str, effects: list[Effect]) -> None:
        function = self._functions.get(name)
        if function is None:
            return
        function.known = function.expects_instances = False
        self._refuse_all(function, RefusalReason.UNKNOWN_FUNCTION, effects)
        self._tidy(name)

    def _refuse_all(self, function: FunctionQueueState, reason: RefusalReason, effects: list[Effect]) -> None:
        while function.backlog:
            request = function.backlog.pop()
            del self._requests[request.request]
            effects.append(Refuse(request.request, reason))

    def _tidy(self, name: str) -> None:
        """Drop a function that is neither deployed nor has anything left."""
        function = self._functions.get(name)
        if function is not None and function.forgettable:
            del self._functions[name]

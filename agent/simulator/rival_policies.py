"""Rival dispatch policies, behind the interface of `Dispatcher`, to compare with in the simulator.

They bind early: a request is bound to an instance on arrival and waits in its queue (FIFO), even if another instance
becomes free. Round robin takes all instances in turn and wakes frozen ones; the others choose among all instances: a
random one, the better of two random ones, or the one with the fewest requests (agent/docs/facts/dispatch.md compares
them). Pure; the order of instances is that of their first report.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from agent.core.dispatch.events import (
    DeadlinePassed,
    Dispatch,
    Effect,
    Event,
    FunctionRemoved,
    FunctionSet,
    InstanceGone,
    InstanceReported,
    LeaseEnded,
    LeaseRefused,
    RefusalReason,
    Refuse,
    RequestArrived,
    RequestGone,
    Wake,
    WakeAnswered,
    WakeFailed,
)
from agent.core.types import InstanceState

_FROZEN = (InstanceState.FROZEN, InstanceState.FREEZING)


class Dispatching(Protocol):
    def step(self, event: Event, at: int) -> list[Effect]:
        """Apply what happened at `at` (monotonic ns) and return what to do about it."""
        ...


class Rival(Enum):
    ROUND_ROBIN = "round_robin"
    RANDOM = "random"
    TWO_CHOICES = "two_choices"
    LEAST_OUTSTANDING = "least_outstanding"


@dataclass(slots=True, eq=False)
class _Bound:
    """A request at its instance: in its `queue`, or executing."""

    request: int
    arrived_ns: int
    deadline_ns: int
    instance: _Instance


@dataclass(slots=True, eq=False)
class _Instance:
    """One instance and its own queue."""

    uid: str
    function: str
    node: str
    concurrency: int
    state: InstanceState
    queue: OrderedDict[int, _Bound] = field(default_factory=OrderedDict)
    executing: int = 0
    waking: bool = False

    @property
    def outstanding(self) -> int:
        return self.executing + len(self.queue)


@dataclass(slots=True, eq=False)
class _Function:
    queue_length: int = 1000
    known: bool = False
    instances: dict[str, _Instance] = field(default_factory=dict)
    waiting: int = 0
    turn: int = 0


class RivalDispatcher:
    """Dispatches by a `Rival` policy. `below(n)`: a random integer from 0 to n - 1."""

    def __init__(self, rival: Rival, below: Callable[[int], int]) -> None:
        self._choose: Callable[[_Function, Sequence[_Instance]], _Instance] = {
            Rival.ROUND_ROBIN: self._in_turn,
            Rival.RANDOM: lambda _, found: found[below(len(found))],
            Rival.TWO_CHOICES: lambda _, found: self._better(found[below(len(found))], found[below(len(found))]),
            Rival.LEAST_OUTSTANDING: lambda _, found: self._least(found, below),
        }[rival]
        self._functions: dict[str, _Function] = {}
        self._instances: dict[str, _Instance] = {}
        self._requests: dict[int, _Bound] = {}
        self._effects: list[Effect] = []  # of the current step

    def step(self, event: Event, at: int) -> list[Effect]:
        """As `Dispatcher.step`; ignores events that only late binding needs."""
        self._effects = []
        match event:
            case FunctionSet(name):
                function = self._functions.setdefault(name, _Function())
                function.known, function.queue_length = True, event.queue_length
            case FunctionRemoved(name):
                self._removed(name)
            case RequestArrived():
                self._arrived(event, at)
            case LeaseEnded(request) | RequestGone(request):
                self._ended(request, at)
            case LeaseRefused(request):
                self._refused(request, at)
            case DeadlinePassed(request):
                bound = self._requests.get(request)
                if bound is not None and request in bound.instance.queue:
                    self._leave(bound)
                    self._effects.append(Refuse(request, RefusalReason.QUEUE_TIMEOUT))
            case InstanceReported():
                self._reported(event, at)
            case InstanceGone(uid):
                self._gone(uid, at)
            case WakeAnswered(uid):
                self._woken(uid, at, awake=True)
            case WakeFailed(uid):
                self._woken(uid, at, awake=False)
            case _:
                pass  # nodes, and details of leases
        return self._effects

    # ---- choosing ---------------------------------------------------------------------------------------------

    @staticmethod
    def _in_turn(function: _Function, found: Sequence[_Instance]) -> _Instance:
        function.turn = (function.turn + 1) % len(found)
        return found[function.turn]

    @staticmethod
    def _better(one: _Instance, other: _Instance) -> _Instance:
        return other if other.outstanding < one.outstanding else one

    @staticmethod
    def _least(found: Sequence[_Instance], below: Callable[[int], int]) -> _Instance:
        """One with the fewest requests; ties are random."""
        fewest = min(one.outstanding for one in found)
        best = [one for one in found if one.outstanding == fewest]
        return best[below(len(best))] if len(best) > 1 else best[0]

    # ---- requests ---------------------------------------------------------------------------------------------

    def _arrived(self, event: RequestArrived, at: int) -> None:
        request, function = event.request, self._functions.get(event.function)
        if request in self._requests:
            return
        if function is None or not function.known:
            self._effects.append(Refuse(request, RefusalReason.UNKNOWN_FUNCTION))
        elif not function.instances:
            self._effects.append(Refuse(request, RefusalReason.NO_CAPACITY))
        elif function.waiting >= function.queue_length:
            self._effects.append(Refuse(request, RefusalReason.QUEUE_FULL))
        else:
            self._bind(request, function, at, event.deadline_ns, at)

    def _bind(self, request: int, function: _Function, arrived_ns: int, deadline_ns: int, at: int) -> None:
        instance = self._choose(function, list(function.instances.values()))
        bound = _Bound(request, arrived_ns, deadline_ns, instance)
        self._requests[request] = instance.queue[request] = bound
        function.waiting += 1
        self._drain(instance, at)

    def _drain(self, instance: _Instance, at: int) -> None:
        while instance.queue and instance.state is InstanceState.RUNNING and instance.executing < instance.concurrency:
            request, bound = instance.queue.popitem(last=False)
            self._functions[instance.function].waiting -= 1
            instance.executing += 1
            self._effects.append(Dispatch(request, instance.uid, instance.node, at - bound.arrived_ns))
        if instance.queue and instance.state in _FROZEN and not instance.waking:
            instance.waking = True
            self._effects.append(Wake(instance.uid, instance.node))

    def _leave(self, bound: _Bound) -> None:
        del self._requests[bound.request]
        if bound.instance.queue.pop(bound.request, None) is not None:
            self._functions[bound.instance.function].waiting -= 1
        else:
            bound.instance.executing -= 1

    def _ended(self, request: int, at: int) -> None:
        bound = self._requests.get(request)
        if bound is not None:
            self._leave(bound)
            self._drain(bound.instance, at)

    def _refused(self, request: int, at: int) -> None:
        bound = self._requests.get(request)
        if bound is None or request in bound.instance.queue:
            return
        instance, function = bound.instance, self._functions[bound.instance.function]
        self._leave(bound)
        if not function.known:
            self._effects.append(Refuse(request, RefusalReason.UNKNOWN_FUNCTION))
        elif at >= bound.deadline_ns:
            self._effects.append(
                Refuse(request, RefusalReason.QUEUE_TIMEOUT)
            )  # DeadlinePassed came while it was executing
        elif instance.uid not in self._instances:
            self._rebind(bound, function, at)
        else:  # first in the queue until the instance is reported: now it would be refused again
            self._requests[request] = instance.queue[request] = bound
            instance.queue.move_to_end(request, last=False)
            function.waiting += 1

    def _rebind(self, bound: _Bound, function: _Function, at: int) -> None:
        if function.instances:
            self._bind(bound.request, function, bound.arrived_ns, bound.deadline_ns, at)
        else:
            self._effects.append(Refuse(bound.request, RefusalReason.NO_CAPACITY))

    def _removed(self, name: str) -> None:
        function = self._functions.setdefault(name, _Function())
        function.known = False
        for instance in function.instances.values():
            for bound in list(instance.queue.values()):
                self._leave(bound)
                self._effects.append(Refuse(bound.request, RefusalReason.UNKNOWN_FUNCTION))

    # ---- instances --------------------------------------------------------------------------------------------

    def _reported(self, event: InstanceReported, at: int) -> None:
        if event.state.terminal:
            self._gone(event.uid, at)
            return
        instance = self._instances.get(event.uid)
        if instance is None:
            instance = _Instance(event.uid, event.function, event.node, event.concurrency, event.state)
            self._instances[event.uid] = instance
            self._functions.setdefault(event.function, _Function()).instances[event.uid] = instance
        instance.state = event.state
        if event.state is InstanceState.RUNNING:
            instance.waking = False
        self._drain(instance, at)

    def _woken(self, uid: str, at: int, *, awake: bool) -> None:
        instance = self._instances.get(uid)
        if instance is not None:
            instance.waking = False
            if awake:
                instance.state = InstanceState.RUNNING
                self._drain(instance, at)

    def _gone(self, uid: str, at: int) -> None:
        instance = self._instances.pop(uid, None)
        if instance is None:
            return
        function = self._functions[instance.function]
        del function.instances[uid]
        for bound in list(instance.queue.values()):
            self._leave(bound)
            self._rebind(bound, function, at)

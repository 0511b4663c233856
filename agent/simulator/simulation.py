"""The simulation of a fleet: the cores of dispatch, lifecycle, GPU allocator and metering, wired as in the daemons.

Time is a number; whatever takes time (work, freezes, wakes, timers) is an entry of a heap. Operations succeed, reports
are immediate, and the network takes no time: only queueing, freezing and waking are simulated, no programs.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from agent.core.billing.meter import BillingPolicy, Meter, Placement, Subject
from agent.core.billing.window import UsageWindow
from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.events import (
    DeadlinePassed,
    Dispatch,
    Event,
    FunctionSet,
    InstanceReported,
    LeaseAnswered,
    LeaseEnded,
    LeaseRefused,
    NodeReported,
    Refuse,
    RequestArrived,
    Wake,
    WakeAnswered,
)
from agent.core.gpus import allocator, allocator_events
from agent.core.lifecycle import events as ev
from agent.core.lifecycle import machine
from agent.core.lifecycle.machine import Instance
from agent.core.lifecycle.slots import ConcurrencyLimiter
from agent.core.types import DispatchPolicy, InstanceState
from agent.simulator.plan import RequestOutcome, SimulatedPolicy, SimulationPlan, Spent
from agent.simulator.rival_policies import Dispatching, Rival, RivalDispatcher
from agent.simulator.trace import Call

NODE = "host"


@dataclass(slots=True, eq=False)
class _Member:
    """One instance with its admission and its meter."""

    function: str
    instance: Instance
    slots: ConcurrencyLimiter[int]
    meter: Meter
    inbox: deque[ev.Event]
    held_since_ns: int = 0
    stepping: bool = False
    woken_for: bool = False


@dataclass(slots=True)
class _Request:
    arrived_ns: int
    duration_ns: int
    uid: str = ""
    dispatched_ns: int = 0
    direct_wake: bool = False


class Simulation:
    def __init__(self, plan: SimulationPlan) -> None:
        self.plan = plan
        self.at = 0
        sizes = (plan.gpu_memory_bytes, plan.vcpu_millis, plan.memory_bytes, plan.disk_bytes)
        self.outcome = RequestOutcome(plan, Spent(plan.gpu_model, *sizes))
        self._dispatcher = _dispatcher(plan)
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._members: dict[str, _Member] = {}
        self._requests: dict[int, _Request] = {}
        self._numbers = 0
        self._allocator = allocator.GpuAllocator({})
        self._allocator_inbox: deque[allocator_events.AllocatorEvent] = deque()
        self._allocator_busy = False

    def run(self, functions: Iterable[str], calls: Iterable[Call]) -> RequestOutcome:
        """Simulate `calls`, in order of time, of `functions`, until all have ended."""
        began = -1
        for call in calls:
            if began < 0:
                began = self.at = call.at_ns
                self._create_all(sorted(functions))
            self._until(call.at_ns)
            self.at = call.at_ns
            self._arrive(call)
        while self._requests and self._heap:
            self._next()
        for uid, member in self._members.items():
            self._count(member.meter.seal(self.at, self.at))
            if member.instance.holds:
                self.outcome.awake_ns += self.at - member.held_since_ns
            assert not member.slots.in_flight, f"a request is still inside {uid}"
        self.outcome.span_ns = max(0, self.at - max(0, began))
        return self.outcome

    # ---- the clock --------------------------------------------------------------------------------------------

    def _later(self, at: int, what: Callable[[], None]) -> None:
        self._order += 1
        heappush(self._heap, (at, self._order, what))

    def _until(self, at: int) -> None:
        while self._heap and self._heap[0][0] <= at:
            self._next()

    def _next(self) -> None:
        at, _, what = heappop(self._heap)
        self.at = max(self.at, at)
        what()

    # ---- instances --------------------------------------------------------------------------------------------

    def _create_all(self, functions: list[str]) -> None:
        plan = self.plan
        total = plan.instances * len(functions)
        gpus = plan.gpus or total
        devices = {f"GPU-{n}": allocator.AllocatableGpu(f"GPU-{n}", plan.gpu_model) for n in range(gpus)}
        self._allocator = allocator.GpuAllocator(devices, per_gpu=-(-total // gpus), migrate=True)
        policy = DispatchPolicy.SPREAD if plan.policy is SimulatedPolicy.SPREAD else DispatchPolicy.PACK
        self._apply(NodeReported(NODE, gpu_count=gpus))
        for name in functions:
            rules = FunctionSet(name, True, policy, plan.wake_factor, plan.queue_length)
            self._apply(rules)
            for number in range(plan.instances):
                self._create(name, f"{name}-{number}")
        self.outcome.instances = total

    def _create(self, function: str, uid: str) -> None:
        plan = self.plan
        freeze_after = plan.freeze_after_ns
        instance = Instance(uid, freezable=freeze_after is not None, freeze_after_ns=freeze_after or 0, movable=True)
        sizes = (1, plan.gpu_memory_bytes, plan.vcpu_millis, plan.memory_bytes, plan.disk_bytes)
        meter = Meter(
            Subject(uid, NODE, "", function, *sizes),
            BillingPolicy(),
            state=InstanceState.STARTING,
            at=self.at,
            wall=self.at,
            placement=Placement(plan.gpu_model),
            unbilled=True,
        )
        slots: ConcurrencyLimiter[int] = ConcurrencyLimiter(plan.concurrency, 1 << 30)
        self._members[uid] = _Member(function, instance, slots, meter, deque())
        self._tell_allocator(allocator_events.Assign(uid, 1))
        self._step(uid, ev.Created())

    def _step(self, uid: str, event: ev.Event) -> None:
        """As `Actor.handle`."""
        member = self._members[uid]
        member.inbox.append(event)
        if member.stepping:
            return
        member.stepping = True
        while member.inbox:
            self._one_step(uid, member, member.inbox.popleft())
        member.stepping = False

    def _one_step(self, uid: str, member: _Member, event: ev.Event) -> None:
        old = member.instance
        new, effects = machine.step(old, event, self.at)
        member.instance = new
        if new.state is not old.state:
            self._count(member.meter.state_changed(new.state, self.at, self.at))
        if new.holds and not old.holds:
            member.held_since_ns = self.at
        elif old.holds and not new.holds:
            self.outcome.awake_ns += self.at - member.held_since_ns
        self._follow_gate(uid, member)
        for effect in effects:
            self._perform(uid, member, effect)
        if new.state is not old.state:
            self._report(uid, member)

    def _count(self, window: UsageWindow | None) -> None:
        if window is not None:
            spent = self.outcome.spent
            spent.active_ns += window.active_ns
            spent.idle_ns += window.idle_ns
            spent.unbilled_ns += window.unbilled_ns
            spent.invocations += window.invocations

    def _perform(self, uid: str, member: _Member, effect: ev.Effect) -> None:
        match effect:
            case ev.Run(op, gen, _):
                takes = (
                    self.plan.freeze_ns
                    if op is ev.Operation.CHECKPOINT
                    else self.plan.wake_ns
                    if op is ev.Operation.WAKE
                    else 0
                )
                if op is ev.Operation.WAKE:
                    self.outcome.wakes += 1
                self._later(self.at + takes, lambda: self._step(uid, ev.Succeeded(gen)))
            case ev.RequestGpus(avoid):
                self._tell_allocator(allocator_events.Ask(uid, avoid))
            case ev.WithdrawRequest():
                self._tell_allocator(allocator_events.Leave(uid))
            case ev.ReleaseGpus():
                self._tell_allocator(allocator_events.Releasing(uid))
                self._tell_allocator(allocator_events.Released(uid))
            case ev.OrderedFreezeRefused():
                self._tell_allocator(allocator_events.FreezeRefused(uid))
            case ev.ReportActivity(True, preemptible_at_ns):
                self._tell_allocator(allocator_events.BecameIdle(uid, preemptible_at_ns))
            case ev.ReportActivity():
                self._tell_allocator(allocator_events.BecameBusy(uid))
            case ev.SetIdleTimer(gen, at_ns):
                self._later(at_ns, lambda: self._step(uid, ev.IdleTimer(gen)))
            case ev.RefuseWaiters():
                for request in member.slots.clear_queue():
                    self._apply(LeaseRefused(request))
            case _:
                pass  # what only a real instance has: pools, stops, notes

    def _tell_allocator(self, event: allocator_events.AllocatorEvent) -> None:
        self._allocator_inbox.append(event)
        if self._allocator_busy:
            return
        self._allocator_busy = True
        while self._allocator_inbox:
            self._allocator, effects = allocator.step(self._allocator, self._allocator_inbox.popleft(), self.at)
            for effect in effects:
                match effect:
                    case allocator_events.Grant(uid, gpus):
                        self._step(uid, ev.Granted(gpus))
                    case allocator_events.AskFreeze(uid):
                        self._step(uid, ev.FreezeOrdered())
                    case allocator_events.AskDrain(uid):
                        self._step(uid, ev.DrainOrdered())
                    case allocator_events.WakeMeAt(at_ns):
                        self._later(at_ns, lambda: self._tell_allocator(allocator_events.Tick()))
                    case _:
                        pass
        self._allocator_busy = False

    def _follow_gate(self, uid: str, member: _Member) -> None:
        """As `AdmissionGate.set_open`."""
        slots, is_open = member.slots, member.instance.gate_open
        if slots.open == is_open:
            return
        slots.open = is_open
        if is_open:
            quiet = slots.in_flight == 0
            if self._grant(uid, member) and quiet:
                self._step(uid, ev.FirstRequestStarted())
            self._step(uid, ev.WaitersGone())
        elif slots.waiting:
            self._step(uid, ev.WaitersAppeared())

    def _grant(self, uid: str, member: _Member) -> int:
        granted = 0
        while (number := member.slots.grant_next()) is not None:
            self._begin(uid, member, number)
            granted += 1
        return granted

    def _report(self, uid: str, member: _Member) -> None:
        instance = member.instance
        cancellable = (
            instance.state is InstanceState.FREEZING and instance.op is ev.Operation.LOCK and not instance.ordered
        )
        if member.woken_for and instance.state is InstanceState.RUNNING:
            member.woken_for = False
            self._apply(WakeAnswered(uid))
        in_flight = member.slots.in_flight + member.slots.waiting
        self._apply(
            InstanceReported(
                uid, member.function, NODE, instance.state, self.plan.concurrency, in_flight, cancellable,
                gpus=instance.gpus,
            )
        )  # fmt: skip

    # ---- requests ---------------------------------------------------------------------------------------------

    def _arrive(self, call: Call) -> None:
        self._numbers += 1
        number = self._numbers
        self._requests[number] = _Request(call.at_ns, call.duration_ns)
        deadline = call.at_ns + self.plan.queue_timeout_ns
        self._apply(RequestArrived(number, call.function, deadline))
        request = self._requests.get(number)
        if request is not None and not request.uid:
            self._later(deadline, lambda: self._apply(DeadlinePassed(number)))

    def _apply(self, event: Event) -> None:
        """As `DispatchLoop.apply`."""
        for effect in self._dispatcher.step(event, self.at):
            match effect:
                case Dispatch(number, uid, direct_wake=direct_wake):
                    self._enter(number, uid, direct_wake)
                case Wake(uid, _, hold_ns):
                    self._members[uid].woken_for = True
                    self._step(uid, ev.WakeAsked(hold_ns, self.at + self.plan.queue_timeout_ns))
                case Refuse(number, reason):
                    del self._requests[number]
                    self.outcome.refused[reason.value] = self.outcome.refused.get(reason.value, 0) + 1

    def _enter(self, number: int, uid: str, direct_wake: bool) -> None:
        """As `AdmissionGate.try_enter`."""
        request, member = self._requests[number], self._members[uid]
        request.uid, request.dispatched_ns, request.direct_wake = uid, self.at, direct_wake
        slots = member.slots
        if slots.open and slots.in_flight < slots.limit and not slots.waiting:
            slots.in_flight += 1
            self._begin(uid, member, number)
            if slots.in_flight == 1:
                self._step(uid, ev.FirstRequestStarted())
            return
        first = not slots.waiting
        slots.arrive(number)
        if first and not slots.open:
            self._step(uid, ev.WaitersAppeared())

    def _begin(self, uid: str, member: _Member, number: int) -> None:
        request = self._requests[number]
        member.meter.request_began(self.at)
        if request.direct_wake:
            waited = self.at - request.dispatched_ns
            self._later(self.at, lambda: self._apply(LeaseAnswered(number, waited)))
        self._later(self.at + request.duration_ns, lambda: self._end(uid, member, number))

    def _end(self, uid: str, member: _Member, number: int) -> None:
        request = self._requests.pop(number)
        self.outcome.latencies_ns.append(self.at - request.arrived_ns)
        member.slots.done()
        member.meter.request_ended(self.at)
        self._grant(uid, member)
        if member.slots.in_flight == 0:
            self._step(uid, ev.LastRequestEnded())
        self._apply(LeaseEnded(number))


def _dispatcher(plan: SimulationPlan) -> Dispatching:
    if plan.policy in (SimulatedPolicy.PACK, SimulatedPolicy.SPREAD):
        return Dispatcher()
    source = random.Random(plan.seed)
    return RivalDispatcher(Rival(plan.policy.value), source.randrange)

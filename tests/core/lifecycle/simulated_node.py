"""A simulated node for random walks: instances, gates and the GPU allocator, wired as in the host.

Time is a number, and operations end when the walk decides. After every move the invariants of `agent/docs/design.md`
are checked.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from agent.core.gpus import allocator, allocator_events
from agent.core.lifecycle import events as ev
from agent.core.lifecycle import machine
from agent.core.lifecycle.machine import Instance
from agent.core.lifecycle.slots import Arrival, ConcurrencyLimiter
from agent.core.types import MILLISECOND_NS, InstanceState

IMPOSSIBLE = ("instance.impossible_event", "gpu.grant_unexpected")
"""Notes about events that only a bug can send."""


@dataclass
class Member:
    """One instance: its state, its gate, and the operation and timers that run outside."""

    instance: Instance
    slots: ConcurrencyLimiter[int]
    op: ev.Operation | None = None
    op_gen: int = -1
    idle_timer: tuple[int, int] | None = None
    stop_timer: tuple[int, int] | None = None
    destroyed: bool = False
    inside: set[int] = field(default_factory=set)
    history: list[str] = field(default_factory=list)


class SimulatedNode:
    """`move` makes a random move; every request ends in exactly one counter of `ended`."""

    def __init__(
        self,
        seed: int,
        *,
        gpus: int,
        members: int,
        concurrency: int,
        max_waiting: int,
        per_gpu: int,
        migrate: bool = False,
    ) -> None:
        self.random = random.Random(seed)
        self.at = 1_000
        self.traffic = 1.0
        devices = {f"GPU-{i}": allocator.AllocatableGpu(f"GPU-{i}", "Emulated H100") for i in range(gpus)}
        self.allocator = allocator.GpuAllocator(
            devices, per_gpu=per_gpu, max_hold_ns=50 * MILLISECOND_NS, migrate=migrate
        )
        self.members: dict[str, Member] = {}
        self.allocator_inbox: deque[allocator_events.AllocatorEvent] = deque()
        self.allocator_busy = False
        self.tick_at: int | None = None
        self.releasing: set[str] = set()
        self.inbox: dict[str, deque[ev.Event]] = {}
        self.stepping: set[str] = set()
        self.requests = 0
        self.where: dict[int, str] = {}
        self.ended: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        for number in range(members):
            self._create(f"ocr-{number}", concurrency, max_waiting)

    def _create(self, uid: str, concurrency: int, max_waiting: int) -> None:
        me = Instance(
            uid,
            freezable=True,
            freeze_after_ns=5 * MILLISECOND_NS,
            min_awake_ns=2 * MILLISECOND_NS,
            movable=self.allocator.migrate,
        )
        self.members[uid] = Member(me, ConcurrencyLimiter(concurrency, max_waiting))
        self.inbox[uid] = deque()
        self.send_to_allocator(allocator_events.Assign(uid, 1))
        self.send(uid, ev.Created())

    # ---- the wiring of the host -----------------------------------------------------------------------------------

    def send(self, uid: str, event: ev.Event) -> None:
        self.inbox[uid].append(event)
        if uid in self.stepping:
            return
        self.stepping.add(uid)
        while self.inbox[uid]:
            self._step(uid, self.inbox[uid].popleft())
        self.stepping.discard(uid)

    def _step(self, uid: str, event: ev.Event) -> None:
        member = self.members[uid]
        old = member.instance
        member.instance, effects = machine.step(old, event, self.at)
        member.history.append(f"{self.at} {old.state.value} --{event}--> {member.instance.state.value} {effects}")
        self.seen[f"{old.state.value}->{member.instance.state.value}"] += old.state is not member.instance.state
        self._sync_gate(uid)
        for effect in effects:
            self._perform(uid, effect)

    def _sync_gate(self, uid: str) -> None:
        member = self.members[uid]
        slots, is_open = member.slots, member.instance.gate_open
        if slots.open == is_open:
            return
        slots.open = is_open
        if is_open:
            was_idle = slots.in_flight == 0
            if self._grant(uid) and was_idle:
                self.send(uid, ev.FirstRequestStarted())
            self.send(uid, ev.WaitersGone())
        elif slots.waiting:
            self.send(uid, ev.WaitersAppeared())

    def _grant(self, uid: str) -> int:
        member, granted = self.members[uid], 0
        while (request := member.slots.grant_next()) is not None:
            member.inside.add(request)
            granted += 1
        return granted

    def _perform(self, uid: str, effect: ev.Effect) -> None:
        member = self.members[uid]
        match effect:
            case ev.Run(op, gen, _):
                self._begin(member, op, gen)
            case ev.RequestGpus(avoid):
                self.send_to_allocator(allocator_events.Ask(uid, avoid))
            case ev.WithdrawRequest():
                self.send_to_allocator(allocator_events.Leave(uid))
            case ev.ReleaseGpus():
                self.releasing.add(uid)
                self.send_to_allocator(allocator_events.Releasing(uid))
            case ev.OrderedFreezeRefused():
                self.send_to_allocator(allocator_events.FreezeRefused(uid))
            case ev.ReportActivity(True, preemptible_at_ns):
                self.send_to_allocator(allocator_events.BecameIdle(uid, preemptible_at_ns))
            case ev.ReportActivity():
                self.send_to_allocator(allocator_events.BecameBusy(uid))
            case ev.SetIdleTimer(gen, at_ns):
                member.idle_timer = (at_ns, gen)
            case ev.SetStopTimer(gen, at_ns):
                member.stop_timer = (at_ns, gen)
            case ev.RefuseWaiters():
                for request in member.slots.clear_queue():
                    self._end(request, "refused")
            case ev.Note(name, message):
                assert name not in IMPOSSIBLE, message
            case ev.AskCancel() | ev.ClosePool():
                pass

    def _begin(self, member: Member, op: ev.Operation, gen: int) -> None:
        if op is ev.Operation.CHECKPOINT:
            assert not member.inside, "a checkpoint began with a request in flight"
            assert not member.slots.waiting or member.instance.ordered, "a checkpoint began although a request waits"
        if op in (ev.Operation.LOCK, ev.Operation.CHECKPOINT, ev.Operation.WAKE):
            assert not member.inside, f"{op} with a request inside"
        assert member.op is None or op is ev.Operation.DESTROY, f"{op} while {member.op} runs"
        member.op, member.op_gen = op, gen

    def send_to_allocator(self, event: allocator_events.AllocatorEvent) -> None:
        self.allocator_inbox.append(event)
        if self.allocator_busy:
            return
        self.allocator_busy = True
        while self.allocator_inbox:
            self.allocator, effects = allocator.step(self.allocator, self.allocator_inbox.popleft(), self.at)
            for effect in effects:
                match effect:
                    case allocator_events.Grant(uid, gpus):
                        self.releasing.discard(uid)
                        self.send(uid, ev.Granted(gpus))
                    case allocator_events.AskFreeze(uid):
                        self.seen["ask freeze"] += 1
                        self.send(uid, ev.FreezeOrdered())
                    case allocator_events.AskDrain(uid):
                        self.seen["ask drain"] += 1
                        self.send(uid, ev.DrainOrdered())
                    case allocator_events.WakeMeAt(at_ns):
                        self.tick_at = at_ns
                    case allocator_events.Unservable(uid, message):
                        self.seen["unservable"] += 1
                        self.send(uid, ev.GpusLost(message))
                    case allocator_events.Assigned():
                        pass
                    case allocator_events.Unassignable(uid, message):
                        raise AssertionError(f"{uid}: {message}")
        self.allocator_busy = False

    # ---- requests ---------------------------------------------------------------------------------------------------

    def arrive(self, uid: str) -> None:
        member = self.members[uid]
        self.requests += 1
        request = self.requests
        self.where[request] = uid
        first = member.slots.waiting == 0
        match member.slots.arrive(request):
            case Arrival.GRANTED:
                member.inside.add(request)
                if member.slots.in_flight == 1:
                    self.send(uid, ev.FirstRequestStarted())
            case Arrival.QUEUED:
                if first and not member.slots.open:
                    self.send(uid, ev.WaitersAppeared())
            case Arrival.FULL:
                self._end(request, "full")

    def drop(self, uid: str) -> None:
        """A waiting request leaves."""
        member = self.members[uid]
        waiting = [r for r in self.where if self.where[r] == uid and r not in member.inside]
        if waiting and member.slots.leave(request := self.random.choice(waiting)):
            self._end(request, "left")
            if not member.slots.waiting:
                self.send(uid, ev.WaitersGone())

    def finish(self, uid: str) -> None:
        member = self.members[uid]
        if not member.inside:
            return
        request = self.random.choice(sorted(member.inside))
        member.inside.discard(request)
        self._end(request, "answered" if not member.instance.state.terminal else "crashed")
        member.slots.done()
        self._grant(uid)
        if member.slots.in_flight == 0:
            self.send(uid, ev.LastRequestEnded())

    def _end(self, request: int, how: str) -> None:
        assert request in self.where, f"request {request} ended twice"
        del self.where[request]
        self.ended[how] += 1

    # ---- operations and time ----------------------------------------------------------------------------------------

    def op_ends(self, uid: str, how: str) -> None:
        member = self.members[uid]
        if member.op is None:
            return
        op, gen, member.op = member.op, member.op_gen, None
        if op is ev.Operation.DESTROY or (op is ev.Operation.STOP and how == "ok"):
            member.destroyed = True
            how = "ok"
            while member.inside:
                self.finish(uid)  # their connections end with the container
        match how:
            case "ok":
                self.send(uid, ev.Succeeded(gen))
            case "refused":
                self.send(uid, ev.Refused(gen, "NOT_READY"))
            case "cancelled" if op is ev.Operation.LOCK:
                self.send(uid, ev.Refused(gen, machine.CANCELLED))
            case "paused" if op in (ev.Operation.LOCK, ev.Operation.CHECKPOINT):
                self.send(uid, ev.Refused(gen, machine.PAUSED))
            case "pre-freeze" if op is ev.Operation.LOCK:
                self.send(uid, ev.Refused(gen, machine.PRE_FREEZE_FAILED))
            case _:
                self.send(uid, ev.Broken(gen, "FAILED"))

    def prove_release(self) -> None:
        """NVML shows an instance's released GPUs empty."""
        ready = sorted(
            u for u in self.releasing if not self.members[u].instance.state.terminal or self.members[u].destroyed
        )
        if ready:
            uid = self.random.choice(ready)
            self.releasing.discard(uid)
            self.send_to_allocator(allocator_events.Released(uid))

    def pass_time(self, ns: int) -> None:
        self.at += ns
        if self.tick_at is not None and self.tick_at <= self.at:
            self.tick_at = None
            self.send_to_allocator(allocator_events.Tick())
        for uid, member in self.members.items():
            if member.idle_timer is not None and member.idle_timer[0] <= self.at:
                gen, member.idle_timer = member.idle_timer[1], None
                self.send(uid, ev.IdleTimer(gen))
            if member.stop_timer is not None and member.stop_timer[0] <= self.at:
                gen, member.stop_timer = member.stop_timer[1], None
                self.send(uid, ev.StopTimer(gen))

    # ---- walking ----------------------------------------------------------------------------------------------------

    def move(self, faults: float) -> None:
        """One random move."""
        r = self.random
        uid = r.choice(sorted(self.members))
        kind = r.random()
        if kind < 0.25:
            if r.random() < self.traffic:
                self.arrive(uid)
        elif kind < 0.45:
            self.finish(uid)
        elif kind < 0.48:
            self.drop(uid)
        elif kind < 0.70:
            how = (
                r.choice(["refused", "refused", "cancelled", "paused", "pre-freeze", "broken"])
                if r.random() < faults
                else "ok"
            )
            self.op_ends(uid, how)
        elif kind < 0.78:
            self.prove_release()
        elif kind < 0.95:
            self.pass_time(r.choice([1, 100_000, MILLISECOND_NS, 10 * MILLISECOND_NS, 100 * MILLISECOND_NS]))
        elif kind < 0.97:
            self.send(uid, ev.WakeAsked(r.choice([0, MILLISECOND_NS]), self.at + 20 * MILLISECOND_NS))
        elif kind < 0.98:
            self.send(uid, ev.FreezeAsked())
        elif kind < 0.99:
            self.send(uid, ev.WakeExpired())
        elif r.random() < faults:
            self._fault(uid)

    def _fault(self, uid: str) -> None:
        kind = self.random.random()
        if kind < 0.2:
            self._cordon_or_lift(self.random.choice(sorted(self.allocator.devices)))
        elif kind < 0.3:
            self.send(uid, ev.Paused(not self.members[uid].instance.paused))
        elif kind < 0.4:
            self.send(uid, ev.ExecActive(not self.members[uid].instance.exec_active))
        elif kind < 0.7:
            self.send(uid, ev.Exited("INSTANCE_CRASHED"))
        else:
            self.send(uid, ev.StopAsked(10 * MILLISECOND_NS, force=self.random.random() < 0.5))

    def _cordon_or_lift(self, uuid: str) -> None:
        """Cordon a GPU or lift its cordon; at least one GPU is never lost for good."""
        lasting = self.random.random() < 0.3 and any(
            not device.lost and device.uuid != uuid for device in self.allocator.devices.values()
        )
        if self.random.random() < 0.5:
            reason = "XID 79" if lasting else "NVML_ERROR"
            self.send_to_allocator(allocator_events.Cordon(uuid, reason, "health", lasting))
        elif not self.allocator.devices[uuid].lost:
            self.send_to_allocator(allocator_events.Uncordon(uuid, "health"))

    def check(self) -> None:
        """Assert the invariants that hold at every moment."""
        holders = Counter[str]()
        for device in self.allocator.devices.values():
            if device.holder:
                holders[device.holder] += 1
                assert device.uuid in self.allocator.holders[device.holder].gpus
        for uid, held in self.allocator.holders.items():
            assert all(self.allocator.devices[uuid].holder == uid for uuid in held.gpus)
        for uid, member in self.members.items():
            me = member.instance
            assert member.slots.in_flight == len(member.inside) <= member.slots.limit, "\n".join(member.history[-20:])
            if member.inside:
                assert me.state in (InstanceState.RUNNING, InstanceState.STOPPING, InstanceState.FAILED)
                assert me.busy or me.state.terminal, "\n".join(member.history[-20:])
            if me.state in (InstanceState.RUNNING, InstanceState.FREEZING, InstanceState.RESTORING):
                assert me.holds, f"{uid} is {me.state} without its GPU"
                assert holders[uid] == 1, f"{uid} is {me.state} unknown to the allocator"
            assert me.op or not me.stop or me.state is not InstanceState.RUNNING, f"{uid} forgot its stop"
            if me.holds:
                assert holders[uid] == 1, f"{uid} believes it holds a GPU"
            if me.state in (InstanceState.FROZEN, InstanceState.WAITING_GPU):
                assert not me.holds, f"{uid} is {me.state} and holds a GPU"
            waiting = any(waiter.uid == uid for waiter in self.allocator.queue)
            if waiting:
                assert me.state in (InstanceState.STARTING, InstanceState.WAITING_GPU), f"{uid} {me.state} in the queue"
                assert not me.holds
            if me.state is InstanceState.WAITING_GPU:
                assert waiting, f"{uid} waits for a GPU that it did not ask for"
            if me.state is InstanceState.FROZEN:
                assert not member.slots.waiting, f"{uid} is frozen while a request waits: \n" + "\n".join(
                    member.history[-20:]
                )
        inside_or_waiting = sum(len(m.inside) + m.slots.waiting for m in self.members.values())
        assert inside_or_waiting == len(self.where), "a request is in two places, or in none"

    def finish_all(self) -> None:
        """Without further faults, every waiting request must end in bounded time."""
        for device in self.allocator.devices.values():
            if not device.lost:
                self.send_to_allocator(allocator_events.Uncordon(device.uuid, "health"))
        for uid in self.members:
            self.send(uid, ev.Paused(paused=False))
            self.send(uid, ev.ExecActive(inside=False))
        for _ in range(4_000):
            for uid in self.members:
                self.finish(uid)
                self.op_ends(uid, "ok")
                self.check()
            self.prove_release()
            self.pass_time(7 * MILLISECOND_NS)
            self.check()
            if not self.where and all(m.op is None for m in self.members.values()) and not self.releasing:
                return
        stuck = [
            f"{uid}: {m.instance}\n" + "\n".join(m.history[-12:])
            for uid, m in self.members.items()
            if m.slots.waiting or m.inside
        ]
        raise AssertionError(f"requests stay unanswered; allocator: {self.allocator}\n" + "\n".join(stuck))

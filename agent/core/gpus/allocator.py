"""The GPU allocator: `step(state, event, at) -> (state, effects)` decides which instance holds which GPU.

- GPUs are dedicated: an awake instance holds whole GPUs, a frozen one none.
- All or nothing: no instance holds some of its GPUs while it waits for the others.
- First come, first served: GPUs that the head of the queue can use are reserved for it; later waiters get the rest.
- The victim is the least recently used idle holder that may be preempted; if it refuses, the next one.
- After `max_hold_ns` of waiting, a busy holder is asked to drain.
- A GPU is granted to another instance only after proof that it is empty (`Released`); its last holder may get it back
  without.
- With `migrate`, a waiter may use any GPU of its own GPUs' model, its own first; the GPUs it wakes on become its own.

The node loop owns the state. Design: `agent/docs/design.md`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from agent.core.gpus import allocator_events as ev
from agent.core.gpus.allocator_events import AllocatorEffect, AllocatorEvent, Cordon
from agent.core.types import SECOND_NS

REFUSAL_BACK_OFF_NS = SECOND_NS


@dataclass(frozen=True, slots=True)
class AllocatableGpu:
    """One GPU: the uid of its holder ("" = free) and its cordons, one per source."""

    uuid: str
    model: str
    holder: str = ""
    cordons: tuple[Cordon, ...] = ()

    @property
    def cordoned(self) -> str:
        """Why no other instance may use it; "" without a cordon."""
        return "; ".join(cordon.reason for cordon in self.cordons)

    @property
    def lost(self) -> bool:
        """Out of use until a person or a reset repairs it."""
        return any(cordon.lasting for cordon in self.cordons)


@dataclass(frozen=True, slots=True)
class Holder:
    """An instance that holds GPUs. `idle_since_ns` is None while it is busy. `asked`: a freeze or drain is under way.
    `leaving`: it gave the GPUs up; the proof that they are empty is pending."""

    gpus: tuple[str, ...]
    since_ns: int
    idle_since_ns: int | None = None
    preemptible_at_ns: int = 0
    asked: bool = False
    leaving: bool = False


@dataclass(frozen=True, slots=True)
class Waiter:
    """An instance that waits for `count` of the GPUs in `allowed`, all or nothing."""

    uid: str
    count: int
    allowed: tuple[str, ...]
    since_ns: int


@dataclass(frozen=True, slots=True)
class GpuAllocator:
    """The state of all GPUs of a node.

    - `per_gpu`: most instances that share a GPU; with `migrate`, on average over the GPUs of a model
    - `max_hold_ns`: how long a waiter waits before a busy holder is asked to drain
    - `assigned`: the GPUs chosen for an instance at its creation; with `migrate`, the last ones granted
    """

    devices: Mapping[str, AllocatableGpu]
    per_gpu: int = 1
    max_hold_ns: int = 10 * SECOND_NS
    migrate: bool = False
    assigned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    holders: Mapping[str, Holder] = field(default_factory=dict)
    queue: tuple[Waiter, ...] = ()

    def sharers(self, uuid: str) -> int:
        """Number of instances assigned to this GPU, awake or frozen."""
        return sum(uuid in gpus for gpus in self.assigned.values())


AllocatorStep = tuple[GpuAllocator, list[AllocatorEffect]]


def step(state: GpuAllocator, event: AllocatorEvent, at: int) -> AllocatorStep:  # noqa: C901 - one flat table
    """Apply `event` at monotonic time `at` (ns). Pure: the caller performs the effects in order."""
    match event:
        case ev.Assign():
            return _assign(state, event)
        case ev.Adopt(uid, gpus, holds):
            state = replace(state, assigned={**state.assigned, uid: gpus})
            if holds:
                state = _grant(state, uid, gpus, at)
        case ev.Unassign(uid):
            assigned = {key: value for key, value in state.assigned.items() if key != uid}
            state = replace(_free(_withdraw(state, uid), uid), assigned=assigned)
        case ev.Ask(uid, avoid, stays):
            state = _enqueue(state, uid, avoid, stays, at)
        case ev.Leave(uid):
            state = _withdraw(state, uid)
        case ev.Released(uid):
            state = _free(state, uid)
        case ev.Releasing(uid):
            state = _with_holder(state, uid, asked=True, leaving=True, idle_since_ns=None)
        case ev.FreezeRefused(uid):
            idle_since = state.holders[uid].idle_since_ns if uid in state.holders else None
            again_at = at + REFUSAL_BACK_OFF_NS
            state = _with_holder(state, uid, asked=False, idle_since_ns=idle_since, preemptible_at_ns=again_at)
        case ev.BecameIdle(uid, preemptible_at_ns):
            state = _with_holder(state, uid, idle_since_ns=at, preemptible_at_ns=preemptible_at_ns)
        case ev.BecameBusy(uid):
            state = _with_holder(state, uid, idle_since_ns=None)
        case Cordon(uuid, _, source):
            state = _with_cordon(state, uuid, source, event)
        case ev.Uncordon(uuid, source):
            state = _with_cordon(state, uuid, source, None)
        case ev.Tick():
            pass
        case _:
            assert_never(event)
    return _serve(state, at)


def _assign(state: GpuAllocator, wish: ev.Assign) -> AllocatorStep:
    """Choose the GPUs with the fewest sharers, so that instances spread before they share."""
    uid, count = wish.uid, wish.count
    if uid in state.assigned:
        return state, [ev.Assigned(uid, state.assigned[uid])]
    fitting = [d for d in state.devices.values() if not d.cordoned and (wish.among is None or d.uuid in wish.among)]
    roomy = sorted((state.sharers(d.uuid), i, d.uuid) for i, d in enumerate(fitting))
    chosen = tuple(uuid for sharers, _, uuid in roomy if sharers < state.per_gpu)[:count]
    full = state.migrate and sum(sharers for sharers, _, _ in roomy) + count > state.per_gpu * len(fitting)
    if len(chosen) < count or full:
        return state, [
            ev.Unassignable(
                uid,
                f"{count} GPU(s){wish.wanted} wanted, {0 if full else len(chosen)} of {len(fitting)} such GPU(s) on "
                f"this node have room (gpu.instances_per_gpu: {state.per_gpu}); remove an instance or raise it",
            )
        ]
    return replace(state, assigned={**state.assigned, uid: chosen}), [ev.Assigned(uid, chosen)]


def _with_cordon(state: GpuAllocator, uuid: str, source: str, cordon: Cordon | None) -> GpuAllocator:
    """Replace the source's cordon on this GPU; None lifts it."""
    device = state.devices.get(uuid)
    if device is None:
        return state  # not a GPU of this node
    others = tuple(each for each in device.cordons if each.source != source)
    device = replace(device, cordons=others if cordon is None else (*others, cordon))
    return replace(state, devices={**state.devices, uuid: device})


def _enqueue(state: GpuAllocator, uid: str, avoid: tuple[str, ...], stays: bool, at: int) -> GpuAllocator:
    held = state.holders.get(uid)
    if (held is not None and not held.leaving) or any(waiter.uid == uid for waiter in state.queue):
        return state
    own = state.assigned[uid]
    allowed = own if stays else _allowed(state, own, avoid)
    return replace(state, queue=(*state.queue, Waiter(uid, len(own), allowed, at)))


def _allowed(state: GpuAllocator, own: tuple[str, ...], avoid: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs an instance may use, preferred ones first."""
    models = {state.devices[uuid].model for uuid in own}
    if not state.migrate or len(models) != 1:  # only GPUs of one model replace each other
        return own
    others = [d for d in state.devices.values() if d.model in models and d.uuid not in own]
    others.sort(key=lambda device: state.sharers(device.uuid))
    pool = (*own, *(device.uuid for device in others))
    rest = tuple(uuid for uuid in pool if uuid not in avoid)
    return rest if sum(not state.devices[uuid].cordoned for uuid in rest) >= len(own) else pool


def _withdraw(state: GpuAllocator, uid: str) -> GpuAllocator:
    return replace(state, queue=tuple(waiter for waiter in state.queue if waiter.uid != uid))


def _grant(state: GpuAllocator, uid: str, gpus: tuple[str, ...], at: int) -> GpuAllocator:
    devices = dict(state.devices)
    for uuid in gpus:
        devices[uuid] = replace(devices[uuid], holder=uid)
    return replace(state, devices=devices, holders={**state.holders, uid: Holder(gpus, at)})


def _free(state: GpuAllocator, uid: str) -> GpuAllocator:
    held = state.holders.get(uid)
    if held is None:
        return state
    devices = dict(state.devices)
    for uuid in held.gpus:
        devices[uuid] = replace(devices[uuid], holder="")
    return replace(state, devices=devices, holders={key: value for key, value in state.holders.items() if key != uid})


def _with_holder(
    state: GpuAllocator,
    uid: str,
    *,
    idle_since_ns: int | None,
    asked: bool | None = None,
    leaving: bool = False,
    preemptible_at_ns: int | None = None,
) -> GpuAllocator:
    held = state.holders.get(uid)
    if held is None:
        return state
    held = replace(
        held,
        idle_since_ns=idle_since_ns,
        asked=held.asked if asked is None else asked,
        leaving=held.leaving or leaving,
        preemptible_at_ns=held.preemptible_at_ns if preemptible_at_ns is None else preemptible_at_ns,
    )
    return replace(state, holders={**state.holders, uid: held})


def _serve(state: GpuAllocator, at: int) -> AllocatorStep:
    """Walk the queue in order: grant what is free, ask holders to make room for the rest, set the next timer."""
    effects: list[AllocatorEffect] = []
    reserved: set[str] = set()
    timers: list[int] = []
    for waiter in state.queue:
        if (held := state.holders.get(waiter.uid)) is not None:
            # Its former GPUs are not proven empty, which it does not need for itself. If it can't have those, it waits
            # for the proof: no instance holds GPUs twice.
            if reserved.isdisjoint(held.gpus) and set(held.gpus) <= set(waiter.allowed) and _usable(state, held.gpus):
                state = _grant(_withdraw(state, waiter.uid), waiter.uid, held.gpus, at)
                effects.append(ev.Grant(waiter.uid, held.gpus))
            continue
        usable = [u for u in waiter.allowed if u not in reserved and not state.devices[u].cordoned]
        free = [u for u in usable if not state.devices[u].holder]
        if len(free) >= waiter.count:
            gpus = tuple(free[: waiter.count])
            state = _grant(_withdraw(state, waiter.uid), waiter.uid, gpus, at)
            if state.migrate:
                state = replace(state, assigned={**state.assigned, waiter.uid: gpus})
            effects.append(ev.Grant(waiter.uid, gpus))
            continue
        if sum(not state.devices[u].lost for u in waiter.allowed) < waiter.count:
            state = _withdraw(state, waiter.uid)
            lost = [state.devices[u] for u in waiter.allowed if state.devices[u].lost]
            effects.append(ev.Unservable(waiter.uid, "; ".join(f"{d.uuid}: {d.cordoned}" for d in lost)))
            continue
        if sum(not state.devices[u].cordoned for u in waiter.allowed) < waiter.count:
            continue  # not before a cordon is lifted: no GPU is reserved and no holder gives way for it
        reserved.update(waiter.allowed)
        state, asked = _make_room(state, waiter, usable, len(free), at, timers)
        effects.extend(asked)
    if timers:
        effects.append(ev.WakeMeAt(min(timers)))
    return state, effects


def _usable(state: GpuAllocator, gpus: tuple[str, ...]) -> bool:
    return not any(state.devices[uuid].cordoned for uuid in gpus)


def _make_room(
    state: GpuAllocator, waiter: Waiter, usable: list[str], free: int, at: int, timers: list[int]
) -> tuple[GpuAllocator, list[AllocatorEffect]]:
    """Ask as many holders as needed, once all of them may be asked; GPUs already being vacated count."""
    holders = {
        state.devices[u].holder: state.holders[state.devices[u].holder] for u in usable if state.devices[u].holder
    }
    coming = sum(u in holder.gpus for holder in holders.values() if holder.asked for u in usable)
    short = waiter.count - free - coming
    idle = sorted((h.idle_since_ns, uid) for uid, h in holders.items() if h.idle_since_ns is not None and not h.asked)
    busy = sorted((h.since_ns, uid) for uid, h in holders.items() if h.idle_since_ns is None and not h.asked)
    drain_at = waiter.since_ns + state.max_hold_ns
    victims: list[tuple[str, int, bool]] = [(uid, holders[uid].preemptible_at_ns, True) for _, uid in idle]
    victims += [(uid, max(drain_at, holders[uid].preemptible_at_ns), False) for _, uid in busy]
    chosen: list[tuple[str, bool]] = []
    for uid, possible_at, is_idle in victims:
        if short > 0 and possible_at <= at:
            chosen.append((uid, is_idle))
            short -= sum(u in holders[uid].gpus for u in usable)
    if short > 0:  # all or nothing: no holder freezes for a waiter that can't be served yet
        timers.extend(possible_at for _, possible_at, _ in victims if possible_at > at)
        return state, []
    effects: list[AllocatorEffect] = []
    for uid, is_idle in chosen:
        state = _with_holder(state, uid, idle_since_ns=holders[uid].idle_since_ns, asked=True)
        effects.append(ev.AskFreeze(uid) if is_idle else ev.AskDrain(uid))
    return state, effects

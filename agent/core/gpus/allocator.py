"""Who holds which GPU, and who gives way: `step(book, event, at) -> (book, effects)`, owned by the node loop.

Rules (DESIGN section 3). GPUs are dedicated: an awake instance holds whole GPUs, a frozen one none. All or nothing:
nobody holds some while waiting for more. First come, first served: what the head of the queue can use is reserved for
it, later waiters may use only what it cannot. A victim is the least recently used idle holder that may be preempted;
if it refuses, the next. When a waiter has waited `max_hold_ns`, a busy holder is asked to drain. A GPU changes hands
only on proof (`Released`), never on a state; who gave it up may have it back without. With `migrate`, whoever waits may
use any GPU of its own GPUs' model, rather its own; where it woke is its own from then on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from agent.core.gpus.allocator_events import (
    Adopt,
    Ask,
    AskDrain,
    AskFreeze,
    Assign,
    Assigned,
    BecameBusy,
    BecameIdle,
    BookEffect,
    BookEvent,
    Cordon,
    FreezeRefused,
    Grant,
    Leave,
    Released,
    Releasing,
    Tick,
    Unassign,
    Unassignable,
    Uncordon,
    Unservable,
    WakeMeAt,
)
from agent.core.types import SECOND_NS

REFUSAL_BACK_OFF_NS = SECOND_NS


@dataclass(frozen=True, slots=True)
class AllocatableGpu:
    """One GPU: who holds it ("" = free), and the cordons that keep others away, by source."""

    uuid: str
    model: str
    holder: str = ""
    cordons: tuple[Cordon, ...] = ()

    @property
    def cordoned(self) -> str:
        """Why nobody new may use it, "" if anybody may."""
        return "; ".join(cordon.reason for cordon in self.cordons)

    @property
    def lost(self) -> bool:
        """Out of use for good, as far as this program can tell."""
        return any(cordon.lasting for cordon in self.cordons)


@dataclass(frozen=True, slots=True)
class Holder:
    """An instance that holds GPUs. `idle_since_ns` is None while busy; `asked`: a freeze or drain is under way;
    `leaving`: it gave them up, the proof is on its way."""

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
    """The whole state. `assigned`: the GPUs of an instance, chosen at its creation; with `migrate` the ones it was
    granted last. `per_gpu` bounds how many instances share a GPU, with `migrate` on the average over its model."""

    devices: Mapping[str, AllocatableGpu]
    per_gpu: int = 1
    max_hold_ns: int = 10 * SECOND_NS
    migrate: bool = False
    assigned: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    holders: Mapping[str, Holder] = field(default_factory=dict)
    queue: tuple[Waiter, ...] = ()

    def sharers(self, uuid: str) -> int:
        """How many instances are assigned to this GPU, awake or not."""
        return sum(uuid in gpus for gpus in self.assigned.values())


BookStep = tuple[GpuAllocator, list[BookEffect]]


def step(book: GpuAllocator, event: BookEvent, at: int) -> BookStep:  # noqa: C901 - one flat table is easiest to read
    """Apply `event` at monotonic time `at` (ns); effects are to be performed in order."""
    effects: list[BookEffect] = []
    match event:
        case Assign(uid, count, model):
            return _assign(book, uid, count, model)
        case Adopt(uid, gpus, holds):
            book = replace(book, assigned={**book.assigned, uid: gpus})
            if holds:
                book = _take(book, uid, gpus, at)
        case Unassign(uid):
            assigned = {key: value for key, value in book.assigned.items() if key != uid}
            book = replace(_let_go(_leave(book, uid), uid), assigned=assigned)
        case Ask(uid, avoid, stays):
            book = _enqueue(book, uid, avoid, stays, at)
        case Leave(uid):
            book = _leave(book, uid)
        case Released(uid):
            book = _let_go(book, uid)
        case Releasing(uid):
            book = _with_holder(book, uid, asked=True, leaving=True, idle_since_ns=None)
        case FreezeRefused(uid):
            held = book.holders.get(uid)
            idle_since = None if held is None else held.idle_since_ns
            book = _with_holder(
                book, uid, asked=False, idle_since_ns=idle_since, preemptible_at_ns=at + REFUSAL_BACK_OFF_NS
            )
        case BecameIdle(uid, preemptible_at_ns):
            book = _with_holder(book, uid, idle_since_ns=at, preemptible_at_ns=preemptible_at_ns)
        case BecameBusy(uid):
            book = _with_holder(book, uid, idle_since_ns=None)
        case Cordon(uuid, _, source):
            book = _with_cordon(book, uuid, source, event)
        case Uncordon(uuid, source):
            book = _with_cordon(book, uuid, source, None)
        case Tick():
            pass
        case _:
            assert_never(event)
    book, more = _serve(book, at)
    return book, effects + more


def _assign(book: GpuAllocator, uid: str, count: int, model: str) -> BookStep:
    """The GPUs with the fewest sharers first, so that instances spread before they share."""
    if uid in book.assigned:
        return book, [Assigned(uid, book.assigned[uid])]
    fitting = [d for d in book.devices.values() if not d.cordoned and model in ("", d.model)]
    roomy = sorted((book.sharers(d.uuid), i, d.uuid) for i, d in enumerate(fitting))
    chosen = tuple(uuid for sharers, _, uuid in roomy if sharers < book.per_gpu)[:count]
    full = book.migrate and sum(sharers for sharers, _, _ in roomy) + count > book.per_gpu * len(fitting)
    if len(chosen) < count or full:
        wanted = f"{count} GPU(s)" + (f" of model {model!r}" if model else "")
        return book, [
            Unassignable(
                uid,
                f"{wanted} wanted, {0 if full else len(chosen)} of {len(fitting)} such GPU(s) on this node have room "
                f"(gpu.instances_per_gpu: {book.per_gpu}); remove an instance or raise it",
            )
        ]
    return replace(book, assigned={**book.assigned, uid: chosen}), [Assigned(uid, chosen)]


def _with_cordon(book: GpuAllocator, uuid: str, source: str, cordon: Cordon | None) -> GpuAllocator:
    """Put the source's cordon in place of the one it had."""
    device = book.devices.get(uuid)
    if device is None:
        return book  # not one of ours
    others = tuple(each for each in device.cordons if each.source != source)
    device = replace(device, cordons=others if cordon is None else (*others, cordon))
    return replace(book, devices={**book.devices, uuid: device})


def _enqueue(book: GpuAllocator, uid: str, avoid: tuple[str, ...], stays: bool, at: int) -> GpuAllocator:
    held = book.holders.get(uid)
    if (held is not None and not held.leaving) or any(waiter.uid == uid for waiter in book.queue):
        return book
    own = book.assigned[uid]
    allowed = own if stays else _allowed(book, own, avoid)
    return replace(book, queue=(*book.queue, Waiter(uid, len(own), allowed, at)))


def _allowed(book: GpuAllocator, own: tuple[str, ...], avoid: tuple[str, ...]) -> tuple[str, ...]:
    """The GPUs an instance may use, the ones it should rather use first."""
    models = {book.devices[uuid].model for uuid in own}
    if not book.migrate or len(models) != 1:  # GPUs of two models can't stand in for each other
        return own
    others = [d for d in book.devices.values() if d.model in models and d.uuid not in own]
    others.sort(key=lambda device: book.sharers(device.uuid))
    pool = (*own, *(device.uuid for device in others))
    rest = tuple(uuid for uuid in pool if uuid not in avoid)
    return rest if sum(not book.devices[uuid].cordoned for uuid in rest) >= len(own) else pool


def _leave(book: GpuAllocator, uid: str) -> GpuAllocator:
    return replace(book, queue=tuple(waiter for waiter in book.queue if waiter.uid != uid))


def _take(book: GpuAllocator, uid: str, gpus: tuple[str, ...], at: int) -> GpuAllocator:
    devices = dict(book.devices)
    for uuid in gpus:
        devices[uuid] = replace(devices[uuid], holder=uid)
    return replace(book, devices=devices, holders={**book.holders, uid: Holder(gpus, at)})


def _let_go(book: GpuAllocator, uid: str) -> GpuAllocator:
    held = book.holders.get(uid)
    if held is None:
        return book
    devices = dict(book.devices)
    for uuid in held.gpus:
        devices[uuid] = replace(devices[uuid], holder="")
    return replace(book, devices=devices, holders={key: value for key, value in book.holders.items() if key != uid})


def _with_holder(
    book: GpuAllocator,
    uid: str,
    *,
    idle_since_ns: int | None,
    asked: bool | None = None,
    leaving: bool = False,
    preemptible_at_ns: int | None = None,
) -> GpuAllocator:
    held = book.holders.get(uid)
    if held is None:
        return book
    held = replace(
        held,
        idle_since_ns=idle_since_ns,
        asked=held.asked if asked is None else asked,
        leaving=held.leaving or leaving,
        preemptible_at_ns=held.preemptible_at_ns if preemptible_at_ns is None else preemptible_at_ns,
    )
    return replace(book, holders={**book.holders, uid: held})


def _serve(book: GpuAllocator, at: int) -> BookStep:
    """Walk the queue in order: grant what can be granted, make room for the rest, remember when to look again."""
    effects: list[BookEffect] = []
    reserved: set[str] = set()
    look_again: list[int] = []
    for waiter in book.queue:
        if (held := book.holders.get(waiter.uid)) is not None:
            # What it gave up is not proven free: for itself it need not be. Else it keeps its place in the line, for
            # nobody holds GPUs twice.
            if reserved.isdisjoint(held.gpus) and set(held.gpus) <= set(waiter.allowed) and _usable(book, held.gpus):
                book = _take(_leave(book, waiter.uid), waiter.uid, held.gpus, at)
                effects.append(Grant(waiter.uid, held.gpus))
            continue
        usable = [u for u in waiter.allowed if u not in reserved and not book.devices[u].cordoned]
        free = [u for u in usable if not book.devices[u].holder]
        if len(free) >= waiter.count:
            gpus = tuple(free[: waiter.count])
            book = _take(_leave(book, waiter.uid), waiter.uid, gpus, at)
            if book.migrate:
                book = replace(book, assigned={**book.assigned, waiter.uid: gpus})
            effects.append(Grant(waiter.uid, gpus))
            continue
        if sum(not book.devices[u].lost for u in waiter.allowed) < waiter.count:
            book = _leave(book, waiter.uid)
            lost = [book.devices[u] for u in waiter.allowed if book.devices[u].lost]
            effects.append(Unservable(waiter.uid, "; ".join(f"{d.uuid}: {d.cordoned}" for d in lost)))
            continue
        if sum(not book.devices[u].cordoned for u in waiter.allowed) < waiter.count:
            continue  # it can't be served until a cordon is lifted: nobody waits or gives way for it
        reserved.update(waiter.allowed)
        book, asked = _make_room(book, waiter, usable, len(free), at, look_again)
        effects.extend(asked)
    if look_again:
        effects.append(WakeMeAt(min(look_again)))
    return book, effects


def _usable(book: GpuAllocator, gpus: tuple[str, ...]) -> bool:
    return not any(book.devices[uuid].cordoned for uuid in gpus)


def _make_room(
    book: GpuAllocator, waiter: Waiter, usable: list[str], free: int, at: int, look_again: list[int]
) -> tuple[GpuAllocator, list[BookEffect]]:
    """Ask as many holders as are needed, once all of them may be asked; GPUs already being vacated count."""
    holders = {book.devices[u].holder: book.holders[book.devices[u].holder] for u in usable if book.devices[u].holder}
    coming = sum(u in holder.gpus for holder in holders.values() if holder.asked for u in usable)
    short = waiter.count - free - coming
    idle = sorted((h.idle_since_ns, uid) for uid, h in holders.items() if h.idle_since_ns is not None and not h.asked)
    busy = sorted((h.since_ns, uid) for uid, h in holders.items() if h.idle_since_ns is None and not h.asked)
    drain_at = waiter.since_ns + book.max_hold_ns
    victims: list[tuple[str, int, bool]] = [(uid, holders[uid].preemptible_at_ns, True) for _, uid in idle]
    victims += [(uid, max(drain_at, holders[uid].preemptible_at_ns), False) for _, uid in busy]
    chosen: list[tuple[str, bool]] = []
    for uid, possible_at, is_idle in victims:
        if short > 0 and possible_at <= at:
            chosen.append((uid, is_idle))
            short -= sum(u in holders[uid].gpus for u in usable)
    if short > 0:  # all or nothing: nobody sleeps for a waiter that can't be served yet
        look_again.extend(possible_at for _, possible_at, _ in victims if possible_at > at)
        return book, []
    effects: list[BookEffect] = []
    for uid, is_idle in chosen:
        book = _with_holder(book, uid, idle_since_ns=holders[uid].idle_since_ns, asked=True)
        effects.append(AskFreeze(uid) if is_idle else AskDrain(uid))
    return book, effects

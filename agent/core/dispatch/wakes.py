"""One instance's wake, from the dispatcher's side: how it begins, and the ways it ends.

A wake is asked for by the shell's Wake call, or by the request that was sent to the sleeping instance
(`DispatchInstance.bound`). Pure; each function leaves the indexes of `leases` in order.
"""

from __future__ import annotations

from agent.core.dispatch.index import Availability, DispatchInstance, InstanceIndex, NodeEntry
from agent.core.types import SECOND_NS

BACK_OFF_NS = SECOND_NS // 2
BACK_OFF_MAX_NS = 30 * SECOND_NS
"""After a failed wake the instance is not asked again for so long; doubled with each failure in a row."""


def begin(slots: InstanceIndex, slot: DispatchInstance, at: int, bound: int = -1) -> None:
    """Counted from now on: by the request `bound`, or by a Wake."""
    slot.wake_asked_ns, slot.bound = at, bound
    slots.settle(slot)
    _count(slot.node, 1)


def came_awake(slots: InstanceIndex, slot: DispatchInstance, at: int, took_ns: int) -> None:
    """It did what it should, as its answer or a report says, whichever is here first. `settle` comes after it."""
    slot.woken_ns, slot.wake_took_ns, slot.failed_wakes = at, took_ns, 0
    end(slots, slot)
    if took_ns:  # else it was awake before we asked
        slots.learn_wake(slot.node, took_ns)


def end(slots: InstanceIndex, slot: DispatchInstance) -> None:
    """None is under way any more, if one was. `settle` comes after it."""
    if slot.wake_asked_ns < 0:
        return
    if slot.bound >= 0 and slot.place is Availability.WAKING:
        slots.bound -= 1
    slot.wake_asked_ns = slot.bound = -1
    _count(slot.node, -1)


def failed(slots: InstanceIndex, slot: DispatchInstance, at: int) -> None:
    """Not again at once, and less often each time."""
    end(slots, slot)
    wait = min(BACK_OFF_NS << min(slot.failed_wakes, 16), BACK_OFF_MAX_NS)
    slot.failed_wakes += 1
    set_aside(slots, slot, at + wait)


def set_aside(slots: InstanceIndex, slot: DispatchInstance, until: int) -> None:
    """It refused something: nothing for it until its node is heard again, and not before `until`."""
    slot.aside, slot.aside_until_ns = True, until
    slot.node.aside[slot.uid] = slot
    slots.settle(slot)


def _count(node: NodeEntry, sign: int) -> None:
    """What else may be woken there takes longer now, or shorter."""
    node.wakes += sign
    for slots in list(node.frozen_in.values()):
        slots.relist(node)

"""How a lease begins, moves and ends: the only code that changes who holds which slot.

A lease is a request's hold on one slot of an instance. It ends with the response; with the node (its agent was started
anew, or is lost), and then the request follows its own connection to the end while the lease is void; or it moves, when
the agent had another instance of the function serve the request than the dispatcher thought. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.core.dispatch import wakes
from agent.core.dispatch.index import DispatchInstance, NodeEntry
from agent.core.dispatch.queue import FunctionQueueState, Request


def begin(function: FunctionQueueState, request: Request, slot: DispatchInstance, at: int) -> None:
    """`request` holds one of the slot's from now on."""
    slot.holders[request.request] = request
    slot.leased += 1
    slot.changed_ns = at
    function.count_leases(1, at)
    request.slot, request.term, request.leased_ns = slot, slot.term, at
    function.slots.settle(slot)


def end(function: FunctionQueueState, request: Request, at: int, *, forgotten: bool) -> bool:
    """Take the lease back; False if it was void. `forgotten`: the instance is gone, there is nothing to free."""
    slot, request.slot = request.slot, None
    assert slot is not None
    if request.term != slot.term:
        function.void_leases -= 1
        return False
    del slot.holders[request.request]
    slot.leased -= 1
    slot.changed_ns = at
    function.count_leases(-1, at)
    if not forgotten:
        if slot.bound == request.request:
            wakes.end(function.slots, slot)
        function.slots.settle(slot)
    return True


def served_by(request: Request, actual: DispatchInstance) -> None:
    """Another instance served it than we thought: whoever we thought was there is where we thought this one was."""
    assumed = request.slot
    if assumed is None or assumed is actual or request.term != assumed.term or actual.node is not assumed.node:
        return
    if assumed.function != actual.function or not actual.holders or assumed.bound >= 0 or actual.bound >= 0:
        return
    other = next(iter(actual.holders.values()))
    del actual.holders[other.request], assumed.holders[request.request]
    actual.holders[request.request], assumed.holders[other.request] = request, other
    request.slot, request.term = actual, actual.term
    other.slot, other.term = assumed, assumed.term


def end_all(node: NodeEntry, functions: Mapping[str, FunctionQueueState], at: int) -> None:
    """Its agent is gone, and the leases on it with it; their requests follow their own connections to the end."""
    for slot in node.slots.values():
        function = functions[slot.function]
        wakes.end(function.slots, slot)
        function.void_leases += slot.leased
        function.count_leases(-slot.leased, at)
        slot.holders.clear()
        slot.leased, slot.changed_ns = 0, at
        slot.term += 1
        function.slots.settle(slot)

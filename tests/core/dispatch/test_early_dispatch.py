"""Early dispatch: requests wait at a node for the first of its instances with a free slot."""

from __future__ import annotations

from agent.core.dispatch.events import (
    Dispatch,
    Effect,
    Event,
    FunctionSet,
    InstanceReported,
    LeaseEnded,
    LeaseRefused,
    NodeReported,
    RefusalReason,
    Refuse,
    Wake,
    WakeAnswered,
)
from agent.core.types import MILLISECOND_NS, SECOND_NS, InstanceState
from tests.core.dispatch.test_dispatcher import FROZEN, RUNNING, DispatcherRig, instance, uids


def early(effects: list[Effect]) -> list[int]:
    return [effect.request for effect in effects if isinstance(effect, Dispatch) and effect.early]


def four(uid: str, node: str = "n1", state: InstanceState = RUNNING) -> InstanceReported:
    """An instance with four slots, which allow one early dispatch."""
    return instance(uid, state, node, concurrency=4)


def full(*events: Event) -> DispatcherRig:
    """All slots of a, on n1, are taken by requests 1 to 4."""
    rig = DispatcherRig(four("a"), *events, early_dispatch=True)
    for number in range(1, 5):
        rig.went(number)
    return rig


def test_the_next_request_is_dispatched_early_and_takes_the_next_free_slot() -> None:
    rig = full()
    assert early(rig.arrive(5)) == [5]
    assert rig.arrive(6) == [], "one is enough for four slots"
    assert rig.dispatcher.queue_state("ocr").queued == 2
    assert early(rig(LeaseEnded(1, "a"))) == [6], "request 5 has the slot, and its place at the node is free"
    assert rig.dispatcher.leased("a") == 4
    for number in range(2, 7):
        assert rig(LeaseEnded(number, "a")) == []
    assert rig.dispatcher.leased("a") == 0


def test_short_requests_allow_more_early_dispatches() -> None:
    sixteen = [instance(uid, concurrency=4) for uid in "abcd"]
    seconds = DispatcherRig(*sixteen, early_dispatch=True)
    millis = DispatcherRig(*sixteen, early_dispatch=True)
    for rig, took_ns in ((seconds, 2 * SECOND_NS), (millis, 40 * MILLISECOND_NS)):
        for number in range(1, 17):
            rig.went(number)
            rig.now -= MILLISECOND_NS
        rig.now += took_ns - MILLISECOND_NS
        rig(LeaseEnded(1))
        rig.went(17)
    assert [early(seconds.arrive(number)) for number in (18, 19)] == [[18], []]
    assert [early(millis.arrive(number)) for number in range(18, 24)] == [[18], [19], [20], [21], [], []]


def test_with_few_slots_nothing_is_dispatched_early() -> None:
    rig = DispatcherRig(instance("a", concurrency=3), early_dispatch=True)
    for number in range(1, 4):
        rig.went(number)
    assert rig.arrive(4) == []


def test_early_dispatches_count_in_the_queue() -> None:
    rig = full(FunctionSet("ocr", queue_length=2))
    assert early(rig.arrive(5)) == [5]
    assert rig.arrive(6) == []
    assert rig.arrive(7) == [Refuse(7, RefusalReason.QUEUE_FULL)]


def test_a_refused_early_dispatch_is_queued_first_and_pauses_its_node() -> None:
    rig = full()
    assert early(rig.arrive(5)) == [5]
    rig.arrive(6)
    assert rig(LeaseRefused(5)) == []
    assert uids(rig(instance("b"))) == ["b"]
    assert rig.dispatcher.leased("b") == 1
    assert early(rig(LeaseEnded(5, "b"))) == [], "6 has b; none is queued"


def test_no_early_dispatch_if_another_node_may_have_a_slot_first() -> None:
    rig = full(NodeReported("n2"), instance("b", node="n2"))
    rig.arrive(5)
    assert rig.dispatcher.leased("b") == 1
    assert rig.arrive(6) == [], "it waits for the first free node"
    assert early(rig.arrive(7)) == [6], "7 waits for the other node"


def test_no_early_dispatch_while_an_instance_wakes() -> None:
    rig = full(NodeReported("n2"), instance("b", FROZEN, node="n2"))
    (wake,) = rig.arrive(5)
    assert wake == Wake("b", "n2")
    assert uids(rig(WakeAnswered("b"))) == ["b"]


def test_requests_served_by_each_others_instance_trade_leases() -> None:
    rig = DispatcherRig(instance("a"), instance("b"))
    assert {rig.went(1), rig.went(2)} == {"a", "b"}
    one = "a" if 1 in rig.dispatcher._instances["a"].holders else "b"
    other = "b" if one == "a" else "a"
    rig(LeaseEnded(1, other))
    assert (rig.dispatcher.leased(one), rig.dispatcher.leased(other)) == (1, 0)
    rig(LeaseEnded(2))
    assert (rig.dispatcher.leased(one), rig.dispatcher.leased(other)) == (0, 0)


def test_an_early_dispatch_served_before_its_slot_was_free_leaves_no_lease() -> None:
    rig = full()
    rig.arrive(5)
    assert rig(LeaseEnded(5, "a")) == []
    assert rig.dispatcher.queue_state("ocr").queued == 0
    for number in range(1, 5):
        rig(LeaseEnded(number, "a"))
    assert rig.dispatcher.leased("a") == 0

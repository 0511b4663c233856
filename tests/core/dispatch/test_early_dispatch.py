"""Requests sent ahead wait at a node for whichever of its instances frees first
(`FunctionQueueState.to_send_ahead`)."""

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
from tests.core.dispatch.test_dispatcher import FROZEN, RUNNING, Story, instance, uids


def early(effects: list[Effect]) -> list[int]:
    return [effect.request for effect in effects if isinstance(effect, Dispatch) and effect.early]


def four(uid: str, node: str = "n1", state: InstanceState = RUNNING) -> InstanceReported:
    """An instance with four slots: enough for one request ahead."""
    return instance(uid, state, node, concurrency=4)


def full(*events: Event) -> Story:
    """All slots of a, on n1, are taken by requests 1 to 4."""
    story = Story(four("a"), *events, early_dispatch=True)
    for number in range(1, 5):
        story.went(number)
    return story


def test_the_next_request_is_dispatched_early_and_takes_the_next_free_slot() -> None:
    story = full()
    assert early(story.arrive(5)) == [5]
    assert story.arrive(6) == [], "one is enough for four slots"
    assert story.dispatcher.queue_state("ocr").queued == 2
    assert early(story(LeaseEnded(1, "a"))) == [6], "request 5 has the slot, and its place at the node is free"
    assert story.dispatcher.leased("a") == 4
    for number in range(2, 7):
        assert story(LeaseEnded(number, "a")) == []
    assert story.dispatcher.leased("a") == 0


def test_short_requests_allow_more_early_dispatches() -> None:
    sixteen = [instance(uid, concurrency=4) for uid in "abcd"]
    seconds = Story(*sixteen, early_dispatch=True)
    millis = Story(*sixteen, early_dispatch=True)
    for story, took_ns in ((seconds, 2 * SECOND_NS), (millis, 40 * MILLISECOND_NS)):
        for number in range(1, 17):
            story.went(number)
            story.now -= MILLISECOND_NS
        story.now += took_ns - MILLISECOND_NS
        story(LeaseEnded(1))
        story.went(17)
    assert [early(seconds.arrive(number)) for number in (18, 19)] == [[18], []]
    assert [early(millis.arrive(number)) for number in range(18, 24)] == [[18], [19], [20], [21], [], []]


def test_with_few_slots_nothing_is_dispatched_early() -> None:
    story = Story(instance("a", concurrency=3), early_dispatch=True)
    for number in range(1, 4):
        story.went(number)
    assert story.arrive(4) == []


def test_early_dispatches_count_in_the_queue() -> None:
    story = full(FunctionSet("ocr", queue_length=2))
    assert early(story.arrive(5)) == [5]
    assert story.arrive(6) == []
    assert story.arrive(7) == [Refuse(7, RefusalReason.QUEUE_FULL)]


def test_a_refused_early_dispatch_is_queued_first_and_pauses_its_node() -> None:
    story = full()
    assert early(story.arrive(5)) == [5]
    story.arrive(6)
    assert story(LeaseRefused(5)) == []
    assert uids(story(instance("b"))) == ["b"]
    assert story.dispatcher.leased("b") == 1
    assert early(story(LeaseEnded(5, "b"))) == [], "6 has b; nobody is left"


def test_no_early_dispatch_if_another_node_may_have_a_slot_first() -> None:
    story = full(NodeReported("n2"), instance("b", node="n2"))
    story.arrive(5)
    assert story.dispatcher.leased("b") == 1
    assert story.arrive(6) == [], "whichever node frees first shall have it"
    assert early(story.arrive(7)) == [6], "7 waits for the other node"


def test_no_early_dispatch_while_an_instance_wakes() -> None:
    story = full(NodeReported("n2"), instance("b", FROZEN, node="n2"))
    (wake,) = story.arrive(5)
    assert wake == Wake("b", "n2")
    assert uids(story(WakeAnswered("b"))) == ["b"]


def test_requests_served_by_each_others_instance_trade_leases() -> None:
    story = Story(instance("a"), instance("b"))
    assert {story.went(1), story.went(2)} == {"a", "b"}
    one = "a" if 1 in story.dispatcher._instances["a"].holders else "b"
    other = "b" if one == "a" else "a"
    story(LeaseEnded(1, other))
    assert (story.dispatcher.leased(one), story.dispatcher.leased(other)) == (1, 0)
    story(LeaseEnded(2))
    assert (story.dispatcher.leased(one), story.dispatcher.leased(other)) == (0, 0)


def test_an_early_dispatch_served_before_its_slot_was_free_leaves_no_lease() -> None:
    story = full()
    story.arrive(5)
    assert story(LeaseEnded(5, "a")) == []
    assert story.dispatcher.queue_state("ocr").queued == 0
    for number in range(1, 5):
        story(LeaseEnded(number, "a"))
    assert story.dispatcher.leased("a") == 0

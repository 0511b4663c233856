"""Requests sent ahead wait at a node for whichever of its instances frees first (`FunctionState.to_send_ahead`)."""

from __future__ import annotations

from agent.core.dispatch_events import Dispatch, Effect, LeaseEnded, LeaseRefused, NodeReported, Wake, WakeAnswered
from tests.core.test_dispatch import FROZEN, Story, instance, uids


def ahead_of(effects: list[Effect]) -> list[int]:
    return [effect.request for effect in effects if isinstance(effect, Dispatch) and effect.ahead]


def test_the_next_request_is_sent_ahead_and_takes_the_slot_that_becomes_free_there() -> None:
    story = Story(instance("a"), sends_ahead=True)
    story.went(1)
    assert ahead_of(story.arrive(2)) == [2]
    assert story.arrive(3) == [], "one is enough where there is one slot"
    assert story.dispatcher.queue_state("ocr").queued == 2
    assert ahead_of(story(LeaseEnded(1, "a"))) == [3], "request 2 has the slot, and its place at the node is free"
    assert story.dispatcher.leased("a") == 1
    assert story(LeaseEnded(2, "a")) == []
    assert story(LeaseEnded(3, "a")) == []
    assert story.dispatcher.leased("a") == 0


def test_what_was_sent_ahead_and_refused_waits_again_at_the_head_and_not_there_at_once() -> None:
    story = Story(instance("a"), instance("b", node="n2"), sends_ahead=True)
    story.went(1)
    assert ahead_of(story.arrive(2)) == [2]
    story.arrive(3)
    assert story(LeaseRefused(2)) == []
    assert uids(story(NodeReported("n2"))) == ["b"]
    assert story.dispatcher.leased("b") == 1, "the oldest went there"


def test_nothing_is_sent_ahead_while_another_nodes_slots_could_go_without() -> None:
    story = Story(NodeReported("n2"), instance("a"), instance("b", node="n2"), sends_ahead=True)
    story.went(1), story.went(2)
    assert story.arrive(3) == [], "whichever node frees first shall have it"
    assert ahead_of(story.arrive(4)) == [3], "4 waits for the other node"


def test_nothing_is_sent_ahead_while_somebody_wakes() -> None:
    story = Story(NodeReported("n2"), instance("a"), instance("b", FROZEN, node="n2"), sends_ahead=True)
    story.went(1)
    (wake,) = story.arrive(2)
    assert wake == Wake("b", "n2")
    assert uids(story(WakeAnswered("b"))) == ["b"]


def test_whoever_was_thought_to_be_where_another_served_is_where_that_was_thought_to_be() -> None:
    story = Story(instance("a"), instance("b"))
    assert {story.went(1), story.went(2)} == {"a", "b"}
    one = "a" if 1 in story.dispatcher._slots["a"].holders else "b"
    other = "b" if one == "a" else "a"
    story(LeaseEnded(1, other))
    assert (story.dispatcher.leased(one), story.dispatcher.leased(other)) == (1, 0)
    story(LeaseEnded(2))
    assert (story.dispatcher.leased(one), story.dispatcher.leased(other)) == (0, 0)


def test_a_request_that_is_served_before_its_slot_was_known_to_be_free_leaves_nothing_behind() -> None:
    story = Story(instance("a"), sends_ahead=True)
    story.went(1)
    story.arrive(2)
    assert story(LeaseEnded(2, "a")) == []
    assert story.dispatcher.queue_state("ocr").queued == 0
    story(LeaseEnded(1, "a"))
    assert story.dispatcher.leased("a") == 0

"""Slots: a ticket is in the line, inside, or gone; never in two places."""

from __future__ import annotations

import pytest

from agent.core.lifecycle.slots import Arrival, ConcurrencyLimiter


def opened(limit: int = 1, max_waiting: int = 2) -> ConcurrencyLimiter[str]:
    slots: ConcurrencyLimiter[str] = ConcurrencyLimiter(limit, max_waiting)
    slots.open = True
    return slots


def test_as_many_run_as_there_are_slots_and_the_rest_stand_in_line() -> None:
    slots = opened(limit=2)
    assert [slots.arrive(t) for t in ("a", "b", "c")] == [Arrival.GRANTED, Arrival.GRANTED, Arrival.QUEUED]
    assert (slots.in_flight, slots.waiting) == (2, 1)


def test_the_line_is_bounded_and_nobody_overtakes() -> None:
    slots = opened()
    assert [slots.arrive(t) for t in "abcd"] == [Arrival.GRANTED, Arrival.QUEUED, Arrival.QUEUED, Arrival.FULL]
    slots.done()
    assert slots.arrive("late") is Arrival.FULL, "a free slot belongs to the head of the line"
    assert [slots.grant_next(), slots.grant_next()] == ["b", None]


def test_while_closed_everybody_waits() -> None:
    slots: ConcurrencyLimiter[str] = ConcurrencyLimiter(3, 5)
    assert slots.arrive("a") is Arrival.QUEUED
    assert slots.grant_next() is None
    slots.open = True
    assert slots.grant_next() == "a"


def test_who_leaves_the_line_is_gone_once() -> None:
    slots = opened()
    slots.arrive("a")
    slots.arrive("b")
    assert slots.leave("b")
    assert not slots.leave("b")
    assert not slots.leave("a"), "it is inside, not in the line"


def test_everybody_can_be_sent_away_in_order() -> None:
    slots: ConcurrencyLimiter[str] = ConcurrencyLimiter(1, 5)
    for ticket in "abc":
        slots.arrive(ticket)
    assert slots.empty_line() == ["a", "b", "c"]
    assert slots.waiting == 0


def test_a_slot_that_nobody_held_cannot_be_given_back() -> None:
    with pytest.raises(ValueError, match="not held"):
        opened().done()


def test_without_a_line_a_busy_instance_turns_requests_away() -> None:
    slots = opened(max_waiting=0)
    assert slots.arrive("a") is Arrival.GRANTED
    assert slots.arrive("b") is Arrival.FULL

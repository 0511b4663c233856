"""The concurrency limiter: a ticket waits, is inside, or is gone."""

from __future__ import annotations

import pytest

from agent.core.lifecycle.slots import Arrival, ConcurrencyLimiter


def opened(limit: int = 1, max_waiting: int = 2) -> ConcurrencyLimiter[str]:
    slots: ConcurrencyLimiter[str] = ConcurrencyLimiter(limit, max_waiting)
    slots.open = True
    return slots


def test_requests_beyond_the_limit_wait() -> None:
    slots = opened(limit=2)
    assert [slots.arrive(t) for t in ("a", "b", "c")] == [Arrival.GRANTED, Arrival.GRANTED, Arrival.QUEUED]
    assert (slots.in_flight, slots.waiting) == (2, 1)


def test_queue_is_bounded_and_first_come_first_served() -> None:
    slots = opened()
    assert [slots.arrive(t) for t in "abcd"] == [Arrival.GRANTED, Arrival.QUEUED, Arrival.QUEUED, Arrival.FULL]
    slots.done()
    assert slots.arrive("late") is Arrival.FULL, "a free slot belongs to the longest-waiting ticket"
    assert [slots.grant_next(), slots.grant_next()] == ["b", None]


def test_closed_limiter_queues_every_request() -> None:
    slots: ConcurrencyLimiter[str] = ConcurrencyLimiter(3, 5)
    assert slots.arrive("a") is Arrival.QUEUED
    assert slots.grant_next() is None
    slots.open = True
    assert slots.grant_next() == "a"


def test_waiting_ticket_leaves_once() -> None:
    slots = opened()
    slots.arrive("a")
    slots.arrive("b")
    assert slots.leave("b")
    assert not slots.leave("b")
    assert not slots.leave("a"), "it is inside, not waiting"


def test_emptied_queue_returns_tickets_in_order() -> None:
    slots: ConcurrencyLimiter[str] = ConcurrencyLimiter(1, 5)
    for ticket in "abc":
        slots.arrive(ticket)
    assert slots.clear_queue() == ["a", "b", "c"]
    assert slots.waiting == 0


def test_release_without_a_grant_raises() -> None:
    with pytest.raises(ValueError, match="not held"):
        opened().done()


def test_without_a_queue_a_busy_instance_refuses() -> None:
    slots = opened(max_waiting=0)
    assert slots.arrive("a") is Arrival.GRANTED
    assert slots.arrive("b") is Arrival.FULL

"""Counters of one function: every invocation in exactly one place."""

from __future__ import annotations

import pytest

from agent.core.traffic import BOUNDS_NS, Durations, Traffic
from agent.core.types import MILLISECOND_NS, SECOND_NS


@pytest.mark.parametrize(
    ("ns", "bound"),
    [
        (0, "0.001"),
        (MILLISECOND_NS, "0.001"),
        (MILLISECOND_NS + 1, "0.002"),
        (99 * MILLISECOND_NS, "0.1"),
        (SECOND_NS, "1"),
        (300 * SECOND_NS, "300"),
        (300 * SECOND_NS + 1, "+Inf"),
    ],
)
def test_a_duration_counts_in_the_buckets_that_are_not_shorter(ns: int, bound: str) -> None:
    durations = Durations()
    durations.add(ns)
    assert next(le for le, count in durations.cumulative() if count) == bound
    assert durations.sum_ns == ns


def test_buckets_are_ordered_and_cumulative() -> None:
    assert list(BOUNDS_NS) == sorted(set(BOUNDS_NS))
    durations = Durations()
    for ns in (1, SECOND_NS, SECOND_NS, 1000 * SECOND_NS):
        durations.add(ns)
    counts = [count for _, count in durations.cumulative()]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1], durations.cumulative()[-1][0]) == (1, 4, "+Inf")


@pytest.mark.parametrize(
    ("status", "reason", "counter"),
    [
        (429, "QUEUE_FULL", "queue_full"),
        (503, "NO_CAPACITY", "no_capacity"),
        (503, "SCHEDULER_STOPPING", "server_errors"),
        (502, "INSTANCE_CRASHED", "server_errors"),
        (504, "QUEUE_TIMEOUT", "server_errors"),
        (500, "", "server_errors"),
        (413, "REQUEST_BODY_TOO_LARGE", "client_errors"),
        (405, "METHOD_NOT_ALLOWED", "client_errors"),
    ],
)
def test_an_answer_of_ours_is_one_of_four(status: int, reason: str, counter: str) -> None:
    traffic = Traffic()
    traffic.refused(status, reason)
    names = ("queue_full", "no_capacity", "server_errors", "client_errors")
    assert {name: getattr(traffic, name) for name in names} == {name: int(name == counter) for name in names}
    assert traffic.responses[status // 100] == sum(traffic.responses) == 1


def test_what_an_instance_answers_is_no_error_of_ours() -> None:
    traffic = Traffic()
    for status in (200, 404, 500, 777):
        traffic.served(status, 0, SECOND_NS, 0, 0)
    assert traffic.responses[1:] == [0, 1, 0, 1, 2], "a status of no class counts with the last"
    assert (traffic.client_errors, traffic.server_errors) == (0, 0)


def test_the_wait_is_a_part_and_the_wake_a_part_of_that() -> None:
    traffic = Traffic()
    traffic.served(200, 10, 10 + 5 * SECOND_NS, 3 * SECOND_NS, 2 * SECOND_NS)
    traffic.served(200, 20, 20 + SECOND_NS, 0, 0)
    sums = (traffic.duration.sum_ns, traffic.queue.sum_ns, traffic.wake.sum_ns)
    assert sums == (6 * SECOND_NS, 3 * SECOND_NS, 2 * SECOND_NS)
    assert [sum(one.counts) for one in (traffic.duration, traffic.queue, traffic.wake)] == [2, 2, 1]
    assert traffic.longest.read(5 * SECOND_NS) == 5 * SECOND_NS

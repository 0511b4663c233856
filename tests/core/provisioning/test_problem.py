"""What people are told while a function has fewer instances than its target."""

from __future__ import annotations

import pytest

from agent.core.provisioning.problem import PATIENCE_NS, LastFailure, NextTry, Obstacle, Problem, problem_of
from agent.core.provisioning.reconcile import MAX_ATTEMPTS, Attempts, Failure, came_up, failed, skipped

PULL = Failure("IMAGE_PULL_FAILED", "the registry is away", 5, "n1", "i1")
FULL = Obstacle("NO_FREE_GPU", "every GPU is taken", since_ns=0)
TRIED = {0: failed(Attempts(), 1, 100, PULL)}


def problem(**given: object) -> Problem | None:
    known: dict[str, object] = {
        "missing": [0], "coming": [], "attempts": TRIED, "obstacle": None, "none_up": True, "at": 100,
    }  # fmt: skip
    return problem_of(**{**known, **given})  # type: ignore[arg-type]  # the names are those of the parameters


def test_nothing_is_wrong_without_a_failure_or_with_all_instances() -> None:
    assert problem(attempts={}) is None
    assert problem(missing=[]) is None
    assert problem(missing=[], attempts={0: came_up(TRIED[0], 2)}, coming=[0]) is None, "it came up since it failed"


def test_a_failure_is_told_with_its_place_its_number_and_the_next_try() -> None:
    found = problem()
    assert found is not None
    assert (found.reason, found.message, found.no_capacity_expected) == (PULL.reason, PULL.message, False)
    assert found.last == LastFailure(PULL, 1, NextTry.SCHEDULED, TRIED[0].not_before_ns)


@pytest.mark.parametrize("given", [{"missing": [], "coming": [0]}, {"missing": [0], "coming": [0]}])
def test_a_failure_stays_while_the_next_try_starts(given: dict[str, object]) -> None:
    found = problem(**given)
    assert found is not None
    assert (found.reason, found.no_capacity_expected) == (PULL.reason, False)
    assert found.last == LastFailure(PULL, 1, NextTry.UNDER_WAY)


def test_a_full_fleet_does_not_hide_the_failure() -> None:
    found = problem(obstacle=FULL)
    assert found is not None
    assert found.reason == "NO_FREE_GPU"
    assert found.message == "every GPU is taken; the last start failed: IMAGE_PULL_FAILED: the registry is away"
    assert found.last == LastFailure(PULL, 1, NextTry.WAITING)


def test_a_start_given_up_is_told_as_such() -> None:
    tried = Attempts()
    for attempt in range(1, MAX_ATTEMPTS + 1):
        tried = failed(tried, attempt, 0, PULL)
    found = problem(attempts={0: tried})
    assert found is not None
    assert found.no_capacity_expected
    assert found.last == LastFailure(PULL, MAX_ATTEMPTS, NextTry.GIVEN_UP)
    half = problem(missing=[0, 1], attempts={0: tried})
    assert half is not None
    assert not half.no_capacity_expected, "the other place has not been given up"


def test_the_newest_failure_counts_and_only_those_that_wait() -> None:
    later = Failure("OUT_OF_MEMORY", "killed", 9)
    attempts = {**TRIED, 1: failed(Attempts(), 1, 0, later), 2: failed(Attempts(), 1, 0, Failure("OTHER", "", 99))}
    found = problem(missing=[0, 1], attempts=attempts)
    assert found is not None
    assert found.reason == "OUT_OF_MEMORY"


@pytest.mark.parametrize(
    ("reason", "coming", "after_ns", "refused"),
    [
        ("NO_FREE_GPU", [], PATIENCE_NS - 1, False),
        ("NO_FREE_GPU", [], PATIENCE_NS, True),
        ("NO_FREE_GPU", [1], PATIENCE_NS, False),
        ("NO_NODE", [], PATIENCE_NS, True),
        ("NO_MATCHING_NODE", [], 0, True),
        ("UNREACHABLE", [], PATIENCE_NS, False),
    ],
)
def test_requests_are_refused_once_no_instance_can_be_expected(
    reason: str, coming: list[int], after_ns: int, refused: bool
) -> None:
    found = problem(attempts={}, coming=coming, obstacle=Obstacle(reason, "", 0), at=after_ns)
    assert found is not None
    assert found.no_capacity_expected is refused


def test_a_skipped_number_keeps_the_failure() -> None:
    assert skipped(TRIED[0], 2, 200).failure == PULL

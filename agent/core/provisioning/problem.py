"""Why a function has fewer instances than its target: what is in the way now, and the last start that failed.

A failure stays visible while its start is tried again, until an instance comes up in its place. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from agent.core.provisioning.placement import PASSING
from agent.core.provisioning.reconcile import Attempts, Failure
from agent.core.types import SECOND_NS

PATIENCE_NS = 10 * SECOND_NS
"""How long requests wait for a function that has no instance and gets none, in case a place becomes free soon. Then
they are refused with the reason."""
NO_CAPACITY_REASONS = frozenset({"IMAGE_RUNTIME_UNAVAILABLE", "NO_MATCHING_NODE"})
"""Reasons that only a change removes, not time."""


class NextTry(Enum):
    """When the start that failed is tried again. UNDER_WAY: now. SCHEDULED: at a time. WAITING: once what is in the way
    is gone. GIVEN_UP: once the function is deployed again."""

    UNDER_WAY = "UNDER_WAY"
    SCHEDULED = "SCHEDULED"
    WAITING = "WAITING"
    GIVEN_UP = "GIVEN_UP"


@dataclass(frozen=True, slots=True)
class LastFailure:
    """The last failed start. `attempt`: how many have failed in a row. `next_ns`: monotonic, of SCHEDULED only."""

    failure: Failure
    attempt: int
    next_try: NextTry
    next_ns: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a function has fewer instances than its target.

    - `no_capacity_expected`: requests need not wait, since no instance will come soon.
    - `none_up`: it has no instance at all that could take a request, of any revision.
    """

    reason: str
    message: str
    no_capacity_expected: bool = False
    last: LastFailure | None = None
    none_up: bool = False

    @property
    def news(self) -> tuple[str, str, int]:
        """What is worth a line in the log when it changes."""
        return self.reason, self.message, 0 if self.last is None else self.last.attempt


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why no further instance can be created now, and since when (monotonic ns)."""

    reason: str
    message: str
    since_ns: int


def problem_of(
    missing: Iterable[int],
    coming: Iterable[int],
    attempts: Mapping[int, Attempts],
    obstacle: Obstacle | None,
    none_up: bool,
    at: int,
) -> Problem | None:
    """The problem of a function at `at`; None if it has what it should have, or nothing has failed.

    - `missing`: ordinals without an instance. `coming`: those that are being created or are starting.
    - `attempts`: by ordinal. `obstacle`: what keeps the missing ones from being created.
    """
    under_way = frozenset(coming)
    waiting = frozenset(missing) | under_way
    if not waiting:
        return None
    last = _last_failure(waiting, under_way, attempts, obstacle)
    given_up = all(attempts.get(ordinal, Attempts()).given_up for ordinal in waiting)
    if obstacle is None or given_up:
        if last is None:
            return None
        failure = last.failure
        refuse = given_up or (not under_way and failure.reason in NO_CAPACITY_REASONS)
        return Problem(failure.reason, failure.message, refuse, last, none_up)
    refuse = obstacle.reason in NO_CAPACITY_REASONS or (
        obstacle.reason in PASSING and not under_way and at - obstacle.since_ns >= PATIENCE_NS
    )
    message = obstacle.message
    if last is not None:
        message = f"{message}; the last start failed: {last.failure.reason}: {last.failure.message}"
    return Problem(obstacle.reason, message, refuse, last, none_up)


def _last_failure(
    waiting: frozenset[int], under_way: frozenset[int], attempts: Mapping[int, Attempts], obstacle: Obstacle | None
) -> LastFailure | None:
    """The newest failure among the ordinals that wait for an instance."""
    newest: LastFailure | None = None
    for ordinal in sorted(waiting):
        tried = attempts.get(ordinal, Attempts())
        if tried.failure is None or (newest is not None and tried.failure.wall_ns <= newest.failure.wall_ns):
            continue
        newest = LastFailure(tried.failure, tried.failures, NextTry.SCHEDULED, tried.not_before_ns)
        if ordinal in under_way:
            newest = replace(newest, next_try=NextTry.UNDER_WAY, next_ns=0)
        elif tried.given_up:
            newest = replace(newest, next_try=NextTry.GIVEN_UP, next_ns=0)
        elif obstacle is not None:
            newest = replace(newest, next_try=NextTry.WAITING, next_ns=0)
    return newest

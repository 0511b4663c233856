"""Compares the instances a function has with those it should have: which to create, which to drain.

Each instance has an *ordinal* within its revision, the lowest that is free; its create carries the request_id
function/revision/ordinal/attempt, so that a create repeated after a crash or a timeout creates nothing twice. A new
attempt begins only once the one before has ended, is draining or is on a lost node. Attempts back off, and after
`MAX_ATTEMPTS` failures in a row the ordinal is given up until the function is deployed again.

Pure: `plan(...)` decides about one function at one moment. `scale_in.py` says which instances go first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.core.provisioning.model import ObservedInstance, RequestId
from agent.core.provisioning.scale_in import replaced, scale_in_order
from agent.core.types import SECOND_NS, InstanceState, StopCause

MAX_ATTEMPTS = 5
"""Failures in a row of one ordinal before it is given up."""
BACK_OFF_NS = SECOND_NS
"""Wait before the second attempt; doubled for each further one."""
SKIP_NS = BACK_OFF_NS // 10
BACK_OFF_MAX_NS = 60 * SECOND_NS


@dataclass(frozen=True, slots=True)
class DesiredState:
    """A function's target: that many instances of `revision`. A function that is being `deleted` has target 0."""

    function: str
    revision: str
    target: int
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed, and when (wall ns). `uid` is "" if no instance was made."""

    reason: str
    message: str
    wall_ns: int = 0
    node: str = ""
    uid: str = ""


@dataclass(frozen=True, slots=True)
class Attempts:
    """The attempts at an ordinal: the number of the last one, the failures in a row since an instance came up with the
    last of them, and the time (monotonic ns) before which no further attempt begins."""

    attempt: int = 0
    failures: int = 0
    not_before_ns: int = 0
    failure: Failure | None = None

    @property
    def given_up(self) -> bool:
        return self.failures >= MAX_ATTEMPTS


@dataclass(frozen=True, slots=True)
class Create:
    """Create an instance with this request_id, on any node that placement finds."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Stop:
    uid: str
    node: str
    cause: StopCause = StopCause.SCALED_IN


@dataclass(frozen=True, slots=True)
class ReconcilePlan:
    """What to do now, and when to plan again if nothing happens (None = no need).

    - `missing`: ordinals that should exist and do not, those being created or given up included.
    - `may_give_way`: instances of an older revision to stop if there is no room for the creates, in scale-in order.
    - `coming_up`: a new instance is starting, and none should give way meanwhile, so that a revision that never comes
      up costs the room of one instance, not of all.
    """

    creates: tuple[Create, ...] = ()
    stops: tuple[Stop, ...] = ()
    missing: tuple[int, ...] = ()
    may_give_way: tuple[ObservedInstance, ...] = ()
    coming_up: bool = False
    again_at_ns: int | None = None


def failed(attempts: Attempts, attempt: int, at: int, failure: Failure | None = None) -> Attempts:
    """After an attempt whose instance did not come up, or failed later."""
    if attempt < attempts.attempt:
        return attempts
    wait = min(BACK_OFF_NS << min(attempts.failures, 16), BACK_OFF_MAX_NS)
    return Attempts(attempt, attempts.failures + 1, at + wait, failure)


def skipped(attempts: Attempts, attempt: int, at: int) -> Attempts:
    """After an attempt whose request_id was used before (the scheduler restarted, and its instance has ended since):
    nothing failed, so the next number is tried."""
    if attempt < attempts.attempt:
        return attempts
    return Attempts(attempt, attempts.failures, at + SKIP_NS, attempts.failure)


def came_up(attempts: Attempts, attempt: int) -> Attempts:
    """After an attempt whose instance serves: failures count from 0 again."""
    if attempt < attempts.attempt:
        return attempts
    return Attempts(attempt, 0, 0)


def plan(
    desired: DesiredState,
    observed: Iterable[ObservedInstance],
    attempts: Mapping[int, Attempts],
    creating: frozenset[int],
    all_reported: bool,
    at: int,
) -> ReconcilePlan:
    """What to create and stop for one function. Instances of an older revision, or on a drained node, go as those of
    the desired revision come up.

    - `observed`: its instances that have not ended, of any revision.
    - `attempts`: at the desired revision, by ordinal. `creating`: its ordinals with a create not answered yet.
    - `all_reported`: every known node has reported or is lost. Before that nothing is created, since it may exist
      already, and nothing is stopped, since it may be the only one.
    """
    known = list(observed)
    here = sorted((one for one in known if not _leaving(one)), key=scale_in_order)
    current = [one for one in here if one.made_by.revision == desired.revision and not one.scheduling.drains]
    outdated = [one for one in here if one.made_by.revision != desired.revision or one.scheduling.drains]
    surplus = max(0, len(current) - desired.target)  # creates in progress would go first, but have no uid yet
    kept = current[surplus:]
    missing = _missing(desired.target - len(kept) - len(creating), kept, creating)
    creates, again = _creates(desired, missing, known, attempts, at)
    if not all_reported:
        return ReconcilePlan(missing=(*missing, *sorted(creating)))
    leave = replaced(desired.target, outdated, kept)
    leaving = {one.uid for one in leave}
    return ReconcilePlan(
        creates=creates,
        stops=tuple(Stop(one.uid, one.node, _cause(desired, one)) for one in (*current[:surplus], *leave)),
        missing=(*missing, *sorted(creating)),
        may_give_way=tuple(one for one in outdated if one.uid not in leaving and not one.scheduling.drains),
        coming_up=bool(creating) or not all(one.serving for one in kept),
        again_at_ns=again,
    )


def _cause(desired: DesiredState, one: ObservedInstance) -> StopCause:
    """Why `one` is stopped."""
    if desired.deleted:
        return StopCause.FUNCTION_DELETED
    if one.scheduling.drains:
        return StopCause.NODE_DRAINED
    outdated = desired.target and one.made_by.revision != desired.revision
    return StopCause.REPLACED if outdated else StopCause.SCALED_IN


def _leaving(one: ObservedInstance) -> bool:
    return one.on_lost_node or one.state is InstanceState.STOPPING


def _missing(short: int, kept: list[ObservedInstance], creating: frozenset[int]) -> tuple[int, ...]:
    """The lowest `short` ordinals that are free."""
    taken = {one.made_by.ordinal for one in kept} | creating
    free = (ordinal for ordinal in range(max(0, short) + len(taken)) if ordinal not in taken)
    return tuple(ordinal for ordinal, _ in zip(free, range(short), strict=False))


def _creates(
    desired: DesiredState,
    missing: tuple[int, ...],
    known: list[ObservedInstance],
    attempts: Mapping[int, Attempts],
    at: int,
) -> tuple[tuple[Create, ...], int | None]:
    used: dict[int, int] = {}
    for one in known:
        if one.made_by.revision == desired.revision:
            used[one.made_by.ordinal] = max(one.made_by.attempt, used.get(one.made_by.ordinal, 0))
    creates: list[Create] = []
    again: int | None = None
    for ordinal in missing:
        tried = attempts.get(ordinal, Attempts())
        if tried.given_up:
            continue
        if tried.not_before_ns > at:
            again = tried.not_before_ns if again is None else min(again, tried.not_before_ns)
            continue
        attempt = max(tried.attempt, used.get(ordinal, 0)) + 1
        creates.append(Create(RequestId(desired.function, desired.revision, ordinal, attempt)))
    return tuple(creates), again

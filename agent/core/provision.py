"""From the instances wanted to the instances there are: which to create, which to drain.

An instance the scheduler wants is an *ordinal* of a revision; its create carries the request_id
function/revision/ordinal/attempt, so that a create repeated after a crash or a timeout makes nothing twice. A new
attempt is made only once the one before has ended. Attempts back off, and after `MAX_ATTEMPTS` failures in a row the
function stays degraded until it is deployed again.

Pure: `plan(...)` looks at one function at one moment and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.core.types import SECOND_NS, InstanceState

MAX_ATTEMPTS = 5
"""Failures in a row of one ordinal before it is given up."""
BACK_OFF_NS = SECOND_NS
"""Wait before the second attempt; doubled for each further one."""
PASS_OVER_NS = BACK_OFF_NS // 10
BACK_OFF_MAX_NS = 60 * SECOND_NS


@dataclass(frozen=True, slots=True)
class RequestId:
    """function/revision/ordinal/attempt."""

    function: str
    revision: str
    ordinal: int
    attempt: int

    def __str__(self) -> str:
        return f"{self.function}/{self.revision}/{self.ordinal}/{self.attempt}"


def parse_request_id(text: str) -> RequestId | None:
    """The parts of one of ours; None for anything else (an instance made by hand)."""
    parts = text.split("/")
    if len(parts) != 4 or not (parts[2].isdecimal() and parts[3].isdecimal()):
        return None
    return RequestId(parts[0], parts[1], int(parts[2]), int(parts[3]))


@dataclass(frozen=True, slots=True)
class Wanted:
    """A function's target: ordinals 0 to target - 1 of `revision`. A function being deleted has target 0."""

    function: str
    revision: str
    target: int


@dataclass(frozen=True, slots=True)
class Present:
    """An instance that has not ended, made by the scheduler. `counted_out`: its node is lost."""

    uid: str
    node: str
    made_by: RequestId
    state: InstanceState
    counted_out: bool = False

    @property
    def serving(self) -> bool:
        """It has come up: an instance of an older revision may go in its favour."""
        return not self.counted_out and self.state not in (InstanceState.STARTING, InstanceState.STOPPING)


@dataclass(frozen=True, slots=True)
class Tries:
    """How often an ordinal has been tried: the number of the last attempt, failures in a row since it last came up,
    and the time (monotonic ns) before which there is no further attempt."""

    attempt: int = 0
    failures: int = 0
    not_before_ns: int = 0

    @property
    def given_up(self) -> bool:
        return self.failures >= MAX_ATTEMPTS


@dataclass(frozen=True, slots=True)
class Create:
    """Make an instance under this request_id, on any node that placement finds."""

    request_id: RequestId


@dataclass(frozen=True, slots=True)
class Stop:
    """Drain and stop an instance."""

    uid: str
    node: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now, and when to look again though nothing happened (None = no need).

    `makes_room`: an instance of an older revision that may be stopped if nothing is left for the creates; one at a
    time, and none while a new one is on its way: a revision that never comes up costs one instance, not all.
    """

    creates: tuple[Create, ...] = ()
    stops: tuple[Stop, ...] = ()
    makes_room: Stop | None = None
    again_at_ns: int | None = None


def failed(tries: Tries, attempt: int, at: int) -> Tries:
    """An attempt ended before its instance came up, or the instance failed later."""
    if attempt < tries.attempt:
        return tries
    wait = min(BACK_OFF_NS << min(tries.failures, 16), BACK_OFF_MAX_NS)
    return Tries(attempt, tries.failures + 1, at + wait)


def passed_over(tries: Tries, attempt: int, at: int) -> Tries:
    """The request_id of an attempt was used up before (the scheduler restarted, and its instance has ended since):
    nothing failed, the next number is tried."""
    if attempt < tries.attempt:
        return tries
    return Tries(attempt, tries.failures, at + PASS_OVER_NS)


def came_up(tries: Tries, attempt: int) -> Tries:
    """The instance of an attempt serves: failures start from nothing again."""
    if attempt < tries.attempt:
        return tries
    return Tries(attempt, 0, 0)


def plan(
    wanted: Wanted,
    present: Iterable[Present],
    tries: Mapping[int, Tries],
    under_way: frozenset[int],
    settled: bool,
    at: int,
) -> Plan:
    """What to create and stop for one function.

    `present`: its instances that have not ended, of any revision. `tries`: of the wanted revision, by ordinal.
    `under_way`: ordinals of the wanted revision with a create not answered yet. `settled`: every known node has
    reported or is lost; before that nothing is created, for it may exist already.
    """
    here = [one for one in present if one.state is not InstanceState.STOPPING]
    old = [one for one in here if one.made_by.revision != wanted.revision]
    stops: list[Stop] = []
    kept: dict[int, Present] = {}
    for one in sorted((one for one in here if one.made_by.revision == wanted.revision), key=_best_first):
        if one.made_by.ordinal < wanted.target and (one.made_by.ordinal not in kept):
            kept[one.made_by.ordinal] = one
        elif not one.counted_out:
            stops.append(Stop(one.uid, one.node))
    stops += [Stop(one.uid, one.node) for one in _superfluous(wanted, old, kept)]
    creates, again = _creates(wanted, kept, tries, under_way, at) if settled else ((), None)
    stopping = {stop.uid for stop in stops}
    room = next((one for one in reversed(old) if one.uid not in stopping and not one.counted_out), None)
    coming = bool(under_way) or not all(one.serving for one in kept.values())
    makes_room = Stop(room.uid, room.node) if room is not None and creates and not coming else None
    return Plan(creates, tuple(stops), makes_room, again)


def _best_first(one: Present) -> tuple[bool, bool, int, str]:
    """Of two instances of one ordinal (a node came back after it was counted out) the one that serves stays."""
    return (one.counted_out, not one.serving, one.made_by.attempt, one.uid)


def _superfluous(wanted: Wanted, old: list[Present], kept: Mapping[int, Present]) -> list[Present]:
    """Old revisions go as the new one comes up: at no time are there fewer than `target` for lack of patience."""
    old = [one for one in old if not one.counted_out]
    serving = sum(one.serving for one in kept.values())
    stay = max(0, wanted.target - serving)
    order = sorted(old, key=lambda one: (not one.serving, one.made_by.ordinal, one.uid))
    return order[stay:]


def _creates(
    wanted: Wanted, kept: Mapping[int, Present], tries: Mapping[int, Tries], under_way: frozenset[int], at: int
) -> tuple[tuple[Create, ...], int | None]:
    creates: list[Create] = []
    again: int | None = None
    for ordinal in range(wanted.target):
        one = kept.get(ordinal)
        if ordinal in under_way or (one is not None and not one.counted_out):
            continue
        tried = tries.get(ordinal, Tries())
        if tried.given_up:
            continue
        if tried.not_before_ns > at:
            again = tried.not_before_ns if again is None else min(again, tried.not_before_ns)
            continue
        last = max(tried.attempt, one.made_by.attempt if one is not None else 0)
        creates.append(Create(RequestId(wanted.function, wanted.revision, ordinal, last + 1)))
    return tuple(creates), again

"""From the instances wanted to the instances there are: which to create, which to drain.

An instance the scheduler wants is an *ordinal* of a revision, the lowest that is free; its create carries the
request_id function/revision/ordinal/attempt, so that a create repeated after a crash or a timeout makes nothing twice.
A new attempt is made only once the one before has ended, or is on its way out. Attempts back off, and after
`MAX_ATTEMPTS` failures in a row the function stays degraded until it is deployed again.

Pure: `plan(...)` looks at one function at one moment and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

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


@lru_cache(maxsize=16_384)  # a round of provisioning reads that of every instance
def parse_request_id(text: str) -> RequestId | None:
    """The parts of one of ours; None for anything else (an instance made by hand)."""
    parts = text.split("/")
    if len(parts) != 4 or not (parts[2].isdecimal() and parts[3].isdecimal()):
        return None
    return RequestId(parts[0], parts[1], int(parts[2]), int(parts[3]))


class Scheduling(Enum):
    """What an operator has asked of a node. CORDONED: it gets no new instances. DRAINED: those it has are replaced
    elsewhere, then drained. EMPTIED: they are drained even where nothing can take their place."""

    NORMAL = "NORMAL"
    CORDONED = "CORDONED"
    DRAINED = "DRAINED"
    EMPTIED = "EMPTIED"

    @property
    def drains(self) -> bool:
        """Its instances are to go."""
        return self in (Scheduling.DRAINED, Scheduling.EMPTIED)


@dataclass(frozen=True, slots=True)
class DesiredState:
    """A function's target: so many instances of `revision`. A function being deleted has target 0."""

    function: str
    revision: str
    target: int


@dataclass(frozen=True, slots=True)
class ObservedInstance:
    """An instance that has not ended, made by the scheduler. `counted_out`: its node is lost. `scheduling`: of its
    node. `unsteady`: its node is silent or its agent on the way out, or the instance fails its health check.
    `requests`: those it executes and those that wait for it; `idle_ns`: for how long it has had none. `gpus`: those it
    is assigned to."""

    uid: str
    node: str
    made_by: RequestId
    state: InstanceState
    counted_out: bool = False
    scheduling: Scheduling = Scheduling.NORMAL
    unsteady: bool = False
    requests: int = 0
    idle_ns: int = 0
    gpus: tuple[str, ...] = ()

    @property
    def serving(self) -> bool:
        """It has come up: an instance of an older revision may go in its favour."""
        return not self.counted_out and self.state not in (InstanceState.STARTING, InstanceState.STOPPING)


@dataclass(frozen=True, slots=True)
class Attempts:
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
class ReconcilePlan:
    """What to do now, and when to look again though nothing happened (None = no need).

    `missing`: ordinals that are wanted and not there, those under way or given up included.
    `may_give_way`: instances of an older revision that may be stopped if nothing is left for the creates, the least
    useful first. `coming`: a new instance is on its way, and none is to give way meanwhile: a revision that never
    comes up costs what one instance needs, not all.
    """

    creates: tuple[Create, ...] = ()
    stops: tuple[Stop, ...] = ()
    missing: tuple[int, ...] = ()
    may_give_way: tuple[ObservedInstance, ...] = ()
    coming: bool = False
    again_at_ns: int | None = None


def failed(tries: Attempts, attempt: int, at: int) -> Attempts:
    """An attempt ended before its instance came up, or the instance failed later."""
    if attempt < tries.attempt:
        return tries
    wait = min(BACK_OFF_NS << min(tries.failures, 16), BACK_OFF_MAX_NS)
    return Attempts(attempt, tries.failures + 1, at + wait)


def passed_over(tries: Attempts, attempt: int, at: int) -> Attempts:
    """The request_id of an attempt was used up before (the scheduler restarted, and its instance has ended since):
    nothing failed, the next number is tried."""
    if attempt < tries.attempt:
        return tries
    return Attempts(attempt, tries.failures, at + PASS_OVER_NS)


def came_up(tries: Attempts, attempt: int) -> Attempts:
    """The instance of an attempt serves: failures start from nothing again."""
    if attempt < tries.attempt:
        return tries
    return Attempts(attempt, 0, 0)


def plan(
    wanted: DesiredState,
    present: Iterable[ObservedInstance],
    tries: Mapping[int, Attempts],
    under_way: frozenset[int],
    settled: bool,
    at: int,
) -> ReconcilePlan:
    """What to create and stop for one function.

    `present`: its instances that have not ended, of any revision. `tries`: of the wanted revision, by ordinal.
    `under_way`: ordinals of the wanted revision with a create not answered yet. `settled`: every known node has
    reported or is lost; before that nothing is created, for it may exist already, and nothing is stopped, for what is
    missing elsewhere may be what it stands in for.

    Instances of an older revision go as those of the wanted one come up, and so do instances on a drained node.
    """
    known = list(present)
    here = sorted((one for one in known if not _gone(one)), key=_least_useful)
    fresh = [one for one in here if one.made_by.revision == wanted.revision and not one.scheduling.drains]
    old = [one for one in here if one.made_by.revision != wanted.revision or one.scheduling.drains]
    surplus = max(0, len(fresh) - wanted.target)  # what is under way goes first, but has no uid yet
    kept = fresh[surplus:]
    missing = _missing(wanted.target - len(kept) - len(under_way), kept, under_way)
    creates, again = _creates(wanted, missing, known, tries, at)
    leave = _superfluous(wanted, old, kept)
    if not settled:
        return ReconcilePlan(missing=(*missing, *sorted(under_way)))
    leaving = {one.uid for one in leave}
    return ReconcilePlan(
        creates=creates,
        stops=tuple(Stop(one.uid, one.node) for one in (*fresh[:surplus], *leave)),
        missing=(*missing, *sorted(under_way)),
        may_give_way=tuple(one for one in old if one.uid not in leaving and not one.scheduling.drains),
        coming=bool(under_way) or not all(one.serving for one in kept),
        again_at_ns=again,
    )


def _gone(one: ObservedInstance) -> bool:
    return one.counted_out or one.state is InstanceState.STOPPING


def _least_useful(one: ObservedInstance) -> tuple[int, int, int, int, int, str]:
    """Who goes first: who has not come up, who is on a node that goes away or is not well, who sleeps, who has nothing
    to do (the longest first), who has the fewest requests; then the highest ordinal."""
    if not one.serving:
        use = 0
    elif one.scheduling is not Scheduling.NORMAL or one.unsteady:
        use = 1
    elif one.requests:
        use = 4
    else:
        use = 2 if one.state in (InstanceState.FROZEN, InstanceState.FREEZING) else 3
    return (use, one.requests, -one.idle_ns, -one.made_by.ordinal, -one.made_by.attempt, one.uid)


def _superfluous(
    wanted: DesiredState, old: list[ObservedInstance], kept: list[ObservedInstance]
) -> list[ObservedInstance]:
    """At no time are there fewer than `target` for lack of patience, but for what an operator wants gone at once."""
    stay = max(0, wanted.target - sum(one.serving for one in kept))
    leave = old[: max(0, len(old) - stay)]
    return [*leave, *(one for one in old[len(leave) :] if one.scheduling is Scheduling.EMPTIED)]


def _missing(short: int, kept: list[ObservedInstance], under_way: frozenset[int]) -> tuple[int, ...]:
    """The lowest `short` ordinals that are free."""
    held = {one.made_by.ordinal for one in kept} | under_way
    free = (ordinal for ordinal in range(max(0, short) + len(held)) if ordinal not in held)
    return tuple(ordinal for ordinal, _ in zip(free, range(short), strict=False))


def _creates(
    wanted: DesiredState,
    missing: tuple[int, ...],
    known: list[ObservedInstance],
    tries: Mapping[int, Attempts],
    at: int,
) -> tuple[tuple[Create, ...], int | None]:
    used: dict[int, int] = {}
    for one in known:
        if one.made_by.revision == wanted.revision:
            used[one.made_by.ordinal] = max(one.made_by.attempt, used.get(one.made_by.ordinal, 0))
    creates: list[Create] = []
    again: int | None = None
    for ordinal in missing:
        tried = tries.get(ordinal, Attempts())
        if tried.given_up:
            continue
        if tried.not_before_ns > at:
            again = tried.not_before_ns if again is None else min(again, tried.not_before_ns)
            continue
        attempt = max(tried.attempt, used.get(ordinal, 0)) + 1
        creates.append(Create(RequestId(wanted.function, wanted.revision, ordinal, attempt)))
    return tuple(creates), again

"""The rival policies bind early, each in its own way; every request is queued, executing or answered."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from agent.core.dispatch.events import (
    DeadlinePassed,
    Dispatch,
    Effect,
    Event,
    FunctionRemoved,
    FunctionSet,
    InstanceGone,
    InstanceReported,
    LeaseEnded,
    LeaseRefused,
    RefusalReason,
    Refuse,
    RequestArrived,
    RequestGone,
    Wake,
    WakeAnswered,
    WakeFailed,
)
from agent.core.types import MILLISECOND_NS, InstanceState
from agent.simulator.rival_policies import Rival, RivalDispatcher

RUNNING, FROZEN = InstanceState.RUNNING, InstanceState.FROZEN
FAR = 10**15


class RivalRig:
    """A dispatcher with some instances."""

    def __init__(self, rival: Rival, states: dict[str, InstanceState], concurrency: int = 1, queue: int = 1000) -> None:
        self.asked: list[int] = []
        self.drawn = iter(range(1_000))
        self.rivals = RivalDispatcher(rival, self.below)
        self.at = 0
        self.apply(FunctionSet("ocr", queue_length=queue))
        for uid, state in states.items():
            self.apply(InstanceReported(uid, "ocr", "n1", state, concurrency))

    def below(self, limit: int) -> int:
        """The next number that the test put into `drawn`."""
        self.asked.append(limit)
        return next(self.drawn) % limit

    def apply(self, event: Event) -> list[Effect]:
        self.at += MILLISECOND_NS
        return self.rivals.step(event, self.at)

    def arrive(self, *requests: int, deadline_ns: int = FAR) -> list[Effect]:
        return [effect for n in requests for effect in self.apply(RequestArrived(n, "ocr", deadline_ns))]


def places(effects: list[Effect]) -> list[tuple[int, str]]:
    """(request, uid) of the effects, which are all dispatches."""
    assert all(isinstance(effect, Dispatch) for effect in effects), effects
    return [(effect.request, effect.uid) for effect in effects if isinstance(effect, Dispatch)]


THREE = dict.fromkeys(("a", "b", "c"), RUNNING)


def test_round_robin_takes_turns_even_if_another_instance_is_free() -> None:
    rig = RivalRig(Rival.ROUND_ROBIN, THREE)
    assert [uid for _, uid in places(rig.arrive(1, 2, 3))] == ["b", "c", "a"]
    assert places(rig.apply(LeaseEnded(2))) == [], "c is free"
    assert rig.arrive(4) == [], "its turn is b's, which is busy"
    assert places(rig.arrive(5)) == [(5, "c")], "and a later request overtakes it"
    assert places(rig.apply(LeaseEnded(1))) == [(4, "b")]


def test_random_takes_the_drawn_instance() -> None:
    rig = RivalRig(Rival.RANDOM, THREE)
    rig.drawn = iter((2, 2, 0))
    assert places(rig.arrive(1, 2, 3)) == [(1, "c"), (3, "a")], "the second waits at c although a and b are free"
    assert rig.asked == [3, 3, 3]


def test_two_choices_takes_the_one_with_fewer_and_the_first_of_equals() -> None:
    rig = RivalRig(Rival.TWO_CHOICES, THREE)
    rig.drawn = iter((0, 1, 0, 1, 1, 0))
    assert places(rig.arrive(1, 2)) == [(1, "a"), (2, "b")]
    assert rig.arrive(3) == [], "b and a are equal: b, which is busy, though c is free"
    assert places(rig.apply(LeaseEnded(2))) == [(3, "b")]


def test_least_outstanding_counts_queued_requests_and_draws_among_equals() -> None:
    rig = RivalRig(Rival.LEAST_OUTSTANDING, THREE)
    rig.drawn = iter((1, 1, 0, 0))
    assert places(rig.arrive(1, 2, 3)) == [(1, "b"), (2, "c"), (3, "a")]
    assert rig.asked == [3, 2], "of three, then of two; a single one is not drawn"
    assert rig.arrive(4) == []
    rig.apply(LeaseEnded(2))
    assert places(rig.arrive(5)) == [(5, "c")]


def test_a_bound_request_stays_when_another_instance_becomes_free() -> None:
    """What late binding saves."""
    rig = RivalRig(Rival.LEAST_OUTSTANDING, dict.fromkeys(("a", "b"), RUNNING))
    rig.drawn = iter((0, 0, 0))
    assert places(rig.arrive(1, 2)) == [(1, "a"), (2, "b")]
    assert rig.arrive(3) == [], "at a"
    assert rig.apply(LeaseEnded(2)) == [], "b idles"
    assert places(rig.apply(LeaseEnded(1))) == [(3, "a")]


def test_an_instance_takes_as_many_at_once_as_it_may() -> None:
    rig = RivalRig(Rival.ROUND_ROBIN, {"a": RUNNING}, concurrency=2)
    assert places(rig.arrive(1, 2, 3)) == [(1, "a"), (2, "a")]
    assert places(rig.apply(RequestGone(1))) == [(3, "a")]


def test_round_robin_wakes_the_frozen_instance_in_turn_once() -> None:
    rig = RivalRig(Rival.ROUND_ROBIN, {"a": RUNNING, "b": FROZEN})
    assert rig.arrive(1) == [Wake("b", "n1")], "a is awake and free"
    assert places(rig.arrive(2)) == [(2, "a")]
    assert rig.arrive(3) == [], "it is waking"
    assert places(rig.apply(WakeAnswered("b"))) == [(1, "b")]
    assert rig.apply(InstanceReported("b", "ocr", "n1", RUNNING)) == []
    assert places(rig.apply(LeaseEnded(1))) == [(3, "b")]


def test_a_failed_wake_is_retried_when_the_instance_is_reported() -> None:
    rig = RivalRig(Rival.ROUND_ROBIN, {"a": FROZEN})
    assert rig.arrive(1) == [Wake("a", "n1")]
    assert rig.apply(WakeFailed("a")) == [], "or a caller whose wakes fail at once would loop for ever"
    assert rig.apply(InstanceReported("a", "ocr", "n1", FROZEN)) == [Wake("a", "n1")]


@pytest.mark.parametrize("rival", list(Rival))
def test_refused_requests_get_the_reason(rival: Rival) -> None:
    rig = RivalRig(rival, {"a": RUNNING}, queue=1)
    assert rig.apply(RequestArrived(1, "llm", FAR)) == [Refuse(1, RefusalReason.UNKNOWN_FUNCTION)]
    assert places(rig.arrive(2, 3)) == [(2, "a")]
    assert rig.arrive(4) == [Refuse(4, RefusalReason.QUEUE_FULL)]
    assert rig.apply(DeadlinePassed(2)) == [], "it is executing"
    assert rig.apply(DeadlinePassed(3)) == [Refuse(3, RefusalReason.QUEUE_TIMEOUT)]
    assert rig.apply(InstanceGone("a")) == []
    assert rig.arrive(5) == [Refuse(5, RefusalReason.NO_CAPACITY)]


@pytest.mark.parametrize("rival", list(Rival))
def test_requests_queued_at_an_instance_that_ends_are_bound_again(rival: Rival) -> None:
    rig = RivalRig(rival, {"a": RUNNING})
    assert places(rig.arrive(1, 2, 3)) == [(1, "a")]
    rig.apply(InstanceReported("b", "ocr", "n1", RUNNING))
    assert places(rig.apply(InstanceGone("a"))) == [(2, "b")]
    assert rig.apply(LeaseRefused(1)) == [], "behind 3, at the one that is left"
    assert places(rig.apply(LeaseEnded(2))) == [(3, "b")]
    assert places(rig.apply(LeaseEnded(3))) == [(1, "b")]
    rig.arrive(4)
    assert rig.apply(InstanceGone("b")) == [Refuse(4, RefusalReason.NO_CAPACITY)]
    assert rig.apply(LeaseRefused(1)) == [Refuse(1, RefusalReason.NO_CAPACITY)]


def test_a_refused_lease_is_first_in_its_line_again_until_its_deadline() -> None:
    rig = RivalRig(Rival.ROUND_ROBIN, {"a": RUNNING})
    assert places(rig.arrive(1, 2)) == [(1, "a")]
    assert rig.apply(LeaseRefused(1)) == [], "not at once: it would be refused again"
    assert places(rig.apply(InstanceReported("a", "ocr", "n1", RUNNING))) == [(1, "a")]
    rig.apply(LeaseEnded(1))
    late = rig.at + 10 * MILLISECOND_NS
    assert places(rig.apply(LeaseEnded(2))) == []
    assert places(rig.arrive(3, deadline_ns=late)) == [(3, "a")]
    rig.at = late
    assert rig.apply(DeadlinePassed(3)) == [], "it is executing"
    assert rig.apply(LeaseRefused(3)) == [Refuse(3, RefusalReason.QUEUE_TIMEOUT)], "its deadline passes only once"


def test_a_removed_function_refuses_queued_requests_and_finishes_the_others() -> None:
    rig = RivalRig(Rival.ROUND_ROBIN, {"a": RUNNING})
    assert places(rig.arrive(1, 2, 3)) == [(1, "a")]
    unknown = [Refuse(number, RefusalReason.UNKNOWN_FUNCTION) for number in (1, 2, 3)]
    assert rig.apply(FunctionRemoved("ocr")) == unknown[1:]
    assert rig.apply(LeaseRefused(1)) == unknown[:1]


# ---- random walks -------------------------------------------------------------------------------------------------

STATES = (RUNNING, RUNNING, RUNNING, FROZEN, InstanceState.FREEZING, InstanceState.RESTORING, InstanceState.STARTING)
FROZEN_OR_FREEZING = (FROZEN, InstanceState.FREEZING)
CONCURRENCY = {"ocr": 1, "llm": 4}
QUEUE = 6


@dataclass
class Walk:
    """The caller's side, kept independently of the dispatcher."""

    rivals: RivalDispatcher
    rng: random.Random
    now: int = 0
    made: int = 0
    function_of: dict[int, str] = field(default_factory=dict)
    deadlines: dict[int, int] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    executing: dict[int, str] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    states: dict[str, InstanceState] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    waking: set[str] = field(default_factory=set)
    unhealthy: set[str] = field(default_factory=set)  # refused a request and not reported since
    pending_deadlines: set[int] = field(default_factory=set)  # their deadlines have not passed yet
    seen: Counter[str] = field(default_factory=Counter)

    def apply(self, event: Event) -> None:
        self.now += MILLISECOND_NS
        for effect in self.rivals.step(event, self.now):
            self.seen[type(effect).__name__] += 1
            match effect:
                case Dispatch(request, uid):
                    self.waiting.remove(request)
                    self.executing[request] = uid
                    assert self.states[uid] is RUNNING
                    assert self.owners[uid] == self.function_of[request]
                    assert Counter(self.executing.values())[uid] <= CONCURRENCY[self.owners[uid]]
                case Wake(uid):
                    assert self.states[uid] in FROZEN_OR_FREEZING
                    assert uid not in self.waking, "asked twice"
                    self.waking.add(uid)
                case Refuse(request, reason):
                    self.waiting.remove(request)
                    self.answered.add(request)
                    self.seen[reason.name] += 1
                    assert reason is not RefusalReason.QUEUE_TIMEOUT or self.now >= self.deadlines[request]
        self.check()

    def check(self) -> None:
        accounted = [*self.waiting, *self.executing, *self.answered]
        assert sorted(accounted) == sorted(self.function_of)
        bound = self.rivals._instances
        queues = {uid: list(found.queue) for uid, found in bound.items()}
        assert sorted(n for queue in queues.values() for n in queue) == sorted(self.waiting), "each in one queue"
        for uid, queue in queues.items():
            assert all(self.function_of[number] == self.owners[uid] for number in queue)
            busy = Counter(self.executing.values())[uid] >= CONCURRENCY[self.owners[uid]]
            if queue and uid not in self.unhealthy:
                assert busy or self.states[uid] is not RUNNING, f"{uid} idles while its own queue waits"
                assert self.states[uid] not in FROZEN_OR_FREEZING or uid in self.waking, f"{uid} is not woken"

    def arrive(self) -> None:
        number, function = len(self.function_of) + 1, self.rng.choice(("ocr", "llm"))
        self.function_of[number] = function
        self.deadlines[number] = self.now + self.rng.choice((20, 200)) * MILLISECOND_NS
        before = sum(self.function_of[n] == function for n in self.waiting)
        self.waiting.add(number)
        self.pending_deadlines.add(number)
        self.apply(RequestArrived(number, function, self.deadlines[number]))
        assert before < QUEUE or number in self.answered, "the queue is bounded"

    def pass_deadlines(self) -> None:
        """Each once, as a timer does, whether the request is queued or executing."""
        for number in sorted(number for number in self.pending_deadlines if self.deadlines[number] <= self.now):
            self.pending_deadlines.remove(number)
            self.apply(DeadlinePassed(number))
            assert number not in self.waiting

    def report(self) -> None:
        if not self.states or (self.rng.random() < 0.3 and len(self.states) < 8):
            self.made += 1
            uid, function = f"i{self.made}", self.rng.choice(("ocr", "llm"))
            self.owners[uid] = function
        else:
            uid = self.rng.choice(list(self.states))
        self.reported(uid, self.rng.choice(STATES))

    def reported(self, uid: str, state: InstanceState) -> None:
        self.states[uid] = state
        self.unhealthy.discard(uid)
        if state is RUNNING:
            self.waking.discard(uid)
        self.apply(InstanceReported(uid, self.owners[uid], "n1", state, CONCURRENCY[self.owners[uid]]))

    def end(self) -> None:
        if self.executing:
            number = self.rng.choice(list(self.executing))
            del self.executing[number]
            self.answered.add(number)
            self.apply(self.rng.choice((LeaseEnded, RequestGone))(number))

    def leave(self) -> None:
        if self.waiting:
            number = self.rng.choice(sorted(self.waiting))
            self.waiting.remove(number)
            self.answered.add(number)
            self.apply(RequestGone(number))

    def refuse(self) -> None:
        if self.executing:
            number = self.rng.choice(list(self.executing))
            self.unhealthy.add(self.executing.pop(number))
            self.waiting.add(number)
            self.apply(LeaseRefused(number))
            assert number not in self.waiting or self.now < self.deadlines[number]

    def vanish(self) -> None:
        if self.states and self.rng.random() < 0.3:
            uid = self.rng.choice(list(self.states))
            del self.states[uid]
            self.waking.discard(uid)
            self.apply(InstanceGone(uid))

    def wake_ends(self) -> None:
        if self.waking:
            uid = self.rng.choice(sorted(self.waking))
            self.waking.remove(uid)
            if self.rng.random() < 0.7:
                self.states[uid] = RUNNING
                self.apply(WakeAnswered(uid))
            else:
                self.unhealthy.add(uid)
                self.apply(WakeFailed(uid))


def walk(rival: Rival, seed: int) -> Walk:
    """Six hundred random events; then every deadline passes and every response ends."""
    rng = random.Random(seed)
    found = Walk(RivalDispatcher(rival, rng.randrange), rng)
    for function in CONCURRENCY:
        found.apply(FunctionSet(function, queue_length=QUEUE))
    actions = [
        *(found.arrive,) * 6, *(found.report,) * 2, *(found.end,) * 4, *(found.wake_ends,) * 2,
        found.pass_deadlines, found.leave, found.refuse, found.vanish,
    ]  # fmt: skip
    for _ in range(600):
        rng.choice(actions)()
    found.now = max(found.now, *found.deadlines.values())
    found.pass_deadlines()
    assert not found.waiting
    while found.executing:
        found.end()
    assert not found.rivals._requests, "answered requests are dropped"
    return found


@pytest.mark.parametrize("rival", list(Rival))
def test_every_request_is_waiting_inside_or_answered_exactly_once(rival: Rival) -> None:
    seen: Counter[str] = Counter()
    for seed in range(25):
        seen += walk(rival, seed).seen
    assert min(seen[name] for name in ("Dispatch", "Wake", "QUEUE_FULL", "QUEUE_TIMEOUT", "NO_CAPACITY")) > 20, seen

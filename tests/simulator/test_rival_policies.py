"""The rivals: each binds early and in its own way; whatever happens, every request is waiting, inside or answered."""

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


class Told:
    """A dispatcher with some instances, and who was sent where."""

    def __init__(self, rival: Rival, states: dict[str, InstanceState], concurrency: int = 1, queue: int = 1000) -> None:
        self.asked: list[int] = []
        self.drawn = iter(range(1_000))
        self.rivals = RivalDispatcher(rival, self.below)
        self.at = 0
        self.apply(FunctionSet("ocr", queue_length=queue))
        for uid, state in states.items():
            self.apply(InstanceReported(uid, "ocr", "n1", state, concurrency))

    def below(self, limit: int) -> int:
        """Chance, by hand: what the test put into `drawn`."""
        self.asked.append(limit)
        return next(self.drawn) % limit

    def apply(self, event: Event) -> list[Effect]:
        self.at += MILLISECOND_NS
        return self.rivals.step(event, self.at)

    def arrive(self, *requests: int, deadline_ns: int = FAR) -> list[Effect]:
        return [effect for n in requests for effect in self.apply(RequestArrived(n, "ocr", deadline_ns))]


def places(effects: list[Effect]) -> list[tuple[int, str]]:
    """Who was sent where, and nothing else was said."""
    assert all(isinstance(effect, Dispatch) for effect in effects), effects
    return [(effect.request, effect.uid) for effect in effects if isinstance(effect, Dispatch)]


THREE = dict.fromkeys(("a", "b", "c"), RUNNING)


def test_round_robin_takes_turns_even_if_another_instance_is_free() -> None:
    told = Told(Rival.ROUND_ROBIN, THREE)
    assert [uid for _, uid in places(told.arrive(1, 2, 3))] == ["b", "c", "a"]
    assert places(told.apply(LeaseEnded(2))) == [], "c is free"
    assert told.arrive(4) == [], "its turn is b's, which is busy"
    assert places(told.arrive(5)) == [(5, "c")], "and who comes later overtakes it"
    assert places(told.apply(LeaseEnded(1))) == [(4, "b")]


def test_random_takes_the_drawn_instance() -> None:
    told = Told(Rival.RANDOM, THREE)
    told.drawn = iter((2, 2, 0))
    assert places(told.arrive(1, 2, 3)) == [(1, "c"), (3, "a")], "the second waits at c although a and b are free"
    assert told.asked == [3, 3, 3]


def test_two_choices_takes_the_one_with_fewer_and_the_first_of_equals() -> None:
    told = Told(Rival.TWO_CHOICES, THREE)
    told.drawn = iter((0, 1, 0, 1, 1, 0))
    assert places(told.arrive(1, 2)) == [(1, "a"), (2, "b")]
    assert told.arrive(3) == [], "b and a are equal: b, which is busy, though c is free"
    assert places(told.apply(LeaseEnded(2))) == [(3, "b")]


def test_least_outstanding_counts_queued_requests_and_draws_among_equals() -> None:
    told = Told(Rival.LEAST_OUTSTANDING, THREE)
    told.drawn = iter((1, 1, 0, 0))
    assert places(told.arrive(1, 2, 3)) == [(1, "b"), (2, "c"), (3, "a")]
    assert told.asked == [3, 2], "of three, of two; one is no choice"
    assert told.arrive(4) == []
    told.apply(LeaseEnded(2))
    assert places(told.arrive(5)) == [(5, "c")]


def test_a_bound_request_stays_when_another_instance_becomes_free() -> None:
    """What late binding saves."""
    told = Told(Rival.LEAST_OUTSTANDING, dict.fromkeys(("a", "b"), RUNNING))
    told.drawn = iter((0, 0, 0))
    assert places(told.arrive(1, 2)) == [(1, "a"), (2, "b")]
    assert told.arrive(3) == [], "at a"
    assert told.apply(LeaseEnded(2)) == [], "b idles"
    assert places(told.apply(LeaseEnded(1))) == [(3, "a")]


def test_an_instance_takes_as_many_at_once_as_it_may() -> None:
    told = Told(Rival.ROUND_ROBIN, {"a": RUNNING}, concurrency=2)
    assert places(told.arrive(1, 2, 3)) == [(1, "a"), (2, "a")]
    assert places(told.apply(RequestGone(1))) == [(3, "a")]


def test_round_robin_wakes_the_frozen_instance_in_turn_once() -> None:
    told = Told(Rival.ROUND_ROBIN, {"a": RUNNING, "b": FROZEN})
    assert told.arrive(1) == [Wake("b", "n1")], "a is awake and free"
    assert places(told.arrive(2)) == [(2, "a")]
    assert told.arrive(3) == [], "it is on its way"
    assert places(told.apply(WakeAnswered("b"))) == [(1, "b")]
    assert told.apply(InstanceReported("b", "ocr", "n1", RUNNING)) == []
    assert places(told.apply(LeaseEnded(1))) == [(3, "b")]


def test_a_failed_wake_is_retried_when_the_instance_is_reported() -> None:
    told = Told(Rival.ROUND_ROBIN, {"a": FROZEN})
    assert told.arrive(1) == [Wake("a", "n1")]
    assert told.apply(WakeFailed("a")) == [], "else a shell whose wakes fail at once would never end"
    assert told.apply(InstanceReported("a", "ocr", "n1", FROZEN)) == [Wake("a", "n1")]


@pytest.mark.parametrize("rival", list(Rival))
def test_refused_requests_get_the_reason(rival: Rival) -> None:
    told = Told(rival, {"a": RUNNING}, queue=1)
    assert told.apply(RequestArrived(1, "llm", FAR)) == [Refuse(1, RefusalReason.UNKNOWN_FUNCTION)]
    assert places(told.arrive(2, 3)) == [(2, "a")]
    assert told.arrive(4) == [Refuse(4, RefusalReason.QUEUE_FULL)]
    assert told.apply(DeadlinePassed(2)) == [], "it is inside"
    assert told.apply(DeadlinePassed(3)) == [Refuse(3, RefusalReason.QUEUE_TIMEOUT)]
    assert told.apply(InstanceGone("a")) == []
    assert told.arrive(5) == [Refuse(5, RefusalReason.NO_CAPACITY)]


@pytest.mark.parametrize("rival", list(Rival))
def test_requests_queued_at_an_instance_that_ends_are_bound_again(rival: Rival) -> None:
    told = Told(rival, {"a": RUNNING})
    assert places(told.arrive(1, 2, 3)) == [(1, "a")]
    told.apply(InstanceReported("b", "ocr", "n1", RUNNING))
    assert places(told.apply(InstanceGone("a"))) == [(2, "b")]
    assert told.apply(LeaseRefused(1)) == [], "behind 3, at the one that is left"
    assert places(told.apply(LeaseEnded(2))) == [(3, "b")]
    assert places(told.apply(LeaseEnded(3))) == [(1, "b")]
    told.arrive(4)
    assert told.apply(InstanceGone("b")) == [Refuse(4, RefusalReason.NO_CAPACITY)]
    assert told.apply(LeaseRefused(1)) == [Refuse(1, RefusalReason.NO_CAPACITY)]


def test_a_refused_lease_is_first_in_its_line_again_until_its_deadline() -> None:
    told = Told(Rival.ROUND_ROBIN, {"a": RUNNING})
    assert places(told.arrive(1, 2)) == [(1, "a")]
    assert told.apply(LeaseRefused(1)) == [], "not at once: it would be refused again"
    assert places(told.apply(InstanceReported("a", "ocr", "n1", RUNNING))) == [(1, "a")]
    told.apply(LeaseEnded(1))
    late = told.at + 10 * MILLISECOND_NS
    assert places(told.apply(LeaseEnded(2))) == []
    assert places(told.arrive(3, deadline_ns=late)) == [(3, "a")]
    told.at = late
    assert told.apply(DeadlinePassed(3)) == [], "it is inside"
    assert told.apply(LeaseRefused(3)) == [Refuse(3, RefusalReason.QUEUE_TIMEOUT)], (
        "nobody will say again that it is over"
    )


def test_a_removed_function_refuses_queued_requests_and_finishes_the_others() -> None:
    told = Told(Rival.ROUND_ROBIN, {"a": RUNNING})
    assert places(told.arrive(1, 2, 3)) == [(1, "a")]
    unknown = [Refuse(number, RefusalReason.UNKNOWN_FUNCTION) for number in (1, 2, 3)]
    assert told.apply(FunctionRemoved("ocr")) == unknown[1:]
    assert told.apply(LeaseRefused(1)) == unknown[:1]


# ---- random walks -------------------------------------------------------------------------------------------------

STATES = (RUNNING, RUNNING, RUNNING, FROZEN, InstanceState.FREEZING, InstanceState.RESTORING, InstanceState.STARTING)
ASLEEP = (FROZEN, InstanceState.FREEZING)
CONCURRENCY = {"ocr": 1, "llm": 4}
QUEUE = 6


@dataclass
class Walk:
    """The shell's side, kept independently of the dispatcher."""

    rivals: RivalDispatcher
    rng: random.Random
    now: int = 0
    made: int = 0
    function_of: dict[int, str] = field(default_factory=dict)
    deadlines: dict[int, int] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    inside: dict[int, str] = field(default_factory=dict)
    answered: set[int] = field(default_factory=set)
    states: dict[str, InstanceState] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    waking: set[str] = field(default_factory=set)
    shunned: set[str] = field(default_factory=set)  # refused somebody and have not been heard since
    untold: set[int] = field(default_factory=set)  # their deadlines were not told yet
    seen: Counter[str] = field(default_factory=Counter)

    def apply(self, event: Event) -> None:
        self.now += MILLISECOND_NS
        for effect in self.rivals.step(event, self.now):
            self.seen[type(effect).__name__] += 1
            match effect:
                case Dispatch(request, uid):
                    self.waiting.remove(request)
                    self.inside[request] = uid
                    assert self.states[uid] is RUNNING
                    assert self.owners[uid] == self.function_of[request]
                    assert Counter(self.inside.values())[uid] <= CONCURRENCY[self.owners[uid]]
                case Wake(uid):
                    assert self.states[uid] in ASLEEP
                    assert uid not in self.waking, "asked twice"
                    self.waking.add(uid)
                case Refuse(request, reason):
                    self.waiting.remove(request)
                    self.answered.add(request)
                    self.seen[reason.name] += 1
                    assert reason is not RefusalReason.QUEUE_TIMEOUT or self.now >= self.deadlines[request]
        self.check()

    def check(self) -> None:
        accounted = [*self.waiting, *self.inside, *self.answered]
        assert sorted(accounted) == sorted(self.function_of)
        bound = self.rivals._instances
        lines = {uid: list(found.queue) for uid, found in bound.items()}
        assert sorted(n for line in lines.values() for n in line) == sorted(self.waiting), "each in one line"
        for uid, line in lines.items():
            assert all(self.function_of[number] == self.owners[uid] for number in line)
            busy = Counter(self.inside.values())[uid] >= CONCURRENCY[self.owners[uid]]
            if line and uid not in self.shunned:
                assert busy or self.states[uid] is not RUNNING, f"{uid} idles while its own line waits"
                assert self.states[uid] not in ASLEEP or uid in self.waking, f"nobody wakes {uid}"

    def arrive(self) -> None:
        number, function = len(self.function_of) + 1, self.rng.choice(("ocr", "llm"))
        self.function_of[number] = function
        self.deadlines[number] = self.now + self.rng.choice((20, 200)) * MILLISECOND_NS
        before = sum(self.function_of[n] == function for n in self.waiting)
        self.waiting.add(number)
        self.untold.add(number)
        self.apply(RequestArrived(number, function, self.deadlines[number]))
        assert before < QUEUE or number in self.answered, "the queue is bounded"

    def pass_deadlines(self) -> None:
        """Each is told once, as a shell's timer would, whether the request waits or is inside."""
        for number in sorted(number for number in self.untold if self.deadlines[number] <= self.now):
            self.untold.remove(number)
            self.apply(DeadlinePassed(number))
            assert number not in self.waiting

    def report(self) -> None:
        if not self.states or (self.rng.random() < 0.3 and len(self.states) < 8):
            self.made += 1
            uid, function = f"i{self.made}", self.rng.choice(("ocr", "llm"))
            self.owners[uid] = function
        else:
            uid = self.rng.choice(list(self.states))
        self.hear(uid, self.rng.choice(STATES))

    def hear(self, uid: str, state: InstanceState) -> None:
        self.states[uid] = state
        self.shunned.discard(uid)
        if state is RUNNING:
            self.waking.discard(uid)
        self.apply(InstanceReported(uid, self.owners[uid], "n1", state, CONCURRENCY[self.owners[uid]]))

    def end(self) -> None:
        if self.inside:
            number = self.rng.choice(list(self.inside))
            del self.inside[number]
            self.answered.add(number)
            self.apply(self.rng.choice((LeaseEnded, RequestGone))(number))

    def leave(self) -> None:
        if self.waiting:
            number = self.rng.choice(sorted(self.waiting))
            self.waiting.remove(number)
            self.answered.add(number)
            self.apply(RequestGone(number))

    def refuse(self) -> None:
        if self.inside:
            number = self.rng.choice(list(self.inside))
            self.shunned.add(self.inside.pop(number))
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
                self.shunned.add(uid)
                self.apply(WakeFailed(uid))


def walk(rival: Rival, seed: int) -> Walk:
    """Six hundred things that may happen; then every deadline passes and every response ends."""
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
    while found.inside:
        found.end()
    assert not found.rivals._requests, "nothing is remembered of who was answered"
    return found


@pytest.mark.parametrize("rival", list(Rival))
def test_every_request_is_waiting_inside_or_answered_exactly_once(rival: Rival) -> None:
    seen: Counter[str] = Counter()
    for seed in range(25):
        seen += walk(rival, seed).seen
    assert min(seen[name] for name in ("Dispatch", "Wake", "QUEUE_FULL", "QUEUE_TIMEOUT", "NO_CAPACITY")) > 20, seen

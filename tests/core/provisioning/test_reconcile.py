"""From the instances that a function should have to those that it has."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from agent.core.provisioning.model import ObservedInstance, RequestId, Scheduling, parse_request_id
from agent.core.provisioning.reconcile import MAX_ATTEMPTS, Attempts, DesiredState, ReconcilePlan, came_up, failed, plan
from agent.core.types import SECOND_NS, InstanceState, StopCause

RUNNING, STARTING, STOPPING = InstanceState.RUNNING, InstanceState.STARTING, InstanceState.STOPPING
FROZEN = InstanceState.FROZEN
CORDONED, DRAINED, EMPTIED = Scheduling.CORDONED, Scheduling.DRAINED, Scheduling.EMPTIED
NONE: frozenset[int] = frozenset()


def have(ordinal: int, revision: str = "1", state: InstanceState = RUNNING, attempt: int = 1) -> ObservedInstance:
    uid = f"r{revision}-{ordinal}-{attempt}"
    return ObservedInstance(uid, "n1", RequestId("ocr", revision, ordinal, attempt), state)


def settled(target: int, present: Iterable[ObservedInstance], revision: str = "1") -> ReconcilePlan:
    """The plan without creates in progress, once all nodes have reported."""
    return plan(DesiredState("ocr", revision, target), present, {}, NONE, True, 0)


def stopped(made: ReconcilePlan) -> list[str]:
    return [stop.uid for stop in made.stops]


def created(made: ReconcilePlan) -> list[str]:
    return [str(create.request_id) for create in made.creates]


def yielding(made: ReconcilePlan) -> list[str]:
    """Instances to stop for the creates if there is no room."""
    return [] if made.coming_up or not made.creates else [one.uid for one in made.may_give_way]


def test_missing_ordinals_are_created_except_those_being_created() -> None:
    made = plan(DesiredState("ocr", "1", 3), [have(1)], {}, frozenset({2}), True, 0)
    assert [str(create.request_id) for create in made.creates] == ["ocr/1/0/1"]
    assert made.stops == ()


def test_nothing_is_created_before_every_node_has_reported() -> None:
    assert plan(DesiredState("ocr", "1", 3), [], {}, NONE, False, 0).creates == ()


def test_nothing_is_stopped_before_every_node_has_reported() -> None:
    """Surplus instances may replace unreported ones, and the target may not be known yet."""
    here = [have(0), have(1), have(0, "0"), replace(have(5), scheduling=EMPTIED)]
    made = plan(DesiredState("ocr", "1", 1), here, {}, NONE, False, 0)
    assert (made.stops, made.creates, made.may_give_way) == ((), (), ())
    assert len(settled(1, here).stops) == 3


USES = {
    "not yet up": have(0, state=STARTING),
    "cordoned": replace(have(1), scheduling=CORDONED, requests=7),
    "silent node": replace(have(2), unsteady=True, requests=8),
    "frozen for long": replace(have(3, state=FROZEN), idle_ns=90 * SECOND_NS),
    "freezing": replace(have(4, state=InstanceState.FREEZING), idle_ns=60 * SECOND_NS),
    "frozen": replace(have(5, state=FROZEN), idle_ns=50 * SECOND_NS),
    "idle for long": replace(have(6), idle_ns=99 * SECOND_NS),
    "idle, high ordinal": replace(have(8), idle_ns=5 * SECOND_NS),
    "idle, low ordinal": replace(have(7), idle_ns=5 * SECOND_NS),
    "one request": replace(have(10), requests=1),
    "one request, woken for it": replace(have(9, state=InstanceState.RESTORING), requests=1),
    "two requests": replace(have(11), requests=2),
}
"""In scale-in order."""


@pytest.mark.parametrize("target", range(len(USES) + 1))
def test_scale_in_takes_the_first_in_order(target: int) -> None:
    here = list(USES.values())
    random.Random(target).shuffle(here)
    gone = stopped(settled(target, here))
    assert gone == [one.uid for one in USES.values()][: len(USES) - target]


def test_creates_in_progress_count_and_go_before_any_instance() -> None:
    here = [have(0), have(1)]
    more = plan(DesiredState("ocr", "1", 4), here, {}, frozenset({2}), True, 0)
    assert created(more) == ["ocr/1/3/1"]
    assert stopped(plan(DesiredState("ocr", "1", 2), here, {}, frozenset({2}), True, 0)) == []
    assert stopped(plan(DesiredState("ocr", "1", 1), here, {}, frozenset({2}), True, 0)) == ["r1-1-1"]


def test_creates_use_the_lowest_free_ordinal_and_a_new_attempt() -> None:
    assert created(settled(4, [have(1), have(3)])) == ["ocr/1/0/1", "ocr/1/2/1"]
    leaving = have(0, state=STOPPING, attempt=3)
    assert created(settled(2, [leaving, have(1)])) == ["ocr/1/0/4"], "though the attempts are not recorded"


def test_a_target_that_rises_again_during_a_drain_creates_a_new_instance() -> None:
    three = [have(0), replace(have(1), idle_ns=SECOND_NS), have(2)]
    assert stopped(settled(2, three)) == ["r1-1-1"]
    draining = [three[0], replace(three[1], state=STOPPING), three[2]]
    assert settled(2, draining).stops == ()
    again = settled(3, draining)
    assert (created(again), again.stops) == (["ocr/1/1/2"], ())


def test_an_ordinal_that_was_given_up_is_not_evaded() -> None:
    attempts = {1: Attempts(MAX_ATTEMPTS, MAX_ATTEMPTS)}
    made = plan(DesiredState("ocr", "1", 3), [have(0), have(2)], attempts, NONE, True, 0)
    assert (made.creates, made.missing, made.again_at_ns) == ((), (1,), None)


def test_an_old_revision_goes_only_as_the_new_one_comes_up() -> None:
    old = [have(0), have(1)]
    start = settled(2, old, "2")
    assert created(start) == ["ocr/2/0/1", "ocr/2/1/1"]
    assert start.stops == ()
    assert yielding(start) == ["r1-1-1", "r1-0-1"]  # without a free GPU one of the old ones may go first
    assert stopped(settled(2, [*old, have(0, "2"), have(1, "2", STARTING)], "2")) == ["r1-1-1"]
    assert stopped(settled(2, [*old, have(0, "2"), have(1, "2")], "2")) == ["r1-1-1", "r1-0-1"]


def test_an_update_and_a_scale_in_at_once() -> None:
    """Two new ones are up, two old ones are left, and one is enough."""
    here = [have(0, "2"), replace(have(1, "2"), requests=1), have(0), have(1, state=FROZEN)]
    assert stopped(settled(1, here, "2")) == ["r2-0-1", "r1-1-1", "r1-0-1"]


def test_each_stop_says_why() -> None:
    def causes(desired: DesiredState, here: list[ObservedInstance]) -> list[StopCause]:
        return [stop.cause for stop in plan(desired, here, {}, NONE, True, 0).stops]

    here = [have(0), have(1)]
    assert causes(DesiredState("ocr", "1", 1), here) == [StopCause.SCALED_IN]
    assert causes(DesiredState("ocr", "1", 0), here) == [StopCause.SCALED_IN] * 2
    assert causes(DesiredState("ocr", "1", 0, deleted=True), here) == [StopCause.FUNCTION_DELETED] * 2
    assert causes(DesiredState("ocr", "2", 1), [have(0), have(0, "2")]) == [StopCause.REPLACED]
    assert causes(DesiredState("ocr", "2", 0), here) == [StopCause.SCALED_IN] * 2
    drained = replace(have(0), scheduling=Scheduling.EMPTIED)
    assert causes(DesiredState("ocr", "1", 1), [drained]) == [StopCause.NODE_DRAINED]


# ---- nodes that are cordoned or drained -----------------------------------------------------------------------


def test_a_cordoned_node_keeps_what_it_has() -> None:
    made = settled(2, [replace(have(0), scheduling=CORDONED), have(1)])
    assert (made.creates, made.stops) == ((), ())


def test_an_instance_on_a_drained_node_goes_once_another_has_come_up() -> None:
    leaving = replace(have(0), scheduling=DRAINED)
    start = settled(2, [leaving, have(1)])
    assert (created(start), start.stops) == (["ocr/1/0/2"], ())
    coming = settled(2, [leaving, have(1), have(0, state=STARTING, attempt=2)])
    assert (coming.creates, coming.stops) == ((), ())
    assert stopped(settled(2, [leaving, have(1), have(0, attempt=2)])) == ["r1-0-1"]


def test_an_instance_on_a_drained_node_stays_until_it_is_replaced() -> None:
    """It would free a GPU that nothing may use."""
    leaving = [replace(have(n), scheduling=DRAINED) for n in range(2)]
    made = settled(2, leaving)
    assert (made.stops, made.missing, yielding(made)) == ((), (0, 1), [])
    update = settled(2, [*leaving, have(2)], "2")
    assert yielding(update) == ["r1-2-1"]


def test_an_emptied_node_waits_for_nothing() -> None:
    leaving = [replace(have(n), scheduling=EMPTIED) for n in range(2)]
    made = settled(2, leaving)
    assert (created(made), stopped(made)) == (["ocr/1/0/2", "ocr/1/1/2"], ["r1-1-1", "r1-0-1"])


def test_a_drain_that_is_taken_back_keeps_the_most_useful() -> None:
    here = [have(0), replace(have(0, attempt=2), requests=1)]
    assert stopped(settled(1, here)) == ["r1-0-1"]


def test_attempts_back_off_and_end() -> None:
    attempts, now, waits = Attempts(), 0, []
    while not attempts.given_up:
        made = plan(DesiredState("ocr", "1", 1), [], {0: attempts}, NONE, True, now)
        if not made.creates:
            assert made.again_at_ns is not None
            waits.append((made.again_at_ns - now) // SECOND_NS)
            now = made.again_at_ns
            continue
        attempts = failed(attempts, made.creates[0].request_id.attempt, now)
    assert attempts.attempt == MAX_ATTEMPTS
    assert waits == [1, 2, 4, 8]
    assert plan(DesiredState("ocr", "1", 1), [], {0: attempts}, NONE, True, now + 10**12).creates == ()


def test_an_instance_that_fails_after_it_came_up_is_replaced_at_once() -> None:
    attempts = came_up(failed(failed(Attempts(), 1, 0), 2, 0), 3)
    assert attempts == Attempts(3)
    again = failed(attempts, 3, 0)
    made = plan(DesiredState("ocr", "1", 1), [], {0: again}, NONE, True, SECOND_NS)
    assert str(made.creates[0].request_id) == "ocr/1/0/4"


def test_the_end_of_an_older_attempt_does_not_count_for_the_newer() -> None:
    assert failed(Attempts(3), 2, 0) == Attempts(3)


def test_instances_of_a_lost_node_are_replaced_and_go_when_it_is_back() -> None:
    lost = replace(have(0), on_lost_node=True)
    made = plan(DesiredState("ocr", "1", 1), [lost], {}, NONE, True, 0)
    assert str(made.creates[0].request_id) == "ocr/1/0/2"
    assert made.stops == ()
    back = plan(DesiredState("ocr", "1", 1), [have(0), have(0, attempt=2)], {}, NONE, True, 0)
    assert [stop.uid for stop in back.stops] == ["r1-0-2"]


def test_deleting_drains_all() -> None:
    assert len(plan(DesiredState("ocr", "1", 0), [have(0), have(1, "0")], {}, NONE, True, 0).stops) == 2


def test_request_ids_survive_the_wire() -> None:
    one = RequestId("ocr", "7", 2, 1)
    assert parse_request_id(str(one)) == one
    assert parse_request_id("by-hand") is None
    assert parse_request_id("ocr/1/x/1") is None


class Walk:
    """Random nodes with random instances of any revision; time is a row of rounds in which anything may happen."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.nodes = dict.fromkeys(("n1", "n2", "n3"), Scheduling.NORMAL)
        self.target = self.rng.randint(0, 4)
        self.numbers = iter(range(10_000))
        self.here: dict[str, ObservedInstance] = {}
        for _ in range(self.rng.randint(0, 9)):
            state = self.rng.choice([RUNNING, FROZEN, STARTING])
            made_by = RequestId("ocr", str(self.rng.randint(1, 3)), self.rng.randint(0, 5), next(self.numbers) + 1)
            self.add(ObservedInstance(f"i{next(self.numbers)}", self.rng.choice(list(self.nodes)), made_by, state))

    def add(self, one: ObservedInstance) -> None:
        self.here[one.uid] = one

    def serving(self) -> int:
        return sum(one.serving for one in self.here.values())

    def present(self) -> list[ObservedInstance]:
        return [replace(one, scheduling=self.nodes[one.node]) for one in self.here.values()]

    def round(self) -> None:
        """Execute a plan; no attempt is made twice, and no live instance is stopped without need."""
        before = self.serving()
        made = plan(DesiredState("ocr", "3", self.target), self.present(), {}, NONE, True, 0)
        used = {one.made_by for one in self.here.values()}
        assert not used.intersection(create.request_id for create in made.creates)
        for stop in made.stops:
            self.add(replace(self.here[stop.uid], state=STOPPING))
        if Scheduling.EMPTIED not in self.nodes.values():
            assert self.serving() >= min(before, self.target)
        room = [name for name, scheduling in self.nodes.items() if scheduling is Scheduling.NORMAL]
        for create in made.creates:
            if room:
                self.add(ObservedInstance(f"i{next(self.numbers)}", self.rng.choice(room), create.request_id, STARTING))

    def pass_time(self) -> None:
        """Instances come up or fail, end their drain, freeze, wake and get requests."""
        for uid, one in list(self.here.items()):
            if one.state is STOPPING:
                if self.rng.random() < 0.5:
                    del self.here[uid]
            elif one.state is STARTING:
                self.add(replace(one, state=self.rng.choice([STARTING, RUNNING])))
            else:
                requests = self.rng.choice([0, 0, 1, 2])
                state = RUNNING if requests else self.rng.choice([RUNNING, FROZEN])
                self.add(replace(one, state=state, requests=requests, idle_ns=self.rng.randint(0, 5)))

    def disturb(self) -> None:
        """Change scheduling and target."""
        self.target = self.rng.randint(0, 4)
        self.nodes[self.rng.choice(list(self.nodes))] = self.rng.choice(list(Scheduling))


@pytest.mark.parametrize("seed", range(60))
def test_from_anywhere_it_ends_with_exactly_the_target(seed: int) -> None:
    walk = Walk(seed)
    for step in range(60):
        if walk.rng.random() < 0.2 and step < 30:
            walk.disturb()
        walk.round()
        walk.pass_time()
    if Scheduling.NORMAL not in walk.nodes.values():
        return  # nothing could be replaced; `round` checks that no instance was cut
    for _ in range(60):
        walk.round()
        walk.pass_time()
    assert len(walk.here) == walk.target
    assert {one.made_by.revision for one in walk.here.values()} <= {"3"}
    assert not any(walk.nodes[one.node].drains for one in walk.here.values())


def test_a_revision_that_never_comes_up_costs_one_old_instance() -> None:
    old = [have(0), have(1)]
    assert yielding(settled(2, old, "2")) == ["r1-1-1", "r1-0-1"]
    under_way = plan(DesiredState("ocr", "2", 2), old[:1], {}, frozenset({0}), True, 0)
    starting = settled(2, [*old[:1], have(0, "2", STARTING)], "2")
    assert (yielding(under_way), yielding(starting)) == ([], [])
    assert yielding(settled(2, [*old[:1], have(0, "2")], "2")) == ["r1-0-1"]


def test_an_update_on_one_gpu_stops_first_and_on_two_creates_first() -> None:
    """A switch of the idle mode is a revision; free GPUs decide the order."""
    alone = settled(1, [have(0)], "2")
    assert (created(alone), stopped(alone), yielding(alone)) == (["ocr/2/0/1"], [], ["r1-0-1"])
    gone = settled(1, [have(0, state=STOPPING)], "2")
    assert (created(gone), yielding(gone)) == (["ocr/2/0/1"], [])
    both = settled(1, [have(0), have(0, "2", STARTING)], "2")
    assert (created(both), stopped(both)) == ([], [])
    assert stopped(settled(1, [have(0), have(0, "2")], "2")) == ["r1-0-1"]

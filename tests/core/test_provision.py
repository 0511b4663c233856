"""From the instances wanted to the instances there are."""

from __future__ import annotations

import random

from agent.core.provision import (
    MAX_ATTEMPTS,
    Present,
    RequestId,
    Tries,
    Wanted,
    came_up,
    failed,
    parse_request_id,
    plan,
)
from agent.core.types import SECOND_NS, InstanceState

RUNNING, STARTING = InstanceState.RUNNING, InstanceState.STARTING
NONE: frozenset[int] = frozenset()


def have(ordinal: int, revision: str = "1", state: InstanceState = RUNNING, attempt: int = 1, **more: bool) -> Present:
    uid = f"r{revision}-{ordinal}-{attempt}"
    return Present(uid, "n1", RequestId("ocr", revision, ordinal, attempt), state, **more)


def test_missing_ordinals_are_created_and_those_under_way_are_not() -> None:
    made = plan(Wanted("ocr", "1", 3), [have(1)], {}, frozenset({2}), True, 0)
    assert [str(create.request_id) for create in made.creates] == ["ocr/1/0/1"]
    assert made.stops == ()


def test_nothing_is_created_before_every_node_was_heard() -> None:
    assert plan(Wanted("ocr", "1", 3), [], {}, NONE, False, 0).creates == ()


def test_scale_in_drains_the_highest_ordinals() -> None:
    made = plan(Wanted("ocr", "1", 1), [have(0), have(1), have(2)], {}, NONE, True, 0)
    assert {stop.uid for stop in made.stops} == {"r1-1-1", "r1-2-1"}


def test_an_old_revision_goes_only_as_the_new_one_comes_up() -> None:
    old = [have(0), have(1)]
    start = plan(Wanted("ocr", "2", 2), old, {}, NONE, True, 0)
    assert [create.request_id.ordinal for create in start.creates] == [0, 1]
    assert start.stops == ()
    assert start.makes_room is not None  # where no GPU is left one of the old ones may go first
    half = plan(Wanted("ocr", "2", 2), [*old, have(0, "2"), have(1, "2", STARTING)], {}, NONE, True, 0)
    assert len(half.stops) == 1
    done = plan(Wanted("ocr", "2", 2), [*old, have(0, "2"), have(1, "2")], {}, NONE, True, 0)
    assert {stop.uid for stop in done.stops} == {"r1-0-1", "r1-1-1"}


def test_attempts_back_off_and_end() -> None:
    tries, now, waits = Tries(), 0, []
    while not tries.given_up:
        made = plan(Wanted("ocr", "1", 1), [], {0: tries}, NONE, True, now)
        if not made.creates:
            assert made.again_at_ns is not None
            waits.append((made.again_at_ns - now) // SECOND_NS)
            now = made.again_at_ns
            continue
        tries = failed(tries, made.creates[0].request_id.attempt, now)
    assert tries.attempt == MAX_ATTEMPTS
    assert waits == [1, 2, 4, 8]
    assert plan(Wanted("ocr", "1", 1), [], {0: tries}, NONE, True, now + 10**12).creates == ()


def test_an_instance_that_came_up_is_replaced_at_once_when_it_fails_later() -> None:
    tries = came_up(failed(failed(Tries(), 1, 0), 2, 0), 3)
    assert tries == Tries(3)
    again = failed(tries, 3, 0)
    made = plan(Wanted("ocr", "1", 1), [], {0: again}, NONE, True, SECOND_NS)
    assert str(made.creates[0].request_id) == "ocr/1/0/4"


def test_the_end_of_an_older_attempt_says_nothing_about_the_newer() -> None:
    assert failed(Tries(3), 2, 0) == Tries(3)


def test_a_lost_node_is_replaced_and_the_duplicate_goes_when_it_comes_back() -> None:
    lost = have(0, counted_out=True)
    made = plan(Wanted("ocr", "1", 1), [lost], {}, NONE, True, 0)
    assert str(made.creates[0].request_id) == "ocr/1/0/2"
    assert made.stops == ()
    back = plan(Wanted("ocr", "1", 1), [have(0), have(0, attempt=2)], {}, NONE, True, 0)
    assert [stop.uid for stop in back.stops] == ["r1-0-2"]


def test_deleting_drains_all() -> None:
    assert len(plan(Wanted("ocr", "1", 0), [have(0), have(1, "0")], {}, NONE, True, 0).stops) == 2


def test_request_ids_survive_the_wire() -> None:
    one = RequestId("ocr", "7", 2, 1)
    assert parse_request_id(str(one)) == one
    assert parse_request_id("by-hand") is None
    assert parse_request_id("ocr/1/x/1") is None


def test_from_anywhere_it_ends_with_exactly_the_target() -> None:
    for seed in range(40):
        rng = random.Random(seed)
        target = rng.randint(0, 4)
        wanted = Wanted("ocr", "3", target)
        here = {
            one.uid: one
            for one in (
                have(rng.randint(0, 5), str(rng.randint(1, 3)), attempt=n + 1) for n in range(rng.randint(0, 9))
            )
        }
        fewest = min(target, len(here))
        for _ in range(20):
            made = plan(wanted, here.values(), {}, NONE, True, 0)
            for stop in made.stops:
                del here[stop.uid]
            for create in made.creates:
                one = Present(f"new-{create.request_id}", "n1", create.request_id, RUNNING)
                here[one.uid] = one
            assert len(here) >= fewest
        assert sorted(one.made_by.ordinal for one in here.values()) == list(range(target))
        assert {one.made_by.revision for one in here.values()} <= {"3"}


def test_a_new_revision_that_does_not_come_up_costs_one_old_instance_not_all() -> None:
    old = [have(0), have(1)]
    first = plan(Wanted("ocr", "2", 2), old, {}, NONE, True, 0)
    assert first.makes_room is not None
    under_way = plan(Wanted("ocr", "2", 2), old[:1], {}, frozenset({0}), True, 0)
    starting = plan(Wanted("ocr", "2", 2), [*old[:1], have(0, "2", STARTING)], {}, NONE, True, 0)
    assert (under_way.makes_room, starting.makes_room) == (None, None)
    up = plan(Wanted("ocr", "2", 2), [*old[:1], have(0, "2")], {}, NONE, True, 0)
    assert up.makes_room is not None

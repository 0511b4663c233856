"""Target tracking and schedules give exactly the numbers of Function Compute's formulas."""

from __future__ import annotations

import random
from datetime import UTC
from fractions import Fraction

import pytest

from agent.core.provisioning.autoscaling import (
    Action,
    ActiveWindow,
    Decision,
    Fired,
    Metric,
    Patience,
    ScalingPolicy,
    Tracking,
    Unreadable,
    begin,
    decide,
    last_fired,
    observe,
    scheduled,
)
from agent.core.provisioning.schedule import parse_schedule, parse_time
from agent.core.types import SECOND_NS

AT_ONCE = Patience(periods=1, factor=Fraction(1, 2))
PATIENT = Patience(periods=3, factor=Fraction(1, 2))
ALWAYS = ActiveWindow(0, 1 << 62)


def policy(metric_target: str = "0.3", min_capacity: int = 1, max_capacity: int = 30) -> ScalingPolicy:
    return ScalingPolicy("p", ALWAYS, Metric.CONCURRENCY, Fraction(metric_target), min_capacity, max_capacity)


@pytest.mark.parametrize(
    ("current", "metric", "metric_target", "max_capacity", "target"),
    [
        (2, "1", "0.3", 30, 7),  # 6.67
        (3, "0.9", "0.3", 30, 9),  # in floating point 9.000000000000002, and so 10
        (7, "0.6", "0.1", 100, 42),
        (1, "0.31", "0.3", 30, 2),
        (10, "1", "0.3", 30, 30),  # 33.3, but for the maximum
        (0, "1", "0.5", 30, 1),  # never below the minimum
    ],
)
def test_out_is_current_times_metric_over_goal_rounded_up(
    current: int, metric: str, metric_target: str, max_capacity: int, target: int
) -> None:
    assert observe(
        policy(metric_target, max_capacity=max_capacity), Tracking(1), Fraction(metric), current, AT_ONCE
    ) == Tracking(target)


@pytest.mark.parametrize(
    ("current", "metric", "factor", "min_capacity", "target"),
    [
        (10, "0", "1/2", 1, 5),
        (10, "0.15", "1/2", 1, 8),  # 2.5 too many
        (10, "0.15", "1", 1, 5),
        (10, "0.29", "1", 1, 10),  # a third of one too many
        (3, "0.2", "1/2", 1, 3),
        (3, "0", "1/2", 2, 2),
        (10, "0", "1", 4, 4),
        (10, "0.2", "0.3", 1, 9),  # exactly 1
    ],
)
def test_in_takes_a_share_of_what_is_too_much_rounded_down(
    current: int, metric: str, factor: str, min_capacity: int, target: int
) -> None:
    patience = Patience(periods=1, factor=Fraction(factor))
    found = observe(policy(min_capacity=min_capacity), Tracking(current), Fraction(metric), current, patience)
    assert found == Tracking(target)


@pytest.mark.parametrize(
    ("current", "average", "metric", "tracked", "target"),
    [
        (20, "10", "0.6", 10, 12),  # an update doubled them as the period ended
        (20, "35/3", "18/35", 10, 12),  # ten seconds before: the same six are busy
        (10, "10", "0.6", 10, 12),
        (10, "20", "0.6", 10, 12),  # the old ones have just gone
        (20, "10", "0", 20, 15),  # half of ten: what has only just come was not idle
        (10, "10", "0", 10, 5),
    ],
)
def test_a_period_s_sample_is_of_the_instances_there_were_in_it(
    current: int, average: str, metric: str, tracked: int, target: int
) -> None:
    half = policy("0.5", max_capacity=100)
    found = observe(half, Tracking(tracked), Fraction(metric), current, AT_ONCE, Fraction(average))
    assert found == Tracking(target)


@pytest.mark.parametrize(
    ("samples", "targets"),
    [
        (["1", "1", "1"], [2, 2, 7]),
        (["1", "1", "0.6"], [2, 2, 4]),  # the newest counts
        (["1", "1", None, "1", "1", "1"], [2, 2, 2, 2, 2, 7]),  # no sample breaks the row
        (["1", "1", "0.3", "1", "1"], [2, 2, 2, 2, 2]),  # neither above nor below
        (["1", "1", "0", "1", "1"], [2, 2, 2, 2, 2]),
        (["0", "0", "0"], [2, 2, 1]),
        (["0", "0", None, "0"], [2, 2, 2, 2]),  # no sample is not zero
        ([None, None, None, None], [2, 2, 2, 2]),
        (["1", "1", "1", "1", "1"], [2, 2, 7, 7, 7]),  # a decision starts a new row
    ],
)
def test_the_threshold_must_hold_three_times_in_a_row(samples: list[str | None], targets: list[int]) -> None:
    tracking, found = begin(policy(), 2), []
    for sample in samples:
        value = None if sample is None else Fraction(sample)
        tracking = observe(policy(), tracking, value, 2, PATIENT)
        found.append(tracking.target)
    assert found == targets


def test_a_decision_out_never_lowers_and_one_in_never_raises() -> None:
    on_their_way = Tracking(8)
    assert observe(policy(), on_their_way, Fraction(1), 2, AT_ONCE).target == 8, "six of the eight are still starting"
    others_want_more = Tracking(2)
    assert observe(policy(), others_want_more, Fraction("0.2"), 20, AT_ONCE).target == 2


@pytest.mark.parametrize(("current", "target"), [(0, 2), (1, 2), (3, 3), (9, 5)])
def test_a_policy_begins_with_the_current_instances_within_its_bounds(current: int, target: int) -> None:
    assert begin(policy(min_capacity=2, max_capacity=5), current) == Tracking(target)


@pytest.mark.parametrize("seed", range(20))
def test_a_walk_stays_within_the_bounds_and_scales_only_after_a_whole_row(seed: int) -> None:
    chance = random.Random(seed)
    min_capacity = chance.randint(1, 5)
    one = policy(f"0.{chance.randint(1, 9)}", min_capacity, min_capacity + chance.randint(0, 20))
    current = chance.randint(0, 30)
    tracking = begin(one, current)
    row: list[Fraction | None] = []
    for _ in range(300):
        sample = None if chance.random() < 0.1 else Fraction(chance.randint(0, 20), 20)
        before, tracking = tracking, observe(one, tracking, sample, current, PATIENT)
        row.append(sample)
        assert one.min_capacity <= tracking.target <= one.max_capacity
        if tracking.target != before.target:
            newest = row[-PATIENT.periods :]
            assert len(newest) == PATIENT.periods
            known = [value for value in newest if value is not None]
            assert len(known) == PATIENT.periods, "moved while a sample was missing"
            up = tracking.target > before.target
            assert all(value > one.metric_target if up else value < one.metric_target for value in known)
            row.clear()
        current += chance.choice([-1, 0, 1]) if tracking.target == current else (1 if tracking.target > current else -1)
        current = max(0, current)


def action(name: str, expression: str, target: int, start: str = "00:00:00", end: str = "23:00:00") -> Action:
    window = ActiveWindow(parse_time(f"2026-07-01T{start}", UTC), parse_time(f"2026-07-01T{end}", UTC))
    return Action(name, window, parse_schedule(expression, UTC), target)


def deciding(actions: list[Action], at: str) -> str:
    wall = parse_time(f"2026-07-01T{at}", UTC)
    fired = scheduled([one for each in actions if (one := last_fired(each, wall))], wall)
    return "" if fired is None else fired.name


@pytest.mark.parametrize(
    ("at", "name"),
    [
        ("07:59:59.999999999", ""),
        ("08:00:00", "morning"),
        ("11:59:59", "morning"),
        ("12:00:00", "noon"),
        ("12:59:59.999999999", "noon"),
        ("13:00:00", ""),  # noon's window has ended, and morning had been taken over from
        ("17:00:00", "evening"),
        ("22:59:59", "evening"),
        ("23:00:00", ""),
    ],
)
def test_the_last_fired_action_decides_until_its_window_ends(at: str, name: str) -> None:
    actions = [
        action("morning", "cron(0 0 8 * * *)", 4),
        action("noon", "at(2026-07-01T12:00:00)", 9, end="13:00:00"),
        action("evening", "cron(0 0 17 * * *)", 2),
    ]
    assert deciding(actions, at) == name


def test_of_two_that_fire_at_once_the_later_in_the_list_decides() -> None:
    both = [action("a", "cron(0 0 8 * * *)", 4), action("b", "cron(0 0 8 * * *)", 2)]
    assert deciding(both, "09:00:00") == "b"


FIRED = Fired("night", 3, 0, ALWAYS)


@pytest.mark.parametrize(
    ("default", "schedule", "policies", "decision"),
    [
        (5, None, [], Decision(5)),
        (5, FIRED, [], Decision(3, "night")),  # lower than the default, and still what counts
        (5, None, [("p", 2)], Decision(2, "p")),
        (5, FIRED, [("p", 2)], Decision(3, "night")),
        (5, FIRED, [("p", 3), ("q", 4)], Decision(4, "q")),
        (5, FIRED, [("p", 3)], Decision(3, "night")),
    ],
)
def test_the_highest_active_one_overrides_the_default_target(
    default: int, schedule: Fired | None, policies: list[tuple[str, int]], decision: Decision
) -> None:
    assert decide(default, schedule, policies) == decision


def test_a_window_holds_its_start_and_not_its_end() -> None:
    window = ActiveWindow(SECOND_NS, 2 * SECOND_NS)
    assert [window.contains(at) for at in (SECOND_NS - 1, SECOND_NS, 2 * SECOND_NS - 1, 2 * SECOND_NS)] == [
        False,
        True,
        True,
        False,
    ]


WEST = Unreadable("west", ActiveWindow(0, 100), 4, "its zone is gone")


@pytest.mark.parametrize(
    ("schedule", "policies", "last", "wanted"),
    [
        (None, [], 6, Decision(6, "west")),  # alone: the last target stays, also if it was the default's
        (None, [], 2, Decision(2, "west")),
        (Fired("night", 1, 5, WEST.window), [], 6, Decision(4, "west")),  # no more than it can ask for
        (Fired("night", 1, 5, WEST.window), [], 2, Decision(2, "west")),  # and no more than there was
        (Fired("day", 8, 5, WEST.window), [], 6, Decision(8, "day")),
        (Fired("day", 4, 5, WEST.window), [], 6, Decision(4, "day")),
        (None, [("load", 1)], 3, Decision(3, "west")),
        (Fired("night", 1, 5, WEST.window), [("load", 9)], 3, Decision(9, "load")),
    ],
)
def test_what_cannot_be_read_counts_with_the_last_target(
    schedule: Fired | None, policies: list[tuple[str, int]], last: int, wanted: Decision
) -> None:
    assert decide(1, schedule, policies, [WEST], last) == wanted

"""Schedules around every change of clocks in the time zone database: intervals in real time, fixed times once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.core.provisioning.autoscaling import Action, ActiveWindow, last_fired, scheduled
from agent.core.provisioning.schedule import Schedule, parse_schedule, parse_time
from agent.core.types import SECOND_NS
from tests.core.provisioning.zone_changes import changes, zone_names

FAR = 1 << 62
DAY_S = 86_400
AROUND_S = 30 * 3600
BERLIN = ZoneInfo("Europe/Berlin")
# In Berlin on 2026-10-25 it is two o'clock at 00:00Z and again at 01:00Z; on 2026-03-29 01:00Z is three o'clock.

INTERVALS = (
    *("cron(0 0 * * * *)", "cron(0 */20 * * * *)", "cron(0 30 0/2 * * *)", "cron(0 * 1 * * *)", "cron(0 5 */3 * * *)"),
    *("cron(0 15/30 0,2 * * *)", "cron(0 45 * * * SUN)", "cron(0 0 * 1 * ?)"),
)
FIXED = (
    *("cron(0 0 0 * * *)", "cron(0 30 2 * * *)", "cron(0 0,15,30,45 0-3 * * *)", "cron(0 59 23 * * *)"),
    *("cron(0 1 1,2 ? * MON-SUN)", "cron(0 0 12 30 * ?)"),
)


def test_clocks_change_by_a_day_at_most_and_never_twice_within_three_days() -> None:
    """What `Schedule` relies on when it looks for a change between two times."""
    for zone in zone_names():
        found = changes(zone)
        assert all(abs(new - old) <= DAY_S for _, old, new in found), zone
        assert all(later - sooner > 3 * DAY_S for (sooner, _, _), (later, _, _) in pairwise(found)), zone


@st.composite
def _changes(draw: st.DrawFn) -> tuple[str, int]:
    """A zone, and the second of one of its changes; in UTC, which has none, any second."""
    zone = draw(st.sampled_from(zone_names()))
    found = [second for second, _, _ in changes(zone) if second > -1_500_000_000]
    return zone, draw(st.sampled_from(found)) if found else 1_000_000_000


@settings(deadline=None, max_examples=100)
@given(_changes(), st.sampled_from(INTERVALS + FIXED))
@example(("Australia/Lord_Howe", 1_775_314_800), "cron(0 0 * * * *)")  # back by half an hour
@example(("Australia/Lord_Howe", 1_775_314_800), "cron(0 45 1 * * *)")
@example(("Australia/Lord_Howe", 1_791_041_400), "cron(0 */20 * * * *)")
@example(("Europe/Dublin", 1_792_890_000), "cron(0 30 0/2 * * *)")  # winter time is the one that "saves daylight"
@example(("Asia/Beirut", 1_774_735_200), "cron(0 0 0 * * *)")  # midnight is skipped
@example(("America/Asuncion", 1_711_249_200), "cron(0 30 23 * * *)")
@example(("Pacific/Apia", 1_325_239_200), "cron(0 0 12 30 * ?)")  # 2011-12-30 is skipped
@example(("Pacific/Apia", 1_325_239_200), "cron(0 5 */3 * * *)")
def test_firings_around_a_change_are_those_the_rules_give(change: tuple[str, int], expression: str) -> None:
    """Both by `next` and by `last`; the rules are applied here minute by minute."""
    name, second = change
    zone = ZoneInfo(name)
    schedule = parse_schedule(expression, zone)
    first, end = second - AROUND_S, second + AROUND_S
    wanted = _by_the_rules(schedule, expression in INTERVALS, zone, first, end)
    forwards, backwards = [], []
    at: int | None = first * SECOND_NS - 1
    while at is not None and (at := schedule.next(at, end * SECOND_NS)) is not None:
        forwards.append(at // SECOND_NS)
    at = end * SECOND_NS - 1
    while at is not None and (at := schedule.last(first * SECOND_NS, at)) is not None:
        backwards.append(at // SECOND_NS)
        at -= 1
    assert forwards == wanted
    assert backwards[::-1] == wanted


def _by_the_rules(schedule: Schedule, interval: bool, zone: tzinfo, first: int, end: int) -> list[int]:
    """The firings in [first, end): each second at which the clock shows one if it is an interval, else the first such
    second, or that at which the clock jumps over it."""
    times = _times(schedule, first - 3 * DAY_S, end + 3 * DAY_S)
    shown: set[datetime] = set()
    found: set[int] = set()
    start = first - DAY_S
    before = _clock(start - 1, zone)
    for second in _whole_minutes(start, end, zone):
        clock = _clock(second, zone)
        for one in [clock] if interval or clock <= before else _minutes(before, clock):
            if (interval or one not in shown) and one in times:
                found.add(second)
            shown.add(one)
        before = clock
    return sorted(second for second in found if second >= first)


def _whole_minutes(start: int, end: int, zone: tzinfo) -> list[int]:
    """The seconds at which the clock shows whole minutes, before and after a change in the middle, and the change."""
    middle = (start + DAY_S + end) // 2
    offsets = {_offset_s(start, zone), _offset_s(end, zone)}
    return sorted({middle} | {at for one in offsets for at in range(start + (-start - one) % 60, end, 60)})


def _minutes(before: datetime, clock: datetime) -> list[datetime]:
    """The whole minutes in (before, clock]."""
    one = before.replace(second=0) + timedelta(minutes=1)
    found = []
    while one <= clock:
        found.append(one)
        one += timedelta(minutes=1)
    return found


def _clock(second: int, zone: tzinfo) -> datetime:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=second)).astimezone(zone).replace(tzinfo=None, fold=0)


def _offset_s(second: int, zone: tzinfo) -> int:
    return int((_clock(second, zone) - datetime(1970, 1, 1)).total_seconds()) - second  # noqa: DTZ001 -- as `_clock`


def _times(schedule: Schedule, first: int, end: int) -> set[datetime]:
    """The times of the fields alone, on a clock that never changes."""
    as_utc, at, found = Schedule(UTC, schedule.fields), first * SECOND_NS, set()
    while (fires := as_utc.next(at, end * SECOND_NS)) is not None:
        at = fires
        found.add(_clock(at // SECOND_NS, UTC))
    return found


@pytest.mark.parametrize(
    ("expression", "fires"),
    [
        ("cron(0 0 * * * *)", ["00:00", "01:00", "02:00"]),
        ("cron(0 0 */2 * * *)", ["00:00", "01:00"]),  # as Debian's cron: at two o'clock, both times
        ("cron(0 0 0/2 * * *)", ["00:00", "01:00"]),
        ("cron(0 0/30 2 * * *)", ["00:00", "00:30", "01:00", "01:30"]),
        ("cron(0 0,30 2 * * *)", ["00:00", "00:30"]),
        ("cron(0 0 0-23 * * *)", ["00:00", "02:00"]),  # 24 fixed hours
        ("cron(*/20 0 2 * * *)", ["00:00:00", "00:00:20", "00:00:40"]),  # the second decides nothing
        ("at(2026-10-25T02:30:00)", ["00:30"]),
    ],
)
def test_what_counts_as_an_interval(expression: str, fires: list[str]) -> None:
    """Berlin, 2026-10-25, from 00:00Z to 02:00Z."""
    schedule, found = parse_schedule(expression, BERLIN), []
    at: int | None = _utc("2026-10-24T23:59:59")
    while at is not None and (at := schedule.next(at, _utc("2026-10-25T02:00:01"))) is not None:
        found.append(datetime.fromtimestamp(at // SECOND_NS, UTC).strftime("%H:%M:%S").removesuffix(":00"))
    assert found == [one.removesuffix(":00") if one.count(":") == 2 else one for one in fires]


def test_of_two_hourly_actions_the_right_one_counts_in_the_second_pass() -> None:
    window = ActiveWindow(0, FAR)
    up = Action("up", window, parse_schedule("cron(0 0 * * * *)", BERLIN), 3)
    down = Action("down", window, parse_schedule("cron(0 20 * * * *)", BERLIN), 1)
    for clock, wanted in (("00:10", "up"), ("00:30", "down"), ("01:10", "up"), ("01:30", "down"), ("02:10", "up")):
        at = _utc(f"2026-10-25T{clock}:00")
        newest = scheduled([fired for one in (up, down) if (fired := last_fired(one, at)) is not None], at)
        assert newest is not None
        assert newest.name == wanted, clock


def _utc(text: str) -> int:
    return parse_time(text + "Z", UTC)

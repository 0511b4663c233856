"""Schedules fire by the zone's wall clock, also when it changes."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from agent.core.provisioning.schedule import BadSchedule, parse_schedule, parse_time
from agent.core.types import SECOND_NS

FAR = 1 << 62
SHANGHAI, NEW_YORK, CAIRO = ZoneInfo("Asia/Shanghai"), ZoneInfo("America/New_York"), ZoneInfo("Africa/Cairo")
# New York 2026: 02:00 EST becomes 03:00 EDT on March 8 (07:00Z), 02:00 EDT becomes 01:00 EST on November 1 (06:00Z).


def utc(text: str) -> int:
    return parse_time(text + "Z", UTC)


def shown(at_ns: int | None) -> str:
    return "" if at_ns is None else datetime.fromtimestamp(at_ns // SECOND_NS, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@pytest.mark.parametrize(
    ("zone", "expression", "now", "last", "following"),
    [
        ("", "cron(0 0 8 * * *)", "2026-07-01T12:00:00", "2026-07-01T08:00:00", "2026-07-02T08:00:00"),
        ("", "cron(0 0 8 * * *)", "2026-07-01T08:00:00", "2026-07-01T08:00:00", "2026-07-02T08:00:00"),
        ("Asia/Shanghai", "cron(0 0 8 * * *)", "2026-07-01T12:00:00", "2026-07-01T00:00:00", "2026-07-02T00:00:00"),
        # July 1, 2026 is a Wednesday.
        ("", "cron(0 30 9 ? * MON-FRI)", "2026-07-05T00:00:00", "2026-07-03T09:30:00", "2026-07-06T09:30:00"),
        ("", "cron(0 30 9 ? * 7)", "2026-07-06T00:00:00", "2026-07-05T09:30:00", "2026-07-12T09:30:00"),
        ("", "cron(0 30 9 ? * SUN)", "2026-07-06T00:00:00", "2026-07-05T09:30:00", "2026-07-12T09:30:00"),
        ("", "cron(0 30 9 ? * 1)", "2026-07-06T12:00:00", "2026-07-06T09:30:00", "2026-07-13T09:30:00"),
        ("", "cron(0 0 0 ? * FRI-SUN)", "2026-07-06T12:00:00", "2026-07-05T00:00:00", "2026-07-10T00:00:00"),
        ("", "cron(0 0 0 ? * */3)", "2026-07-03T12:00:00", "2026-07-02T00:00:00", "2026-07-05T00:00:00"),
        ("", "cron(0 0 0 1 JAN,jul ?)", "2026-12-31T00:00:00", "2026-07-01T00:00:00", "2027-01-01T00:00:00"),
        ("", "cron(0 0/20 * * * *)", "2026-07-01T12:25:00", "2026-07-01T12:20:00", "2026-07-01T12:40:00"),
        ("", "cron(10-30/10,45 * * * * *)", "2026-07-01T12:00:31", "2026-07-01T12:00:30", "2026-07-01T12:00:45"),
        ("", "cron(0 0 0 29 2 ?)", "2026-07-01T00:00:00", "2024-02-29T00:00:00", "2028-02-29T00:00:00"),
        ("", "cron(0 0 0 1 * 5)", "2026-07-02T00:00:00", "2026-07-01T00:00:00", "2026-07-03T00:00:00"),  # either
        ("", "at(2026-07-01T08:00:00)", "2026-07-01T07:59:59", "", "2026-07-01T08:00:00"),
        ("", "at(2026-07-01T08:00:00)", "2026-07-01T08:00:00", "2026-07-01T08:00:00", ""),
        ("Asia/Shanghai", "at(2026-07-01T08:00:00)", "2026-07-01T00:00:00", "2026-07-01T00:00:00", ""),
        # The skipped hour fires when it would have begun.
        ("America/New_York", "cron(0 30 2 * * *)", "2026-03-08T06:59:59", "2026-03-07T07:30:00", "2026-03-08T07:00:00"),
        ("America/New_York", "cron(0 30 2 * * *)", "2026-03-08T07:00:00", "2026-03-08T07:00:00", "2026-03-09T06:30:00"),
        ("America/New_York", "at(2026-03-08T02:30:00)", "2026-03-08T08:00:00", "2026-03-08T07:00:00", ""),
        # The repeated hour fires the first time.
        ("America/New_York", "cron(0 30 1 * * *)", "2026-11-01T05:30:00", "2026-11-01T05:30:00", "2026-11-02T06:30:00"),
        ("America/New_York", "cron(0 30 1 * * *)", "2026-11-01T06:10:00", "2026-11-01T05:30:00", "2026-11-02T06:30:00"),
        ("America/New_York", "cron(0 30 1 * * *)", "2026-11-01T06:30:00", "2026-11-01T05:30:00", "2026-11-02T06:30:00"),
        ("America/New_York", "at(2026-11-01T01:30:00)", "2026-11-01T06:30:00", "2026-11-01T05:30:00", ""),
        # Cairo skips midnight: 00:00 becomes 01:00 on April 24, 2026.
        ("Africa/Cairo", "cron(0 0 0 * * *)", "2026-04-24T12:00:00", "2026-04-23T22:00:00", "2026-04-24T21:00:00"),
    ],
)
def test_what_fired_last_and_what_fires_next(zone: str, expression: str, now: str, last: str, following: str) -> None:
    found = parse_schedule(expression, ZoneInfo(zone) if zone else UTC)
    assert shown(found.last(0, utc(now))) == last
    assert shown(found.next(utc(now), FAR)) == following


@pytest.mark.parametrize("day", ["2026-03-08", "2026-11-01"])
def test_actions_keep_their_order_on_days_when_clocks_change(day: str) -> None:
    """An action that fires after another does so on these days too, or the target would stay wrong for a day."""
    evening = parse_time(f"{day}T20:00:00", NEW_YORK)
    for first, second in (("0 30 1", "0 45 1"), ("0 30 2", "0 0 3"), ("0 59 0", "0 30 2")):
        opened = parse_schedule(f"cron({first} * * *)", NEW_YORK).last(0, evening)
        closed = parse_schedule(f"cron({second} * * *)", NEW_YORK).last(0, evening)
        assert opened is not None
        assert closed is not None
        assert opened <= closed, (first, second)


@pytest.mark.parametrize("zone", [UTC, SHANGHAI, NEW_YORK, CAIRO])
@pytest.mark.parametrize("expression", ["cron(0 30 2 * * *)", "cron(0 0/17 * * * *)", "cron(5 10 0,1 * * 6,7)"])
def test_last_and_next_tell_the_same_story_through_a_year(zone: ZoneInfo, expression: str) -> None:
    """Checks at intervals find firings in order, each between two checks, and exactly those that `next` gave."""
    schedule = parse_schedule(expression, zone)
    for day in ("2026-03-07", "2026-04-23", "2026-10-29", "2026-10-31"):
        at = utc(f"{day}T12:00:00")
        checks = [at + n * 173 * SECOND_NS for n in range(700)]
        seen = [schedule.last(0, check) for check in checks]
        for (before, after), (old, new) in zip(pairwise(checks), pairwise(seen), strict=True):
            assert old is not None
            assert new is not None
            expected = schedule.next(before, FAR)
            assert expected is not None
            if new == old:
                assert expected > after, "next announced what last did not see"
            else:
                assert before < expected <= new <= after


def test_firings_outside_of_the_window_do_not_count() -> None:
    daily = parse_schedule("cron(0 0 8 * * *)", UTC)
    start, end = utc("2026-07-01T09:00:00"), utc("2026-07-02T08:00:00")
    assert daily.last(start, utc("2026-07-01T12:00:00")) is None
    assert daily.next(start, end) is None, "the end is not in the window"
    assert daily.next(start, end + 1) == end


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("", "must be at("),
        ("0 0 8 * * *", "must be at("),
        ("cron(0 0 8 * *)", "six fields"),
        ("cron(0 0 8 * * * 2026)", "six fields"),
        ("cron(60 0 8 * * *)", "wrong second"),
        ("cron(0 60 8 * * *)", "wrong minute"),
        ("cron(0 0 24 * * *)", "wrong hour"),
        ("cron(0 0 8 0 * *)", "wrong day of month"),
        ("cron(0 0 8 32 * *)", "wrong day of month"),
        ("cron(0 0 8 * 13 *)", "wrong month"),
        ("cron(0 0 8 * MAI *)", "wrong month"),
        ("cron(0 0 8 ? * 0)", "wrong day of week"),
        ("cron(0 0 8 ? * 8)", "wrong day of week"),
        ("cron(0 0 8 L * ?)", "wrong day of month"),
        ("cron(0 0 8 ? * 2#1)", "wrong day of week"),
        ("cron(0 0 8 ? * ?)", "both"),
        ("cron(? 0 8 * * *)", "must not have `?` for second"),
        ("cron(*/0 0 8 * * *)", "wrong second"),
        ("cron(1-2-3 0 8 * * *)", "wrong second"),
        ("cron(1,,2 0 8 * * *)", "wrong second"),
        ("cron(30-10 0 8 * * *)", "backwards"),
        ("cron(٣ 0 8 * * *)", "wrong second"),
        ("cron(0 0 8 30 2 ?)", "never fires"),
        ("cron(0 0 8 31 4,6,9,11 *)", "never fires"),
        ("at(2026-02-29T08:00:00)", "time that exists"),
        ("at(2026-07-01 08:00:00)", "must be at("),
        ("cron(" + "0," * 200 + "0 0 0 * * *)", "must be at("),
    ],
)
def test_a_wrong_expression_is_refused_with_the_reason(expression: str, says: str) -> None:
    with pytest.raises(BadSchedule, match=says.replace("(", r"\(").replace("?", r"\?")):
        parse_schedule(expression, UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-07-01T16:00:00.000Z", "2024-07-01T16:00:00"),
        ("2024-07-01T16:00:00Z", "2024-07-01T16:00:00"),
        ("2024-07-01T16:00:00+08:00", "2024-07-01T08:00:00"),
        ("2024-07-01T16:00:00-05:30", "2024-07-01T21:30:00"),
        ("2024-07-01T16:00:00", "2024-07-01T08:00:00"),  # of the zone
        ("2024-07-01T16:00", "2024-07-01T08:00:00"),
        ("9999-12-31T23:59:59-05:00", "+29 h"),
    ],
)
def test_times_are_taken_as_written(text: str, expected: str) -> None:
    found = parse_time(text, SHANGHAI)
    if expected == "+29 h":
        assert found == 253_402_318_799 * SECOND_NS, "beyond what datetime can hold with a zone"
    else:
        assert shown(found) == expected


def test_a_fraction_of_a_second_is_kept_to_the_nanosecond() -> None:
    assert parse_time("1970-01-01T00:00:01.000000001Z", UTC) == SECOND_NS + 1
    assert parse_time("1970-01-01T00:00:01.5Z", UTC) == SECOND_NS * 3 // 2


@pytest.mark.parametrize(
    "text",
    ["", "tomorrow", "2024-07-01", "20240701T160000Z", "2024-13-01T00:00:00Z", "2024-07-01T24:00:00Z",
     "2024-07-01T16:00:00+24:00", "2024-07-01T16:00:00+08", "2024-07-01T16:00:00.Z", "2024-07-01T16:00:00Z ",
     "2024-W27-1T16:00:00Z", "x" * 10_000],
)  # fmt: skip
def test_a_wrong_time_shows_a_right_one(text: str) -> None:
    with pytest.raises(BadSchedule, match="such as 2026-07-01T16:00:00"):
        parse_time(text, UTC)

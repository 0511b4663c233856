#!/usr/bin/env bash
# cronsim misses firings where clocks change by half an hour, and backwards where they change at midnight.
#
# cronsim 2.8, tzdata 2026.6, CPython 3.11.7, Linux 6.18, 2026-11-30. All of 2026; Berlin and New York for comparison.
#
# The script asks cronsim for all firings of the year, forwards and (reverse=True) backwards, and compares them with a
# walk over every minute of the zone's clock. All expressions are intervals (`*` or `*/n` as minute or hour), which
# Debian's cron, cronsim's model, runs whenever the clock shows such a time. Expected: no difference, as in Berlin and
# New York. Seen:
# - Lord Howe changes its clocks by 30 minutes: a job every 3 or 12 hours misses a firing on both days of change.
# - Beirut, Santiago and Cairo set their clocks back from midnight to 23:00. A schedule of that weekday, backwards,
#   leaves out the second pass of that hour: the last firing before Sunday is told as 23:30, an hour too early.
# - Beirut and Santiago jump from midnight to 01:00 in spring. "*/30 0 * * SUN" gives 00:00 of that day, which does not
#   exist; as an instant it is 01:00, an hour in which the schedule has no firing.
#
# Why it matters: a monitor that asks backwards when a job should have run last is wrong by an hour; one firing less on
# one day of the year is hard to find. Give cronsim the wall clock without a zone and find the instants yourself.
#
# Seen:
#     Europe/Berlin       */30 * * * SUN: forwards as the clock; backwards as the clock
#     America/New_York    0 */3 * * *   : forwards as the clock; backwards as the clock
#     Australia/Lord_Howe 0 */3 * * *   : forwards misses Sun 05 Apr 03:00 +1030, Sun 04 Oct 03:00 +1100; backwards as the clock
#     Australia/Lord_Howe 0 */12 * * *  : forwards misses Sun 05 Apr 12:00 +1030, Sun 04 Oct 12:00 +1100; backwards as the clock
#     Asia/Beirut         */30 * * * SAT: forwards as the clock; backwards misses Sat 24 Oct 23:00 +0200, Sat 24 Oct 23:30 +0200
#     America/Santiago    */30 * * * SAT: forwards as the clock; backwards misses Sat 04 Apr 23:00 -0400, Sat 04 Apr 23:30 -0400
#     Africa/Cairo        */30 * * * THU: forwards as the clock; backwards misses Thu 29 Oct 23:00 +0200, Thu 29 Oct 23:30 +0200
#     Asia/Beirut         */30 0 * * SUN: forwards invents Sun 29 Mar 01:00 +0300; backwards as the clock
#     America/Santiago    */30 0 * * SUN: forwards invents Sun 06 Sep 01:00 -0300; backwards as the clock
#     as stated: firings are missed where clocks change by half an hour or at midnight
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q cronsim==2.8 tzdata==2026.6 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
export HOME="$work" PYTHONTZPATH=""
timeout 100 "$work/venv/bin/python" - <<'EOF'
import sys
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim

FIRST, LAST = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
USUAL = [("Europe/Berlin", "*/30 * * * SUN"), ("America/New_York", "0 */3 * * *")]
UNUSUAL = [
    ("Australia/Lord_Howe", "0 */3 * * *"),
    ("Australia/Lord_Howe", "0 */12 * * *"),
    ("Asia/Beirut", "*/30 * * * SAT"),
    ("America/Santiago", "*/30 * * * SAT"),
    ("Africa/Cairo", "*/30 * * * THU"),
    ("Asia/Beirut", "*/30 0 * * SUN"),
    ("America/Santiago", "*/30 0 * * SUN"),
]
WEEKDAYS = "MON TUE WED THU FRI SAT SUN".split()


def values(field, count):
    """The values of `*`, `*/n` or a number."""
    if field[0] == "*":
        return set(range(0, count, int(field[2:] or 1)))
    return {int(field)}


def by_clock(expression, zone):
    """Every minute of the year at which the zone's clock shows a firing."""
    minute, hour, _, _, weekday = expression.split()
    minutes, hours = values(minute, 60), values(hour, 24)
    found, at = set(), FIRST
    while at < LAST:
        wall = at.astimezone(zone)
        if wall.minute in minutes and wall.hour in hours and weekday in ("*", WEEKDAYS[wall.weekday()]):
            found.add(at)
        at += timedelta(minutes=1)
    return found


def by_cronsim(expression, zone, reverse):
    start = LAST if reverse else FIRST - timedelta(seconds=1)
    firings = (one.astimezone(UTC) for one in CronSim(expression, start.astimezone(zone), reverse=reverse))
    return set(takewhile(lambda at: FIRST <= at < LAST, firings))


def difference(found, expected, zone):
    def text(times):
        return ", ".join(f"{at.astimezone(zone):%a %d %b %H:%M %z}" for at in sorted(times))

    missed, invented = expected - found, found - expected
    parts = [f"misses {text(missed)}" if missed else "", f"invents {text(invented)}" if invented else ""]
    return " and ".join(filter(None, parts)) or "as the clock"


def differs(name, expression):
    zone = ZoneInfo(name)
    expected = by_clock(expression, zone)
    ways = [difference(by_cronsim(expression, zone, reverse), expected, zone) for reverse in (False, True)]
    print(f"{name:19} {expression:14}: forwards {ways[0]}; backwards {ways[1]}")
    return ways != ["as the clock"] * 2


if any([differs(*case) for case in USUAL]):
    sys.exit("changed: firings are missed at usual clock changes too")
if not all([differs(*case) for case in UNUSUAL]):
    sys.exit("changed: no firing is missed in one of these cases")
print("as stated: firings are missed where clocks change by half an hour or at midnight")
EOF

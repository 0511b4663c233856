#!/usr/bin/env bash
# cron-converter takes ordinary expressions without complaint and leaves out most of their firings.
#
# cron-converter 2.0.2, cronsim 2.8 (for comparison), tzdata 2026.6, CPython 3.11.7, Linux 6.18, 2026-11-30.
#
# Expected: the same firings from both, or an error. Seen:
# - "5/15" (from 5 on, every 15) as minute counts as "5": 24 firings a day, not 96; the step is dropped silently, and
#   to_string() gives "5 * * * *". The same with "0/15", and with "2/6" as hour.
# - With both day and weekday given, either is enough in cron(8). Here both must hold: "0 0 13 * 5" fires on Fridays
#   that are a 13th, 3 times in 2026 instead of 61.
# - "0 * * * *" in Berlin, although its README asks for a time with a zone "about DST": the second pass of 02:00 on 25
#   October is left out (2 h without a firing). On 29 March 02:00 is given, which does not exist and is the same
#   instant as 03:00, given next: the same hour fires twice.
# By hand on the same day: croniter 7.0.0 agrees with cronsim about 5/15, the days and Berlin, APScheduler 3.11.3 about
# 5/15 and Berlin.
#
# Why it matters: a schedule copied from s.yaml, Quartz or a crontab is accepted, and the instances that it should
# provide are simply not there. Write "5-59/15", split day and weekday into two schedules, and compute in UTC.
#
# Seen:
#     */15 0-12 1-7 * * on one day, an agreement: cron-converter 52, cronsim 52
#     5/15 * * * *   on one day:              cron-converter 24, cronsim 96
#     0 2/6 * * *    on one day:              cron-converter 1, cronsim 4
#     0 0 13 * 5     in 2026:                 cron-converter 3, cronsim 61
#     0 * * * *      25 October, Berlin:      cron-converter 24, cronsim 25
#     0 * * * *      29 March, Berlin:        cron-converter 24, cronsim 23
#     as stated: in each case the firings differ
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q cron-converter==2.0.2 cronsim==2.8 tzdata==2026.6 \
    >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
export HOME="$work" PYTHONTZPATH=""
timeout 60 "$work/venv/bin/python" - <<'EOF'
import sys
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from zoneinfo import ZoneInfo

from cron_converter import Cron
from cronsim import CronSim

BERLIN = ZoneInfo("Europe/Berlin")


def day(month, number, zone=UTC):
    start = datetime(2026, month, number, tzinfo=zone)
    return start, start + timedelta(days=1)  # the same wall clock a day later


CASES = [
    ("5/15 * * * *", "on one day", day(11, 2)),
    ("0 2/6 * * *", "on one day", day(11, 2)),
    ("0 0 13 * 5", "in 2026", (datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC))),
    ("0 * * * *", "25 October, Berlin", day(10, 25, BERLIN)),
    ("0 * * * *", "29 March, Berlin", day(3, 29, BERLIN)),
]


def count(firings, end):
    return sum(1 for _ in takewhile(lambda at: at.astimezone(UTC) < end.astimezone(UTC), firings))


def differs(expression, when, first, end):
    before = (first.astimezone(UTC) - timedelta(minutes=1)).astimezone(first.tzinfo)
    schedule = Cron(expression).schedule(before)
    firings = iter(schedule.next, None)
    found, usual = count(firings, end), count(CronSim(expression, before), end)
    print(f"{expression:14} {when + ':':24} cron-converter {found}, cronsim {usual}")
    return found != usual


first, end = day(11, 2)
if differs("*/15 0-12 1-7 * *", "on one day, an agreement", first, end):
    sys.exit("changed: the two differ in the expression that they should agree about")
if not all([differs(expression, when, *days) for expression, when, days in CASES]):
    sys.exit("changed: in one of these cases the firings are the same")
print("as stated: in each case the firings differ")
EOF

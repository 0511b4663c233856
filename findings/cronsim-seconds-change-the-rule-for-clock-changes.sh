#!/usr/bin/env bash
# cronsim: the same daily time with a seconds field fires not at all, or twice, on the day that clocks change.
#
# cronsim 2.8, tzdata 2026.6, CPython 3.11.7, Linux 6.18, 2026-11-30. Zone Europe/Berlin.
#
# "30 2 * * *" and "0 30 2 * * *" both mean 02:30:00 each day; cronsim's README presents seconds as one more field and
# promises Debian cron's rule for clock changes: a job at a fixed time runs when a skipped hour would have begun, and
# once in a repeated hour. Expected: the same firings. Seen: the rule holds for five fields only. With six, 29 March
# 2026 has no firing, and 25 October 2026 has two, an hour apart. (A comment in its source says that this is meant so.)
#
# Why it matters: Function Compute, Quartz and others write schedules with six fields. A nightly start of instances is
# left out once a year, and a nightly settlement runs twice, with no error and only in zones that change their clocks.
# Give cronsim the wall clock without a zone and find the instant yourself, or drop a seconds field that is 0.
#
# Seen:
#     30 2 * * *    in March:   28 02:30 +0100, 29 03:00 +0200, 30 02:30 +0200
#     0 30 2 * * *  in March:   28 02:30 +0100, 30 02:30 +0200
#     30 2 * * *    in October: 24 02:30 +0200, 25 02:30 +0200, 26 02:30 +0100
#     0 30 2 * * *  in October: 24 02:30 +0200, 25 02:30 +0200, 25 02:30 +0100, 26 02:30 +0100
#     as stated: with seconds a daily time is left out in March and fires twice in October
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q cronsim==2.8 tzdata==2026.6 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
export HOME="$work" PYTHONTZPATH=""
timeout 60 "$work/venv/bin/python" - <<'EOF'
import sys
from datetime import datetime, timedelta
from itertools import takewhile
from zoneinfo import ZoneInfo

from cronsim import CronSim

BERLIN = ZoneInfo("Europe/Berlin")
MARCH, OCTOBER = datetime(2026, 3, 28, tzinfo=BERLIN), datetime(2026, 10, 24, tzinfo=BERLIN)


def firings(expression, start):
    """Those of three days, as text."""
    end = start + timedelta(days=3)  # the same wall clock three days later
    found = [one.strftime("%d %H:%M %z") for one in takewhile(lambda one: one < end, CronSim(expression, start))]
    print(f"{expression:13} in {start:%B}:{' ' * (7 - len(start.strftime('%B')))} {', '.join(found)}")
    return found


march, march_seconds = firings("30 2 * * *", MARCH), firings("0 30 2 * * *", MARCH)
october, october_seconds = firings("30 2 * * *", OCTOBER), firings("0 30 2 * * *", OCTOBER)
if len(march) != 3 or len(october) != 3:
    sys.exit("changed: without seconds it does not fire once a day either")
if len(march_seconds) != 2:
    sys.exit("changed: with seconds the day in March is not left out")
if len(october_seconds) != 4:
    sys.exit("changed: with seconds it does not fire twice in October")
print("as stated: with seconds a daily time is left out in March and fires twice in October")
EOF

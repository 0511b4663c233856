#!/usr/bin/env bash
# aiocron makes up for every time that a freeze skipped: all at once, side by side, at the thaw.
#
# aiocron 2.1, cronsim 2.8, tzlocal 5.4.5, tzdata 2026.6, CPython 3.11.7, Linux 6.18, 2026-11-30. Frozen by SIGSTOP.
#
# A job every 2 s, in a process that is frozen for 20 s. Expected of a cron: the skipped times are gone, or one firing
# makes up for all. Seen: aiocron steps from one planned time to the next, however long ago it was, so the job is
# started 10 times within milliseconds of the thaw; as it does not wait for a job's end, all of them run side by side.
# Nothing tells a job which time it is meant for. Later times are right again.
#
# Why it matters: an hourly job of a process that sleeps over night runs ten times at once in the morning (ten uploads,
# ten evaluations on one GPU), in the moment in which the process is needed. Let the job remember when it last ran, and
# return if that is less than its interval ago.
#
# Seen:
#     starts in 6 s before the freeze: 3
#     starts within 1 s of the thaw after 20 s: 10, side by side: 10
#     starts in the 6 s after that: 3
#     as stated: every missed time is made up for at the thaw
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q aiocron==2.1 cronsim==2.8 tzlocal==5.4.5 tzdata==2026.6 \
    >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
cat >"$work/job.py" <<'EOF'
import asyncio
import time

import aiocron

running = 0


async def job():
    global running
    running += 1
    print(time.monotonic(), running, flush=True)
    await asyncio.sleep(1)
    running -= 1


async def main():
    aiocron.crontab("*/2 * * * * *", func=job, start=True)
    await asyncio.Event().wait()


asyncio.run(main())
EOF
export WORK="$work" HOME="$work" TZ=UTC
"$work/venv/bin/python" - <<'EOF'
import os
import signal
import subprocess
import sys
import time

FROZEN, WATCHED = 20, 6
WORK = os.environ["WORK"]


def give_up(number, frame):
    sys.exit(f"stopped by signal {number}: the time was up or someone ended it")


def starts():
    """(time, how many ran then) for each start of the job."""
    lines = open(f"{WORK}/starts").read().splitlines()
    return [(float(at), int(running)) for at, running in map(str.split, lines)]


def between(first, last):
    return [running for at, running in starts() if first <= at < last]


for number in (signal.SIGALRM, signal.SIGTERM):
    signal.signal(number, give_up)
signal.alarm(90)
job = subprocess.Popen([sys.executable, "job.py"], cwd=WORK, stdout=open(f"{WORK}/starts", "wb"))
try:
    while not starts():
        time.sleep(0.1)
    first = time.monotonic() + 1  # 1 s after a start: 1 s from the next one
    time.sleep(1 + WATCHED)
    job.send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    time.sleep(FROZEN)
    thawed = time.monotonic()
    job.send_signal(signal.SIGCONT)
    time.sleep(1 + WATCHED)
    before, at_once = between(first, frozen), between(thawed, thawed + 0.9)
    after = between(thawed + 0.9, thawed + 0.9 + WATCHED)
finally:
    job.kill()
    job.wait()
print(f"starts in {WATCHED} s before the freeze: {len(before)}")
print(f"starts within 1 s of the thaw after {FROZEN} s: {len(at_once)}, side by side: {max(at_once, default=0)}")
print(f"starts in the {WATCHED} s after that: {len(after)}")
if len(before) != WATCHED / 2:
    sys.exit("changed: the job does not run every 2 s before the freeze")
if len(at_once) < FROZEN / 2 - 1 or max(at_once) < FROZEN / 2 - 1:
    sys.exit("changed: missed times are not made up for one by one")
print("as stated: every missed time is made up for at the thaw")
EOF

#!/usr/bin/env bash
# gunicorn with its default settings kills its idle workers after a few freezes far shorter than its timeout.
#
# gunicorn 27.0.1 (sync worker, default timeout of 30 s), CPython 3.11.7, Linux 6.18, 2026-11-29. Frozen by SIGSTOP.
#
# An idle worker shows that it lives each time its select() of 15 s returns; the master compares that with the
# monotonic clock. select() stands still while frozen (it goes on with the rest of its time), the clock does not. So 9
# s frozen and 2 s awake, over and over, bring the worker 2 s further in 11 s, and at the third freeze the master
# kills every worker for a silence of over 30 s, although no freeze was a third of the timeout.
#
# Why it matters: a limit for ONE freeze does not save the workers (and with them the models) from many short ones.
# Only --timeout 0 does.
#
# Seen:
#     workers at the start: 2
#     after freeze 1 of 9 s: 2 of them left
#     after freeze 2 of 9 s: 2 of them left
#     after freeze 3 of 9 s: 0 of them left
#     WORKER TIMEOUT in the log: 2
#     as stated: every idle worker was killed although no freeze was as long as the timeout
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q gunicorn==27.0.1 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
cat >"$work/app.py" <<'EOF'
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
EOF
export WORK="$work" HOME="$work"
"$work/venv/bin/python" - <<'EOF'
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time

FROZEN, AWAKE, TIMES = 9, 2, 6
WORK = os.environ["WORK"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def family():
    """Every living process below this one, whatever groups and sessions it made."""
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, parent = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(name)] = int(parent)
    found = [os.getpid()]
    for above in found:
        found += [pid for pid, parent in parents.items() if parent == above]
    return found[1:]


def send_all(number):
    for pid in family():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def freeze():
    send_all(signal.SIGSTOP)


def thaw():
    send_all(signal.SIGCONT)


def finish():
    signal.alarm(0)
    send_all(signal.SIGKILL)
    until(lambda: not family(), 10, "processes of the server are left")


def until(true, seconds, otherwise):
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            sys.exit(otherwise)
        time.sleep(0.1)


def give_up(number, frame):
    sys.exit(f"stopped by signal {number}: the time was up or someone ended it")


for number in (signal.SIGALRM, signal.SIGTERM):
    signal.signal(number, give_up)
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: a process that loses its parent stays below this one


def workers():
    return sorted(set(family()) - {server.pid})


signal.alarm(110)
command = [sys.executable, "-m", "gunicorn", "-w", "2", "-b", f"127.0.0.1:{free_port()}", "app:app"]
log = open(f"{WORK}/server.log", "wb")
server = subprocess.Popen(command, cwd=WORK, stdout=log, stderr=log)
try:
    until(lambda: open(f"{WORK}/server.log").read().count("Booting worker") == 2, 30, "the server did not start")
    time.sleep(2)
    first = workers()
    print("workers at the start:", len(first))
    for number in range(1, TIMES + 1):
        freeze()
        time.sleep(FROZEN)
        thaw()
        time.sleep(AWAKE)
        left = len(set(first) & set(workers()))
        print(f"after freeze {number} of {FROZEN} s: {left} of them left")
        if not left:
            break
    print("WORKER TIMEOUT in the log:", open(f"{WORK}/server.log").read().count("WORKER TIMEOUT"))
finally:
    finish()
if left:
    sys.exit("changed: a worker outlives short freezes")
print("as stated: every idle worker was killed although no freeze was as long as the timeout")
EOF

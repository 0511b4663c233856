#!/usr/bin/env bash
# Parsl's HighThroughputExecutor ends all its workers when all of it was frozen for longer than its heartbeats allow.
#
# parsl 2026.10.26, pyzmq 27.3.0, CPython 3.11.7, Linux 6.18, 2026-11-29. Frozen by SIGSTOP to every process of the
# executor (interchange, manager, workers), not to the program that uses it.
#
# Interchange and manager watch each other by heartbeats and the wall clock (threshold 120 s by default, 10 s here by
# the executor's own argument, beat 3 s). Both were frozen for longer, so the other side's last beat is too old the
# moment they wake: the interchange drops the manager and the manager ends itself and its workers, both within 5 ms of
# each other and before any beat arrives. A new block starts from nothing; the next task is answered only after that.
# The workers' state (a model, say) is lost although every process was thawed in order.
#
# Why it matters: the thaw itself succeeds, and the loss comes after it. Freeze such an executor for less than its
# threshold, or set heartbeat_threshold above the longest freeze.
#
# Seen:
#     processes of the executor: 8
#     another worker
#     answer 6.8 s after the thaw; the worker from before the freeze is gone
#     as stated: the worker is gone after the thaw
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q parsl==2026.10.26 pyzmq==27.3.0 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
export WORK="$work" HOME="$work" PATH="$work/venv/bin:$PATH"
"$work/venv/bin/python" - <<'EOF'
import ctypes
import os
import signal
import sys
import time

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

FROZEN = 15
WORK = os.environ["WORK"]


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


def pid():
    import os

    return os.getpid()


signal.alarm(100)
executor = HighThroughputExecutor(
    label="small",
    address="127.0.0.1",
    loopback_address="127.0.0.1",
    max_workers_per_node=1,
    heartbeat_threshold=10,
    heartbeat_period=3,
    provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
)
try:
    parsl.load(Config(executors=[executor], run_dir=f"{WORK}/run"))
    task = parsl.python_app(pid)
    before = task().result(60)
    time.sleep(2)
    print("processes of the executor:", len(family()))
    freeze()
    time.sleep(FROZEN)
    thaw()
    thawed = time.monotonic()
    try:
        after = task().result(60)
    except Exception as error:
        after = error
    took = time.monotonic() - thawed
    time.sleep(1)
    lost = before not in family()
    print("same worker" if after == before else "another worker" if isinstance(after, int) else repr(after))
    print(f"answer {took:.1f} s after the thaw; the worker from before the freeze", "is gone" if lost else "lives")
finally:
    finish()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10)  # an exit by exception may wait for threads of parsl
if not lost:
    sys.exit("changed: the worker outlives the freeze")
print("as stated: the worker is gone after the thaw", flush=True)
os._exit(0)
EOF

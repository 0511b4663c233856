#!/usr/bin/env bash
# After a freeze that falls into a running batch, BentoML answers 503 to concurrent requests although it is idle.
#
# bentoml 1.4.40, numpy 2.4.6, CPython 3.11.7, Linux 6.18, 2026-11-29. Frozen by SIGSTOP to every process of the
# server.
#
# A @bentoml.api(batchable=True) learns how long a batch takes from its last 50 batches, by the wall clock. A batch
# that was running at the freeze counts with the whole freeze: one sample of 30 s makes the estimate longer than
# max_latency_ms (500 here), and from then on the dispatcher cancels requests that wait together with another one:
# three of four concurrent requests get "503" within milliseconds from a server that has nothing else to do. The
# request that was running is answered, and requests one at a time are served, so a health check sees nothing. It ends
# when 50 further batches have pushed the sample out; canceled requests count for nothing, so time alone does not heal
# it. A longer freeze harms a longer max_latency_ms: with 50 samples the freeze needs about 50 times that.
#
# Why it matters: the server survives the freeze and looks healthy, but it refuses load for as long as it gets little.
# Whoever freezes should wait for the requests in hand first; a freeze of the idle server does no harm.
#
# Seen:
#     four at once, before the freeze: [[200, 200, 200, 200], [200, 200, 200, 200], [200, 200, 200, 200]]
#     the request that was running: 200
#     four at once, after it: [[200, 503, 503, 503], [200, 503, 503, 503], [200, 503, 503, 503], [200, 503, 503, 503], [200, 503, 503, 503]]
#     four at once, 5 s later: [200, 503, 503, 503]
#     four at once, 60 batches later: [200, 200, 200, 200]
#     as stated: concurrent requests get 503 after a freeze in a running batch
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q bentoml==1.4.40 numpy==2.4.6 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
cat >"$work/service.py" <<'EOF'
import time

import bentoml


@bentoml.service(workers=1)
class Doubler:
    @bentoml.api(batchable=True, max_batch_size=8, max_latency_ms=500)
    def double(self, seconds: list[float]) -> list[float]:
        time.sleep(max(seconds))
        return [2 * second for second in seconds]
EOF
export WORK="$work" HOME="$work" BENTOML_HOME="$work/home" BENTOML_DO_NOT_TRACK=1
"$work/venv/bin/python" - <<'EOF'
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

FROZEN = 30
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


def ask(seconds=0.1):
    data = json.dumps({"seconds": [seconds]}).encode()
    call = urllib.request.Request(f"{url}/double", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def together(count=4):
    return sorted(future.result() for future in [pool.submit(ask) for _ in range(count)])


def ready():
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


signal.alarm(110)
port = free_port()
url = f"http://127.0.0.1:{port}"
pool = ThreadPoolExecutor(4)
command = [sys.executable, "-m", "bentoml", "serve", "service:Doubler", "--host", "127.0.0.1", "--port", str(port)]
log = open(f"{WORK}/server.log", "wb")
server = subprocess.Popen(command, cwd=WORK, stdout=log, stderr=log)
try:
    until(ready, 60, "the server did not start")
    for _ in range(20):
        ask()
    before = [together() for _ in range(3)]
    print("four at once, before the freeze:", before)
    running = pool.submit(ask, 1.0)
    time.sleep(0.5)
    freeze()
    time.sleep(FROZEN)
    thaw()
    print("the request that was running:", running.result(timeout=20))
    time.sleep(1)
    after = [together() for _ in range(5)]
    print("four at once, after it:", after)
    time.sleep(5)
    later = together()
    print("four at once, 5 s later:", later)
    for _ in range(60):
        ask()
    time.sleep(6)
    ask()
    print("four at once, 60 batches later:", together())
finally:
    finish()
if any(503 in one for one in before):
    sys.exit("changed: 503 even before the freeze")
if not all(503 in one for one in [*after, later]):
    sys.exit("changed: concurrent requests are answered after a freeze in a running batch")
print("as stated: concurrent requests get 503 after a freeze in a running batch")
EOF

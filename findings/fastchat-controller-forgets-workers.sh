#!/usr/bin/env bash
# FastChat's controller forgets every frozen worker at the thaw, before it looks at the request that waits.
#
# fschat 0.2.36, fastapi 0.165.0, uvicorn 0.54.0, CPython 3.11.7, Linux 6.18, 2026-11-29. Frozen by SIGSTOP.
#
# Controller and worker are frozen together. The controller's thread sleeps for its expiration (90 s by default, 15 s
# here, by its own environment variable; the worker's beat in the same proportion), so after a freeze as long as that
# it wakes at the thaw, finds every last beat too old and forgets all workers. A request that waited in the backlog is
# then told that no worker has the model (address ""; once a 500 instead). The worker's own beat, also due at the
# thaw, brings it back within 0.2 s. It is a race that the request can win (one run with the defaults and 95 s did),
# so the script tries three times at most; so far the first try has always been enough.
#
# Why it matters: no process is lost and a check 1 s later is green, but the one request that woke the instance fails.
# Wait until the controller lists the workers again before the request is passed on.
#
# Seen:
#     before the freeze: 'http://127.0.0.1:59227'
#     the request that waited: ''
#     the worker is known again 0.13 s after the thaw
#     as stated: the request that waited is told that no worker has the model
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q fschat==0.2.36 fastapi==0.165.0 uvicorn==0.54.0 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
cat >"$work/worker.py" <<'EOF'
import sys

import fastchat.serve.base_model_worker as base
import uvicorn
from fastchat.conversation import get_conv_template


class Worker(base.BaseModelWorker):
    def make_conv_template(self, conv_template=None, model_path=None):
        return get_conv_template("one_shot")


controller, port = sys.argv[1:]
base.worker = Worker(controller, f"http://127.0.0.1:{port}", "w", "tiny", ["tiny"], 2)
base.worker.init_heart_beat()
uvicorn.run(base.app, host="127.0.0.1", port=int(port))
EOF
export WORK="$work" HOME="$work" LOGDIR="$work"
export FASTCHAT_CONTROLLER_HEART_BEAT_EXPIRATION=15 FASTCHAT_WORKER_HEART_BEAT_INTERVAL=7
"$work/venv/bin/python" - <<'EOF'
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

FROZEN = 18
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


def address():
    """The worker that the controller names for the model: "" if it knows none; or the error."""
    data = json.dumps({"model": "tiny"}).encode()
    try:
        with urllib.request.urlopen(f"{controller}/get_worker_address", data, timeout=FROZEN + 10) as answer:
            return json.load(answer)["address"]
    except OSError as error:
        return str(error)


def listens():
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def start(*arguments):
    log = open(f"{WORK}/server.log", "ab")
    return subprocess.Popen([sys.executable, *arguments], cwd=WORK, stdout=log, stderr=log)


def wake_up():
    """Freeze, ask 1 s before the thaw, and wait until the worker is known again; the answer."""
    freeze()
    time.sleep(FROZEN - 1)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(address()), daemon=True)
    waiting.start()
    time.sleep(1)
    thaw()
    thawed = time.monotonic()
    waiting.join(20)
    print("the request that waited:", *map(repr, answers))
    until(lambda: address() == worker, 60, "changed: the worker did not come back within 60 s")
    print(f"the worker is known again {time.monotonic() - thawed:.2f} s after the thaw")
    return answers == [worker]


signal.alarm(110)
port, worker_port = free_port(), free_port()
controller, worker = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{worker_port}"
servers = []
try:
    servers.append(start("-m", "fastchat.serve.controller", "--host", "127.0.0.1", "--port", str(port)))
    until(listens, 30, "the controller did not start")
    servers.append(start("worker.py", controller, str(worker_port)))
    until(lambda: address() == worker, 30, "the worker did not register")
    print("before the freeze:", repr(address()))
    for _ in range(3):
        time.sleep(2)
        answered = wake_up()
        if not answered:
            break
finally:
    finish()
if answered:
    sys.exit("changed: the controller named the worker to each of three requests that waited")
print("as stated: the request that waited is told that no worker has the model")
EOF

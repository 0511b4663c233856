#!/usr/bin/env bash
# uvicorn closes a kept-alive connection at the thaw although a request already waits in it.
#
# uvicorn 0.54.0 with h11 0.16.0 (default keep-alive of 5 s), CPython 3.11.7, Linux 6.18, 2026-11-29. Frozen by
# SIGSTOP.
#
# A client with an idle kept-alive connection sends its request 1 s into a freeze of 10 s: well before the keep-alive
# time is over. The request lies in the server's socket all the time. At the thaw asyncio runs the keep-alive timer,
# long due, before it looks at the sockets: the connection is closed with the request unread, which the client sees as
# a reset. A request on a new connection during the same freeze is answered.
#
# Why it matters: the request that wakes a server is the one that is lost, and a client may not repeat every request.
# Whoever passes requests on to a frozen server should open a new connection for the one that wakes it, or run uvicorn
# with --timeout-keep-alive above the longest freeze.
#
# Seen:
#     first requests: ['200', '200', '200']
#     sent on kept-alive connections 1 s into the freeze: ['reset', 'reset', 'reset']
#     sent on a new connection while frozen: 200
#     as stated: requests that wait on kept-alive connections are dropped unread, the new connection is answered
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q uvicorn==0.54.0 h11==0.16.0 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
cat >"$work/app.py" <<'EOF'
async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
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

FROZEN, CONNECTIONS = 10, 3
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


def connect():
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def send(connection):
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")


def outcome(connection):
    """The status of the answer, or how the connection ended without one."""
    head = b""
    while not head.endswith(b"ok"):
        try:
            part = connection.recv(4096)
        except ConnectionResetError:
            return "reset"
        if not part:
            return "closed"
        head += part
    return head.split(b" ")[1].decode()


def listens():
    try:
        connect().close()
    except OSError:
        return False
    return True


signal.alarm(90)
port = free_port()
command = [sys.executable, "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(port)]
log = open(f"{WORK}/server.log", "wb")
server = subprocess.Popen(command, cwd=WORK, stdout=log, stderr=log)
try:
    until(listens, 30, "the server did not start")
    kept = [connect() for _ in range(CONNECTIONS)]
    for connection in kept:
        send(connection)
    print("first requests:", [outcome(connection) for connection in kept])
    freeze()
    time.sleep(1)
    for connection in kept:
        send(connection)
    time.sleep(FROZEN - 1)
    fresh = connect()
    send(fresh)
    thaw()
    lost = [outcome(connection) for connection in kept]
    print("sent on kept-alive connections 1 s into the freeze:", lost)
    answered = outcome(fresh)
    print("sent on a new connection while frozen:", answered)
finally:
    finish()
if "200" in lost:
    sys.exit("changed: a request that waits on a kept-alive connection is answered after the thaw")
if answered != "200":
    sys.exit("changed: a request that waits on a new connection is not answered after the thaw")
print("as stated: requests that wait on kept-alive connections are dropped unread, the new connection is answered")
EOF

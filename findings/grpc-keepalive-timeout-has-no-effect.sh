#!/usr/bin/env bash
# gRPC's keepalive_timeout_ms has no effect on a peer that is frozen: the connection ends after 60 s, whatever it says.
#
# grpcio 1.85.3 (client and server), CPython 3.11.7, Linux 6.18, 2026-11-30. Server frozen by SIGSTOP.
#
# Expected: a client with keepalive_time_ms 10000 and keepalive_timeout_ms 5000 pings after 10 s of silence and gives
# the connection up when no answer has come 5 s later, so after 15 s; gRPC's keepalive guide says so. But the ping has a
# time limit of its own, grpc.http2.ping_timeout_ms, 60 s by default and absent from that guide. It is the only one that
# counts: with a keepalive timeout of 5 s, 2 s or 100 s, a call fails 70 s after the last message, "ping timeout". With
# ping_timeout_ms 5000 it fails after 15 s. (The server is frozen 1 s after the last message; the output counts from
# the freeze.)
#
# Why it matters: a call or stream to a peer that hangs, is stopped or is frozen waits more than a minute where 15 s
# were configured; and who configured 100 s of patience with frozen peers has less. Set grpc.http2.ping_timeout_ms too.
# Not tried: a host that is gone, where TCP has timers of its own.
#
# Seen:
#     ping_timeout_ms 5000:       UNAVAILABLE after 14 s (ping timeout)
#     keepalive_timeout_ms 5000:  UNAVAILABLE after 69 s (ping timeout)
#     keepalive_timeout_ms 2000:  UNAVAILABLE after 69 s (ping timeout)
#     keepalive_timeout_ms 100000: UNAVAILABLE after 69 s (ping timeout)
#     as stated: only grpc.http2.ping_timeout_ms decides
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q grpcio==1.85.3 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
cat >"$work/server.py" <<'EOF'
import threading
from concurrent import futures

import grpc


class Slow(grpc.GenericRpcHandler):
    """Any call: never answered."""

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: threading.Event().wait())


server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((Slow(),))
print(server.add_insecure_port("127.0.0.1:0"), flush=True)
server.start()
server.wait_for_termination()
EOF
export WORK="$work" HOME="$work"
"$work/venv/bin/python" - <<'EOF'
import os
import queue
import signal
import subprocess
import sys
import time

import grpc

CASES = {
    "ping_timeout_ms 5000:": [("grpc.keepalive_timeout_ms", 5_000), ("grpc.http2.ping_timeout_ms", 5_000)],
    "keepalive_timeout_ms 5000:": [("grpc.keepalive_timeout_ms", 5_000)],
    "keepalive_timeout_ms 2000:": [("grpc.keepalive_timeout_ms", 2_000)],
    "keepalive_timeout_ms 100000:": [("grpc.keepalive_timeout_ms", 100_000)],
}
COMMON = [("grpc.keepalive_time_ms", 10_000), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


def give_up(number, frame):
    sys.exit(f"stopped by signal {number}: the time was up or someone ended it")


for number in (signal.SIGALRM, signal.SIGTERM):
    signal.signal(number, give_up)
signal.alarm(110)
log = open(f"{os.environ['WORK']}/server.log", "wb")
server = subprocess.Popen([sys.executable, f"{os.environ['WORK']}/server.py"], stdout=subprocess.PIPE, stderr=log)
ended = queue.Queue()
channels = []
after = {}
try:
    port = int(server.stdout.readline())
    for name, options in CASES.items():
        channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=COMMON + options)
        channels.append(channel)
        grpc.channel_ready_future(channel).result(10)
        call = channel.unary_unary("/any/call").future(b"", timeout=100)
        call.add_done_callback(lambda call, name=name: ended.put((name, call, time.monotonic())))
    time.sleep(1)
    server.send_signal(signal.SIGSTOP)
    frozen = time.monotonic()
    for _ in CASES:
        name, call, at = ended.get()
        after[name] = at - frozen
        why = call.details().partition("(")[2].rstrip(")")
        print(f"{name:27} {call.code().name} after {after[name]:.0f} s ({why})", flush=True)
finally:
    server.kill()
    server.wait()
    for channel in channels:
        channel.close()
by_ping, *by_keepalive = [after[name] for name in CASES]
if by_ping > 25:
    sys.exit("changed: grpc.http2.ping_timeout_ms does not end the call either")
if min(by_keepalive) < 50 or max(by_keepalive) > 80:
    sys.exit("changed: keepalive_timeout_ms has an effect")
print("as stated: only grpc.http2.ping_timeout_ms decides")
EOF

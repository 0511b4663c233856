#!/usr/bin/env bash
# grpc.aio replaces a server's refusal of a stream by INTERNAL if the client was busy when the refusal came.
#
# grpcio 1.85.3, CPython 3.11.7, Linux 6.18, 2026-11-30.
#
# A client exchanges two messages on a bidirectional stream. The server then ends it with FAILED_PRECONDITION, a text
# and a trailer that says why. The client's event loop is busy for 0.2 s meanwhile (any computation; a process that was
# stopped or frozen is the same), then it writes. Expected: what a client gets that only waited for 0.2 s, that is
# InvalidStateError from write() and the server's code, text and trailer from the call. Seen: write() fails with
# INTERNAL "Internal error from Core", and the call's code(), details() and trailing_metadata() say the same from then
# on: the server's answer, which had arrived in full, is gone.
#
# The order decides: a write that begins when gRPC's core knows of the end and the loop does not. A write that began
# before the end is harmless. So it is a race where a server refuses at once (a wrong token, say), and certain where the
# loop is busy. Upstream knows it (grpc/grpc issue 36066, open on this date).
#
# Why it matters: code that goes by UNAUTHENTICATED, FAILED_PRECONDITION or RESOURCE_EXHAUSTED takes this for a fault of
# the server and retries for ever. A client should treat INTERNAL without the server's trailer from write() as "ended,
# reason unknown", and a server should tell the client by its initial metadata when it may send.
#
# Seen:
#     client waits 0.2 s:     {'FAILED_PRECONDITION, another one took over, reason SUPERSEDED': 20}
#     client is busy 0.2 s:   {'INTERNAL, Internal error from Core, reason None': 20}
#     as stated: the refusal is lost when the client's loop was busy
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 60 "$work/venv/bin/python" -m pip install -q grpcio==1.85.3 >"$work/pip.log" 2>&1 || {
    echo "not installed within 60 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
cat >"$work/server.py" <<'EOF'
import asyncio

import grpc


class Refusing(grpc.GenericRpcHandler):
    """Any bidirectional call: returns the first two messages, then refuses the rest."""

    def service(self, details):
        return grpc.stream_stream_rpc_method_handler(self.answer)

    async def answer(self, messages, context):
        for _ in range(2):
            yield await anext(messages)
        trailer = (("reason", "SUPERSEDED"),)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another one took over", trailer)


async def main():
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Refusing(),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


asyncio.run(main())
EOF
export WORK="$work" HOME="$work"
"$work/venv/bin/python" - <<'EOF'
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import grpc

TRIES = 20


async def idle():
    await asyncio.sleep(0.2)


async def busy():
    time.sleep(0.2)


async def outcome(channel, pause):
    call = channel.stream_stream("/any/call")()
    for _ in range(2):
        await call.write(b"message")
        await call.read()
    await pause()
    try:
        await call.write(b"message")
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    code = await call.code()
    return f"{code.name}, {await call.details()}, reason {dict(await call.trailing_metadata()).get('reason')}"


async def main(port):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        waited = Counter([await outcome(channel, idle) for _ in range(TRIES)])
        print("client waits 0.2 s:    ", dict(waited))
        was_busy = Counter([await outcome(channel, busy) for _ in range(TRIES)])
        print("client is busy 0.2 s:  ", dict(was_busy))
    return waited, was_busy


def give_up(number, frame):
    sys.exit(f"stopped by signal {number}: the time was up or someone ended it")


for number in (signal.SIGALRM, signal.SIGTERM):
    signal.signal(number, give_up)
signal.alarm(60)
log = open(f"{os.environ['WORK']}/server.log", "wb")
server = subprocess.Popen([sys.executable, f"{os.environ['WORK']}/server.py"], stdout=subprocess.PIPE, stderr=log)
try:
    waited, was_busy = asyncio.run(main(int(server.stdout.readline())))
finally:
    server.kill()
    server.wait()
if any("SUPERSEDED" not in one for one in waited):
    sys.exit("changed: the refusal is lost even when the client's loop was idle")
if not any(one.startswith("INTERNAL") for one in was_busy):
    sys.exit("changed: the refusal is kept when the client's loop was busy")
print("as stated: the refusal is lost when the client's loop was busy")
EOF

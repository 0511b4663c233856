"""Finds what an instance printed while it handled one request, for Function Compute's `x-fc-log-result`.

A custom container's own server prints two marker lines (agent/docs/fc-contract.md):

    FC Invoke Start RequestId: <x-fc-request-id>
    FC Invoke End RequestId: <x-fc-request-id>

The result is the log from one marker to the other, both included. With an instanceConcurrency of more than 1 it may
hold lines of other requests: nothing tells them apart. Only requests with `x-fc-log-type: Tail` get it.
"""

from __future__ import annotations

import asyncio
import base64
import re
from typing import Protocol

from agent.core.errors import HibernodeError
from agent.core.types import Handle

RESULT_BYTES = 4096
LOOK_BACK_BYTES = 16 * 1024
"""Size of the log's end that is searched for the markers. An engine counts lines, so it may send several times that."""
END_WAIT_S = 0.25
"""Longest wait for the End marker after the answer's head has come: the marker passes through the program's buffer, the
pipe and the engine. Some programs never print it."""
READ_S = 1.0
"""Time for all reads together, on top of that wait: an unresponsive engine must not hold the answer back longer."""
_FIRST_PAUSE_S = 0.01


class LogReader(Protocol):
    """The part of `ports.Runtime` that is needed here."""

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes: ...


async def log_result(runtime: LogReader, handle: Handle, request_id: str, end_wait_s: float = END_WAIT_S) -> bytes:
    """The header's value: base64 of the last `RESULT_BYTES` at most. b"" if the log has no marker of the request, or
    can't be read, which is no error."""
    loop = asyncio.get_running_loop()
    found = b""
    last = loop.time() + end_wait_s
    pause_s = _FIRST_PAUSE_S
    try:
        async with asyncio.timeout(end_wait_s + READ_S):
            while True:
                due = loop.time() >= last
                found, whole = between_markers(await runtime.read_log(handle, LOOK_BACK_BYTES), request_id.encode())
                if whole or due:
                    break
                await asyncio.sleep(min(pause_s, max(last - loop.time(), 0.0)))  # nothing reports that a log has grown
                pause_s *= 2
    except (TimeoutError, OSError, HibernodeError):
        pass  # `found` is what was read before
    return base64.b64encode(found[-RESULT_BYTES:])


def between_markers(log: bytes, request_id: bytes) -> tuple[bytes, bool]:
    """(the request's part of the log, whether its End marker is there). With an End marker only, the part begins at the
    log's first byte; without any marker it is empty."""
    start = _marker(b"Start", request_id).search(log)
    first = start.start() if start is not None else 0
    end = _marker(b"End", request_id).search(log, first)
    if end is not None:
        newline = log.find(b"\n", end.end())
        return log[first : len(log) if newline < 0 else newline + 1], True
    return (log[first:] if start is not None else b""), False


def _marker(which: bytes, request_id: bytes) -> re.Pattern[bytes]:
    """The marker with exactly this id: a longer id that begins like it is another request's."""
    return re.compile(b"FC Invoke " + which + b" RequestId: " + re.escape(request_id) + rb"(?![\w-])")

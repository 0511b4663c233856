"""What an instance printed while it handled one request: Function Compute's `x-fc-log-result`.

A custom container's own server prints the two marker lines (facts: the Function Compute contract):

    FC Invoke Start RequestId: <x-fc-request-id>
    FC Invoke End RequestId: <x-fc-request-id>

What stands between them in its log, markers included, is the result; of other requests' lines in between (with an
instanceConcurrency of more than 1) nothing tells whose they are. Only requests that ask for it (`x-fc-log-type: Tail`)
come here.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Protocol

from agent.core.errors import HibernodeError
from agent.core.types import Handle

RESULT_BYTES = 4096
LOOK_BACK_BYTES = 16 * 1024
"""So much of the log's end is searched for the markers; an engine counts in lines, and gives a multiple of that."""
END_WAIT_S = 0.25
"""The End marker is on its way through the program's buffer, the pipe and the engine when the answer is here; a program
that prints none, or only once its stream has ended, is not waited for longer than that."""
READ_S = 1.0
"""For all reads together: an engine that does not answer must not hold an answer up."""
_FIRST_PAUSE_S = 0.01


class LogReader(Protocol):
    """The part of `ports.Runtime` that is needed."""

    async def read_log(self, handle: Handle, tail_bytes: int) -> bytes: ...


async def log_result(runtime: LogReader, handle: Handle, request_id: str, end_wait_s: float = END_WAIT_S) -> bytes:
    """The header's value: base64 of at most `RESULT_BYTES`, the last of them. b"" if the log has no marker of the
    request, or can't be read. Never raises."""
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
                await asyncio.sleep(min(pause_s, max(last - loop.time(), 0.0)))  # a log has no event to wait for
                pause_s *= 2
    except (TimeoutError, OSError, HibernodeError):
        pass  # what was found before that, if anything
    return base64.b64encode(found[-RESULT_BYTES:])


def between_markers(log: bytes, request_id: bytes) -> tuple[bytes, bool]:
    """(what the log holds of the request, is its End marker there). A Start marker that has scrolled away means: from
    the beginning of what there is."""
    start = log.find(b"FC Invoke Start RequestId: " + request_id)
    marker = b"FC Invoke End RequestId: " + request_id
    end = log.find(marker, max(start, 0))
    if end >= 0:
        newline = log.find(b"\n", end + len(marker))
        return log[max(start, 0) : len(log) if newline < 0 else newline + 1], True
    return (log[start:] if start >= 0 else b""), False

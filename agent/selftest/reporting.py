"""How a process of the selftest reports to its parent: one JSON object a line on stdout.

{"begun": {"deadline_s", "cgroup"}} once what must be removed exists, {"step": text} at the start and {"done": text} at
the end of a step, {"report": {...}} at the end. The process ends when its stdin ends, and on SIGTERM and SIGINT; it
removes all that it created in any case. `agent/cli/doctor/reporting_child.py` is the parent's side.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import uvloop


def emit(key: str, value: object) -> None:
    """Send one message."""
    print(json.dumps({key: value}, default=str), flush=True)  # noqa: T201 - its protocol


def report_of(work: Callable[[AsyncExitStack], Awaitable[dict[str, Any]]]) -> None:
    """Run `work` and send its result as the report; none if it is cancelled. What is on the stack is removed."""
    try:
        uvloop.run(_run(work))
    except BrokenPipeError:  # the reader is gone
        os._exit(1)


async def _run(work: Callable[[AsyncExitStack], Awaitable[dict[str, Any]]]) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        task = asyncio.ensure_future(work(stack))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        with suppress(OSError):  # stdin is no pipe
            loop.add_reader(0, _watch_stdin, task)
        try:
            report = await task
        except asyncio.CancelledError:
            return
        finally:
            with suppress(OSError):
                loop.remove_reader(0)
    emit("report", report)


def _watch_stdin(task: asyncio.Future[Any]) -> None:
    """Cancel at end of stdin: the parent process has ended."""
    if not os.read(0, 4096):
        asyncio.get_running_loop().remove_reader(0)
        task.cancel()

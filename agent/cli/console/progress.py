"""Progress of a waiting command on stderr, shown after one second."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from threading import Timer

import click

QUIET_S = 1.0
AGAIN_S = 15.0
"""Interval of further lines if stderr is not a terminal."""


@asynccontextmanager
async def progress(doing: str) -> AsyncIterator[None]:
    """Shows `doing` while the block runs: a spinner on a terminal, lines elsewhere."""
    shown = asyncio.create_task(_spinner(doing) if sys.stderr.isatty() else _lines(doing))
    try:
        yield
    finally:
        shown.cancel()
        with suppress(asyncio.CancelledError):
            await shown


@contextmanager
def blocking_progress(doing: str) -> Iterator[Timer]:
    """Prints `doing` once for a block without an event loop. Cancel the timer to suppress it."""
    timer = Timer(QUIET_S, click.echo, args=(f"{doing} ...",), kwargs={"err": True})
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


async def _spinner(doing: str) -> None:
    await asyncio.sleep(QUIET_S)
    from agent.cli.console.output import console

    with console(sys.stderr).status(f"{doing} ..."):
        await asyncio.Event().wait()


async def _lines(doing: str) -> None:
    await asyncio.sleep(QUIET_S)
    waited = QUIET_S
    while True:
        click.echo(f"{doing} ... ({waited:.0f} s)", err=True)
        await asyncio.sleep(AGAIN_S)
        waited += AGAIN_S

"""The user's terminal while a remote command uses it: raw mode, size changes, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 64 * 1024


@contextmanager
def raw_mode(descriptor: int) -> Iterator[None]:
    """Passes every key on unchanged, and restores the mode at the end of the block. TCSANOW neither discards nor waits
    for pending data, since a terminal may be stalled."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        yield
    finally:
        with suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


def size_of(descriptor: int) -> tuple[int, int]:
    """Columns and rows; 0 and 0 if unknown."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return 0, 0
    return size.columns, size.lines


async def read_some(descriptor: int) -> bytes:
    """The next input; b"" at its end. Does not make the descriptor non-blocking, which would affect every process that
    shares it, and stdout."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:  # a regular file is always ready
        await asyncio.sleep(0)
    else:
        try:
            await ready.wait()
        finally:
            loop.remove_reader(descriptor)
    try:
        return os.read(descriptor, CHUNK_BYTES)
    except OSError:  # a terminal that was closed
        return b""


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """Makes SIGTERM and SIGHUP cancel the current task, so that it cleans up. The list then has the signal's number."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        task.cancel()

    numbers = (signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, end, number)
    try:
        yield received
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def size_changes() -> Iterator[asyncio.Event]:
    """An event that is set whenever the terminal's size changes."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        yield changed
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)

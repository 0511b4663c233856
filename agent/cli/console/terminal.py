"""The person's own terminal while a command elsewhere has it: raw, its size told on, and as before in the end."""

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
    """Every key goes to the program as it is. Restored on every way out of the block; nothing that waits to be read or
    written is thrown away or waited for, since a terminal may be stalled."""
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSANOW)
        yield
    finally:
        with suppress(termios.error):  # it was hung up
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


def size_of(descriptor: int) -> tuple[int, int]:
    """Columns and rows; 0 and 0 where the terminal does not say."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return 0, 0
    return size.columns, size.lines


async def read_some(descriptor: int) -> bytes:
    """The next input; b"" at its end. Leaves the descriptor as it is: a non-blocking one would be so for whoever else
    has it, stdout included."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(descriptor, ready.set)
    except PermissionError:  # a file, which is always ready
        await asyncio.sleep(0)
    else:
        try:
            await ready.wait()
        finally:
            loop.remove_reader(descriptor)
    try:
        return os.read(descriptor, CHUNK_BYTES)
    except OSError:  # a terminal that was hung up
        return b""


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP cancel the current task, so that it cleans up; the list then holds which one came."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    came: list[int] = []

    def end(number: int) -> None:
        came.append(number)
        task.cancel()

    numbers = (signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, end, number)
    try:
        yield came
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def size_changes() -> Iterator[asyncio.Event]:
    """An event that is set whenever the terminal has another size."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    loop.add_signal_handler(signal.SIGWINCH, changed.set)
    try:
        yield changed
    finally:
        loop.remove_signal_handler(signal.SIGWINCH)

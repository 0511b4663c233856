"""Runs one short program to its end or its deadline.

Output is what its pipes hold at its end (64 KiB each): a program that prints more blocks at the full pipe and is killed
at its deadline; a child that keeps a pipe open is not waited for. Everything runs on the loop's thread, by pidfd.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from signal import SIGKILL
from typing import IO

from agent.adapters.kernel.clock import SystemClock

KILL_TIMEOUT_S = 5.0
PIPE_BYTES = 1 << 16


class Ending(Enum):
    """ENDED by itself; KILLED at its deadline or by `kill`; STUCK: it survived SIGKILL and is abandoned."""

    ENDED = auto()
    KILLED = auto()
    STUCK = auto()


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """One run. `code` as in subprocess: negative for a signal."""

    ending: Ending
    code: int = 0
    output: str = ""
    error: str = ""
    elapsed_us: int = 0


class BoundedProgram:
    """A running program. Construction raises OSError if it can't be started."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], *, kill_signal: int = SIGKILL) -> None:
        self._loop = asyncio.get_running_loop()
        self._clock = SystemClock()  # uvloop's time is cached for an iteration and counts milliseconds
        self._begin_ns = self._clock.monotonic_ns()
        self._kill_signal = kill_signal
        # Not asyncio's: with uvloop and gRPC it prints fork warnings (agent/docs/facts/emulated-driver.md, pitfall 11).
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            cwd="/",
            start_new_session=True,  # the agent handles a terminal's Ctrl-C
        )
        self._ended = asyncio.Event()
        try:
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError:  # no descriptor left
            self._process.kill()
            self._close_pipes()
            raise
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._killed = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        """Kill its process group. Idempotent; `wait` then returns KILLED or STUCK."""
        if not self._ended.is_set():
            self._killed = True
            os.killpg(self.pid, self._kill_signal)  # not reaped yet, so the pid is still its own

    async def wait(self, deadline_s: float) -> ProgramResult:
        """Wait for its end, at most KILL_TIMEOUT_S past the deadline."""
        if not await self._ends(deadline_s):
            self.kill()
            if not await self._ends(KILL_TIMEOUT_S):
                self._close_pipes()
                return ProgramResult(Ending.STUCK)  # `_on_exit` reaps it if it ever dies
        output, error = _read_available(self._process.stdout), _read_available(self._process.stderr)
        self._close_pipes()
        elapsed_us = (self._clock.monotonic_ns() - self._begin_ns) // 1000
        ending = Ending.KILLED if self._killed else Ending.ENDED
        return ProgramResult(ending, self._process.returncode, output, error, elapsed_us)

    async def _ends(self, deadline_s: float) -> bool:
        try:
            async with asyncio.timeout(deadline_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()  # dead, so this does not block
        self._ended.set()

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def _read_available(pipe: IO[bytes] | None) -> str:
    """What the pipe holds now, without blocking."""
    if pipe is None:
        return ""
    os.set_blocking(pipe.fileno(), False)
    found = b""
    while len(found) < PIPE_BYTES:
        try:
            part = os.read(pipe.fileno(), PIPE_BYTES)
        except BlockingIOError:
            break
        if not part:
            break
        found += part
    return found.decode(errors="replace")

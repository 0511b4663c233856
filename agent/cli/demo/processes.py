"""Starts, checks and stops a demo's processes, each in its own session.

A daemon gets SIGTERM when the demo ends in any way (child.py). Instances outlive their agent by design; a guard process
(guard.py) ends them if the demo was killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from agent.core.errors import UnavailableError

POLL_S = 0.03
STOP_S = 20.0
KILL_S = 5.0
TAIL_LINES = 15


class DemoProcesses:
    """Child processes by name; each writes to `<logs>/<name>.log`."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    # ---- starting -----------------------------------------------------------------------------------------------

    def start(self, name: str, environment: Mapping[str, str], module: str, *arguments: str) -> None:
        """Runs `python -m module *arguments` without a terminal, so that Ctrl-C reaches only the demo.

        Call it on the main thread: the child gets SIGTERM when the thread that started it ends.
        """
        child = ("-m", "agent.cli.demo.child", str(os.getpid()), module, *arguments)
        with (self._logs / f"{name}.log").open("ab") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, "-P", "-X", f"hibernode={name}", *child],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )

    def start_guard(self, state_dir: Path, *, remove: bool) -> None:
        """Starts the guard, which ends instances with the demo. `remove`: it also removes the folder."""
        program = Path(__file__).with_name("guard.py")
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(program), str(state_dir), "remove" if remove else "keep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    async def wait_for(self, name: str, reached: Callable[[], bool], deadline_s: float) -> None:
        """Waits until `reached()`. Raises UnavailableError DEMO_PROCESS_ENDED or DEMO_NOT_READY with the log's end."""

        async def ready() -> bool:
            self.check(name)
            return reached()

        if not await comes_true(ready, deadline_s):
            text = f"the {name} is not ready after {deadline_s:g} s.\n{self.tail(name)}"
            raise UnavailableError("DEMO_NOT_READY", text)

    def check(self, *names: str) -> None:
        """Raises UnavailableError DEMO_PROCESS_ENDED if one of them (default: any) has ended."""
        for name in names or tuple(self._children):
            code = self._children[name].poll()
            if code is not None:
                raise UnavailableError("DEMO_PROCESS_ENDED", f"the {name} ended with {code}.\n{self.tail(name)}")

    def tail(self, name: str) -> str:
        """The last lines of a log, with a heading."""
        try:
            lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()
        except OSError:
            return f"{name} wrote no log."
        return "\n".join(
            [
                f"The last lines of {name}.log (--state-dir DIR keeps the logs):",
                *(f"  {line[:300]}" for line in lines[-TAIL_LINES:]),
            ]
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._children)

    # ---- ending -------------------------------------------------------------------------------------------------

    async def stop(self, name: str) -> bool:
        """Sends SIGTERM, and SIGKILL after a deadline. False if it was killed."""
        child = self._children.pop(name, None)
        if child is None:
            return True
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        if await _ended(child, STOP_S):
            return True
        child.kill()
        await _ended(child, KILL_S)
        return False

    async def dismiss_guard(self) -> None:
        """Ends the guard: everything has been stopped properly."""
        await self._end_guard(b"bye\n", KILL_S)

    async def release_guard(self) -> None:
        """Lets the guard end what is left, and waits for it."""
        await self._end_guard(b"", STOP_S)

    async def _end_guard(self, word: bytes, deadline_s: float) -> None:
        guard, self._guard = self._guard, None
        if guard is None or guard.stdin is None:
            return
        try:
            guard.stdin.write(word)
            guard.stdin.close()
        except BrokenPipeError:
            pass
        if not await _ended(guard, deadline_s):
            guard.kill()
            await _ended(guard, KILL_S)


async def comes_true(reached: Callable[[], Awaitable[bool]], deadline_s: float) -> bool:
    """Polls a condition of other processes. False if it is not reached by the deadline."""
    try:
        async with asyncio.timeout(deadline_s):
            while not await reached():  # noqa: ASYNC110 - there is nothing to wait on
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        return False
    return True


async def _ended(child: subprocess.Popen[bytes], deadline_s: float) -> bool:
    async def gone() -> bool:
        return child.poll() is not None

    return await comes_true(gone, deadline_s)

"""The processes of a demo: started in sessions of their own, watched, ended in order, and never left behind.

A daemon gets SIGTERM when the demo dies, however it dies (demo_child.py); instances outlive their agent by design, so a guard process
(demo_guard.py) ends those when the demo is gone without having said so.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.core.errors import UnavailableError

POLL_S = 0.02
STOP_S = 20.0
KILL_S = 5.0
TAIL_LINES = 15


class DemoProcesses:
    """Children by name; each writes to `<logs>/<name>.log`."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None

    # ---- starting -----------------------------------------------------------------------------------------------

    def start(self, name: str, environment: Mapping[str, str], module: str, *arguments: str) -> None:
        """Run `python -m module *arguments`. Call it on the main thread: the child's life is tied to its thread.

        stdin is no terminal, and a Ctrl-C there is for the demo alone.
        """
        child = ("-m", "agent.cli.demo_child", str(os.getpid()), module, *arguments)
        with (self._logs / f"{name}.log").open("ab") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, "-P", *child],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(environment),
                start_new_session=True,
            )

    def start_guard(self, state_dir: Path, *, remove: bool) -> None:
        """From now on instances end with the demo, whatever happens to it. `remove`: and the folder goes."""
        program = Path(__file__).with_name("demo_guard.py")
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(program), str(state_dir), "remove" if remove else "keep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    async def wait_for(self, name: str, reached: Callable[[], bool], deadline_s: float) -> None:
        """Until `reached()`. Raises UnavailableError DEMO_PROCESS_ENDED or DEMO_NOT_READY with the end of the log."""
        try:
            async with asyncio.timeout(deadline_s):
                while not reached():
                    self.check(name)
                    await asyncio.sleep(POLL_S)  # another process, which tells nobody
        except TimeoutError:
            raise UnavailableError(
                "DEMO_NOT_READY", f"the {name} is not ready after {deadline_s:g} s.\n{self.tail(name)}"
            ) from None

    def check(self, *names: str) -> None:
        """Raises UnavailableError DEMO_PROCESS_ENDED if one of them (default: any) has ended."""
        for name in names or tuple(self._children):
            code = self._children[name].poll()
            if code is not None:
                raise UnavailableError("DEMO_PROCESS_ENDED", f"the {name} ended with {code}.\n{self.tail(name)}")

    def tail(self, name: str) -> str:
        """The last lines of a log, with its name above them."""
        try:
            lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()
        except OSError:
            return f"{name} wrote no log."
        return "\n".join([f"The last lines of {name}.log:", *(f"  {line[:300]}" for line in lines[-TAIL_LINES:])])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._children)

    # ---- ending -------------------------------------------------------------------------------------------------

    async def stop(self, name: str) -> bool:
        """SIGTERM, then SIGKILL after a deadline. False if it had to be killed."""
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
        """Everything has been ended in order."""
        if self._guard is None or self._guard.stdin is None:
            return
        try:
            self._guard.stdin.write(b"bye\n")
            self._guard.stdin.close()
        except BrokenPipeError:
            pass
        if not await _ended(self._guard, KILL_S):
            self._guard.kill()
            await _ended(self._guard, KILL_S)


async def _ended(child: subprocess.Popen[bytes], deadline_s: float) -> bool:
    try:
        async with asyncio.timeout(deadline_s):
            while child.poll() is None:
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        return False
    return True

"""Runs a process that reports as `agent.selftest.reporting` does, prints its progress, and always ends it.

Such a process owns what it creates, and removes it when its stdin ends, however its parent ends. If the process is
killed, its own children die with it, and this module removes the empty cgroup.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from agent.cli.console.output import note
from agent.core.errors import DeadlineError

SURVEY_DEADLINE_S = 120.0
"""Until the process reports its own deadline."""

SPARE_S = 90.0
"""Time for the process to end after its deadline or a signal."""

KILL_DEADLINE_S = 5.0

QUIET_S = 2.0
"""A step is printed once it has taken this long."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The report (None: the process ended without one) and the exit status."""

    report: dict[str, Any] | None
    code: int


@dataclass(slots=True)
class _Running:
    """The process's messages so far. `limited`: the deadline is the caller's, whatever the process says."""

    deadline: float
    limited: bool
    cgroup: str = ""
    step: str = ""
    printed: bool = True
    since: float = field(default_factory=time.monotonic)
    report: dict[str, Any] | None = None

    def handle(self, message: dict[str, Any]) -> None:
        """Handles one message of the process."""
        self.step, self.printed, self.since = "", True, time.monotonic()
        match message:
            case {"begun": begun}:
                if not self.limited:
                    self.deadline = time.monotonic() + begun["deadline_s"] + SPARE_S
                self.cgroup = begun["cgroup"]
            case {"step": text}:
                self.step, self.printed = text, False
            case {"done": text}:
                note(text)
            case {"report": report}:
                self.report = report
            case _:
                pass

    def print_slow_step(self) -> None:
        if not self.printed and time.monotonic() - self.since >= QUIET_S:
            self.printed = True
            note(f"{self.step} ...")


def run_module(
    module: str,
    *arguments: str,
    limit_s: float | None = None,
    spare_s: float = SPARE_S,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Runs `python -m module *arguments` until it ends. `limit_s`: a deadline in place of the one that the process
    names; `spare_s`: the time that it gets to end after its deadline or a signal.

    Raises KeyboardInterrupt, also for SIGTERM, and DeadlineError SELFTEST_TIMEOUT; the process has ended by then."""
    interrupted = signal.signal(signal.SIGTERM, _interrupt)
    running = _Running(time.monotonic() + (limit_s or SURVEY_DEADLINE_S), limited=limit_s is not None)
    # A separate session: Ctrl-C reaches the process only through this command.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    try:
        _follow(process, running)
        process.wait(spare_s)
    except KeyboardInterrupt:
        note("interrupted: ending the CUDA program")
        raise
    finally:
        signal.signal(signal.SIGTERM, interrupted)
        _end(process, running, spare_s)
    return Ended(running.report, process.returncode)


def _follow(process: subprocess.Popen[bytes], running: _Running) -> None:
    """Reads messages until the process closes its stdout."""
    assert process.stdout is not None
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if time.monotonic() > running.deadline:
                raise DeadlineError("SELFTEST_TIMEOUT", f"the selftest does not answer; its last step: {running.step}")
            if not selector.select(QUIET_S / 4):
                running.print_slow_step()
                continue
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return
            *lines, received = (received + part).split(b"\n")
            for line in lines:
                running.handle(parse_message(line))


def parse_message(line: bytes) -> dict[str, Any]:
    """Parses a message. Other output, such as a library's, is shown as progress."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"done": line.decode(errors="replace")}


def _end(process: subprocess.Popen[bytes], running: _Running, spare_s: float) -> None:
    """Ends the process: it cleans up when its stdin ends, and is killed if it does not end in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(spare_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # stuck in the kernel
            process.wait(KILL_DEADLINE_S)
    process.stdout.close()
    if running.cgroup:
        for folder in (Path(running.cgroup), Path(running.cgroup).parent):
            _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Removes the cgroup of a killed process once its program has died; keeps one in use."""
    deadline = time.monotonic() + 5.0
    while folder.exists() and time.monotonic() < deadline:
        with suppress(OSError):
            if (folder / "cgroup.events").read_text().startswith("populated 1"):
                time.sleep(0.05)
                continue
            folder.rmdir()
        return


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

"""`hibernode doctor --selftest`: runs the selftest in a separate process, prints its progress and its report.

The process owns the GPU, the cgroup and the CUDA program. It removes them when its stdin ends, however this command
ends. If the process is killed, its program dies with it and this command removes the empty cgroup.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import click

from agent.cli.console.output import note, show_json
from agent.cli.doctor.selftest_report import show_report
from agent.cli.options import cli_options, grouped
from agent.core.errors import DeadlineError, UnavailableError
from agent.core.types import GIB
from agent.exit_codes import ExitCode

LEAST_GIB = 0.01
SURVEY_DEADLINE_S = 120.0
"""Until the process reports its own deadline."""

SPARE_S = 90.0
"""Time for the process to end after its deadline or a signal."""

KILL_DEADLINE_S = 5.0

QUIET_S = 2.0
"""A step is printed once it has taken this long."""

_EXITS = {
    "PROVED": ExitCode.OK,
    "FAILED": ExitCode.UNEXPECTED,
    "MEMORY_CHANGED": ExitCode.MEMORY_CHANGED,
    "NOT_RUN": ExitCode.PRECONDITION,
    "TIMED_OUT": ExitCode.UNAVAILABLE,
}


@dataclass(slots=True)
class _Running:
    """The process's messages so far."""

    deadline: float
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


@dataclass(frozen=True, slots=True)
class SelftestOptions:
    """Values of the selftest's options."""

    gib: float
    runs: int
    gpu: str
    against: str


selftest_options = grouped(
    click.option("--selftest", is_flag=True, help="Freeze and wake a CUDA program, and compare every byte."),
    click.option(
        "--gib",
        type=click.FloatRange(min=LEAST_GIB, max=2048),
        metavar="N",
        help="GPU memory to freeze, such as 0.5 [1]; use as much as your models do.",
    ),
    click.option("--runs", type=click.IntRange(1, 1000), metavar="K", help="Number of measured freezes and wakes [3]."),
    click.option("--gpu", metavar="GPU", help="UUID or index; default: the GPU with the most free memory."),
    click.option(
        "--against", type=click.Choice(["utility"]), help="Alternate with the cuda-checkpoint program and compare."
    ),
)


def parse_selftest_options(
    context: click.Context, *, selftest: bool, gib: float | None, runs: int | None, gpu: str | None, against: str | None
) -> SelftestOptions | None:
    """The options; None without --selftest. Raises UsageError for the other options without it."""
    given = {"--gib": gib, "--runs": runs, "--gpu": gpu, "--against": against}
    names = [name for name, value in given.items() if value is not None]
    if names and not selftest:
        raise click.UsageError(f"{names[0]} requires --selftest", context)
    return SelftestOptions(gib or 1.0, runs or 3, gpu or "", against or "") if selftest else None


def run_selftest(options: SelftestOptions, config: Path | None) -> ExitCode:
    """Runs the selftest and shows its report. `config`: the agent's file; None = its defaults.

    Raises KeyboardInterrupt, UnavailableError SELFTEST_ENDED, DeadlineError SELFTEST_TIMEOUT.
    """
    command = [
        *(sys.executable, "-P", "-m", "agent.selftest.run"),
        *("--size-bytes", str(round(options.gib * GIB)), "--runs", str(options.runs)),
        *("--gpu", options.gpu, "--against", options.against),
        *(("--config", str(config)) if config else ()),
    ]
    interrupted = signal.signal(signal.SIGTERM, _interrupt)
    running = _Running(time.monotonic() + SURVEY_DEADLINE_S)
    # A separate session: Ctrl-C reaches the process only through this command.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        _follow(process, running)
        process.wait(SPARE_S)
    except KeyboardInterrupt:
        note("interrupted: ending the CUDA program")
        raise
    finally:
        signal.signal(signal.SIGTERM, interrupted)
        _end(process, running)
    if running.report is None:
        if process.returncode == ExitCode.USAGE:  # it has printed an error of the agent's configuration
            return ExitCode.USAGE
        text = f"the selftest's process ended without a report (exit {process.returncode}); see above"
        raise UnavailableError("SELFTEST_ENDED", text)
    if cli_options().json:
        show_json(running.report)
    else:
        show_report(running.report)
    return _EXITS[running.report["verdict"]["proof"]]


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
                running.handle(_message(line))


def _message(line: bytes) -> dict[str, Any]:
    """Parses a message. Other output, such as a library's, is shown as progress."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"done": line.decode(errors="replace")}


def _end(process: subprocess.Popen[bytes], running: _Running) -> None:
    """Ends the process: it cleans up when its stdin ends, and is killed if it does not end in time."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(SPARE_S)
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

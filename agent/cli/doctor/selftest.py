"""`hibernode doctor --selftest`: runs the selftest as a process of its own, tells of its progress, shows its report.

The process holds GPU, cgroup and the CUDA program; whatever ends this command, it sees its stdin end and takes them
down. If it is killed itself, the program dies with it and this command removes the empty cgroup.
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
from agent.cli.options import F, cli_options
from agent.core.errors import DeadlineError, UnavailableError
from agent.core.types import GIB
from agent.exit_codes import ExitCode

LEAST_GIB = 0.01
SURVEY_DEADLINE_S = 120.0
"""Until the process says how long it may take."""

SPARE_S = 90.0
"""For the process to end by itself after its deadline, or after a signal."""

KILL_DEADLINE_S = 5.0

QUIET_S = 2.0
"""A step is told of once it has taken that long."""

_EXITS = {
    "PROVED": ExitCode.OK,
    "FAILED": ExitCode.UNEXPECTED,
    "MEMORY_CHANGED": ExitCode.MEMORY_CHANGED,
    "NOT_RUN": ExitCode.PRECONDITION,
    "TIMED_OUT": ExitCode.UNAVAILABLE,
}


@dataclass(slots=True)
class _Running:
    """What the process has told so far."""

    deadline: float
    cgroup: str = ""
    step: str = ""
    told: bool = True
    since: float = field(default_factory=time.monotonic)
    report: dict[str, Any] | None = None

    def take(self, message: dict[str, Any]) -> None:
        """One line of the process."""
        self.step, self.told, self.since = "", True, time.monotonic()
        match message:
            case {"begun": begun}:
                self.deadline = time.monotonic() + begun["deadline_s"] + SPARE_S
                self.cgroup = begun["cgroup"]
            case {"step": text}:
                self.step, self.told = text, False
            case {"done": text}:
                note(text)
            case {"report": report}:
                self.report = report
            case _:
                pass

    def tell_if_slow(self) -> None:
        if not self.told and time.monotonic() - self.since >= QUIET_S:
            self.told = True
            note(f"{self.step} ...")


@dataclass(frozen=True, slots=True)
class SelftestOptions:
    """What the options of a selftest say."""

    gib: float
    runs: int
    gpu: str
    against: str


def selftest_options(command: F) -> F:
    """The options of `doctor --selftest`."""
    options = (
        click.option("--selftest", is_flag=True, help="Freeze and wake a CUDA program here, and compare every byte."),
        click.option(
            "--gib",
            type=click.FloatRange(min=LEAST_GIB, max=2048),
            metavar="N",
            help="GPU memory to freeze, such as 0.5 [1]; as much as your models use proves most.",
        ),
        click.option("--runs", type=click.IntRange(1, 1000), metavar="K", help="Freezes and wakes that count [3]."),
        click.option("--gpu", metavar="GPU", help="Its UUID or index; default: the one with the most free memory."),
        click.option(
            "--against",
            type=click.Choice(["utility"]),
            help="Also by the cuda-checkpoint program, in turn, for a comparison.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def selftest_wanted(
    context: click.Context,
    *,
    selftest: bool,
    gib: float | None,
    runs: int | None,
    gpu: str | None,
    against: str | None,
) -> SelftestOptions | None:
    """None: no selftest. Raises UsageError for options of one without it."""
    given = {"--gib": gib, "--runs": runs, "--gpu": gpu, "--against": against}
    alone = [name for name, value in given.items() if value is not None]
    if alone and not selftest:
        raise click.UsageError(f"{alone[0]} belongs to a selftest: say --selftest too", context)
    return SelftestOptions(gib or 1.0, runs or 3, gpu or "", against or "") if selftest else None


def run_selftest(wanted: SelftestOptions, config: Path | None) -> ExitCode:
    """Run it to its end and show the report; `config` is the agent's file, None = its defaults.

    Raises KeyboardInterrupt, UnavailableError SELFTEST_ENDED, DeadlineError SELFTEST_TIMEOUT.
    """
    command = [
        *(sys.executable, "-P", "-m", "agent.selftest.run"),
        *("--size-bytes", str(round(wanted.gib * GIB)), "--runs", str(wanted.runs)),
        *("--gpu", wanted.gpu, "--against", wanted.against),
        *(("--config", str(config)) if config else ()),
    ]
    interrupted = signal.signal(signal.SIGTERM, _interrupt)
    running = _Running(time.monotonic() + SURVEY_DEADLINE_S)
    # In a session of its own: a terminal's Ctrl-C is passed on by us, once.
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
        if process.returncode == ExitCode.USAGE:  # it has said what is wrong with the agent's configuration
            return ExitCode.USAGE
        raise UnavailableError(
            "SELFTEST_ENDED", f"the selftest's process ended in the middle (exit {process.returncode}), see above"
        )
    if cli_options().json:
        show_json(running.report)
    else:
        show_report(running.report)
    return _EXITS[running.report["verdict"]["proof"]]


def _follow(process: subprocess.Popen[bytes], running: _Running) -> None:
    """Read until the process closes its stdout."""
    assert process.stdout is not None
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if time.monotonic() > running.deadline:
                raise DeadlineError("SELFTEST_TIMEOUT", f"the selftest does not answer; it was at: {running.step}")
            if not selector.select(QUIET_S / 4):
                running.tell_if_slow()
                continue
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return
            *lines, received = (received + part).split(b"\n")
            for line in lines:
                running.take(_message(line))


def _message(line: bytes) -> dict[str, Any]:
    """A library that prints to stdout must not end the test: its words are shown as progress."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"done": line.decode(errors="replace")}


def _end(process: subprocess.Popen[bytes], running: _Running) -> None:
    """Nothing stays: the process takes down what it made when its stdin ends; one that can't is killed."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(SPARE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # stuck in the kernel: nobody waits for it any longer
            process.wait(KILL_DEADLINE_S)
    process.stdout.close()
    if running.cgroup:
        for folder in (Path(running.cgroup), Path(running.cgroup).parent):
            _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """A killed process's cgroup, once its program has died too; one in use stays."""
    give_up = time.monotonic() + 5.0
    while folder.exists() and time.monotonic() < give_up:
        with suppress(OSError):
            if (folder / "cgroup.events").read_text().startswith("populated 1"):
                time.sleep(0.05)
                continue
            folder.rmdir()
        return


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt

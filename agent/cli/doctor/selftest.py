"""`hibernode doctor --selftest`: runs the selftest in a separate process, prints its progress and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from agent.cli.console.output import show_json
from agent.cli.doctor.reporting_child import run_module
from agent.cli.doctor.selftest_report import show_report
from agent.cli.options import cli_options, grouped
from agent.core.errors import UnavailableError
from agent.core.types import GIB
from agent.exit_codes import ExitCode

LEAST_GIB = 0.01
_EXITS = {
    "PROVED": ExitCode.OK,
    "FAILED": ExitCode.UNEXPECTED,
    "MEMORY_CHANGED": ExitCode.MEMORY_CHANGED,
    "NOT_RUN": ExitCode.PRECONDITION,
    "TIMED_OUT": ExitCode.UNAVAILABLE,
}


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
    ended = run_module(
        "agent.selftest.run",
        *("--size-bytes", str(round(options.gib * GIB)), "--runs", str(options.runs)),
        *("--gpu", options.gpu, "--against", options.against),
        *(("--config", str(config)) if config else ()),
    )
    if ended.report is None:
        if ended.code == ExitCode.USAGE:  # it has printed an error of the agent's configuration
            return ExitCode.USAGE
        text = f"the selftest's process ended without a report (exit {ended.code}); see above"
        raise UnavailableError("SELFTEST_ENDED", text)
    if cli_options().json:
        show_json(ended.report)
    else:
        show_report(ended.report)
    return _EXITS[ended.report["verdict"]["proof"]]

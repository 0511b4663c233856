"""`hibernode doctor`: checks whether this host can freeze and wake instances, and names a fix for each problem."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from agent.cli.console.output import note, show_json
from agent.cli.console.progress import blocking_progress
from agent.cli.doctor.checks import host_lines, show_lines, system_lines
from agent.cli.doctor.selftest import parse_selftest_options, run_selftest, selftest_options
from agent.cli.options import agent_options, cli_options, json_option, output_option
from agent.core.errors import ConfigError, HibernodeError
from agent.core.snapshots import CapabilityLine
from agent.exit_codes import ExitCode

AGENT_CONFIG = Path("/etc/hibernode/agent.yaml")


@click.command()
@click.option("--local", is_flag=True, help="Check this host without asking a running agent.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"The agent's configuration, for checks without an agent; default: {AGENT_CONFIG} if it exists.",
)
@selftest_options
@agent_options
@json_option
@output_option
@click.pass_context
def doctor(context: click.Context, /, local: bool, config: Path | None, **selftest: Any) -> None:
    """Check whether this host can freeze GPU instances, and print a fix for each problem.

    A running agent reports what it found at its start, as its own user. Without an agent the host is checked directly.
    Exit code 0 if no check failed, else 4; warnings don't count.

    With --selftest, a small CUDA program fills --gib of a GPU's memory and is frozen and woken --runs times with the
    agent's own code; every byte is then compared at the same addresses. The report has the time of each step, and the
    driver's GB/s beside those of a plain copy through pinned memory. Instances are not touched; stop an agent that uses
    the GPU first. Exit code 0 only if all memory came back; 1 the host failed; 4 something is missing; 5 timed out; 6
    memory corrupted: this host must not freeze instances.

    \b
    Keys of its --json:
      verdict   proof (PROVED, FAILED, MEMORY_CHANGED, NOT_RUN, TIMED_OUT), reason, message, fix
      host      gpu (model, uuid ...), driver, cuda, kernel, freezer (cgroup, or signal = SIGSTOP)
      runs      each freeze and wake: _s seconds, _gb_s 10^9 bytes a second; run 0, the warm-up,
                has "counted": false
      summary   median, min and max by checkpointer and figure, and of the pinned copy ("pinned")
      ratio     with --against: utility / driver, run by run
      checks    name, level, reason and fix of each check, as without --selftest

    \b
    Examples:
      sudo hibernode doctor
      sudo hibernode doctor --selftest --gib 8 --runs 5
      sudo hibernode doctor --selftest --against utility --json > proof.json
      eval "$(hibernode emulated env --dir DIR)"; hibernode doctor --local
      hibernode doctor --output json | jq -r '.checks[] | select(.level != "OK") | .fix'
    """
    if options := parse_selftest_options(context, **selftest):
        context.exit(run_selftest(options, _config(config)))
    with blocking_progress("checking this host"):
        lines = host_lines(_config(config)) if local or config else _by_agent_or_host()
    failed = [line.name for line in lines if line.level == "FAIL"]
    if cli_options().json:
        checks = [{"name": one.name, "level": one.level, "reason": one.reason, "fix": one.fix} for one in lines]
        show_json({"ok": not failed, "checks": checks})
    else:
        show_lines(lines)
        _conclude(lines, failed)
    context.exit(ExitCode.PRECONDITION if failed else ExitCode.OK)


def _conclude(lines: Sequence[CapabilityLine], failed: Sequence[str]) -> None:
    note("")
    if failed:
        note(f"No instance can be frozen here until this is fixed: {', '.join(failed)}.")
    else:
        note("Instances can be frozen here.")
    if lines[0].name == "agent" and lines[0].level == "OK" and any(line.fix for line in lines):
        note(
            "The agent checks the engine continuously and everything else at its start: after a fix, restart it "
            "(systemctl restart hibernode-agent)."
        )


def _config(named: Path | None) -> Path | None:
    """The file named, else the agent's own if readable. Raises ConfigError CONFIG_UNREADABLE for a named file."""
    if named is not None and not os.access(named, os.R_OK):
        raise ConfigError("CONFIG_UNREADABLE", f"{named} can't be read; name the agent's file with --config")
    found = named or AGENT_CONFIG
    return found.absolute() if os.access(found, os.R_OK) else None


def _by_agent_or_host() -> Sequence[CapabilityLine]:
    from agent.cli.commands.node import get_node, level
    from agent.cli.daemon_calls import with_agent

    try:
        node = with_agent(get_node, "checking with the agent")
    except HibernodeError as error:
        if cli_options().agent:
            raise  # the user named an agent: don't check this host instead
        found = f"not asked: {error.message.partition('; ')[0]}"
        return [CapabilityLine("agent", "WARN", found, "start it, or use sudo"), *host_lines(_config(None))]
    reported = [CapabilityLine(one.name, level(one), one.reason, one.fix) for one in node.capabilities]
    name = f"{node.name}, {node.agent_version}"
    local = [] if cli_options().agent else system_lines()
    known = {line.name for line in reported}
    return [
        CapabilityLine("agent", "OK", name, ""),
        *cordoned_lines([(gpu.index, gpu.cordoned_reason) for gpu in node.gpus]),
        *reported,
        *(line for line in local if line.name not in known),
    ]


def cordoned_lines(gpus: Sequence[tuple[int, str]]) -> Sequence[CapabilityLine]:
    """A line for each cordoned GPU: FAIL if all are. `gpus`: index and reason of the cordon, "" = none, of each."""
    level = "FAIL" if all(reason for _, reason in gpus) else "WARN"
    fix = "nvidia-smi --gpu-reset -i {0} (end its processes first), or restart the host; then restart the agent"
    return [
        CapabilityLine(f"gpu {index}", level, f"cordoned: {reason}", fix.format(index))
        for index, reason in gpus
        if reason
    ]

"""`hibernode doctor`: can this host freeze and wake instances, and if not, why, and what helps?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from agent.cli.console.output import note, show_json
from agent.cli.console.progress import blocking_progress
from agent.cli.doctor.checks import host_lines, system_lines
from agent.cli.doctor.lines import show_lines
from agent.cli.doctor.selftest import run_selftest, selftest_options, selftest_wanted
from agent.cli.options import agent_options, cli_options, json_option, output_option
from agent.core.errors import ConfigError, HibernodeError
from agent.core.snapshots import CapabilityLine
from agent.exit_codes import ExitCode

AGENT_CONFIG = Path("/etc/hibernode/agent.yaml")


@click.command()
@click.option("--local", is_flag=True, help="Don't ask a running agent; look at this host only.")
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"The agent's configuration, where no agent is asked; default: {AGENT_CONFIG} if it is there.",
)
@selftest_options
@agent_options
@json_option
@output_option
@click.pass_context
def doctor(context: click.Context, /, local: bool, config: Path | None, **selftest: Any) -> None:
    """Check whether this host can freeze GPU instances: one line each, with what to do where it can't.

    A running agent is asked for what it saw when it started (its user, its driver); without one this host is looked at
    directly. Exit code 0 when nothing failed, 4 otherwise. Warnings don't count.

    With --selftest it is tried: a small CUDA program fills --gib of one GPU's memory, is frozen and woken --runs times
    by the very parts that the agent freezes instances with, and every byte is compared, at the same addresses. Times
    of each step are shown, and the GB/s of the driver beside those of a plain copy through pinned memory. No instance
    is touched; an agent that drives the GPU must be stopped meanwhile. Exit code 0 only if all came back; 1 the host
    failed; 4 something is missing; 5 it did not end; 6 a byte came back changed: such a host must not freeze anything.

    \b
    Keys of its --json:
      verdict   proof (PROVED, FAILED, MEMORY_CHANGED, NOT_RUN, TIMED_OUT), reason, message, fix
      host      gpu (model, uuid ...), driver, cuda, kernel, freezer (cgroup, or signal = SIGSTOP)
      runs      each freeze and wake: _s seconds, _gb_s 10^9 bytes a second; run 0, the warm-up,
                has "counted": false
      summary   median, min and max by checkpointer and figure, and of the pinned copy ("pinned")
      ratio     with --against: utility / driver, run by run
      checks    name, level, reason and fix of every line, as without --selftest

    \b
    Examples:
      sudo hibernode doctor
      sudo hibernode doctor --selftest --gib 8 --runs 5
      sudo hibernode doctor --selftest --against utility --json > proof.json
      eval "$(hibernode emulated env --dir DIR)"; hibernode doctor --local
      hibernode doctor --output json | jq -r '.checks[] | select(.level != "OK") | .fix'
    """
    if wanted := selftest_wanted(context, **selftest):
        context.exit(run_selftest(wanted, _config(config)))
    with blocking_progress("looking at this host"):
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
        note(f"No instance can be frozen here until this is put right: {', '.join(failed)}.")
    else:
        note("Instances can be frozen here.")
    if lines[0].name == "agent" and lines[0].level == "OK" and any(line.fix for line in lines):
        note(
            "The engine is looked at all the time, the rest was when the agent started: after a fix, restart it "
            "(systemctl restart hibernode-agent)."
        )


def _config(named: Path | None) -> Path | None:
    """Raises ConfigError CONFIG_UNREADABLE for a file that was named."""
    if named is not None and not os.access(named, os.R_OK):
        raise ConfigError("CONFIG_UNREADABLE", f"{named} can't be read; name the agent's file with --config")
    found = named or AGENT_CONFIG
    return found.absolute() if os.access(found, os.R_OK) else None


def _by_agent_or_host() -> Sequence[CapabilityLine]:
    from agent.cli.commands.node import get_node, level
    from agent.cli.daemon_calls import with_agent

    try:
        node = with_agent(get_node, "asking the agent")
    except HibernodeError as error:
        if cli_options().agent:
            raise  # asked for by name: this host is not what is wanted
        found = f"not asked: {error.message.partition(': ')[0]}"
        return [CapabilityLine("agent", "WARN", found, "start it, or use sudo"), *host_lines(_config(None))]
    seen = [CapabilityLine(one.name, level(one), one.reason, one.fix) for one in node.capabilities]
    name = f"{node.name}, {node.agent_version}"
    beside = [] if cli_options().agent else system_lines()
    known = {line.name for line in seen}
    return [
        CapabilityLine("agent", "OK", name, ""),
        *cordoned_lines([(gpu.index, gpu.cordoned_reason) for gpu in node.gpus]),
        *seen,
        *(line for line in beside if line.name not in known),
    ]


def cordoned_lines(gpus: Sequence[tuple[int, str]]) -> Sequence[CapabilityLine]:
    """Index and cordon ("" = none) of each GPU to a line for each that is out of use: FAIL where none is left."""
    level = "FAIL" if all(reason for _, reason in gpus) else "WARN"
    fix = "nvidia-smi --gpu-reset -i {0} (end what uses it first), or restart the host; then restart the agent"
    return [
        CapabilityLine(f"gpu {index}", level, f"cordoned: {reason}", fix.format(index))
        for index, reason in gpus
        if reason
    ]

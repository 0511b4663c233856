"""`hibernode doctor`: can this host freeze and wake instances, and if not, why, and what helps?"""

from __future__ import annotations

from collections.abc import Sequence

import click

from agent.cli.doctor_checks import host_lines, system_lines
from agent.cli.exit_codes import Exit
from agent.cli.options import agent_options, asked, output_option
from agent.cli.output import show_json, show_table
from agent.cli.progress import blocking_progress
from agent.core.errors import HibernodeError
from agent.core.snapshots import CapabilityLine


@click.command()
@click.option("--local", is_flag=True, help="Don't ask a running agent; look at this host only.")
@agent_options
@output_option
@click.pass_context
def doctor(context: click.Context, local: bool) -> None:
    """Check whether this host can freeze GPU instances: one line each, with what to do where it can't.

    A running agent is asked for what it sees (its user, its driver); without one this host is looked at directly.
    Exit code 0 when nothing failed, 4 otherwise. Warnings don't count.

    \b
    Examples:
      hibernode doctor
      eval "$(hibernode emulated env --dir DIR)"; hibernode doctor --local
      hibernode doctor --output json | jq -r '.checks[] | select(.level != "OK") | .fix'
    """
    with blocking_progress("looking at this host"):
        lines = host_lines() if local else _by_agent_or_host()
    failed = any(line.level == "FAIL" for line in lines)
    if asked().json:
        checks = [{"name": one.name, "level": one.level, "reason": one.reason, "fix": one.fix} for one in lines]
        show_json({"ok": not failed, "checks": checks})
    else:
        show_table(
            ("CHECK", "LEVEL", "FOUND", "FIX"), ((one.name, one.level, one.reason, one.fix or "-") for one in lines)
        )
    context.exit(Exit.PRECONDITION if failed else Exit.OK)


def _by_agent_or_host() -> Sequence[CapabilityLine]:
    from agent.cli.connection import with_agent
    from agent.cli.node_command import get_node, level

    try:
        node = with_agent(get_node, "asking the agent")
    except HibernodeError as error:
        if asked().agent:
            raise  # asked for by name: this host is not what is wanted
        found = f"not asked: {error.message.partition(': ')[0]}"
        return [CapabilityLine("agent", "WARN", found, "start it, or use sudo"), *host_lines()]
    seen = [CapabilityLine(one.name, level(one), one.reason, one.fix) for one in node.capabilities]
    name = f"{node.name}, {node.agent_version}"
    beside = [] if asked().agent else system_lines()
    known = {line.name for line in seen}
    return [
        CapabilityLine("agent", "OK", name, ""),
        *seen,
        *(line for line in beside if line.name not in known),
    ]

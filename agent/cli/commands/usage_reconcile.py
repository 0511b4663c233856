"""`hibernode usage reconcile`: checks that the stored usage is complete and free of contradictions."""

from __future__ import annotations

import click

from agent.cli.console.output import note, show_json, show_table
from agent.cli.console.units import clock, instant_ns, seconds
from agent.cli.daemon_calls import with_scheduler
from agent.cli.options import cli_options, output_option, scheduler_options
from agent.core.errors import UnavailableError
from agent.exit_codes import ExitCode
from agent.v1 import usage_service_pb2 as pb
from agent.wire.clients import DaemonChannel
from agent.wire.convert_time import time_to_proto
from agent.wire.json_view import short_name, to_json

RECONCILE_S = 600.0
SHOWN_FINDINGS = 5
"""Per instance in the table; JSON has the first 100."""


@click.command()
@click.option("--function", default="", metavar="NAME", help="Only this function.")
@click.option("--node", default="", metavar="NAME", help="Only this node.")
@click.option("--since", type=instant_ns, metavar="TIME", help="Start: 24h (ago) or 2025-01-31T12:00.")
@click.option("--until", type=instant_ns, metavar="TIME", help="End, in the same format.")
@scheduler_options
@output_option
def reconcile(function: str, node: str, since: int | None, until: int | None) -> int:
    """Check that the stored windows of instances fit together.

    \b
    GAP        time without a window: usage was lost and is not billed
    OVERLAP    time in two windows: it is billed twice
    CONFLICT   a window arrived again with other numbers: the first ones are billed
    ESTIMATED  reconstructed after a crash of the agent, never more than was used

    Exit code 4 if there are gaps, overlaps or conflicts, which need attention. Estimates alone do not.

    \b
    Examples:
      hibernode usage reconcile --since 30d
      hibernode usage reconcile --output json | jq '.instances[] | {instance_uid, gap_ns}'
    """
    if cli_options().csv:
        raise click.UsageError("reconcile writes tables or JSON, not CSV")
    request = pb.ReconcileUsageRequest(
        function=function,
        node=node,
        start_time=None if since is None else time_to_proto(since),
        end_time=None if until is None else time_to_proto(until),
    )
    found, total = with_scheduler(lambda channel: _reconcile(channel, request), "checking every window")
    if cli_options().json:
        show_json({"instances": [to_json(one) for one in found], "total": to_json(total)})
    else:
        _show(found, total)
    return ExitCode.PRECONDITION if total.gap_count or total.overlap_count or total.conflict_count else ExitCode.OK


async def _reconcile(
    channel: DaemonChannel, request: pb.ReconcileUsageRequest
) -> tuple[list[pb.UsageReconciliation], pb.UsageReconciliation]:
    found: list[pb.UsageReconciliation] = []
    async for answer in channel.stream(channel.usage.ReconcileUsage, request, RECONCILE_S):
        if answer.HasField("total"):
            return found, answer.total
        found.append(answer.instance)
    raise UnavailableError("STREAM_ENDED", "the scheduler ended its answer before the totals; try again")


def _show(found: list[pb.UsageReconciliation], total: pb.UsageReconciliation) -> None:
    amounts = ("WINDOWS", "GAPS", "GAP S", "OVERLAPS", "OVERLAP S", "ESTIMATED", "ESTIMATED S", "CONFLICTS")
    rows = [(one.instance_uid, one.function, one.node, *_amounts(one)) for one in found]
    rows.append(("TOTAL", f"{total.instance_count} instances", "", *_amounts(total)))
    show_table(("INSTANCE", "FUNCTION", "NODE", *amounts), rows, right=amounts)
    for one in found:
        problems = [finding for finding in one.findings if finding.kind != pb.UsageFinding.KIND_ESTIMATED]
        for finding in problems[:SHOWN_FINDINGS]:
            kind = short_name(pb.UsageFinding.Kind.DESCRIPTOR, finding.kind)
            where = f"window {finding.seq} of {clock(finding.start_time)}"
            note(f"{one.instance_uid}: {kind} of {seconds(finding.duration_ns)} s at {where}")
        if len(problems) > SHOWN_FINDINGS:
            note(f"{one.instance_uid}: more findings; --output json lists the first 100")


def _amounts(one: pb.UsageReconciliation) -> tuple[str, ...]:
    return (
        str(one.window_count),
        str(one.gap_count),
        seconds(one.gap_ns),
        str(one.overlap_count),
        seconds(one.overlap_ns),
        str(one.estimated_count),
        seconds(one.estimated_ns),
        str(one.conflict_count),
    )

"""`hibernode usage`: active and idle time, priced by the scheduler; or a node's own ledger."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from agent.cli.connection import PAGE_SIZE, SHORT_S, with_agent, with_scheduler
from agent.cli.options import asked, fleet_or_node_options, output_option
from agent.cli.output import note, show_json, show_table
from agent.cli.units import money, seconds, wall_ns
from agent.config import parse_duration_ns
from agent.core.types import SECOND_NS
from agent.v1 import node_service_pb2, types_pb2
from agent.v1 import usage_service_pb2 as pb
from agent.wire.clients import DaemonChannel
from agent.wire.convert_time import time_to_proto
from agent.wire.json_view import short_name, to_json

MAX_PAGES = 10_000
ROWS_WITH_WINDOWS = 20
"""Rows a page when their windows come along: an answer has to fit into one message."""


def instant_ns(value: str) -> int:
    """An option's `24h` (so long ago) or `2025-01-31[T12:00:00[Z]]` (local time without a zone), ns since 1970."""
    try:
        return max(0, wall_ns() - parse_duration_ns(value))
    except ValueError:
        pass
    try:
        at = datetime.fromisoformat(value)
    except ValueError as error:
        raise click.BadParameter(
            f"{value!r} is neither a duration like 24h nor a time like 2025-01-31T12:00"
        ) from error
    return int(at.astimezone(UTC).timestamp()) * SECOND_NS


@click.command()
@click.option("--by", type=click.Choice(["function", "instance"]), default="function", show_default=True)
@click.option("--function", default="", metavar="NAME", help="Only this function.")
@click.option("--node", default="", metavar="NAME", help="Only this node.")
@click.option("--gpu-model", default="", metavar="MODEL", help="Only this GPU model.")
@click.option("--since", type=instant_ns, metavar="TIME", help="From then on: 24h (ago), or 2025-01-31T12:00.")
@click.option("--until", type=instant_ns, metavar="TIME", help="Up to then.")
@click.option(
    "--windows/--no-windows", default=True, show_default=True, help="With JSON: the windows behind each row, too."
)
@click.option("--local", is_flag=True, help="This node's own ledger, from its agent: windows without prices.")
@fleet_or_node_options
@output_option
def usage(
    by: str, function: str, node: str, gpu_model: str, since: int | None, until: int | None, windows: bool, local: bool
) -> None:
    """Show active and idle time and what it costs, beside the cost of the same instances always on.

    JSON holds all it takes to compute the costs again: `rows` with exact quantities and `factors`, and `windows`.

    \b
    cost = gpu_active_gib_s x factors.gpu_active + gpu_idle_gib_s x factors.gpu_idle
         + vcpu_active_s x factors.vcpu_active + vcpu_idle_s x factors.vcpu_idle
         + memory_gib_s x factors.memory + disk_gib_s x factors.disk + invocations x factors.invocation

    \b
    Examples:
      hibernode usage --since 24h
      hibernode usage --by instance --function ocr
      hibernode usage --local
      hibernode usage --output json | jq '.rows[] | {function, cost, always_on_cost}'
    """
    if local:
        if node or gpu_model or since is not None or until is not None:
            raise click.UsageError("--local takes only --function: the ledger is small, filter its JSON with jq")
        _show_ledger(function)
        return
    with_windows = windows and asked().json
    request = pb.ListUsageRequest(
        page_size=ROWS_WITH_WINDOWS if with_windows else PAGE_SIZE,
        function=function,
        node=node,
        gpu_model=gpu_model,
        start_time=None if since is None else time_to_proto(since),
        end_time=None if until is None else time_to_proto(until),
        grouping=pb.ListUsageRequest.GROUPING_INSTANCE if by == "instance" else pb.ListUsageRequest.GROUPING_FUNCTION,
        include_windows=with_windows,
    )

    async def story(channel: DaemonChannel) -> pb.ListUsageResponse:
        return await list_usage(channel, request)

    found = with_scheduler(story, "adding up usage")
    if asked().json:
        show_json(to_json(found))
    else:
        _show(found, by_instance=by == "instance")


async def list_usage(channel: DaemonChannel, request: pb.ListUsageRequest) -> pb.ListUsageResponse:
    """All pages as one answer."""
    whole = pb.ListUsageResponse()
    for _ in range(MAX_PAGES):
        page = await channel.call(channel.usage.ListUsage, request, SHORT_S)
        whole.rows.extend(page.rows)
        whole.windows.extend(page.windows)
        whole.total_cost, whole.total_always_on_cost, whole.unit = page.total_cost, page.total_always_on_cost, page.unit
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    return whole


def _show(found: pb.ListUsageResponse, by_instance: bool) -> None:
    unit = f" ({found.unit})" if found.unit else ""
    columns = ("FUNCTION", "GPU MODEL", "ACTIVE S", "IDLE S", "UNBILLED S", "REQUESTS", f"COST{unit}", "ALWAYS ON", "")
    rows = [
        (
            *((one.instance_uid, one.node) if by_instance else ()),
            one.function,
            one.gpu_model or "-",
            seconds(one.active_ns),
            seconds(one.idle_ns),
            seconds(one.unbilled_ns),
            str(one.invocations),
            money(one.cost),
            money(one.always_on_cost),
            "estimated" if one.estimated else "",
        )
        for one in found.rows
    ]
    head = (*(("INSTANCE", "NODE") if by_instance else ()), *columns)
    if found.rows:
        blank = ("",) * (2 if by_instance else 0)
        total = (money(found.total_cost), money(found.total_always_on_cost), _saved(found))
        rows.append((*blank, "TOTAL", "", "", "", "", "", *total))
    show_table(head, rows, right=columns[2:-1])


def _saved(found: pb.ListUsageResponse) -> str:
    always, cost = float(found.total_always_on_cost or 0), float(found.total_cost or 0)
    return f"{100 * (1 - cost / always):.1f} % saved" if always > 0 else ""


def _show_ledger(function: str) -> None:
    async def story(channel: DaemonChannel) -> list[types_pb2.UsageWindow]:
        found: list[types_pb2.UsageWindow] = []
        token = ""
        for _ in range(MAX_PAGES):
            request = node_service_pb2.ListUsageWindowsRequest(
                page_size=PAGE_SIZE, page_token=token, function=function, include_open=True
            )
            page = await channel.call(channel.nodes.ListUsageWindows, request, SHORT_S)
            found += page.windows
            token = page.next_page_token
            if not token:
                break
        return found

    found = with_agent(story, "reading the ledger")
    if asked().json:
        show_json({"windows": [to_json(one) for one in found]})
        return
    note("This node's own ledger; windows that the scheduler has acknowledged may be gone.")
    numbers = ("SEQ", "LENGTH S", "ACTIVE S", "IDLE S", "UNBILLED S", "REQUESTS")
    show_table(
        ("INSTANCE", "SEQ", "FUNCTION", "STATE", *numbers[1:], ""),
        (
            (
                one.instance_uid,
                str(one.seq),
                one.function,
                short_name(types_pb2.Instance.State.DESCRIPTOR, one.state),
                seconds(one.end_mono_ns - one.start_mono_ns),
                seconds(one.active_ns),
                seconds(one.idle_ns),
                seconds(one.unbilled_ns),
                str(one.invocations),
                " ".join(word for word, on in (("estimated", one.estimated), ("open", not one.sealed)) if on),
            )
            for one in found
        ),
        right=numbers,
    )

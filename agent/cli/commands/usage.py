"""`hibernode usage`: active and idle time with the scheduler's prices, or a node's own ledger."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation

import click

from agent.cli.commands.usage_csv import usage_csv
from agent.cli.commands.usage_reconcile import reconcile
from agent.cli.console.output import note, show_json, show_table, show_text, warn
from agent.cli.console.units import instant_ns, money, seconds
from agent.cli.daemon_calls import pages, with_agent, with_scheduler
from agent.cli.options import cli_options, fleet_or_node_options, output_or_csv_option
from agent.core.errors import ExhaustedError
from agent.v1 import node_service_pb2, types_pb2
from agent.v1 import usage_service_pb2 as pb
from agent.wire.clients import DaemonChannel
from agent.wire.convert_time import time_to_proto
from agent.wire.json_view import short_name, to_json

MAX_WINDOWS = 1_000_000
"""About half a GiB of memory."""
_GROUPINGS = {
    "function": pb.ListUsageRequest.GROUPING_FUNCTION,
    "instance": pb.ListUsageRequest.GROUPING_INSTANCE,
    "node": pb.ListUsageRequest.GROUPING_NODE,
    "gpu-model": pb.ListUsageRequest.GROUPING_GPU_MODEL,
}
_NAMES = {"function": ("FUNCTION",), "instance": ("INSTANCE", "NODE", "FUNCTION"), "node": ("NODE",), "gpu-model": ()}
"""Columns that name a row, before its GPU model."""


@click.group(invoke_without_command=True)
@click.option("--by", type=click.Choice(list(_GROUPINGS)), default="function", show_default=True)
@click.option("--function", default="", metavar="NAME", help="Only this function.")
@click.option("--node", default="", metavar="NAME", help="Only this node.")
@click.option("--gpu-model", default="", metavar="MODEL", help="Only this GPU model; - = without GPU.")
@click.option("--since", type=instant_ns, metavar="TIME", help="Start: 24h (ago) or 2025-01-31T12:00.")
@click.option("--until", type=instant_ns, metavar="TIME", help="End, in the same format.")
@click.option(
    "--windows/--no-windows", default=True, show_default=True, help="With JSON: include the windows behind the rows."
)
@click.option("--local", is_flag=True, help="The node's own ledger, from its agent: windows without prices.")
@fleet_or_node_options
@output_or_csv_option
@click.pass_context
def usage(
    context: click.Context,
    by: str,
    function: str,
    node: str,
    gpu_model: str,
    since: int | None,
    until: int | None,
    windows: bool,
    local: bool,
) -> None:
    """Show active and idle time with its cost, and the cost of the same instances if they were always on.

    Time is counted in windows of at most a minute. --since and --until select windows by their start. Waiting for a GPU
    and pulling an image are unbilled; an instance without any billed time has no always-on cost either.

    JSON contains everything needed to recompute the costs: `rows` with exact quantities and `factors`, and `windows`.
    CSV contains the rows; text that a spreadsheet would take for a formula begins with an apostrophe.

    \b
    cost = gpu_active_gib_s x factors.gpu_active + gpu_idle_gib_s x factors.gpu_idle
         + vcpu_active_s x factors.vcpu_active + vcpu_idle_s x factors.vcpu_idle
         + memory_gib_s x factors.memory + disk_gib_s x factors.disk + invocations x factors.invocation

    \b
    Examples:
      hibernode usage --since 24h
      hibernode usage --by instance --function ocr
      hibernode usage --by gpu-model --since 30d --output csv > usage.csv
      hibernode usage reconcile
      hibernode usage --local
      hibernode usage --output json | jq '.rows[] | {function, cost, always_on_cost}'
    """
    if context.invoked_subcommand is not None:
        if function or node or gpu_model or since is not None or until is not None or local:
            raise click.UsageError(f"give the options of {context.invoked_subcommand} after its name")
        return
    if local:
        if cli_options().csv:
            raise click.UsageError("--local writes tables or JSON, not CSV")
        if node or gpu_model or since is not None or until is not None:
            raise click.UsageError("--local takes only --function; filter its JSON with jq")
        _show_ledger(function)
        return
    with_windows = windows and cli_options().json
    request = pb.ListUsageRequest(
        function=function,
        node=node,
        gpu_model=gpu_model,
        start_time=None if since is None else time_to_proto(since),
        end_time=None if until is None else time_to_proto(until),
        grouping=_GROUPINGS[by],
        include_windows=with_windows,
    )
    found = with_scheduler(lambda channel: list_usage(channel, request), "adding up usage")
    if cli_options().json:
        show_json(to_json(found))
    elif cli_options().csv:
        show_text(usage_csv(found.rows, found.unit))
    else:
        _show(found, by)


usage.add_command(reconcile)


async def list_usage(channel: DaemonChannel, request: pb.ListUsageRequest) -> pb.ListUsageResponse:
    """All pages of the answer as one. Raises ExhaustedError USAGE_TOO_MANY_WINDOWS."""
    whole = pb.ListUsageResponse()
    async for page in pages(channel, channel.usage.ListUsage, request):
        whole.rows.extend(page.rows)
        whole.windows.extend(page.windows)
        if page.total_cost:  # pages of windows have none
            whole.total_cost, whole.total_always_on_cost = page.total_cost, page.total_always_on_cost
            whole.unit = page.unit
        if len(whole.windows) > MAX_WINDOWS:
            text = f"more than {MAX_WINDOWS} windows; use --no-windows, or narrow it with --since or --function"
            raise ExhaustedError("USAGE_TOO_MANY_WINDOWS", text)
    return whole


def _show(found: pb.ListUsageResponse, by: str) -> None:
    unit = f" ({found.unit})" if found.unit else ""
    names = (*_NAMES[by], "GPU MODEL")
    times = ("ACTIVE S", "IDLE S", "UNBILLED S", "REQUESTS", "GPU GB*S ACTIVE", "GPU GB*S IDLE")
    costs = (f"COST{unit}", "ALWAYS ON")
    rows = [
        (
            *_names(one, by),
            one.gpu_model or "-",
            seconds(one.active_ns),
            seconds(one.idle_ns),
            seconds(one.unbilled_ns),
            str(one.invocations),
            _one_decimal(one.gpu_active_gib_s),
            _one_decimal(one.gpu_idle_gib_s),
            money(one.cost),
            money(one.always_on_cost),
            _marks(one),
        )
        for one in found.rows
    ]
    if found.rows:
        blank = ("",) * (len(names) + len(times) - 1)
        rows.append(("TOTAL", *blank, money(found.total_cost), money(found.total_always_on_cost), _saved(found)))
    show_table((*names, *times, *costs, ""), rows, right=(*times, *costs))
    unpriced = sorted({one.gpu_model or "-" for one in found.rows if one.unpriced_windows})
    if unpriced:
        warn(f"some time on {', '.join(unpriced)} has no price: add it to the `price_book` of scheduler.yaml")


def _marks(one: pb.UsageRow) -> str:
    unpriced = f"{one.unpriced_windows} of {one.window_count} windows unpriced" if one.unpriced_windows else ""
    return ", ".join(filter(None, ("estimated" if one.estimated else "", unpriced)))


def _names(one: pb.UsageRow, by: str) -> tuple[str, ...]:
    of = {"FUNCTION": one.function, "INSTANCE": one.instance_uid, "NODE": one.node}
    return tuple(of[name] for name in _NAMES[by])


def _one_decimal(text: str) -> str:
    """Rounds an exact decimal for a table."""
    try:
        return f"{Decimal(text or 0):.1f}"
    except InvalidOperation:
        return text


def _saved(found: pb.ListUsageResponse) -> str:
    always, cost = float(found.total_always_on_cost or 0), float(found.total_cost or 0)
    return f"{100 * (1 - cost / always):.1f} % saved" if always > 0 else ""


def _show_ledger(function: str) -> None:
    async def list_windows(channel: DaemonChannel) -> list[types_pb2.UsageWindow]:
        request = node_service_pb2.ListUsageWindowsRequest(function=function, include_open=True)
        listing = pages(channel, channel.nodes.ListUsageWindows, request)
        return [window async for page in listing for window in page.windows]

    found = with_agent(list_windows, "reading the ledger")
    if cli_options().json:
        show_json({"windows": [to_json(one) for one in found]})
        return
    note("The node's own ledger; windows that the scheduler has acknowledged may have been removed.")
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

"""UsageService: agents' windows in, sums and costs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from agent.api.paging import page
from agent.core.errors import ExhaustedError, InvalidArgumentError
from agent.core.price_book import Price, PriceBook
from agent.core.pricing import Quantities, exact_text, quantities, rounded
from agent.core.usage_window import Window
from agent.scheduler.usage import UsageCollector
from agent.scheduler.usage_reports import MAX_WINDOWS, UsageFilter, UsageLine, UsageReports
from agent.v1 import usage_service_pb2 as pb
from agent.v1 import usage_service_pb2_grpc
from agent.wire.convert_time import time_from_proto, time_to_proto
from agent.wire.convert_usage import window_from_proto, window_to_proto
from agent.wire.tokens import calling_node

MAX_BATCH = 500
_BY_FUNCTION = ("function",)
_BY_INSTANCE = ("instance_uid", "function", "node")


class UsageServicer(usage_service_pb2_grpc.UsageServiceServicer):
    """Translates and hands on; errors become statuses in the wire's call guard."""

    def __init__(self, collector: UsageCollector, reports: UsageReports, book: PriceBook) -> None:
        self._collector = collector
        self._reports = reports
        self._book = book

    async def UploadUsageWindows(
        self, request: pb.UploadUsageWindowsRequest, context: object
    ) -> pb.UploadUsageWindowsResponse:
        """Store an agent's windows; the marks say what it may prune, the refusals what it may stop sending. Its name
        comes from its credential."""
        node = calling_node()
        if len(request.windows) > MAX_BATCH:
            raise InvalidArgumentError("USAGE_BATCH_TOO_LARGE", f"send at most {MAX_BATCH} windows at once")
        windows: list[Window] = []
        unreadable: list[tuple[str, int]] = []
        for message in request.windows:
            try:
                windows.append(window_from_proto(message))
            except InvalidArgumentError:
                unreadable.append((message.instance_uid, message.seq))
        accepted = await self._collector.accept(node, windows, unreadable)
        return pb.UploadUsageWindowsResponse(
            marks=[pb.UsageMark(instance_uid=uid, seq=seq) for uid, seq in accepted.marks.items()],
            conflicts=[pb.UsageConflict(instance_uid=uid, seq=seq) for uid, seq in accepted.conflicts],
            refusals=[
                pb.UsageRefusal(instance_uid=one.key[0], seq=one.key[1], reason=one.reason) for one in accepted.refused
            ],
        )

    async def ListUsage(self, request: pb.ListUsageRequest, context: object) -> pb.ListUsageResponse:
        """Rows by function or instance, GPU model and price; totals over all rows; the windows behind them if asked."""
        only = UsageFilter(
            function=request.function,
            node=request.node,
            gpu_model=request.gpu_model,
            start_wall_ns=time_from_proto(request.start_time) if request.HasField("start_time") else 0,
            end_wall_ns=time_from_proto(request.end_time) if request.HasField("end_time") else 0,
        )
        by_instance = request.grouping == pb.ListUsageRequest.GROUPING_INSTANCE
        report = await self._reports.report(self._book, only, _BY_INSTANCE if by_instance else _BY_FUNCTION)
        shown, token = page(report.lines, request.page_size, request.page_token)
        windows = await self._windows(only, shown, by_instance) if request.include_windows else []
        return pb.ListUsageResponse(
            rows=[_row(line, by_instance) for line in shown],
            next_page_token=token,
            windows=[window_to_proto(window) for window in windows],
            total_cost=str(report.total_cost),
            total_always_on_cost=str(report.total_always_on_cost),
            unit=report.currency,
        )

    async def _windows(self, only: UsageFilter, lines: Sequence[UsageLine], by_instance: bool) -> list[Window]:
        """Windows of the functions (or instances) of a page, each once. ExhaustedError where they are too many."""
        found: list[Window] = []
        for first in dict.fromkeys(line.group[0] for line in lines):
            part = replace(only, instance_uid=first) if by_instance else replace(only, function=first)
            after = ("", -1)
            while True:
                windows = await self._reports.windows(part, limit=1000, after=after)
                found += windows
                if len(found) > MAX_WINDOWS:
                    text = f"more than {MAX_WINDOWS} windows; ask for a shorter time or one function"
                    raise ExhaustedError("USAGE_TOO_MANY_WINDOWS", text)
                if len(windows) < 1000:
                    break
                after = (windows[-1].instance_uid, windows[-1].seq)
        return found


def _row(line: UsageLine, by_instance: bool) -> pb.UsageRow:
    amounts = [quantities(part) for part in line.sums]

    def total(quantity: Callable[[Quantities], Fraction]) -> str:
        return exact_text(sum((quantity(amount) for amount in amounts), Fraction(0)))

    row = pb.UsageRow(
        function=line.group[1] if by_instance else line.group[0],
        instance_uid=line.group[0] if by_instance else "",
        node=line.group[2] if by_instance else "",
        gpu_model=line.gpu_model,
        window_count=line.total("windows"),
        active_ns=line.total("active_ns"),
        idle_ns=line.total("idle_ns"),
        unbilled_ns=line.total("unbilled_ns"),
        invocations=line.total("invocations"),
        gpu_active_gib_s=total(lambda q: q.gpu_active_gib_s),
        gpu_idle_gib_s=total(lambda q: q.gpu_idle_gib_s),
        vcpu_active_s=total(lambda q: q.vcpu_active_s),
        vcpu_idle_s=total(lambda q: q.vcpu_idle_s),
        memory_gib_s=total(lambda q: q.memory_gib_s),
        disk_gib_s=total(lambda q: q.disk_gib_s),
        cost=str(rounded(line.cost.total)),
        always_on_cost=str(rounded(line.always_on_cost.total)),
        estimated=line.total("estimated") > 0,
    )
    if line.price is not None:
        row.factors.CopyFrom(_factors(line.price, line.gpu_model))
    return row


def _factors(price: Price, gpu_model: str) -> pb.PriceFactors:
    """Factors in the book's currency: CU times the price of a CU. A GPU model without a price has none."""
    unit, gpu = price.unit_price, price.gpu_rate(gpu_model)
    return pb.PriceFactors(
        gpu_active=exact_text(unit * gpu.active) if gpu is not None else "0",
        gpu_idle=exact_text(unit * gpu.idle) if gpu is not None else "0",
        vcpu_active=exact_text(unit * price.vcpu.active),
        vcpu_idle=exact_text(unit * price.vcpu.idle),
        memory=exact_text(unit * price.memory),
        disk=exact_text(unit * price.disk),
        invocation=exact_text(unit * price.invocation),
        valid_from=time_to_proto(price.valid_from_wall_ns),
    )

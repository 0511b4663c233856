"""UsageService of the scheduler: takes in agents' usage windows, and reports sums, costs and inconsistencies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from fractions import Fraction

from agent.api.paging import MAX_TOKEN_DIGITS, page
from agent.core.billing.price_book import Price, PriceBook
from agent.core.billing.pricing import Quantities, exact_text, quantities, rounded
from agent.core.billing.window import UsageWindow
from agent.core.errors import ConfigError, DeadlineError, ExhaustedError, InvalidArgumentError, PreconditionError
from agent.scheduler.usage.collector import UsageCollector
from agent.scheduler.usage.reconciliation import Reconciled
from agent.scheduler.usage.reports import UsageFilter, UsageLine, UsageReports
from agent.v1 import usage_service_pb2 as pb
from agent.v1 import usage_service_pb2_grpc
from agent.wire.convert_time import time_from_proto, time_to_proto
from agent.wire.convert_usage import window_from_proto, window_to_proto
from agent.wire.tokens import calling_node

MAX_BATCH = 500
MAX_RECONCILIATIONS = 2
MAX_RECONCILIATION_S = 600.0
WINDOWS_FOLLOW = "windows/"
"""Prefix of page tokens for the windows, which follow the rows."""
WINDOWS_PAGE = 2_000
"""Windows per page, about half a MiB."""
_GROUPS = {
    pb.ListUsageRequest.GROUPING_UNSPECIFIED: ("function",),
    pb.ListUsageRequest.GROUPING_FUNCTION: ("function",),
    pb.ListUsageRequest.GROUPING_INSTANCE: ("instance_uid", "function", "node"),
    pb.ListUsageRequest.GROUPING_NODE: ("node",),
    pb.ListUsageRequest.GROUPING_GPU_MODEL: ("gpu_model",),
}
"""The columns that group rows."""


class UsageServicer(usage_service_pb2_grpc.UsageServiceServicer):
    """Delegates to collector and reports; `wire.interceptors` turns errors into statuses."""

    def __init__(self, collector: UsageCollector, reports: UsageReports, book: PriceBook | ConfigError) -> None:
        """`book`: the prices, or why there are none: usage is collected then, and no cost is reported."""
        self._collector = collector
        self._reports = reports
        self._book = book
        self._reconciling = 0

    async def UploadUsageWindows(
        self, request: pb.UploadUsageWindowsRequest, context: object
    ) -> pb.UploadUsageWindowsResponse:
        """Stores an agent's windows. It may prune up to the marks in the answer, and stop sending refused windows. The
        node's name comes from its token."""
        node = calling_node()
        if len(request.windows) > MAX_BATCH:
            raise InvalidArgumentError("USAGE_BATCH_TOO_LARGE", f"send at most {MAX_BATCH} windows at once")
        windows: list[UsageWindow] = []
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
        """Rows by `grouping`, GPU model and price, totals over all rows, and with `include_windows` the windows."""
        groups = _GROUPS.get(request.grouping)
        if groups is None:
            raise InvalidArgumentError("USAGE_GROUP_UNKNOWN", "this scheduler does not know that grouping; update it")
        only = UsageFilter(
            function=request.function,
            node=request.node,
            gpu_model=request.gpu_model,
            start_wall_ns=time_from_proto(request.start_time) if request.HasField("start_time") else 0,
            end_wall_ns=time_from_proto(request.end_time) if request.HasField("end_time") else 0,
        )
        if request.include_windows and request.page_token.startswith(WINDOWS_FOLLOW):
            return await self._windows(only, request.page_token.removeprefix(WINDOWS_FOLLOW))
        if isinstance(self._book, ConfigError):
            text = f"{self._book.message}; then restart the scheduler. Usage is collected meanwhile"
            raise PreconditionError("PRICE_BOOK_INVALID", text)
        report = await self._reports.report(self._book, only, groups)
        shown, token = page(report.lines, request.page_size, request.page_token)
        return pb.ListUsageResponse(
            rows=[_row(line, dict(zip(groups, line.group, strict=True))) for line in shown],
            next_page_token=token or (WINDOWS_FOLLOW if request.include_windows else ""),
            total_cost=str(report.total_cost),
            total_always_on_cost=str(report.total_always_on_cost),
            unit=report.currency,
        )

    async def ReconcileUsage(
        self, request: pb.ReconcileUsageRequest, context: object
    ) -> AsyncIterator[pb.ReconcileUsageResponse]:
        """Instances with findings, one at a time, then the totals."""
        if self._reconciling >= MAX_RECONCILIATIONS:
            text = f"{MAX_RECONCILIATIONS} reconciliations, the maximum, are running; wait for one to end"
            raise ExhaustedError("TOO_MANY_CALLS", text)
        only = UsageFilter(
            function=request.function,
            node=request.node,
            start_wall_ns=time_from_proto(request.start_time) if request.HasField("start_time") else 0,
            end_wall_ns=time_from_proto(request.end_time) if request.HasField("end_time") else 0,
        )
        self._reconciling += 1
        try:
            async with asyncio.timeout(MAX_RECONCILIATION_S), aclosing(self._reports.reconcile(only)) as found:
                async for one in found:
                    message = _reconciliation(one)
                    if one.instance_uid:
                        yield pb.ReconcileUsageResponse(instance=message)
                    else:
                        yield pb.ReconcileUsageResponse(total=message)
        except TimeoutError:
            text = f"it takes more than {MAX_RECONCILIATION_S:g} s; ask for a shorter period or one function"
            raise DeadlineError("CALL_TOO_LONG", text) from None
        finally:
            self._reconciling -= 1

    async def _windows(self, only: UsageFilter, after: str) -> pb.ListUsageResponse:
        """A page of windows. `after`: key `<seq>/<uid>` of the previous page's last window, "" for the first page."""
        seq, _, uid = after.partition("/")
        if after and not (seq.isdecimal() and len(seq) <= MAX_TOKEN_DIGITS and uid):
            raise InvalidArgumentError("PAGE_TOKEN_INVALID", "page_token must come from the previous answer")
        found = await self._reports.windows(only, limit=WINDOWS_PAGE, after=(uid, int(seq)) if after else ("", -1))
        last = found[-1] if len(found) == WINDOWS_PAGE else None
        return pb.ListUsageResponse(
            windows=[window_to_proto(window) for window in found],
            next_page_token="" if last is None else f"{WINDOWS_FOLLOW}{last.seq}/{last.instance_uid}",
        )


def _reconciliation(found: Reconciled) -> pb.UsageReconciliation:
    return pb.UsageReconciliation(
        instance_uid=found.instance_uid,
        function=found.function,
        node=found.node,
        instance_count=found.instances,
        window_count=found.windows,
        gap_count=found.gaps.count,
        gap_ns=found.gaps.duration_ns,
        overlap_count=found.overlaps.count,
        overlap_ns=found.overlaps.duration_ns,
        estimated_count=found.estimated.count,
        estimated_ns=found.estimated.duration_ns,
        conflict_count=found.conflicts,
        findings=[
            pb.UsageFinding(
                kind=pb.UsageFinding.Kind.Value(f"KIND_{one.kind}"),
                seq=one.window.seq,
                boot_id=one.window.boot_id,
                start_time=time_to_proto(one.window.start_wall_ns),
                duration_ns=one.duration_ns,
            )
            for one in found.findings
        ],
    )


def _row(line: UsageLine, named: Mapping[str, str]) -> pb.UsageRow:
    amounts = [quantities(part) for part in line.sums]

    def total(quantity: Callable[[Quantities], Fraction]) -> str:
        return exact_text(sum((quantity(amount) for amount in amounts), Fraction(0)))

    row = pb.UsageRow(
        function=named.get("function", ""),
        instance_uid=named.get("instance_uid", ""),
        node=named.get("node", ""),
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
        unpriced_windows=line.unpriced,
    )
    if line.price is not None:
        row.factors.CopyFrom(_factors(line.price, line.gpu_model))
    return row


def _factors(price: Price, gpu_model: str) -> pb.PriceFactors:
    """Factors in the price book's currency: CUs times the price of a CU; 0 for a GPU model without a price."""
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

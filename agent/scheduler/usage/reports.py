"""Reports on the collected usage: sums, costs, single windows, and their reconciliation.

SQL forms sums per price and size, of whole seconds and of the rest (a sum of ns overflows 64 bits after 292 instance
years); Python multiplies them exactly. A window is at most a minute long and belongs as a whole to the time range and
the price in which it began, since it does not record when its active time was.

The time before an instance first held a GPU has no model. It counts as the model that the instance got later, so that
the always-on cost can include it. An instance that was never billed (say, its image was not found) adds nothing to it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import sqlalchemy as sa

from agent.core.billing.price_book import Price, PriceBook
from agent.core.billing.pricing import Cost, always_on_cost, cost, rounded
from agent.core.billing.window import UsageWindow
from agent.core.errors import ExhaustedError, InvalidArgumentError
from agent.core.natural_order import natural_key
from agent.core.types import SECOND_NS
from agent.scheduler.usage.collector import UsageDatabase
from agent.scheduler.usage.reconciliation import Reconciled, Reconciler
from agent.scheduler.usage.tables import CONFLICTS, WINDOW_COLUMNS, WINDOWS, window_of

GROUPS = ("function", "instance_uid", "node", "gpu_model", "state")
MAX_WINDOWS = 10_000
MAX_SUMS = 50_000
"""Bound on the memory of one report: a few hundred megabytes."""
NO_GPU_MODEL = "-"
"""In a filter: instances that never held a GPU."""
RECONCILE_PAGE = 2_000
_Key = tuple[tuple[str, ...], str, int]
"""Key of a line: group, GPU model, and start of its price's validity."""
_SIZES = ("gpu_count", "gpu_memory_bytes", "vcpu_millis", "memory_bytes", "disk_bytes")
_TIMES = ("active_ns", "idle_ns", "unbilled_ns")


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """Empty and 0 mean all. A window counts if it begins in [start, end), wall ns."""

    function: str = ""
    node: str = ""
    gpu_model: str = ""
    instance_uid: str = ""
    start_wall_ns: int = 0
    end_wall_ns: int = 0


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Sum of windows of the same sizes, model and price: a `pricing.Billable`. `group`: the values of the grouping
    columns; `price`: None before the first price."""

    group: tuple[str, ...]
    price: Price | None
    gpu_model: str
    gpu_count: int
    gpu_memory_bytes: int
    vcpu_millis: int
    memory_bytes: int
    disk_bytes: int
    active_ns: int
    idle_ns: int
    unbilled_ns: int
    invocations: int
    windows: int
    estimated: int
    lived: bool
    """Whether the instances were ever billed, in these windows or others."""


@dataclass(frozen=True, slots=True)
class UsageLine:
    """A line of a report; amounts are exact. `unpriced`: windows before the first price, whose cost is missing, and
    windows of a GPU model without a price, whose GPU cost is missing."""

    group: tuple[str, ...]
    gpu_model: str
    price: Price | None
    sums: tuple[UsageSum, ...]
    cost: Cost
    always_on_cost: Cost
    unpriced: int

    def total(self, name: str) -> int:
        """The line's sum of active_ns, idle_ns, unbilled_ns, invocations, windows or estimated."""
        return sum(int(getattr(part, name)) for part in self.sums)


@dataclass(frozen=True, slots=True)
class UsageReport:
    """`total_cost` is rounded once, from the exact sum: it may differ from the sum of the rounded lines."""

    currency: str
    group_by: tuple[str, ...]
    lines: tuple[UsageLine, ...]

    @property
    def total_cost(self) -> Decimal:
        return rounded(sum((line.cost.total for line in self.lines), Fraction(0)))

    @property
    def total_always_on_cost(self) -> Decimal:
        return rounded(sum((line.always_on_cost.total for line in self.lines), Fraction(0)))


class UsageReports:
    """Queries of the usage database; the size of every answer is bounded."""

    def __init__(self, database: UsageDatabase) -> None:
        self._database = database

    async def report(
        self, book: PriceBook, only: UsageFilter | None = None, group_by: Sequence[str] = ("function",)
    ) -> UsageReport:
        """Sums and costs: a line per group, GPU model and price, in that order.

        Raises InvalidArgumentError USAGE_GROUP_UNKNOWN, ExhaustedError USAGE_TOO_MANY_ROWS.
        """
        unknown = [name for name in group_by if name not in GROUPS]
        if unknown:
            raise InvalidArgumentError("USAGE_GROUP_UNKNOWN", f"group by {', '.join(GROUPS)}, not {unknown[0]!r}")
        groups = tuple(group_by)
        chosen = only or UsageFilter()
        # The whole report is computed in the thread: the gateway shares this loop.
        return await self._database.run(lambda: self._report(book, chosen, groups))

    def _report(self, book: PriceBook, only: UsageFilter, groups: tuple[str, ...]) -> UsageReport:
        lines: dict[_Key, list[UsageSum]] = {}
        for count, part in enumerate(self._sums(book, only, groups)):
            if count >= MAX_SUMS:
                text = f"more than {MAX_SUMS} sums; ask for a shorter time, for one function, or for sums by function"
                raise ExhaustedError("USAGE_TOO_MANY_ROWS", text)
            since = part.price.valid_from_wall_ns if part.price else -1
            lines.setdefault((part.group, part.gpu_model, since), []).append(part)
        return UsageReport(book.currency, groups, tuple(_line(lines[key]) for key in sorted(lines, key=_order)))

    async def windows(
        self, only: UsageFilter | None = None, *, limit: int = 1_000, after: tuple[str, int] = ("", -1)
    ) -> list[UsageWindow]:
        """At most `limit` windows in order of (instance_uid, seq), whose keys come after `after`."""
        query = _page(sa.select(*WINDOW_COLUMNS), only or UsageFilter(), after, min(limit, MAX_WINDOWS))
        return await self._database.run(lambda: [window_of(dict(row)) for row in self._rows(query)])

    async def reconcile(self, only: UsageFilter | None = None) -> AsyncGenerator[Reconciled, None]:
        """The instances with findings, by uid, then the totals of all. Reads page by page, so that other calls run in
        between and memory does not depend on the number of windows."""
        of_key = sa.and_(CONFLICTS.c.instance_uid == WINDOWS.c.instance_uid, CONFLICTS.c.seq == WINDOWS.c.seq)
        others = sa.select(sa.func.count()).select_from(CONFLICTS).where(of_key).scalar_subquery().label("others")
        columns = sa.select(*WINDOW_COLUMNS, others)
        reconciler = Reconciler()
        after = ("", -1)
        while True:
            query = _page(columns, only or UsageFilter(), after, RECONCILE_PAGE)
            done, after = await self._database.run(lambda query=query: self._feed(reconciler, query))  # type: ignore[misc]
            for one in done:
                if one.has_findings:
                    yield one
            if not after[0]:
                break
        yield reconciler.total

    def _feed(self, reconciler: Reconciler, query: sa.Select[Any]) -> tuple[list[Reconciled], tuple[str, int]]:
        """The instances that end in a page, and the page's last key; ("", -1) after the last page."""
        rows = self._rows(query)
        done = [reconciler.feed(window_of(dict(row)), int(row["others"])) for row in rows]
        last = len(rows) < RECONCILE_PAGE
        ended = [*done, reconciler.end()] if last else done
        after = ("", -1) if last else (str(rows[-1]["instance_uid"]), int(rows[-1]["seq"]))
        return [one for one in ended if one is not None], after

    def _rows(self, query: sa.Select[Any]) -> list[sa.RowMapping]:
        with self._database.engine.connect() as connection:
            return list(connection.execute(query).mappings())

    def _sums(self, book: PriceBook, only: UsageFilter, groups: tuple[str, ...]) -> Iterator[UsageSum]:
        known = _known(only)
        model = _model(known)
        lived = sa.func.coalesce(known.c.lived, 1).label("lived")
        names = [name for name in dict.fromkeys((*groups, *_SIZES)) if name != "gpu_model"]
        columns = [*(WINDOWS.c[name] for name in names), model.label("gpu_model"), lived]
        source = WINDOWS.outerjoin(known, known.c.uid == WINDOWS.c.instance_uid)
        for price, start, end in _periods(book):
            query = _where(sa.select(*columns, *_summed()).select_from(source), only, model)
            query = query.where(WINDOWS.c.start_wall_ns >= start)
            query = query.group_by(*(WINDOWS.c[name] for name in names), model, lived.element)
            if end is not None:
                query = query.where(WINDOWS.c.start_wall_ns < end)
            for row in self._rows(query.limit(MAX_SUMS + 1)):
                times = {name: int(row[f"{name}_s"]) * SECOND_NS + int(row[f"{name}_rest"]) for name in _TIMES}
                yield UsageSum(
                    group=tuple(str(row[name]) for name in groups),
                    price=price,
                    gpu_model=row["gpu_model"],
                    invocations=int(row["all_invocations"]),
                    windows=int(row["all_windows"]),
                    estimated=int(row["all_estimated"]),
                    lived=bool(row["lived"]),
                    **{name: row[name] for name in _SIZES},
                    **times,
                )


def _periods(book: PriceBook) -> Iterable[tuple[Price | None, int, int | None]]:
    yield None, 0, book.prices[0].valid_from_wall_ns
    yield from book.periods()


def _summed() -> list[sa.Label[Any]]:
    parts: list[sa.Label[Any]] = []
    for name in _TIMES:
        column = WINDOWS.c[name]
        parts.append(sa.func.sum(column // SECOND_NS).label(f"{name}_s"))
        parts.append(sa.func.sum(column % SECOND_NS).label(f"{name}_rest"))
    parts.append(sa.func.sum(WINDOWS.c.invocations).label("all_invocations"))
    parts.append(sa.func.count().label("all_windows"))
    parts.append(sa.func.sum(sa.case((WINDOWS.c.estimated, 1), else_=0)).label("all_estimated"))
    return parts


def _known(only: UsageFilter) -> sa.CTE:
    """The instances that have a window without a model or without billed time in the range: the model that each ever
    held, and whether it was ever billed (0 or 1)."""
    billed = WINDOWS.c.active_ns + WINDOWS.c.idle_ns
    incomplete = sa.select(WINDOWS.c.instance_uid).where(sa.or_(WINDOWS.c.gpu_model == "", billed == 0))
    within = _where(incomplete, only).distinct()
    return (
        sa.select(
            WINDOWS.c.instance_uid.label("uid"),
            sa.func.max(WINDOWS.c.gpu_model).label("model"),
            sa.func.max(sa.case((billed > 0, 1), else_=0)).label("lived"),
        )
        .where(WINDOWS.c.instance_uid.in_(within))
        .group_by(WINDOWS.c.instance_uid)
        .cte("known")
    )


def _model(known: sa.CTE) -> sa.ColumnElement[str]:
    return sa.case((WINDOWS.c.gpu_model == "", sa.func.coalesce(known.c.model, "")), else_=WINDOWS.c.gpu_model)


def _page(query: sa.Select[Any], only: UsageFilter, after: tuple[str, int], limit: int) -> sa.Select[Any]:
    """`query` restricted to the filter and to keys after `after`, in their order."""
    model = None
    if only.gpu_model:
        known = _known(only)
        model = _model(known)
        query = query.select_from(WINDOWS.outerjoin(known, known.c.uid == WINDOWS.c.instance_uid))
    key = sa.tuple_(WINDOWS.c.instance_uid, WINDOWS.c.seq)
    query = _where(query, only, model).where(key > sa.tuple_(sa.literal(after[0]), sa.literal(after[1])))
    return query.order_by(WINDOWS.c.instance_uid, WINDOWS.c.seq).limit(limit)


def _where(query: sa.Select[Any], only: UsageFilter, model: sa.ColumnElement[str] | None = None) -> sa.Select[Any]:
    """`query` restricted to the filter. `model`: the column that its GPU model is compared with; None ignores it."""
    for name in ("function", "node", "instance_uid"):
        value = getattr(only, name)
        if value:
            query = query.where(WINDOWS.c[name] == value)
    if only.gpu_model and model is not None:
        query = query.where(model == ("" if only.gpu_model == NO_GPU_MODEL else only.gpu_model))
    if only.start_wall_ns:
        query = query.where(WINDOWS.c.start_wall_ns >= only.start_wall_ns)
    if only.end_wall_ns:
        query = query.where(WINDOWS.c.start_wall_ns < only.end_wall_ns)
    return query


def _order(key: _Key) -> tuple[list[tuple[tuple[str | int, ...], str]], str, int]:
    """The order of a report's lines: m2 before m10."""
    group, gpu_model, since = key
    return [natural_key(part) for part in group], gpu_model, since


def _line(parts: list[UsageSum]) -> UsageLine:
    spent, always_on, unpriced = Cost(), Cost(), 0
    for part in parts:
        if part.price is None:
            unpriced += part.windows
            continue
        this = cost(part, part.price)
        spent += this
        if part.lived:
            always_on += always_on_cost(part, part.price)
            unpriced += part.windows if this.gpu_unpriced else 0
    first = parts[0]
    return UsageLine(first.group, first.gpu_model, first.price, tuple(parts), spent, always_on, unpriced)

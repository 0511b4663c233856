"""Questions to the collected usage: sums, costs, the windows themselves, and whether they fit together.

Sums are formed in SQL per price and size, whole seconds and the rest apart (a sum of ns overflows 64 bits after 292
instance years), and multiplied exactly in Python. A window is at most a minute long and belongs as a whole to the time
range and to the price in which it began: where its active time lies within it nobody knows.

The time before an instance first held a GPU has no model. It counts as that of the model which the instance got later,
so that always-on has a price for it. An instance of which nothing was ever billed (its image was never found) would not
have cost anything always on either.
"""

from __future__ import annotations

import json
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
from agent.core.types import SECOND_NS
from agent.scheduler.usage.collector import UsageDatabase
from agent.scheduler.usage.reconciliation import Reconciled, Reconciler
from agent.scheduler.usage.tables import CONFLICTS, WINDOW_COLUMNS, WINDOWS, window_of

GROUPS = ("function", "instance_uid", "node", "gpu_model", "state")
MAX_WINDOWS = 10_000
MAX_SUMS = 50_000
"""What one report may be made of: a few hundred megabytes less than what would hurt."""
NO_GPU_MODEL = "-"
"""In a filter: instances that never had a GPU."""
RECONCILE_PAGE = 2_000
_Key = tuple[tuple[str, ...], str, int]
"""Of a line: its group, GPU model, and since when its price is valid."""
_SIZES = ("gpu_count", "gpu_memory_bytes", "vcpu_millis", "memory_bytes", "disk_bytes")
_TIMES = ("active_ns", "idle_ns", "unbilled_ns")


@dataclass(frozen=True, slots=True)
class UsageFilter:
    """Empty and 0 mean all. The range is [start, end) of the windows' beginnings, wall ns."""

    function: str = ""
    node: str = ""
    gpu_model: str = ""
    instance_uid: str = ""
    start_wall_ns: int = 0
    end_wall_ns: int = 0


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Windows of the same sizes and model under one price, summed: a `pricing.Billable`. `group` has the values of
    the columns asked for; `price` is None before the first price."""

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
    """Whether anything was ever billed of the instances, in these windows or others."""


@dataclass(frozen=True, slots=True)
class UsageLine:
    """One line of a report. Amounts are exact; `cost` and `always_on_cost` hold their parts. `unpriced` windows
    have no price (too early, or an unknown GPU model: then their GPU part is missing)."""

    group: tuple[str, ...]
    gpu_model: str
    price: Price | None
    sums: tuple[UsageSum, ...]
    cost: Cost
    always_on_cost: Cost
    unpriced: int

    def total(self, name: str) -> int:
        """Sum of active_ns, idle_ns, unbilled_ns, invocations, windows or estimated over the line."""
        return sum(int(getattr(part, name)) for part in self.sums)


@dataclass(frozen=True, slots=True)
class UsageReport:
    """`total_cost` is rounded once, from the exact sum of the lines: it may differ from the sum of rounded lines."""

    currency: str
    group_by: tuple[str, ...]
    lines: tuple[UsageLine, ...]

    @property
    def total_cost(self) -> Decimal:
        return rounded(sum((line.cost.total for line in self.lines), Fraction(0)))

    @property
    def total_always_on_cost(self) -> Decimal:
        return rounded(sum((line.always_on_cost.total for line in self.lines), Fraction(0)))


@dataclass(frozen=True, slots=True)
class Conflict:
    """A window whose key was stored before with another payload. Neither is trusted more: the first is billed."""

    window: UsageWindow
    received_wall_ns: int


class UsageReports:
    """All calls run in the usage thread and are bounded in what they return."""

    def __init__(self, database: UsageDatabase) -> None:
        self._database = database

    async def report(
        self, book: PriceBook, only: UsageFilter | None = None, group_by: Sequence[str] = ("function",)
    ) -> UsageReport:
        """Sums and costs: a line per group, GPU model and price, in that order. ExhaustedError USAGE_TOO_MANY_ROWS."""
        unknown = [name for name in group_by if name not in GROUPS]
        if unknown:
            raise InvalidArgumentError("USAGE_GROUP_UNKNOWN", f"group by {', '.join(GROUPS)}, not {unknown[0]!r}")
        groups = tuple(group_by)
        chosen = only or UsageFilter()
        # In the thread to the last fraction: the gateway shares this loop.
        return await self._database.run(lambda: self._report(book, chosen, groups))

    def _report(self, book: PriceBook, only: UsageFilter, groups: tuple[str, ...]) -> UsageReport:
        lines: dict[_Key, list[UsageSum]] = {}
        for count, part in enumerate(self._sums(book, only, groups)):
            if count >= MAX_SUMS:
                text = f"more than {MAX_SUMS} sums; ask for a shorter time, one function, or sums by function"
                raise ExhaustedError("USAGE_TOO_MANY_ROWS", text)
            since = part.price.valid_from_wall_ns if part.price else -1
            lines.setdefault((part.group, part.gpu_model, since), []).append(part)
        return UsageReport(book.currency, groups, tuple(_line(lines[key]) for key in sorted(lines)))

    async def windows(
        self, only: UsageFilter | None = None, *, limit: int = 1_000, after: tuple[str, int] = ("", -1)
    ) -> list[UsageWindow]:
        """Windows in order of (instance_uid, seq) after that key, at most `limit`: page with the last one's key."""
        query = _page(sa.select(*WINDOW_COLUMNS), only or UsageFilter(), after, min(limit, MAX_WINDOWS))
        return await self._database.run(lambda: [window_of(dict(row)) for row in self._rows(query)])

    async def reconcile(self, only: UsageFilter | None = None) -> AsyncGenerator[Reconciled, None]:
        """The instances about which something is to be said, by uid, then the totals of all. Reads page by page:
        other calls get their turn in between, and the memory it takes does not depend on the number of windows."""
        of_key = sa.and_(CONFLICTS.c.instance_uid == WINDOWS.c.instance_uid, CONFLICTS.c.seq == WINDOWS.c.seq)
        others = sa.select(sa.func.count()).select_from(CONFLICTS).where(of_key).scalar_subquery().label("others")
        columns = sa.select(*WINDOW_COLUMNS, others)
        reconciler = Reconciler()
        after = ("", -1)
        while True:
            query = _page(columns, only or UsageFilter(), after, RECONCILE_PAGE)
            done, after = await self._database.run(lambda query=query: self._feed(reconciler, query))  # type: ignore[misc]
            for one in done:
                if one.anything:
                    yield one
            if not after[0]:
                break
        yield reconciler.total

    def _feed(self, reconciler: Reconciler, query: sa.Select[Any]) -> tuple[list[Reconciled], tuple[str, int]]:
        """Instances that a page has brought to their end, and its last key, ("", -1) after the last page."""
        rows = self._rows(query)
        done = [reconciler.feed(window_of(dict(row)), int(row["others"])) for row in rows]
        last = len(rows) < RECONCILE_PAGE
        ended = [*done, reconciler.end()] if last else done
        after = ("", -1) if last else (str(rows[-1]["instance_uid"]), int(rows[-1]["seq"]))
        return [one for one in ended if one is not None], after

    async def conflicts(self, limit: int = 100) -> list[Conflict]:
        """The newest conflicts first."""
        query = sa.select(CONFLICTS).order_by(CONFLICTS.c.received_wall_ns.desc()).limit(min(limit, MAX_WINDOWS))
        rows = await self._database.run(lambda: list(self._rows(query)))
        return [Conflict(window_of(json.loads(row["payload"])), row["received_wall_ns"]) for row in rows]

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
    """Of the instances with windows in range that don't tell themselves: the model that each held sooner or later, and
    whether anything was ever billed of it (0 or 1)."""
    billed = WINDOWS.c.active_ns + WINDOWS.c.idle_ns
    doubtful = sa.select(WINDOWS.c.instance_uid).where(sa.or_(WINDOWS.c.gpu_model == "", billed == 0))
    within = _where(doubtful, only).distinct()
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
    """The windows of `query` after that key, in order."""
    model = None
    if only.gpu_model:
        known = _known(only)
        model = _model(known)
        query = query.select_from(WINDOWS.outerjoin(known, known.c.uid == WINDOWS.c.instance_uid))
    key = sa.tuple_(WINDOWS.c.instance_uid, WINDOWS.c.seq)
    query = _where(query, only, model).where(key > sa.tuple_(sa.literal(after[0]), sa.literal(after[1])))
    return query.order_by(WINDOWS.c.instance_uid, WINDOWS.c.seq).limit(limit)


def _where(query: sa.Select[Any], only: UsageFilter, model: sa.ColumnElement[str] | None = None) -> sa.Select[Any]:
    """`model`: what a GPU model is compared with; without it all models pass."""
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

"""Questions to the collected usage: sums, costs, the windows themselves, and whether they fit together.

Sums are formed in SQL per price and size, whole seconds and the rest apart (a sum of ns overflows 64 bits after 292
instance years), and multiplied exactly in Python. A window belongs to the time range and to the price in which it
began; it never spans a price change that its agent knew.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import sqlalchemy as sa

from agent.core.errors import ExhaustedError, InvalidArgumentError
from agent.core.price_book import Price, PriceBook
from agent.core.pricing import Cost, always_on_cost, cost, rounded
from agent.core.types import SECOND_NS
from agent.core.usage_window import Window
from agent.scheduler.usage import UsageDatabase
from agent.scheduler.usage_tables import CONFLICTS, WINDOW_COLUMNS, WINDOWS, window_of

GROUPS = ("function", "instance_uid", "node", "gpu_model", "state")
MAX_WINDOWS = 10_000
MAX_SUMS = 50_000
"""What one report may be made of: a few hundred megabytes less than what would hurt."""
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

    window: Window
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
        _place(lines)
        return UsageReport(book.currency, groups, tuple(_line(lines[key]) for key in sorted(lines)))

    async def windows(
        self, only: UsageFilter | None = None, *, limit: int = 1_000, after: tuple[str, int] = ("", -1)
    ) -> list[Window]:
        """Windows in order of (instance_uid, seq) after that key, at most `limit`: page with the last one's key."""
        key = sa.tuple_(WINDOWS.c.instance_uid, WINDOWS.c.seq)
        query = (
            _where(sa.select(*WINDOW_COLUMNS), only or UsageFilter())
            .where(key > sa.tuple_(sa.literal(after[0]), sa.literal(after[1])))
            .order_by(WINDOWS.c.instance_uid, WINDOWS.c.seq)
            .limit(min(limit, MAX_WINDOWS))
        )
        return await self._database.run(lambda: [window_of(dict(row)) for row in self._rows(query)])

    async def conflicts(self, limit: int = 100) -> list[Conflict]:
        """The newest conflicts first."""
        query = sa.select(CONFLICTS).order_by(CONFLICTS.c.received_wall_ns.desc()).limit(min(limit, MAX_WINDOWS))
        rows = await self._database.run(lambda: list(self._rows(query)))
        return [Conflict(window_of(json.loads(row["payload"])), row["received_wall_ns"]) for row in rows]

    def _rows(self, query: sa.Select[Any]) -> list[sa.RowMapping]:
        with self._database.engine.connect() as connection:
            return list(connection.execute(query).mappings())

    def _sums(self, book: PriceBook, only: UsageFilter, groups: tuple[str, ...]) -> Iterator[UsageSum]:
        columns = list(dict.fromkeys((*groups, "gpu_model", *_SIZES)))
        for price, start, end in _periods(book):
            query = _where(sa.select(*(WINDOWS.c[name] for name in columns), *_summed()), only)
            query = query.where(WINDOWS.c.start_wall_ns >= start).group_by(*(WINDOWS.c[name] for name in columns))
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
                    **{name: row[name] for name in _SIZES},
                    **times,
                )


def _place(lines: dict[_Key, list[UsageSum]]) -> None:
    """Time before an instance first held a GPU has no model (and is unbilled): it goes to the line of the model that
    the same group had then, so that nobody reads two lines for one function, and always-on has a price for it."""
    models = {(group, since): model for group, model, since in sorted(lines, reverse=True) if model}
    for group, model, since in list(lines):
        found = models.get((group, since), "")
        if not model and found:
            parts = lines.pop((group, model, since))
            lines[group, found, since] += [replace(part, gpu_model=found) if part.gpu_count else part for part in parts]


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


def _where(query: sa.Select[Any], only: UsageFilter) -> sa.Select[Any]:
    for name in ("function", "node", "gpu_model", "instance_uid"):
        value = getattr(only, name)
        if value:
            query = query.where(WINDOWS.c[name] == value)
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
        spent, always_on = spent + this, always_on + always_on_cost(part, part.price)
        unpriced += part.windows if this.gpu_unpriced else 0
    first = parts[0]
    return UsageLine(first.group, first.gpu_model, first.price, tuple(parts), spent, always_on, unpriced)

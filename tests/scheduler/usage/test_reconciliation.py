"""Reconciliation of an instance's windows, in memory and page by page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.billing.window import UsageWindow
from agent.scheduler.usage import reports as usage_reports
from agent.scheduler.usage.collector import UsageCollector, UsageDatabase
from agent.scheduler.usage.reconciliation import MAX_FINDINGS, Amount, Finding, FindingKind, Reconciled, Reconciler
from agent.scheduler.usage.reports import UsageFilter, UsageReports
from tests.contract.test_stores import window

NODE = "gpu-7"
WALL = window().start_wall_ns


def key(w: UsageWindow) -> tuple[str, int]:
    return (w.instance_uid, w.seq)


def findings(windows: list[UsageWindow]) -> list[Finding]:
    reconciler = Reconciler()
    done = [*(reconciler.feed(one) for one in windows), reconciler.end()]
    return [finding for one in done if one is not None for finding in one.findings]


async def all_of(reports: UsageReports, only: UsageFilter | None = None) -> list[Reconciled]:
    return [one async for one in reports.reconcile(only)]


def test_a_contiguous_ledger_has_no_findings() -> None:
    restarted = replace(window(seq=3), boot_id="boot-b", start_mono_ns=5, end_mono_ns=105)
    assert findings([window(seq=0), window(seq=1), restarted, window("i-other", seq=9)]) == []


def test_gaps_overlaps_and_estimates_are_found() -> None:
    early = replace(window(seq=3), start_mono_ns=280, end_mono_ns=380)
    ledger = [window(seq=0), window(seq=2), early, replace(window("i-b"), estimated=True)]
    assert [(*key(f.window), f.kind, f.duration_ns) for f in findings(ledger)] == [
        ("i-ocr-1", 2, "GAP", 100),
        ("i-ocr-1", 3, "OVERLAP", 20),
        ("i-b", 0, "ESTIMATED", 100),
    ]


def test_findings_beyond_the_limit_are_only_counted() -> None:
    reconciler = Reconciler()
    for seq in range(0, 4 * MAX_FINDINGS, 2):
        assert reconciler.feed(window(seq=seq)) is None
    found = reconciler.end()
    assert found is not None
    assert found.gaps == Amount(2 * MAX_FINDINGS - 1, 100 * (2 * MAX_FINDINGS - 1))
    assert [one.window.seq for one in found.findings] == list(range(2, 2 * MAX_FINDINGS + 2, 2))
    assert reconciler.total.gaps == found.gaps
    assert reconciler.end() is None


@pytest.mark.parametrize("page", [1, 2, 3, 5, 7, 8, 9, 2_000])
async def test_wherever_a_page_ends_the_same_is_found(
    page: int, collector: UsageCollector, database: UsageDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight windows of three instances, one of them in order."""
    monkeypatch.setattr(usage_reports, "RECONCILE_PAGE", page)
    ledger = [
        *(window("i-a", seq) for seq in (0, 1, 3)),
        *(window("i-b", seq) for seq in (0, 1)),
        window("i-c", 0),
        replace(window("i-c", 1), start_mono_ns=90, active_ns=0, idle_ns=110),
        replace(window("i-c", 2), estimated=True),
    ]
    await collector.accept(NODE, ledger)
    for active_ns in (50, 60):
        await collector.accept(NODE, [window("i-c", 2, active_ns=active_ns)])
    first, second, total = await all_of(UsageReports(database))
    assert (first.instance_uid, first.windows, first.gaps, first.conflicts) == ("i-a", 3, Amount(1, 100), 0)
    assert (second.instance_uid, second.function, second.node) == ("i-c", "ocr", NODE)
    assert [(one.kind, one.window.seq) for one in second.findings] == [
        (FindingKind.OVERLAP, 1),
        (FindingKind.ESTIMATED, 2),
        (FindingKind.CONFLICT, 2),
    ]
    assert total == Reconciled(
        instances=3, windows=8, gaps=Amount(1, 100), overlaps=Amount(1, 10), estimated=Amount(1, 100), conflicts=2
    )


async def test_reconciliation_keeps_to_the_filter(collector: UsageCollector, database: UsageDatabase) -> None:
    await collector.accept(NODE, [window("i-a", 0), window("i-a", 2), replace(window("i-b", 0), function="llm")])
    reports = UsageReports(database)
    assert [one.windows for one in await all_of(reports, UsageFilter(function="llm"))] == [1]
    assert [one.windows for one in await all_of(reports, UsageFilter(node="gpu-8"))] == [0]
    assert [one.windows for one in await all_of(reports, UsageFilter(start_wall_ns=WALL + 200))] == [1]
    assert [one.windows for one in await all_of(reports, UsageFilter(function="ocr"))] == [2, 2]


async def test_an_empty_ledger_is_in_order(database: UsageDatabase) -> None:
    assert await all_of(UsageReports(database)) == [Reconciled()]

"""Usage is kept for the retention time, by default for ever."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import sqlalchemy as sa

from agent.scheduler.usage import retention as usage_retention
from agent.scheduler.usage.collector import UsageCollector, UsageDatabase
from agent.scheduler.usage.reports import UsageReports
from agent.scheduler.usage.retention import UsageRetention
from tests.contract.test_stores import window
from tests.fakes.clock import FakeClock
from tests.scheduler.conftest import conflicts
from tests.scheduler.usage.test_collector import NODE

KEEP_NS = 1_000


async def test_what_is_too_old_goes_and_the_rest_stays(
    database: UsageDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_retention, "BATCH", 3)
    clock = FakeClock()
    now = clock.wall_ns()
    collector = UsageCollector(database, clock)
    ages = [5_000, 4_000, 3_000, 2_000, KEEP_NS + 1, KEEP_NS, 10]
    windows = [replace(window(seq=seq), start_wall_ns=now - age) for seq, age in enumerate(ages)]
    await collector.accept(NODE, windows)
    await collector.accept(NODE, [replace(windows[0], invocations=9), replace(windows[6], invocations=9)])
    retention = UsageRetention(database, clock, KEEP_NS)
    assert await retention.prune() == 5
    reports = UsageReports(database)
    assert await reports.windows() == windows[5:]
    assert len(await conflicts(database)) == 2, "they are new"
    assert await retention.prune() == 0
    clock.advance(10 * KEEP_NS)
    assert await retention.prune() == 4
    assert (await reports.windows(), await conflicts(database)) == ([], [])


async def test_uploads_run_between_the_batches_of_a_prune(
    database: UsageDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_retention, "BATCH", 1)
    clock = FakeClock()
    clock.advance(10**18)
    collector = UsageCollector(database, clock)
    await collector.accept(NODE, [window(seq=seq) for seq in range(20)])
    pruning = asyncio.create_task(UsageRetention(database, clock, KEEP_NS).prune())
    await asyncio.sleep(0)
    late = replace(window(seq=20), start_wall_ns=clock.wall_ns() - 1)
    assert (await collector.accept(NODE, [late])).marks == {"i-ocr-1": 20}
    assert not pruning.done()
    assert await pruning == 20
    assert await UsageReports(database).windows() == [late]


async def test_a_database_that_fails_is_tried_again(
    database: UsageDatabase, collector: UsageCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_retention, "PRUNE_S", 0.0)
    clock = FakeClock()
    clock.advance(10**18)
    retention = UsageRetention(database, clock, KEEP_NS)
    await collector.accept(NODE, [window()])
    real, failures = retention._delete, [sa.exc.OperationalError("DELETE", {}, OSError())]

    def delete(statement: sa.Delete) -> int:
        if failures:
            raise failures.pop()
        return real(statement)

    monkeypatch.setattr(retention, "_delete", delete)
    running = asyncio.create_task(retention.run())
    async with asyncio.timeout(10):
        while await UsageReports(database).windows():
            assert not running.done()
    assert failures == []
    running.cancel()


async def test_without_a_retention_time_nothing_is_pruned(database: UsageDatabase, collector: UsageCollector) -> None:
    await collector.accept(NODE, [replace(window(), start_wall_ns=1)])
    running = asyncio.create_task(UsageRetention(database, FakeClock(), 0).run())
    await asyncio.sleep(0)
    assert len(await UsageReports(database).windows()) == 1
    assert not running.done()
    running.cancel()

"""Usage for the metrics: GPU time by kind, each window once, of functions that are deployed."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from agent.scheduler.usage.collector import UsageCollector, UsageDatabase
from agent.scheduler.usage.totals import UsageTotals
from tests.contract.test_stores import window
from tests.fakes.clock import FakeClock


def test_time_counts_for_every_gpu_and_vcpu() -> None:
    totals = UsageTotals(lambda: ["ocr", "idle"])
    one = replace(window(), function="ocr", gpu_count=2, vcpu_millis=500, active_ns=3, idle_ns=5, unbilled_ns=7)
    totals.add([one, one])
    assert list(totals.all()) == ["idle", "ocr"]
    assert totals.all()["ocr"].gpu_ns == {"active": 12, "idle": 20, "unbilled": 28}
    assert totals.all()["ocr"].vcpu_milli_ns["active"] == 3_000
    assert set(totals.all()["idle"].gpu_ns.values()) == {0}


def test_what_is_not_deployed_is_not_kept() -> None:
    names = ["ocr"]
    totals = UsageTotals(lambda: names)
    totals.add([replace(window(), function="other")])
    totals.add([replace(window(), function="ocr")])
    names.clear()
    assert totals.all() == {}
    names.append("ocr")
    assert totals.all()["ocr"].gpu_ns["active"] == 0


async def test_a_window_that_is_uploaded_again_counts_once(tmp_path: Path) -> None:
    database = UsageDatabase.at(f"sqlite:///{tmp_path}/usage.db")
    await database.open()
    one = window()
    totals = UsageTotals(lambda: [one.function])
    collector = UsageCollector(database, FakeClock(), stored=totals.add)
    for _ in range(3):
        await collector.accept(one.node, [one, one])
    await asyncio.sleep(0)  # what the database's thread has posted
    assert totals.all()[one.function].gpu_ns["active"] == one.active_ns * one.gpu_count > 0
    database.close()

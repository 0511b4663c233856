"""Collected usage: each window once, conflicts kept, costs exact, gaps found."""

from __future__ import annotations

import asyncio
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
import yaml

from agent.core.billing.price_book import PriceBook, parse_price_book
from agent.core.billing.pricing import rounded
from agent.core.billing.window import UsageWindow
from agent.core.errors import ExhaustedError, InvalidArgumentError, UnavailableError
from agent.core.types import SECOND_NS
from agent.scheduler.usage.collector import (
    MAX_BATCH,
    MAX_CONFLICTS_PER_KEY,
    Accepted,
    RejectedWindow,
    UsageCollector,
    UsageDatabase,
)
from agent.scheduler.usage.reports import UsageFilter, UsageReports
from tests.contract.test_stores import window
from tests.core.billing.oracle import cost_of_windows
from tests.fakes.clock import FakeClock
from tests.scheduler.conftest import conflicts

EXAMPLE = Path(__file__).parents[3] / "systemd" / "price-book.example.yaml"
NODE = "gpu-7"
WALL = window().start_wall_ns


def book(*valid_from: str) -> PriceBook:
    (price,) = yaml.safe_load(EXAMPLE.read_text())["prices"]
    starts = valid_from or ("2023-01-01",)
    prices = [{**price, "valid_from": start, "unit_price": n + 1} for n, start in enumerate(starts)]
    return parse_price_book({"prices": prices})


def key(w: UsageWindow) -> tuple[str, int]:
    return (w.instance_uid, w.seq)


async def test_an_upload_repeated_after_a_lost_answer_counts_once(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    batch = [window(seq=0), window(seq=1), window("i-ocr-2")]
    first = await collector.accept(NODE, batch)
    again = await collector.accept(NODE, [*batch, window(seq=2), window(seq=2)])
    assert first == Accepted(tuple(map(key, batch)))
    assert again.conflicts == ()
    assert again.marks == {"i-ocr-1": 2, "i-ocr-2": 0}
    assert await UsageReports(database).windows() == [*batch[:2], window(seq=2), window("i-ocr-2")]


async def test_the_same_key_with_another_payload_is_kept_as_a_conflict(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    await collector.accept(NODE, [window(active_ns=10)])
    for _ in range(2):
        accepted = await collector.accept(NODE, [window(active_ns=99)])
        assert accepted == Accepted((("i-ocr-1", 0),), (("i-ocr-1", 0),))
    reports = UsageReports(database)
    assert await reports.windows() == [window(active_ns=10)]
    assert await conflicts(database) == [window(active_ns=99)]


async def test_a_conflict_within_one_batch_is_found(collector: UsageCollector, database: UsageDatabase) -> None:
    accepted = await collector.accept(NODE, [window(active_ns=1), window(active_ns=2)])
    assert accepted.conflicts == (("i-ocr-1", 0),)
    assert await UsageReports(database).windows() == [window(active_ns=1)]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (replace(window(seq=1), node="gpu-8"), "USAGE_FOREIGN_NODE"),
        (window(seq=1, sealed=False), "USAGE_UNSEALED"),
        (replace(window(seq=1), active_ns=50), "USAGE_INVALID"),
        (replace(window(seq=1), active_ns=-10, idle_ns=110), "USAGE_INVALID"),
        (replace(window(seq=1), memory_bytes=1 << 63), "USAGE_INVALID"),
        (replace(window(seq=1), instance_uid=""), "USAGE_INVALID"),
        (replace(window(seq=1), gpu_model="NVIDIA\0L20"), "USAGE_INVALID"),
    ],
)
async def test_what_may_not_be_is_refused_alone_and_holds_the_mark(
    bad: UsageWindow, reason: str, collector: UsageCollector, database: UsageDatabase
) -> None:
    accepted = await collector.accept(NODE, [window(seq=0), bad, window(seq=2)])
    assert accepted.refused == (RejectedWindow(key(bad), reason),)
    assert accepted.acks == (("i-ocr-1", 0), ("i-ocr-1", 2))
    assert accepted.marks == {"i-ocr-1": 0 if bad.instance_uid else 2}
    assert await UsageReports(database).windows() == [window(seq=0), window(seq=2)]


async def test_a_batch_is_bounded(collector: UsageCollector) -> None:
    with pytest.raises(InvalidArgumentError, match="at most"):
        await collector.accept(NODE, [window()] * (MAX_BATCH + 1))


async def test_a_full_batch_fits_the_database(collector: UsageCollector, database: UsageDatabase) -> None:
    batch = [window(f"i-{n:04}") for n in range(MAX_BATCH)]
    await collector.accept(NODE, batch)
    assert (await collector.accept(NODE, batch)).conflicts == ()
    assert len(await UsageReports(database).windows(limit=MAX_BATCH + 1)) == MAX_BATCH


async def test_the_report_costs_exactly_what_its_windows_cost(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    windows = [
        replace(
            window(f"i-{n % 3}", n, active_ns=n),
            function=("ocr", "llm")[n % 2],
            gpu_model=("NVIDIA L20", "NVIDIA A10")[n % 3 == 0],
            vcpu_millis=1_000 * (1 + n % 4),
        )
        for n in range(60)
    ]
    await collector.accept(NODE, windows)
    prices = book()
    report = await UsageReports(database).report(prices)
    spent, always_on, _ = cost_of_windows(windows, prices)
    assert sum(line.cost.total for line in report.lines) == spent.total
    assert report.total_cost == rounded(spent.total)
    assert report.total_always_on_cost == rounded(always_on.total) > report.total_cost
    assert [(line.group, line.gpu_model) for line in report.lines] == [
        (("llm",), "NVIDIA A10"),
        (("llm",), "NVIDIA L20"),
        (("ocr",), "NVIDIA A10"),
        (("ocr",), "NVIDIA L20"),
    ]
    assert sum(line.total("windows") for line in report.lines) == 60
    assert sum(line.total("active_ns") for line in report.lines) == sum(range(60))


async def test_each_window_is_priced_by_the_price_of_its_beginning(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    prices = book("2023-01-01", "2024-01-01")
    boundary = prices.prices[1].valid_from_wall_ns
    await collector.accept(
        NODE, [replace(window(seq=0), start_wall_ns=boundary - 1), replace(window(seq=1), start_wall_ns=boundary)]
    )
    old, new = (await UsageReports(database).report(prices)).lines
    assert new.cost.total == 2 * old.cost.total
    too_late = await UsageReports(database).report(book("2025-01-01"))
    assert [line.unpriced for line in too_late.lines] == [2]
    assert not too_late.total_cost


async def test_sums_beyond_64_bits_of_nanoseconds(collector: UsageCollector, database: UsageDatabase) -> None:
    century = 100 * 365 * 86_400 * SECOND_NS + 7
    huge = [replace(window(f"i-{n}"), end_mono_ns=century, active_ns=0, idle_ns=century) for n in range(5)]
    await collector.accept(NODE, huge)
    (line,) = (await UsageReports(database).report(book())).lines
    assert line.total("idle_ns") == 5 * century > 1 << 63


async def test_pages_are_ordered_by_code_point_in_any_locale(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    await collector.accept(NODE, [window(uid) for uid in ("i-a", "i-B", "i_b", "i-é", "i-b")])
    found = [one.instance_uid for one in await UsageReports(database).windows()]
    assert found == sorted(found) == ["i-B", "i-a", "i-b", "i-é", "i_b"]


async def test_a_sequence_beyond_32_bits_can_be_paged_after(collector: UsageCollector, database: UsageDatabase) -> None:
    await collector.accept(NODE, [window(seq=1 << 40), window(seq=(1 << 40) + 1)])
    assert [one.seq for one in await UsageReports(database).windows(after=("i-ocr-1", 1 << 40))] == [(1 << 40) + 1]


async def test_filters_and_groups(collector: UsageCollector, database: UsageDatabase) -> None:
    await collector.accept(NODE, [window(seq=n) for n in range(4)])
    await collector.accept("gpu-8", [replace(window("i-b"), node="gpu-8", state="FROZEN")])
    reports = UsageReports(database)
    by_node = await reports.report(book(), group_by=("node", "state"))
    assert [(line.group, line.total("windows")) for line in by_node.lines] == [
        (("gpu-7", "RUNNING"), 4),
        (("gpu-8", "FROZEN"), 1),
    ]
    chosen = UsageFilter(node=NODE, function="ocr", start_wall_ns=WALL + 100, end_wall_ns=WALL + 300)
    assert [w.seq for w in await reports.windows(chosen)] == [1, 2]
    assert [w.seq for w in await reports.windows(UsageFilter(instance_uid="i-b"))] == [0]
    assert [key(w) for w in await reports.windows(limit=2, after=("i-b", 0))] == [("i-ocr-1", 0), ("i-ocr-1", 1)]
    with pytest.raises(InvalidArgumentError, match="group by"):
        await reports.report(book(), group_by=("password",))


async def test_an_empty_ledger_costs_nothing(database: UsageDatabase) -> None:
    report = await UsageReports(database).report(book())
    assert (report.lines, str(report.total_cost)) == ((), "0.000000")


# ---- the database --------------------------------------------------------------------------------------------


async def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    database = UsageDatabase.at(f"sqlite:///{tmp_path}/scheduler.db")
    await database.open()
    database.close()
    mode = await asyncio.to_thread(lambda: (tmp_path / "scheduler.db").stat().st_mode)
    assert stat.S_IMODE(mode) == 0o600


async def test_a_failing_database_is_reported_without_its_url(tmp_path: Path) -> None:
    broken = UsageDatabase.at(f"sqlite:///{tmp_path}/nowhere/secret.db")
    with pytest.raises(UnavailableError, match="STORE_FAILED") as caught:
        await broken.open()
    assert "secret" not in str(caught.value)
    broken.close()


async def test_waiting_calls_are_bounded_and_have_a_deadline(tmp_path: Path) -> None:
    slow = UsageDatabase(sa.create_engine(f"sqlite:///{tmp_path}/x.db"), deadline_s=0.1, queue_length=1)
    hold, held = asyncio.Event(), asyncio.get_running_loop()

    def block() -> None:
        asyncio.run_coroutine_threadsafe(hold.wait(), held).result(10)

    async with asyncio.timeout(5):
        blocked = asyncio.create_task(slow.run(block))
        await asyncio.sleep(0)
        with pytest.raises(ExhaustedError, match="USAGE_BUSY"):
            await slow.run(lambda: None)
        with pytest.raises(UnavailableError, match="no answer"):
            await blocked
        hold.set()
    slow.close()


async def test_a_node_does_not_upload_the_usage_of_another_node_s_instance(database: UsageDatabase) -> None:
    """Clients see uids: an intruder on one node could upload another node's next window first."""
    owners = {"i-ocr-1": "gpu-8"}
    collector = UsageCollector(database, FakeClock(), lambda uid: owners.get(uid, ""))
    accepted = await collector.accept(NODE, [window(), window("i-ocr-2")])
    assert accepted == Accepted((("i-ocr-2", 0),), (), (RejectedWindow(("i-ocr-1", 0), "USAGE_FOREIGN_INSTANCE"),))


async def test_conflicts_kept_for_one_window_are_bounded(collector: UsageCollector, database: UsageDatabase) -> None:
    for active_ns in range(MAX_CONFLICTS_PER_KEY + 5):
        await collector.accept(NODE, [window(active_ns=active_ns)])
    assert len(await conflicts(database)) == MAX_CONFLICTS_PER_KEY


async def test_time_before_the_first_gpu_is_no_line_of_its_own(
    collector: UsageCollector, database: UsageDatabase
) -> None:
    """The model is unknown before the first grant; always-on uses the price of the later model."""
    before = replace(window(seq=0, active_ns=0), gpu_model="", gpu_uuids=(), idle_ns=0, unbilled_ns=100)
    await collector.accept(NODE, [before, window(seq=1, active_ns=100)])
    (line,) = (await UsageReports(database).report(book())).lines
    assert (line.gpu_model, line.total("windows"), line.unpriced) == ("NVIDIA L20", 2, 0)
    alone, _, _ = cost_of_windows([window(seq=1, active_ns=100)], book())
    assert line.cost.total == alone.total + line.cost.invocations / 2
    assert line.always_on_cost.gpu == 2 * alone.gpu

"""The ledger from meters to the store: flushes, seals, recovery, and a disk that fails or hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from agent.adapters.store.node_store import NodeStore
from agent.core.billing.unwritten import UnwrittenWindows
from agent.core.billing.window import UsageWindow
from agent.core.errors import UnavailableError
from agent.core.types import GIB, SECOND_NS, FunctionSpec, GpuNeed, InstanceState
from agent.host.billing.billing import Billing, BillingOptions
from agent.ports import LedgerStore
from tests.contract.test_stores import window
from tests.fakes.clock import FakeClock
from tests.fakes.stores import FailingStore, MemoryStore

OCR = FunctionSpec("ocr", gpu=GpuNeed(count=1))


def billing(clock: FakeClock, store: LedgerStore, settings: BillingOptions | None = None) -> Billing:
    return Billing(
        clock,
        store,
        node="gpu-7",
        boot_id="boot-a",
        settings=settings,
        card_bytes={"GPU-0": 24 * GIB},
    )


async def flushed(book: Billing, clock: FakeClock, by_ns: int = SECOND_NS) -> None:
    clock.advance(by_ns)
    assert await book.flush()


def check_ledger(windows: Sequence[UsageWindow]) -> None:
    for before, after in pairwise(windows):
        assert (before.end_mono_ns, before.seq) == (after.start_mono_ns, after.seq - 1)


async def test_a_life_from_start_to_stop_is_one_contiguous_ledger() -> None:
    clock, store = FakeClock(), MemoryStore()
    book = billing(clock, store)
    meter = book.open("i-ocr-1", OCR, InstanceState.STARTING, unbilled=True)
    clock.advance(2 * SECOND_NS)
    book.placed("i-ocr-1", "NVIDIA A10", ("GPU-0",))
    book.changed("i-ocr-1", InstanceState.STARTING)
    clock.advance(3 * SECOND_NS)
    book.changed("i-ocr-1", InstanceState.RUNNING)
    meter.request_began(clock.monotonic_ns())
    clock.advance(SECOND_NS)
    meter.request_ended(clock.monotonic_ns())
    clock.advance(SECOND_NS)
    book.changed("i-ocr-1", InstanceState.STOPPED)
    assert await book.flush()
    ledger = await store.read_windows()
    check_ledger(ledger)
    assert [(w.state, w.active_ns, w.idle_ns, w.unbilled_ns, w.sealed) for w in ledger] == [
        ("STARTING", 0, 0, 2 * SECOND_NS, True),
        ("STARTING", 0, 3 * SECOND_NS, 0, True),
        ("RUNNING", SECOND_NS, SECOND_NS, 0, True),
    ]
    assert {(w.gpu_model, w.gpu_memory_bytes) for w in ledger[1:]} == {("NVIDIA A10", 24 * GIB)}
    assert book.totals("i-ocr-1") == (SECOND_NS, 4 * SECOND_NS, 2 * SECOND_NS)
    assert book.open_windows() == []


async def test_all_open_windows_are_written_in_one_transaction_per_second() -> None:
    clock, store = FakeClock(), MemoryStore()
    book = billing(clock, store)
    for n in range(3):
        book.open(f"i-{n}", OCR, InstanceState.FROZEN)
    book.start()
    clock.advance(SECOND_NS)
    async with asyncio.timeout(5):
        await store.attempted.wait()
    assert [len(batch) for batch in store.upserts] == [3]
    assert all(not w.sealed and w.idle_ns == SECOND_NS for w in store.upserts[0])
    assert await book.stop()
    assert clock.next_timer_ns is None


async def test_windows_are_sealed_after_a_minute() -> None:
    clock, store = FakeClock(), MemoryStore()
    book = billing(clock, store)
    book.open("i-ocr-1", OCR, InstanceState.RUNNING)
    book.start()
    clock.advance(150 * SECOND_NS)
    assert await book.stop()
    ledger = await store.read_windows()
    check_ledger(ledger)
    assert [(w.idle_ns // SECOND_NS, w.sealed) for w in ledger] == [(60, True), (60, True), (30, False)]


async def test_sealed_windows_on_disk_are_announced() -> None:
    clock, store, announced = FakeClock(), MemoryStore(), asyncio.Event()
    book = Billing(clock, store, node="gpu-7", boot_id="boot-a", on_written=announced.set)
    book.open("i-ocr-1", OCR, InstanceState.RUNNING)
    await flushed(book, clock)
    after_open_ones = announced.is_set()
    book.changed("i-ocr-1", InstanceState.FAILED)
    await flushed(book, clock)
    assert (after_open_ones, announced.is_set()) == (False, True)


# ---- recovery ------------------------------------------------------------------------------------------------


async def test_kill_and_recovery_on_the_real_store(tmp_path: Path) -> None:
    """The agent dies between flushes; one instance lives on, one is gone, and a third had properly ended."""
    clock, store = FakeClock(), await NodeStore.open(tmp_path)
    before = billing(clock, store)
    living = before.open("i-living", OCR, InstanceState.RUNNING)
    before.open("i-gone", OCR, InstanceState.RUNNING)
    before.open("i-ended", OCR, InstanceState.RUNNING)
    living.request_began(clock.monotonic_ns())
    clock.advance(SECOND_NS)
    before.changed("i-ended", InstanceState.STOPPED)
    await flushed(before, clock)
    clock.advance(SECOND_NS // 2)
    await store.close()

    store = await NodeStore.open(tmp_path)
    after = billing(clock, store)
    clock.advance(10 * SECOND_NS)
    await after.load()
    after.open("i-living", OCR, InstanceState.RUNNING)
    after.complete_ended()
    await flushed(after, clock)
    gap = 10 * SECOND_NS + SECOND_NS // 2
    ledger = await store.read_windows("i-living")
    check_ledger(ledger)
    assert [(w.active_ns, w.idle_ns, w.estimated) for w in ledger] == [
        (2 * SECOND_NS, 0, False),
        (0, gap, True),
        (0, SECOND_NS, False),
    ]
    gone = await store.read_windows("i-gone")
    check_ledger(gone)
    assert [(w.idle_ns, w.unbilled_ns, w.sealed) for w in gone] == [(2 * SECOND_NS, 0, True), (0, gap, True)]
    assert len(await store.read_windows("i-ended")) == 1
    await store.close()


async def test_an_instance_that_ends_at_the_moment_of_a_change_is_closed_on_disk() -> None:
    clock, store = FakeClock(), MemoryStore()
    book = billing(clock, store)
    book.open("i-ocr-1", OCR, InstanceState.RUNNING)
    clock.advance(SECOND_NS)
    book.changed("i-ocr-1", InstanceState.STOPPING)
    assert await book.flush()
    book.changed("i-ocr-1", InstanceState.STOPPED)
    assert await book.flush()
    assert all(w.sealed for w in await store.read_windows())


async def test_without_a_readable_ledger_nothing_is_opened() -> None:
    book = billing(FakeClock(), FailingStore())
    with pytest.raises(UnavailableError, match="STORE_FAILED"):
        await book.load()


# ---- a bad disk ----------------------------------------------------------------------------------------------


async def test_a_failing_disk_is_retried_with_back_off_and_nothing_is_lost() -> None:
    clock, store = FakeClock(), FailingStore()
    book = billing(clock, store)
    meter = book.open("i-ocr-1", OCR, InstanceState.RUNNING)
    book.start()
    for _ in range(300):
        meter.request_began(clock.monotonic_ns())
        clock.advance(SECOND_NS)
        meter.request_ended(clock.monotonic_ns())
        for _ in range(4):
            await asyncio.sleep(0)
    assert not book.health.healthy
    assert "Make room" in book.health.reason
    assert 5 < store.attempts < 20
    store.failing = False
    assert await book.stop()
    ledger = await store.read_windows()
    check_ledger(ledger)
    assert sum(w.active_ns for w in ledger) == 300 * SECOND_NS
    assert sum(w.invocations for w in ledger) == 300
    assert len(ledger) < 4, "windows are not cut by age while the disk fails"
    assert book.health.pending == 0


async def test_a_hanging_disk_blocks_neither_meters_nor_the_loop() -> None:
    clock, store = FakeClock(), MemoryStore()
    book = billing(clock, store)
    book.open("i-ocr-1", OCR, InstanceState.RUNNING)
    book.start()
    store.stall()
    clock.advance(SECOND_NS)
    async with asyncio.timeout(5):
        await store.attempted.wait()
    for state in (InstanceState.FREEZING, InstanceState.FROZEN, InstanceState.RESTORING, InstanceState.RUNNING):
        book.changed("i-ocr-1", state)
        clock.advance(SECOND_NS)
        await asyncio.sleep(0)
    assert store.attempts == 1, "one write at a time"
    assert book.health.pending == 4
    store.release()
    assert await book.stop()
    ledger = await store.read_windows()
    check_ledger(ledger)
    assert [w.state for w in ledger] == ["RUNNING", "FREEZING", "FROZEN", "RESTORING", "RUNNING"]


async def test_a_write_that_never_answers_meets_its_deadline() -> None:
    clock, store = FakeClock(), MemoryStore()
    book = billing(clock, store, BillingOptions(write_timeout_s=0.05))
    book.open("i-ocr-1", OCR, InstanceState.RUNNING)
    store.stall()
    async with asyncio.timeout(5):
        assert not await book.flush()
        assert not await book.stop(deadline_s=0.2)
    assert "no answer" in book.health.reason


async def test_a_long_outage_is_bounded_in_memory_and_exact() -> None:
    clock, store = FakeClock(), FailingStore()
    book = billing(clock, store, BillingOptions(backlog=100, batch=10))
    meter = book.open("i-ocr-1", OCR, InstanceState.RUNNING)
    for _ in range(2_000):
        meter.request_began(clock.monotonic_ns())
        clock.advance(1_000)
        meter.request_ended(clock.monotonic_ns())
        book.changed("i-ocr-1", InstanceState.FROZEN)
        clock.advance(500)
        book.changed("i-ocr-1", InstanceState.RUNNING)
    assert not await book.flush()
    assert book.health.pending <= 100
    assert book.health.merged > 3_800
    store.failing = False
    assert await book.stop()
    ledger = await store.read_windows(limit=10_000)
    for before, after in pairwise(ledger):
        assert before.end_mono_ns == after.start_mono_ns
        assert before.seq < after.seq
    assert sum(w.active_ns for w in ledger) == 2_000 * 1_000
    assert sum(w.idle_ns for w in ledger) == 2_000 * 500
    assert sum(w.invocations for w in ledger) == 2_000


def test_offered_windows_survive_the_merging() -> None:
    backlog = UnwrittenWindows(capacity=4)
    backlog.add(window(seq=0))
    assert backlog.offer(1) == (window(seq=0),)
    for seq in range(1, 8):
        backlog.add(window(seq=seq))
    left = backlog.offer(100)
    assert left[0] == window(seq=0)
    assert [(w.start_mono_ns, w.end_mono_ns) for w in left[1:]] == [
        (window(seq=1).start_mono_ns, window(seq=7).end_mono_ns)
    ]

"""The host-memory ledger reserves no byte twice, and none that the host lacks."""

from __future__ import annotations

from agent.core.gpus.host_memory import MARGIN_BYTES, MemoryLedger
from agent.core.types import GIB


def test_freeze_is_admitted_only_beside_the_hosts_reserve() -> None:
    ledger = MemoryLedger(limit_bytes=0, reserve_bytes=2 * GIB)
    _, short = ledger.reserve("ocr", 6 * GIB, available_bytes=8 * GIB)
    assert "are more than the" in short, "the margin is missing"
    after, short = ledger.reserve("ocr", 6 * GIB, available_bytes=8 * GIB + MARGIN_BYTES)
    assert (short, after.reserved_bytes) == ("", 6 * GIB)


def test_a_refusal_changes_nothing() -> None:
    ledger = MemoryLedger(0, 0)
    after, short = ledger.reserve("ocr", 6 * GIB, available_bytes=1 * GIB)
    assert short
    assert after is ledger


def test_two_freezes_at_once_do_not_count_the_same_bytes() -> None:
    ledger, _ = MemoryLedger(0, 0).reserve("a", 6 * GIB, 10 * GIB)
    _, short = ledger.reserve("b", 6 * GIB, 10 * GIB)
    assert short


def test_finished_checkpoint_is_not_subtracted_twice() -> None:
    ledger, _ = MemoryLedger(0, 0).reserve("a", 6 * GIB, 10 * GIB)
    ledger = ledger.took("a", 6 * GIB)
    after, short = ledger.reserve("b", 3 * GIB, available_bytes=4 * GIB)
    assert short == ""
    assert after.outstanding_bytes == 3 * GIB


def test_budget_of_the_node_is_kept() -> None:
    ledger, _ = MemoryLedger(limit_bytes=8 * GIB, reserve_bytes=0).reserve("a", 6 * GIB, 100 * GIB)
    _, short = ledger.reserve("b", 3 * GIB, 100 * GIB)
    assert "gpu.frozen_memory_limit" in short


def test_the_pledge_of_a_sharer_outlives_its_freezes() -> None:
    ledger, _ = MemoryLedger(0, 0).pledge("a", 4 * GIB, 10 * GIB)
    ledger, _ = ledger.reserve("a", 3 * GIB, 0)  # within the pledge: admitted whatever the host says now
    ledger = ledger.took("a", 3 * GIB)
    assert ledger.outstanding_bytes == 1 * GIB
    ledger = ledger.restored("a")
    assert (ledger.reserved_bytes, ledger.outstanding_bytes) == (4 * GIB, 4 * GIB)
    assert ledger.forget("a").reserved_bytes == 0


def test_a_recovered_pledge_is_not_admitted_again_but_counts() -> None:
    ledger = MemoryLedger(0, 0).promised("a", 4 * GIB)
    assert ledger.outstanding_bytes == 4 * GIB
    assert ledger.took("a", 4 * GIB).outstanding_bytes == 0

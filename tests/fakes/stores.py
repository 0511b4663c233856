"""Stores in memory: one that works, one that can be made to fail or to stall.

`MemoryStore` passes the same contract suite as the SQLite store (tests/contract/test_stores.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from agent.core.billing.window import UsageWindow
from agent.core.errors import UnavailableError
from agent.core.instance_record import InstanceRecord, UnreadableRecord


class MemoryStore:
    """InstanceStore and LedgerStore. `failing`: every call raises STORE_FAILED. `stall()`: calls hang until
    `release()`. `upserts` records each transaction's windows, failed ones not."""

    def __init__(self) -> None:
        self.failing = False
        self.upserts: list[tuple[UsageWindow, ...]] = []
        self.attempts = 0
        self.attempted = asyncio.Event()
        self._open = asyncio.Event()
        self._open.set()
        self._records: dict[str, InstanceRecord] = {}
        self.unreadable: dict[str, UnreadableRecord] = {}
        self._windows: dict[tuple[str, int], UsageWindow] = {}
        self._acknowledged: set[tuple[str, int]] = set()
        self._refused: dict[tuple[str, int], None] = {}

    def stall(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    async def put_instance(self, record: InstanceRecord) -> None:
        await self._pass()
        self._records[record.spec.uid] = record

    async def load_instances(self) -> Sequence[InstanceRecord]:
        await self._pass()
        return [self._records[uid] for uid in sorted(self._records)]

    async def unreadable_instances(self) -> Sequence[UnreadableRecord]:
        await self._pass()
        return [self.unreadable[uid] for uid in sorted(self.unreadable)]

    async def delete_instance(self, uid: str) -> None:
        await self._pass()
        self.unreadable.pop(uid, None)
        self._records.pop(uid, None)

    async def upsert_windows(self, windows: Sequence[UsageWindow]) -> None:
        await self._pass()
        for window in windows:
            key = (window.instance_uid, window.seq)
            if key not in self._windows or not self._windows[key].sealed:
                self._windows[key] = window
        self.upserts.append(tuple(windows))

    async def last_windows(self) -> Sequence[UsageWindow]:
        await self._pass()
        newest: dict[str, UsageWindow] = {}
        for window in self._windows.values():
            known = newest.get(window.instance_uid)
            if known is None or known.seq < window.seq:
                newest[window.instance_uid] = window
        return [newest[uid] for uid in sorted(newest)]

    async def unacknowledged(self, limit: int) -> Sequence[UsageWindow]:
        await self._pass()
        keys = sorted(key for key, w in self._windows.items() if w.sealed and self._is_due(key))
        return [self._windows[key] for key in keys[:limit]]

    async def acknowledge(self, keys: Sequence[tuple[str, int]]) -> None:
        await self._pass()
        self._acknowledged.update(key for key in keys if key in self._windows and self._windows[key].sealed)

    async def refuse(self, keys: Sequence[tuple[str, int]], kept: int = 10_000) -> None:
        await self._pass()
        for key in keys:
            if key in self._windows and self._windows[key].sealed and self._is_due(key):
                self._refused[key] = None
        in_order = [key for key in self._windows if key in self._refused]
        for key in in_order[: max(0, len(in_order) - kept)]:
            del self._refused[key], self._windows[key]

    def _is_due(self, key: tuple[str, int]) -> bool:
        return key not in self._acknowledged and key not in self._refused

    async def read_windows(
        self, instance_uid: str = "", limit: int = 1000, after_rowid: int = 0
    ) -> Sequence[UsageWindow]:
        await self._pass()
        numbered = enumerate(self._windows.values(), start=1)
        chosen = [w for row, w in numbered if row > after_rowid and instance_uid in ("", w.instance_uid)]
        return chosen[:limit]

    async def prune(self, started_before_wall_ns: int, limit: int = 5_000) -> int:
        await self._pass()
        old = [k for k in self._acknowledged if self._windows[k].start_wall_ns < started_before_wall_ns][:limit]
        for key in old:
            del self._windows[key]
            self._acknowledged.discard(key)
        return len(old)

    async def _pass(self) -> None:
        self.attempts += 1
        self.attempted.set()
        await self._open.wait()
        if self.failing:
            raise UnavailableError("STORE_FAILED", "the store failed: out of space. Make room on the disk")


class FailingStore(MemoryStore):
    """A store that always fails."""

    def __init__(self) -> None:
        super().__init__()
        self.failing = True

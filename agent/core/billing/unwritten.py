"""Sealed windows that wait for the disk, bounded however long the disk fails.

Windows that were offered to the store never change: after a timeout they may have been written. When the backlog is
full, consecutive windows of one instance with the same price terms are merged: no nanosecond and no invocation is lost,
only the times of state changes. Such a ledger has gaps in `seq`, never in time.
"""

from __future__ import annotations

from dataclasses import replace

from agent.core.billing.window import UsageWindow


class UnwrittenWindows:
    """A FIFO of at most `capacity` windows plus one per instance and GPU set."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._windows: list[UsageWindow] = []
        self._offered = 0
        self._merge_at = capacity
        self.merged = 0

    def __len__(self) -> int:
        return len(self._windows)

    def waiting(self) -> tuple[UsageWindow, ...]:
        """Windows not known to be on disk."""
        return tuple(self._windows)

    def add(self, window: UsageWindow) -> None:
        self._windows.append(window)
        if len(self._windows) > self._merge_at:
            self._merge()

    def offer(self, limit: int) -> tuple[UsageWindow, ...]:
        """The oldest windows, at most `limit`, for one transaction; they don't change any more."""
        batch = tuple(self._windows[:limit])
        self._offered = max(self._offered, len(batch))
        return batch

    def written(self, count: int) -> None:
        """The first `count` windows are on disk."""
        del self._windows[:count]
        self._offered = max(0, self._offered - count)
        self._merge_at = self._capacity

    def _merge(self) -> None:
        kept = self._windows[: self._offered]
        latest: dict[str, int] = {}
        before = len(self._windows)
        for window in self._windows[self._offered :]:
            index = latest.get(window.instance_uid)
            if index is not None and _mergeable(kept[index], window):
                kept[index] = _sum(kept[index], window)
            else:
                latest[window.instance_uid] = len(kept)
                kept.append(window)
        self._windows = kept
        self.merged += before - len(kept)
        # If little could be merged, the next attempt waits for more windows: each attempt walks over all of them.
        self._merge_at = max(self._capacity, len(kept) + self._capacity // 4)


def _mergeable(before: UsageWindow, after: UsageWindow) -> bool:
    return before.end_mono_ns == after.start_mono_ns and _priced_by(before) == _priced_by(after)


def _priced_by(w: UsageWindow) -> tuple[object, ...]:
    sizes = (w.gpu_count, w.gpu_memory_bytes, w.vcpu_millis, w.memory_bytes, w.disk_bytes)
    return (w.node, w.boot_id, w.function, w.gpu_model, w.gpu_uuids, sizes, w.estimated)


def _sum(before: UsageWindow, after: UsageWindow) -> UsageWindow:
    return replace(
        before,
        end_mono_ns=after.end_mono_ns,
        active_ns=before.active_ns + after.active_ns,
        idle_ns=before.idle_ns + after.idle_ns,
        unbilled_ns=before.unbilled_ns + after.unbilled_ns,
        invocations=before.invocations + after.invocations,
    )

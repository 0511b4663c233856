"""Logs the emulated driver's operations and their durations, which benchmarks subtract. Bounded."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice

MAX_RECORDS = 65536
MAX_FROZEN_CALLS = 256


@dataclass(frozen=True, slots=True)
class OpRecord:
    """One cuCheckpointProcess* call, from its arrival at the driver process to its answer.

    op: get_state, get_restore_thread, lock, checkpoint, restore or unlock. bytes: VRAM copied. at_ns: arrival on
    CLOCK_MONOTONIC. us: duration in microseconds. result: CUresult."""

    seq: int
    op: str
    pid: int
    bytes: int
    us: int
    result: int
    at_ns: int


@dataclass(frozen=True, slots=True)
class FrozenCall:
    """A call made on a process whose cgroup was frozen. op and at_ns as in OpRecord."""

    op: str
    pid: int
    at_ns: int


class FrozenCalls:
    """Calls on frozen processes, which a correct caller never makes. Counts all, keeps the newest."""

    def __init__(self) -> None:
        self.count = 0
        self._newest: deque[FrozenCall] = deque(maxlen=MAX_FROZEN_CALLS)

    def add(self, op: str, pid: int, at_ns: int) -> None:
        self.count += 1
        self._newest.append(FrozenCall(op, pid, at_ns))

    def newest(self) -> tuple[FrozenCall, ...]:
        return tuple(self._newest)

    def take(self) -> tuple[FrozenCall, ...]:
        """The newest calls, oldest first; resets count and list."""
        taken = self.newest()
        self.count = 0
        self._newest.clear()
        return taken


class OpLog:
    """The newest MAX_RECORDS operations; `seq` counts from 1 and never repeats."""

    def __init__(self) -> None:
        self._records: deque[OpRecord] = deque(maxlen=MAX_RECORDS)
        self._last = 0

    def add(self, op: str, pid: int, size: int, result: int, start_ns: int, end_ns: int) -> None:
        self._last += 1
        self._records.append(OpRecord(self._last, op, pid, size, (end_ns - start_ns) // 1000, result, start_ns))

    def since(self, seq: int, limit: int) -> list[OpRecord]:
        """Up to `limit` records after `seq`, oldest first."""
        skip = max(0, len(self._records) - (self._last - seq))
        return list(islice(self._records, skip, skip + limit))

"""The driver's table of CUDA processes, from cuInit to exit."""

from __future__ import annotations

import heapq
import mmap
import os
import signal
import struct
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from agent.emulated.cgroups import ProcessCgroup
from agent.emulated.connection import Connection
from agent.emulated.faults import Fault
from agent.emulated.protocol import MAX_ALLOCATIONS, CuResult, Message, MessageOp, State
from agent.emulated.vram import Extent, rounded

_OFFSET = struct.Struct("<Q")


@dataclass(slots=True)
class Allocation:
    """`size`: as requested. `extent`: None while the process is checkpointed and holds no VRAM."""

    device: int
    size: int
    extent: Extent | None


@dataclass(slots=True)
class Operation:
    """One cuCheckpointProcess* call on a process, from its arrival to its answer.

    verdict: the answer, if known before the target replies. extents: VRAM allocated for a running restore, by slot.
    fault: applies to this call. immune: no fault applies (any more). late_answer: held back by a HANG after the work.
    """

    op: MessageOp
    caller: Connection
    id: int
    start_ns: int
    pid_asked: int
    timeout_ms: int = 0
    pairs: tuple[tuple[bytes, bytes], ...] = ()
    caller_initialized: bool = False
    size: int = 0
    verdict: CuResult | None = None
    on_death: CuResult = CuResult.OPERATING_SYSTEM
    fatal: bool = False
    waits_for_thaw: bool = False
    preparing: bool = False
    device_map: tuple[int, ...] = ()
    extents: dict[int, Extent] = field(default_factory=dict)
    fault: Fault | None = None
    immune: bool = False
    late_answer: Message | None = None


class CudaProcess:
    """A process that called cuInit. `pid` is the host's."""

    def __init__(self, token: int, connection: Connection, mount: Path | None) -> None:
        self.token = token
        self.connection = connection
        self.pid = connection.pid
        self.uid = connection.uid
        self.pidfd = connection.open_pidfd()
        self.restore_thread: Connection | None = None
        self.tid = 0
        self.state = self.state_before = State.RUNNING
        self.stuck = False
        self.released = False
        self.allocations: dict[int, Allocation] = {}
        self.contexts: dict[int, int] = {}
        self.flips: list[tuple[int, int]] = []
        self.queue: deque[Operation] = deque()
        self.current: Operation | None = None
        self.hung: list[Operation] = []
        self.cgroup = ProcessCgroup(self.pid, mount)
        self.table_fd = os.memfd_create("emulated-table", os.MFD_CLOEXEC)
        os.ftruncate(self.table_fd, MAX_ALLOCATIONS * _OFFSET.size)
        self._table = mmap.mmap(self.table_fd, MAX_ALLOCATIONS * _OFFSET.size)
        self._free_slots: list[int] = []
        self._next_slot = 0

    def new_slot(self) -> int | None:
        """The lowest free slot; None if the process has MAX_ALLOCATIONS."""
        if self._free_slots:
            return heapq.heappop(self._free_slots)
        if self._next_slot == MAX_ALLOCATIONS:
            return None
        self._next_slot += 1
        return self._next_slot - 1

    def free_slot(self, slot: int) -> None:
        heapq.heappush(self._free_slots, slot)

    def publish(self, slot: int, offset: int) -> None:
        """Publish to the target the offset of this allocation in its device's memory."""
        _OFFSET.pack_into(self._table, slot * _OFFSET.size, offset)

    def change(self, state: State) -> None:
        self.state_before = self.state
        self.state = state

    def touched(self) -> set[int]:
        """The devices on which it has a context or memory, even while checkpointed."""
        return {a.device for a in self.allocations.values()} | {device for device, n in self.contexts.items() if n}

    def bytes_on(self, device: int) -> int:
        """VRAM held on a device now."""
        return sum(a.extent.length for a in self.allocations.values() if a.device == device and a.extent)

    def image_bytes(self) -> int:
        """Bytes of VRAM that the host holds in this process while it is checkpointed."""
        return sum(rounded_size(a) for a in self.allocations.values()) if self.state is State.CHECKPOINTED else 0

    def kill(self) -> bool:
        """SIGKILL, as the real driver does to a process it can't restore. False if it belongs to another user or is
        gone."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close this process's descriptors, except its connections."""
        self.cgroup.close()
        self._table.close()
        os.close(self.table_fd)
        os.close(self.pidfd)


def rounded_size(allocation: Allocation) -> int:
    return allocation.extent.length if allocation.extent else rounded(allocation.size)

"""CPU time and memory that instances use. Implements `ports.UsageReader`.

From the instance's own cgroup: `cpu.stat` exists without the cpu controller (cgroup-v2.rst), `memory.current` only with
the memory controller; otherwise memory is the resident size of its processes. Without a cgroup both come from the
process tree (descendants and session of the first process): a process that leaves both is not counted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from agent.adapters.kernel import process_table
from agent.adapters.kernel.process_table import PROC, ProcessStat
from agent.core.errors import UnavailableError
from agent.core.snapshots import InstanceReading
from agent.core.types import MICROSECOND_NS, SECOND_NS, Handle

DEADLINE_S = 2.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICK_NS = SECOND_NS // os.sysconf("SC_CLK_TCK")


class ProcUsageReader:
    """Reads in one thread of its own, because the kernel may take long to sum the counters of many CPUs. While a
    reading hangs, further ones are refused at once."""

    def __init__(self, boot_id: str, proc: Path = PROC, deadline_s: float = DEADLINE_S) -> None:
        self._boot_id = boot_id
        self._proc = proc
        self._deadline_s = deadline_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gauges")
        self._reading = False

    async def read(self, handles: Sequence[Handle]) -> dict[str, InstanceReading]:
        """Readings by uid, without ended instances. Raises UnavailableError GAUGES_LATE."""
        if self._reading:
            raise UnavailableError("GAUGES_LATE", "the previous reading has not returned; is the host overloaded?")
        self._reading = True
        future = self._thread.submit(self._read_all, handles)
        future.add_done_callback(self._on_done)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            text = f"cgroups and /proc could not be read within {self._deadline_s:g} s; is the host overloaded?"
            raise UnavailableError("GAUGES_LATE", text) from None

    def close(self) -> None:
        """Start no further reading; does not wait."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _on_done(self, _: object) -> None:
        self._reading = False

    def _read_all(self, handles: Sequence[Handle]) -> dict[str, InstanceReading]:
        found: dict[str, InstanceReading] = {}
        loose = [handle for handle in handles if not handle.cgroup]
        all_stats = {stat.pid: stat for stat in process_table.processes(self._proc)} if loose else {}
        for handle in handles:
            reading = self._of_tree(handle, all_stats) if not handle.cgroup else self._of_cgroup(Path(handle.cgroup))
            if reading is not None:
                found[handle.uid] = reading
        return found

    def _of_cgroup(self, path: Path) -> InstanceReading | None:
        """None if it is gone or empty."""
        try:
            cpu_ns = _usage_ns((path / "cpu.stat").read_bytes())
            pids = (path / "cgroup.procs").read_bytes().split()
        except OSError:
            return None
        if not pids:
            return None
        memory_bytes: int | None = None
        try:
            memory_bytes = int((path / "memory.current").read_bytes())
        except OSError:  # no memory controller for this cgroup
            stats = [stat for pid in pids if (stat := process_table.read_stat(int(pid), self._proc))]
            memory_bytes = sum(stat.resident_pages for stat in stats) * _PAGE_BYTES if stats else None
        return InstanceReading(cpu_ns, memory_bytes)

    def _of_tree(self, handle: Handle, all_stats: dict[int, ProcessStat]) -> InstanceReading | None:
        root = handle.process
        main = all_stats.get(root.pid)
        if root.boot_id != self._boot_id or main is None or main.dead or main.start_time != root.start_time:
            return None
        inside = {root.pid} | {stat.pid for stat in all_stats.values() if stat.session == root.pid}
        process_table.add_descendants(inside, all_stats.values())
        stats = [all_stats[pid] for pid in inside]
        return InstanceReading(
            cpu_ns=sum(stat.cpu_ticks for stat in stats) * _TICK_NS,
            memory_bytes=sum(stat.resident_pages for stat in stats) * _PAGE_BYTES,
        )


def _usage_ns(stat: bytes) -> int | None:
    """`usage_usec` of a cpu.stat; None if the kernel does not count."""
    for line in stat.splitlines():
        name, _, value = line.partition(b" ")
        if name == b"usage_usec":
            with suppress(ValueError):
                return int(value) * MICROSECOND_NS
    return None

"""How much host memory a frozen image may take, by the host's view and the cgroup's. Implements `ports.HostMemory`.

Reclaimable page cache counts as free in both: counted as used, admission would refuse freezes that succeed
(agent/docs/facts/emulated-driver.md, pitfall 8). Swap does not count: a swapped image wakes too slowly.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from agent.adapters.kernel import memory_cgroup, process_table
from agent.adapters.kernel.image_sizes import ImageSizes
from agent.adapters.kernel.memory_limits import MemoryLimits
from agent.adapters.kernel.process_table import PROC
from agent.core.errors import UnavailableError
from agent.core.types import Handle


class ProcHostMemory:
    """Reads /proc/meminfo and the files of the handle's memory cgroup. `limits` and `images` are the folders with the
    records of raised limits and of image sizes; None: limits are not raised, sizes not remembered. Writes may wait for
    a disk and belong in one thread beside the loop."""

    def __init__(self, proc: Path = PROC, limits: Path | None = None, images: Path | None = None) -> None:
        self._proc = proc
        self._boot_id = process_table.boot_id(proc)
        self._limits = MemoryLimits(limits, self._boot_id) if limits else None
        self._images = ImageSizes(images) if images else None

    def available_bytes(self) -> int:
        """MemAvailable. Raises UnavailableError HOST_MEMORY_UNKNOWN."""
        for line in (self._proc / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        raise UnavailableError("HOST_MEMORY_UNKNOWN", "/proc/meminfo has no MemAvailable: mount /proc, Linux >= 3.14")

    def headroom_bytes(self, handle: Handle) -> int | None:
        """Smallest (limit - usage, cache counted as free) over all ancestors; None without a limit or process."""
        if not process_table.is_alive(handle.process, self._boot_id, self._proc):
            return None
        found = memory_cgroup.find(handle.process.pid, self._proc)
        return found.headroom_bytes() if found else None

    def raise_limit(self, handle: Handle, need_bytes: int) -> str:
        if self._limits is None:
            return "memory limits are not raised here; raise its memorySize"
        alive = process_table.is_alive(handle.process, self._boot_id, self._proc)
        found = memory_cgroup.find(handle.process.pid, self._proc) if alive else None
        return self._limits.raise_by_need(handle, found, need_bytes) if found else ""

    def limit_raised(self, uid: str) -> bool:
        return self._limits is not None and self._limits.is_raised(uid)

    def lower_limit(self, uid: str) -> None:
        if self._limits:
            self._limits.lower(uid)

    def note_image(self, uid: str, image_bytes: int) -> None:
        if self._images:
            self._images.note(uid, image_bytes)

    def noted_image(self, uid: str) -> int | None:
        return self._images.read(uid) if self._images else None

    def resident_bytes(self, pids: Collection[int]) -> int:
        """From `statm`, which does not wait for a frozen process."""
        return sum(self._resident_bytes(pid) for pid in pids)

    def _resident_bytes(self, pid: int) -> int:
        try:
            pages = int((self._proc / str(pid) / "statm").read_text(encoding="ascii").split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def forget(self, uid: str) -> None:
        self.lower_limit(uid)
        if self._images:
            self._images.forget(uid)

    def recover(self, living: Collection[str], frozen: Collection[str]) -> None:
        if self._limits:
            self._limits.recover(frozen)
        if self._images:
            self._images.keep(living)

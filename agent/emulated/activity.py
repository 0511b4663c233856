"""Measures GPU utilisation: in shared memory, every CUDA process records the time of its copies and fills.

Each device has a ring of BUCKETS. Bucket t % BUCKETS covers the BUCKET_NS of CLOCK_MONOTONIC numbered t: its upper 40
bits are the lower bits of t, its lower 24 the busy microseconds (`src/activity.c`). No timer runs: the buckets of an
idle GPU are simply outdated.
"""

from __future__ import annotations

import mmap
import os
import struct

from agent.emulated.protocol import ACTIVITY_BUCKETS, ACTIVITY_NS, MAX_DEVICES

_WINDOW = 8
"""Whole buckets in the last second."""
_BUCKET_US = ACTIVITY_NS // 1000
_RING = struct.Struct(f"<{ACTIVITY_BUCKETS}Q")
ACTIVITY_BYTES = MAX_DEVICES * _RING.size


class Activity:
    """The driver's shared memory; every CUDA process maps `fd`."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("emulated-activity", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, ACTIVITY_BYTES)
        self._map = mmap.mmap(self.fd, ACTIVITY_BYTES, prot=mmap.PROT_READ)

    def percent(self, device: int, at_ns: int) -> int:
        """Utilisation of the second before `at_ns` (CLOCK_MONOTONIC), 0 to 100. Overlapping work counts at most
        once."""
        ring = _RING.unpack_from(self._map, device * _RING.size)
        now = at_ns // ACTIVITY_NS
        busy_us = 0
        for tick in range(now - _WINDOW, now):
            bucket = ring[tick % ACTIVITY_BUCKETS]
            if bucket >> 24 == tick & 0xFF_FFFF_FFFF:
                busy_us += min(bucket & 0xFFFFFF, _BUCKET_US)
        return busy_us * 100 // (_WINDOW * _BUCKET_US)

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

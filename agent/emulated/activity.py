"""How busy each GPU was: shared memory in which every CUDA process counts the time of its copies and fills.

For each device a ring of BUCKETS; bucket t % BUCKETS is about the BUCKET_NS of CLOCK_MONOTONIC numbered t. Its upper
40 bits are t's lower ones, its lower 24 the microseconds that anybody was busy then (`src/activity.c`). Nothing ticks:
an idle GPU's buckets are just old.
"""

from __future__ import annotations

import mmap
import os
import struct

from agent.emulated.protocol import ACTIVITY_BUCKETS, ACTIVITY_NS, MAX_DEVICES

_WINDOW = 8
"""Whole buckets that make up the last second."""
_BUCKET_US = ACTIVITY_NS // 1000
_RING = struct.Struct(f"<{ACTIVITY_BUCKETS}Q")
ACTIVITY_BYTES = MAX_DEVICES * _RING.size


class Activity:
    """One for the driver; `fd` is mapped by every CUDA process."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("emulated-activity", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, ACTIVITY_BYTES)
        self._map = mmap.mmap(self.fd, ACTIVITY_BYTES, prot=mmap.PROT_READ)

    def percent(self, device: int, at_ns: int) -> int:
        """Of the second before `at_ns` (CLOCK_MONOTONIC), 0 to 100; several busy at once count once at the most."""
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

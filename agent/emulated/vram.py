"""The memory of one emulated device: a memfd whose pages the driver process allocates and pools.

One process's data must not leak to the next: a range is zeroed before it is handed out, unless the new owner overwrites
all of it (a restore).
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from bisect import bisect_left
from concurrent.futures import Executor
from dataclasses import dataclass

from agent.core.errors import PreconditionError

GRANULE = 64 << 10
CHUNK = 2 << 20
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def rounded(size: int) -> int:
    """Bytes allocated for `size`: a multiple of 64 KiB, from 2 MiB on a multiple of 2 MiB (a huge page)."""
    unit = CHUNK if size >= CHUNK else GRANULE
    return -(-size // unit) * unit


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of one device's memory, in bytes."""

    offset: int
    length: int


class FreeRanges:
    """Pure bookkeeping in bytes. Prefers the lowest addresses, whose pages already exist."""

    def __init__(self, total_bytes: int) -> None:
        self._starts = [0]
        self._ends = [total_bytes]
        self.free_bytes = total_bytes

    def allocate(self, length: int, align: int) -> int | None:
        """Offset of `length` bytes at a multiple of `align`; None if no free range holds them."""
        for index, start in enumerate(self._starts):
            offset = -(-start // align) * align
            if offset + length <= self._ends[index]:
                self._cut(index, offset, offset + length)
                self.free_bytes -= length
                return offset
        return None

    def _cut(self, index: int, start: int, end: int) -> None:
        pieces = [(self._starts[index], start), (end, self._ends[index])]
        kept = [(low, high) for low, high in pieces if low < high]
        self._starts[index : index + 1] = [low for low, _ in kept]
        self._ends[index : index + 1] = [high for _, high in kept]

    def free(self, offset: int, length: int) -> None:
        """Free a range allocated before."""
        index = bisect_left(self._starts, offset)
        start, end = offset, offset + length
        low, high = index, index
        if index and self._ends[index - 1] == start:
            low, start = index - 1, self._starts[index - 1]
        if index < len(self._starts) and self._starts[index] == end:
            high, end = index + 1, self._ends[index]
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        self.free_bytes += length


class Vram:
    """One device's memory of `total_bytes`. Uses host memory for the peak of all allocations only."""

    def __init__(self, name: str, total_bytes: int, executor: Executor) -> None:
        self.total_bytes = total_bytes // CHUNK * CHUNK
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.total_bytes)
        self._map = mmap.mmap(self.fd, self.total_bytes)
        self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._view)
        self._executor = executor
        self._ranges = FreeRanges(self.total_bytes)
        self._reserved_bytes = 0
        self._paid = bytearray(self.total_bytes // CHUNK)
        self._dirty = bytearray(self.total_bytes // GRANULE)

    @property
    def used_bytes(self) -> int:
        return self.total_bytes - self._ranges.free_bytes + self._reserved_bytes

    def reserve(self, size: int) -> None:
        """Mark `size` bytes in all as used by a process outside the host's view; 0 frees them.

        Raises PreconditionError EMULATED_VRAM_SHORT if less is free."""
        if size > self._ranges.free_bytes:
            raise PreconditionError(
                "EMULATED_VRAM_SHORT",
                f"Only {self._ranges.free_bytes} bytes of this GPU are free; reserve no more than that.",
            )
        self._reserved_bytes = size

    def allocate(self, size: int) -> Extent | None:
        """Allocate `size` bytes; None if there is no room. `claim` or `prepare` the range before use."""
        length = rounded(size)
        if length > self._ranges.free_bytes - self._reserved_bytes:
            return None
        offset = self._ranges.allocate(length, CHUNK if length >= CHUNK else GRANULE)
        return None if offset is None else Extent(offset, length)

    def free(self, extent: Extent) -> None:
        """Free a range. Its contents stay until the next owner gets it."""
        self._ranges.free(extent.offset, extent.length)

    def claim(self, extent: Extent, zeroed: bool) -> bool:
        """Hand out a range that needs no work. Returns False if `prepare` must be awaited instead."""
        first, last = extent.offset // CHUNK, -(-(extent.offset + extent.length) // CHUNK)
        low, high = extent.offset // GRANULE, (extent.offset + extent.length) // GRANULE
        if self._paid.find(0, first, last) >= 0 or (zeroed and self._dirty.find(1, low, high) >= 0):
            return False
        self._dirty[low:high] = b"\1" * (high - low)
        return True

    async def prepare(self, extent: Extent, zeroed: bool) -> None:
        """Allocate the pages for this process and zero previous contents. Raises OSError (host memory)."""
        if self.claim(extent, zeroed):
            return
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._prepare, extent, zeroed)

    def _prepare(self, extent: Extent, zeroed: bool) -> None:
        low, high = extent.offset // GRANULE, (extent.offset + extent.length) // GRANULE
        for chunk in range(extent.offset // CHUNK, -(-(extent.offset + extent.length) // CHUNK)):
            if not self._paid[chunk]:
                self._pay(chunk * CHUNK)
                self._paid[chunk] = 1
        if zeroed and self._dirty.find(1, low, high) >= 0:
            ctypes.memset(self._address + extent.offset, 0, extent.length)
        self._dirty[low:high] = b"\1" * (high - low)

    def _pay(self, offset: int) -> None:
        if _libc.madvise(self._address + offset, CHUNK, _POPULATE_WRITE):
            os.posix_fallocate(self.fd, offset, CHUNK)  # older kernels; small pages

    def flip(self, offset: int) -> None:
        """Invert every bit of one byte."""
        self._map[offset] ^= 0xFF

    def close(self) -> None:
        del self._view
        self._map.close()
        os.close(self.fd)

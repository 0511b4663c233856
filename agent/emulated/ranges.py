"""Tracks the free ranges of a device's memory: first fit from the lowest address, neighbours merged."""

from __future__ import annotations

from bisect import bisect_left


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

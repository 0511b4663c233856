"""Reproducible bytes that the examples write to device memory and tests compare."""

from __future__ import annotations

import hashlib

PIECE_BYTES = 1 << 20


def pattern(size_bytes: int, offset: int = 0) -> bytes:
    """`size_bytes` of the endless pattern from `offset` on; all its MiB differ."""
    first, last = offset // PIECE_BYTES, (offset + size_bytes - 1) // PIECE_BYTES
    pieces = b"".join(
        hashlib.shake_128(b"hibernode %d" % number).digest(PIECE_BYTES) for number in range(first, last + 1)
    )
    begin = offset - first * PIECE_BYTES
    return pieces[begin : begin + size_bytes]

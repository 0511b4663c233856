"""Sizes in messages."""

from __future__ import annotations

_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def size_text(size_bytes: int) -> str:
    """A size for people, with at most two decimals: `16 GiB`, `1.5 MiB`, `100 bytes`."""
    for unit, name in _UNITS:
        if abs(size_bytes) >= unit:
            number = f"{size_bytes / unit:.2f}".rstrip("0").rstrip(".")
            return f"{number} {name}"
    return f"{size_bytes} bytes"


def shortage_in_mib(available_bytes: int, needed_bytes: int) -> tuple[str, str]:
    """What there is and what is needed, in MiB, rounded so that the second is always the larger one."""
    return f"{available_bytes >> 20} MiB", f"{-(-needed_bytes >> 20)} MiB"

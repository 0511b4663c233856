"""Sizes in messages."""

from __future__ import annotations

import pytest

from agent.core.sizes import shortage_in_mib, size_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1000, "1000 bytes"),
        (8192, "8 KiB"),
        (32 << 20, "32 MiB"),
        (3 << 29, "1.5 GiB"),
        (15_360 << 20, "15 GiB"),
        (80 << 30, "80 GiB"),
        (1_000_000, "976.56 KiB"),
        (8 << 50, "8192 TiB"),
        (-(2 << 30), "-2 GiB"),
    ],
)
def test_a_size_is_shown_in_its_unit(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("available", "needed", "texts"),
    [
        ((16 << 30) - 1, 16 << 30, ("16383 MiB", "16384 MiB")),
        (16 << 30, (16 << 30) + 1, ("16384 MiB", "16385 MiB")),
        (0, 1, ("0 MiB", "1 MiB")),
        (5 << 20, 7 << 20, ("5 MiB", "7 MiB")),
    ],
)
def test_a_shortage_of_a_single_byte_can_be_read(available: int, needed: int, texts: tuple[str, str]) -> None:
    assert shortage_in_mib(available, needed) == texts

"""Sizes in messages."""

from __future__ import annotations

import pytest

from agent.core.sizes import size_text


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

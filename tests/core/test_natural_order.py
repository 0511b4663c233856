"""Lists of names, as people count."""

from __future__ import annotations

from agent.core.natural_order import natural_key


def test_numbers_count_as_numbers() -> None:
    names = ["m10", "m2", "m1", "M1", "a-2-b", "a-10", "10", "9", "", "m", "m01"]
    expected = ["", "9", "10", "M1", "a-2-b", "a-10", "m", "m01", "m1", "m2", "m10"]
    assert sorted(names, key=natural_key) == expected


def test_any_name_has_a_place() -> None:
    assert sorted(["²", "1²", "٣", "x" + "9" * 60], key=natural_key)

"""The highest value of late, as a scrape would find it."""

from __future__ import annotations

import pytest

from agent.core.peak import PERIOD_NS, Peak

NOW = 10 * PERIOD_NS


@pytest.mark.parametrize(
    ("noted", "read_at", "highest"),
    [
        ([], NOW, 0),
        ([(3, NOW), (5, NOW + 1), (4, NOW + 2)], NOW + 3, 5),
        ([(5, NOW)], NOW + PERIOD_NS, 5),
        ([(5, NOW)], NOW + 2 * PERIOD_NS - 1, 5),
        ([(5, NOW)], NOW + 2 * PERIOD_NS, 0),
        ([(5, NOW), (2, NOW + PERIOD_NS)], NOW + PERIOD_NS + 1, 5),
        ([(5, NOW), (2, NOW + PERIOD_NS)], NOW + 2 * PERIOD_NS, 2),
        ([(5, NOW), (1, NOW + 3 * PERIOD_NS)], NOW + 3 * PERIOD_NS, 1),
    ],
)
def test_it_lasts_one_to_two_minutes(noted: list[tuple[int, int]], read_at: int, highest: int) -> None:
    peak = Peak()
    for value, at in noted:
        peak.note(value, at)
    assert peak.read(read_at) == highest


def test_a_scrape_every_minute_misses_nothing() -> None:
    peak, seen = Peak(), []
    for minute in range(5):
        peak.note(minute + 1, NOW + minute * PERIOD_NS + PERIOD_NS // 2)
        seen.append(peak.read(NOW + (minute + 1) * PERIOD_NS))
    assert seen == [1, 2, 3, 4, 5]

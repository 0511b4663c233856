"""What a node metered while it was given up is not billed, and never more than that is taken off."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.billing.absence import Absence, without_absences
from tests.contract.test_stores import window

WINDOW = replace(window(), start_mono_ns=1_000, end_mono_ns=1_100, active_ns=30, idle_ns=50, unbilled_ns=20)


@pytest.mark.parametrize(
    ("absences", "billed"),
    [
        ([], (30, 50, 20)),
        ([("boot-a", 0, 1_000)], (30, 50, 20)),
        ([("boot-a", 1_100, 9_000)], (30, 50, 20)),
        ([("boot-b", 0, 9_000)], (30, 50, 20)),
        ([("boot-a", 0, 9_000)], (0, 0, 100)),
        ([("boot-a", 1_090, 9_000)], (20, 50, 30)),
        ([("boot-a", 500, 1_060)], (0, 20, 80)),
        ([("boot-a", -500, 1_010), ("boot-a", 1_095, 1_200)], (15, 50, 35)),
        ([("boot-a", 0, 2_000), ("boot-a", 0, 2_000)], (0, 0, 100)),
    ],
)
def test_the_time_away_is_unbilled_the_active_part_first(
    absences: list[tuple[str, int, int]], billed: tuple[int, int, int]
) -> None:
    left = without_absences(WINDOW, [Absence(*one) for one in absences])
    assert (left.active_ns, left.idle_ns, left.unbilled_ns) == billed
    assert replace(left, active_ns=30, idle_ns=50, unbilled_ns=20) == WINDOW, "nothing else changes"

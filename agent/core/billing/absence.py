"""Absences: times in which the scheduler had given a node up. Nothing on the node is billed for them. Pure.

The scheduler replaces the instances of a lost node, and bills their replacements. So whatever its agent metered
meanwhile, because it was only cut off or because its instances outlived it, is not billed as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from agent.core.billing.window import UsageWindow

NO_END_NS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Absence:
    """From when to when a node was given up, in CLOCK_MONOTONIC ns of its boot `boot_id`. `NO_END_NS`: to the end of
    that boot."""

    boot_id: str
    start_mono_ns: int
    end_mono_ns: int


def without_absences(window: UsageWindow, absences: Iterable[Absence]) -> UsageWindow:
    """The window with its time in `absences` unbilled.

    A window does not say when it was active. In doubt undercharge: its active time counts as lying in the absence.
    """
    away_ns = sum(_overlap_ns(window, absence) for absence in absences if absence.boot_id == window.boot_id)
    away_ns = min(away_ns, window.end_mono_ns - window.start_mono_ns)
    active_ns = min(away_ns, window.active_ns)
    idle_ns = min(away_ns - active_ns, window.idle_ns)
    if not active_ns + idle_ns:
        return window
    return replace(
        window,
        active_ns=window.active_ns - active_ns,
        idle_ns=window.idle_ns - idle_ns,
        unbilled_ns=window.unbilled_ns + active_ns + idle_ns,
    )


def _overlap_ns(window: UsageWindow, absence: Absence) -> int:
    start = max(window.start_mono_ns, absence.start_mono_ns)
    return max(0, min(window.end_mono_ns, absence.end_mono_ns) - start)

"""Properties of any ledger, however often its agent was killed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from agent.v1 import types_pb2


def by_instance(windows: Sequence[types_pb2.UsageWindow]) -> dict[str, list[types_pb2.UsageWindow]]:
    """Windows of each instance, in order."""
    found: dict[str, list[types_pb2.UsageWindow]] = {}
    for window in windows:
        found.setdefault(window.instance_uid, []).append(window)
    return {uid: sorted(mine, key=lambda w: w.seq) for uid, mine in found.items()}


def check_contiguous(windows: Sequence[types_pb2.UsageWindow]) -> None:
    """Check that sums equal lengths, numbers are consecutive, and each window starts where the previous one ends."""
    for uid, mine in by_instance(windows).items():
        for window in mine:
            length = window.end_mono_ns - window.start_mono_ns
            assert window.active_ns + window.idle_ns + window.unbilled_ns == length, f"{uid} #{window.seq}: {window}"
        for before, after in itertools.pairwise(mine):
            assert after.seq == before.seq + 1, f"{uid}: #{after.seq} follows #{before.seq}"
            assert after.start_mono_ns == before.end_mono_ns, f"{uid}: a gap or overlap before #{after.seq}"


def active_ns(windows: Sequence[types_pb2.UsageWindow]) -> int:
    """Metered active time of one instance."""
    return sum(window.active_ns for window in windows)

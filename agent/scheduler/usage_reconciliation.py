"""Do an instance's windows fit together? Pure; the answer is for people who must trust a bill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent.core.usage_window import Window


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind` is GAP (time without a window: something was lost), OVERLAP (time billed twice) or ESTIMATED (a crash).
    `duration_ns` is how much; `seq` the window at its end."""

    instance_uid: str
    boot_id: str
    seq: int
    kind: str
    duration_ns: int


def reconcile(windows: Iterable[Window]) -> list[Finding]:
    """Findings about windows given in order of (instance_uid, seq), complete for each instance given. Within a boot
    the end of one must be the start of the next; between boots nothing can be said. Holes in `seq` are none in time."""
    findings: list[Finding] = []
    before: Window | None = None
    for window in windows:
        if before and (before.instance_uid, before.boot_id) == (window.instance_uid, window.boot_id):
            apart = window.start_mono_ns - before.end_mono_ns
            if apart:
                findings.append(_finding(window, "GAP" if apart > 0 else "OVERLAP", abs(apart)))
        if window.estimated:
            findings.append(_finding(window, "ESTIMATED", window.end_mono_ns - window.start_mono_ns))
        before = window
    return findings


def _finding(window: Window, kind: str, duration_ns: int) -> Finding:
    return Finding(window.instance_uid, window.boot_id, window.seq, kind, duration_ns)

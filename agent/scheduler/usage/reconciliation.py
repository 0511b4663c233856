"""Reconciliation: finds gaps, overlaps, estimates and conflicts in an instance's usage windows. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from agent.core.billing.window import UsageWindow

MAX_FINDINGS = 100
"""Kept per instance; further ones are only counted."""


class FindingKind(StrEnum):
    """GAP: time without a window, so usage was lost. OVERLAP: time billed twice. ESTIMATED: a window closed after a
    crash, never too long. CONFLICT: a window uploaded again with another payload."""

    GAP = "GAP"
    OVERLAP = "OVERLAP"
    ESTIMATED = "ESTIMATED"
    CONFLICT = "CONFLICT"


@dataclass(frozen=True, slots=True)
class Finding:
    """`duration_ns`: the time concerned; `window`: the one concerned, for a gap or an overlap the later one."""

    kind: FindingKind
    window: UsageWindow
    duration_ns: int


@dataclass(frozen=True, slots=True)
class Amount:
    count: int = 0
    duration_ns: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.count + other.count, self.duration_ns + other.duration_ns)


@dataclass(frozen=True, slots=True)
class Reconciled:
    """The result for one instance (`findings`: the first `MAX_FINDINGS`, in order), or the sums over all, which
    have no `instance_uid`, `function`, `node` or `findings`."""

    instance_uid: str = ""
    function: str = ""
    node: str = ""
    instances: int = 0
    windows: int = 0
    gaps: Amount = Amount()
    overlaps: Amount = Amount()
    estimated: Amount = Amount()
    conflicts: int = 0
    findings: tuple[Finding, ...] = ()

    @property
    def has_findings(self) -> bool:
        return bool(self.gaps.count or self.overlaps.count or self.estimated.count or self.conflicts)

    def plus(self, other: Reconciled) -> Reconciled:
        return Reconciled(
            instances=self.instances + other.instances,
            windows=self.windows + other.windows,
            gaps=self.gaps + other.gaps,
            overlaps=self.overlaps + other.overlaps,
            estimated=self.estimated + other.estimated,
            conflicts=self.conflicts + other.conflicts,
        )


class Reconciler:
    """Takes windows in order of (instance_uid, seq), and holds one instance at a time."""

    def __init__(self) -> None:
        self._current: Reconciled | None = None
        self._before: UsageWindow | None = None
        self.total = Reconciled()
        """Sums of the finished instances."""

    def feed(self, window: UsageWindow, conflicts: int = 0) -> Reconciled | None:
        """Add a window, and how many other payloads came for its key. Returns the instance that it ends, if any.

        Within a boot each window must start where the one before ended. Windows of different boots are not compared,
        and a gap in `seq` is not a finding.
        """
        done = None
        if self._current is not None and self._current.instance_uid != window.instance_uid:
            done = self.end()
        found = self._current or Reconciled(window.instance_uid, window.function, window.node, instances=1)
        findings: list[Finding] = []
        gaps, overlaps, estimated = found.gaps, found.overlaps, found.estimated
        if self._before is not None and self._before.boot_id == window.boot_id:
            apart = window.start_mono_ns - self._before.end_mono_ns
            if apart > 0:
                gaps += Amount(1, apart)
                findings.append(Finding(FindingKind.GAP, window, apart))
            elif apart < 0:
                overlaps += Amount(1, -apart)
                findings.append(Finding(FindingKind.OVERLAP, window, -apart))
        length = window.end_mono_ns - window.start_mono_ns
        if window.estimated:
            estimated += Amount(1, length)
            findings.append(Finding(FindingKind.ESTIMATED, window, length))
        if conflicts:
            findings.append(Finding(FindingKind.CONFLICT, window, length))
        self._before = window
        self._current = replace(
            found,
            windows=found.windows + 1,
            gaps=gaps,
            overlaps=overlaps,
            estimated=estimated,
            conflicts=found.conflicts + conflicts,
            findings=(*found.findings, *findings)[:MAX_FINDINGS] if findings else found.findings,
        )
        return done

    def end(self) -> Reconciled | None:
        """Finish the current instance and return it, if any."""
        done, self._current, self._before = self._current, None, None
        if done is not None:
            self.total = self.total.plus(done)
        return done

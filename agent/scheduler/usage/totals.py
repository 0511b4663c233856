"""Usage of functions since this scheduler started, for the metrics; each stored window counts once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from agent.core.billing.window import UsageWindow

KINDS = ("active", "idle", "unbilled")


@dataclass(slots=True)
class FunctionUsage:
    """Nanoseconds by kind, times the GPUs and times the thousandths of a vCPU."""

    gpu_ns: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    vcpu_milli_ns: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))


class UsageTotals:
    """`deployed` returns the names of all deployed functions; the totals of others are dropped."""

    def __init__(self, deployed: Callable[[], Collection[str]]) -> None:
        self._deployed = deployed
        self._usage: dict[str, FunctionUsage] = {}

    def add(self, windows: Iterable[UsageWindow]) -> None:
        names = set(self._deployed())
        for window in windows:
            if window.function not in names:
                continue
            usage = self._usage.setdefault(window.function, FunctionUsage())
            for kind, ns in zip(KINDS, (window.active_ns, window.idle_ns, window.unbilled_ns), strict=True):
                usage.gpu_ns[kind] += ns * window.gpu_count
                usage.vcpu_milli_ns[kind] += ns * window.vcpu_millis

    def all(self) -> dict[str, FunctionUsage]:
        """The usage of every deployed function, which is 0 before its first window."""
        names = self._deployed()
        self._usage = {name: self._usage.get(name) or FunctionUsage() for name in sorted(names)}
        return self._usage

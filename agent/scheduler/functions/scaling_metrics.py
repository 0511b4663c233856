"""What a function's instances were used for in a period: the metrics that target tracking policies follow.

A `ScalingMetrics` is shown the function every now and then and integrates over time; at the end of a period it gives
one sample of each metric, as exact fractions from 0 to 1, or None where there was nothing to measure. It makes no
decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from agent.core.provisioning.autoscaling import Metric

_ZERO, _ONE = Fraction(0), Fraction(1)


@dataclass(frozen=True, slots=True)
class Gauge:
    """An awake instance as its agent last said: when that was heard (monotonic ns), and what it had used by then."""

    heard_ns: int
    cpu_ns: int | None
    vram_bytes: int | None
    vram_limit_bytes: int


@dataclass(slots=True)
class View:
    """A function at one moment. `current`: its provisioned instances that are not stopping. `slots`: of instances that
    are not stopping, on nodes that are heard; `unheard`: instances on the others, with `unheard_leases`. `gauges`: by
    uid, of the awake ones that are heard."""

    current: int = 0
    slots: int = 0
    unheard: int = 0
    unheard_leases: int = 0
    gauges: dict[str, Gauge] = field(default_factory=dict)


@dataclass(slots=True)
class _Use:
    """Of one instance within a period: CPU time and the time it is of; sum and number of its memory samples."""

    last: Gauge
    cpu_ns: int = 0
    time_ns: int = 0
    memory: Fraction = _ZERO
    samples: int = 0


class ScalingMetrics:
    """One function's meter, begun at `at` (monotonic ns) with its view then. `lease_time_ns` is the dispatcher's sum of
    leases over time. `blind`: at some time in the period there were instances of which nothing was heard."""

    def __init__(self, at: int, lease_time_ns: int, view: View) -> None:
        self.began_ns = at
        self.blind = view.unheard > 0
        self._leases_began_ns = lease_time_ns
        self._at = at
        self._slots, self._unheard = view.slots, view.unheard_leases
        self._current = view.current
        self._current_time_ns = 0
        self._slot_time_ns = 0
        self._unheard_time_ns = 0
        self._uses: dict[str, _Use] = {}
        self._take_gauges(view.gauges)

    def look(self, at: int, view: View) -> None:
        """So it is now; since the last look it was as then."""
        passed = at - self._at
        self._current_time_ns += self._current * passed
        self._slot_time_ns += self._slots * passed
        self._unheard_time_ns += self._unheard * passed
        self.blind |= view.unheard > 0
        self._at, self._slots, self._unheard = at, view.slots, view.unheard_leases
        self._current = view.current
        self._take_gauges(view.gauges)

    def average(self) -> Fraction:
        """`View.current` from the beginning to the last look, which is later."""
        return Fraction(self._current_time_ns, self._at - self.began_ns)

    def samples(self, lease_time_ns: int, vcpu_millis: int) -> Mapping[Metric, Fraction | None]:
        """Of the time from the beginning to the last look."""
        return {
            Metric.CONCURRENCY: self._concurrency(lease_time_ns),
            Metric.CPU: self._cpu(vcpu_millis),
            Metric.GPU_MEMORY: self._gpu_memory(),
        }

    def _concurrency(self, lease_time_ns: int) -> Fraction | None:
        leased = lease_time_ns - self._leases_began_ns
        if self._slot_time_ns <= 0 or leased < 0:
            return None
        return _share(leased - self._unheard_time_ns, self._slot_time_ns)

    def _cpu(self, vcpu_millis: int) -> Fraction | None:
        return _average(
            [_share(use.cpu_ns * 1000, use.time_ns * vcpu_millis) for use in self._uses.values() if use.time_ns]
        )

    def _gpu_memory(self) -> Fraction | None:
        return _average([use.memory / use.samples for use in self._uses.values() if use.samples])

    def _take_gauges(self, gauges: Mapping[str, Gauge]) -> None:
        for uid, gauge in gauges.items():
            use = self._uses.get(uid)
            if use is None:
                use = self._uses[uid] = _Use(gauge)
            elif gauge.heard_ns <= use.last.heard_ns:
                continue  # nothing new was said
            elif gauge.cpu_ns is not None and use.last.cpu_ns is not None and gauge.cpu_ns >= use.last.cpu_ns:
                use.cpu_ns += gauge.cpu_ns - use.last.cpu_ns
                use.time_ns += gauge.heard_ns - use.last.heard_ns
            use.last = gauge
            if gauge.vram_bytes is not None and gauge.vram_limit_bytes > 0:
                use.memory += _share(gauge.vram_bytes, gauge.vram_limit_bytes)
                use.samples += 1
        for uid, use in self._uses.items():
            if uid not in gauges:  # asleep or gone: when it is awake again, the time between does not count
                use.last = Gauge(use.last.heard_ns, None, None, 0)


def _share(part: int, whole: int) -> Fraction:
    return max(_ZERO, min(_ONE, Fraction(part, whole)))


def _average(shares: list[Fraction]) -> Fraction | None:
    return sum(shares, _ZERO) / len(shares) if shares else None

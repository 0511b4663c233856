"""Utilisation of a function's instances over a period: the metrics that target tracking policies follow.

A `ScalingMetrics` integrates what it records over time. At the end of a period it gives one sample of each metric, an
exact fraction from 0 to 1, or None if there was nothing to measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from agent.core.provisioning.autoscaling import Metric

_ZERO, _ONE = Fraction(0), Fraction(1)


@dataclass(frozen=True, slots=True)
class Gauge:
    """An agent's last sample of an awake instance: when it was received (monotonic ns) and the usage by then."""

    received_ns: int
    cpu_ns: int | None
    vram_bytes: int | None
    vram_limit_bytes: int


@dataclass(slots=True)
class View:
    """A function at one moment, without the instances that are stopping.

    - `current`: its provisioned instances.
    - `slots`: those of its instances on nodes that report. `silent`: its instances on silent nodes that are not lost;
      `silent_leases`: their leases. `gauges`: those of the awake instances on nodes that report, by uid.
    """

    current: int = 0
    slots: int = 0
    silent: int = 0
    silent_leases: int = 0
    gauges: dict[str, Gauge] = field(default_factory=dict)


@dataclass(slots=True)
class _Use:
    """One instance within a period: its CPU time over `time_ns`, and the sum and number of its memory samples."""

    last: Gauge
    cpu_ns: int = 0
    time_ns: int = 0
    memory: Fraction = _ZERO
    samples: int = 0


class ScalingMetrics:
    """Measures one function from `at` (monotonic ns). `lease_time_ns`: `Dispatcher.lease_time_ns`. `blind`: at some
    time in the period it had instances on silent nodes."""

    def __init__(self, at: int, lease_time_ns: int, view: View) -> None:
        self.began_ns = at
        self.blind = view.silent > 0
        self._leases_began_ns = lease_time_ns
        self._at = at
        self._slots, self._silent = view.slots, view.silent_leases
        self._current = view.current
        self._current_time_ns = 0
        self._slot_time_ns = 0
        self._silent_time_ns = 0
        self._uses: dict[str, _Use] = {}
        self._take_gauges(view.gauges)

    def record(self, at: int, view: View) -> None:
        """Record the function as it is now; until now it counts as it was at the last record."""
        passed = at - self._at
        self._current_time_ns += self._current * passed
        self._slot_time_ns += self._slots * passed
        self._silent_time_ns += self._silent * passed
        self.blind |= view.silent > 0
        self._at, self._slots, self._silent = at, view.slots, view.silent_leases
        self._current = view.current
        self._take_gauges(view.gauges)

    def average(self) -> Fraction:
        """Average of `View.current` up to the last record, which must be later than the start."""
        return Fraction(self._current_time_ns, self._at - self.began_ns)

    def samples(self, lease_time_ns: int, vcpu_millis: int) -> Mapping[Metric, Fraction | None]:
        """The samples of the time from the start to the last record."""
        return {
            Metric.CONCURRENCY: self._concurrency(lease_time_ns),
            Metric.CPU: self._cpu(vcpu_millis),
            Metric.GPU_MEMORY: self._gpu_memory(),
        }

    def _concurrency(self, lease_time_ns: int) -> Fraction | None:
        leased = lease_time_ns - self._leases_began_ns
        if self._slot_time_ns <= 0 or leased < 0:
            return None
        return _share(leased - self._silent_time_ns, self._slot_time_ns)

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
            elif gauge.received_ns <= use.last.received_ns:
                continue  # not a new sample
            elif gauge.cpu_ns is not None and use.last.cpu_ns is not None and gauge.cpu_ns >= use.last.cpu_ns:
                use.cpu_ns += gauge.cpu_ns - use.last.cpu_ns
                use.time_ns += gauge.received_ns - use.last.received_ns
            use.last = gauge
            if gauge.vram_bytes is not None and gauge.vram_limit_bytes > 0:
                use.memory += _share(gauge.vram_bytes, gauge.vram_limit_bytes)
                use.samples += 1
        for uid, use in self._uses.items():
            if uid not in gauges:  # frozen or gone: the time until it is awake again does not count
                use.last = Gauge(use.last.received_ns, None, None, 0)


def _share(part: int, whole: int) -> Fraction:
    return max(_ZERO, min(_ONE, Fraction(part, whole)))


def _average(shares: list[Fraction]) -> Fraction | None:
    return sum(shares, _ZERO) / len(shares) if shares else None

"""What is measured in a period, to the nanosecond."""

from __future__ import annotations

from fractions import Fraction

import pytest

from agent.core.provisioning.autoscaling import Metric
from agent.core.types import SECOND_NS
from agent.scheduler.functions.scaling_metrics import Gauge, ScalingMetrics, View


def view(slots: int = 0, silent: int = 0, **gauges: Gauge) -> View:
    return View(current=slots, slots=slots, silent_leases=silent, gauges=gauges)


@pytest.mark.parametrize(
    ("records", "leased_s", "expected"),
    [
        ([(0, 2), (10, 2)], 6, "0.3"),
        ([(0, 2), (5, 4), (10, 4)], 15, "1/2"),  # 30 slot seconds
        ([(0, 2), (10, 2)], 0, "0"),
        ([(0, 2), (10, 2)], 25, "1"),
        ([(0, 0), (10, 0)], 0, None),  # no instance is not zero
        ([(0, 0), (9, 1), (10, 1)], 1, "1"),
        ([(0, 2), (10, 2)], -1, None),  # deployed again: the sum started at 0
    ],
)
def test_concurrency_is_leases_over_slots(records: list[tuple[int, int]], leased_s: int, expected: str | None) -> None:
    meter = ScalingMetrics(0, 100 * SECOND_NS, view(records[0][1]))
    for at, slots in records[1:]:
        meter.record(at * SECOND_NS, view(slots))
    found = meter.samples((100 + leased_s) * SECOND_NS, 1000)[Metric.CONCURRENCY]
    assert found == (None if expected is None else Fraction(expected))


def test_instances_are_averaged_over_time_up_to_the_last_record() -> None:
    meter = ScalingMetrics(5 * SECOND_NS, 0, view(2))
    meter.record(8 * SECOND_NS, view(4))
    meter.record(15 * SECOND_NS, view(40))
    assert meter.average() == Fraction(3 * 2 + 7 * 4, 10)


def test_leases_on_silent_nodes_do_not_count() -> None:
    meter = ScalingMetrics(0, 0, view(2, silent=1))
    meter.record(10 * SECOND_NS, view(2, silent=1))
    assert meter.samples(15 * SECOND_NS, 1000)[Metric.CONCURRENCY] == Fraction(1, 4)


def gauge(at_s: int, cpu_s: float | None = None, vram: int | None = None, limit: int = 100) -> Gauge:
    return Gauge(at_s * SECOND_NS, None if cpu_s is None else int(cpu_s * SECOND_NS), vram, limit)


def measured(*records: dict[str, Gauge], vcpu_millis: int = 2000) -> tuple[Fraction | None, Fraction | None]:
    meter = ScalingMetrics(0, 0, View(gauges=records[0]))
    for at, gauges in enumerate(records[1:], 1):
        meter.record(at * SECOND_NS, View(gauges=gauges))
    found = meter.samples(0, vcpu_millis)
    return found[Metric.CPU], found[Metric.GPU_MEMORY]


def test_cpu_is_averaged_over_the_awake_instances() -> None:
    cpu, _ = measured({"a": gauge(0, 5), "b": gauge(0, 9)}, {"a": gauge(1, 6), "b": gauge(1, 9.5)})
    assert cpu == (Fraction(1, 2) + Fraction(1, 4)) / 2


def test_frozen_time_does_not_count_as_idle_cpu() -> None:
    cpu, _ = measured({"a": gauge(0, 0)}, {"a": gauge(1, 1)}, {}, {}, {"a": gauge(4, 1)}, {"a": gauge(5, 2)})
    assert cpu == Fraction(1, 2), "two seconds awake, one of CPU time in each, of two CPUs"


def test_a_gauge_received_once_is_counted_once() -> None:
    same = {"a": gauge(1, 1, vram=80)}
    assert measured({"a": gauge(0, 0, vram=20)}, same, same, same) == (Fraction(1, 2), Fraction(1, 2))


def test_gpu_memory_is_averaged_over_time_and_then_over_instances() -> None:
    _, memory = measured({"a": gauge(0, vram=10), "b": gauge(0, vram=100)}, {"a": gauge(1, vram=30)})
    assert memory == Fraction(6, 10)


@pytest.mark.parametrize(
    "records",
    [
        [{}, {}],
        [{"a": gauge(0)}, {"a": gauge(1)}],  # awake, and nothing known of it
        [{"a": gauge(0, vram=5, limit=0)}, {"a": gauge(1, vram=5, limit=0)}],
        [{"a": gauge(0, 7)}, {"a": gauge(1, 3)}],  # a counter that went back says nothing
    ],
)
def test_without_a_sample_there_is_none(records: list[dict[str, Gauge]]) -> None:
    assert measured(*records) == (None, None)

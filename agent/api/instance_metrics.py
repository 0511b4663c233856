"""Metrics of a node's instances. An instance that has ended has no series, an unknown value has none either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from agent.core.snapshots import InstanceSnapshot, NodeSnapshot
from agent.core.types import SECOND_NS, InstanceState

LABELS = ("uid", "function")
_SHARES = (
    ("sm", "sm_percent", "Share of time in which kernels ran on the GPU it holds."),
    ("encoder", "encoder_percent", "Load of the video encoder of the GPU it holds."),
    ("decoder", "decoder_percent", "Load of the video decoder of the GPU it holds."),
)


def instance_metrics(instances: Sequence[InstanceSnapshot], node: NodeSnapshot) -> Iterator[Metric]:
    """The metrics of `instances`. A GPU's load is that of the instance that holds it, because GPUs are dedicated."""
    yield from _life(instances)
    yield from _requests(instances)
    yield from _memory(instances)
    yield from _shares(instances, node)


def _key(one: InstanceSnapshot) -> list[str]:
    return [one.uid, one.function.name]


def _life(instances: Sequence[InstanceSnapshot]) -> Iterator[Metric]:
    wakes = CounterMetricFamily("hibernode_wakes", "Wakes of an instance.", labels=LABELS)
    freezes = CounterMetricFamily("hibernode_freezes", "Freezes of an instance.", labels=LABELS)
    billed = CounterMetricFamily("hibernode_billed_seconds", "Metered time.", labels=[*LABELS, "kind"])
    last_wake = GaugeMetricFamily("hibernode_last_wake_seconds", "Duration of its last wake.", labels=LABELS)
    healthy = GaugeMetricFamily("hibernode_instance_healthy", "0 if its health check fails.", labels=LABELS)
    cpu = CounterMetricFamily("hibernode_instance_cpu_seconds", "CPU time of its processes.", labels=LABELS)
    for one in instances:
        key = _key(one)
        wakes.add_metric(key, one.wakes)
        freezes.add_metric(key, one.freezes)
        for kind, ns in (("active", one.active_ns), ("idle", one.idle_ns), ("unbilled", one.unbilled_ns)):
            billed.add_metric([*key, kind], ns / SECOND_NS)
        if one.wakes:
            last_wake.add_metric(key, one.last_wake_ns / SECOND_NS)
        healthy.add_metric(key, float(one.healthy))
        if one.usage.cpu_ns is not None:
            cpu.add_metric(key, one.usage.cpu_ns / SECOND_NS)
    yield from (wakes, freezes, billed, last_wake, healthy, cpu)


def _requests(instances: Sequence[InstanceSnapshot]) -> Iterator[Metric]:
    inside = GaugeMetricFamily("hibernode_requests_in_flight", "Requests inside an instance.", labels=LABELS)
    text = "Most requests inside an instance at once within the last one to two minutes."
    most = GaugeMetricFamily("hibernode_requests_in_flight_max", text, labels=LABELS)
    waiting = GaugeMetricFamily("hibernode_requests_waiting", "Requests at an instance's gate.", labels=LABELS)
    slots = GaugeMetricFamily("hibernode_instance_slots", "Requests it executes at once.", labels=LABELS)
    for one in instances:
        key = _key(one)
        inside.add_metric(key, one.in_flight)
        most.add_metric(key, one.peak_in_flight)
        waiting.add_metric(key, one.waiting)
        slots.add_metric(key, one.function.instance_concurrency)
    yield from (inside, most, waiting, slots)


def _memory(instances: Sequence[InstanceSnapshot]) -> Iterator[Metric]:
    text = "GPU memory available to it: what its function is billed for, or all of its GPUs."
    limit = GaugeMetricFamily("hibernode_instance_gpu_memory_limit_bytes", text, labels=LABELS)
    used = GaugeMetricFamily("hibernode_instance_gpu_memory_used_bytes", "GPU memory, by NVML.", labels=LABELS)
    share = GaugeMetricFamily(
        "hibernode_instance_gpu_memory_used_ratio", "GPU memory, share of its limit.", labels=LABELS
    )
    frozen = GaugeMetricFamily(
        "hibernode_instance_frozen_bytes", "GPU memory kept in host memory while it is frozen.", labels=LABELS
    )
    host = GaugeMetricFamily("hibernode_instance_memory_bytes", "Host memory while it is awake.", labels=LABELS)
    for one in instances:
        key = _key(one)
        frozen.add_metric(key, one.frozen_bytes)
        if one.vram_limit_bytes:
            limit.add_metric(key, one.vram_limit_bytes)
        if one.state is not InstanceState.RUNNING:
            continue
        if one.vram_bytes:
            used.add_metric(key, one.vram_bytes)
            if one.vram_limit_bytes:
                share.add_metric(key, one.vram_bytes / one.vram_limit_bytes)
        if one.usage.memory_bytes is not None:
            host.add_metric(key, one.usage.memory_bytes)
    yield from (limit, used, share, frozen, host)


def _shares(instances: Sequence[InstanceSnapshot], node: NodeSnapshot) -> Iterator[Metric]:
    by_uid = {one.uid: one for one in instances}
    for name, sample_field, text in _SHARES:
        metric = f"hibernode_instance_gpu_{name}_utilization_ratio"
        family = GaugeMetricFamily(metric, text, labels=[*LABELS, "gpu"])
        for gpu in node.gpus:
            holder, percent = by_uid.get(gpu.holder), getattr(gpu.figures, sample_field, None)
            if holder is not None and percent is not None:
                family.add_metric([*_key(holder), gpu.gpu.uuid], percent / 100)
        yield family

"""The agent's Prometheus metrics, collected from snapshots at each scrape, without counters of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.api.instance_metrics import instance_metrics
from agent.core.snapshots import NodeSnapshot
from agent.core.types import InstanceState
from agent.host.node.observer import Observer


@dataclass(frozen=True, slots=True)
class AgentHealth:
    """The agent's state that is not in a snapshot."""

    store_ok: bool  # the last write succeeded
    pending_windows: int  # in memory only
    merged_windows: int  # merged with others to bound memory
    unmatched_ends: int  # counts a bug: always 0
    scheduler_connected: bool | None  # None without a scheduler


class AgentMetrics(Collector):
    """A collector with its own registry. No label is called `instance`, because Prometheus sets that one."""

    def __init__(
        self,
        observer: Observer,
        health: Callable[[], AgentHealth],
        xids: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        """`xids`: number of XID events by (GPU UUID, code), read at every scrape."""
        self._observer = observer
        self._health = health
        self._xids = {} if xids is None else xids
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        node = self._observer.node()
        instances = self._observer.instances()
        states = GaugeMetricFamily("hibernode_instances", "Instances by state.", labels=["state"])
        for state in InstanceState:
            states.add_metric([state.value], sum(one.state is state for one in instances))
        yield states
        yield GaugeMetricFamily("hibernode_ready", "1 if recovery is done.", value=float(node.ready))
        yield GaugeMetricFamily(
            "hibernode_host_memory_reserved_bytes",
            "Host memory promised to frozen images.",
            value=node.host_reserved_bytes,
        )
        yield from self._health_metrics()
        yield from _gpu_metrics(node)
        xids = CounterMetricFamily("hibernode_gpu_xid_events", "XID events of the driver.", labels=["gpu", "code"])
        for (uuid, code), count in sorted(self._xids.items()):
            xids.add_metric([uuid, str(code)], count)
        yield xids
        yield from instance_metrics(instances, node)

    def _health_metrics(self) -> Iterator[Metric]:
        health = self._health()
        yield GaugeMetricFamily("hibernode_store_ok", "0 while the store fails.", value=float(health.store_ok))
        yield GaugeMetricFamily(
            "hibernode_ledger_pending_windows", "Usage windows not on disk yet.", value=health.pending_windows
        )
        yield CounterMetricFamily(
            "hibernode_ledger_merged_windows", "Windows merged to save memory.", value=health.merged_windows
        )
        yield CounterMetricFamily(
            "hibernode_ledger_unmatched_ends", "Requests that ended twice: always 0.", value=health.unmatched_ends
        )
        if health.scheduler_connected is not None:
            yield GaugeMetricFamily(
                "hibernode_scheduler_connected",
                "1 while the load stream is up.",
                value=float(health.scheduler_connected),
            )


_SAMPLE_METRICS = (
    ("memory_used_bytes", "memory_used_bytes", "GPU memory in use, by NVML.", 1),
    ("sm_utilization_ratio", "sm_percent", "Share of time in which kernels ran.", 100),
    ("memory_utilization_ratio", "memory_percent", "Share of time in which memory was read or written.", 100),
    ("encoder_utilization_ratio", "encoder_percent", "Load of the video encoder.", 100),
    ("decoder_utilization_ratio", "decoder_percent", "Load of the video decoder.", 100),
    ("temperature_celsius", "temperature_celsius", "Temperature of the chip.", 1),
    ("power_watts", "power_milliwatts", "Power drawn by the board.", 1000),
)
"""Metric, field of GpuSample, help, and the divisor to the base unit."""


def _gpu_metrics(node: NodeSnapshot) -> Iterator[Metric]:
    """Metrics of the GPUs; an unknown value has no sample, for 0 would be wrong."""
    for metric, sample_field, text, divisor in _SAMPLE_METRICS:
        family = GaugeMetricFamily(f"hibernode_gpu_{metric}", text, labels=["gpu"])
        for gpu in node.gpus:
            value = getattr(gpu.figures, sample_field, None)
            if value is not None:
                family.add_metric([gpu.gpu.uuid], value / divisor)
        yield family
    total = GaugeMetricFamily("hibernode_gpu_memory_total_bytes", "Size of GPU memory.", labels=["gpu"])
    lost = GaugeMetricFamily("hibernode_gpu_lost", "1 if NVML reports it lost.", labels=["gpu"])
    cordoned = GaugeMetricFamily("hibernode_gpu_cordoned", "1 if no instance may use it anew.", labels=["gpu"])
    held = GaugeMetricFamily("hibernode_gpu_held", "1 while an awake instance holds it.", labels=["gpu"])
    waiters = GaugeMetricFamily("hibernode_gpu_waiters", "Instances that wait for it.", labels=["gpu"])
    for gpu in node.gpus:
        uuid = [gpu.gpu.uuid]
        total.add_metric(uuid, gpu.gpu.memory_bytes)
        if gpu.figures is not None:
            lost.add_metric(uuid, float(gpu.figures.lost))
        cordoned.add_metric(uuid, float(bool(gpu.cordoned)))
        held.add_metric(uuid, float(bool(gpu.holder)))
        waiters.add_metric(uuid, len(gpu.waiters))
    yield from (total, lost, cordoned, held, waiters)

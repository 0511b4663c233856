"""The agent's Prometheus metrics, collected from snapshots when somebody asks: nothing is counted twice."""

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
    """What is not in a snapshot. `store_ok`: the last write worked; `pending_windows` are in memory only;
    `merged_windows` lost their borders to the bound on memory, `unmatched_ends` is a bug's counter;
    `scheduler_connected` is None without a scheduler."""

    store_ok: bool
    pending_windows: int
    merged_windows: int
    unmatched_ends: int
    scheduler_connected: bool | None


class AgentMetrics(Collector):
    """A collector with a registry of its own. No label is called `instance`: Prometheus uses that name itself."""

    def __init__(
        self,
        observer: Observer,
        health: Callable[[], AgentHealth],
        xids: Mapping[tuple[str, int], int] | None = None,
    ) -> None:
        """`xids` counts XID events by (GPU, code); read at every collection."""
        self._observer = observer
        self._health = health
        self._xids = {} if xids is None else xids
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every metric of this node now."""
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
        yield from self._of_health()
        yield from _of_gpus(node)
        xids = CounterMetricFamily("hibernode_gpu_xid_events", "XID events of the driver.", labels=["gpu", "code"])
        for (uuid, code), count in sorted(self._xids.items()):
            xids.add_metric([uuid, str(code)], count)
        yield xids
        yield from instance_metrics(instances, node)

    def _of_health(self) -> Iterator[Metric]:
        health = self._health()
        yield GaugeMetricFamily("hibernode_store_ok", "0 while the store fails.", value=float(health.store_ok))
        yield GaugeMetricFamily(
            "hibernode_ledger_pending_windows", "Usage windows not on disk yet.", value=health.pending_windows
        )
        yield CounterMetricFamily(
            "hibernode_ledger_merged_windows", "Windows merged for want of memory.", value=health.merged_windows
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


_FIGURES = (
    ("memory_used_bytes", "memory_used_bytes", "GPU memory in use, by NVML.", 1),
    ("sm_utilization_ratio", "sm_percent", "Share of time in which kernels ran.", 100),
    ("memory_utilization_ratio", "memory_percent", "Share of time in which memory was read or written.", 100),
    ("encoder_utilization_ratio", "encoder_percent", "Load of the video encoder.", 100),
    ("decoder_utilization_ratio", "decoder_percent", "Load of the video decoder.", 100),
    ("temperature_celsius", "temperature_celsius", "Temperature of the chip.", 1),
    ("power_watts", "power_milliwatts", "Power drawn by the board.", 1000),
)
"""Metric, field of GpuSample, help, and the divisor to the base unit."""


def _of_gpus(node: NodeSnapshot) -> Iterator[Metric]:
    """What is unknown has no sample: 0 would be a lie."""
    for metric, figure, text, divisor in _FIGURES:
        family = GaugeMetricFamily(f"hibernode_gpu_{metric}", text, labels=["gpu"])
        for gpu in node.gpus:
            value = getattr(gpu.figures, figure, None)
            if value is not None:
                family.add_metric([gpu.gpu.uuid], value / divisor)
        yield family
    total = GaugeMetricFamily("hibernode_gpu_memory_total_bytes", "GPU memory there is.", labels=["gpu"])
    lost = GaugeMetricFamily("hibernode_gpu_lost", "1 if NVML has lost it.", labels=["gpu"])
    cordoned = GaugeMetricFamily("hibernode_gpu_cordoned", "1 if nothing new may use it.", labels=["gpu"])
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

"""The agent's Prometheus metrics, collected from snapshots when somebody asks: nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.core.types import SECOND_NS, InstanceState
from agent.host.observe import Observer


class AgentMetrics(Collector):
    """A collector with a registry of its own. No label is called `instance`: Prometheus uses that name itself."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
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
        used = GaugeMetricFamily("hibernode_gpu_memory_used_bytes", "GPU memory in use, by NVML.", labels=["gpu"])
        cordoned = GaugeMetricFamily("hibernode_gpu_cordoned", "1 if nothing new may use it.", labels=["gpu"])
        for gpu in node.gpus:
            used.add_metric([gpu.gpu.uuid], gpu.memory_used_bytes)
            cordoned.add_metric([gpu.gpu.uuid], float(bool(gpu.cordoned)))
        yield used
        yield cordoned
        labels = ["uid", "function"]
        wakes = CounterMetricFamily("hibernode_wakes", "Wakes of an instance.", labels=labels)
        freezes = CounterMetricFamily("hibernode_freezes", "Freezes of an instance.", labels=labels)
        billed = CounterMetricFamily("hibernode_billed_seconds", "Metered time.", labels=[*labels, "kind"])
        inside = GaugeMetricFamily("hibernode_requests_in_flight", "Requests inside an instance.", labels=labels)
        waiting = GaugeMetricFamily("hibernode_requests_waiting", "Requests at an instance's gate.", labels=labels)
        for one in instances:
            key = [one.uid, one.function.name]
            wakes.add_metric(key, one.wakes)
            freezes.add_metric(key, one.freezes)
            inside.add_metric(key, one.in_flight)
            waiting.add_metric(key, one.waiting)
            for kind, ns in (("active", one.active_ns), ("idle", one.idle_ns), ("unbilled", one.unbilled_ns)):
                billed.add_metric([*key, kind], ns / SECOND_NS)
        yield from (wakes, freezes, billed, inside, waiting)

"""The scheduler's Prometheus metrics, collected from its state at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.api.function_metrics import FunctionMetrics
from agent.core.dispatch.model import NodeStanding
from agent.core.provisioning.model import Scheduling
from agent.core.types import SECOND_NS
from agent.scheduler.fleet.fleet import Fleet, NodeRecord
from agent.scheduler.gateway.gateway import GatewayCounts
from agent.scheduler.gateway.wake_calls import WakeCounts
from agent.v1.types_pb2 import Gpu


class SchedulerMetrics(Collector):
    """A collector with its own registry."""

    def __init__(self, functions: FunctionMetrics, fleet: Fleet, gateway: GatewayCounts, wakes: WakeCounts) -> None:
        self._functions = functions
        self._fleet = fleet
        self._gateway = gateway
        self._wakes = wakes
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._gateway_metrics()
        yield from self._functions.collect()
        yield from self._fleet_metrics()

    def _gateway_metrics(self) -> Iterator[Metric]:
        answers = CounterMetricFamily("hibernode_gateway_answers", "Answers to clients by status.", labels=["status"])
        for status in sorted({200, 429, 502, 503, 504, *self._gateway.answers}):
            answers.add_metric([str(status)], self._gateway.answers.get(status, 0))
        yield answers
        back = CounterMetricFamily("hibernode_gateway_returns", "Returned dispatches.", labels=["why"])
        back.add_metric(["refused"], self._gateway.refused)
        back.add_metric(["connect_failed"], self._gateway.connect_failed)
        yield back
        yield CounterMetricFamily("hibernode_gateway_cuts", "Answers cut before their end.", value=self._gateway.cut)
        wakes = CounterMetricFamily("hibernode_scheduler_wakes", "Wake calls by outcome.", labels=["outcome"])
        wakes.add_metric(["asked"], self._wakes.asked)
        wakes.add_metric(["failed"], self._wakes.failed)
        yield wakes

    def _fleet_metrics(self) -> Iterator[Metric]:
        records = self._fleet.nodes()
        nodes = GaugeMetricFamily("hibernode_nodes", "Nodes by standing.", labels=["standing"])
        for standing in NodeStanding:
            nodes.add_metric([standing.value], sum(node.standing is standing for node in records))
        yield nodes
        labels = ["node"]
        reported = GaugeMetricFamily("hibernode_node_heard_timestamp_seconds", "Time of last report.", labels=labels)
        waiting = GaugeMetricFamily("hibernode_node_gpu_waiters", "Instances waiting for a GPU.", labels=labels)
        gpus = GaugeMetricFamily("hibernode_node_gpus", "GPUs by use.", labels=["node", "use"])
        memory = GaugeMetricFamily("hibernode_node_host_memory_bytes", "Host memory by kind.", labels=["node", "kind"])
        settings = GaugeMetricFamily(
            "hibernode_node_scheduling", "1 for its scheduling setting.", labels=["node", "scheduling"]
        )
        for node in records:
            for scheduling in Scheduling:
                value = float(self._fleet.scheduling(node.name) is scheduling)
                settings.add_metric([node.name, scheduling.value], value)
            if node.last_heard_wall_ns:
                reported.add_metric([node.name], node.last_heard_wall_ns / SECOND_NS)
            if not node.last_heard_wall_ns or node.standing is NodeStanding.LOST:
                continue  # its last report is no longer true
            waiting.add_metric([node.name], node.load.gpu_waiting)
            for use, count in _gpu_use(node).items():
                gpus.add_metric([node.name, use], count)
            host = node.load.host_memory if node.load.HasField("host_memory") else node.registration.host_memory
            memory.add_metric([node.name, "total"], host.total_bytes)
            memory.add_metric([node.name, "available"], host.available_bytes)
            memory.add_metric([node.name, "reserved"], host.reserved_bytes)
        yield from (reported, settings, waiting, gpus, memory)


def _gpu_use(node: NodeRecord) -> dict[str, int]:
    """The number of GPUs that an awake instance holds, that are free, and that cannot be used."""
    found = {"held": 0, "free": 0, "unusable": 0}
    for gpu in node.gpus:
        usable = gpu.health == Gpu.HEALTH_OK and not gpu.mig
        found[("held" if gpu.holder_uids else "free") if usable else "unusable"] += 1
    return found

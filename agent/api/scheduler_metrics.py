"""The scheduler's Prometheus metrics, collected from what it holds when somebody asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from agent.core.dispatch import Dispatcher
from agent.core.leases import Standing
from agent.scheduler.fleet import Fleet
from agent.scheduler.functions import Catalog
from agent.scheduler.gateway import GatewayCounts
from agent.scheduler.wakes import WakeCounts
from agent.v1.types_pb2 import Instance


class SchedulerMetrics(Collector):
    """A collector with a registry of its own."""

    def __init__(
        self, catalog: Catalog, fleet: Fleet, dispatcher: Dispatcher, gateway: GatewayCounts, wakes: WakeCounts
    ) -> None:
        self._catalog = catalog
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._gateway = gateway
        self._wakes = wakes
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Everything now."""
        yield from self._gateway_metrics()
        yield from self._function_metrics()
        yield from self._fleet_metrics()

    def _gateway_metrics(self) -> Iterator[Metric]:
        answers = CounterMetricFamily("hibernode_gateway_answers", "Answers to clients by status.", labels=["status"])
        for status in sorted({200, 429, 502, 503, 504, *self._gateway.answers}):
            answers.add_metric([str(status)], self._gateway.answers.get(status, 0))
        yield answers
        back = CounterMetricFamily("hibernode_gateway_returns", "Dispatches that came back.", labels=["why"])
        back.add_metric(["refused"], self._gateway.refused)
        back.add_metric(["connect_failed"], self._gateway.connect_failed)
        yield back
        yield CounterMetricFamily("hibernode_gateway_cuts", "Answers cut in their middle.", value=self._gateway.cut)
        wakes = CounterMetricFamily("hibernode_scheduler_wakes", "Wake calls by outcome.", labels=["outcome"])
        wakes.add_metric(["asked"], self._wakes.asked)
        wakes.add_metric(["failed"], self._wakes.failed)
        yield wakes

    def _function_metrics(self) -> Iterator[Metric]:
        labels = ["function"]
        target = GaugeMetricFamily("hibernode_function_target", "Instances wanted.", labels=labels)
        queued = GaugeMetricFamily("hibernode_function_queued", "Requests that wait.", labels=labels)
        waking = GaugeMetricFamily("hibernode_function_waking", "Instances on their way awake.", labels=labels)
        for function in self._catalog.all():
            name = function.spec.name
            state = self._dispatcher.queue_state(name)
            target.add_metric([name], function.target)
            queued.add_metric([name], state.queued)
            waking.add_metric([name], state.waking)
        yield from (target, queued, waking)

    def _fleet_metrics(self) -> Iterator[Metric]:
        nodes = GaugeMetricFamily("hibernode_nodes", "Nodes by standing.", labels=["standing"])
        records = self._fleet.nodes()
        for standing in Standing:
            nodes.add_metric([standing.value], sum(node.standing is standing for node in records))
        yield nodes
        counts: dict[tuple[str, str], int] = {}
        for _, load in self._fleet.instances():
            key = (load.function, Instance.State.Name(load.state).removeprefix("STATE_"))
            counts[key] = counts.get(key, 0) + 1
        instances = GaugeMetricFamily(
            "hibernode_fleet_instances", "Instances by function and state.", labels=["function", "state"]
        )
        for (function, state), count in sorted(counts.items()):
            instances.add_metric([function, state], count)
        yield instances

"""Metrics of functions, named after Function Compute's. A deployed function has all of its series from the start; those
of a deleted one disappear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.model import NodeStanding
from agent.core.traffic import CLASSES, Durations, Traffic
from agent.core.types import SECOND_NS
from agent.ports import Clock
from agent.scheduler.fleet.fleet import ENDED, Fleet
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deployed import Deployed
from agent.scheduler.gateway.traffic import TrafficTable
from agent.scheduler.usage.totals import KINDS, UsageTotals
from agent.v1.scheduler_service_pb2 import InstanceLoad
from agent.v1.types_pb2 import Instance

_NEVER_REPORTED = (Instance.STATE_UNSPECIFIED, Instance.STATE_UNKNOWN)
_STATES = {
    number: name.removeprefix("STATE_") for name, number in Instance.State.items() if number not in _NEVER_REPORTED
}
_LEAVING = (*ENDED, Instance.STATE_STOPPING)
_Kind = TypeVar("_Kind", CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily)


class _Families(dict[str, Metric]):
    """Metric families by name, created on first use; `function` is the first label of each."""

    def counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return self._family(CounterMetricFamily, name, text, labels)

    def gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return self._family(GaugeMetricFamily, name, text, labels)

    def histogram(self, name: str, text: str, function: str, durations: Durations) -> None:
        found = self._family(HistogramMetricFamily, name, text, ())
        found.add_metric([function], durations.cumulative(), durations.sum_ns / SECOND_NS)

    def _family(self, kind: type[_Kind], name: str, text: str, labels: tuple[str, ...]) -> _Kind:
        found = self.get(name)
        if found is None:
            found = self[name] = kind(name, text, labels=["function", *labels])
        assert isinstance(found, kind)
        return found


class FunctionMetrics:
    """Collects from the scheduler's state; keeps no counters of its own."""

    def __init__(
        self,
        clock: Clock,
        catalog: Catalog,
        fleet: Fleet,
        dispatcher: Dispatcher,
        traffic: TrafficTable,
        usage: UsageTotals,
    ) -> None:
        self._clock = clock
        self._catalog = catalog
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._traffic = traffic
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        out = _Families()
        functions = self._catalog.all()
        names = {function.spec.name for function in functions}
        instances: dict[str, list[InstanceLoad]] = {name: [] for name in names}
        undeployed = 0
        for node, load in self._fleet.instances():
            if node.standing is NodeStanding.LOST:
                continue  # no longer counted, and replaced on other nodes
            if load.function in names:
                instances[load.function].append(load)
            else:
                undeployed += load.state not in ENDED
        now = self._clock.monotonic_ns()
        for name, traffic in self._traffic.all().items():
            _traffic(out, name, traffic, now)
        for function in functions:
            self._provisioning(out, function, instances[function.spec.name], now)
        for name, usage in self._usage.all().items():
            gpu = out.counter("hibernode_function_gpu_seconds", "Metered time of GPUs, by kind.", "kind")
            vcpu = out.counter("hibernode_function_vcpu_seconds", "Metered time of vCPUs, by kind.", "kind")
            for kind in KINDS:
                gpu.add_metric([name, kind], usage.gpu_ns[kind] / SECOND_NS)
                vcpu.add_metric([name, kind], usage.vcpu_milli_ns[kind] / (1000 * SECOND_NS))
        yield from out.values()
        text = "Instances of functions that are not deployed here."
        yield GaugeMetricFamily("hibernode_foreign_instances", text, value=undeployed)

    def _provisioning(self, out: _Families, function: Deployed, loads: list[InstanceLoad], now: int) -> None:
        name, key = function.spec.name, [function.spec.name]
        queue = self._dispatcher.queue_state(name)
        current = [load for load in loads if load.state not in _LEAVING]
        leased = sum(self._dispatcher.leased(load.uid) for load in loads)
        lease_s = self._dispatcher.lease_time_ns(name, now) / SECOND_NS
        gauge = out.gauge
        gauge("hibernode_function_target_instances", "Instances wanted now.").add_metric(key, function.target)
        gauge("hibernode_function_current_instances", "Instances, awake or frozen.").add_metric(key, len(current))
        gauge("hibernode_function_degraded", "1 while a problem keeps it from its target.").add_metric(
            key, float(self._catalog.problem(name) is not None)
        )
        gauge("hibernode_function_queued_requests", "Requests waiting for an instance.").add_metric(key, queue.queued)
        gauge("hibernode_function_waking_instances", "Instances being woken.").add_metric(key, queue.waking)
        gauge("hibernode_function_leased_slots", "Slots that hold a request of this gateway.").add_metric(key, leased)
        gauge("hibernode_function_slots", "Requests that its instances execute at once.").add_metric(
            key, sum(load.concurrency for load in current)
        )
        out.counter("hibernode_function_lease_seconds", "Leased slots, summed over time.").add_metric(key, lease_s)
        states = gauge("hibernode_function_instances", "Instances by state.", "state")
        counts = Counter(load.state for load in loads)
        for number, state in _STATES.items():
            states.add_metric([name, state], counts[number])


def _traffic(out: _Families, name: str, traffic: Traffic, now: int) -> None:
    key, counter = [name], out.counter
    counter("hibernode_function_invocations", "Requests received for it.").add_metric(key, traffic.invocations)
    responses = counter("hibernode_function_responses", "Answers by status class.", "class")
    for number in CLASSES:
        responses.add_metric([name, f"{number}xx"], traffic.responses[number])
    counter("hibernode_function_client_errors", "4xx answers of Hibernode itself, without throttles.").add_metric(
        key, traffic.client_errors
    )
    counter("hibernode_function_server_errors", "5xx answers of Hibernode itself, without throttles.").add_metric(
        key, traffic.server_errors
    )
    throttles = counter("hibernode_function_throttles", "Refused: queue full (429), or no instance (503).", "kind")
    throttles.add_metric([name, "concurrency"], traffic.queue_full)
    throttles.add_metric([name, "resource"], traffic.no_capacity)
    unanswered = counter("hibernode_function_unanswered", "Requests that ended without a complete answer.", "why")
    unanswered.add_metric([name, "client_left"], traffic.left)
    unanswered.add_metric([name, "cut"], traffic.cut)
    text = "Arrival to the answer's last byte, of requests that an instance answered."
    out.histogram("hibernode_function_duration_seconds", text, name, traffic.duration)
    text = "The part of the duration spent waiting for an instance."
    out.histogram("hibernode_function_queue_seconds", text, name, traffic.queue)
    text = "The part of the wait spent on a wake, of requests that waited for one."
    out.histogram("hibernode_function_wake_seconds", text, name, traffic.wake)
    out.gauge("hibernode_function_duration_max_seconds", "Longest of the last one to two minutes.").add_metric(
        key, traffic.longest.read(now) / SECOND_NS
    )

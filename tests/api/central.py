"""A scheduler with its gateway, fleet and metrics, without a daemon around it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from agent.api.function_metrics import FunctionMetrics
from agent.api.scheduler_metrics import SchedulerMetrics
from agent.core.types import GIB, SECOND_NS
from agent.event_log import EventLog
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.gateway.wake_calls import WakeCounts
from agent.scheduler.usage.totals import UsageTotals
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import Gpu, HostMemory, Instance, Node
from tests.api.promql import Scrape, read_scrape
from tests.fakes.clock import FakeClock
from tests.scheduler.gateway.rig import GatewayRig, gateway_rig


@dataclass
class Central:
    """Node n1 has a fake ingress; the fleet knows only what `report` sends."""

    rig: GatewayRig
    fleet: Fleet
    clock: FakeClock
    metrics: SchedulerMetrics

    def scrape(self) -> Scrape:
        return read_scrape(self.metrics.render().decode())

    def report(self, *instances: InstanceLoad, gpus: tuple[Gpu, ...] = ()) -> None:
        """A node's first message."""
        stream = self.fleet.stream_opened("n1")
        registration = Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2", gpus=gpus)
        memory = HostMemory(total_bytes=64 * GIB, available_bytes=32 * GIB, reserved_bytes=GIB)
        load = NodeLoad(state=Node.STATE_READY, host_memory=memory, gpu_waiting=3, gpus=gpus)
        message = ReportLoadRequest(
            epoch=1, sequence=1, snapshot=True, registration=registration, load=load, instances=instances
        )
        self.fleet.receive("n1", stream, message)


@asynccontextmanager
async def a_central(tmp: str) -> AsyncIterator[Central]:
    async with gateway_rig(tmp, "n1") as rig:
        clock = FakeClock()
        fleet = Fleet(clock, EventLog(clock), rig.apply, lambda: None, suspect_ns=3 * SECOND_NS, lost_ns=10 * SECOND_NS)
        usage = UsageTotals(lambda: [one.spec.name for one in rig.catalog.all()])
        functions = FunctionMetrics(clock, rig.catalog, fleet, rig.dispatcher, rig.gateway.traffic, usage)
        yield Central(rig, fleet, clock, SchedulerMetrics(functions, fleet, rig.gateway.counts, WakeCounts()))


def load(uid: str, state: Instance.State.ValueType, function: str = "ocr") -> InstanceLoad:
    return InstanceLoad(uid=uid, function=function, revision="1", state=state, concurrency=4, healthy=True)

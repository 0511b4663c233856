"""An autoscaler with a real catalog, fleet, dispatcher and servicer, on a clock that a test moves."""

from __future__ import annotations

from agent.api.function_servicer import FunctionServicer
from agent.core.dispatch.dispatcher import Dispatcher
from agent.core.dispatch.events import Dispatch, Event, LeaseEnded, RequestArrived
from agent.core.provisioning.autoscaling import Patience
from agent.core.types import SECOND_NS
from agent.event_log import EventLog
from agent.scheduler.database.store import Store
from agent.scheduler.fleet.fleet import Fleet
from agent.scheduler.functions.autoscaler import Autoscaler
from agent.scheduler.functions.catalog import Catalog
from agent.scheduler.functions.deploy_rules import Defaults
from agent.scheduler.functions.deployed import Deployed
from agent.scheduler.functions.last_targets import LastTargets
from agent.v1 import function_service_pb2 as pb
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import FunctionSpec, Instance, Node
from tests.fakes.clock import FakeClock
from tests.wire.test_convert_provision import seed_policy

PERIOD_S = 60
RUNNING, FROZEN = Instance.STATE_RUNNING, Instance.STATE_FROZEN


class Rig:
    """A function `ocr` and a node n1, wired as in the daemon. A new one on the same store is a restart."""

    def __init__(self, store: Store) -> None:
        self.clock = FakeClock()
        self.dispatcher = Dispatcher()
        self.event_log = EventLog(self.clock)
        self.fleet = Fleet(self.clock, self.event_log, self.apply, self.fleet_changed, 3 * SECOND_NS, 10 * SECOND_NS)
        self.catalog = Catalog(self.clock, self.event_log, store, self.apply, self.catalog_changed, Defaults())
        self.targets: list[int] = []
        self.last = LastTargets(store)
        period_ns = PERIOD_S * SECOND_NS
        self.scaler = Autoscaler(
            self.clock,
            self.event_log,
            self.catalog,
            self.fleet,
            self.dispatcher,
            period_ns,
            Patience(),
            self.moved,
            self.last,
        )
        self.servicer = FunctionServicer(self.clock, self.catalog, self.fleet, self.dispatcher, self.scaler, "http://g")
        self.loads: dict[str, InstanceLoad] = {}
        self.gauges: dict[str, NodeLoad.InstanceGauges] = {}
        self.stream = self.sequence = self.requests = 0

    async def restarted(self, store: Store) -> Rig:
        """A scheduler that starts on what this one has written."""
        await self.last.write()
        again = Rig(store)
        await again.catalog.load()
        await again.last.load()
        again.scaler.check()
        return again

    def apply(self, event: Event) -> None:
        self.dispatcher.step(event, self.clock.monotonic_ns())

    def catalog_changed(self) -> None:
        self.scaler.check()

    def fleet_changed(self) -> None:
        if self.scaler.waiting:
            self.scaler.check()

    def moved(self) -> None:
        self.targets.append(self.ocr.target)

    @property
    def ocr(self) -> Deployed:
        found = self.catalog.find("ocr")
        assert found is not None
        return found

    @property
    def policy(self) -> pb.Provision.PolicyState:
        return self.servicer._provision(self.ocr).policies[0]

    async def deploy(self, target: int = 1, provision: pb.ProvisionConfig | None = None, **spec: object) -> None:
        message = FunctionSpec(name="ocr", entrypoint=["app"], **spec)  # type: ignore[arg-type]
        await self.catalog.deploy(pb.DeployFunctionRequest(spec=message, target=target, provision=provision))

    async def put(self, target: int = 1, **entries: object) -> pb.PutProvisionConfigResponse:
        given = pb.ProvisionConfig(default_target=target, **entries)  # type: ignore[arg-type]
        request = pb.PutProvisionConfigRequest(function="ocr", config=given)
        return await self.servicer.PutProvisionConfig(request, None)

    async def listed(self) -> list[pb.Provision]:
        answer = await self.servicer.ListProvisionConfigs(pb.ListProvisionConfigsRequest(), None)
        return list(answer.provisions)

    def instances(self, count: int, state: Instance.State.ValueType = RUNNING) -> None:
        """Let n1 report `count` instances."""
        self.loads = {
            f"i{n}": InstanceLoad(
                uid=f"i{n}", function="ocr", request_id=f"ocr/1/{n}/1", state=state, healthy=True, concurrency=1
            )
            for n in range(count)
        }
        self.report()

    def report(self, *, heartbeat: bool = True) -> None:
        """Everything n1 has, with or without its gauges."""
        if not self.stream:
            self.stream = self.fleet.stream_opened("n1")
        self.sequence += 1
        load = NodeLoad(state=Node.STATE_READY, instances=self.gauges.values()) if heartbeat else None
        message = ReportLoadRequest(epoch=1, sequence=self.sequence, snapshot=True, load=load)
        if self.sequence == 1:
            message.registration.CopyFrom(Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2"))
        message.instances.extend(self.loads.values())
        self.fleet.receive("n1", self.stream, message)

    def busy(self, count: int) -> list[tuple[int, str]]:
        """Begin `count` requests that stay."""
        held = []
        for _ in range(count):
            self.requests += 1
            arrived = RequestArrived(self.requests, "ocr", 1 << 62)
            effects = self.dispatcher.step(arrived, self.clock.monotonic_ns())
            held += [(one.request, one.uid) for one in effects if isinstance(one, Dispatch)]
        return held

    def end(self, held: list[tuple[int, str]]) -> None:
        for request, uid in held:
            self.apply(LeaseEnded(request, uid))

    def pass_time(self, seconds: int, *, reporting: bool = True) -> None:
        """The autoscaler checks every second, as in the daemon."""
        for _ in range(seconds):
            self.clock.advance(SECOND_NS)
            if reporting:
                self.report()
            self.fleet.check_silence()
            self.scaler.check()

    def periods(self, count: int) -> None:
        self.pass_time(count * PERIOD_S)


def current_policy(**other: object) -> pb.TargetTrackingPolicy:
    """The example's policy with a current window."""
    return seed_policy(**{"start_time": "2023-01-01T00:00:00Z", "end_time": "2033-01-01T00:00:00Z", **other})

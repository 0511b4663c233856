"""The scaler with a real catalog, fleet and dispatcher, on a clock that moves only when told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.api.function_servicer import FunctionServicer
from agent.core.dispatch import Dispatcher
from agent.core.dispatch_events import Dispatch, Event, LeaseEnded, RequestArrived
from agent.core.errors import InvalidArgumentError, NotFoundError, UnavailableError
from agent.core.scaling import Patience
from agent.core.types import SECOND_NS, IdleMode
from agent.scheduler.deploy_rules import Defaults
from agent.scheduler.fleet import Fleet
from agent.scheduler.functions import Catalog, Deployed
from agent.scheduler.scaler import Scaler
from agent.scheduler.store import FunctionRow, Store
from agent.v1 import function_service_pb2 as pb
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad, Registration, ReportLoadRequest
from agent.v1.types_pb2 import FunctionSpec, Instance, Node
from tests.fakes.clock import FakeClock
from tests.wire.test_convert_provision import BAD, Change, config, morning, seed_policy

PERIOD_S = 60
RUNNING, FROZEN = Instance.STATE_RUNNING, Instance.STATE_FROZEN
NOW = "2023-11-14T22:13:20Z"
"""What the clock says at first: a Tuesday."""


class Rig:
    """One function `ocr` and one node n1, put together as the daemon does. A new one on the same store is a restart."""

    def __init__(self, store: Store) -> None:
        self.clock = FakeClock()
        self.dispatcher = Dispatcher()
        self.fleet = Fleet(self.clock, self.tell, self.fleet_changed, 3 * SECOND_NS, 10 * SECOND_NS)
        self.catalog = Catalog(self.clock, store, self.tell, self.catalog_changed, Defaults())
        self.targets: list[int] = []
        self.scaler = Scaler(
            self.clock, self.catalog, self.fleet, self.dispatcher, PERIOD_S * SECOND_NS, Patience(), self.moved
        )
        self.servicer = FunctionServicer(self.catalog, self.fleet, self.dispatcher, self.scaler, "http://g")
        self.loads: dict[str, InstanceLoad] = {}
        self.gauges: dict[str, NodeLoad.InstanceGauges] = {}
        self.stream = self.sequence = self.requests = 0

    def tell(self, event: Event) -> None:
        self.dispatcher.step(event, self.clock.monotonic_ns())

    def catalog_changed(self) -> None:
        self.scaler.look()

    def fleet_changed(self) -> None:
        if self.scaler.waiting:
            self.scaler.look()

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
        """n1 reports so many."""
        self.loads = {
            f"i{n}": InstanceLoad(
                uid=f"i{n}", function="ocr", request_id=f"ocr/1/{n}/1", state=state, healthy=True, concurrency=1
            )
            for n in range(count)
        }
        self.report()

    def report(self) -> None:
        if not self.stream:
            self.stream = self.fleet.opened("n1")
        self.sequence += 1
        load = NodeLoad(state=Node.STATE_READY, instances=self.gauges.values())
        message = ReportLoadRequest(epoch=1, sequence=self.sequence, snapshot=True, load=load)
        if self.sequence == 1:
            message.registration.CopyFrom(Registration(ingress_address="127.0.0.1:1", grpc_address="127.0.0.1:2"))
        message.instances.extend(self.loads.values())
        self.fleet.took("n1", self.stream, message)

    def busy(self, count: int) -> list[tuple[int, str]]:
        """So many requests begin and stay."""
        held = []
        for _ in range(count):
            self.requests += 1
            arrived = RequestArrived(self.requests, "ocr", 1 << 62)
            effects = self.dispatcher.step(arrived, self.clock.monotonic_ns())
            held += [(one.request, one.uid) for one in effects if isinstance(one, Dispatch)]
        return held

    def end(self, held: list[tuple[int, str]]) -> None:
        for request, uid in held:
            self.tell(LeaseEnded(request, uid))

    def pass_time(self, seconds: int, *, reporting: bool = True) -> None:
        """The scaler looks every second, as it does in life."""
        for _ in range(seconds):
            self.clock.advance(SECOND_NS)
            if reporting:
                self.report()
            self.fleet.check_silence()
            self.scaler.look()

    def periods(self, count: int) -> None:
        self.pass_time(count * PERIOD_S)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def rig(store: Store) -> Rig:
    return Rig(store)


def current_policy(**other: object) -> pb.TargetTrackingPolicy:
    """The seed's, but for its window."""
    return seed_policy(**{"start_time": "2023-01-01T00:00:00Z", "end_time": "2033-01-01T00:00:00Z", **other})


# ---- policies -------------------------------------------------------------------------------------------------


async def test_the_seed_s_walkthrough_from_one_to_two_at_once_and_on_under_load(rig: Rig) -> None:
    await rig.deploy(target=1)
    rig.instances(1)
    answer = await rig.put(target=1, target_tracking_policies=[current_policy()])
    assert (answer.provision.target, answer.provision.decided_by) == (2, "scaling-policy-demo")
    assert not answer.warnings
    rig.instances(2)
    held = rig.busy(2)
    rig.periods(2)
    assert rig.ocr.target == 2, "two periods are not three"
    rig.periods(1)
    assert rig.ocr.target == 7, "2 x 1 / 0.3, rounded up"
    assert rig.policy.metric == 1.0
    rig.instances(7)
    held += rig.busy(5)
    rig.periods(3)
    assert rig.ocr.target == 24
    rig.instances(24)
    held += rig.busy(17)
    rig.periods(3)
    assert rig.ocr.target == 30, "the policy's maximum"
    rig.end(held)
    rig.instances(30)
    rig.periods(4)
    assert rig.ocr.target == 15, "half of what is too much goes at once; the first period had been cut short"
    assert rig.targets == [2, 7, 24, 30, 15]


async def test_queued_requests_are_not_utilisation(rig: Rig) -> None:
    await rig.deploy()
    await rig.put(target_tracking_policies=[current_policy(metric_target=1.0)])
    rig.instances(2)
    rig.busy(50)
    rig.periods(6)
    assert (rig.policy.metric, rig.ocr.target) == (1.0, 2)


async def test_sleeping_instances_are_slots_and_no_samples_of_cpu_and_memory(rig: Rig) -> None:
    cpu, memory = (
        pb.TargetTrackingPolicy.METRIC_TYPE_CPU_UTILIZATION,
        pb.TargetTrackingPolicy.METRIC_TYPE_GPU_MEM_UTILIZATION,
    )
    policies = [
        current_policy(name="cpu", metric_type=cpu),
        current_policy(name="memory", metric_type=memory),
        current_policy(name="slots"),
    ]
    await rig.deploy()
    rig.instances(8, FROZEN)
    await rig.put(target_tracking_policies=policies)
    assert rig.ocr.target == 8
    rig.periods(4)
    states = {one.name: one for one in rig.servicer._provision(rig.ocr).policies}
    assert not states["cpu"].HasField("metric")
    assert not states["memory"].HasField("metric")
    assert states["slots"].metric == 0.0
    assert [states[name].target for name in ("cpu", "memory", "slots")] == [8, 8, 4]
    assert (rig.ocr.target, rig.ocr.decided_by) == (8, "cpu"), "the highest counts"


async def test_cpu_and_memory_of_awake_instances_come_with_the_heartbeats(rig: Rig) -> None:
    cpu, memory = (
        pb.TargetTrackingPolicy.METRIC_TYPE_CPU_UTILIZATION,
        pb.TargetTrackingPolicy.METRIC_TYPE_GPU_MEM_UTILIZATION,
    )
    policies = [current_policy(name="cpu", metric_type=cpu), current_policy(name="memory", metric_type=memory)]
    await rig.deploy(vcpu_millis=2000)
    rig.instances(2)
    await rig.put(target_tracking_policies=policies)
    for second in range(3 * PERIOD_S + 1):
        rig.gauges = {
            f"i{n}": NodeLoad.InstanceGauges(
                uid=f"i{n}", cpu_ns=second * SECOND_NS, vram_bytes=9 * (n + 1), vram_limit_bytes=30
            )
            for n in range(2)
        }
        rig.pass_time(1)
    states = {one.name: one for one in rig.servicer._provision(rig.ocr).policies}
    assert states["cpu"].metric == 0.5
    assert states["memory"].metric == 0.45
    assert (states["cpu"].target, states["memory"].target) == (4, 3)


async def test_a_policy_begins_and_ends_with_its_window(rig: Rig) -> None:
    policy = current_policy(start_time="2023-11-14T22:14:20Z", end_time="2023-11-14T22:15:20Z", min_capacity=3)
    await rig.deploy(target=1)
    rig.instances(1)
    await rig.put(target=1, target_tracking_policies=[policy])
    assert (rig.ocr.target, rig.policy.active) == (1, False)
    rig.pass_time(59)
    assert rig.ocr.target == 1
    rig.pass_time(1)
    assert (rig.ocr.target, rig.policy.active, rig.policy.target) == (3, True, 3)
    rig.pass_time(60)
    assert (rig.ocr.target, rig.policy.active, rig.policy.target, rig.ocr.decided_by) == (1, False, 0, "")


async def test_instances_that_are_not_heard_are_no_reason_to_have_fewer(rig: Rig) -> None:
    await rig.deploy()
    rig.instances(4)
    await rig.put(target_tracking_policies=[current_policy(min_capacity=1)])
    rig.periods(2)
    rig.pass_time(PERIOD_S, reporting=False)  # suspect, then lost: nothing is known, and that is not zero
    assert rig.ocr.target == 4
    rig.periods(2)
    assert rig.ocr.target == 4
    rig.periods(2)
    assert rig.ocr.target == 2


async def test_a_short_silence_of_a_node_does_not_keep_a_busy_function_from_growing(rig: Rig) -> None:
    await rig.deploy()
    rig.instances(2)
    await rig.put(target_tracking_policies=[current_policy()])
    rig.busy(2)
    rig.periods(2)
    rig.pass_time(5, reporting=False)  # suspect: its slots and its leases do not count
    rig.pass_time(PERIOD_S - 5)
    assert (rig.policy.metric, rig.ocr.target) == (1.0, 7)


async def test_the_same_policy_put_again_goes_on_as_it_was(rig: Rig) -> None:
    await rig.deploy()
    await rig.put(target_tracking_policies=[current_policy()])
    rig.instances(2)
    rig.busy(2)
    rig.periods(2)
    await rig.put(target=5, target_tracking_policies=[current_policy()])
    rig.periods(1)
    assert rig.ocr.target == 7


# ---- schedules ------------------------------------------------------------------------------------------------


async def test_scheduled_targets_come_and_go_with_the_clock(rig: Rig) -> None:
    window = {"start_time": "2023-11-14T12:00:00", "end_time": "2023-11-15T06:20:00", "time_zone": ""}
    actions = [
        morning(name="up", target=4, schedule_expression="at(2023-11-14T22:13:30)", **window),
        morning(name="down", target=0, schedule_expression="cron(40 13 22 ? * TUE)", **window),
        morning(
            name="shanghai",
            target=2,
            schedule_expression="cron(50 13 6 * * *)",
            **{**window, "time_zone": "Asia/Shanghai"},
        ),
    ]
    await rig.deploy(target=1)
    rig.instances(1)
    await rig.put(target=1, scheduled_actions=actions)
    seen = [(0, rig.ocr.target, rig.ocr.decided_by)]
    for second in range(1, 420):
        rig.pass_time(1)
        if (rig.ocr.target, rig.ocr.decided_by) != seen[-1][1:]:
            seen.append((second, rig.ocr.target, rig.ocr.decided_by))
    assert seen == [(0, 1, ""), (10, 4, "up"), (20, 0, "down"), (30, 2, "shanghai"), (400, 1, "")]


async def test_a_clock_set_back_is_followed(rig: Rig) -> None:
    window = {"start_time": "2023-11-14T00:00:00", "end_time": "2023-11-15T00:00:00", "time_zone": ""}
    await rig.deploy(target=1)
    await rig.put(
        target=1, scheduled_actions=[morning(target=4, schedule_expression="at(2023-11-14T22:13:30)", **window)]
    )
    rig.pass_time(20)
    assert rig.ocr.target == 4
    rig.clock.step_wall(-30 * SECOND_NS)
    rig.scaler.look()
    assert rig.ocr.target == 1


# ---- restarts -------------------------------------------------------------------------------------------------


async def test_a_restart_never_scales_in_what_was_scaled_out(rig: Rig, store: Store) -> None:
    """Targets of policies are not stored: what there is says it, as soon as everybody has said what there is."""
    await rig.deploy(target=0)
    await rig.put(target=0, target_tracking_policies=[current_policy()])
    again = Rig(store)
    again.fleet.expect("n1")
    await again.catalog.load()
    again.scaler.look()
    assert not again.fleet.settled()
    assert again.ocr.target == 2, "the least there may be: who asks now waits and is not sent away"
    assert again.dispatcher.step(RequestArrived(1, "ocr", 1 << 62), again.clock.monotonic_ns()) == []
    again.pass_time(2, reporting=False)
    assert again.ocr.target == 2
    again.instances(9)
    assert again.fleet.settled()
    assert again.ocr.target == 9, "decided before anybody can act on the fleet being settled"
    assert not again.scaler.waiting


async def test_a_restart_knows_which_action_fired_last(rig: Rig, store: Store) -> None:
    window = {"start_time": "2023-11-01T00:00:00", "end_time": "2023-12-01T00:00:00", "time_zone": ""}
    actions = [
        morning(name="up", target=4, schedule_expression="cron(0 0 8 * * *)", **window),
        morning(name="down", target=2, schedule_expression="cron(0 0 20 * * *)", **window),
    ]
    await rig.deploy(target=1, provision=pb.ProvisionConfig(scheduled_actions=actions))
    again = Rig(store)
    await again.catalog.load()
    again.scaler.look()
    assert (again.ocr.target, again.ocr.default_target, again.ocr.decided_by) == (2, 1, "down")
    assert again.ocr.config == rig.ocr.config


async def test_what_is_stored_and_no_longer_understood_stops_nobody(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    unknown = pb.ProvisionConfig(scheduled_actions=[morning(time_zone="Nowhere/Land")])
    row = next(iter(await store.functions()))
    await store.put_function(row, unknown.SerializeToString())
    again = Rig(store)
    await again.catalog.load()
    again.scaler.look()
    assert again.ocr.target == 1
    assert again.ocr.config == unknown, "listed as it is, for people to mend"


# ---- the API --------------------------------------------------------------------------------------------------


async def test_the_unedited_seed_is_taken_with_a_warning_and_the_target_stays(rig: Rig) -> None:
    rig.clock.step_wall(3 * 365 * 86_400 * SECOND_NS)
    await rig.deploy(target=1)
    answer = await rig.put(target=1, target_tracking_policies=[seed_policy()])
    assert list(answer.warnings) == [
        "targetTrackingPolicies[0] scaling-policy-demo: window ended at 2024-07-30T16:00:00.000Z; the target stays"
    ]
    assert (answer.provision.target, answer.provision.decided_by) == (1, "")
    assert answer.provision.config.target_tracking_policies == [seed_policy()], "listed as it was put"


async def test_a_deploy_leaves_schedule_and_policies_alone_unless_it_brings_some(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    await rig.put(target=1, scheduled_actions=[morning()], target_tracking_policies=[current_policy()])
    await rig.deploy(target=3, port=8080)
    assert (rig.ocr.default_target, rig.ocr.target, rig.ocr.spec.revision) == (3, 2, "2")
    assert rig.ocr.config.scheduled_actions == [morning()]
    await rig.deploy(target=3, port=8080, provision=pb.ProvisionConfig())
    assert (rig.ocr.target, rig.ocr.config) == (3, pb.ProvisionConfig())
    assert await store.provision_configs() == {}


async def test_always_allocate_gpu_is_another_revision_and_saying_it_again_is_not(rig: Rig) -> None:
    await rig.deploy(target=1)
    seen = []
    for always in (False, True, True, None, False):
        given = {} if always is None else {"always_allocate_gpu": always}
        answer = await rig.put(**given)
        seen.append((rig.ocr.spec.revision, answer.provision.always_allocate_gpu, rig.ocr.spec.idle.mode))
    asleep, awake = IdleMode.REQUIRE, IdleMode.NEVER
    assert seen == [
        ("1", False, asleep),
        ("2", True, awake),
        ("2", True, awake),
        ("2", True, awake),
        ("3", False, asleep),
    ]


async def test_put_list_and_delete(rig: Rig, store: Store) -> None:
    await rig.deploy(target=0)
    assert await rig.listed() == []
    await rig.put(target=0, target_tracking_policies=[current_policy()])
    rig.instances(2)
    (one,) = await rig.listed()
    assert (one.function, one.target, one.current, one.config.default_target) == ("ocr", 2, 2, 0)
    assert one.policies == [pb.Provision.PolicyState(name="scaling-policy-demo", active=True, target=2)]
    function = (await rig.servicer.GetFunction(pb.GetFunctionRequest(name="ocr"), None)).function
    assert (function.target, function.default_target) == (2, 0)
    await rig.servicer.DeleteProvisionConfig(pb.DeleteProvisionConfigRequest(function="ocr"), None)
    assert (rig.ocr.target, await store.provision_configs()) == (0, {})
    assert await rig.listed() == []


async def test_a_deleted_function_takes_its_provisioning_with_it(rig: Rig, store: Store) -> None:
    await rig.deploy()
    await rig.put(target_tracking_policies=[current_policy()])
    await rig.catalog.delete("ocr")
    assert await store.provision_configs() == {}
    rig.scaler.look()
    assert [one.target for one in rig.catalog.all()] == [0], "no policy holds on to its instances"
    await rig.deploy(target=1)
    assert (rig.ocr.target, rig.ocr.config) == (1, pb.ProvisionConfig())


async def test_validate_only_changes_nothing(rig: Rig, store: Store) -> None:
    await rig.deploy(target=1)
    before = rig.ocr
    given = pb.ProvisionConfig(default_target=9, always_allocate_gpu=True, scheduled_actions=[morning()])
    request = pb.PutProvisionConfigRequest(function="ocr", config=given, validate_only=True)
    answer = await rig.servicer.PutProvisionConfig(request, None)
    assert answer.provision.config.default_target == 9
    assert (rig.ocr, await store.provision_configs()) == (before, {})


def too_many(given: pb.ProvisionConfig) -> None:
    given.default_target = 10_001


def negative(given: pb.ProvisionConfig) -> None:
    given.default_target = -1


WRONG: list[tuple[Change, str]] = [
    *((change, field) for change, field, _ in BAD),
    (too_many, "default_target"),
    (negative, "default_target"),
]


@pytest.mark.parametrize(("change", "field"), WRONG, ids=[f"{n}-{one[1]}" for n, one in enumerate(WRONG)])
async def test_of_what_is_wrong_nothing_is_applied(rig: Rig, store: Store, change: Change, field: str) -> None:
    await rig.deploy(target=1)
    before, row = rig.ocr, await store.functions()
    given = config()
    given.default_target, given.always_allocate_gpu = 7, True
    change(given)
    request = pb.PutProvisionConfigRequest(function="ocr", config=given)
    with pytest.raises(InvalidArgumentError) as caught:
        await rig.servicer.PutProvisionConfig(request, None)
    assert caught.value.metadata["field"] == field
    assert (rig.ocr, await store.functions(), await store.provision_configs()) == (before, row, {})
    if field == "default_target":
        return  # a deploy has a target of its own
    with pytest.raises(InvalidArgumentError):
        await rig.deploy(target=7, provision=given)
    assert (rig.ocr, await store.functions(), await store.provision_configs()) == (before, row, {})


async def test_what_could_not_be_stored_is_not_in_effect(
    rig: Rig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.deploy(target=1)
    before = rig.ocr

    async def fails(row: FunctionRow, provision: bytes | None = None) -> None:
        raise UnavailableError("STORE_FAILED", "no")

    monkeypatch.setattr(store, "put_function", fails)
    with pytest.raises(UnavailableError):
        await rig.put(target=4, target_tracking_policies=[current_policy()])
    assert rig.ocr == before


async def test_provisioning_of_a_function_that_is_not_there(rig: Rig) -> None:
    with pytest.raises(NotFoundError, match="hibernode functions"):
        await rig.put()
    with pytest.raises(NotFoundError):
        await rig.servicer.DeleteProvisionConfig(pb.DeleteProvisionConfigRequest(function="ocr"), None)

"""The scaler: policies under load, schedules by the clock, restarts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.core.dispatch.events import RequestArrived
from agent.core.types import SECOND_NS
from agent.scheduler.database.store import Store
from agent.v1 import function_service_pb2 as pb
from agent.v1.scheduler_service_pb2 import InstanceLoad, NodeLoad
from tests.scheduler.functions.autoscaler_rig import FROZEN, PERIOD_S, RUNNING, Rig, current_policy
from tests.wire.test_convert_provision import morning


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/scheduler.db")
    await made.open()
    yield made
    await made.close()


@pytest.fixture
def rig(store: Store) -> Rig:
    return Rig(store)


# ---- policies -------------------------------------------------------------------------------------------------


async def test_the_documented_walkthrough_from_one_to_two_instances_and_more(rig: Rig) -> None:
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


async def test_frozen_instances_count_as_slots_but_give_no_cpu_or_memory_samples(rig: Rig) -> None:
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


async def test_cpu_time_is_divided_by_the_time_between_heartbeats_and_not_by_that_of_other_messages(rig: Rig) -> None:
    """Changes come between the heartbeats, ever later: the autoscaler sees each heartbeat only after one."""
    cpu = pb.TargetTrackingPolicy.METRIC_TYPE_CPU_UTILIZATION
    await rig.deploy(vcpu_millis=2000)
    rig.instances(1)
    await rig.put(target_tracking_policies=[current_policy(name="cpu", metric_type=cpu)])
    for second in range(3 * PERIOD_S + 1):
        late_ns = second * SECOND_NS // (4 * PERIOD_S)
        rig.gauges = {"i0": NodeLoad.InstanceGauges(uid="i0", cpu_ns=second * SECOND_NS)}
        rig.report()
        rig.clock.advance(late_ns)
        rig.report(heartbeat=False)
        rig.scaler.check()
        rig.clock.advance(SECOND_NS - late_ns)
    assert rig.policy.metric == 0.5


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


async def test_instances_on_silent_nodes_prevent_scale_in(rig: Rig) -> None:
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


async def test_a_short_silence_of_a_node_does_not_prevent_scale_out(rig: Rig) -> None:
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


async def test_an_update_that_doubles_instances_does_not_double_the_target(rig: Rig) -> None:
    await rig.deploy(target=10)
    rig.instances(10)
    await rig.put(target=10, target_tracking_policies=[current_policy(metric_target=0.5, max_capacity=100)])
    rig.busy(6)
    rig.periods(2)
    rig.pass_time(PERIOD_S - 5)
    new = {
        f"new{n}": InstanceLoad(
            uid=f"new{n}", function="ocr", request_id=f"ocr/2/{n}/1", state=RUNNING, healthy=True, concurrency=1
        )
        for n in range(10)
    }
    rig.loads |= new
    rig.pass_time(5)
    assert rig.targets == [12], "six are busy, and half of them shall be"


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
    rig.scaler.check()
    assert rig.ocr.target == 1


# ---- restarts -------------------------------------------------------------------------------------------------


async def test_a_restart_never_scales_in_what_was_scaled_out(rig: Rig, store: Store) -> None:
    """Targets of policies are not stored: they follow from the instances, once all nodes have reported."""
    await rig.deploy(target=0)
    await rig.put(target=0, target_tracking_policies=[current_policy()])
    again = Rig(store)
    again.fleet.expect("n1")
    await again.catalog.load()
    again.scaler.check()
    assert not again.fleet.all_reported()
    assert again.ocr.target == 2, "the least there may be: who asks now waits and is not sent away"
    assert again.dispatcher.step(RequestArrived(1, "ocr", 1 << 62), again.clock.monotonic_ns()) == []
    again.pass_time(2, reporting=False)
    assert again.ocr.target == 2
    again.instances(9)
    assert again.fleet.all_reported()
    assert again.ocr.target == 9, "decided before the provisioner acts on the reports"
    assert not again.scaler.waiting


async def test_a_node_that_reports_long_after_a_restart_keeps_its_instances(rig: Rig, store: Store) -> None:
    """It was given up for lost, and the policy began without its instances; none of them drains when it is back."""
    await rig.deploy(target=0)
    await rig.put(target=0, target_tracking_policies=[current_policy()])
    again = Rig(store)
    again.fleet.expect("n1")
    await again.catalog.load()
    again.pass_time(12, reporting=False)
    assert again.fleet.all_reported(), "n1 is lost"
    assert (again.ocr.target, again.scaler.waiting) == (2, False)
    again.instances(7)
    assert again.ocr.target == 7, "decided before the provisioner acts on the node's return"
    assert not again.scaler.waiting
    again.periods(4)
    assert again.ocr.target == 4, "then half of the surplus goes, as there are no requests"


async def test_a_node_lost_and_back_without_a_restart_changes_no_target(rig: Rig) -> None:
    """What it had is remembered: more than that, as after a rollout elsewhere meanwhile, is not asked for."""
    await rig.deploy()
    rig.instances(3)
    await rig.put(target_tracking_policies=[current_policy()])
    rig.pass_time(12, reporting=False)
    rig.instances(6)
    rig.pass_time(2)
    assert (rig.ocr.target, rig.targets) == (3, [3])


async def test_a_restart_knows_which_action_fired_last(rig: Rig, store: Store) -> None:
    window = {"start_time": "2023-11-01T00:00:00", "end_time": "2023-12-01T00:00:00", "time_zone": ""}
    actions = [
        morning(name="up", target=4, schedule_expression="cron(0 0 8 * * *)", **window),
        morning(name="down", target=2, schedule_expression="cron(0 0 20 * * *)", **window),
    ]
    await rig.deploy(target=1, provision=pb.ProvisionConfig(scheduled_actions=actions))
    again = Rig(store)
    await again.catalog.load()
    again.scaler.check()
    assert (again.ocr.target, again.ocr.default_target, again.ocr.decided_by) == (2, 1, "down")
    assert again.ocr.config == rig.ocr.config

"""Provisioning on the wire: accepted configs, and the field that each error names."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC
from fractions import Fraction

import pytest

from agent.core.errors import InvalidArgumentError
from agent.core.provisioning.autoscaling import ActiveWindow, Metric
from agent.core.provisioning.schedule import parse_time
from agent.v1.function_service_pb2 import ProvisionConfig, ScheduledAction, TargetTrackingPolicy
from agent.wire.convert_provision import provisioning_from_proto, windows_ended

Change = Callable[[ProvisionConfig], object]


def seed_policy(**other: object) -> TargetTrackingPolicy:
    """The example of Function Compute's documentation."""
    fields: dict[str, object] = {
        "name": "scaling-policy-demo",
        "start_time": "2024-07-01T16:00:00.000Z",
        "end_time": "2024-07-30T16:00:00.000Z",
        "metric_type": TargetTrackingPolicy.METRIC_TYPE_PROVISIONED_CONCURRENCY_UTILIZATION,
        "metric_target": 0.3,
        "min_capacity": 2,
        "max_capacity": 30,
    }
    return TargetTrackingPolicy(**{**fields, **other})  # type: ignore[arg-type]


def morning(**other: object) -> ScheduledAction:
    fields: dict[str, object] = {
        "name": "morning",
        "start_time": "2024-07-01T00:00:00",
        "end_time": "2024-08-01T00:00:00",
        "target": 5,
        "schedule_expression": "cron(0 0 8 * * *)",
        "time_zone": "Asia/Shanghai",
    }
    return ScheduledAction(**{**fields, **other})  # type: ignore[arg-type]


def config() -> ProvisionConfig:
    return ProvisionConfig(default_target=1, scheduled_actions=[morning()], target_tracking_policies=[seed_policy()])


def test_policy_of_function_compute_is_converted_exactly() -> None:
    found = provisioning_from_proto(config())
    (policy,) = found.policies
    start, end = (parse_time(f"2024-07-{day}T16:00:00Z", UTC) for day in ("01", "30"))
    assert (policy.name, policy.window) == ("scaling-policy-demo", ActiveWindow(start, end))
    assert policy.metric is Metric.CONCURRENCY
    assert policy.metric_target == Fraction(3, 10), "not the nearest binary fraction"
    assert (policy.min_capacity, policy.max_capacity) == (2, 30)
    (action,) = found.actions
    assert action.window.start_ns == parse_time("2024-06-30T16:00:00Z", UTC), "midnight in Shanghai"


@pytest.mark.parametrize(
    ("at", "count"), [("2024-07-30T15:59:59Z", 0), ("2024-07-30T16:00:00Z", 1), ("2025-01-01T00:00Z", 2)]
)
def test_ended_windows_give_warnings(at: str, count: int) -> None:
    given = config()
    warnings = windows_ended(given, provisioning_from_proto(given), parse_time(at, UTC))
    assert len(warnings) == count
    if count:
        text = (
            "targetTrackingPolicies[0] scaling-policy-demo: window ended at 2024-07-30T16:00:00.000Z; the target stays"
        )
        assert warnings[-1] == text


def action(**change: object) -> Change:
    return lambda given: given.scheduled_actions[0].MergeFrom(ScheduledAction(**change))  # type: ignore[arg-type]


def policy(**change: object) -> Change:
    return lambda given: given.target_tracking_policies[0].MergeFrom(
        TargetTrackingPolicy(**change)  # type: ignore[arg-type]
    )


def clear(field: str) -> Change:
    return lambda given: given.target_tracking_policies[0].ClearField(field)  # type: ignore[arg-type]


def many(given: ProvisionConfig) -> None:
    given.target_tracking_policies.extend(seed_policy(name=f"p{n}") for n in range(100))


def many_actions(given: ProvisionConfig) -> None:
    given.scheduled_actions.extend(morning(name=f"a{n}") for n in range(100))


BAD: list[tuple[Change, str, str]] = [
    (many, "target_tracking_policies", "more than 100"),
    (many_actions, "scheduled_actions", "more than 100"),
    (action(name="x" * 65), "scheduled_actions[0].name", "1 to 64"),
    (action(name="a\nb"), "scheduled_actions[0].name", "printable"),
    (action(start_time="soon"), "scheduled_actions[0].start_time", "such as"),
    (action(end_time="2024-06-30"), "scheduled_actions[0].end_time", "such as"),
    (action(end_time="2024-07-01T00:00:00"), "scheduled_actions[0].end_time", "later than start_time"),
    (action(target=-1), "scheduled_actions[0].target", "0 to 10000"),
    (action(target=10_001), "scheduled_actions[0].target", "0 to 10000"),
    (action(schedule_expression="rate(1m)"), "scheduled_actions[0].schedule_expression", "cron("),
    (action(schedule_expression="cron(0 0 8 30 2 ?)"), "scheduled_actions[0].schedule_expression", "never fires"),
    (action(schedule_expression="cron(0 0 8 1 12 ?)"), "scheduled_actions[0].schedule_expression", "never fires"),
    (action(schedule_expression="at(2024-08-01T00:00:00)"), "scheduled_actions[0].schedule_expression", "never fires"),
    (action(time_zone="Asia/Shangai"), "scheduled_actions[0].time_zone", "no time zone 'Asia/Shangai'"),
    (action(time_zone="../../etc/passwd"), "scheduled_actions[0].time_zone", "no time zone"),
    (action(time_zone="Asia"), "scheduled_actions[0].time_zone", "no time zone"),
    (action(time_zone="z" * 10_000), "scheduled_actions[0].time_zone", "no time zone"),
    (clear("name"), "target_tracking_policies[0].name", "1 to 64"),
    (policy(name="morning"), "target_tracking_policies[0].name", "twice"),
    (clear("start_time"), "target_tracking_policies[0].start_time", "such as"),
    (clear("end_time"), "target_tracking_policies[0].end_time", "such as"),
    (policy(start_time="2024-07-30T16:00:00Z"), "target_tracking_policies[0].end_time", "later"),
    (clear("metric_type"), "target_tracking_policies[0].metric_type", "CPUUtilization"),
    (policy(metric_type=99), "target_tracking_policies[0].metric_type", "CPUUtilization"),
    (clear("metric_target"), "target_tracking_policies[0].metric_target", "more than 0 and at most 1"),
    (policy(metric_target=-0.1), "target_tracking_policies[0].metric_target", "more than 0 and at most 1"),
    (policy(metric_target=1.01), "target_tracking_policies[0].metric_target", "more than 0 and at most 1"),
    (policy(metric_target=float("nan")), "target_tracking_policies[0].metric_target", "more than 0"),
    (policy(metric_target=float("inf")), "target_tracking_policies[0].metric_target", "more than 0"),
    (clear("min_capacity"), "target_tracking_policies[0].min_capacity", "1 to 10000"),
    (policy(min_capacity=-1), "target_tracking_policies[0].min_capacity", "1 to 10000"),
    (policy(max_capacity=10_001), "target_tracking_policies[0].max_capacity", "1 to 10000"),
    (policy(max_capacity=1), "target_tracking_policies[0].max_capacity", "not be less than min_capacity"),
    (policy(time_zone="Mars/Base"), "target_tracking_policies[0].time_zone", "no time zone"),
]


@pytest.mark.parametrize(("change", "field", "says"), BAD, ids=[f"{n}-{one[1]}" for n, one in enumerate(BAD)])
def test_error_names_the_field(change: Change, field: str, says: str) -> None:
    given = config()
    change(given)
    with pytest.raises(InvalidArgumentError) as caught:
        provisioning_from_proto(given)
    assert caught.value.reason == "SPEC_INVALID"
    assert caught.value.message.startswith(f"{field}: ")
    assert says in caught.value.message
    assert len(caught.value.message) < 300

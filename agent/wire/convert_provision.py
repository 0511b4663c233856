"""Checks v1.ProvisionConfig and converts it to `Provisioning` of `core/provisioning/autoscaling.py`.

`provisioning_from_proto` is for what somebody sends now: each violation raises InvalidArgumentError SPEC_INVALID, which
names the field and the fix. `stored_provisioning` is for what was accepted before, perhaps by another version or on
another host: it applies no rules, and an entry that can't be read takes no other with it. Time zones are read here,
because core reads no files.
"""

from __future__ import annotations

from datetime import UTC, tzinfo
from fractions import Fraction
from math import inf
from typing import NoReturn

from agent.core.errors import InvalidArgumentError
from agent.core.function_rules import bounded, wrong
from agent.core.provisioning.autoscaling import (
    MAX_TARGET,
    Action,
    ActiveWindow,
    Metric,
    Provisioning,
    ScalingPolicy,
    Unreadable,
)
from agent.core.provisioning.schedule import BadSchedule, Schedule, parse_schedule, parse_time
from agent.core.types import SECOND_NS
from agent.v1.function_service_pb2 import ProvisionConfig, ScheduledAction, TargetTrackingPolicy
from agent.wire.time_zones import UnknownZone, zone_of

MAX_ENTRIES = 100
MAX_NAME = 64
ALWAYS = ActiveWindow(-(1 << 63), 1 << 63)
_DAY_NS = 86_400 * SECOND_NS

_METRICS: dict[TargetTrackingPolicy.MetricType.ValueType, Metric] = {
    TargetTrackingPolicy.METRIC_TYPE_PROVISIONED_CONCURRENCY_UTILIZATION: Metric.CONCURRENCY,
    TargetTrackingPolicy.METRIC_TYPE_CPU_UTILIZATION: Metric.CPU,
    TargetTrackingPolicy.METRIC_TYPE_GPU_MEM_UTILIZATION: Metric.GPU_MEMORY,
}


def provisioning_from_proto(config: ProvisionConfig) -> Provisioning:
    """Scheduled actions and policies. Raises InvalidArgumentError for the first invalid field."""
    for field, entries in (
        ("scheduled_actions", len(config.scheduled_actions)),
        ("target_tracking_policies", len(config.target_tracking_policies)),
    ):
        if entries > MAX_ENTRIES:
            wrong(field, f"has {entries} entries, more than {MAX_ENTRIES}")
    names: set[str] = set()
    actions = tuple(
        _checked_action(f"scheduled_actions[{index}]", one, names) for index, one in enumerate(config.scheduled_actions)
    )
    policies = tuple(
        _checked_policy(f"target_tracking_policies[{index}]", one, names)
        for index, one in enumerate(config.target_tracking_policies)
    )
    return Provisioning(actions, policies)


def stored_provisioning(config: ProvisionConfig) -> Provisioning:
    """The same of a stored config: what can't be read is `unreadable`. Never raises."""
    actions: list[Action] = []
    policies: list[ScalingPolicy] = []
    lost: list[Unreadable] = []
    for action in config.scheduled_actions:
        try:
            actions.append(_action(f"scheduled action {action.name!r}", action))
        except InvalidArgumentError as error:
            lost.append(Unreadable(action.name, _widest_window(action), action.target, error.message))
    for policy in config.target_tracking_policies:
        try:
            policies.append(_policy(f"policy {policy.name!r}", policy))
        except InvalidArgumentError as error:
            lost.append(Unreadable(policy.name, _widest_window(policy), policy.max_capacity, error.message))
    return Provisioning(tuple(actions), tuple(policies), tuple(lost))


def windows_ended(config: ProvisionConfig, provisioning: Provisioning, wall_ns: int) -> list[str]:
    """A warning for each entry whose window has ended: it has no further effect."""
    actions = [(f"scheduledActions[{n}]", one.name, one.end_time) for n, one in enumerate(config.scheduled_actions)]
    policies = [
        (f"targetTrackingPolicies[{n}]", one.name, one.end_time)
        for n, one in enumerate(config.target_tracking_policies)
    ]
    windows = provisioning.windows
    return [
        f"{field} {name}: window ended at {end}; the target stays"
        for field, name, end in [*actions, *policies]
        if windows[name].end_ns <= wall_ns
    ]


def _widest_window(message: ScheduledAction | TargetTrackingPolicy) -> ActiveWindow:
    """The entry's window in any time zone: no zone is a day or more from UTC."""
    try:
        start, end = parse_time(message.start_time, UTC), parse_time(message.end_time, UTC)
    except BadSchedule:
        return ALWAYS
    return ActiveWindow(start - _DAY_NS, end + _DAY_NS)


def _checked_action(field: str, message: ScheduledAction, names: set[str]) -> Action:
    _name(field, message.name, names)
    found = _action(field, message)
    _ends_later(field, message.start_time, found.window)
    bounded(f"{field}.target", message.target, 0, MAX_TARGET)
    if found.schedule.next(found.window.start_ns - 1, found.window.end_ns) is None:
        wrong(f"{field}.schedule_expression", "never fires between start_time and end_time")
    return found


def _action(field: str, message: ScheduledAction) -> Action:
    zone = _zone(field, message.time_zone)
    window = _window(field, message, zone)
    schedule = _schedule(f"{field}.schedule_expression", message.schedule_expression, zone)
    return Action(message.name, window, schedule, message.target)


def _checked_policy(field: str, message: TargetTrackingPolicy, names: set[str]) -> ScalingPolicy:
    _name(field, message.name, names)
    found = _policy(field, message)
    _ends_later(field, message.start_time, found.window)
    if message.metric_target > 1:
        _wrong_metric_target(field, message)
    # At 0 instances no metric is measured, so none could lead back to 1.
    bounded(f"{field}.min_capacity", message.min_capacity, 1, MAX_TARGET)
    bounded(f"{field}.max_capacity", message.max_capacity, 1, MAX_TARGET)
    if message.max_capacity < message.min_capacity:
        wrong(f"{field}.max_capacity", f"must not be less than min_capacity, which is {message.min_capacity}")
    return found


def _policy(field: str, message: TargetTrackingPolicy) -> ScalingPolicy:
    zone = _zone(field, message.time_zone)
    window = _window(field, message, zone)
    metric = _METRICS.get(message.metric_type)
    if metric is None:
        wrong(f"{field}.metric_type", f"must be one of {', '.join(one.value for one in Metric)}")
    if not 0 < message.metric_target < inf:
        _wrong_metric_target(field, message)
    goal = Fraction(repr(message.metric_target))  # the decimal that was written: 0.3 is 3/10
    return ScalingPolicy(message.name, window, metric, goal, message.min_capacity, message.max_capacity)


def _wrong_metric_target(field: str, message: TargetTrackingPolicy) -> NoReturn:
    wrong(f"{field}.metric_target", f"must be more than 0 and at most 1, got {message.metric_target:g}")


def _name(field: str, name: str, names: set[str]) -> None:
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        wrong(f"{field}.name", f"must be 1 to {MAX_NAME} printable characters")
    if name in names:
        wrong(f"{field}.name", f"{name!r} is there twice; give each action and policy its own name")
    names.add(name)


def _zone(field: str, name: str) -> tzinfo:
    try:
        return zone_of(name)
    except UnknownZone as error:
        wrong(f"{field}.time_zone", str(error))


def _window(field: str, message: ScheduledAction | TargetTrackingPolicy, zone: tzinfo) -> ActiveWindow:
    return ActiveWindow(
        _time(f"{field}.start_time", message.start_time, zone), _time(f"{field}.end_time", message.end_time, zone)
    )


def _ends_later(field: str, start: str, window: ActiveWindow) -> None:
    if window.end_ns <= window.start_ns:
        wrong(f"{field}.end_time", f"must be later than start_time, which is {start}")


def _time(field: str, text: str, zone: tzinfo) -> int:
    try:
        return parse_time(text, zone)
    except BadSchedule as error:
        wrong(field, f"{error}, got {text[:40]!r}")


def _schedule(field: str, text: str, zone: tzinfo) -> Schedule:
    try:
        return parse_schedule(text, zone)
    except BadSchedule as error:
        wrong(field, str(error))

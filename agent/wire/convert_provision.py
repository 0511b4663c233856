"""Checks v1.ProvisionConfig and converts it to `Provisioning` of `core/provisioning/autoscaling.py`.

Each violation raises InvalidArgumentError SPEC_INVALID, which names the field and the fix. Time zones are read here,
because core reads no files.
"""

from __future__ import annotations

from datetime import UTC, tzinfo
from fractions import Fraction
from zoneinfo import ZoneInfo

from agent.core.function_rules import bounded, wrong
from agent.core.provisioning.autoscaling import MAX_TARGET, Action, ActiveWindow, Metric, Provisioning, ScalingPolicy
from agent.core.provisioning.schedule import BadSchedule, Schedule, parse_schedule, parse_time
from agent.v1.function_service_pb2 import ProvisionConfig, ScheduledAction, TargetTrackingPolicy

MAX_ENTRIES = 100
MAX_NAME = 64
MAX_ZONE = 64

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
        _action(f"scheduled_actions[{index}]", one, names) for index, one in enumerate(config.scheduled_actions)
    )
    policies = tuple(
        _policy(f"target_tracking_policies[{index}]", one, names)
        for index, one in enumerate(config.target_tracking_policies)
    )
    return Provisioning(actions, policies)


def windows_ended(config: ProvisionConfig, provisioning: Provisioning, wall_ns: int) -> list[str]:
    """A warning for each entry whose window has ended: it has no further effect."""
    actions = [(f"scheduledActions[{n}]", one.name, one.end_time) for n, one in enumerate(config.scheduled_actions)]
    policies = [
        (f"targetTrackingPolicies[{n}]", one.name, one.end_time)
        for n, one in enumerate(config.target_tracking_policies)
    ]
    return [
        f"{field} {name}: window ended at {end}; the target stays"
        for (field, name, end), window in zip([*actions, *policies], provisioning.windows, strict=True)
        if window.end_ns <= wall_ns
    ]


def _action(field: str, message: ScheduledAction, names: set[str]) -> Action:
    name = _name(field, message.name, names)
    zone = _zone(field, message.time_zone)
    window = _window(field, message.start_time, message.end_time, zone)
    bounded(f"{field}.target", message.target, 0, MAX_TARGET)
    schedule = _schedule(f"{field}.schedule_expression", message.schedule_expression, zone)
    if schedule.next(window.start_ns - 1, window.end_ns) is None:
        wrong(f"{field}.schedule_expression", "never fires between start_time and end_time")
    return Action(name, window, schedule, message.target)


def _policy(field: str, message: TargetTrackingPolicy, names: set[str]) -> ScalingPolicy:
    name = _name(field, message.name, names)
    zone = _zone(field, message.time_zone)
    window = _window(field, message.start_time, message.end_time, zone)
    metric = _METRICS.get(message.metric_type)
    if metric is None:
        wrong(f"{field}.metric_type", f"must be one of {', '.join(one.value for one in Metric)}")
    if not 0 < message.metric_target <= 1:
        wrong(f"{field}.metric_target", f"must be more than 0 and at most 1, got {message.metric_target:g}")
    # At 0 instances no metric is measured, so none could lead back to 1.
    bounded(f"{field}.min_capacity", message.min_capacity, 1, MAX_TARGET)
    bounded(f"{field}.max_capacity", message.max_capacity, 1, MAX_TARGET)
    if message.max_capacity < message.min_capacity:
        wrong(f"{field}.max_capacity", f"must not be less than min_capacity, which is {message.min_capacity}")
    goal = Fraction(repr(message.metric_target))  # the decimal that was written: 0.3 is 3/10
    return ScalingPolicy(name, window, metric, goal, message.min_capacity, message.max_capacity)


def _name(field: str, name: str, names: set[str]) -> str:
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        wrong(f"{field}.name", f"must be 1 to {MAX_NAME} printable characters")
    if name in names:
        wrong(f"{field}.name", f"{name!r} is there twice; give each action and policy its own name")
    names.add(name)
    return name


def _zone(field: str, name: str) -> tzinfo:
    try:
        return UTC if not name else ZoneInfo(name[: MAX_ZONE + 1])
    except (OSError, ValueError, KeyError):  # a directory, a path outside of the zone files, or no file
        text = f"there is no time zone {name[:MAX_ZONE]!r}; use a name such as Asia/Shanghai, or omit it for UTC"
        wrong(f"{field}.time_zone", text)


def _window(field: str, start: str, end: str, zone: tzinfo) -> ActiveWindow:
    window = ActiveWindow(_time(f"{field}.start_time", start, zone), _time(f"{field}.end_time", end, zone))
    if window.end_ns <= window.start_ns:
        wrong(f"{field}.end_time", f"must be later than start_time, which is {start}")
    return window


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

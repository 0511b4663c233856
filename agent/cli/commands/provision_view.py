"""What `hibernode provision list` shows of a function's provisioning."""

from __future__ import annotations

from typing import Any

from agent.cli.commands.functions import next_try
from agent.cli.console.units import clock
from agent.cli.fc3.provision import METRIC_NAMES
from agent.v1 import function_service_pb2 as pb

QUALIFIER = "LATEST"


def row_of(found: pb.Provision) -> tuple[str, ...]:
    """A line of the table; FUNCTION, TARGET, CURRENT, DECIDED BY, SCHEDULES, POLICIES, ERROR."""
    config = found.config
    reason = f"{found.current_error_reason}: " if found.current_error_reason else ""
    return (
        found.function,
        str(found.target),
        str(found.current),
        found.decided_by or "defaultTarget",
        ", ".join(one.name for one in config.scheduled_actions) or "-",
        ", ".join(map(_seen, config.target_tracking_policies, _states(found))) or "-",
        f"{reason}{found.current_error}" if found.current_error else "-",
    )


def _seen(policy: pb.TargetTrackingPolicy, state: pb.Provision.PolicyState) -> str:
    """`day: target 4, 0.42 of 0.3`, or that it is not active."""
    if not state.active:
        return f"{policy.name}: not active"
    metric = f"{state.metric:.3g}" if state.HasField("metric") else "no sample"
    return f"{policy.name}: target {state.target}, {metric} of {policy.metric_target:g}"


def fields_of(found: pb.Provision) -> dict[str, Any]:
    """The keys that `s provision list` shows."""
    config = found.config
    return {
        "functionName": found.function,
        "qualifier": QUALIFIER,
        "resource": f"{found.function}#{QUALIFIER}",
        "target": found.target,
        "current": found.current,
        "currentError": found.current_error or None,
        "lastFailure": _failure(found),
        "defaultTarget": config.default_target,
        "decidedBy": found.decided_by or None,
        "alwaysAllocateGPU": found.always_allocate_gpu,
        "scheduledActions": [
            {
                "name": one.name,
                "startTime": one.start_time,
                "endTime": one.end_time,
                "target": one.target,
                "scheduleExpression": one.schedule_expression,
                "timeZone": one.time_zone or "UTC",
            }
            for one in config.scheduled_actions
        ]
        or None,
        "targetTrackingPolicies": [
            {
                "name": one.name,
                "startTime": one.start_time,
                "endTime": one.end_time,
                "metricType": METRIC_NAMES.get(one.metric_type, ""),
                "metricTarget": one.metric_target,
                "minCapacity": one.min_capacity,
                "maxCapacity": one.max_capacity,
                "timeZone": one.time_zone or "UTC",
                "active": state.active,
                "target": state.target,
                "metric": round(state.metric, 4) if state.HasField("metric") else None,
            }
            for one, state in zip(config.target_tracking_policies, _states(found), strict=True)
        ]
        or None,
    }


def _failure(found: pb.Provision) -> dict[str, Any] | None:
    """The last failed start, with its message and the next try."""
    if not found.HasField("last_failure"):
        return None
    failure = found.last_failure
    return {
        "reason": failure.reason,
        "message": failure.message,
        "time": clock(failure.time),
        "node": failure.node or None,
        "instance": failure.uid or None,
        "attempt": f"{failure.attempt} of {failure.max_attempts}",
        "nextTry": next_try(failure) or None,
    }


def _states(found: pb.Provision) -> list[pb.Provision.PolicyState]:
    """A state for each policy in their order; empty where the scheduler has none yet."""
    known = {one.name: one for one in found.policies}
    return [known.get(one.name, pb.Provision.PolicyState()) for one in found.config.target_tracking_policies]

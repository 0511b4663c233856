"""Checks of a deploy beyond the spec's own ranges (core/function_rules.py): target, triggers and provisioning.

A violation raises InvalidArgumentError or UnsupportedError, which names the field and the fix.
"""

from __future__ import annotations

from dataclasses import dataclass

from agent.core.errors import UnsupportedError
from agent.core.function_rules import bounded, check_function, wrong
from agent.core.provisioning.autoscaling import MAX_TARGET, Provisioning
from agent.core.types import SECOND_NS, DispatchPolicy, IdleMode
from agent.v1 import types_pb2
from agent.v1.function_service_pb2 import DeployFunctionRequest, HttpTrigger, ProvisionConfig
from agent.wire.convert_enums import dispatch_to_proto, idle_mode_to_proto
from agent.wire.convert_function import function_from_proto, stored_function
from agent.wire.convert_provision import provisioning_from_proto, windows_ended

MAX_TRIGGERS = 10

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Defaults:
    """Values of the fields that a deploy does not set (scheduler.yaml, `dispatch`)."""

    policy: DispatchPolicy = DispatchPolicy.PACK
    wake_factor: float = 0.0
    queue_length: int = 1000
    queue_timeout_ns: int = 60 * SECOND_NS


def checked(
    request: DeployFunctionRequest, defaults: Defaults
) -> tuple[types_pb2.FunctionSpec, tuple[HttpTrigger, ...]]:
    """The spec with the scheduler's defaults filled in, and the triggers (at least one).

    Raises InvalidArgumentError, UnsupportedError TRIGGER_AUTH_UNSUPPORTED.
    """
    message = types_pb2.FunctionSpec()
    message.CopyFrom(request.spec)
    message.ClearField("revision")
    if not message.dispatch:
        message.dispatch = dispatch_to_proto(defaults.policy)
    if not message.wake_factor:
        message.wake_factor = defaults.wake_factor
    if not message.HasField("queue_length"):
        message.queue_length = defaults.queue_length
    if not message.HasField("queue_timeout_ns"):
        message.queue_timeout_ns = defaults.queue_timeout_ns
    if request.HasField("provision"):
        set_idle_mode(message, request.provision)
    check_function(function_from_proto(message))
    bounded("target", request.target, 0, MAX_TARGET)
    return message, _triggers(request)


def set_idle_mode(message: types_pb2.FunctionSpec, config: ProvisionConfig) -> None:
    """Apply `alwaysAllocateGPU`, if set: true turns idle mode off, false on. An idle mode that agrees already is not
    rewritten, since that would make a new revision."""
    never = stored_function(message)[0].idle.mode is IdleMode.NEVER
    if config.HasField("always_allocate_gpu") and config.always_allocate_gpu != never:
        mode = IdleMode.NEVER if config.always_allocate_gpu else IdleMode.REQUIRE
        message.idle_policy.mode = idle_mode_to_proto(mode)


def checked_provision(config: ProvisionConfig) -> tuple[ProvisionConfig, Provisioning]:
    """The part of `config` to store, and the same parsed. Raises InvalidArgumentError.

    Default target and `alwaysAllocateGPU` are stored with the function.
    """
    found = provisioning_from_proto(config)
    kept = ProvisionConfig(
        scheduled_actions=config.scheduled_actions, target_tracking_policies=config.target_tracking_policies
    )
    return kept, found


def warnings_of(name: str, target: int, config: ProvisionConfig, found: Provisioning, wall_ns: int) -> list[str]:
    """What is accepted but looks like a mistake."""
    warnings = windows_ended(config, found, wall_ns)
    if not target and not any(window.end_ns > wall_ns for window in found.windows.values()):
        warnings.append(f"target is 0: {name} has no instances and answers 503 NoCapacity")
    return warnings


def _triggers(request: DeployFunctionRequest) -> tuple[HttpTrigger, ...]:
    if len(request.triggers) > MAX_TRIGGERS:
        wrong("triggers", f"at most {MAX_TRIGGERS}")
    found = []
    for given in request.triggers:
        if given.auth_type not in (HttpTrigger.AUTH_TYPE_UNSPECIFIED, HttpTrigger.AUTH_TYPE_ANONYMOUS):
            kind = "jwt" if given.auth_type == HttpTrigger.AUTH_TYPE_JWT else "function"
            text = (
                f"trigger {given.name!r} asks for authType {kind}, which needs a verifier, and this version has none; "
                "use anonymous, and put a proxy that authenticates in front of the gateway"
            )
            raise UnsupportedError("TRIGGER_AUTH_UNSUPPORTED", text, trigger=given.name[:64])
        methods = [method.upper() for method in given.methods]
        for method in methods:
            if method not in _METHODS:
                wrong(f"triggers.{given.name}.methods", f"{method[:16]!r} is not one of {', '.join(sorted(_METHODS))}")
        found.append(HttpTrigger(name=given.name, auth_type=HttpTrigger.AUTH_TYPE_ANONYMOUS, methods=methods))
    if not found or any(not trigger.methods for trigger in found):
        # A trigger for all methods makes the methods of the others irrelevant.
        found = [trigger for trigger in found if not trigger.methods] or [
            HttpTrigger(name="default", auth_type=HttpTrigger.AUTH_TYPE_ANONYMOUS)
        ]
    return tuple(found)

"""What a deploy must keep to: Function Compute's ranges, our own bounds, and what this version can do.

Each breach is an InvalidArgumentError that names the field and the fix.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from agent.core.errors import InvalidArgumentError, UnsupportedError
from agent.core.types import SECOND_NS, DispatchPolicy
from agent.v1 import types_pb2
from agent.v1.function_service_pb2 import DeployFunctionRequest, HttpTrigger
from agent.wire.convert_enums import dispatch_to_proto
from agent.wire.convert_function import function_from_proto

MAX_TARGET = 10_000
MAX_CONCURRENCY = 200
MAX_TIMEOUT_NS = 86_400 * SECOND_NS
MAX_QUEUE_LENGTH = 100_000
MAX_QUEUE_TIMEOUT_NS = 3_600 * SECOND_NS
MAX_ENVIRONMENT_BYTES = 4096
MAX_TRIGGERS = 10
HOST_IMAGE = "host"

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


@dataclass(frozen=True, slots=True)
class Defaults:
    """For functions whose deploy says nothing (scheduler.yaml, `dispatch`)."""

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
    _check_spec(message)
    _bounded("target", request.target, 0, MAX_TARGET)
    return message, _triggers(request)


def warnings_of(request: DeployFunctionRequest) -> list[str]:
    """What is accepted and looks like a mistake."""
    found = []
    if not request.target:
        found.append(f"target is 0: {request.spec.name} has no instances and answers 503 NoCapacity")
    return found


def _check_spec(message: types_pb2.FunctionSpec) -> None:
    if not _NAME.fullmatch(message.name):
        _wrong("name", "must be 1 to 64 letters, digits, `_` or `-`")
    spec = function_from_proto(message)
    if not spec.image:
        _wrong("image", "is required; `host` runs the entrypoint on the host")
    if spec.image == HOST_IMAGE and not (spec.entrypoint or spec.command):
        _wrong("entrypoint", "is required with image `host`")
    _bounded("port", spec.port, 1, 65535)
    _bounded("instance_concurrency", spec.instance_concurrency, 1, MAX_CONCURRENCY)
    _bounded("timeout_ns", spec.timeout_ns, 1, MAX_TIMEOUT_NS)
    _bounded("queue_length", spec.queue_length, 0, MAX_QUEUE_LENGTH)
    _bounded("queue_timeout_ns", spec.queue_timeout_ns, 1, MAX_QUEUE_TIMEOUT_NS)
    _bounded("gpu.count", spec.gpu.count, 0, 64)
    _bounded("gpu.memory_bytes", spec.gpu.memory_bytes, 0, 1 << 50)
    _bounded("memory_bytes", spec.memory_bytes, 1, 1 << 50)
    _bounded("disk_bytes", spec.disk_bytes, 0, 1 << 60)
    _bounded("vcpu_millis", spec.vcpu_millis, 1, 1_000_000)
    _bounded("idle_policy.freeze_after_ns", spec.idle.freeze_after_ns, 0, MAX_TIMEOUT_NS)
    _bounded("idle_policy.min_awake_ns", spec.idle.min_awake_ns, 0, MAX_TIMEOUT_NS)
    if not 0 <= spec.wake_factor < 1e6:
        _wrong("wake_factor", "must be 0 or more")
    _check_environment(spec.environment)


def _check_environment(environment: tuple[tuple[str, str], ...]) -> None:
    total = 0
    for name, value in environment:
        total += len(name.encode()) + len(value.encode())
        if name.startswith("FC_"):
            _wrong(f"environment.{name}", "the prefix FC_ is reserved; choose another name")
        if not name or "=" in name or "\0" in name + value:
            _wrong(f"environment.{name}", "is not a possible name or value of an environment variable")
    if total > MAX_ENVIRONMENT_BYTES:
        _wrong("environment", f"has {total} bytes in total, more than {MAX_ENVIRONMENT_BYTES}")


def _triggers(request: DeployFunctionRequest) -> tuple[HttpTrigger, ...]:
    if len(request.triggers) > MAX_TRIGGERS:
        _wrong("triggers", f"at most {MAX_TRIGGERS}")
    found = []
    for given in request.triggers:
        if given.auth_type not in (HttpTrigger.AUTH_TYPE_UNSPECIFIED, HttpTrigger.AUTH_TYPE_ANONYMOUS):
            kind = "jwt" if given.auth_type == HttpTrigger.AUTH_TYPE_JWT else "function"
            text = (
                f"trigger {given.name!r} asks for authType {kind}, which needs a verifier, and this version has none; "
                "use anonymous, and protect the gateway in front"
            )
            raise UnsupportedError("TRIGGER_AUTH_UNSUPPORTED", text, trigger=given.name[:64])
        methods = [method.upper() for method in given.methods]
        for method in methods:
            if method not in _METHODS:
                _wrong(f"triggers.{given.name}.methods", f"{method[:16]!r} is not one of {', '.join(sorted(_METHODS))}")
        found.append(HttpTrigger(name=given.name, auth_type=HttpTrigger.AUTH_TYPE_ANONYMOUS, methods=methods))
    if not found or any(not trigger.methods for trigger in found):
        # One trigger for all methods makes the lists of the others meaningless; the gateway sees one set.
        found = [trigger for trigger in found if not trigger.methods] or [
            HttpTrigger(name="default", auth_type=HttpTrigger.AUTH_TYPE_ANONYMOUS)
        ]
    return tuple(found)


def _bounded(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        _wrong(field, f"must be {low} to {high}, got {value}")


def _wrong(field: str, problem: str) -> NoReturn:
    raise InvalidArgumentError("SPEC_INVALID", f"{field}: {problem}", field=field[:100])

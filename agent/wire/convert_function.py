"""`FunctionSpec` and its parts to and from the wire.

An absent field means core's default, so the defaults are only in `core/types.py`. To the wire, values of the
environment are masked unless the receiver is the agent that runs them.
"""

from __future__ import annotations

from typing import TypeVar

from agent.core.errors import InvalidArgumentError
from agent.core.types import (
    ContainerOptions,
    FunctionSpec,
    GpuNeed,
    HealthCheck,
    Hook,
    Hooks,
    IdleMode,
    IdlePolicy,
    RegistryLogin,
    Volume,
)
from agent.log import MASK
from agent.v1 import types_pb2
from agent.wire.convert_enums import (
    dispatch_from_proto,
    dispatch_to_proto,
    idle_mode_from_proto,
    idle_mode_to_proto,
    visible_devices_from_proto,
    visible_devices_to_proto,
)

_Value = TypeVar("_Value", int, str)


def function_to_proto(spec: FunctionSpec, reveal_secrets: bool = False) -> types_pb2.FunctionSpec:
    """The spec on the wire, with `***` for the environment's values and the registry's password.

    `reveal_secrets`: for CreateInstance and DeployFunction requests, which need them. Raises InvalidArgumentError for a
    number that does not fit its field.
    """
    try:
        return types_pb2.FunctionSpec(
            name=spec.name,
            revision=spec.revision,
            image=spec.image,
            entrypoint=spec.entrypoint,
            command=spec.command,
            port=spec.port,
            environment={key: value if reveal_secrets else MASK for key, value in spec.environment},
            vcpu_millis=spec.vcpu_millis,
            memory_bytes=spec.memory_bytes,
            disk_bytes=spec.disk_bytes,
            timeout_ns=spec.timeout_ns,
            instance_concurrency=spec.instance_concurrency,
            gpu=_gpu_to_proto(spec.gpu),
            hooks=_hooks_to_proto(spec.hooks),
            health_check=_health_to_proto(spec.health_check),
            idle_policy=_idle_to_proto(spec.idle),
            queue_length=spec.queue_length,
            queue_timeout_ns=spec.queue_timeout_ns,
            dispatch=dispatch_to_proto(spec.dispatch),
            wake_factor=spec.wake_factor,
            handler=spec.handler,
            region=spec.region,
            container=_container_to_proto(spec.container, reveal_secrets),
            node_labels=dict(spec.node_labels),
        )
    except ValueError:  # its text may quote a value of the environment, so it is not passed on
        message = f"a number of function {spec.name!r} is too large for its field, or a text is not UTF-8"
        raise InvalidArgumentError("VALUE_OUT_OF_RANGE", message, function=spec.name[:64]) from None


def function_from_proto(message: types_pb2.FunctionSpec) -> FunctionSpec:
    """The spec, with core's defaults for absent fields and the environment sorted by name.

    Raises InvalidArgumentError for an enum value of another version, or a masked secret that was sent back.
    """
    base = FunctionSpec(name=message.name)
    gpu = _gpu_from_proto(message.gpu) if message.HasField("gpu") else base.gpu
    return FunctionSpec(
        name=message.name,
        revision=_or(message, "revision", base.revision),
        image=_or(message, "image", base.image),
        entrypoint=tuple(message.entrypoint),
        command=tuple(message.command),
        port=_or(message, "port", base.port),
        environment=_environment(message),
        handler=_or(message, "handler", base.handler),
        region=_or(message, "region", base.region),
        vcpu_millis=_or(message, "vcpu_millis", base.vcpu_millis),
        memory_bytes=_or(message, "memory_bytes", base.memory_bytes),
        disk_bytes=_or(message, "disk_bytes", base.disk_bytes),
        timeout_ns=_or(message, "timeout_ns", base.timeout_ns),
        instance_concurrency=_or(message, "instance_concurrency", base.instance_concurrency),
        gpu=gpu,
        container=_container_from_proto(message.container),
        hooks=_hooks_from_proto(message.hooks),
        health_check=_health_from_proto(message.health_check) if message.HasField("health_check") else None,
        idle=_idle_from_proto(message.idle_policy, gpu.count),
        dispatch=dispatch_from_proto(message.dispatch, base.dispatch),
        wake_factor=message.wake_factor,
        queue_length=_or(message, "queue_length", base.queue_length),
        queue_timeout_ns=_or(message, "queue_timeout_ns", base.queue_timeout_ns),
        node_labels=tuple(sorted(message.node_labels.items())),
    )


def stored_function(message: types_pb2.FunctionSpec) -> tuple[FunctionSpec, str]:
    """The spec of a stored message, and what of it can't be read ("": all can). Such fields get core's defaults here;
    the message keeps them, for agents that may know them. Never raises."""
    try:
        return function_from_proto(message), ""
    except InvalidArgumentError as error:
        problem = error.message
    known = types_pb2.FunctionSpec()
    known.CopyFrom(message)
    known.ClearField("dispatch")
    known.idle_policy.ClearField("mode")
    for key in [key for key, value in known.environment.items() if value == MASK]:
        del known.environment[key]
    if known.container.registry.password == MASK:
        known.container.ClearField("registry")
    return function_from_proto(known), problem


def _environment(message: types_pb2.FunctionSpec) -> tuple[tuple[str, str], ...]:
    for key, value in message.environment.items():
        if value == MASK:
            text = f"environment variable {key} is {MASK}, the mask of an answer; send its real value"
            raise InvalidArgumentError("MASKED_SECRET", text, variable=key)
    return tuple(sorted(message.environment.items()))


def _container_to_proto(options: ContainerOptions, reveal_secrets: bool) -> types_pb2.ContainerOptions | None:
    if options == ContainerOptions():
        return None
    registry = None
    if options.registry is not None:
        password = options.registry.password if reveal_secrets else MASK
        registry = types_pb2.ContainerOptions.RegistryLogin(username=options.registry.username, password=password)
    return types_pb2.ContainerOptions(
        shm_bytes=options.shm_bytes,
        pids_limit=options.pids_limit,
        open_files=options.open_files,
        user=options.user,
        read_only_root=options.read_only_root,
        extra_hosts=dict(options.extra_hosts),
        volumes=[
            types_pb2.ContainerOptions.Volume(
                host_path=volume.host_path, container_path=volume.container_path, writable=not volume.read_only
            )
            for volume in options.volumes
        ],
        registry=registry,
    )


def _container_from_proto(message: types_pb2.ContainerOptions) -> ContainerOptions:
    registry = None
    if message.HasField("registry"):
        if message.registry.password == MASK:
            text = f"the registry's password is {MASK}, the mask of an answer; send the real one"
            raise InvalidArgumentError("MASKED_SECRET", text, variable="registry.password")
        registry = RegistryLogin(message.registry.username, message.registry.password)
    return ContainerOptions(
        shm_bytes=message.shm_bytes,
        pids_limit=message.pids_limit,
        open_files=message.open_files,
        user=message.user,
        read_only_root=message.read_only_root,
        extra_hosts=tuple(sorted(message.extra_hosts.items())),
        volumes=tuple(Volume(each.host_path, each.container_path, not each.writable) for each in message.volumes),
        registry=registry,
    )


def _gpu_to_proto(need: GpuNeed) -> types_pb2.GpuRequirement:
    return types_pb2.GpuRequirement(
        gpu_type=need.gpu_type,
        model=need.model,
        count=need.count,
        memory_bytes=need.memory_bytes,
        visible_devices=visible_devices_to_proto(need.visible_devices),
    )


def _gpu_from_proto(message: types_pb2.GpuRequirement) -> GpuNeed:
    return GpuNeed(
        count=_or(message, "count", GpuNeed().count),
        model=message.model,
        gpu_type=message.gpu_type,
        memory_bytes=message.memory_bytes,
        visible_devices=visible_devices_from_proto(message.visible_devices),
    )


def _hooks_to_proto(hooks: Hooks) -> types_pb2.LifecycleHooks:
    def hook(given: Hook | None) -> types_pb2.LifecycleHooks.Hook | None:
        return None if given is None else types_pb2.LifecycleHooks.Hook(timeout_ns=given.timeout_ns)

    return types_pb2.LifecycleHooks(
        initializer=hook(hooks.initializer), pre_freeze=hook(hooks.pre_freeze), pre_stop=hook(hooks.pre_stop)
    )


def _hooks_from_proto(message: types_pb2.LifecycleHooks) -> Hooks:
    def hook(given: types_pb2.LifecycleHooks.Hook, present: bool) -> Hook | None:
        return Hook(timeout_ns=_or(given, "timeout_ns", Hook().timeout_ns)) if present else None

    return Hooks(
        initializer=hook(message.initializer, message.HasField("initializer")),
        pre_freeze=hook(message.pre_freeze, message.HasField("pre_freeze")),
        pre_stop=hook(message.pre_stop, message.HasField("pre_stop")),
    )


def _health_to_proto(check: HealthCheck | None) -> types_pb2.HealthCheck | None:
    if check is None:
        return None
    return types_pb2.HealthCheck(
        path=check.path,
        initial_delay_ns=check.initial_delay_ns,
        period_ns=check.period_ns,
        timeout_ns=check.timeout_ns,
        failure_threshold=check.failure_threshold,
        success_threshold=check.success_threshold,
    )


def _health_from_proto(message: types_pb2.HealthCheck) -> HealthCheck:
    base = HealthCheck(path=message.path)
    return HealthCheck(
        path=message.path,
        initial_delay_ns=message.initial_delay_ns,
        period_ns=_or(message, "period_ns", base.period_ns),
        timeout_ns=_or(message, "timeout_ns", base.timeout_ns),
        failure_threshold=_or(message, "failure_threshold", base.failure_threshold),
        success_threshold=_or(message, "success_threshold", base.success_threshold),
    )


def _idle_to_proto(policy: IdlePolicy) -> types_pb2.IdlePolicy:
    return types_pb2.IdlePolicy(
        mode=idle_mode_to_proto(policy.mode),
        freeze_after_ns=policy.freeze_after_ns,
        min_awake_ns=policy.min_awake_ns,
    )


def _idle_from_proto(message: types_pb2.IdlePolicy, gpu_count: int) -> IdlePolicy:
    """Instances with several GPUs freeze only if the sender says so: their processes may make each other hang
    (agent/docs/facts/gpu-checkpoint.md, section 3)."""
    base = IdlePolicy()
    return IdlePolicy(
        mode=idle_mode_from_proto(message.mode, IdleMode.NEVER if gpu_count > 1 else base.mode),
        freeze_after_ns=_or(message, "freeze_after_ns", base.freeze_after_ns),
        min_awake_ns=message.min_awake_ns,
    )


_WithPresence = (
    types_pb2.FunctionSpec
    | types_pb2.GpuRequirement
    | types_pb2.HealthCheck
    | types_pb2.IdlePolicy
    | types_pb2.LifecycleHooks.Hook
)


def _or(message: _WithPresence, field: str, default: _Value) -> _Value:
    """The field's value if the sender set it (0 and "" included), else the default."""
    if not message.HasField(field):  # type: ignore[arg-type]  # the stubs list each message's own names
        return default
    value: _Value = getattr(message, field)
    return value

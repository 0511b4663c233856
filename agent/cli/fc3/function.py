"""Converts the props of an s.yaml to core's FunctionSpec, with notes for warnings."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

import msgspec

from agent.cli.fc3.meaning import port_notes
from agent.cli.fc3.schema import Hibernode, HookProps, InstanceLifecycleConfig, Props
from agent.core.function_rules import HOST_IMAGE
from agent.core.instance_variables import PORT, replaced_variables
from agent.core.types import (
    MIB,
    SECOND_NS,
    ContainerOptions,
    DispatchPolicy,
    FunctionSpec,
    GpuNeed,
    HealthCheck,
    Hooks,
    IdleMode,
    IdlePolicy,
    RegistryLogin,
    VisibleDevices,
    Volume,
)
from agent.core.types import Hook as CoreHook

Note = tuple[tuple[str, ...], str]
"""A key path under the props, and a warning about it."""

_MOST = (("memorySize", "memory_size", 32_768), ("cpu", "cpu", 16))
_MOST_GPU_MEMORY = 24_576


def function_of(props: Props) -> tuple[FunctionSpec, list[Note]]:
    """The complete spec, and notes for warnings."""
    container = props.custom_container_config
    ours = props.hibernode
    base = FunctionSpec(name=props.function_name)
    gpu = _gpu(props)
    function = FunctionSpec(
        name=props.function_name,
        image=container.image,
        entrypoint=container.entrypoint or (),
        command=container.command or (),
        port=container.port,
        environment=tuple(sorted((props.environment_variables or {}).items())),
        handler=props.handler,
        region=props.region,
        vcpu_millis=round(Decimal(str(props.cpu)) * 1000),
        memory_bytes=props.memory_size * MIB,
        disk_bytes=props.disk_size * MIB,
        timeout_ns=props.timeout * SECOND_NS,
        instance_concurrency=props.instance_concurrency,
        gpu=gpu,
        container=_container(props),
        hooks=_hooks(props.instance_lifecycle_config),
        health_check=_health_check(props),
        idle=_idle(props, gpu),
        dispatch=base.dispatch if ours.dispatch is msgspec.UNSET else DispatchPolicy(ours.dispatch.upper()),
        wake_factor=base.wake_factor if ours.wake_factor is msgspec.UNSET else ours.wake_factor,
        queue_length=base.queue_length if ours.queue_length is msgspec.UNSET else ours.queue_length,
        queue_timeout_ns=base.queue_timeout_ns if ours.queue_timeout_ns is msgspec.UNSET else ours.queue_timeout_ns,
        node_labels=tuple(sorted((ours.node_labels or {}).items())),
    )
    return function, [*_notes(props, gpu), *_variable_notes(function)]


def explicit_fields(ours: Hibernode) -> frozenset[str]:
    """Fields with a default of the scheduler that the file sets."""
    fields = ("dispatch", "wake_factor", "queue_length", "queue_timeout_ns")
    return frozenset(name for name in fields if getattr(ours, name) is not msgspec.UNSET)


def _gpu(props: Props) -> GpuNeed:
    """`hibernode.gpus`, else one GPU if the file has any GPU setting, else none."""
    config = props.gpu_config
    named = config is not None or props.gpu_memory_size is not None
    count = props.hibernode.gpus if props.hibernode.gpus is not None else int(named)
    memory = (config.gpu_memory_size if config is not None else None) or props.gpu_memory_size or 0
    return GpuNeed(
        count=count,
        gpu_type=(config.gpu_type if config is not None else None) or "",
        memory_bytes=memory * MIB,
        visible_devices=VisibleDevices(props.hibernode.visible_devices.upper()),
    )


def _container(props: Props) -> ContainerOptions:
    ours, registry = props.hibernode, props.custom_container_config.registry_config
    login = None if registry is None else registry.auth_config
    return ContainerOptions(
        shm_bytes=ours.shm_size or 0,
        pids_limit=ours.pids_limit or 0,
        open_files=ours.open_files or 0,
        user=ours.user or "",
        read_only_root=ours.read_only_root,
        extra_hosts=tuple(sorted((ours.extra_hosts or {}).items())),
        volumes=tuple(Volume(one.host_path, one.container_path, not one.writable) for one in ours.volumes or ()),
        registry=None if login is None else RegistryLogin(login.user_name, login.password),
    )


def _hooks(config: InstanceLifecycleConfig | None) -> Hooks:
    def hook(given: HookProps | None) -> CoreHook | None:
        # A hook with a command has no HTTP handler; calling it would fail the start.
        return None if given is None or given.command else CoreHook(timeout_ns=given.timeout * SECOND_NS)

    if config is None:
        return Hooks()
    return Hooks(
        initializer=hook(config.initializer), pre_freeze=hook(config.pre_freeze), pre_stop=hook(config.pre_stop)
    )


def _health_check(props: Props) -> HealthCheck | None:
    config = props.custom_container_config.health_check_config
    if config is None:
        return None
    return HealthCheck(
        path=config.http_get_url,
        initial_delay_ns=config.initial_delay_seconds * SECOND_NS,
        period_ns=config.period_seconds * SECOND_NS,
        timeout_ns=config.timeout_seconds * SECOND_NS,
        failure_threshold=config.failure_threshold,
        success_threshold=config.success_threshold,
    )


def _always_on(props: Props) -> bool:
    provision = props.provision_config
    return bool(props.always_allocate_gpu or (provision is not None and provision.always_allocate_gpu))


def _idle(props: Props, gpu: GpuNeed) -> IdlePolicy:
    ours, base = props.hibernode, IdlePolicy()
    if ours.idle is not None:
        mode = IdleMode(ours.idle.upper())
    elif _always_on(props) or gpu.count != 1:
        mode = IdleMode.NEVER  # several GPUs freeze only if hibernode.idle requests it
    else:
        mode = base.mode
    return IdlePolicy(
        mode=mode,
        freeze_after_ns=base.freeze_after_ns if ours.freeze_after_ns is None else ours.freeze_after_ns,
        min_awake_ns=base.min_awake_ns if ours.min_awake_ns is None else ours.min_awake_ns,
    )


def _notes(props: Props, gpu: GpuNeed) -> Iterator[Note]:
    for key, attribute, most in _MOST:
        if getattr(props, attribute) > most:
            yield (key,), f"exceeds Function Compute's {most}; works if a host has enough"
    if gpu.memory_bytes > _MOST_GPU_MEMORY * MIB:
        yield ("gpuConfig", "gpuMemorySize"), f"exceeds Function Compute's {_MOST_GPU_MEMORY}; works here"
    if props.disk_size not in (512, 10_240):
        yield ("diskSize",), "is neither 512 nor 10240, Function Compute's sizes; works here"
    if props.gpu_memory_size is not None:
        yield ("gpuMemorySize",), _about_top_level_memory(props)
    if not gpu.count:
        yield ("functionName",), "has no gpuConfig: the instances get no GPU and are never frozen"
    if gpu.count > 1 and props.hibernode.idle is None and not _always_on(props):
        yield (("hibernode", "gpus"), "several GPUs are never frozen unless hibernode.idle is require or prefer")
    if _always_on(props) and props.hibernode.idle not in (None, "never"):
        yield ("hibernode", "idle"), "overrides alwaysAllocateGPU"
    container = props.custom_container_config
    yield from port_notes(container.image, container.port, container.entrypoint or (), container.command or ())


def _variable_notes(function: FunctionSpec) -> Iterator[Note]:
    """Variables of the function that are replaced here, on some nodes at least."""
    for name, why in replaced_variables(function).items():
        yield ("environmentVariables", name), f"is replaced: {why}"
    own_port = dict(function.environment).get(PORT, str(function.port))
    if function.image != HOST_IMAGE and own_port != str(function.port):
        yield ("environmentVariables", PORT), f"is not customContainerConfig.port: requests go to {function.port}"


def _about_top_level_memory(props: Props) -> str:
    config = props.gpu_config
    if config is None:
        return "belongs in gpuConfig; used anyway"
    if config.gpu_memory_size is None:
        return "belongs in gpuConfig, which has none; used anyway"
    return "belongs in gpuConfig; the value there is used"

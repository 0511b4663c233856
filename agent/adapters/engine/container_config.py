"""Builds the configuration of a container from the start and the node's options. Pure.

The result is the body of `POST /containers/create` that Docker (API 1.41, from 20.10) and Podman (from 4.3) both
understand; `container_config_libpod` translates it for Podman's own API. It contains secrets (the function's
variables): never log it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.adapters.engine.gpus import NO_GPUS, Attachment
from agent.adapters.engine.volumes import ResolvedVolume
from agent.adapters.runtime.environment import LIBRARIES, instance_environment
from agent.core.function_rules import shm_bytes
from agent.core.types import FunctionSpec
from agent.ports import StartSpec

STATE_LABEL = "hibernode.state"
INSTANCE_LABEL = "hibernode.instance"
FUNCTION_LABEL = "hibernode.function"

LEAST_CPU_MILLIS = 10
LOG_FILES = "2"


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Inputs of a plan besides the start.

    - `image`: what to run, by id where known (a tag may move between pull and start).
    - `image_user`, `image_environment`: the image's own.
    - `disk_limit`: limit the writable layer to the function's disk size.
    - `host_cpus`: 0 = unknown."""

    image: str
    network: str
    state_uuid: str
    pids_limit: int
    capabilities: Sequence[str]
    log_limit_bytes: int
    attachment: Attachment = NO_GPUS
    volumes: Sequence[ResolvedVolume] = ()
    image_user: str = ""
    image_environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    disk_limit: bool = False
    host_cpus: int = 0


def container_name(uid: str) -> str:
    """The name in `docker ps`."""
    return f"hibernode-{uid}"


def container_config(spec: StartSpec, options: PlanOptions) -> dict[str, Any]:
    """The request body. A function's entrypoint or command replaces the image's, as with `docker run`: an entrypoint
    alone drops the image's command. Raises InvalidArgumentError SPEC_INVALID for a malformed FCGPU_RUNTIME_SHMSIZE."""
    function = spec.instance.function
    config: dict[str, Any] = {
        "Image": options.image,
        "Env": [f"{name}={value}" for name, value in _environment(spec, options).items()],
        "Labels": {
            STATE_LABEL: options.state_uuid,
            INSTANCE_LABEL: spec.instance.uid,
            FUNCTION_LABEL: function.name,
        },
        # A health check's exec would hang in a frozen container, and every later inspect with it.
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": _host_config(function, options),
    }
    if function.entrypoint:
        config["Entrypoint"] = list(function.entrypoint)
    if function.command:
        config["Cmd"] = list(function.command)
    if function.container.user:
        config["User"] = function.container.user
    return config


def _environment(spec: StartSpec, options: PlanOptions) -> dict[str, str]:
    return instance_environment(
        spec,
        port=spec.instance.function.port,
        state_uuid=options.state_uuid,
        visible_devices=options.attachment.visible_devices,
        sees_all_gpus=options.attachment.sees_all_gpus,
        inherited_libraries=options.image_environment.get(LIBRARIES, ""),
    )


def _host_config(function: FunctionSpec, options: PlanOptions) -> dict[str, Any]:
    container = function.container
    host: dict[str, Any] = {
        "NetworkMode": options.network,
        "RestartPolicy": {"Name": "no"},
        "AutoRemove": False,
        "Init": False,
        **_isolation(function, options),
        **_limits(function, options),
        "LogConfig": {
            "Type": "json-file",
            "Config": {"max-size": str(max(1, options.log_limit_bytes // int(LOG_FILES))), "max-file": LOG_FILES},
        },
        "ExtraHosts": [f"{name}:{address}" for name, address in container.extra_hosts],
        "Mounts": [_mount(volume) for volume in (*options.volumes, *_attached(options.attachment))],
        "DeviceRequests": [dict(request) for request in options.attachment.device_requests],
    }
    # Podman stores an empty list as given, Docker as none, so empty values are left out.
    return {key: value for key, value in host.items() if value not in ([], {})}


def _isolation(function: FunctionSpec, options: PlanOptions) -> dict[str, Any]:
    """Settings that isolate the container from the host and its neighbours."""
    host: dict[str, Any] = {
        "Privileged": False,
        "CapDrop": ["ALL"],
        "CapAdd": list(options.capabilities) if is_root(function.container.user or options.image_user) else [],
        "SecurityOpt": ["no-new-privileges"],
        "IpcMode": "private",
        "PidMode": "",
        "ReadonlyRootfs": function.container.read_only_root,
    }
    if function.container.read_only_root:
        size = f",size={function.disk_bytes}" if function.disk_bytes else ""
        # exec: frameworks compile GPU code into /tmp and load it from there.
        host["Tmpfs"] = {"/tmp": f"rw,nosuid,nodev,exec,mode=1777{size}"}  # noqa: S108 (the container's)
    return host


def is_root(user: str) -> bool:
    """Whether a container of this `user[:group]` starts as root. Only root gets capabilities: Docker drops them for
    other users, but Podman passes them on (ambient), which would make such a user root in all but name."""
    return user.partition(":")[0] in ("", "0", "root")


def _limits(function: FunctionSpec, options: PlanOptions) -> dict[str, Any]:
    """No swap: a frozen instance must be in memory when it wakes. At most the host's CPUs: engines refuse more."""
    container = function.container
    cpu_millis = max(LEAST_CPU_MILLIS, function.vcpu_millis)
    if options.host_cpus:
        cpu_millis = min(cpu_millis, options.host_cpus * 1000)
    limits: dict[str, Any] = {
        "Memory": function.memory_bytes,
        "MemorySwap": function.memory_bytes,
        "NanoCpus": cpu_millis * 1_000_000,
        "PidsLimit": container.pids_limit or options.pids_limit,
    }
    if size := shm_bytes(function):
        limits["ShmSize"] = size
    if container.open_files:
        limits["Ulimits"] = [{"Name": "nofile", "Soft": container.open_files, "Hard": container.open_files}]
    if options.disk_limit and function.disk_bytes:
        limits["StorageOpt"] = {"size": str(function.disk_bytes)}
    return limits


def _attached(attachment: Attachment) -> list[ResolvedVolume]:
    """`gpu.mounts.binds`, in the form that the settings have validated."""
    parts = [bind.split(":") for bind in attachment.binds]
    return [ResolvedVolume(source, target, read_only=rest == ["ro"]) for source, target, *rest in parts]


def _mount(volume: ResolvedVolume) -> dict[str, Any]:
    # Not an old-style bind: with one, the engine creates missing host paths as root.
    return {
        "Type": "bind",
        "Source": volume.source,
        "Target": volume.target,
        "ReadOnly": volume.read_only,
        "BindOptions": {"Propagation": "rprivate"},
    }

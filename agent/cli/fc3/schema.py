"""Schema of a resource's `props` in an s.yaml (fc3): types with Function Compute's ranges.

Source of keys, ranges and defaults: the fc3 component's schema and the Function Compute API for custom containers.
`IGNORED` lists fc3 keys without a meaning here, with the reason that the warning gives.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from agent.cli.fc3.meaning import REFUSED
from agent.config import Duration, Size, bad_key
from agent.core.function_rules import MAX_OPEN_FILES, MAX_PIDS

MOST_MIB = 64 << 20
"""Upper bound of sizes (64 TiB). Sizes above Function Compute's limits but below this only give a warning."""


def camel(field: str) -> str:
    """The key of a field: `freeze_after_ns` is `freezeAfter`, since the value has a unit. GPU and CPU stay capitals."""
    head, *rest = field.removesuffix("_ns").split("_")
    return head + "".join({"gpu": "GPU", "cpu": "CPU"}.get(word, word.capitalize()) for word in rest)


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename=camel, kw_only=True):
    """Base of all sections: keys are camelCase, an absent key has its default."""


class HealthCheckConfig(Part, frozen=True):
    """The health check of a custom container."""

    http_get_url: Annotated[str, Meta(min_length=1, max_length=2048)]
    initial_delay_seconds: Annotated[int, Meta(ge=0, le=120)] = 0
    period_seconds: Annotated[int, Meta(ge=1, le=120)] = 3
    timeout_seconds: Annotated[int, Meta(ge=1, le=3)] = 1
    failure_threshold: Annotated[int, Meta(ge=1, le=120)] = 3
    success_threshold: Annotated[int, Meta(ge=1, le=120)] = 1

    def __post_init__(self) -> None:
        if not self.http_get_url.startswith("/"):
            raise bad_key("httpGetUrl", f"must be a path that begins with /, got {self.http_get_url[:60]!r}")


class AuthConfig(Part, frozen=True):
    """A login at the image's registry."""

    user_name: Annotated[str, Meta(min_length=1)]
    password: Annotated[str, Meta(min_length=1)]


class RegistryConfig(Part, frozen=True):
    """The registry's login; certificates and networks are configured on the host."""

    auth_config: AuthConfig | None = None


class CustomContainerConfig(Part, frozen=True):
    """The image and how it is started. `image: host` runs entrypoint and command on the host."""

    image: Annotated[str, Meta(min_length=1, max_length=1024)]
    port: Annotated[int, Meta(ge=1, le=65535)] = 9000
    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None
    health_check_config: HealthCheckConfig | None = None
    registry_config: RegistryConfig | None = None
    web_server_mode: bool | None = None

    def __post_init__(self) -> None:
        if self.web_server_mode is False:
            raise bad_key("webServerMode", "must not be false: instances are servers, not jobs; leave it out")
        if self.image == "host" and not (self.entrypoint or self.command):
            raise bad_key("entrypoint", "is required with `image: host`: the program to run")
        if any("\0" in word for word in (*(self.entrypoint or ()), *(self.command or ()))):
            raise bad_key("entrypoint", "a program's arguments can't hold a NUL")


class GpuConfig(Part, frozen=True):
    """GPU type as Function Compute names it, and the memory that is billed."""

    gpu_type: Annotated[str, Meta(min_length=1, max_length=128)] | None = None
    gpu_memory_size: Annotated[int, Meta(ge=1024, le=MOST_MIB, multiple_of=1024)] | None = None


class HookProps(Part, frozen=True):
    """A lifecycle hook. Only HTTP hooks are called; Function Compute also runs `command` in the container."""

    handler: str | None = None
    command: tuple[str, ...] | None = None
    timeout: Annotated[int, Meta(ge=1, le=300)] = 3


class InstanceLifecycleConfig(Part, frozen=True):
    """The lifecycle hooks. The initializer may take 300 s, the others 90 s."""

    initializer: HookProps | None = None
    pre_freeze: HookProps | None = None
    pre_stop: HookProps | None = None

    def __post_init__(self) -> None:
        for key, hook in (("preFreeze", self.pre_freeze), ("preStop", self.pre_stop)):
            if hook is not None and hook.timeout > 90:
                raise bad_key(f"{key}.timeout", f"must be at most 90 s, got {hook.timeout}")


Target = Annotated[int, Meta(ge=0, le=10_000)]


class ScheduledAction(Part, frozen=True):
    """Sets the target at certain times. `provision_to_proto` checks times and expression."""

    name: str
    start_time: str
    end_time: str
    target: Target
    schedule_expression: str
    time_zone: str | None = None


class TargetTrackingPolicy(Part, frozen=True):
    """Scales between two capacities by a metric."""

    name: str
    start_time: str
    end_time: str
    metric_type: Literal["ProvisionedConcurrencyUtilization", "CPUUtilization", "GPUMemUtilization"]
    metric_target: Annotated[float, Meta(gt=0, le=1)]
    min_capacity: Annotated[int, Meta(ge=1, le=10_000)]
    max_capacity: Annotated[int, Meta(ge=1, le=10_000)]
    time_zone: str | None = None


class ProvisionConfig(Part, frozen=True):
    """Target, schedules and policies of instances. `target` is the older name of `defaultTarget`."""

    default_target: Target | None = None
    target: Target | None = None
    always_allocate_gpu: bool | None = None
    scheduled_actions: tuple[ScheduledAction, ...] | None = None
    target_tracking_policies: tuple[TargetTrackingPolicy, ...] | None = None


class TriggerConfig(Part, frozen=True):
    """Settings of an HTTP trigger."""

    auth_type: Literal["anonymous", "function", "jwt"] = "anonymous"
    methods: tuple[Literal["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"], ...] = ()


class Trigger(Part, frozen=True):
    """A trigger; types other than http are skipped with a warning."""

    trigger_name: Annotated[str, Meta(min_length=1, max_length=128)]
    trigger_type: str = "http"
    trigger_config: TriggerConfig = TriggerConfig()


class VolumeProps(Part, frozen=True):
    """A host folder mounted into the container, read-only unless `writable`. The node must allow it."""

    host_path: Annotated[str, Meta(min_length=1)]
    container_path: Annotated[str, Meta(min_length=1)]
    writable: bool = False


class Hibernode(Part, frozen=True):
    """Hibernode's own keys, under `hibernode:`. UNSET means the scheduler's default."""

    freeze_after_ns: Duration | None = None
    min_awake_ns: Duration | None = None
    idle: Literal["require", "prefer", "never"] | None = None
    dispatch: Literal["pack", "spread"] | UnsetType = UNSET
    wake_factor: Annotated[float, Meta(ge=0, le=1_000_000)] | UnsetType = UNSET
    queue_length: Annotated[int, Meta(ge=1, le=100_000)] | UnsetType = UNSET
    queue_timeout_ns: Duration | UnsetType = UNSET
    gpus: Annotated[int, Meta(ge=0, le=64)] | None = None
    visible_devices: Literal["index", "uuid"] = "index"
    shm_size: Size | None = None
    pids_limit: Annotated[int, Meta(ge=1, le=MAX_PIDS)] | None = None
    open_files: Annotated[int, Meta(ge=1, le=MAX_OPEN_FILES)] | None = None
    user: str | None = None
    read_only_root: bool = False
    extra_hosts: dict[str, str] | None = None
    volumes: tuple[VolumeProps, ...] | None = None
    node_labels: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.queue_timeout_ns, int) and not 0 < self.queue_timeout_ns <= 3600 * 10**9:
            raise bad_key("queueTimeout", "must be greater than 0 and at most 1h")
        for key, value in (("freezeAfter", self.freeze_after_ns), ("minAwake", self.min_awake_ns)):
            if value is not None and value > 86_400 * 10**9:
                raise bad_key(key, "must be at most 24h")


_IMAGES_ONLY = ("shm_size", "pids_limit", "open_files", "user", "read_only_root", "extra_hosts", "volumes")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


class Props(Part, frozen=True):
    """The props of an fc3 resource, without the ignored ones."""

    function_name: str
    runtime: Literal["custom-container"]
    custom_container_config: CustomContainerConfig
    region: Annotated[str, Meta(min_length=1, max_length=64)] = "local"
    handler: Annotated[str, Meta(min_length=1, max_length=128)] = "index.handler"
    timeout: Annotated[int, Meta(ge=1, le=86_400)] = 3
    cpu: Annotated[float, Meta(ge=0.05, le=1024)] = 0.35
    memory_size: Annotated[int, Meta(ge=128, le=MOST_MIB, multiple_of=64)] = 512
    disk_size: Annotated[int, Meta(ge=512, le=MOST_MIB)] = 512
    instance_concurrency: Annotated[int, Meta(ge=1, le=200)] = 1
    gpu_config: GpuConfig | None = None
    gpu_memory_size: Annotated[int, Meta(ge=1024, le=MOST_MIB, multiple_of=1024)] | None = None
    environment_variables: dict[str, str] | None = None
    instance_lifecycle_config: InstanceLifecycleConfig | None = None
    provision_config: ProvisionConfig | None = None
    always_allocate_gpu: bool | None = None
    triggers: tuple[Trigger, ...] | None = None
    hibernode: Hibernode = Hibernode()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.function_name):
            raise bad_key("functionName", "must be 1 to 64 letters, digits, `_` or `-`")
        if self.triggers and len(self.triggers) > 10:
            raise bad_key("triggers", "must be at most 10")
        if self.custom_container_config.image == "host":
            for field in _IMAGES_ONLY:
                if getattr(self.hibernode, field):
                    raise bad_key(f"hibernode.{camel(field)}", REFUSED)
            if self.custom_container_config.registry_config is not None:
                raise bad_key("customContainerConfig.registryConfig", REFUSED)


_CLOUD = "has no effect outside Function Compute"
_LATER = "is not supported yet"
_OWN_HOSTS = "is configured on your hosts and networks"

IGNORED: dict[str, str] = {
    "asyncInvokeConfig": f"{_LATER}: every call is synchronous",
    "code": "is for runtimes with code packages; the image contains the code",
    "concurrencyConfig": f"{_LATER}: no concurrency is reserved per function",
    "customDNS": _OWN_HOSTS,
    "customDomain": "is configured in your DNS and proxy; the gateway answers at <function>.<domain>",
    "customRuntimeConfig": "is for other runtimes",
    "disableInjectCredentials": "has no effect: credentials are never injected",
    "disableOndemand": "has no effect: all instances are provisioned",
    "enableLongLiving": _CLOUD,
    "idleTimeout": "has no effect: instances freeze after hibernode.freezeAfter",
    "instanceIsolationMode": _CLOUD,
    "internetAccess": _OWN_HOSTS,
    "layers": "is for runtimes with code packages",
    "logConfig": "has no effect: `hibernode logs` shows what instances print",
    "nasConfig": f"{_LATER}: nothing is mounted",
    "ossMountConfig": "has no effect: no object storage is mounted",
    "polarFsConfig": _CLOUD,
    "resourceGroupId": _CLOUD,
    "role": "has no effect: instances get no cloud credentials",
    "scalingConfig": f"{_LATER}: the number of instances is the target",
    "sessionAffinity": f"{_LATER}: requests go to any instance",
    "sessionAffinityConfig": f"{_LATER}: requests go to any instance",
    "tags": f"{_LATER}: tags are dropped",
    "tracingConfig": f"{_LATER}: no traces are sent",
    "vpcBinding": _OWN_HOSTS,
    "vpcConfig": _OWN_HOSTS,
    "customContainerConfig.acceleration": _CLOUD,
    "customContainerConfig.accelerationInfo": _CLOUD,
    "customContainerConfig.accelerationType": _CLOUD,
    "customContainerConfig.acrInstanceId": _CLOUD,
    "customContainerConfig.registryConfig.certConfig": "is configured in the host's container engine",
    "customContainerConfig.registryConfig.networkConfig": _OWN_HOSTS,
    "customContainerConfig.resolvedImageUri": _CLOUD,
    "customContainerConfig.role": "has no effect: instances get no cloud credentials",
    "provisionConfig.alwaysAllocateCPU": "has no effect: a frozen instance uses no CPU",
    "provisionConfig.mode": _CLOUD,
    "alwaysAllocateCPU": "has no effect: a frozen instance uses no CPU",
    "triggers[].description": "",
    "triggers[].qualifier": "has no effect: the only version is the last one deployed",
    "triggers[].invocationRole": _CLOUD,
    "triggers[].sourceArn": _CLOUD,
    "triggers[].triggerConfig.authConfig": f"{_LATER}: use authType anonymous",
    "triggers[].triggerConfig.disableURLInternet": _OWN_HOSTS,
    "description": "",
}
"""fc3 keys without an effect -> reason for the warning; "" for no warning."""

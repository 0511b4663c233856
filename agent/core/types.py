"""The words of Hibernode as data: what a user deploys, what runs, what it runs on.

Units are in the names (`_ns` integer nanoseconds, `_bytes`); everything is frozen, so a snapshot can be handed to
anyone. Ranges and defaults of a function's properties follow the Function Compute custom-container contract.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

SECOND_NS = 1_000_000_000
MILLISECOND_NS = 1_000_000
MICROSECOND_NS = 1_000
GIB = 1 << 30
MIB = 1 << 20


class InstanceState(Enum):
    """Where an instance is in its life. The table of transitions is in `lifecycle.py`."""

    STARTING = "STARTING"
    RUNNING = "RUNNING"
    FREEZING = "FREEZING"
    FROZEN = "FROZEN"
    WAITING_GPU = "WAITING_GPU"
    RESTORING = "RESTORING"
    STOPPING = "STOPPING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"

    @property
    def terminal(self) -> bool:
        """STOPPED and FAILED are final: a cold start is a new uid."""
        return self in (InstanceState.STOPPED, InstanceState.FAILED)


class IdleMode(Enum):
    """May this function's instances be frozen? REQUIRE refuses a node that cannot; PREFER runs awake there."""

    REQUIRE = "REQUIRE"
    PREFER = "PREFER"
    NEVER = "NEVER"


class DispatchPolicy(Enum):
    """PACK: ties go to the most recently idle instance, so that the others sleep. SPREAD: least recently used."""

    PACK = "PACK"
    SPREAD = "SPREAD"


@dataclass(frozen=True, slots=True)
class Hook:
    """One lifecycle hook of the FC contract: an HTTP call with a deadline. The path is fixed by the contract."""

    timeout_ns: int = 3 * SECOND_NS


@dataclass(frozen=True, slots=True)
class Hooks:
    """`POST /initialize`, `GET /pre-freeze`, `GET /pre-stop`: each called only if configured."""

    initializer: Hook | None = None
    pre_freeze: Hook | None = None
    pre_stop: Hook | None = None


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """customHealthCheckConfig: healthy = 200 <= status < 400 within the timeout. Never probes a frozen instance."""

    path: str
    initial_delay_ns: int = 0
    period_ns: int = 3 * SECOND_NS
    timeout_ns: int = SECOND_NS
    failure_threshold: int = 3
    success_threshold: int = 1


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """What an instance needs: `count` whole GPUs of `model` ("" = any). `memory_bytes` is what FC bills by."""

    count: int = 1
    model: str = ""
    gpu_type: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class IdlePolicy:
    """`freeze_after_ns` idle time before a freeze (0 = at once); `min_awake_ns` since the last wake protects
    an idle holder from being preempted (thrash)."""

    mode: IdleMode = IdleMode.REQUIRE
    freeze_after_ns: int = 10 * SECOND_NS
    min_awake_ns: int = 0


@dataclass(frozen=True, slots=True)
class Volume:
    """A folder of the host that an image's container sees; allowed only under the node's `runtime.volumes_allowed`."""

    host_path: str
    container_path: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class RegistryLogin:
    """Credentials for the registry of the function's image (fc3 registryConfig.authConfig). Write-only."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ContainerOptions:
    """What only a container engine knows; a function with `image: host` has none of it.

    0 and "" mean the node's or the image's own. `extra_hosts` are (name, address). `shm_bytes` is the size of /dev/shm
    (FC: FCGPU_RUNTIME_SHMSIZE in the environment says the same).
    """

    shm_bytes: int = 0
    pids_limit: int = 0
    open_files: int = 0
    user: str = ""
    read_only_root: bool = False
    extra_hosts: tuple[tuple[str, str], ...] = ()
    volumes: tuple[Volume, ...] = ()
    registry: RegistryLogin | None = None


@dataclass(frozen=True, slots=True)
class FunctionSpec:
    """What a user deploys. `revision` changes with every deploy that changes the spec.

    `environment` is write-only (masked in every answer, event and log). `image == "host"` runs entrypoint + command
    on the process runtime. `node_labels`: what a node must carry to get instances of it.
    """

    name: str
    revision: str = "1"
    image: str = "host"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    port: int = 9000
    environment: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    handler: str = "index.handler"
    region: str = "local"
    vcpu_millis: int = 350
    memory_bytes: int = 512 * MIB
    disk_bytes: int = 512 * MIB
    timeout_ns: int = 3 * SECOND_NS
    instance_concurrency: int = 1
    gpu: GpuNeed = GpuNeed()
    container: ContainerOptions = ContainerOptions()
    hooks: Hooks = Hooks()
    health_check: HealthCheck | None = None
    idle: IdlePolicy = IdlePolicy()
    dispatch: DispatchPolicy = DispatchPolicy.PACK
    wake_factor: float = 0.0
    queue_length: int = 1000
    queue_timeout_ns: int = 60 * SECOND_NS
    node_labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One instance to create. `request_id` makes the create idempotent (function/revision/ordinal/attempt)."""

    uid: str
    request_id: str
    function: FunctionSpec


class ComputeMode(Enum):
    """Who may make contexts on a device (nvmlComputeMode_t): anybody, one process, nobody."""

    DEFAULT = "DEFAULT"
    EXCLUSIVE = "EXCLUSIVE"
    PROHIBITED = "PROHIBITED"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device as NVML shows it. `index` is the NVML index, `uuid` the identity used everywhere else; `virtual`: a
    vGPU, cut out of a device by a hypervisor."""

    uuid: str
    index: int
    model: str
    memory_bytes: int
    persistence: bool = True
    mig: bool = False
    compute_mode: ComputeMode = ComputeMode.DEFAULT
    virtual: bool = False


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of a device's figures (what nvidia-smi shows). None: the device does not say.

    `error` is NVML's own text where the device did not answer ("" = it did), `lost` that it never will again without a
    reset (NVML: GPU is lost, reset required)."""

    uuid: str
    memory_used_bytes: int | None = None
    sm_percent: int | None = None
    memory_percent: int | None = None
    encoder_percent: int | None = None
    decoder_percent: int | None = None
    temperature_celsius: int | None = None
    power_milliwatts: int | None = None
    persistence: bool | None = None
    error: str = ""
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Xid:
    """An XID event of the driver: something went wrong on the device `gpu_uuid`; `code` as NVIDIA numbers them."""

    gpu_uuid: str
    code: int


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """One compute process on a device (host pid)."""

    gpu_uuid: str
    pid: int
    used_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that can't be mistaken for another: pid, its start time (clock ticks since boot) and the boot."""

    boot_id: str
    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class Handle:
    """All that is needed to find a started container again after the agent died (nomad's task handle).

    `cgroup` is the absolute path of the instance's own v2 cgroup, "" where none can be written. `container_id` is the
    engine's name for it; "" = a process of the host. `sees_all_gpus`: every GPU of the host, so that the driver can
    move it.
    """

    uid: str
    process: ProcessId
    host: str
    port: int
    cgroup: str = ""
    log_path: str = ""
    container_id: str = ""
    sees_all_gpus: bool = True


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended. `signal` is 0 for a normal exit."""

    code: int
    signal: int = 0
    oom_killed: bool = False
    message: str = ""

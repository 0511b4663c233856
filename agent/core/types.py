"""The data types of Hibernode: functions, instances, GPUs and processes.

Units are in the names (`_ns`: integer nanoseconds, `_bytes`); all types are immutable. Ranges and defaults of a
function's properties follow Function Compute's custom-container contract.
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
    """The state of an instance; `lifecycle/machine.py` has the table of transitions."""

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
        """STOPPED and FAILED are final: a cold start gets a new uid."""
        return self in (InstanceState.STOPPED, InstanceState.FAILED)


class StopCause(Enum):
    """Why an instance is stopped, and then its state reason."""

    ASKED = "STOPPED_BY_USER"
    REPLACED = "REVISION_REPLACED"
    SCALED_IN = "SCALED_IN"
    FUNCTION_DELETED = "FUNCTION_DELETED"
    NODE_DRAINED = "NODE_DRAINED"


class IdleMode(Enum):
    """Whether a function's instances are frozen. On a node that can't: REQUIRE refuses, PREFER keeps them awake."""

    REQUIRE = "REQUIRE"
    PREFER = "PREFER"
    NEVER = "NEVER"


class DispatchPolicy(Enum):
    """PACK: the most recently idle instance wins ties, so that the others freeze. SPREAD: the least recently used."""

    PACK = "PACK"
    SPREAD = "SPREAD"


@dataclass(frozen=True, slots=True)
class Hook:
    """A lifecycle hook of the FC contract: an HTTP call with a deadline on the contract's path."""

    timeout_ns: int = 3 * SECOND_NS


@dataclass(frozen=True, slots=True)
class Hooks:
    """`POST /initialize`, `GET /pre-freeze`, `GET /pre-stop`: each called only if configured."""

    initializer: Hook | None = None
    pre_freeze: Hook | None = None
    pre_stop: Hook | None = None


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """customHealthCheckConfig: healthy = 200 <= status < 400 within the timeout. Frozen instances are not probed."""

    path: str
    initial_delay_ns: int = 0
    period_ns: int = 3 * SECOND_NS
    timeout_ns: int = SECOND_NS
    failure_threshold: int = 3
    success_threshold: int = 1


class VisibleDevices(Enum):
    """How CUDA_VISIBLE_DEVICES names an instance's GPUs: by numbers, which every program reads, or by UUIDs."""

    INDEX = "INDEX"
    UUID = "UUID"


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """The GPUs of an instance: `count` whole ones of `model` or `gpu_type` ("" = any) with `memory_bytes` each, the
    size that is billed (0 = the whole GPU). core/gpu_fit.py says which GPUs suit it."""

    count: int = 1
    model: str = ""
    gpu_type: str = ""
    memory_bytes: int = 0
    visible_devices: VisibleDevices = VisibleDevices.INDEX


@dataclass(frozen=True, slots=True)
class IdlePolicy:
    """When an idle instance freezes: after `freeze_after_ns` (0 = at once), or on the GPU allocator's order, but not
    before `min_awake_ns` since its last wake (against thrashing)."""

    mode: IdleMode = IdleMode.REQUIRE
    freeze_after_ns: int = 10 * SECOND_NS
    min_awake_ns: int = 0


@dataclass(frozen=True, slots=True)
class Volume:
    """A host folder mounted into the container; allowed only under the node's `runtime.volumes_allowed`."""

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
    """Options of a container engine; not possible with `image: host`. 0 and "" mean the node's or the image's default.

    `extra_hosts` are (name, address). `shm_bytes` is the size of /dev/shm (FC: FCGPU_RUNTIME_SHMSIZE).
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
    """A deployed function.

    - `revision`: changes with every deploy that changes the spec
    - `image`: "host" runs entrypoint + command on the process runtime
    - `environment`: write-only (masked in every answer, event and log)
    - `node_labels`: labels that a node needs to get its instances
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
    """How many processes may use a device (nvmlComputeMode_t): any number, one, none."""

    DEFAULT = "DEFAULT"
    EXCLUSIVE = "EXCLUSIVE"
    PROHIBITED = "PROHIBITED"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as NVML shows it. `index` is NVML's; everything else refers to it by `uuid`. `virtual`: a hypervisor's
    vGPU. `pci_address`: domain, bus, device; None if NVML does not tell."""

    uuid: str
    index: int
    model: str
    memory_bytes: int
    persistence: bool = True
    mig: bool = False
    compute_mode: ComputeMode = ComputeMode.DEFAULT
    virtual: bool = False
    pci_address: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of a device (nvidia-smi's figures). None: not supported by the device.

    `error`: NVML's text if the device did not answer, else "". `lost`: it needs a reset to answer again (NVML: GPU is
    lost, reset required)."""

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
    """An XID event: the driver reports error `code` (NVIDIA's numbers) of a device."""

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
    """The unique identity of a process: boot, pid and start time (clock ticks since boot)."""

    boot_id: str
    pid: int
    start_time: int


@dataclass(frozen=True, slots=True)
class Handle:
    """All that the next agent needs to find a started container again (nomad's task handle).

    - `cgroup`: absolute path of the instance's own v2 cgroup; "" = none can be written
    - `container_id`: the engine's id; "" = a process on the host
    - `sees_all_gpus`: it sees every GPU of the host, so that the driver can move it
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
    """The end of a container. `signal` is 0 after a normal exit."""

    code: int
    signal: int = 0
    oom_killed: bool = False
    message: str = ""

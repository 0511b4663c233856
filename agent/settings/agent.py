"""agent.yaml: one GPU host."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from agent.config import Duration, OrOff, Section, Size, bad_key
from agent.core.function_rules import MAX_QUEUE_TIMEOUT_NS
from agent.core.types import GIB, MIB, MILLISECOND_NS, SECOND_NS
from agent.settings.common import (
    LimitSettings,
    ListenSettings,
    LogFormat,
    LogLevel,
    Port,
    absolute,
    positive,
    refuse_open_bind,
)

BillingKind = Literal["active", "idle", "unbilled"]


class AgentGrpcSettings(Section, frozen=True):
    """The agent's API: TCP with a token, and a unix socket; access to the socket equals root access."""

    host: str = "127.0.0.1"
    port: Port = 8611
    socket: str = ""

    def __post_init__(self) -> None:
        absolute("socket", self.socket)


class SchedulerLinkSettings(Section, frozen=True):
    """The scheduler of this node; without it the agent serves alone."""

    address: str
    token_file: str
    upload_interval_ns: Duration = Duration(5 * SECOND_NS)

    def __post_init__(self) -> None:
        host, colon, port = self.address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise bad_key("address", f"must be host:port, such as 127.0.0.1:8601, got {self.address!r}")
        if not self.token_file:
            raise bad_key("token_file", "is required: the file with this node's own credential")
        absolute("token_file", self.token_file)
        positive(upload_interval=self.upload_interval_ns)


class PortRange(Section, frozen=True):
    """Ports for instances of the process runtime, both ends included; 0 and 0 = any free port."""

    first: Port = 0
    last: Port = 0

    def __post_init__(self) -> None:
        if self.last < self.first or (self.first == 0) != (self.last == 0):
            raise bad_key("last", f"must not be below first, got {self.first} to {self.last}")


class ProcessRuntimeSettings(Section, frozen=True):
    """Functions with `image: host` run on the host as `user`; off unless enabled."""

    enabled: bool = False
    user: str = ""
    ports: PortRange = PortRange()


DEFAULT_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID",
    "SYS_CHROOT",
)  # fmt: skip
"""Docker's default, which images that run as root rely on, without raw sockets, device nodes and audit writes."""
_CAPABILITY = re.compile(r"[A-Z][A-Z_]{1,39}", re.ASCII)
_FORBIDDEN_CAPABILITIES = frozenset({"ALL", "SYS_ADMIN", "SYS_MODULE", "SYS_RAWIO", "SYS_PTRACE", "BPF", "PERFMON"})


class EngineRuntimeSettings(Section, frozen=True):
    """Functions with an image run in containers of Docker (from 20.10) or Podman (from 4.3), through its socket."""

    socket: OrOff = "auto"
    pull: Literal["missing", "always", "never"] = "missing"
    pull_timeout_ns: Duration = Duration(30 * 60 * SECOND_NS)
    operation_timeout_ns: Duration = Duration(60 * SECOND_NS)
    pids_limit: Annotated[int, msgspec.Meta(ge=16, le=4_194_304)] = 4096
    disk_limit: Literal["auto", "require", "off"] = "auto"
    capabilities: tuple[str, ...] = DEFAULT_CAPABILITIES

    def __post_init__(self) -> None:
        if self.socket.startswith("unix://"):
            raise bad_key("socket", f"is a path: leave out unix://, as in {self.socket.removeprefix('unix://')!r}")
        if self.socket not in ("auto", "off"):
            absolute("socket", self.socket or "empty")
        positive(pull_timeout=self.pull_timeout_ns, operation_timeout=self.operation_timeout_ns)
        for index, name in enumerate(self.capabilities):
            if not _CAPABILITY.fullmatch(name):
                raise bad_key(f"capabilities[{index}]", f"must be a name such as NET_BIND_SERVICE, got {name[:40]!r}")
            if name in _FORBIDDEN_CAPABILITIES:
                raise bad_key(
                    f"capabilities[{index}]", f"{name} would let an instance take over the host; leave it out"
                )


class RuntimeSettings(Section, frozen=True):
    """Starting and stopping instances."""

    process: ProcessRuntimeSettings = ProcessRuntimeSettings()
    engine: EngineRuntimeSettings = EngineRuntimeSettings()
    volumes_allowed: tuple[str, ...] = ()
    trusted_gpus: bool = False
    ready_timeout_ns: Duration = Duration(120 * SECOND_NS)
    stop_timeout_ns: Duration = Duration(30 * SECOND_NS)
    log_limit_bytes: Size = Size(10 * MIB)

    def __post_init__(self) -> None:
        for index, path in enumerate(self.volumes_allowed):
            absolute(f"volumes_allowed[{index}]", path or "empty")
        positive(ready_timeout=self.ready_timeout_ns, stop_timeout=self.stop_timeout_ns, log_limit=self.log_limit_bytes)


class MountSettings(Section, frozen=True):
    """What makes GPUs visible in instances with `attach: mounts`: variables, and binds `host:container[:ro]`."""

    environment: dict[str, str] = msgspec.field(default_factory=dict)
    binds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for index, bind in enumerate(self.binds):
            parts = bind.split(":")
            if (
                len(parts) not in (2, 3)
                or not all(p.startswith("/") for p in parts[:2])
                or parts[2:] not in ([], ["ro"])
            ):
                raise bad_key(f"binds[{index}]", f"must be /host/path:/container/path or ...:ro, got {bind!r}")


class GpuSettings(Section, frozen=True):
    """Freezing, lending and attaching GPUs."""

    checkpointer: Literal["auto", "driver", "utility"] = "auto"
    utility_path: str = "/usr/bin/cuda-checkpoint"
    driver_workers: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    lock_timeout_ns: Duration = Duration(10 * SECOND_NS)
    operation_timeout_ns: Duration = Duration(120 * SECOND_NS)
    max_hold_ns: Duration = Duration(10 * SECOND_NS)
    instances_per_gpu: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    migrate: bool = False
    multi_process_multi_gpu: bool = False
    attach: Literal["auto", "cdi", "nvidia-runtime", "mounts"] = "auto"
    mounts: MountSettings = MountSettings()
    types: dict[str, str] = msgspec.field(default_factory=dict)
    frozen_memory_limit_bytes: Size = Size(0)
    host_memory_reserve_bytes: Size = Size(2 * GIB)
    release_timeout_ns: Duration = Duration(30 * SECOND_NS)

    def __post_init__(self) -> None:
        absolute("utility_path", self.utility_path)
        if self.attach != "mounts" and (self.mounts.environment or self.mounts.binds):
            raise bad_key("mounts", "is used with attach: mounts only; set that, or leave mounts out")
        positive(
            lock_timeout=self.lock_timeout_ns,
            operation_timeout=self.operation_timeout_ns,
            release_timeout=self.release_timeout_ns,
        )
        if self.lock_timeout_ns < MILLISECOND_NS:
            raise bad_key(
                "lock_timeout", "must be at least 1ms: the driver counts milliseconds and takes 0 as no timeout"
            )
        if self.lock_timeout_ns >= self.operation_timeout_ns:
            raise bad_key("operation_timeout", "must be longer than lock_timeout: it bounds the whole operation")


class BillingSettings(Section, frozen=True):
    """How states outside FC's contract are billed, and how often the ledger is written."""

    starting: BillingKind = "idle"
    restoring: BillingKind = "idle"
    window_ns: Duration = Duration(60 * SECOND_NS)
    flush_interval_ns: Duration = Duration(SECOND_NS)

    def __post_init__(self) -> None:
        positive(window=self.window_ns, flush_interval=self.flush_interval_ns)
        if self.flush_interval_ns > self.window_ns:
            raise bad_key("flush_interval", "must not be longer than window")


class QueueSettings(Section, frozen=True):
    """Requests that wait for an instance inside the agent."""

    max_waiting: Annotated[int, msgspec.Meta(ge=0)] = 1000
    timeout_ns: Duration = Duration(60 * SECOND_NS)

    def __post_init__(self) -> None:
        positive(timeout=self.timeout_ns)
        if self.timeout_ns > MAX_QUEUE_TIMEOUT_NS:
            raise bad_key("timeout", "must be at most 1h")


class AgentConfig(Section, frozen=True):
    """agent.yaml: one GPU host."""

    node_name: str = ""
    state_dir: str = "/var/lib/hibernode/agent"
    log_level: LogLevel = "info"
    log_format: LogFormat = "json"
    insecure: bool = False
    on_stop: Literal["leave", "stop"] = "leave"
    token_file: str = ""
    ingress: ListenSettings = ListenSettings(port=8610)
    grpc: AgentGrpcSettings = AgentGrpcSettings()
    admin: ListenSettings = ListenSettings(port=8612)
    scheduler: SchedulerLinkSettings | None = None
    runtime: RuntimeSettings = RuntimeSettings()
    gpu: GpuSettings = GpuSettings()
    billing: BillingSettings = BillingSettings()
    queue: QueueSettings = QueueSettings()
    limits: LimitSettings = LimitSettings()

    def __post_init__(self) -> None:
        absolute("state_dir", self.state_dir)
        if not self.state_dir:
            raise bad_key("state_dir", "must not be empty")
        absolute("token_file", self.token_file)
        refuse_open_bind(self.insecure, ingress=self.ingress.host, grpc=self.grpc.host, admin=self.admin.host)
        if self.gpu.migrate and not self.runtime.trusted_gpus:
            raise bad_key(
                "gpu.migrate",
                "lets every instance see all GPUs of this host; set runtime.trusted_gpus: true to allow that",
            )

    @property
    def token_path(self) -> Path:
        """The bearer token of gRPC and ingress; default <state_dir>/token."""
        return Path(self.token_file or f"{self.state_dir}/token")

    @property
    def socket_path(self) -> Path:
        """The API's unix socket; default <state_dir>/agent.sock."""
        return Path(self.grpc.socket or f"{self.state_dir}/agent.sock")

"""Snapshots of a node and its instances: plain data for the API, the load stream and the CLI.

Times are ns: `_wall_ns` since the epoch, the others durations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from agent.core.types import FunctionSpec, Gpu, GpuSample, InstanceState


@dataclass(frozen=True, slots=True)
class InstanceReading:
    """An instance's use of its host: CPU time since its start, and memory. None: unknown."""

    cpu_ns: int | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class InstanceSnapshot:
    """One instance.

    - `vram_bytes`: GPU memory in use when last seen awake; `vram_limit_bytes`: its limit, over all its GPUs
    - `frozen_bytes`: the image in host memory while it is frozen
    - `wake_estimate_ns`: moving average of its wakes; 0 = never woken
    - `freeze_cancellable`: FREEZING, and a request can still undo it
    - `progress`: the step of its start, for display
    - `peak_in_flight`: most requests inside at once in the last minutes (core/peak.py)
    """

    uid: str
    function: FunctionSpec
    request_id: str
    state: InstanceState
    reason: str
    message: str
    gpu_uuids: tuple[str, ...]
    in_flight: int
    waiting: int
    healthy: bool
    vram_bytes: int
    frozen_bytes: int
    pid: int
    address: str
    create_wall_ns: int
    state_wall_ns: int
    wakes: int
    freezes: int
    last_wake_ns: int
    last_wake_driver_ns: int
    wake_estimate_ns: int
    idle_for_ns: int
    freeze_cancellable: bool
    active_ns: int
    idle_ns: int
    unbilled_ns: int
    container_id: str = ""
    progress: str = ""
    usage: InstanceReading = InstanceReading()
    vram_limit_bytes: int = 0
    peak_in_flight: int = 0


@dataclass(frozen=True, slots=True)
class GpuSnapshot:
    """One GPU: its last sample (None: unknown or out of date), its holder's uid and its waiters' uids."""

    gpu: Gpu
    figures: GpuSample | None
    holder: str
    waiters: tuple[str, ...]
    cordoned: str


@dataclass(frozen=True, slots=True)
class CapabilityLine:
    """A verdict on one capability of the host, with a fix. `level` is OK, WARN or FAIL."""

    name: str
    level: str
    reason: str
    fix: str


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """One node.

    - `epoch`: changes with every start of the agent
    - `host_reserved_bytes`: reserved for images and not yet taken; existing images already lower `host_available_bytes`
    - `migrates`: a frozen instance may wake on other GPUs than those it was frozen on
    - `gpu_types`: which model each GPU type means here (`gpu.types`)
    """

    name: str
    boot_id: str
    agent_version: str
    epoch: int
    driver_version: str
    cuda_version: str
    gpus: tuple[GpuSnapshot, ...]
    host_total_bytes: int
    host_available_bytes: int
    host_reserved_bytes: int
    capabilities: tuple[CapabilityLine, ...]
    ready: bool
    draining: bool
    ingress_address: str
    grpc_address: str
    instances_per_gpu: int
    runtimes: tuple[str, ...]
    instance_count: int
    start_wall_ns: int
    labels: Mapping[str, str]
    migrates: bool = False
    gpu_types: Mapping[str, str] = field(default_factory=dict)

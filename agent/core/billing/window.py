"""`UsageWindow`: one row of the usage ledger, from the meter to the bill."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UsageWindow:
    """A span of an instance's life with one state: `active_ns + idle_ns + unbilled_ns == end_mono_ns - start_mono_ns`.

    `(instance_uid, seq)` is unique; `seq` only grows within an instance. Monotonic times belong to `boot_id`.
    `estimated`: it covers time in which no agent ran. `sealed`: it never changes again.
    """

    instance_uid: str
    seq: int
    node: str
    boot_id: str
    function: str
    state: str
    gpu_model: str
    gpu_uuids: tuple[str, ...]
    gpu_count: int
    gpu_memory_bytes: int
    vcpu_millis: int
    memory_bytes: int
    disk_bytes: int
    start_mono_ns: int
    end_mono_ns: int
    start_wall_ns: int
    active_ns: int
    idle_ns: int
    unbilled_ns: int
    invocations: int
    estimated: bool
    sealed: bool

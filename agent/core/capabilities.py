"""What a host's GPUs can do for idle mode, as a pure function of what was found; with the fix where they can't.

Rules: NVIDIA's documentation and issues of cuda-checkpoint (facts gpu-checkpoint, sections 1 to 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent.core.snapshots import CapabilityLine
from agent.core.types import Gpu

UTILITY_SINCE = 555
"""`cuda-checkpoint` has separate actions and a lock timeout; before, only --toggle, which we never use."""

API_SINCE = 570
MIGRATION_SINCE = 580
ARM_SINCE = 595
SAFE_SINCE = 580
"""PyTorch on some 570 builds answers 801, and 570 keeps no good state after an error."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What was found. `driver_version` like "580.65.06" ("" = no driver), `machine` as uname says it,
    `euid` of the agent."""

    driver_version: str
    gpus: Sequence[Gpu]
    euid: int
    machine: str


@dataclass(frozen=True, slots=True)
class Capabilities:
    """`idle_mode`: may instances be frozen here? `api`: by the driver's API (else by the utility). `migration`: may
    they wake on another GPU? `lines` for people: driver, checkpoint, migration, privileges, persistence, mig."""

    idle_mode: bool
    api: bool
    migration: bool
    lines: tuple[CapabilityLine, ...]


def find_capabilities(host: HostFacts) -> Capabilities:
    """The verdict and its reasons. Any FAIL forbids idle mode; a WARN does not."""
    branch = driver_branch(host.driver_version)
    lines = (
        _driver(host, branch),
        _checkpoint(host, branch),
        _migration(branch),
        _privileges(host),
        _persistence(host),
        _mig(host),
    )
    idle_mode = all(line.level != "FAIL" for line in lines)
    return Capabilities(
        idle_mode=idle_mode,
        api=idle_mode and branch >= API_SINCE,
        migration=idle_mode and branch >= MIGRATION_SINCE,
        lines=lines,
    )


def host_lines(found: Capabilities, cgroup: str, unavailable: str) -> tuple[CapabilityLine, ...]:
    """The driver's lines and the host's: where instances live (`cgroup` "" = nowhere, SIGSTOP instead), and what
    start-up found to stand in the way although the driver could (`unavailable`)."""
    lines = [*found.lines]
    if cgroup:
        lines.append(_ok("cgroup", f"instances live in cgroups below {cgroup}"))
    else:
        lines.append(
            _warn(
                "cgroup",
                "no cgroup v2 can be written: instances are frozen by SIGSTOP, which a new child can escape",
                "run the agent as root, or under systemd with Delegate=yes",
            )
        )
    if unavailable and found.idle_mode:
        lines.append(_fail("idle mode", unavailable, "see the agent's log"))
    return tuple(lines)


def driver_branch(version: str) -> int:
    """580 of "580.65.06"; 0 where there is none."""
    digits = version.partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


def _driver(host: HostFacts, branch: int) -> CapabilityLine:
    if not branch:
        return _fail("driver", "no NVIDIA driver answers", "install the NVIDIA driver, 580 or newer")
    if not host.gpus:
        return _fail("driver", f"driver {host.driver_version} shows no GPU", "check nvidia-smi and the kernel log")
    if branch < SAFE_SINCE:
        return _warn(
            "driver",
            f"driver {host.driver_version} is older than {SAFE_SINCE}: some workloads can't be checkpointed, and a "
            "failed checkpoint loses the instance",
            f"install driver {SAFE_SINCE} or newer",
        )
    return _ok("driver", f"driver {host.driver_version}, {len(host.gpus)} GPUs")


def _checkpoint(host: HostFacts, branch: int) -> CapabilityLine:
    if branch < UTILITY_SINCE:
        found = f"driver {host.driver_version}" if branch else "without a driver one"
        return _fail(
            "checkpoint", f"{found} can't checkpoint in separate steps", f"install driver {SAFE_SINCE} or newer"
        )
    if host.machine in ("aarch64", "arm64"):
        if branch < ARM_SINCE:
            return _fail(
                "checkpoint",
                f"driver {host.driver_version} can't checkpoint on {host.machine}",
                f"install driver {ARM_SINCE} or newer",
            )
    elif host.machine != "x86_64":
        return _fail("checkpoint", f"no driver can checkpoint on {host.machine}", "use an x86-64 host")
    if branch < API_SINCE:
        return _fail(
            "checkpoint",
            f"driver {host.driver_version} has no checkpoint API, only the cuda-checkpoint program, which the agent "
            "does not use yet",
            f"install driver {SAFE_SINCE} or newer",
        )
    return _ok("checkpoint", "by the driver's API")


def _migration(branch: int) -> CapabilityLine:
    if branch < MIGRATION_SINCE:
        return _warn(
            "migration",
            "a frozen instance wakes only on the GPU it was frozen on",
            f"install driver {MIGRATION_SINCE} or newer",
        )
    return _ok("migration", "the driver could wake a frozen instance on another GPU; the agent does not use it yet")


def _privileges(host: HostFacts) -> CapabilityLine:
    if host.euid != 0:
        # Not a FAIL: a lock that the driver denies (304) is rolled back, so trying costs nothing.
        return _warn(
            "privileges",
            f"the agent runs as user {host.euid}: the driver may deny it to checkpoint other processes",
            "run the agent as root, in the host's PID namespace",
        )
    return _ok("privileges", "root")


def _persistence(host: HostFacts) -> CapabilityLine:
    off = [gpu.index for gpu in host.gpus if not gpu.persistence]
    if off:
        return _warn(
            "persistence",
            f"persistence mode is off on GPU {_list(off)}: the first wake after a start of the agent takes seconds "
            "longer, and restores made by other tools kill their targets",
            "nvidia-smi -pm 1, or enable nvidia-persistenced",
        )
    return _ok("persistence", "persistence mode is on")


def _mig(host: HostFacts) -> CapabilityLine:
    on = [gpu.index for gpu in host.gpus if gpu.mig]
    if on:
        return _fail(
            "mig",
            f"GPU {_list(on)} is in MIG mode, which can't be checkpointed",
            f"nvidia-smi -i {_list(on)} -mig 0, or leave these GPUs to others",
        )
    return _ok("mig", "MIG mode is off")


def _list(indexes: Sequence[int]) -> str:
    return ",".join(map(str, indexes))


def _ok(name: str, reason: str) -> CapabilityLine:
    return CapabilityLine(name, "OK", reason, "")


def _warn(name: str, reason: str, fix: str) -> CapabilityLine:
    return CapabilityLine(name, "WARN", reason, fix)


def _fail(name: str, reason: str, fix: str) -> CapabilityLine:
    return CapabilityLine(name, "FAIL", reason, fix)

"""Whether a host's GPUs can do idle mode: a pure function from the host's facts to lines with a verdict and a fix.

Rules: `agent/docs/facts/gpu-checkpoint.md`, sections 1 to 3 and 7 (NVIDIA's documentation and the issues of
cuda-checkpoint). One line a subject; any FAIL forbids idle mode, a WARN does not. Subjects that need something missing
(devices without a driver) get no line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from agent.core.gpus.host_facts import API_CUDA, API_SINCE, UTILITY_CUDA, UTILITY_SINCE, HostFacts, NvmlTrouble
from agent.core.snapshots import CapabilityLine
from agent.core.types import ComputeMode, Gpu

MIGRATION_SINCE = 580
ARM_SINCE = 595
SAFE_SINCE = 580
"""Some 570 builds answer 801 for PyTorch, and 570 leaves no usable state after an error."""

HANGING = frozenset({595})
"""Branches whose open kernel module was seen to hang the whole host when a restored process ended badly (issue 53)."""

NO_ATTACH = 3
"""Value of kernel.yama.ptrace_scope under which no process may attach to another."""

NEW_DRIVER = f"install driver {SAFE_SINCE} or newer"
FIND_LIBCUDA = (
    "remove the cuda-compat package, or take its folder out of LD_LIBRARY_PATH; see ldconfig -p | grep libcuda"
)
CHECK_KERNEL_LOG = "dmesg | grep -iE 'nvrm|xid'; then reset the GPU (nvidia-smi --gpu-reset) or reboot"


_TROUBLES = {
    NvmlTrouble.MISSING: (
        "no NVIDIA driver: libnvidia-ml.so.1 is not found",
        f"install the NVIDIA driver, {SAFE_SINCE} or newer (to try without a GPU: hibernode demo)",
    ),
    NvmlTrouble.NOT_LOADED: (
        "the NVIDIA kernel module is not loaded",
        "modprobe nvidia; if that fails: dmesg | grep -i nvrm",
    ),
    NvmlTrouble.MISMATCH: (
        "the driver's library and its kernel module are of different versions, as after an update",
        "reboot",
    ),
    NvmlTrouble.DENIED: ("this user may not open the GPUs", "run as root"),
    NvmlTrouble.SILENT: ("the driver does not answer", CHECK_KERNEL_LOG),
    NvmlTrouble.LOST: ("a GPU is lost: the driver can't reach it any more", CHECK_KERNEL_LOG),
    NvmlTrouble.CRASHED: ("the driver's library crashed", f"reinstall the driver, {SAFE_SINCE} or newer"),
    NvmlTrouble.OTHER: ("the GPUs can't be read", "compare with what nvidia-smi says; then dmesg | grep -i nvrm"),
}


class CheckpointerKind(StrEnum):
    """What freezes instances on a host: the driver's API, the `cuda-checkpoint` program, or nothing (falsy)."""

    DRIVER = "driver"
    UTILITY = "utility"
    NONE = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The verdict on a host.

    - `idle_mode`: instances can be frozen
    - `checkpointer`: set even if idle mode is forbidden, so that processes locked by an earlier agent can be unlocked
    - `migration`: instances can wake on another GPU
    - `init_before_restore`: persistence mode is off, so a restore needs cuInit first
    - `lines`: for `hibernode doctor` and the log
    """

    idle_mode: bool
    checkpointer: CheckpointerKind
    migration: bool
    init_before_restore: bool
    lines: tuple[CapabilityLine, ...]

    @property
    def refusal(self) -> str:
        """Why a function can't have idle mode on this host, with the fix, in one sentence; "" if it can."""
        failed = [line for line in self.lines if line.level == "FAIL"]
        if not failed:
            return ""
        more = f"; {len(failed) - 1} more: hibernode doctor" if len(failed) > 1 else ""
        return f"{failed[0].reason} (to do: {failed[0].fix}{more})"


def find_capabilities(host: HostFacts) -> Capabilities:
    """The verdict on `host`, with its reasons."""
    chosen = _choose(host)
    lines = tuple(_lines(host, chosen))
    idle_mode = all(line.level != "FAIL" for line in lines)
    return Capabilities(
        idle_mode=idle_mode,
        checkpointer=chosen,
        migration=idle_mode and host.branch >= MIGRATION_SINCE,
        init_before_restore=bool(host.where(_volatile)),
        lines=lines,
    )


def host_lines(found: Capabilities, cgroup: str, unavailable: str) -> tuple[CapabilityLine, ...]:
    """The lines of `found`, of the folder of instance cgroups ("" = none: SIGSTOP) and of `idle_mode_lines`."""
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
    return (*lines, *idle_mode_lines(found, unavailable))


def idle_mode_lines(found: Capabilities, unavailable: str) -> tuple[CapabilityLine, ...]:
    """What forbids idle mode although the facts allow it: `unavailable`, why the checkpointer did not start."""
    if not unavailable or not found.idle_mode:
        return ()
    fix = "follow that message; check the driver's libraries: ldconfig -p | grep -E 'libcuda|libnvidia-ml'"
    return (_fail("idle mode", unavailable, fix),)


def _choose(host: HostFacts) -> CheckpointerKind:
    """The checkpointer that `gpu.checkpointer` names; for auto the driver's API if it has one, else the program."""
    if host.checkpointer != "utility" and host.has_api:
        return CheckpointerKind.DRIVER
    if host.checkpointer != "driver" and host.takes_utility and host.utility:
        return CheckpointerKind.UTILITY
    return CheckpointerKind.NONE


def _lines(host: HostFacts, chosen: CheckpointerKind) -> Iterator[CapabilityLine]:
    yield _driver(host)
    yield _architecture(host)
    if host.branch:
        yield _kernel_module(host)
        yield _cuda(host)
        yield _checkpoint(host, chosen)
        if chosen:
            yield _migration(host)
    yield _privileges(host)
    if host.gpus:
        yield _persistence(host, chosen)
        yield _mig(host)
        yield _vgpu(host)
        yield _compute_mode(host)
        yield _mps(host)


def _driver(host: HostFacts) -> CapabilityLine:
    if host.trouble is not None:
        reason, fix = _TROUBLES[host.trouble]
        text = f" ({host.trouble_text})" if host.trouble_text else ""
        return _fail("driver", reason + text, fix)
    if not host.driver_version:
        return _fail("driver", "no NVIDIA driver answers", f"install the NVIDIA driver, {SAFE_SINCE} or newer")
    if not host.branch:
        return _fail("driver", f"the driver's version can't be read: {host.driver_version!r}", NEW_DRIVER)
    if not host.gpus:
        return _fail(
            "driver", f"driver {host.driver_version} shows no GPU", "lspci | grep -i nvidia; dmesg | grep -i nvrm"
        )
    if host.missing:
        return _warn(
            "driver",
            f"driver {host.driver_version} can't reach {host.missing} of {host.missing + len(host.gpus)} GPUs",
            CHECK_KERNEL_LOG,
        )
    if host.branch < SAFE_SINCE:
        return _warn(
            "driver",
            f"driver {host.driver_version} is older than {SAFE_SINCE}: some workloads can't be checkpointed, and a "
            "failed checkpoint loses the instance",
            NEW_DRIVER,
        )
    plural = "" if len(host.gpus) == 1 else "s"
    return _ok("driver", f"driver {host.driver_version}, {len(host.gpus)} GPU{plural}")


def _architecture(host: HostFacts) -> CapabilityLine:
    if host.machine in ("aarch64", "arm64"):
        if host.branch and host.branch < ARM_SINCE:
            return _fail(
                "architecture",
                f"driver {host.driver_version} can't checkpoint on {host.machine}",
                f"install driver {ARM_SINCE} or newer",
            )
    elif host.machine != "x86_64":
        return _fail("architecture", f"no driver can checkpoint on {host.machine}", "use a 64-bit x86 host")
    return _ok("architecture", host.machine)


def _kernel_module(host: HostFacts) -> CapabilityLine:
    if not host.open_module:
        return _ok("kernel module", "not the open one")
    if host.branch in HANGING:
        return _warn(
            "kernel module",
            f"with the open kernel module of driver {host.branch} the whole host can hang when a woken process is "
            "killed or meets a CUDA error",
            "install another driver branch (580, or 610 and newer), or the proprietary module if the GPU allows it; "
            "until then run no scheduler on this host",
        )
    return _ok("kernel module", "the open one")


def _cuda(host: HostFacts) -> CapabilityLine:
    if not host.cuda:
        return _warn("cuda", "libcuda's version is not known", "is libcuda.so.1 there? ldconfig -p | grep libcuda")
    cuda = f"{host.cuda // 1000}.{host.cuda % 1000 // 10}"
    due = API_CUDA if host.branch >= API_SINCE else UTILITY_CUDA if host.branch >= UTILITY_SINCE else 0
    if host.cuda < due:
        return _warn(
            "cuda",
            f"libcuda has CUDA {cuda}, older than driver {host.driver_version}: another libcuda.so.1 is found first",
            FIND_LIBCUDA,
        )
    return _ok("cuda", f"CUDA {cuda}")


def _checkpoint(host: HostFacts, chosen: CheckpointerKind) -> CapabilityLine:
    if chosen is CheckpointerKind.DRIVER:
        return _ok("checkpoint", "by the driver's API")
    if chosen is CheckpointerKind.UTILITY:
        return _ok("checkpoint", f"by the program {host.utility}, a process for each step")
    if host.branch < UTILITY_SINCE:
        return _fail("checkpoint", f"driver {host.driver_version} can't checkpoint in separate steps", NEW_DRIVER)
    if host.checkpointer == "driver" and host.branch < API_SINCE:
        return _fail(
            "checkpoint",
            f"driver {host.driver_version} has no checkpoint API, which gpu.checkpointer: driver asks for",
            f"{NEW_DRIVER}; or set gpu.checkpointer: auto, and gpu.utility_path to a cuda-checkpoint program",
        )
    if not host.takes_utility or host.checkpointer == "driver":
        return _fail("checkpoint", "the libcuda that is found has no checkpoint API", FIND_LIBCUDA)
    if host.has_api:
        found = f"gpu.checkpointer: utility is set, and {host.utility_problem}"
        fix = "set gpu.checkpointer: auto (this driver needs no program), or repair gpu.utility_path"
    else:
        found = f"driver {host.driver_version} checkpoints only through a cuda-checkpoint program, and "
        found += host.utility_problem
        fix = f"{NEW_DRIVER}; or get cuda-checkpoint from github.com/NVIDIA/cuda-checkpoint, and set gpu.utility_path"
    return _fail("checkpoint", found, FIND_LIBCUDA if not host.has_api and host.branch >= API_SINCE else fix)


def _migration(host: HostFacts) -> CapabilityLine:
    if len(host.gpus) == 1:
        return _ok("migration", "with one GPU there is no other to wake on")
    if host.branch < MIGRATION_SINCE:
        return _warn(
            "migration",
            "a frozen instance wakes only on the GPU it was frozen on",
            f"install driver {MIGRATION_SINCE} or newer",
        )
    return _ok("migration", "a frozen instance can wake on another GPU of the same model if gpu.migrate is true")


def _privileges(host: HostFacts) -> CapabilityLine:
    if not host.host_pids:
        return _fail(
            "privileges",
            "the agent has its own PID namespace, so it can't tell whose processes hold GPU memory",
            "start its container with --pid=host, or run the agent on the host",
        )
    if host.euid != 0:
        # Not a FAIL: a lock that the driver denies (304) is rolled back, so an attempt costs nothing.
        return _warn(
            "privileges",
            f"this is user {host.euid}, not root: the driver may deny it to checkpoint processes of others",
            "run the agent as root (and doctor with sudo)",
        )
    # Nor this: only custom storage, which is not used here, is known to need it.
    if not host.may_trace:
        return _warn(
            "privileges",
            "the agent lacks CAP_SYS_PTRACE: the driver may deny a checkpoint (304), which ends the instance",
            "take CAP_SYS_PTRACE into CapabilityBoundingSet= of its unit; in a container: --cap-add=SYS_PTRACE",
        )
    if host.ptrace_scope >= NO_ATTACH:
        return _warn(
            "privileges",
            f"kernel.yama.ptrace_scope is {host.ptrace_scope}: no process may attach to another, so the driver may "
            "deny a checkpoint (304), which ends the instance",
            "set it to 1 in /etc/sysctl.d and reboot: it can't be lowered at run time",
        )
    return _ok("privileges", "root, with the host's processes in sight")


def _volatile(gpu: Gpu) -> bool:
    return not gpu.persistence


def _persistence(host: HostFacts, chosen: CheckpointerKind) -> CapabilityLine:
    off = host.where(_volatile)
    fix = f"nvidia-smi -i {off} -pm 1; to keep it over a reboot: systemctl enable --now nvidia-persistenced"
    if not off:
        return _ok("persistence", "persistence mode is on")
    if chosen is CheckpointerKind.UTILITY:
        return _fail(
            "persistence",
            f"persistence mode is off on GPU {off}: a restore by the cuda-checkpoint program would kill its instance",
            fix,
        )
    return _warn(
        "persistence",
        f"persistence mode is off on GPU {off}: the first wake after the agent's start takes seconds longer, and "
        "restores by other tools kill their targets",
        fix,
    )


def _mig(host: HostFacts) -> CapabilityLine:
    if on := host.where(lambda gpu: gpu.mig):
        return _fail("mig", f"GPU {on} is in MIG mode, which can't be checkpointed", f"nvidia-smi -i {on} -mig 0")
    return _ok("mig", "MIG mode is off")


def _vgpu(host: HostFacts) -> CapabilityLine:
    if virtual := host.where(lambda gpu: gpu.virtual):
        return _fail(
            "vgpu",
            f"GPU {virtual} is a vGPU, which can't be checkpointed",
            "give the virtual machine whole GPUs (PCI passthrough)",
        )
    return _ok("vgpu", "whole GPUs, no vGPU")


def _compute_mode(host: HostFacts) -> CapabilityLine:
    if closed := host.where(lambda gpu: gpu.compute_mode is ComputeMode.PROHIBITED):
        return _fail(
            "compute mode",
            f"GPU {closed} is closed to CUDA (compute mode PROHIBITED)",
            f"nvidia-smi -i {closed} -c DEFAULT",
        )
    if exclusive := host.where(lambda gpu: gpu.compute_mode is ComputeMode.EXCLUSIVE):
        return _warn(
            "compute mode",
            f"GPU {exclusive} takes one process at a time (EXCLUSIVE_PROCESS): instances of several processes fail",
            f"nvidia-smi -i {exclusive} -c DEFAULT",
        )
    return _ok("compute mode", "DEFAULT")


def _mps(host: HostFacts) -> CapabilityLine:
    if host.mps:
        return _fail(
            "mps",
            "an MPS daemon runs here; its clients can't be checkpointed",
            "echo quit | nvidia-cuda-mps-control",
        )
    return _ok("mps", "no MPS daemon")


def _ok(name: str, reason: str) -> CapabilityLine:
    return CapabilityLine(name, "OK", reason, "")


def _warn(name: str, reason: str, fix: str) -> CapabilityLine:
    return CapabilityLine(name, "WARN", reason, fix)


def _fail(name: str, reason: str, fix: str) -> CapabilityLine:
    return CapabilityLine(name, "FAIL", reason, fix)

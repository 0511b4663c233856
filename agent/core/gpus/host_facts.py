"""The facts of a host that decide whether its GPUs can do idle mode, and how they are read from the kernel's texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from agent.core.types import Gpu

UTILITY_SINCE = 555
"""Since then `cuda-checkpoint` has separate actions and a lock timeout; before, only --toggle, never used here."""

UTILITY_CUDA = 12040
"""The least cuDriverGetVersion that the program accepts; below it prints `Insufficient driver`."""

API_SINCE = 570
API_CUDA = 12080

CAP_SYS_PTRACE = 19
"""Bit of the capability, from linux/capability.h."""


class NvmlTrouble(Enum):
    """Why NVML gave no inventory."""

    MISSING = "MISSING"
    NOT_LOADED = "NOT_LOADED"
    MISMATCH = "MISMATCH"
    DENIED = "DENIED"
    SILENT = "SILENT"
    LOST = "LOST"
    CRASHED = "CRASHED"
    OTHER = "OTHER"


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The facts of a host.

    - `driver_version`: like "580.65.06"; "" = no driver
    - `euid`: of the agent; `machine`: uname's
    - `cuda`: libcuda's version, 13000 for 13.0; 0 = unknown
    - `trouble`: why NVML failed, with NVML's own `trouble_text`
    - `missing`: number of GPUs that do not answer, besides `gpus`
    - `open_module`: the kernel module is the open one
    - `mps`: an MPS daemon runs
    - `host_pids`: the driver's pids are the agent's
    - `may_trace`: the agent has CAP_SYS_PTRACE; `ptrace_scope`: Yama's setting, 0 without it
    - `checkpointer`: the setting
    - `utility`: path of a usable cuda-checkpoint program; "" = none, because of `utility_problem`
    """

    driver_version: str
    gpus: Sequence[Gpu]
    euid: int
    machine: str
    cuda: int = 0
    trouble: NvmlTrouble | None = None
    trouble_text: str = ""
    missing: int = 0
    open_module: bool = False
    mps: bool = False
    host_pids: bool = True
    may_trace: bool = True
    ptrace_scope: int = 0
    checkpointer: str = "auto"
    utility: str = ""
    utility_problem: str = "there is no cuda-checkpoint program"

    @property
    def branch(self) -> int:
        return driver_branch(self.driver_version)

    @property
    def has_api(self) -> bool:
        """The driver has cuCheckpointProcess*; a libcuda older than the driver lacks it."""
        return self.branch >= API_SINCE and (not self.cuda or self.cuda >= API_CUDA)

    @property
    def takes_utility(self) -> bool:
        """A cuda-checkpoint program works with this driver."""
        return self.branch >= UTILITY_SINCE and (not self.cuda or self.cuda >= UTILITY_CUDA)

    def where(self, wrong: Callable[[Gpu], bool]) -> str:
        """The indexes of the GPUs for which `wrong` holds, as nvidia-smi's -i takes them; "" = none."""
        return ",".join(str(gpu.index) for gpu in self.gpus if wrong(gpu))


def driver_branch(version: str) -> int:
    """580 of "580.65.06"; 0 without a number."""
    digits = version.partition(".")[0]
    return int(digits) if digits.isascii() and digits.isdecimal() else 0


def is_open_module(text: str) -> bool:
    """Whether `/proc/driver/nvidia/version` with this text is of the open kernel module."""
    return "Open Kernel Module" in text


def may_trace(status: str) -> bool:
    """Whether a process whose `/proc/PID/status` has this text has CAP_SYS_PTRACE; True if it does not say."""
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "")
    return not effective or bool(int(effective, 16) >> CAP_SYS_PTRACE & 1)

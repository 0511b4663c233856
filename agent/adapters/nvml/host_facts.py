"""Gathers the facts about this host for `core.gpus.capabilities`. The agent and `hibernode doctor` both use it."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml

from agent.adapters.cuda.utility_program import find_utility
from agent.core.errors import UnavailableError
from agent.core.gpus.host_facts import HostFacts, NvmlTrouble, is_open_module, may_trace
from agent.core.types import Gpu
from agent.ports import DriverInfo, Gpus
from agent.settings import GpuSettings

INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Inode of the initial pid namespace (PROC_PID_INIT_INO)."""

MPS_PROGRAMS = frozenset({"nvidia-cuda-mps-control", "nvidia-cuda-mps-server"})

_TROUBLES = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: NvmlTrouble.MISSING,
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: NvmlTrouble.NOT_LOADED,
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: NvmlTrouble.MISMATCH,
    pynvml.NVML_ERROR_NO_PERMISSION: NvmlTrouble.DENIED,
    pynvml.NVML_ERROR_TIMEOUT: NvmlTrouble.SILENT,
    pynvml.NVML_ERROR_GPU_IS_LOST: NvmlTrouble.LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED: NvmlTrouble.LOST,
}


RETRY_S = 10.0
RETRY_PAUSE_S = 0.25


@dataclass(frozen=True, slots=True)
class GpuSurvey:
    """What NVML reported."""

    driver: DriverInfo | None = None
    gpus: tuple[Gpu, ...] = ()
    error: UnavailableError | None = None  # why it reported nothing
    missing: int = 0  # GPUs that do not answer, beside those in `gpus`
    transient: bool = False  # at least one of them is not lost and may answer again

    @property
    def trouble(self) -> NvmlTrouble | None:
        """The kind of failure: NVML's own code, or its silence."""
        if self.error is None:
            return None
        cause = self.error.__cause__
        if isinstance(cause, pynvml.NVMLError):
            return _TROUBLES.get(cause.value, NvmlTrouble.OTHER)
        return NvmlTrouble.SILENT

    @property
    def trouble_text(self) -> str:
        """NVML's own message, if the kind alone does not say it."""
        cause = self.error.__cause__ if self.error is not None else None
        return str(cause) if cause is not None and self.trouble is NvmlTrouble.OTHER else ""


async def survey_gpus(gpus: Gpus) -> GpuSurvey:
    """Driver and inventory. Never raises: a host without a driver is a valid host."""
    driver: DriverInfo | None = None
    try:
        driver = await gpus.driver()
        found = tuple(await gpus.list_gpus())
    except UnavailableError as error:
        return GpuSurvey(driver, (), error)
    missing, transient = await _failing(gpus)
    return GpuSurvey(driver, found, missing=missing, transient=transient)


async def survey_gpus_with_retry(gpus: Gpus, retry_s: float = RETRY_S) -> GpuSurvey:
    """Like `survey_gpus`, but a device that fails and is not lost gets `retry_s` to answer again.

    For the agent's start: a GPU missing then stays unknown until the next start, instances frozen from it are given up,
    and the driver refuses every migration whose map does not name it.
    """
    try:
        async with asyncio.timeout(retry_s):
            while True:
                _, transient = await _failing(gpus)
                survey = await survey_gpus(gpus)
                if not (transient or survey.transient):  # none failed while it was described either
                    return survey
                await asyncio.sleep(RETRY_PAUSE_S)
    except TimeoutError:
        return await survey_gpus(gpus)


async def _failing(gpus: Gpus) -> tuple[int, bool]:
    """How many devices do not answer, and whether one of them may again; (0, False) without a driver."""
    try:
        found = await gpus.processes()
    except UnavailableError:
        return 0, False
    return len(found.unanswered), bool(found.unanswered - found.lost)


def host_facts(survey: GpuSurvey, settings: GpuSettings, proc: Path = Path("/proc")) -> HostFacts:
    """Everything that decides about idle mode on this host."""
    utility, problem = find_utility(Path(settings.utility_path))
    return HostFacts(
        driver_version=survey.driver.version if survey.driver else "",
        gpus=survey.gpus,
        euid=os.geteuid(),
        machine=platform.machine() if sys.maxsize > 2**32 else "a 32-bit system",
        cuda=survey.driver.cuda if survey.driver else 0,
        trouble=survey.trouble,
        trouble_text=survey.trouble_text,
        missing=survey.missing,
        open_module=is_open_module(_text(proc / "driver/nvidia/version")),
        mps=mps_runs(),
        host_pids=sees_host_pids(),
        may_trace=may_trace(_text(proc / "self/status")),
        ptrace_scope=_number(_text(proc / "sys/kernel/yama/ptrace_scope")),
        checkpointer=settings.checkpointer,
        utility=str(utility) if utility is not None else "",
        utility_problem=problem,
    )


def _text(path: Path) -> str:
    """ "" if there is no such file: without a driver, or without Yama."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str) -> int:
    digits = text.strip()
    return int(digits) if digits.isascii() and digits.isdecimal() else 0


def mps_runs() -> bool:
    """Whether an MPS control daemon or server runs. Only root's programs count: a tenant must not be able to turn idle
    mode off by a process of that name."""
    return any(
        name.startswith("nvidia-cuda-mps") and _is_mps(process.pid)
        for process in psutil.process_iter(["name"])
        if (name := process.info["name"] or "")
    )


def _is_mps(pid: int) -> bool:
    link = f"/proc/{pid}/exe"
    try:
        program = os.readlink(link).removesuffix(" (deleted)")
        return os.path.basename(program) in MPS_PROGRAMS and os.stat(link).st_uid == 0
    except PermissionError:
        return True  # this user may not read the link: judge by the name
    except OSError:
        return False  # it has ended


def sees_host_pids(proc: Path = Path("/proc")) -> bool:
    """Whether NVML's pids are the agent's. The kernel module uses the numbers of the initial namespace; without it, a
    user-space driver sees its callers' own numbers."""
    try:
        own = (proc / "self/ns/pid").stat().st_ino
    except OSError:
        return True
    return own == INITIAL_PID_NAMESPACE or not (proc / "driver/nvidia/version").exists()

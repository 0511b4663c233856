"""Checks the preconditions of a selftest, one line each, and chooses its GPU and checkpointers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from agent.adapters.kernel.host_memory import ProcHostMemory
from agent.adapters.nvml.host_facts import GpuSurvey, host_facts, survey_gpus
from agent.adapters.nvml.locks import GpuLocks
from agent.core.errors import HibernodeError
from agent.core.gpus.capabilities import Capabilities, find_capabilities
from agent.core.snapshots import CapabilityLine
from agent.core.types import GIB, MIB, Gpu
from agent.ports import DriverInfo, Gpus
from agent.settings import GpuSettings

PINNED_CHUNK = 256 * MIB
"""Buffer of the pinned copy: large enough for full speed, small beside the image."""

CONTEXT_BYTES = GIB // 2
"""GPU memory of a CUDA context."""


@dataclass(frozen=True, slots=True)
class SelftestPlan:
    """The user's request: freeze `size_bytes` of memory `runs` times on `gpu` (uuid or index, "" = any) with the
    checkpointer of an agent with `settings`, and with `against` ("" = no other). `within_ns`: after the first measured
    run, no run begins that would not end by then; 0 = any."""

    settings: GpuSettings
    size_bytes: int
    runs: int
    gpu: str = ""
    against: str = ""
    within_ns: int = 0


@dataclass(slots=True)
class HostFindings:
    """Results of the checks. A FAIL line means that `gpu` and `checkpointers` are unusable. `checkpointers`: the inputs
    of `choose` by checkpointer name, the agent's own first."""

    lines: list[CapabilityLine] = field(default_factory=list)
    driver: DriverInfo | None = None
    gpu: Gpu | None = None
    checkpointers: Mapping[str, tuple[Capabilities, GpuSettings]] = field(default_factory=dict)

    @property
    def failures(self) -> list[CapabilityLine]:
        return [line for line in self.lines if line.level == "FAIL"]

    def add(self, level: str, name: str, reason: str, fix: str = "") -> None:
        self.lines.append(CapabilityLine(name, level, reason, fix))


async def check_preconditions(plan: SelftestPlan, gpus: Gpus, locks: GpuLocks) -> HostFindings:
    """Run every check, so that all problems are reported at once. Locks the GPU."""
    survey = await survey_gpus(gpus)
    capabilities = find_capabilities(host_facts(survey, plan.settings))
    findings = HostFindings([line for line in capabilities.lines if line.name != "migration"], survey.driver)
    _choose_checkpointers(findings, plan, survey, capabilities)
    _check_host_memory(findings, plan)
    gpu = await _choose_gpu(findings, plan, survey.gpus, gpus)
    if gpu is not None:
        _lock(findings, locks, gpu)
    findings.gpu = gpu
    return findings


async def _choose_gpu(findings: HostFindings, plan: SelftestPlan, inventory: Sequence[Gpu], gpus: Gpus) -> Gpu | None:
    """The requested GPU, or else the one with the most free memory."""
    named = [gpu for gpu in inventory if not plan.gpu or plan.gpu in (str(gpu.index), gpu.uuid)]
    if not named:
        if inventory:
            known = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in inventory)
            findings.add("FAIL", "gpu", f"there is no GPU {plan.gpu!r}", f"name one of {known}")
        return None
    try:
        free = await gpus.memory_free()
        processes = await gpus.processes()
    except HibernodeError as error:
        findings.add("FAIL", "gpu", error.message, "make `nvidia-smi` work first")
        return None
    gpu = max(named, key=lambda gpu: (not gpu.mig, free.get(gpu.uuid, 0), -gpu.index))
    room = free.get(gpu.uuid, 0)
    findings.add("OK", "gpu", f"GPU {gpu.index}, {gpu.model}, {gpu.uuid}")
    others = [process for process in processes if process.gpu_uuid == gpu.uuid]
    beside = f", beside {len(others)} other processes" if others else ""
    text = f"{room / GIB:.2f} of {gpu.memory_bytes / GIB:.2f} GiB free{beside}"
    if room < plan.size_bytes:
        pids = ", ".join(str(process.pid) for process in others[:8])
        most = (room - CONTEXT_BYTES) / GIB
        less = [f"--gib {most:.1f} or less"] if most >= 0.1 else []
        end = f"end what uses it (processes {pids})" if others else "another --gpu"
        need = f"{plan.size_bytes / GIB:.2f}"
        findings.add("FAIL", "gpu memory", f"{text}; the test needs {need}", ", or ".join([*less, end]))
    else:
        findings.add("OK", "gpu memory", text)
    return gpu


def _lock(findings: HostFindings, locks: GpuLocks, gpu: Gpu) -> None:
    """Keep an agent from starting or using the GPU during the test."""
    try:
        locks.acquire([gpu.uuid])
    except HibernodeError as error:
        busy = error.reason == "GPU_IN_USE"
        fix = "stop the agent for the test (`systemctl stop hibernode-agent`; its instances stay), then start it again"
        text = f"an agent, or another selftest, drives GPU {gpu.index} ({gpu.uuid})" if busy else error.message
        findings.add("FAIL", "gpu lock", text, fix if busy else "run it with sudo, or as the user that runs the agent")


def _check_host_memory(findings: HostFindings, plan: SelftestPlan) -> None:
    """Check host memory: it holds the image while the program is frozen."""
    reserve = plan.settings.host_memory_reserve_bytes
    need = plan.size_bytes + min(PINNED_CHUNK, plan.size_bytes)
    try:
        available = ProcHostMemory().available_bytes()
    except HibernodeError as error:
        findings.add("FAIL", "host memory", error.message, "mount /proc")
        return
    text = f"{available / GIB:.1f} GiB available, {reserve / GIB:.1f} of them reserved for the host"
    if available - reserve < need:
        most = max(0.0, (available - reserve - PINNED_CHUNK) / GIB)
        fix = f"--gib {most:.1f} or less, or free host memory" if most >= 0.1 else "free host memory"
        findings.add("FAIL", "host memory", f"{text}; the test needs {need / GIB:.2f}", fix)
    else:
        findings.add("OK", "host memory", text)


def _choose_checkpointers(
    findings: HostFindings, plan: SelftestPlan, survey: GpuSurvey, capabilities: Capabilities
) -> None:
    """Choose the agent's own checkpointer, and `against` if the agent could use it."""
    own = capabilities.checkpointer
    findings.checkpointers = {own: (capabilities, plan.settings)} if own else {}
    if not plan.against or not own:
        return
    if plan.against == own:
        fix = "leave --against out"
        findings.add("FAIL", "against", f"the agent would use the {own} here anyway: nothing to compare with", fix)
        return
    path = plan.settings.utility_path
    if not os.path.exists(path):  # the agent does not need it here; it may be installed elsewhere
        path = shutil.which("cuda-checkpoint") or path
    settings = msgspec.structs.replace(plan.settings, checkpointer="utility", utility_path=path)
    other = find_capabilities(host_facts(survey, settings))
    more = [line for line in other.lines if line.level == "FAIL" and line not in capabilities.lines]
    for line in more:
        findings.add("FAIL", f"utility: {line.name}", line.reason, f"leave --against out, or {line.fix}")
    if not more:
        findings.add("OK", "utility", path)
        findings.checkpointers = {**findings.checkpointers, plan.against: (other, settings)}

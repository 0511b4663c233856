"""What must be there before a selftest touches a GPU, one line each; and the GPU and checkpointers it will use."""

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
"""The pinned copy's buffer: large enough for full speed, and no second image."""

CONTEXT_BYTES = GIB // 2
"""What a CUDA context takes besides."""


@dataclass(frozen=True, slots=True)
class SelftestPlan:
    """What the user wants: `size_bytes` of memory frozen `runs` times on `gpu` (uuid or index, "" = any), by the
    checkpointer that an agent with `settings` would use, and `against` another one ("" = none)."""

    settings: GpuSettings
    size_bytes: int
    runs: int
    gpu: str = ""
    against: str = ""


@dataclass(slots=True)
class HostFindings:
    """What was found. `gpu` is None and the rest unusable where a line says FAIL. `ways`: by its name, what the agent
    makes a checkpointer of; its own choice first."""

    lines: list[CapabilityLine] = field(default_factory=list)
    driver: DriverInfo | None = None
    gpu: Gpu | None = None
    ways: Mapping[str, tuple[Capabilities, GpuSettings]] = field(default_factory=dict)

    @property
    def failures(self) -> list[CapabilityLine]:
        return [line for line in self.lines if line.level == "FAIL"]

    def say(self, level: str, name: str, reason: str, fix: str = "") -> None:
        self.lines.append(CapabilityLine(name, level, reason, fix))


async def survey(asked: SelftestPlan, gpus: Gpus, locks: GpuLocks) -> HostFindings:
    """Look at everything, so that all that is missing is said at once. Takes the GPU's lock."""
    sight = await survey_gpus(gpus)
    capabilities = find_capabilities(host_facts(sight, asked.settings))
    ground = HostFindings([line for line in capabilities.lines if line.name != "migration"], sight.driver)
    _choose_ways(ground, asked, sight, capabilities)
    _check_host_memory(ground, asked)
    gpu = await _choose_gpu(ground, asked, sight.gpus, gpus)
    if gpu is not None:
        _lock(ground, locks, gpu)
    ground.gpu = gpu
    return ground


async def _choose_gpu(ground: HostFindings, asked: SelftestPlan, inventory: Sequence[Gpu], gpus: Gpus) -> Gpu | None:
    """The GPU asked for, or the one with the most free memory."""
    named = [gpu for gpu in inventory if not asked.gpu or asked.gpu in (str(gpu.index), gpu.uuid)]
    if not named:
        if inventory:
            there = ", ".join(f"{gpu.index} ({gpu.uuid})" for gpu in inventory)
            ground.say("FAIL", "gpu", f"there is no GPU {asked.gpu!r}", f"name one of {there}")
        return None
    try:
        free = await gpus.memory_free()
        processes = await gpus.processes()
    except HibernodeError as error:
        ground.say("FAIL", "gpu", error.message, "make `nvidia-smi` work first")
        return None
    gpu = max(named, key=lambda one: (not one.mig, free.get(one.uuid, 0), -one.index))
    room = free.get(gpu.uuid, 0)
    ground.say("OK", "gpu", f"GPU {gpu.index}, {gpu.model}, {gpu.uuid}")
    others = [process for process in processes if process.gpu_uuid == gpu.uuid]
    beside = f", beside {len(others)} other processes" if others else ""
    text = f"{room / GIB:.2f} of {gpu.memory_bytes / GIB:.2f} GiB free{beside}"
    if room < asked.size_bytes:
        pids = ", ".join(str(process.pid) for process in others[:8])
        most = (room - CONTEXT_BYTES) / GIB
        less = [f"--gib {most:.1f} or less"] if most >= 0.1 else []
        end = f"end what uses it (process {pids})" if others else "another --gpu"
        need = f"{asked.size_bytes / GIB:.2f}"
        ground.say("FAIL", "gpu memory", f"{text}; the test needs {need}", ", or ".join([*less, end]))
    else:
        ground.say("OK", "gpu memory", text)
    return gpu


def _lock(ground: HostFindings, locks: GpuLocks, gpu: Gpu) -> None:
    """An agent must not lend the GPU meanwhile, nor start."""
    try:
        locks.acquire([gpu.uuid])
    except HibernodeError as error:
        busy = error.reason == "GPU_IN_USE"
        fix = "stop the agent for the test (`systemctl stop hibernode-agent`; its instances stay), then start it again"
        text = f"an agent, or another selftest, drives GPU {gpu.index} ({gpu.uuid})" if busy else error.message
        ground.say("FAIL", "gpu lock", text, fix if busy else "run it with sudo, or as the user that runs the agent")


def _check_host_memory(ground: HostFindings, asked: SelftestPlan) -> None:
    """The image lies in host memory while the program is frozen."""
    reserve = asked.settings.host_memory_reserve_bytes
    need = asked.size_bytes + min(PINNED_CHUNK, asked.size_bytes)
    try:
        available = ProcHostMemory().available_bytes()
    except HibernodeError as error:
        ground.say("FAIL", "host memory", error.message, "mount /proc")
        return
    text = f"{available / GIB:.1f} GiB available, {reserve / GIB:.1f} of it kept for the host"
    if available - reserve < need:
        most = max(0.0, (available - reserve - PINNED_CHUNK) / GIB)
        fix = f"--gib {most:.1f} or less, or free host memory" if most >= 0.1 else "free host memory"
        ground.say("FAIL", "host memory", f"{text}; the test needs {need / GIB:.2f}", fix)
    else:
        ground.say("OK", "host memory", text)


def _choose_ways(ground: HostFindings, asked: SelftestPlan, sight: GpuSurvey, capabilities: Capabilities) -> None:
    """The agent's choice first; `against`, judged as the agent would judge it, beside it."""
    own = capabilities.checkpointer
    ground.ways = {own: (capabilities, asked.settings)} if own else {}
    if not asked.against or not own:
        return
    if asked.against == own:
        fix = "leave --against out"
        ground.say("FAIL", "against", f"the agent would use the {own} here anyway: nothing to set beside it", fix)
        return
    path = asked.settings.utility_path
    if not os.path.exists(path):  # the agent does not need it here; an administrator may have it elsewhere
        path = shutil.which("cuda-checkpoint") or path
    settings = msgspec.structs.replace(asked.settings, checkpointer="utility", utility_path=path)
    other = find_capabilities(host_facts(sight, settings))
    more = [line for line in other.lines if line.level == "FAIL" and line not in capabilities.lines]
    for line in more:
        ground.say("FAIL", f"utility: {line.name}", line.reason, f"leave --against out, or {line.fix}")
    if not more:
        ground.say("OK", "utility", path)
        ground.ways = {**ground.ways, asked.against: (other, settings)}

"""Collects facts about the container engine for `core.engine_capabilities`, the same ones for the agent and `hibernode
doctor`. Changes neither host nor engine."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from agent.adapters.engine.api import EngineApi
from agent.adapters.engine.facts import EngineFacts
from agent.adapters.engine.gpus import attach_gpus, read_cdi_devices
from agent.adapters.kernel.cgroup import find_v2_mount
from agent.core.engine_capabilities import EngineSurvey
from agent.core.errors import HibernodeError
from agent.settings import GpuSettings, RuntimeSettings

INITIAL_CGROUP_NAMESPACE = 0xEFFFFFFB
"""Inode of the kernel's initial cgroup namespace (PROC_CGROUP_INIT_INO)."""
NVIDIA_HOOK = "nvidia-container-runtime-hook"


async def survey_engine(
    api: EngineApi | None, runtime: RuntimeSettings, gpu: GpuSettings, gpu_uuids: Sequence[str]
) -> EngineSurvey:
    """Survey the engine; a failure is part of the result. `api` None: the engine is off. `gpu_uuids`: the GPUs that
    instances may get."""
    if api is None or runtime.engine.socket == "off":
        return EngineSurvey()
    try:
        await api.connect()
    except HibernodeError as error:
        return EngineSurvey(problem=error.message)
    method, problem = await _attachment(api.facts, gpu, gpu_uuids)
    return EngineSurvey(
        facts=api.facts,
        gpus=method,
        gpu_problem=problem,
        nvidia_hook=shutil.which(NVIDIA_HOOK) is not None,
        cgroups=sees_all_cgroups(),
        disk_limit=runtime.engine.disk_limit,
    )


async def _attachment(facts: EngineFacts, gpu: GpuSettings, gpu_uuids: Sequence[str]) -> tuple[str, str]:
    """(how GPUs are attached, why they can't be)."""
    if not gpu_uuids:
        return "", ""
    try:
        return attach_gpus(gpu, facts, await read_cdi_devices(), gpu_uuids).method, ""
    except HibernodeError as error:
        return "", error.message.partition(": ")[2] or error.message


def sees_all_cgroups(proc: Path = Path("/proc")) -> bool:
    """Whether the agent sees containers' cgroup paths; in a cgroup namespace of its own it sees only its own
    subtree."""
    try:
        initial = (proc / "self/ns/cgroup").stat().st_ino == INITIAL_CGROUP_NAMESPACE
        mount = find_v2_mount((proc / "self/mountinfo").read_text())
    except OSError:
        return False
    return mount is not None and (initial or mount.root == "/..")

"""Builds the layer between node and driver: GPU locks, checkpointer and freezer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from agent.adapters.cuda.checkpointers import HostCheckpointer, choose_checkpointer
from agent.adapters.cuda.processes import Pids
from agent.adapters.freezer.freezer import CudaFreezer
from agent.adapters.freezer.limits import freezer_limits
from agent.adapters.kernel.cgroup import CgroupSlice
from agent.adapters.kernel.cgroup_freezer import choose_freezer
from agent.adapters.nvml.gpus import NvmlGpus
from agent.adapters.nvml.host_facts import GpuSurvey, host_facts, survey_gpus_with_retry
from agent.adapters.nvml.locks import GpuLocks
from agent.core.errors import HibernodeError
from agent.core.gpus.capabilities import Capabilities, find_capabilities
from agent.log import get_logger
from agent.settings import GpuSettings


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """`capabilities` of the host; `unavailable` says why it has no idle mode, "" if it has."""

    gpus: NvmlGpus
    survey: GpuSurvey
    capabilities: Capabilities
    checkpointer: HostCheckpointer
    freezer: CudaFreezer
    unavailable: str

    @property
    def migrates(self) -> bool:
        """Whether the driver can wake a frozen instance on another GPU."""
        return self.capabilities.migration and not self.unavailable


@dataclass(frozen=True, slots=True)
class HostView:
    """What the freezer knows of the host: the agent's cgroup slice (None = not writable), the state directory's UUID,
    the boot, and how to list an instance's pids."""

    slice_: CgroupSlice | None
    state_uuid: str
    boot_id: str
    pids: Pids


async def open_gpu_layer(
    stack: AsyncExitStack,
    settings: GpuSettings,
    host: HostView,
    gpus: NvmlGpus,
    survey: GpuSurvey,
    on_stuck: Callable[[Sequence[str]], None],
) -> GpuLayer:
    """Lock the GPUs, then choose and start the checkpointer; `stack` closes both. On a host that can't freeze,
    functions stay awake. Raises UnavailableError GPU_LOCKED if another agent holds a GPU."""
    log = get_logger()
    locks = GpuLocks()
    locks.acquire([gpu.uuid for gpu in survey.gpus])
    stack.callback(locks.release)
    capabilities = find_capabilities(host_facts(survey, settings))
    checkpointer = choose_checkpointer(capabilities, settings, on_stuck)
    stack.push_async_callback(checkpointer.close)
    freezer = CudaFreezer(
        checkpointer,
        choose_freezer(host.slice_, host.state_uuid, host.boot_id),
        gpus,
        host.pids,
        host.boot_id,
        freezer_limits(settings, migrates=settings.migrate and capabilities.migration),
    )
    unavailable = capabilities.refusal
    if unavailable:
        log.warning("idle_mode.unavailable", reason="IDLE_MODE_UNSUPPORTED", message=unavailable)
    else:
        try:
            await checkpointer.start()
        except HibernodeError as error:
            log.warning("idle_mode.unavailable", reason=error.reason, message=error.message)
            unavailable = error.message
    return GpuLayer(gpus, survey, capabilities, checkpointer, freezer, unavailable)


async def survey_node_gpus(gpus: NvmlGpus) -> GpuSurvey:
    """Survey the GPUs. Without a driver the node has none, logs a warning, and runs functions that need none."""
    survey = await survey_gpus_with_retry(gpus)
    if survey.error is not None:
        get_logger().warning("gpu.unavailable", reason=survey.error.reason, message=survey.error.message)
    return survey

"""Builds what stands between the node and the driver: NVML, the locks on the GPUs, the checkpointer and the freezer."""

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
    """`capabilities` is the verdict on the host; `unavailable` says why idle mode can't be had here, "" if it can."""

    gpus: NvmlGpus
    sight: GpuSurvey
    capabilities: Capabilities
    checkpointer: HostCheckpointer
    freezer: CudaFreezer
    unavailable: str

    @property
    def migrates(self) -> bool:
        """Can the driver wake a frozen instance on another GPU?"""
        return self.capabilities.migration and not self.unavailable


@dataclass(frozen=True, slots=True)
class HostView:
    """What the freezer has to know of the host: the agent's slice of cgroups (None = none can be written), the state
    directory's UUID, the boot, and how to list an instance's pids."""

    slice_: CgroupSlice | None
    state_uuid: str
    boot_id: str
    pids: Pids


async def open_gpu_layer(
    stack: AsyncExitStack,
    settings: GpuSettings,
    host: HostView,
    gpus: NvmlGpus,
    sight: GpuSurvey,
    on_stuck: Callable[[Sequence[str]], None],
) -> GpuLayer:
    """Lock the GPUs, choose and start the checkpointer; `stack` takes it all down. A host that can't freeze is no
    error: its functions run always awake. Raises UnavailableError GPU_LOCKED if another agent has a GPU."""
    log = get_logger()
    locks = GpuLocks()
    locks.acquire([gpu.uuid for gpu in sight.gpus])
    stack.callback(locks.release)
    capabilities = find_capabilities(host_facts(sight, settings))
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
    return GpuLayer(gpus, sight, capabilities, checkpointer, freezer, unavailable)


async def see_gpus(gpus: NvmlGpus) -> GpuSurvey:
    """Without a driver the node has no GPUs, and says so; it still runs functions that need none."""
    sight = await survey_gpus_with_retry(gpus)
    if sight.error is not None:
        get_logger().warning("gpu.unavailable", reason=sight.error.reason, message=sight.error.message)
    return sight

"""A GPU host with real CUDA programs, workers, cgroups and NVML, all on the emulated driver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from agent.adapters.cuda.driver_checkpointer import DriverCheckpointer, PoolLimits
from agent.adapters.cuda.driver_worker_process import WorkerOptions
from agent.adapters.freezer.freezer import CudaFreezer
from agent.adapters.freezer.limits import FreezerLimits
from agent.adapters.kernel.cgroup_freezer import CgroupFreezer, SignalFreezer
from agent.adapters.nvml.gpus import NvmlGpus
from agent.core.types import MIB, Handle
from agent.ports import Outcome, ProcessFreezer
from tests.fakes.emulated_driver import CudaInstances, EmulatedNvidia

SIZE = 4 * MIB


@dataclass
class Host:
    """Everything of a GPU host that a freeze needs."""

    instances: CudaInstances
    checkpointer: DriverCheckpointer
    gpus: NvmlGpus
    cgroups: ProcessFreezer
    nvidia: EmulatedNvidia

    def freezer(self, limits: FreezerLimits | None = None) -> CudaFreezer:
        return CudaFreezer(
            self.checkpointer, self.cgroups, self.gpus, self.instances.pids, self.instances.boot_id, limits
        )


async def freeze(freezer: CudaFreezer, handle: Handle) -> int:
    locked = await freezer.lock(handle)
    assert locked.outcome is Outcome.OK, locked
    done = await freezer.checkpoint(handle)
    assert done.outcome is Outcome.OK, done
    return done.image_bytes


@pytest.fixture
async def host(nvidia: EmulatedNvidia) -> AsyncIterator[Host]:
    nvidia.see_nvml_here()
    instances = CudaInstances(nvidia.environment)
    options = WorkerOptions(environment=nvidia.environment)
    checkpointer = DriverCheckpointer(options, PoolLimits(workers=2, first_backoff_s=0.001))
    await checkpointer.start()
    gpus = NvmlGpus()
    cgroups: ProcessFreezer = (
        CgroupFreezer() if instances.slice_ else SignalFreezer(instances.state_uuid, instances.boot_id)
    )
    before = nvidia.control.frozen_calls()
    yield Host(instances, checkpointer, gpus, cgroups, nvidia)
    await instances.close()
    await checkpointer.close()
    await gpus.close()
    assert nvidia.control.frozen_calls() == before  # no call about a frozen target

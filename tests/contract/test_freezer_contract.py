"""The contract of every Freezer: the fake, and `CudaFreezer` on the emulated driver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from agent.adapters.cuda.driver_checkpointer import DriverCheckpointer, PoolLimits
from agent.adapters.cuda.driver_worker_process import WorkerOptions
from agent.adapters.freezer.freezer import CudaFreezer
from agent.adapters.kernel import process_table
from agent.adapters.kernel.cgroup_freezer import CgroupFreezer, SignalFreezer
from agent.adapters.nvml.gpus import NvmlGpus
from agent.core.errors import PreconditionError
from agent.core.types import MIB, Handle, ProcessId
from agent.ports import Condition, Freezer, Outcome, ProcessFreezer
from tests.fakes.emulated_driver import CudaInstances, EmulatedNvidia
from tests.fakes.freezer import FakeFreezer

SIZE = 2 * MIB


@dataclass
class World:
    """One running instance with SIZE bytes of VRAM (or more: a context costs some)."""

    freezer: Freezer
    handle: Handle


@asynccontextmanager
async def fake() -> AsyncIterator[World]:
    handle = Handle("bert-1", ProcessId("boot", 4711, 12), "127.0.0.1", 9000)
    yield World(FakeFreezer(image_bytes=SIZE), handle)


@asynccontextmanager
async def real(nvidia: EmulatedNvidia, *, signals: bool) -> AsyncIterator[World]:
    nvidia.see_nvml_here()
    instances = CudaInstances(nvidia.environment)
    if instances.slice_ is None and not signals:
        pytest.skip("needs a writable cgroup v2")
    options = WorkerOptions(environment=nvidia.environment)
    checkpointer = DriverCheckpointer(options, PoolLimits(workers=1, first_backoff_s=0.001))
    await checkpointer.start()
    gpus = NvmlGpus()
    by_signal = SignalFreezer(instances.state_uuid, instances.boot_id)
    cgroups: ProcessFreezer = by_signal if signals else CgroupFreezer()
    freezer = CudaFreezer(checkpointer, cgroups, gpus, instances.pids, process_table.boot_id())
    _, handle = instances.start("bert-1", SIZE)
    yield World(freezer, handle)
    freezer.forget(handle)
    await instances.close()
    await checkpointer.close()
    await gpus.close()


@pytest.fixture(params=["fake", "cgroup", "signals"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    kind: str = request.param
    made = fake() if kind == "fake" else real(request.getfixturevalue("nvidia"), signals=kind == "signals")
    async with made as it:
        yield it


async def test_a_freeze_and_a_wake(world: World) -> None:
    freezer, handle = world.freezer, world.handle
    for _ in range(2):
        assert await freezer.condition(handle) is Condition.AWAKE
        assert await freezer.vram_bytes(handle) >= SIZE
        assert (await freezer.lock(handle)).outcome is Outcome.OK
        frozen = await freezer.checkpoint(handle)
        assert (frozen.outcome, frozen.reason) == (Outcome.OK, "")
        assert frozen.driver_ns > 0
        assert frozen.image_bytes >= SIZE
        assert await freezer.condition(handle) is Condition.FROZEN
        assert await freezer.vram_bytes(handle) == 0
        woken = await freezer.wake(handle, {})
        assert (woken.outcome, woken.image_bytes) == (Outcome.OK, 0)
        assert woken.driver_ns > 0


async def test_a_lock_can_be_taken_back(world: World) -> None:
    assert (await world.freezer.lock(world.handle)).outcome is Outcome.OK
    assert await world.freezer.condition(world.handle) is Condition.LOCKED
    assert (await world.freezer.unlock(world.handle)).outcome is Outcome.OK
    assert await world.freezer.condition(world.handle) is Condition.AWAKE


async def test_unlock_of_a_running_instance_is_ok(world: World) -> None:
    assert (await world.freezer.unlock(world.handle)).outcome is Outcome.OK
    assert await world.freezer.condition(world.handle) is Condition.AWAKE


async def test_no_checkpoint_without_a_lock(world: World) -> None:
    with pytest.raises(PreconditionError) as failure:
        await world.freezer.checkpoint(world.handle)
    assert failure.value.reason == "NOT_LOCKED"


async def test_a_freeze_that_lost_its_cgroup_half_is_finished(world: World) -> None:
    freezer, handle = world.freezer, world.handle
    await freezer.lock(handle)
    await freezer.checkpoint(handle)
    await freezer.thaw(handle)
    assert await freezer.condition(handle) is Condition.CHECKPOINTED
    assert (await freezer.finish_freeze(handle)).outcome is Outcome.OK
    assert await freezer.condition(handle) is Condition.FROZEN
    assert (await freezer.wake(handle, {})).outcome is Outcome.OK
    assert await freezer.condition(handle) is Condition.AWAKE


async def test_to_forget_twice_is_harmless(world: World) -> None:
    world.freezer.forget(world.handle)
    world.freezer.forget(world.handle)


async def test_own_freeze_is_not_reported_as_a_pause(world: World) -> None:
    freezer, handle = world.freezer, world.handle
    assert not freezer.paused(handle)
    await freezer.lock(handle)
    await freezer.checkpoint(handle)
    assert not freezer.paused(handle)
    await freezer.wake(handle, {})
    assert not freezer.paused(handle)


async def test_a_kill_can_be_prepared_at_any_time(world: World) -> None:
    freezer, handle = world.freezer, world.handle
    await freezer.prepare_kill(handle)  # never frozen
    assert await freezer.condition(handle) is Condition.AWAKE
    await freezer.lock(handle)
    await freezer.checkpoint(handle)
    await freezer.prepare_kill(handle)  # frozen: nothing to do, and no call is made
    assert await freezer.condition(handle) is Condition.FROZEN
    assert (await freezer.wake(handle, {})).outcome is Outcome.OK
    await freezer.prepare_kill(handle)
    freezer.forget(handle)

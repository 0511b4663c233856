"""Tests the preparation of a kill, external pauses, and the limits that follow from the configuration."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from agent.adapters.freezer.limits import FreezerLimits, freezer_limits
from agent.config import Duration
from agent.core.errors import DeadlineError
from agent.core.types import SECOND_NS
from agent.ports import Condition, CudaOp, CudaState, Outcome
from agent.settings import GpuSettings
from tests.adapters.freezer.world import LIMITS, FreezerRig
from tests.fakes.checkpointer import Fault

LOCK, CHECKPOINT = CudaOp.LOCK, CudaOp.CHECKPOINT


async def woken(world: FreezerRig) -> None:
    await world.freeze()
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK
    world.driver.batches.clear()


async def test_restored_instance_is_checkpointed_before_its_kill(world: FreezerRig) -> None:
    second = world.add_process()
    await woken(world)
    await world.freezer.prepare_kill(world.handle)
    assert world.states() == {CudaState.CHECKPOINTED}
    pids = sorted([world.main, second])
    assert world.driver.operations == [(op, pid) for op in (LOCK, CHECKPOINT) for pid in pids]
    assert "freeze" not in world.cgroups.calls[2:]


async def test_never_frozen_instance_is_not_checkpointed_before_its_kill(world: FreezerRig) -> None:
    await world.freezer.prepare_kill(world.handle)
    assert world.driver.batches == []


async def test_instance_of_an_earlier_agent_is_checkpointed_before_its_kill(world: FreezerRig) -> None:
    again = world.restarted()
    assert await again.condition(world.handle) is Condition.AWAKE
    await again.prepare_kill(world.handle)
    assert world.states() == {CudaState.CHECKPOINTED}


@pytest.mark.parametrize("state", [CudaState.LOCKED, CudaState.CHECKPOINTED, CudaState.FAILED])
async def test_prepare_kill_continues_from_the_current_state(world: FreezerRig, state: CudaState) -> None:
    await woken(world)
    world.driver.processes[world.main].state = state
    await world.freezer.prepare_kill(world.handle)
    assert LOCK not in {op for op, _ in world.driver.operations}
    assert world.state() is (CudaState.CHECKPOINTED if state is CudaState.LOCKED else state)


async def test_prepare_kill_skips_a_stopped_instance(world: FreezerRig) -> None:
    await woken(world)
    world.cgroups.pause()
    await world.freezer.prepare_kill(world.handle)
    assert world.driver.batches == []


@pytest.mark.parametrize(
    "fault",
    [Fault(LOCK, 600), Fault(LOCK, 304), Fault(LOCK, stuck=True), Fault(CHECKPOINT, hang=True), Fault(LOCK, dies=True)],
)
async def test_prepare_kill_never_raises(world: FreezerRig, fault: Fault) -> None:
    await woken(world)
    world.driver.faults.append(fault)
    await world.freezer.prepare_kill(world.handle)


async def test_silent_driver_delays_a_kill_only_by_its_limit(world: FreezerRig) -> None:
    freezer = world.restarted(replace(LIMITS, prepare_kill_s=0.05, state_query_s=30.0))
    await freezer.condition(world.handle)

    async def never(calls, deadline_s, gpu_uuids=()):  # type: ignore[no-untyped-def]
        await asyncio.Event().wait()

    world.driver.run = never  # type: ignore[method-assign]
    async with asyncio.timeout(2):
        await freezer.prepare_kill(world.handle)


async def test_a_kill_that_does_not_wait_for_the_watch_loses_no_watch(world: FreezerRig) -> None:
    freezer = world.restarted(replace(LIMITS, prepare_kill_s=0.05, state_query_s=30.0))
    await freezer.condition(world.handle)
    reading = asyncio.Event()

    async def never(calls, deadline_s, gpu_uuids=()):  # type: ignore[no-untyped-def]
        reading.set()
        await asyncio.Event().wait()

    world.driver.run = never  # type: ignore[method-assign]
    await asyncio.wait_for(reading.wait(), 5)  # the watch of a restarted agent is in the driver
    await freezer.prepare_kill(world.handle)
    freezer.forget(world.handle)
    async with asyncio.timeout(5):
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


async def test_prepare_kill_works_without_nvml(world: FreezerRig) -> None:
    await woken(world)
    world.gpus.unavailable = True
    await world.freezer.prepare_kill(world.handle)
    assert world.states() == {CudaState.CHECKPOINTED}


async def test_forgotten_instance_is_not_checkpointed(world: FreezerRig) -> None:
    await woken(world)
    world.freezer.forget(world.handle)
    await world.freezer.prepare_kill(world.handle)
    assert world.driver.batches == []


async def test_own_freeze_is_no_pause(world: FreezerRig) -> None:
    assert not world.freezer.paused(world.handle)
    await world.freeze()
    assert not world.freezer.paused(world.handle)
    await world.freezer.wake(world.handle, {})
    world.cgroups.pause()
    assert world.freezer.paused(world.handle)
    await world.freezer.thaw(world.handle)
    assert not world.freezer.paused(world.handle)


async def test_freeze_by_an_earlier_agent_is_ours_after_recovery(world: FreezerRig) -> None:
    await world.freeze()
    again = world.restarted()
    assert await again.condition(world.handle) is Condition.FROZEN
    assert not again.paused(world.handle)


async def test_failed_freeze_does_not_count_as_ours(world: FreezerRig) -> None:
    await world.freezer.lock(world.handle)
    world.cgroups.fail_freeze = DeadlineError("FREEZE_TIMEOUT", "a thread did not stop")
    await world.freezer.checkpoint(world.handle)
    world.cgroups.pause()
    assert world.freezer.paused(world.handle)


def test_default_configuration_gives_default_limits() -> None:
    assert freezer_limits(GpuSettings()) == FreezerLimits(lock_timeout_s=10.0, copy_base_s=120.0)


def test_short_operation_timeout_shortens_all_limits() -> None:
    settings = GpuSettings(
        lock_timeout_ns=Duration(SECOND_NS // 5), operation_timeout_ns=Duration(SECOND_NS), multi_process_multi_gpu=True
    )
    limits = freezer_limits(settings, migrates=True)
    waits = [
        limits.state_query_s,
        limits.driver_call_s,
        limits.rollback_s,
        limits.vram_gone_s,
        limits.cgroup_s,
        limits.prepare_kill_s,
    ]
    assert max(waits) <= 1.0
    assert limits.memory_query_s <= 0.1
    assert limits.copy_base_s + limits.unknown_image_bytes / limits.copy_bytes_per_s < 5
    assert (limits.migrates, limits.several_processes_on_several_gpus) == (True, True)

"""Tests failing wakes, and what a restarted agent finds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.errors import DeadlineError, UnavailableError
from agent.ports import Condition, CudaOp, CudaState, FreezerState, Outcome
from tests.adapters.freezer.world import LIMITS, FreezerRig
from tests.fakes.checkpointer import Fault
from tests.fakes.gpus import gpu

LOCK, CHECKPOINT, RESTORE, UNLOCK = CudaOp.LOCK, CudaOp.CHECKPOINT, CudaOp.RESTORE, CudaOp.UNLOCK


async def test_restore_without_memory_leaves_it_frozen(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(RESTORE, 2))
    result = await world.freezer.wake(world.handle, {})
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "CUDA_OUT_OF_MEMORY")
    assert (world.state(), world.cgroups.now) == (CudaState.CHECKPOINTED, FreezerState.FROZEN)
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_partial_restore_is_frozen_again(world: FreezerRig) -> None:
    second = world.add_process()
    await world.freeze()
    world.driver.faults.append(Fault(RESTORE, 2, pid=max(world.main, second)))
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.REFUSED
    assert world.state() is world.state(second) is CudaState.CHECKPOINTED
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_restore_that_leaves_a_failed_process_is_broken(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(RESTORE, 304, leaves=CudaState.FAILED))
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.BROKEN


@pytest.mark.parametrize(
    "fault", [Fault(UNLOCK, 401), Fault(UNLOCK, stale=True), Fault(RESTORE, hang=True, executes=True)]
)
async def test_restored_process_is_unlocked_despite_an_error(world: FreezerRig, fault: Fault) -> None:
    await world.freeze()
    world.driver.faults.append(fault)
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK
    assert world.state() is CudaState.RUNNING


async def test_worker_stuck_in_a_restore_is_broken(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(RESTORE, stuck=True))
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.BROKEN
    assert world.driver.stuck_gpus == [(gpu(0).uuid,)]


async def test_process_that_died_while_frozen_is_not_restored(world: FreezerRig) -> None:
    await world.freeze()
    world.instance.end(world.main)
    world.driver.batches.clear()
    result = await world.freezer.wake(world.handle, {})
    assert (result.outcome, result.reason) == (Outcome.BROKEN, "CUDA_PROCESS_DIED")
    assert world.driver.operations == []  # the pid may have been reused


async def test_instance_that_does_not_thaw_stays_frozen(world: FreezerRig) -> None:
    await world.freeze()
    world.cgroups.fail_thaw = DeadlineError("THAW_TIMEOUT", "a parent is frozen")
    result = await world.freezer.wake(world.handle, {})
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "THAW_TIMEOUT")
    assert world.driver.operations[-1] == (CHECKPOINT, world.main)


async def test_wake_without_a_free_worker_changes_nothing(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.not_begun = "DRIVER_BUSY"
    for freezer in (world.freezer, world.restarted()):
        result = await freezer.wake(world.handle, {})
        assert (result.outcome, result.reason) == (Outcome.REFUSED, "DRIVER_BUSY")
        assert world.cgroups.now is FreezerState.FROZEN
    world.driver.not_begun = ""
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_restarted_agent_finds_and_wakes_frozen_instances(world: FreezerRig) -> None:
    await world.freeze()
    again = world.restarted()
    world.driver.batches.clear()
    assert await again.condition(world.handle) is Condition.FROZEN
    assert world.driver.batches == []  # a frozen target can't answer
    assert (await again.wake(world.handle, {})).outcome is Outcome.OK
    assert await again.condition(world.handle) is Condition.AWAKE
    again.forget(world.handle)


@pytest.mark.parametrize(
    ("state", "condition"),
    [
        (CudaState.RUNNING, Condition.AWAKE),
        (CudaState.LOCKED, Condition.LOCKED),
        (CudaState.CHECKPOINTED, Condition.CHECKPOINTED),
        (CudaState.FAILED, Condition.BROKEN),
    ],
)
async def test_condition_of_a_thawed_instance_is_the_drivers_state(
    world: FreezerRig, state: CudaState, condition: Condition
) -> None:
    world.driver.processes[world.main].state = state
    assert await world.freezer.condition(world.handle) is condition


async def test_frozen_cgroup_with_gpu_memory_is_an_external_pause(world: FreezerRig) -> None:
    world.cgroups.pause()
    assert await world.freezer.condition(world.handle) is Condition.PAUSED_BY_OTHERS
    await world.freezer.thaw(world.handle)
    assert await world.freezer.condition(world.handle) is Condition.AWAKE


async def test_condition_of_a_frozen_instance_needs_nvml(world: FreezerRig) -> None:
    await world.freeze()
    world.gpus.unavailable = True
    with pytest.raises(UnavailableError, match="NVML_UNAVAILABLE"):
        await world.freezer.condition(world.handle)


async def test_condition_of_a_thawed_instance_needs_a_worker(world: FreezerRig) -> None:
    world.driver.not_begun = "DRIVER_BUSY"
    with pytest.raises(UnavailableError, match="DRIVER_BUSY"):
        await world.freezer.condition(world.handle)


async def test_thawed_instance_is_awake_on_a_host_that_cannot_freeze(world: FreezerRig) -> None:
    world.driver.not_begun = "DRIVER_WORKERS_DOWN"
    assert await world.freezer.condition(world.handle) is Condition.AWAKE


async def test_ended_instance_is_gone(world: FreezerRig) -> None:
    world.instance.end(world.main)
    assert await world.freezer.condition(world.handle) is Condition.GONE


async def test_interrupted_checkpoint_is_finished(world: FreezerRig) -> None:
    second = world.add_process()
    world.driver.processes[world.main].state = CudaState.CHECKPOINTED
    world.driver.processes[second].state = CudaState.LOCKED
    assert await world.freezer.condition(world.handle) is Condition.CHECKPOINTED
    assert (await world.freezer.finish_freeze(world.handle)).outcome is Outcome.OK
    assert world.cgroups.is_frozen(world.handle)
    assert world.state() is world.state(second) is CudaState.CHECKPOINTED


async def test_remaining_lock_is_unlocked(world: FreezerRig) -> None:
    world.driver.processes[world.main].state = CudaState.LOCKED
    assert (await world.restarted().unlock(world.handle)).outcome is Outcome.OK
    assert world.state() is CudaState.RUNNING


async def test_condition_waits_for_a_checkpoint_in_progress(world: FreezerRig) -> None:
    process = world.driver.processes[world.main]
    process.state = CudaState.CHECKPOINTING
    original = world.driver.run

    async def finish_after_the_second_reading(calls, deadline_s, gpu_uuids=()):  # type: ignore[no-untyped-def]
        reply = await original(calls, deadline_s, gpu_uuids)
        if len(world.driver.batches) == 2:
            process.state = CudaState.CHECKPOINTED
        return reply

    world.driver.run = finish_after_the_second_reading  # type: ignore[method-assign]
    assert await world.freezer.condition(world.handle) is Condition.CHECKPOINTED


async def test_endless_checkpoint_is_broken(world: FreezerRig) -> None:
    world.driver.processes[world.main].state = CudaState.CHECKPOINTING
    hasty = world.restarted(replace(LIMITS, rollback_s=0.1))
    assert await hasty.condition(world.handle) is Condition.BROKEN

"""A wake that goes wrong, and what a restarted agent finds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.errors import DeadlineError, UnavailableError
from agent.ports import Condition, CudaOp, CudaState, FreezerState, Outcome
from tests.adapters.freezer.world import LIMITS, World
from tests.fakes.checkpointer import Fault
from tests.fakes.gpus import gpu

LOCK, CHECKPOINT, RESTORE, UNLOCK = CudaOp.LOCK, CudaOp.CHECKPOINT, CudaOp.RESTORE, CudaOp.UNLOCK


# ---- a wake that goes wrong -----------------------------------------------------------------------------------


async def test_a_restore_without_memory_leaves_it_frozen_for_another_try(world: World) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(RESTORE, 2))
    result = await world.freezer.wake(world.handle, {})
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "CUDA_OUT_OF_MEMORY")
    assert (world.state(), world.cgroups.now) == (CudaState.CHECKPOINTED, FreezerState.FROZEN)
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_one_restored_and_one_not_are_both_frozen_again(world: World) -> None:
    second = world.add_process()
    await world.freeze()
    world.driver.faults.append(Fault(RESTORE, 2, pid=max(world.main, second)))
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.REFUSED
    assert world.state() is world.state(second) is CudaState.CHECKPOINTED
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_a_restore_that_leaves_the_process_failed_is_broken(world: World) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(RESTORE, 304, leaves=CudaState.FAILED))
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.BROKEN


@pytest.mark.parametrize(
    "fault", [Fault(UNLOCK, 401), Fault(UNLOCK, stale=True), Fault(RESTORE, hang=True, executes=True)]
)
async def test_a_restored_process_is_unlocked_whatever_was_said(world: World, fault: Fault) -> None:
    await world.freeze()
    world.driver.faults.append(fault)
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK
    assert world.state() is CudaState.RUNNING


async def test_a_worker_stuck_in_a_restore_is_broken(world: World) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(RESTORE, stuck=True))
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.BROKEN
    assert world.driver.stuck_gpus == [(gpu(0).uuid,)]


async def test_a_process_that_died_while_frozen_is_never_restored(world: World) -> None:
    await world.freeze()
    world.instance.end(world.main)
    world.driver.batches.clear()
    result = await world.freezer.wake(world.handle, {})
    assert (result.outcome, result.reason) == (Outcome.BROKEN, "CUDA_PROCESS_DIED")
    assert world.driver.operations == []  # the pid may be another process's by now


async def test_an_instance_that_does_not_thaw_stays_frozen(world: World) -> None:
    await world.freeze()
    world.cgroups.fail_thaw = DeadlineError("THAW_TIMEOUT", "a parent is frozen")
    result = await world.freezer.wake(world.handle, {})
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "THAW_TIMEOUT")
    assert world.driver.operations[-1] == (CHECKPOINT, world.main)


async def test_a_wake_without_a_free_worker_changes_nothing(world: World) -> None:
    await world.freeze()
    world.driver.not_begun = "DRIVER_BUSY"
    for freezer in (world.freezer, world.restarted()):
        result = await freezer.wake(world.handle, {})
        assert (result.outcome, result.reason) == (Outcome.REFUSED, "DRIVER_BUSY")
        assert world.cgroups.now is FreezerState.FROZEN
    world.driver.not_begun = ""
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


# ---- recovery -------------------------------------------------------------------------------------------------


async def test_a_restarted_agent_finds_and_wakes_what_is_frozen(world: World) -> None:
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
async def test_a_thawed_instance_is_what_the_driver_says(world: World, state: CudaState, condition: Condition) -> None:
    world.driver.processes[world.main].state = state
    assert await world.freezer.condition(world.handle) is condition


async def test_a_pause_with_memory_on_the_gpu_is_not_ours(world: World) -> None:
    world.cgroups.pause()
    assert await world.freezer.condition(world.handle) is Condition.PAUSED_BY_OTHERS
    await world.freezer.thaw(world.handle)
    assert await world.freezer.condition(world.handle) is Condition.AWAKE


async def test_without_nvml_a_frozen_instance_is_not_judged(world: World) -> None:
    await world.freeze()
    world.gpus.unavailable = True
    with pytest.raises(UnavailableError, match="NVML_UNAVAILABLE"):
        await world.freezer.condition(world.handle)


async def test_without_a_free_worker_a_thawed_instance_is_not_judged(world: World) -> None:
    world.driver.not_begun = "DRIVER_BUSY"
    with pytest.raises(UnavailableError, match="DRIVER_BUSY"):
        await world.freezer.condition(world.handle)


async def test_on_a_host_that_cannot_freeze_what_runs_is_awake(world: World) -> None:
    world.driver.not_begun = "DRIVER_WORKERS_DOWN"
    assert await world.freezer.condition(world.handle) is Condition.AWAKE


async def test_an_ended_instance_is_gone(world: World) -> None:
    world.instance.end(world.main)
    assert await world.freezer.condition(world.handle) is Condition.GONE


async def test_a_checkpoint_cut_in_the_middle_is_finished(world: World) -> None:
    second = world.add_process()
    world.driver.processes[world.main].state = CudaState.CHECKPOINTED
    world.driver.processes[second].state = CudaState.LOCKED
    assert await world.freezer.condition(world.handle) is Condition.CHECKPOINTED
    assert (await world.freezer.finish_freeze(world.handle)).outcome is Outcome.OK
    assert world.cgroups.is_frozen(world.handle)
    assert world.state() is world.state(second) is CudaState.CHECKPOINTED


async def test_a_lock_left_behind_is_unlocked(world: World) -> None:
    world.driver.processes[world.main].state = CudaState.LOCKED
    assert (await world.restarted().unlock(world.handle)).outcome is Outcome.OK
    assert world.state() is CudaState.RUNNING


async def test_a_checkpoint_still_under_way_is_waited_for(world: World) -> None:
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


async def test_a_checkpoint_that_never_ends_is_broken(world: World) -> None:
    world.driver.processes[world.main].state = CudaState.CHECKPOINTING
    hasty = world.restarted(replace(LIMITS, rollback_s=0.1))
    assert await hasty.condition(world.handle) is Condition.BROKEN

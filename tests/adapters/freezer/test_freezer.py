"""Tests freezing: the order of operations, and every rollback of a lock or a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent.core.errors import DeadlineError, PreconditionError
from agent.core.types import MIB
from agent.ports import CudaOp, CudaState, FreezerState, Outcome
from tests.adapters.freezer.world import LIMITS, FreezerRig
from tests.fakes.checkpointer import Fault
from tests.fakes.gpus import gpu

LOCK, CHECKPOINT, RESTORE, UNLOCK = CudaOp.LOCK, CudaOp.CHECKPOINT, CudaOp.RESTORE, CudaOp.UNLOCK


async def test_freeze_locks_then_checkpoints_then_stops_the_threads(world: FreezerRig) -> None:
    await world.freezer.lock(world.handle)
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.image_bytes) == (Outcome.OK, 16 * MIB)
    assert result.driver_ns == 200_000  # checkpoint and state, 100 us each
    assert world.driver.operations == [(LOCK, world.main), (CHECKPOINT, world.main)]
    assert world.cgroups.calls == ["freeze"]
    assert await world.freezer.vram_bytes(world.handle) == 0


async def test_wake_is_one_nvml_query_and_one_driver_message(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.batches.clear()
    world.gpus.calls.clear()
    listings = world.instance.listings
    result = await world.freezer.wake(world.handle, {})
    assert result.outcome is Outcome.OK
    assert [[call.op for call in batch] for batch in world.driver.batches] == [[RESTORE, UNLOCK, CudaOp.STATE]]
    assert (world.gpus.calls, world.instance.listings) == (["memory_free"], listings)
    assert world.state() is CudaState.RUNNING


async def test_all_processes_are_locked_before_one_is_checkpointed(world: FreezerRig) -> None:
    helper = world.add_process()
    world.add_process(cuda=False)
    await world.freeze()
    await world.freezer.wake(world.handle, {})
    pids = sorted([world.main, helper])
    assert world.driver.operations == [(op, pid) for op in (LOCK, CHECKPOINT, RESTORE, UNLOCK) for pid in pids]


async def test_instance_without_cuda_is_frozen_by_its_cgroup_alone(world: FreezerRig) -> None:
    world.driver.processes.clear()
    await world.freeze()
    assert world.cgroups.is_frozen(world.handle)
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK
    assert world.driver.operations == []


async def test_wake_on_another_gpu_passes_the_map_to_the_restore_only(world: FreezerRig) -> None:
    await world.freeze()
    await world.freezer.wake(world.handle, {gpu(0).uuid: gpu(1).uuid, gpu(1).uuid: gpu(0).uuid})
    maps = {call.op: call.gpu_map for call in world.driver.batches[-1]}
    assert maps[RESTORE] == ((gpu(0).uuid, gpu(1).uuid), (gpu(1).uuid, gpu(0).uuid))
    assert maps[UNLOCK] == maps[CudaOp.STATE] == ()


async def test_cancelled_freeze_is_undone_by_unlock(world: FreezerRig) -> None:
    await world.freezer.lock(world.handle)
    assert (await world.freezer.unlock(world.handle)).outcome is Outcome.OK
    assert world.state() is CudaState.RUNNING
    with pytest.raises(PreconditionError, match="NOT_LOCKED"):
        await world.freezer.checkpoint(world.handle)


@pytest.mark.parametrize(
    ("code", "reason"),
    [(600, "CUDA_LOCK_TIMEOUT"), (801, "CUDA_NOT_SUPPORTED"), (304, "CUDA_OPERATING_SYSTEM")],
)
async def test_failed_lock_of_one_unlocks_the_others(world: FreezerRig, code: int, reason: str) -> None:
    second = world.add_process()
    world.driver.faults.append(Fault(LOCK, code, pid=max(world.main, second)))
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, reason)
    assert world.state() is world.state(second) is CudaState.RUNNING


async def test_process_left_locked_by_an_801_is_unlocked(world: FreezerRig) -> None:
    world.driver.faults.append(Fault(LOCK, 801, leaves=CudaState.LOCKED))
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "CUDA_NOT_SUPPORTED")
    assert world.state() is CudaState.RUNNING


async def test_cuda_process_that_appears_after_the_lock_is_locked_too(world: FreezerRig) -> None:
    late = world.add_process(shown=False)
    world.instance.appear_at[3] = late  # listings 1 and 2 agree, then the lock, then the second discovery
    assert (await world.freezer.lock(world.handle)).outcome is Outcome.OK
    assert world.state() is world.state(late) is CudaState.LOCKED
    assert world.driver.operations[:2] == [(LOCK, world.main), (UNLOCK, world.main)]


async def test_freeze_is_refused_while_processes_keep_appearing(world: FreezerRig) -> None:
    # Four listings an attempt: two that agree before the lock and two after it.
    for listing in (3, 7, 11):
        world.instance.appear_at[listing] = world.add_process(shown=False)
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "PROCESSES_CHANGE")
    assert {process.state for process in world.driver.processes.values()} == {CudaState.RUNNING}


@pytest.mark.parametrize("recovered", [False, True])
async def test_too_many_processes_are_called_by_their_name(world: FreezerRig, recovered: bool) -> None:
    """An agent that has just started expects late locks, but these processes run."""
    world.add_process()
    freezer = world.restarted(replace(LIMITS, max_processes=1))
    if recovered:
        await freezer.condition(world.handle)
    result = await freezer.lock(world.handle)
    freezer.forget(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "TOO_MANY_CUDA_PROCESSES")
    assert world.driver.operations == []


async def test_process_that_dies_before_the_lock_is_skipped(world: FreezerRig) -> None:
    short_lived = world.add_process()
    original = world.driver.run

    async def run_and_end(calls, deadline_s, gpu_uuids=()):  # type: ignore[no-untyped-def]
        reply = await original(calls, deadline_s, gpu_uuids)
        if short_lived in world.instance.shown:
            world.instance.end(short_lived)
            del world.driver.processes[short_lived]
        return reply

    world.driver.run = run_and_end  # type: ignore[method-assign]
    assert (await world.freezer.lock(world.handle)).outcome is Outcome.OK
    assert world.state() is CudaState.LOCKED


async def test_several_processes_on_several_gpus_are_refused_unless_allowed(world: FreezerRig) -> None:
    world.add_process(gpu_index=1)
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "SEVERAL_PROCESSES_ON_SEVERAL_GPUS")
    assert world.state() is CudaState.RUNNING


async def test_gpu_memory_of_an_unknown_process_refuses_the_freeze(world: FreezerRig) -> None:
    stranger = world.add_process()
    shown = world.driver.gpu_processes()
    del world.driver.processes[stranger]
    world.gpus.processes_now = shown
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "CUDA_PROCESS_UNKNOWN")
    assert world.state() is CudaState.RUNNING


async def test_driver_is_not_called_for_a_paused_instance(world: FreezerRig) -> None:
    world.cgroups.pause()
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "EXTERNALLY_FROZEN")
    assert world.driver.batches == []


async def test_freeze_without_a_free_worker_is_refused(world: FreezerRig) -> None:
    world.driver.not_begun = "DRIVER_BUSY"
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "DRIVER_BUSY")


@pytest.mark.parametrize("executes", [True, False])
async def test_hung_lock_ends_unlocked_whether_executed_or_not(world: FreezerRig, executes: bool) -> None:
    world.driver.faults.append(Fault(LOCK, hang=True, executes=executes))
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "DRIVER_OPERATION_LOST")
    assert world.state() is CudaState.RUNNING


async def test_pause_during_the_lock_is_thawed_and_its_late_lock_undone(world: FreezerRig) -> None:
    original = world.driver.run

    async def pause_then_run(calls, deadline_s, gpu_uuids=()):  # type: ignore[no-untyped-def]
        if calls and calls[0].op is LOCK:
            world.cgroups.pause()
        return await original(calls, deadline_s, gpu_uuids)

    world.driver.run = pause_then_run  # type: ignore[method-assign]
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, world.cgroups.now) == (Outcome.REFUSED, FreezerState.THAWED)
    assert world.state() is CudaState.RUNNING  # the lock ran at the thaw, after its worker was killed


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(CHECKPOINT, 2), "CUDA_OUT_OF_MEMORY"),
        (Fault(CHECKPOINT, 801), "CUDA_NOT_SUPPORTED"),
        (Fault(CHECKPOINT, stale=True), "CUDA_STATE_STALE"),
        (Fault(CHECKPOINT, hang=True, executes=True), "DRIVER_OPERATION_LOST"),
        (Fault(CHECKPOINT, hang=True), "DRIVER_OPERATION_LOST"),
    ],
)
async def test_failed_checkpoint_is_rolled_back(world: FreezerRig, fault: Fault, reason: str) -> None:
    second = world.add_process()
    await world.freezer.lock(world.handle)
    world.driver.faults.append(replace(fault, pid=max(world.main, second)))
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, reason)
    assert world.state() is world.state(second) is CudaState.RUNNING
    assert "freeze" not in world.cgroups.calls


@pytest.mark.parametrize("leaves", [CudaState.FAILED, CudaState.UNKNOWN, CudaState.NONE])
async def test_checkpoint_with_unknown_state_is_broken(world: FreezerRig, leaves: CudaState) -> None:
    await world.freezer.lock(world.handle)
    world.driver.faults.append(Fault(CHECKPOINT, 304, leaves=leaves))
    assert (await world.freezer.checkpoint(world.handle)).outcome is Outcome.BROKEN


async def test_checkpoint_is_rolled_back_while_nvml_shows_memory(world: FreezerRig) -> None:
    world.driver.keeps_vram = True
    await world.freezer.lock(world.handle)
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "VRAM_NOT_RELEASED")
    assert world.state() is CudaState.RUNNING


async def test_freeze_without_nvml_is_refused(world: FreezerRig) -> None:
    await world.freezer.lock(world.handle)
    world.gpus.unavailable = True
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "NVML_UNAVAILABLE")
    assert world.state() is CudaState.RUNNING


async def test_checkpoint_is_rolled_back_if_the_cgroup_does_not_freeze(world: FreezerRig) -> None:
    world.cgroups.fail_freeze = DeadlineError("FREEZE_TIMEOUT", "a thread did not stop")
    await world.freezer.lock(world.handle)
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "FREEZE_TIMEOUT")
    assert world.state() is CudaState.RUNNING


async def test_target_death_during_the_checkpoint_is_broken(world: FreezerRig) -> None:
    helper = world.add_process()
    await world.freezer.lock(world.handle)
    world.instance.end(helper)
    del world.driver.processes[helper]
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.BROKEN, "CUDA_PROCESS_DIED")

"""Tests every fault at every call of a freeze and a wake: the outcome, and that nothing is left half done.

OK: done. REFUSED: as before. BROKEN: unknown, only a kill is safe
(agent/docs/facts/gpu-checkpoint.md, sections 4 and 7).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest

from agent.adapters.cuda.result_codes import CudaResult
from agent.ports import CudaOp, CudaState, FreezeResult, FreezerState, Outcome
from tests.adapters.freezer.world import FreezerRig
from tests.fakes.checkpointer import Fault

LOCK, CHECKPOINT, RESTORE, UNLOCK, STATE = (
    CudaOp.LOCK,
    CudaOp.CHECKPOINT,
    CudaOp.RESTORE,
    CudaOp.UNLOCK,
    CudaOp.STATE,
)
OK, REFUSED, BROKEN = Outcome.OK, Outcome.REFUSED, Outcome.BROKEN


@dataclass(frozen=True)
class Row:
    """`fault` strikes the second of two processes in `phase`, which then ends with `outcome` and `reason`."""

    phase: str
    name: str
    fault: Fault
    outcome: Outcome
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.phase}-{self.name}"


def answered(op: CudaOp, result: CudaResult) -> Fault:
    return Fault(op, int(result))


ROWS = [
    # ---- lock: unlock every locked one, the workload lives
    Row("lock", "timeout", answered(LOCK, CudaResult.NOT_READY), REFUSED, "CUDA_LOCK_TIMEOUT"),
    Row("lock", "not supported", answered(LOCK, CudaResult.NOT_SUPPORTED), REFUSED, "CUDA_NOT_SUPPORTED"),
    Row("lock", "801 but locked", Fault(LOCK, 801, executes=True), REFUSED, "CUDA_NOT_SUPPORTED"),
    Row("lock", "not permitted", answered(LOCK, CudaResult.NOT_PERMITTED), REFUSED, "CUDA_NOT_PERMITTED"),
    Row("lock", "304", answered(LOCK, CudaResult.OPERATING_SYSTEM), REFUSED, "CUDA_OPERATING_SYSTEM"),
    Row("lock", "invalid value", answered(LOCK, CudaResult.INVALID_VALUE), REFUSED, "CUDA_INVALID_VALUE"),
    Row("lock", "unknown code", Fault(LOCK, 999), REFUSED, "CUDA_ERROR_999"),
    Row("lock", "hang, never done", Fault(LOCK, hang=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("lock", "hang, done later", Fault(LOCK, later=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("lock", "hang, done at once", Fault(LOCK, hang=True, executes=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("lock", "stale", Fault(LOCK, stale=True), REFUSED, "CUDA_STATE_STALE"),
    Row("lock", "failed", Fault(LOCK, 304, leaves=CudaState.FAILED), BROKEN, "CUDA_STATE_FAILED"),
    Row("lock", "unknown state", Fault(LOCK, 999, leaves=CudaState.UNKNOWN), BROKEN, "CUDA_STATE_FAILED"),
    # An ended process is not frozen, the rest is (a helper that has done its work is no fault).
    Row("lock", "death", Fault(LOCK, dies=True), OK),
    # ---- checkpoint: restore and unlock; FAILED, unknown or 304: kill
    Row("checkpoint", "host memory", answered(CHECKPOINT, CudaResult.OUT_OF_MEMORY), REFUSED, "CUDA_OUT_OF_MEMORY"),
    Row("checkpoint", "not supported", answered(CHECKPOINT, CudaResult.NOT_SUPPORTED), REFUSED, "CUDA_NOT_SUPPORTED"),
    Row("checkpoint", "wrong state", answered(CHECKPOINT, CudaResult.ILLEGAL_STATE), REFUSED, "CUDA_ILLEGAL_STATE"),
    Row("checkpoint", "stale", Fault(CHECKPOINT, stale=True), REFUSED, "CUDA_STATE_STALE"),
    Row("checkpoint", "hang, never done", Fault(CHECKPOINT, hang=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("checkpoint", "hang, done later", Fault(CHECKPOINT, later=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("checkpoint", "hang, done at once", Fault(CHECKPOINT, hang=True, executes=True), REFUSED),
    Row("checkpoint", "unreadable state", Fault(STATE, hang=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("checkpoint", "304", answered(CHECKPOINT, CudaResult.OPERATING_SYSTEM), BROKEN, "CUDA_OPERATING_SYSTEM"),
    Row("checkpoint", "failed", Fault(CHECKPOINT, 304, leaves=CudaState.FAILED), BROKEN, "CUDA_OPERATING_SYSTEM"),
    Row("checkpoint", "silently failed", Fault(CHECKPOINT, leaves=CudaState.FAILED), BROKEN, "CUDA_STATE_FAILED"),
    Row("checkpoint", "unknown", Fault(CHECKPOINT, 999, leaves=CudaState.UNKNOWN), BROKEN, "CUDA_STATE_FAILED"),
    Row("checkpoint", "stuck", Fault(CHECKPOINT, stuck=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("checkpoint", "death", Fault(CHECKPOINT, dies=True), BROKEN, "CUDA_PROCESS_DIED"),
    # ---- wake: still checkpointed -> frozen again; restored -> unlocked; else kill
    Row("wake", "gpu memory", answered(RESTORE, CudaResult.OUT_OF_MEMORY), REFUSED, "CUDA_OUT_OF_MEMORY"),
    Row("wake", "not permitted", answered(RESTORE, CudaResult.NOT_PERMITTED), REFUSED, "CUDA_NOT_PERMITTED"),
    Row("wake", "invalid value", answered(RESTORE, CudaResult.INVALID_VALUE), REFUSED, "CUDA_INVALID_VALUE"),
    Row("wake", "stale restore", Fault(RESTORE, stale=True), REFUSED, "CUDA_ILLEGAL_STATE"),
    Row("wake", "hang, never done", Fault(RESTORE, hang=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("wake", "hang, done later", Fault(RESTORE, later=True), REFUSED, "DRIVER_OPERATION_LOST"),
    Row("wake", "hang, done at once", Fault(RESTORE, hang=True, executes=True), OK),
    Row("wake", "stuck", Fault(RESTORE, stuck=True), BROKEN, "DRIVER_OPERATION_LOST"),
    Row("wake", "304", answered(RESTORE, CudaResult.OPERATING_SYSTEM), BROKEN, "CUDA_OPERATING_SYSTEM"),
    Row("wake", "failed", Fault(RESTORE, leaves=CudaState.FAILED, code=999), BROKEN, "CUDA_ERROR_999"),
    Row("wake", "death", Fault(RESTORE, dies=True), BROKEN, "CUDA_PROCESS_DIED"),
    Row("wake", "unlock refused once", answered(UNLOCK, CudaResult.ILLEGAL_STATE), OK),
    Row("wake", "unlock stale", Fault(UNLOCK, stale=True), OK),
    Row("wake", "unlock hangs", Fault(UNLOCK, hang=True), OK),
    Row("wake", "unlock done, answer lost", Fault(UNLOCK, hang=True, executes=True), OK),
    Row("wake", "unlock 304", answered(UNLOCK, CudaResult.OPERATING_SYSTEM), BROKEN, "CUDA_OPERATING_SYSTEM"),
    Row("wake", "state lost", Fault(STATE, hang=True), OK),
    # ---- a cancelled freeze
    Row("unlock", "refused once", answered(UNLOCK, CudaResult.NOT_SUPPORTED), OK),
    Row("unlock", "stale", Fault(UNLOCK, stale=True), OK),
    Row("unlock", "hang, never done", Fault(UNLOCK, hang=True), OK),
    Row("unlock", "failed", Fault(UNLOCK, leaves=CudaState.FAILED, code=999), BROKEN, "CUDA_STATE_FAILED"),
]


async def reach(world: FreezerRig, phase: str) -> None:
    """Run everything before the phase, without a fault."""
    if phase in ("checkpoint", "unlock"):
        assert (await world.freezer.lock(world.handle)).outcome is OK
    elif phase == "wake":
        await world.freeze()


async def perform(world: FreezerRig, phase: str) -> FreezeResult:
    match phase:
        case "lock":
            return await world.freezer.lock(world.handle)
        case "checkpoint":
            return await world.freezer.checkpoint(world.handle)
        case "unlock":
            return await world.freezer.unlock(world.handle)
        case _:
            return await world.freezer.wake(world.handle, {})


WHOLE = {
    ("lock", OK): (CudaState.LOCKED, FreezerState.THAWED),
    ("lock", REFUSED): (CudaState.RUNNING, FreezerState.THAWED),
    ("checkpoint", OK): (CudaState.CHECKPOINTED, FreezerState.FROZEN),
    ("checkpoint", REFUSED): (CudaState.RUNNING, FreezerState.THAWED),
    ("wake", OK): (CudaState.RUNNING, FreezerState.THAWED),
    ("wake", REFUSED): (CudaState.CHECKPOINTED, FreezerState.FROZEN),
    ("unlock", OK): (CudaState.RUNNING, FreezerState.THAWED),
}
"""What an outcome promises: the state of every CUDA process, and of the threads."""


@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_fault(world: FreezerRig, row: Row) -> None:
    second = world.add_process()
    struck = max(world.main, second)
    await reach(world, row.phase)
    world.driver.faults.append(replace(row.fault, pid=struck))
    result = await perform(world, row.phase)
    assert (result.outcome, row.reason) == (row.outcome, result.reason if row.reason else ""), result
    assert world.driver.faults == []  # the fault struck
    assert world.driver.frozen_calls == []
    if result.outcome is not BROKEN:
        state, threads = WHOLE[row.phase, result.outcome]
        assert (world.states(), world.cgroups.now) == ({state}, threads)


@pytest.mark.parametrize("row", [row for row in ROWS if row.outcome is REFUSED], ids=str)
async def test_refused_operation_works_the_next_time(world: FreezerRig, row: Row) -> None:
    world.add_process()
    await reach(world, row.phase)
    world.driver.faults.append(replace(row.fault, pid=world.main))
    assert (await perform(world, row.phase)).outcome is REFUSED
    if row.phase != "wake":
        await world.freeze()
    assert (await world.freezer.wake(world.handle, {})).outcome is OK
    assert world.states() == {CudaState.RUNNING}


async def test_late_lock_is_undone_by_the_next_lock(world: FreezerRig) -> None:
    world.driver.faults.append(Fault(LOCK, hang=True))
    assert (await world.freezer.lock(world.handle)).outcome is REFUSED
    world.driver.processes[world.main].state = CudaState.LOCKED  # long after its worker was killed
    assert (await world.freezer.lock(world.handle)).outcome is OK
    assert (await world.freezer.unlock(world.handle)).outcome is OK
    assert world.states() == {CudaState.RUNNING}


async def test_late_lock_is_undone_by_the_watch(world: FreezerRig) -> None:
    world.driver.faults.append(Fault(LOCK, hang=True))
    assert (await world.freezer.lock(world.handle)).outcome is REFUSED
    world.driver.processes[world.main].state = CudaState.LOCKED
    async with asyncio.timeout(5):
        while world.state() is not CudaState.RUNNING:  # noqa: ASYNC110 - the watch looks by itself
            await asyncio.sleep(0.01)


async def test_no_watch_without_a_lost_call(world: FreezerRig) -> None:
    await world.freeze()
    await world.freezer.wake(world.handle, {})
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_foreign_lock_is_not_undone(world: FreezerRig) -> None:
    world.driver.processes[world.main].state = CudaState.LOCKED
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (REFUSED, "CUDA_ILLEGAL_STATE")
    assert world.states() == {CudaState.LOCKED}


@pytest.mark.parametrize("phase", ["checkpoint", "unlock"])
async def test_pause_between_the_steps_leaves_no_lock(world: FreezerRig, phase: str) -> None:
    await world.freezer.lock(world.handle)
    world.cgroups.pause()
    assert (await perform(world, phase)).outcome is (REFUSED if phase == "checkpoint" else OK)
    assert (world.states(), world.cgroups.now) == ({CudaState.RUNNING}, FreezerState.THAWED)
    assert world.driver.frozen_calls == []


async def test_rollback_retries_a_restore_once(world: FreezerRig) -> None:
    await world.freezer.lock(world.handle)
    world.driver.keeps_vram = True  # so the checkpoint is rolled back
    world.driver.faults += [Fault(RESTORE, 2)] * 9
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (BROKEN, "CUDA_UNSETTLED")
    assert world.driver.operations.count((RESTORE, world.main)) == 2

"""The freezer's order, rollback and verification, on real processes and a driver with faults on demand."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from agent.adapters import process_table
from agent.adapters.cgroup_freezer import FreezerState
from agent.adapters.freeze_results import FreezerLimits
from agent.adapters.freezer import CudaFreezer
from agent.core.errors import DeadlineError, PreconditionError, UnavailableError
from agent.core.types import MIB, Handle
from agent.ports import Condition, CudaOp, CudaState, Outcome
from tests.fakes.checkpointer import FakeCheckpointer, FakeCudaProcess, Fault
from tests.fakes.gpus import FakeGpus, gpu
from tests.fakes.process_freezer import FakeProcessFreezer

LOCK, CHECKPOINT, RESTORE, UNLOCK = CudaOp.LOCK, CudaOp.CHECKPOINT, CudaOp.RESTORE, CudaOp.UNLOCK
LIMITS = FreezerLimits(lock_timeout_s=0.2, state_s=0.5, answer_s=1.0, copy_base_s=1.0, vram_gone_s=0.05, settle_s=1.0)


class Instance:
    """Processes that only wait, and the pids the freezer is shown."""

    def __init__(self) -> None:
        self.children: list[subprocess.Popen[bytes]] = []
        self.shown: list[int] = []
        self.listings = 0
        self.appear_at: dict[int, int] = {}

    def spawn(self, *, shown: bool = True) -> int:
        child = subprocess.Popen(["sleep", "600"])
        self.children.append(child)
        if shown:
            self.shown.append(child.pid)
        return child.pid

    def end(self, pid: int) -> None:
        child = next(child for child in self.children if child.pid == pid)
        child.kill()
        child.wait()
        self.shown.remove(pid)

    async def pids(self, handle: Handle) -> list[int]:
        self.listings += 1
        if self.listings in self.appear_at:
            self.shown.append(self.appear_at.pop(self.listings))
        return list(self.shown)


@dataclass
class World:
    """One instance `bert-7` with a main process, its driver and its freezer."""

    instance: Instance
    driver: FakeCheckpointer
    cgroups: FakeProcessFreezer
    gpus: FakeGpus
    freezer: CudaFreezer
    handle: Handle
    main: int

    def state(self, pid: int = 0) -> CudaState:
        return self.driver.processes[pid or self.main].state

    def add_process(self, *, cuda: bool = True, gpu_index: int = 0, shown: bool = True) -> int:
        pid = self.instance.spawn(shown=shown)
        if cuda:
            self.driver.processes[pid] = FakeCudaProcess(gpu_uuid=gpu(gpu_index).uuid)
        return pid

    async def freeze(self) -> None:
        assert (await self.freezer.lock(self.handle)).outcome is Outcome.OK
        assert (await self.freezer.checkpoint(self.handle)).outcome is Outcome.OK

    def restarted(self) -> CudaFreezer:
        """The freezer of an agent that has just started: it remembers nothing."""
        return CudaFreezer(self.driver, self.cgroups, self.gpus, self.instance.pids, process_table.boot_id(), LIMITS)


@pytest.fixture
def world() -> Iterator[World]:
    instance = Instance()
    main = instance.spawn()
    driver = FakeCheckpointer({main: FakeCudaProcess()})
    cgroups = FakeProcessFreezer(driver=driver)
    gpus = FakeGpus(processes_now=driver.gpu_processes)
    boot = process_table.boot_id()
    freezer = CudaFreezer(driver, cgroups, gpus, instance.pids, boot, LIMITS)
    identity = process_table.identify(main, boot)
    assert identity is not None
    handle = Handle("bert-7", identity, "127.0.0.1", 9000)
    yield World(instance, driver, cgroups, gpus, freezer, handle, main)
    freezer.forget(handle)
    for child in instance.children:
        child.kill()
        child.wait()


# ---- the way forward ------------------------------------------------------------------------------------------


async def test_a_freeze_locks_checkpoints_and_stops_the_threads_last(world: World) -> None:
    await world.freezer.lock(world.handle)
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.image_bytes) == (Outcome.OK, 16 * MIB)
    assert result.driver_ns == 200_000  # checkpoint and state, 100 us each
    assert world.driver.operations == [(LOCK, world.main), (CHECKPOINT, world.main)]
    assert world.cgroups.calls == ["freeze"]
    assert await world.freezer.vram_bytes(world.handle) == 0


async def test_a_wake_is_one_message_and_asks_nobody_else(world: World) -> None:
    await world.freeze()
    world.driver.batches.clear()
    world.gpus.calls.clear()
    listings = world.instance.listings
    result = await world.freezer.wake(world.handle, {})
    assert result.outcome is Outcome.OK
    assert [[call.op for call in batch] for batch in world.driver.batches] == [[RESTORE, UNLOCK, CudaOp.STATE]]
    assert (world.gpus.calls, world.instance.listings) == ([], listings)
    assert world.state() is CudaState.RUNNING


async def test_several_processes_are_locked_all_before_one_is_checkpointed(world: World) -> None:
    helper = world.add_process()
    world.add_process(cuda=False)
    await world.freeze()
    await world.freezer.wake(world.handle, {})
    pids = sorted([world.main, helper])
    assert world.driver.operations == [(op, pid) for op in (LOCK, CHECKPOINT, RESTORE, UNLOCK) for pid in pids]


async def test_an_instance_without_cuda_is_frozen_by_its_cgroup_alone(world: World) -> None:
    world.driver.processes.clear()
    await world.freeze()
    assert world.cgroups.is_frozen(world.handle)
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK
    assert world.driver.operations == []


async def test_a_wake_on_another_gpu_passes_the_map_to_the_restore_only(world: World) -> None:
    await world.freeze()
    await world.freezer.wake(world.handle, {gpu(0).uuid: gpu(1).uuid, gpu(1).uuid: gpu(0).uuid})
    maps = {call.op: call.gpu_map for call in world.driver.batches[-1]}
    assert maps[RESTORE] == ((gpu(0).uuid, gpu(1).uuid), (gpu(1).uuid, gpu(0).uuid))
    assert maps[UNLOCK] == maps[CudaOp.STATE] == ()


async def test_a_cancelled_freeze_is_undone_by_unlock(world: World) -> None:
    await world.freezer.lock(world.handle)
    assert (await world.freezer.unlock(world.handle)).outcome is Outcome.OK
    assert world.state() is CudaState.RUNNING
    with pytest.raises(PreconditionError, match="NOT_LOCKED"):
        await world.freezer.checkpoint(world.handle)


# ---- a lock that goes no further ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [(600, "CUDA_LOCK_TIMEOUT"), (801, "CUDA_NOT_SUPPORTED"), (304, "CUDA_OPERATING_SYSTEM")],
)
async def test_a_failed_lock_of_one_unlocks_the_others(world: World, code: int, reason: str) -> None:
    second = world.add_process()
    world.driver.faults.append(Fault(LOCK, code, pid=max(world.main, second)))
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, reason)
    assert world.state() is world.state(second) is CudaState.RUNNING


async def test_an_801_that_leaves_the_process_locked_is_unlocked(world: World) -> None:
    world.driver.faults.append(Fault(LOCK, 801, leaves=CudaState.LOCKED))
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "CUDA_NOT_SUPPORTED")
    assert world.state() is CudaState.RUNNING


async def test_a_cuda_process_that_appears_after_the_lock_is_locked_too(world: World) -> None:
    late = world.add_process(shown=False)
    world.instance.appear_at[3] = late  # listings 1 and 2 agree, then the lock, then the second look
    assert (await world.freezer.lock(world.handle)).outcome is Outcome.OK
    assert world.state() is world.state(late) is CudaState.LOCKED
    assert world.driver.operations[:2] == [(LOCK, world.main), (UNLOCK, world.main)]


async def test_processes_that_keep_appearing_refuse_the_freeze(world: World) -> None:
    # Four listings an attempt: two that agree before the lock and two after it.
    for listing in (3, 7, 11):
        world.instance.appear_at[listing] = world.add_process(shown=False)
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "PROCESSES_CHANGE")
    assert {process.state for process in world.driver.processes.values()} == {CudaState.RUNNING}


async def test_a_process_that_dies_before_the_lock_is_left_out(world: World) -> None:
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


async def test_several_processes_on_several_gpus_are_refused_unless_allowed(world: World) -> None:
    world.add_process(gpu_index=1)
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "SEVERAL_PROCESSES_ON_SEVERAL_GPUS")
    assert world.state() is CudaState.RUNNING


async def test_gpu_memory_of_a_process_that_the_driver_does_not_know_refuses(world: World) -> None:
    stranger = world.add_process()
    shown = world.driver.gpu_processes()
    del world.driver.processes[stranger]
    world.gpus.processes_now = shown
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "CUDA_PROCESS_UNKNOWN")
    assert world.state() is CudaState.RUNNING


async def test_a_paused_instance_is_not_asked(world: World) -> None:
    world.cgroups.pause()
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "EXTERNALLY_FROZEN")
    assert world.driver.batches == []


async def test_no_free_worker_refuses_and_changes_nothing(world: World) -> None:
    world.driver.not_begun = "DRIVER_BUSY"
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "DRIVER_BUSY")


@pytest.mark.parametrize("executes", [True, False])
async def test_a_hung_lock_ends_unlocked_whether_it_was_executed_or_not(world: World, executes: bool) -> None:
    world.driver.faults.append(Fault(LOCK, hang=True, executes=executes))
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "DRIVER_OPERATION_LOST")
    assert world.state() is CudaState.RUNNING


async def test_a_pause_during_the_lock_is_thawed_and_its_stale_lock_undone(world: World) -> None:
    original = world.driver.run

    async def pause_then_run(calls, deadline_s, gpu_uuids=()):  # type: ignore[no-untyped-def]
        if calls and calls[0].op is LOCK:
            world.cgroups.pause()
        return await original(calls, deadline_s, gpu_uuids)

    world.driver.run = pause_then_run  # type: ignore[method-assign]
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, world.cgroups.now) == (Outcome.REFUSED, FreezerState.THAWED)
    assert world.state() is CudaState.RUNNING  # the lock ran at the thaw, after its worker was killed


# ---- a checkpoint that goes no further ------------------------------------------------------------------------


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
async def test_a_failed_checkpoint_is_rolled_back(world: World, fault: Fault, reason: str) -> None:
    second = world.add_process()
    await world.freezer.lock(world.handle)
    world.driver.faults.append(replace(fault, pid=max(world.main, second)))
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, reason)
    assert world.state() is world.state(second) is CudaState.RUNNING
    assert "freeze" not in world.cgroups.calls


@pytest.mark.parametrize("leaves", [CudaState.FAILED, CudaState.UNKNOWN, CudaState.NONE])
async def test_a_checkpoint_that_leaves_no_known_state_is_broken(world: World, leaves: CudaState) -> None:
    await world.freezer.lock(world.handle)
    world.driver.faults.append(Fault(CHECKPOINT, 304, leaves=leaves))
    assert (await world.freezer.checkpoint(world.handle)).outcome is Outcome.BROKEN


async def test_memory_that_nvml_still_shows_takes_the_checkpoint_back(world: World) -> None:
    world.driver.keeps_vram = True
    await world.freezer.lock(world.handle)
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "VRAM_NOT_RELEASED")
    assert world.state() is CudaState.RUNNING


async def test_without_nvml_there_is_no_proof_and_no_freeze(world: World) -> None:
    await world.freezer.lock(world.handle)
    world.gpus.unavailable = True
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "NVML_UNAVAILABLE")
    assert world.state() is CudaState.RUNNING


async def test_a_cgroup_that_does_not_freeze_takes_the_checkpoint_back(world: World) -> None:
    world.cgroups.fail_freeze = DeadlineError("FREEZE_TIMEOUT", "a thread did not stop")
    await world.freezer.lock(world.handle)
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "FREEZE_TIMEOUT")
    assert world.state() is CudaState.RUNNING


async def test_a_target_that_dies_under_the_checkpoint_is_broken(world: World) -> None:
    helper = world.add_process()
    await world.freezer.lock(world.handle)
    world.instance.end(helper)
    del world.driver.processes[helper]
    result = await world.freezer.checkpoint(world.handle)
    assert (result.outcome, result.reason) == (Outcome.BROKEN, "CUDA_PROCESS_DIED")


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
    world.driver.not_begun = "DRIVER_WORKERS_DOWN"
    with pytest.raises(UnavailableError, match="DRIVER_WORKERS_DOWN"):
        await world.freezer.condition(world.handle)


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

"""Tests which processes the driver is called for: never a thread, a zombie or a reused pid, and none is missed."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import replace

import pytest

from agent.adapters.cuda.processes import MAX_STATES_PER_BATCH, living, open_process
from agent.adapters.kernel import process_table
from agent.ports import CudaOp, CudaState, Outcome
from tests.adapters.freezer.world import LIMITS, FreezerRig
from tests.fakes.checkpointer import FakeCudaProcess, Fault

BOOT = process_table.boot_id()


def asked(world: FreezerRig) -> set[int]:
    return {call.pid for batch in world.driver.batches for call in batch}


def descriptors() -> int:
    gc.collect()  # garbage of earlier tests must not go during this one
    return len(os.listdir("/proc/self/fd"))


async def test_thread_id_is_not_taken_for_a_process(world: FreezerRig) -> None:
    ready, done = threading.Event(), threading.Event()
    tids: list[int] = []

    def live() -> None:
        tids.append(threading.get_native_id())
        ready.set()
        done.wait(10)

    thread = threading.Thread(target=live)
    thread.start()
    ready.wait(10)
    world.instance.shown.append(tids[0])  # the driver would accept it, and its target would die
    await world.freeze()
    done.set()
    thread.join()
    assert asked(world) == {world.main}


async def test_zombie_is_listed_and_not_queried(world: FreezerRig) -> None:
    zombie = world.add_process()
    world.instance.kill(zombie)
    del world.driver.processes[zombie]
    await world.freeze()
    assert asked(world) == {world.main}
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_reused_pid_is_not_queried(world: FreezerRig) -> None:
    """Its pidfd shows that the process has ended, whichever process has the pid now."""
    process = open_process(world.main, BOOT)
    assert process is not None
    world.instance.kill(world.main).wait()
    assert living([process]) == ()
    assert process_table.open_pidfd(replace(world.handle.process, start_time=1), BOOT) is None
    os.close(process.pidfd)


async def test_child_with_inherited_gpu_descriptors_has_no_cuda(world: FreezerRig) -> None:
    child = world.add_process(cuda=False)  # forked without exec: /dev/nvidia* is open, get-state answers 3
    await world.freeze()
    assert {pid for _, pid in world.driver.operations} == {world.main}
    assert child in asked(world)


async def test_answer_lost_with_a_dying_neighbour_is_queried_again(world: FreezerRig) -> None:
    """A process that ends during its call fails the answers after it: those are not "no CUDA"."""
    dying, last = sorted([world.add_process(), world.add_process()])
    order = sorted([world.main, dying, last])
    world.driver.faults.append(Fault(CudaOp.STATE, dies=True, pid=order[1]))
    if order[1] == world.main:
        pytest.skip("the pids wrapped around between two spawns")
    await world.freezer.lock(world.handle)
    assert world.state(last) is CudaState.LOCKED
    assert world.state() is CudaState.LOCKED


async def test_hundreds_of_processes_are_queried_in_bounded_batches(world: FreezerRig) -> None:
    for _ in range(MAX_STATES_PER_BATCH + 6):
        world.add_process(cuda=False)
    world.driver.processes[max(world.instance.shown)] = FakeCudaProcess()
    await world.freeze()
    assert max(len(batch) for batch in world.driver.batches) == MAX_STATES_PER_BATCH
    assert world.states() == {CudaState.CHECKPOINTED}


async def test_too_many_cuda_processes_are_refused(world: FreezerRig) -> None:
    world.add_process()
    world.add_process()
    freezer = world.restarted(replace(LIMITS, max_processes=2))
    result = await freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "TOO_MANY_CUDA_PROCESSES")
    assert world.states() == {CudaState.RUNNING}


async def test_lack_of_descriptors_is_an_error(world: FreezerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(pid: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", too_many)
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "PROCESSES_UNREADABLE")
    assert world.driver.batches == []


async def test_every_pidfd_is_closed(world: FreezerRig) -> None:
    world.add_process()
    world.add_process(cuda=False)
    before = descriptors()
    for fault in [None, Fault(CudaOp.LOCK, 801), Fault(CudaOp.CHECKPOINT, 2), Fault(CudaOp.STATE, hang=True)]:
        world.driver.faults += [fault] if fault else []
        if (await world.freezer.lock(world.handle)).outcome is Outcome.OK:
            await world.freezer.checkpoint(world.handle)
            await world.freezer.wake(world.handle, {})
        world.freezer.forget(world.handle)
        assert descriptors() == before
    await world.freezer.condition(world.handle)
    await world.freezer.prepare_kill(world.handle)
    assert descriptors() == before

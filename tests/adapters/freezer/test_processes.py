"""Which processes the driver is asked about: never a thread, a zombie or somebody else's, and none is overlooked."""

from __future__ import annotations

import gc
import os
import threading
from dataclasses import replace

import pytest

from agent.adapters.cuda.processes import MAX_STATES_PER_BATCH, living, open_process
from agent.adapters.kernel import process_table
from agent.ports import CudaOp, CudaState, Outcome
from tests.adapters.freezer.world import LIMITS, World
from tests.fakes.checkpointer import FakeCudaProcess, Fault

BOOT = process_table.boot_id()


def asked(world: World) -> set[int]:
    return {call.pid for batch in world.driver.batches for call in batch}


def descriptors() -> int:
    gc.collect()  # what earlier tests left is not to go in the middle of this one
    return len(os.listdir("/proc/self/fd"))


async def test_a_thread_id_is_never_taken_for_a_process(world: World) -> None:
    ready, done = threading.Event(), threading.Event()
    tids: list[int] = []

    def live() -> None:
        tids.append(threading.get_native_id())
        ready.set()
        done.wait(10)

    thread = threading.Thread(target=live)
    thread.start()
    ready.wait(10)
    world.instance.shown.append(tids[0])  # the driver would take it, and its target would die
    await world.freeze()
    done.set()
    thread.join()
    assert asked(world) == {world.main}


async def test_a_zombie_is_listed_and_not_asked(world: World) -> None:
    zombie = world.add_process()
    world.instance.kill(zombie)
    del world.driver.processes[zombie]
    await world.freeze()
    assert asked(world) == {world.main}
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_a_pid_that_came_to_mean_another_process_is_not_asked(world: World) -> None:
    """Its pidfd says that ours has ended, whoever has the number now."""
    process = open_process(world.main, BOOT)
    assert process is not None
    world.instance.kill(world.main).wait()
    assert living([process]) == ()
    assert process_table.open_pidfd(replace(world.handle.process, start_time=1), BOOT) is None
    os.close(process.pidfd)


async def test_a_child_that_only_inherited_descriptors_of_the_gpu_has_no_cuda(world: World) -> None:
    child = world.add_process(cuda=False)  # forked without exec: /dev/nvidia* is open, get-state answers 3
    await world.freeze()
    assert {pid for _, pid in world.driver.operations} == {world.main}
    assert child in asked(world)


async def test_an_answer_lost_with_a_dying_neighbour_is_asked_for_again(world: World) -> None:
    """One process ends under the question and takes the answers of those after it along: they are not "no CUDA"."""
    dying, last = sorted([world.add_process(), world.add_process()])
    order = sorted([world.main, dying, last])
    world.driver.faults.append(Fault(CudaOp.STATE, dies=True, pid=order[1]))
    if order[1] == world.main:
        pytest.skip("the pids wrapped around between two spawns")
    await world.freezer.lock(world.handle)
    assert world.state(last) is CudaState.LOCKED
    assert world.state() is CudaState.LOCKED


async def test_hundreds_of_processes_are_asked_in_messages_of_bounded_size(world: World) -> None:
    for _ in range(MAX_STATES_PER_BATCH + 6):
        world.add_process(cuda=False)
    world.driver.processes[max(world.instance.shown)] = FakeCudaProcess()
    await world.freeze()
    assert max(len(batch) for batch in world.driver.batches) == MAX_STATES_PER_BATCH
    assert world.states() == {CudaState.CHECKPOINTED}


async def test_more_cuda_processes_than_can_be_frozen_are_refused(world: World) -> None:
    world.add_process()
    world.add_process()
    freezer = world.restarted(replace(LIMITS, max_processes=2))
    result = await freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "TOO_MANY_CUDA_PROCESSES")
    assert world.states() == {CudaState.RUNNING}


async def test_without_descriptors_nobody_is_overlooked(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_many(pid: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", too_many)
    result = await world.freezer.lock(world.handle)
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "PROCESSES_UNREADABLE")
    assert world.driver.batches == []


async def test_every_pidfd_is_closed(world: World) -> None:
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

"""The contract of every Checkpointer: the fake, the driver workers and the program, on emulated drivers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator

import pytest

from agent.adapters.cuda.processes import CudaProcessFinder
from agent.adapters.cuda.result_codes import CudaResult
from agent.adapters.kernel.process_table import boot_id, identify
from agent.core.types import Handle
from agent.ports import CudaCall, CudaFault, CudaOp, CudaReply, CudaState
from tests.contract.checkpointer_worlds import (
    DONE,
    KINDS,
    REAL,
    EmulatedWorld,
    World,
    emulated,
    fake,
    hosts,
)

__all__ = ["hosts"]

STATE, LOCK, CHECKPOINT, RESTORE, UNLOCK = CudaOp
CHANGES = (LOCK, CHECKPOINT, RESTORE, UNLOCK)
BEFORE = {
    LOCK: CudaState.RUNNING,
    CHECKPOINT: CudaState.LOCKED,
    RESTORE: CudaState.CHECKPOINTED,
    UNLOCK: CudaState.LOCKED,
}


@pytest.fixture(params=KINDS)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    kind: str = request.param
    async with fake() if kind == "fake" else emulated(kind, request.getfixturevalue("hosts")) as it:
        yield it


def only(*kinds: str) -> pytest.MarkDecorator:
    """Some worlds only: in the others there is nothing of the kind."""
    return pytest.mark.parametrize("world", kinds, indirect=True)


async def one(world: World, op: CudaOp, deadline_s: float = 5.0) -> CudaReply:
    return await world.checkpointer.run([CudaCall(op, world.cuda)], deadline_s)


# ---- as it should be ------------------------------------------------------------------------------------------------


async def test_a_cycle_goes_through_the_states_of_cuda_h(world: World) -> None:
    for op in CHANGES:
        reply = await world.checkpointer.run([CudaCall(op, world.cuda, timeout_ms=1000 if op is LOCK else 0)], 5.0)
        assert reply.ok
        assert await world.states(world.cuda) == [DONE[op]]
    assert world.intact()


async def test_batch_runs_all_calls_and_reports_their_times(world: World) -> None:
    reply = await world.checkpointer.run(
        [CudaCall(op, world.cuda) for op in (LOCK, CHECKPOINT, RESTORE, UNLOCK, STATE)], 10.0
    )
    assert reply.ok
    assert [answer.call.op for answer in reply.answers] == [LOCK, CHECKPOINT, RESTORE, UNLOCK, STATE]
    assert reply.answers[-1].state is CudaState.RUNNING
    assert {answer.state for answer in reply.answers[:-1]} == {None}
    assert reply.driver_ns == sum(answer.elapsed_us for answer in reply.answers) * 1000 > 0


async def test_a_batch_ends_at_its_first_failure_with_the_state_re_read(world: World) -> None:
    calls = [CudaCall(LOCK, world.cuda), CudaCall(RESTORE, world.cuda), CudaCall(UNLOCK, world.cuda)]
    reply = await world.checkpointer.run(calls, 5.0)
    assert not reply.ok
    assert [answer.code for answer in reply.answers] == [0, 401]
    assert reply.answers[-1].state is CudaState.LOCKED
    assert await world.states(world.cuda) == [CudaState.LOCKED]  # the unlock was not tried


async def test_a_process_without_cuda_has_no_state_and_ends_no_batch(world: World) -> None:
    assert await world.states(world.plain, world.cuda) == [CudaState.NONE, CudaState.RUNNING]


async def test_an_operation_on_a_process_without_cuda_fails(world: World) -> None:
    reply = await world.checkpointer.run([CudaCall(LOCK, world.plain)], 5.0)
    assert not reply.ok
    assert reply.answers[0].state is CudaState.NONE


async def test_nothing_to_do_is_done(world: World) -> None:
    reply = await world.checkpointer.run([], 5.0)
    assert (reply.ok, reply.answers, reply.driver_ns) == (True, (), 0)


async def test_processes_do_not_disturb_each_other(world: World) -> None:
    batches = [
        world.checkpointer.run([CudaCall(LOCK, world.cuda)], 5.0),
        world.checkpointer.run([CudaCall(LOCK, world.other), CudaCall(UNLOCK, world.other)], 5.0),
    ]
    assert all(reply.ok for reply in await asyncio.gather(*batches))
    assert await world.states(world.cuda, world.other) == [CudaState.LOCKED, CudaState.RUNNING]


# ---- restore onto other GPUs ----------------------------------------------------------------------------------------


@only("fake", "driver-580", "utility-580")
async def test_a_map_restores_onto_the_other_gpu(world: World) -> None:
    first, second = world.gpu_uuids
    before = world.gpus()
    await world.bring_before(RESTORE)
    swap = CudaCall(RESTORE, world.cuda, gpu_map=((first, second), (second, first)))
    assert (await world.checkpointer.run([swap, CudaCall(UNLOCK, world.cuda)], 5.0)).ok
    assert world.intact()
    assert world.gpus() == {first, second} - before


@only("driver-580", "utility-580")
@pytest.mark.parametrize("wrong", ["incomplete", "unknown", "twice"])
async def test_a_wrong_map_is_refused_and_nothing_is_lost(world: World, wrong: str) -> None:
    first, second = world.gpu_uuids
    stranger = "GPU-00112233-4455-6677-8899-aabbccddeeff"
    pairs = {
        "incomplete": ((first, second),),
        "unknown": ((first, stranger), (second, first)),
        "twice": ((first, second), (second, second)),
    }
    await world.bring_before(RESTORE)
    reply = await world.checkpointer.run([CudaCall(RESTORE, world.cuda, gpu_map=pairs[wrong])], 5.0)
    assert [(answer.code, answer.state) for answer in reply.answers] == [
        (CudaResult.INVALID_VALUE, CudaState.CHECKPOINTED)
    ]
    await world.must(RESTORE, UNLOCK)
    assert world.intact()


@only("driver-570", "utility-555", "utility-570")
async def test_a_driver_without_maps_says_so_and_does_nothing(world: World) -> None:
    await world.bring_before(RESTORE)
    first, second = world.gpu_uuids
    swap = CudaCall(RESTORE, world.cuda, gpu_map=((first, second), (second, first)))
    reply = await world.checkpointer.run([swap], 5.0)
    assert [(answer.code, answer.state) for answer in reply.answers] == [
        (CudaResult.NOT_SUPPORTED, CudaState.CHECKPOINTED)
    ]
    await world.must(RESTORE, UNLOCK)


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (LOCK, "NOT_READY"),  # its timeout passed
        (LOCK, "NOT_SUPPORTED"),
        (CHECKPOINT, "OUT_OF_MEMORY"),
        (RESTORE, "OUT_OF_MEMORY"),
        (RESTORE, "INVALID_VALUE"),
        (UNLOCK, "OPERATING_SYSTEM"),
    ],
)
async def test_a_refusal_is_answered_with_its_code_and_the_state(world: World, op: CudaOp, kind: str) -> None:
    await world.bring_before(op)
    world.fault(op, kind)
    reply = await one(world, op)
    assert [(answer.code, answer.state) for answer in reply.answers] == [(CudaResult[kind], BEFORE[op])]
    assert reply.fault is CudaFault.NONE
    assert await world.states(world.other) == [CudaState.RUNNING]


@pytest.mark.parametrize(("op", "kind"), [(LOCK, "NOT_SUPPORTED"), (CHECKPOINT, "OPERATING_SYSTEM")])
async def test_failed_call_that_took_effect_is_recognized(world: World, op: CudaOp, kind: str) -> None:
    """After 801 from a lock, unlock if the state is LOCKED; without the re-read it would stay locked
    (agent/docs/facts/gpu-checkpoint.md, section 2)."""
    await world.bring_before(op)
    world.fault(op, kind, after=True)
    reply = await one(world, op)
    assert [(answer.code, answer.state) for answer in reply.answers] == [(CudaResult[kind], DONE[op])]
    await world.must(*((UNLOCK,) if op is LOCK else (RESTORE, UNLOCK)))
    assert world.intact()


async def test_a_state_that_can_not_be_read_is_unknown(world: World) -> None:
    world.fault(STATE, "OPERATING_SYSTEM")
    reply = await one(world, STATE)
    assert [(answer.code, answer.state) for answer in reply.answers] == [(304, CudaState.UNKNOWN)]


async def test_process_in_state_failed_is_reported_as_failed(world: World) -> None:
    await world.bring_before(CHECKPOINT)
    world.fault(CHECKPOINT, "FAILED")
    # Older programs have no state for it; the freezer kills in both cases.
    said = CudaState.UNKNOWN if world.kind in ("utility-555", "utility-570") else CudaState.FAILED
    reply = await one(world, CHECKPOINT)
    assert [(answer.code, answer.state) for answer in reply.answers] == [(304, said)]
    assert await world.states(world.cuda) == [said]


async def test_a_success_that_changed_nothing_is_a_success_here(world: World) -> None:
    """It takes a STATE to notice: the freezer asks."""
    await world.bring_before(CHECKPOINT)
    world.fault(CHECKPOINT, "STALE")
    assert (await one(world, CHECKPOINT)).ok
    assert await world.states(world.cuda) == [CudaState.LOCKED]


# ---- death and silence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", CudaOp)
async def test_target_that_dies_in_a_call_is_answered_and_others_go_on(world: World, op: CudaOp) -> None:
    await world.bring_before(op)
    world.fault(op, "DEATH")
    reply = await one(world, op)
    assert reply.fault is CudaFault.NONE
    assert not reply.ok
    assert reply.answers[0].code == CudaResult.OPERATING_SYSTEM
    assert await world.states(world.cuda, world.other) == [CudaState.NONE, CudaState.RUNNING]


@pytest.mark.parametrize("op", CudaOp)
async def test_a_hang_is_lost_at_its_deadline_and_runs_later(world: World, op: CudaOp) -> None:
    """Facts emulated-driver, pitfall 1: its caller is dead, and it is executed all the same."""
    await world.bring_before(op)
    world.fault(op, "HANG")
    for deadline_s in (0.2, 2.0):  # on a busy machine the first may run out before the driver is reached
        began = asyncio.get_running_loop().time()
        reply = await one(world, op, deadline_s)
        assert (reply.fault, reply.reason) == (CudaFault.LOST, "DRIVER_OPERATION_LOST")
        assert asyncio.get_running_loop().time() - began < deadline_s + 3.0
        if op is STATE or world.hangs():
            break
    assert await world.states(world.other) == [CudaState.RUNNING]  # a fresh worker serves the others meanwhile
    world.clear_faults()
    await reaches(world, DONE.get(op, CudaState.RUNNING))
    rest = {CudaState.RUNNING: (), CudaState.LOCKED: (UNLOCK,), CudaState.CHECKPOINTED: (RESTORE, UNLOCK)}
    await world.must(*rest[DONE.get(op, CudaState.RUNNING)], STATE)
    await world.must(*CHANGES)
    assert world.intact()


async def reaches(world: World, state: CudaState) -> None:
    """Nothing reports when a call that hung has run."""
    async with asyncio.timeout(5.0):
        while await world.states(world.cuda) != [state]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_frozen_target_hangs_the_call_and_it_runs_after_the_thaw(world: World) -> None:
    world.freeze(True)
    for deadline_s in (0.2, 2.0):
        reply = await one(world, LOCK, deadline_s)
        assert (reply.fault, reply.reason, reply.ok) == (CudaFault.LOST, "DRIVER_OPERATION_LOST", False)
        if world.frozen_calls():
            break
    world.freeze(False)
    # The stale lock runs although its caller is dead (hence thaw, re-read, unlock).
    states = [(await world.states(world.cuda))[0] for _ in range(2)]
    assert states[-1] is CudaState.LOCKED
    assert (await world.checkpointer.run([CudaCall(UNLOCK, world.cuda)], 5.0)).ok


@only(*REAL)
async def test_killed_driver_worker_costs_only_its_batch(world: World) -> None:
    assert isinstance(world, EmulatedWorld)
    await world.bring_before(CHECKPOINT)
    world.fault(CHECKPOINT, "HANG")
    batch = asyncio.create_task(one(world, CHECKPOINT, deadline_s=30.0))
    async with asyncio.timeout(5.0):
        while not world.hangs():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    world.kill_callers()
    async with asyncio.timeout(5.0):
        reply = await batch
    if world.kind.startswith("driver"):
        assert reply.fault is CudaFault.LOST
    else:  # its end is known, and its state could not be read
        assert reply.fault is CudaFault.NONE or reply.fault is CudaFault.LOST
    assert not reply.ok
    world.clear_faults()
    await reaches(world, CudaState.CHECKPOINTED)
    await world.must(RESTORE, UNLOCK)
    assert world.intact()


# ---- what never reaches it ------------------------------------------------------------------------------------------


async def test_thread_id_is_no_process(world: World) -> None:
    """NVIDIA/cuda-checkpoint issue 41: the driver takes a thread's number for a pid, and the target dies. The guard is
    `cuda_processes.open_process`, through which every pid goes that the freezer asks about."""
    asked: list[CudaCall] = []

    class Recorder:
        async def run(self, calls: list[CudaCall], deadline_s: float, gpu_uuids: tuple[str, ...] = ()) -> CudaReply:
            asked.extend(calls)
            return await world.checkpointer.run(calls, deadline_s, gpu_uuids)

    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()

    async def pids(_handle: Handle) -> list[int]:
        assert thread.native_id is not None
        return [thread.native_id]

    identity = identify(os.getpid(), boot_id())
    assert identity is not None
    finder = CudaProcessFinder(pids, Recorder(), boot_id(), 5.0)  # type: ignore[arg-type]
    found = await finder.find(Handle("uid", identity, "127.0.0.1", 9000))
    done.set()
    thread.join()
    assert (found.processes, asked) == ((), [])

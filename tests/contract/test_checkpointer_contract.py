"""What every Checkpointer promises: the fake, the driver workers, and the program, on the emulated driver."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from agent.adapters import cgroup
from agent.adapters.checkpointer_driver import DriverCheckpointer, PoolLimits
from agent.adapters.checkpointer_utility import UtilityCheckpointer
from agent.adapters.driver_worker_process import WorkerOptions
from agent.core.types import MIB
from agent.ports import Checkpointer, CudaCall, CudaFault, CudaOp, CudaState
from tests.fakes.checkpointer import FakeCheckpointer, FakeCudaProcess
from tests.fakes.emulated_driver import CudaInstances, EmulatedNvidia

STATE, LOCK, CHECKPOINT, RESTORE, UNLOCK = CudaOp


@dataclass
class World:
    """A host with a CUDA program `cuda`, a second one `other`, and one without CUDA, `plain`: their pids."""

    checkpointer: Checkpointer
    cuda: int
    other: int
    plain: int
    freeze: Callable[[bool], None]

    async def states(self, *pids: int) -> list[CudaState | None]:
        reply = await self.checkpointer.run([CudaCall(STATE, pid) for pid in pids], 5.0)
        return [answer.state for answer in reply.answers]


@asynccontextmanager
async def fake() -> AsyncIterator[World]:
    driver = FakeCheckpointer({1001: FakeCudaProcess(), 1002: FakeCudaProcess()}, hang_s=0.05)

    def freeze(frozen: bool) -> None:
        if frozen:
            driver.processes[1001].thawed.clear()
        else:
            driver.processes[1001].thaw()

    yield World(driver, 1001, 1002, 1003, freeze)


@asynccontextmanager
async def real(nvidia: EmulatedNvidia, *, utility: bool) -> AsyncIterator[World]:
    instances = CudaInstances(nvidia.environment)
    workers = DriverCheckpointer(
        WorkerOptions(environment=nvidia.environment), PoolLimits(workers=2, first_backoff_s=0.001)
    )
    if not utility:
        await workers.start()
    program = nvidia.directory / "bin" / "cuda-checkpoint"
    checkpointer = UtilityCheckpointer(program, nvidia.environment) if utility else workers
    (cuda, handle), (other, _), (plain, _) = (
        instances.start("cuda", MIB),
        instances.start("other", MIB),
        instances.start("plain", None),
    )

    def freeze(frozen: bool) -> None:
        if instances.slice_ is None:
            pytest.skip("needs a writable cgroup v2")
        cgroup.write_freeze(instances.slice_.path_of(handle.uid), frozen)

    yield World(checkpointer, cuda.pid, other.pid, plain.pid, freeze)
    provoked = nvidia.control.take_frozen_calls()  # by the one test that freezes, and of nothing else
    assert {(call.op, call.pid) for call in provoked} <= {("lock", cuda.pid)}
    await instances.close()
    await workers.close()


@pytest.fixture(params=["fake", "driver", "utility"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    kind: str = request.param
    made = fake() if kind == "fake" else real(request.getfixturevalue("nvidia"), utility=kind == "utility")
    async with made as it:
        yield it


async def test_a_cycle_goes_through_the_states_of_cuda_h(world: World) -> None:
    for op, state in [
        (LOCK, CudaState.LOCKED),
        (CHECKPOINT, CudaState.CHECKPOINTED),
        (RESTORE, CudaState.LOCKED),
        (UNLOCK, CudaState.RUNNING),
    ]:
        reply = await world.checkpointer.run([CudaCall(op, world.cuda, timeout_ms=1000 if op is LOCK else 0)], 5.0)
        assert reply.ok
        assert await world.states(world.cuda) == [state]


async def test_a_batch_does_all_of_it_and_says_how_long(world: World) -> None:
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
    assert (await world.checkpointer.run([CudaCall(LOCK, world.cuda)], 5.0)).ok
    assert await world.states(world.cuda, world.other) == [CudaState.LOCKED, CudaState.RUNNING]


async def test_a_frozen_target_hangs_the_call_and_it_runs_after_the_thaw(world: World) -> None:
    world.freeze(True)
    reply = await world.checkpointer.run([CudaCall(LOCK, world.cuda)], 0.2)
    assert (reply.fault, reply.reason, reply.ok) == (CudaFault.LOST, "DRIVER_OPERATION_LOST", False)
    world.freeze(False)
    # The stale lock: its caller is dead, and it is executed all the same (hence thaw, re-read, unlock).
    states = [(await world.states(world.cuda))[0] for _ in range(2)]
    assert states[-1] is CudaState.LOCKED
    assert (await world.checkpointer.run([CudaCall(UNLOCK, world.cuda)], 5.0)).ok

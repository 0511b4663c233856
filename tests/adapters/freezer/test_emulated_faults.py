"""Tests faults at the driver's boundary under a real freezer: their outcome, and that memory survives."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agent.adapters.freezer.freezer import CudaFreezer
from agent.adapters.freezer.limits import freezer_limits
from agent.config import Duration
from agent.core.types import MIB, SECOND_NS, Handle
from agent.ports import Condition, FreezeResult, Outcome
from agent.settings import GpuSettings
from tests.adapters.freezer.host import SIZE, Host, freeze
from tests.fakes.driver_callers import worker_pids
from tests.fakes.emulated_driver import CudaTarget

HASTY = freezer_limits(GpuSettings(lock_timeout_ns=Duration(SECOND_NS // 5), operation_timeout_ns=Duration(SECOND_NS)))
OK, REFUSED, BROKEN = Outcome.OK, Outcome.REFUSED, Outcome.BROKEN


@pytest.mark.parametrize(
    ("operation", "kind", "reason"),
    [
        ("lock", "NOT_READY", "CUDA_LOCK_TIMEOUT"),
        ("lock", "NOT_SUPPORTED", "CUDA_NOT_SUPPORTED"),
        ("lock", "STALE", "CUDA_STATE_STALE"),
        ("checkpoint", "OUT_OF_MEMORY", "CUDA_OUT_OF_MEMORY"),
        ("checkpoint", "NOT_SUPPORTED", "CUDA_NOT_SUPPORTED"),
        ("checkpoint", "STALE", "CUDA_STATE_STALE"),
    ],
)
async def test_failed_freeze_is_rolled_back(host: Host, operation: str, kind: str, reason: str) -> None:
    target, handle = host.instances.start("bert-1", SIZE)
    freezer = host.freezer(HASTY)
    host.nvidia.control.fault(operation, kind)
    result = await freezer.lock(handle)
    if operation == "checkpoint":
        assert result.outcome is OK
        result = await freezer.checkpoint(handle)
    assert (result.outcome, result.reason) == (REFUSED, reason)
    assert target.verify()
    await freeze(freezer, handle)
    assert (await freezer.wake(handle, {})).outcome is OK
    assert target.verify()
    freezer.forget(handle)


@pytest.mark.parametrize(
    ("operation", "kind", "reason"),
    [
        ("checkpoint", "OPERATING_SYSTEM", "CUDA_OPERATING_SYSTEM"),
        ("checkpoint", "FAILED", "CUDA_OPERATING_SYSTEM"),
        ("checkpoint", "DEATH", "CUDA_PROCESS_DIED CUDA_OPERATING_SYSTEM"),
        ("restore", "OPERATING_SYSTEM", "CUDA_OPERATING_SYSTEM"),
        ("restore", "FAILED", "CUDA_OPERATING_SYSTEM"),
        ("restore", "DEATH", "CUDA_PROCESS_DIED CUDA_OPERATING_SYSTEM"),
        ("unlock", "OPERATING_SYSTEM", "CUDA_OPERATING_SYSTEM"),
    ],
)
async def test_unrecoverable_freeze_is_broken(host: Host, operation: str, kind: str, reason: str) -> None:
    """The driver's answer about a dead target may arrive before its death is seen; then the answer is the reason."""
    _, handle = host.instances.start("bert-1", SIZE)
    freezer = host.freezer(HASTY)
    host.nvidia.control.fault(operation, kind)
    assert (await freezer.lock(handle)).outcome is OK
    result = await freezer.checkpoint(handle)
    if operation != "checkpoint":
        assert result.outcome is OK
        result = await freezer.wake(handle, {})
    assert result.outcome is BROKEN
    assert result.reason in reason.split()
    freezer.forget(handle)


@pytest.mark.parametrize("kind", ["OUT_OF_MEMORY", "INVALID_VALUE", "STALE"])
async def test_failed_restore_leaves_it_frozen_and_intact(host: Host, kind: str) -> None:
    target, handle = host.instances.start("bert-1", SIZE)
    freezer = host.freezer(HASTY)
    await freeze(freezer, handle)
    host.nvidia.control.fault("restore", kind)
    assert (await freezer.wake(handle, {})).outcome is REFUSED
    assert await freezer.condition(handle) is Condition.FROZEN
    assert (await freezer.wake(handle, {})).outcome is OK
    assert target.verify()
    freezer.forget(handle)


@pytest.mark.parametrize("kind", ["STALE", "NOT_SUPPORTED", "ILLEGAL_STATE"])
async def test_failed_unlock_is_retried(host: Host, kind: str) -> None:
    target, handle = host.instances.start("bert-1", SIZE)
    freezer = host.freezer(HASTY)
    await freeze(freezer, handle)
    host.nvidia.control.fault("unlock", kind)
    assert (await freezer.wake(handle, {})).outcome is OK
    assert target.verify()
    freezer.forget(handle)


async def test_restore_failed_on_one_gpu_succeeds_on_another(host: Host) -> None:
    target, handle = host.instances.start("bert-1", SIZE)
    first, second = [gpu.uuid for gpu in await host.gpus.list_gpus()]
    freezer = host.freezer(HASTY)
    await freeze(freezer, handle)
    host.nvidia.control.fault("restore", "OUT_OF_MEMORY", gpu=first, times=0)
    assert (await freezer.wake(handle, {})).outcome is REFUSED
    assert (await freezer.wake(handle, {first: second, second: first})).outcome is OK
    assert target.verify()
    await freeze(freezer, handle)  # it freezes and wakes from there as well
    assert (await freezer.wake(handle, {})).outcome is OK
    assert {entry.gpu_uuid for entry in await host.gpus.processes() if entry.pid == target.pid} == {second}
    freezer.forget(handle)


async def test_two_processes_migrate_together_or_not_at_all(host: Host) -> None:
    server, handle = host.instances.start("tgi-1", SIZE)
    if not handle.cgroup:
        pytest.skip("a second program gets into the instance only through a writable cgroup v2")
    worker = CudaTarget(host.instances.environment, Path(handle.cgroup))
    host.instances.targets["tgi-1-worker"] = worker
    worker.fill(SIZE, seed=11)
    first, second = [gpu.uuid for gpu in await host.gpus.list_gpus()]
    freezer = host.freezer(HASTY)
    await freeze(freezer, handle)
    host.nvidia.control.fault("restore", "OUT_OF_MEMORY", pid=max(server.pid, worker.pid))
    assert (await freezer.wake(handle, {first: second, second: first})).outcome is OK
    assert server.verify()
    assert worker.verify()
    pids = {server.pid, worker.pid}
    assert {entry.gpu_uuid for entry in await host.gpus.processes() if entry.pid in pids} == {second}
    freezer.forget(handle)


async def test_incomplete_gpu_map_changes_nothing(host: Host) -> None:
    target, handle = host.instances.start("bert-1", SIZE)
    first, second = [gpu.uuid for gpu in await host.gpus.list_gpus()]
    freezer = host.freezer(HASTY)
    await freeze(freezer, handle)
    result = await freezer.wake(handle, {first: second})
    assert (result.outcome, result.reason) == (REFUSED, "CUDA_INVALID_VALUE")
    assert await freezer.condition(handle) is Condition.FROZEN
    assert (await freezer.wake(handle, {})).outcome is OK
    assert target.verify()
    freezer.forget(handle)


async def test_memory_taken_from_outside_refuses_before_the_thaw(host: Host) -> None:
    target, handle = host.instances.start("bert-1", SIZE)
    first = (await host.gpus.list_gpus())[0].uuid
    freezer = host.freezer(HASTY)
    await freeze(freezer, handle)
    free = (await host.gpus.memory_free())[first]
    host.nvidia.control.reserve(first, free - SIZE // 2)
    target.tell("verify")
    since = host.nvidia.control.oplog()[-1].seq
    try:
        result = await freezer.wake(handle, {})
        assert (result.outcome, result.reason) == (REFUSED, "GPU_MEMORY_SHORT")
        assert not target.answered()
        assert host.nvidia.control.oplog(since) == []
    finally:
        host.nvidia.control.reserve(first, 0)
    assert (await freezer.wake(handle, {})).outcome is OK
    assert target.read() == "intact"
    freezer.forget(handle)


async def test_unresponsive_nvml_delays_a_wake_only_by_its_limit(host: Host) -> None:
    target, handle = host.instances.start("bert-1", SIZE)
    second = (await host.gpus.list_gpus())[1].uuid
    freezer = host.freezer()
    await freeze(freezer, handle)
    host.nvidia.control.set_device(second, silent=True)
    try:
        began = time.monotonic()
        assert (await freezer.wake(handle, {})).outcome is OK
        assert time.monotonic() - began < 2
    finally:
        host.nvidia.control.set_device(second, silent=False)
    assert target.verify()
    freezer.forget(handle)


@pytest.mark.parametrize("operation", ["lock", "checkpoint"])
async def test_hang_ends_at_its_deadline_and_leaves_no_lock(host: Host, operation: str) -> None:
    """The driver holds the call until the plan is cleared and executes it then, after its caller was killed."""
    target, handle = host.instances.start("bert-1", SIZE)
    freezer = host.freezer(HASTY)
    host.nvidia.control.fault(operation, "HANG")
    workers = set(worker_pids())
    freezing = asyncio.create_task(attempt(freezer, handle))
    hung = await until_hung(host, target.pid)
    assert hung == [operation]
    while workers <= set(worker_pids()):  # noqa: ASYNC110 - until the caller has been killed
        await asyncio.sleep(0.01)
    host.nvidia.control.clear_faults()
    async with asyncio.timeout(10):
        result = await freezing
    assert (result.outcome, result.reason) == (REFUSED, "DRIVER_OPERATION_LOST")
    assert await asyncio.to_thread(target.verify)  # locked for a moment at most: the watch unlocks it
    await freeze(freezer, handle)
    assert (await freezer.wake(handle, {})).outcome is OK
    assert target.verify()
    freezer.forget(handle)


async def test_lock_lost_by_an_earlier_agent_is_undone_when_it_runs(host: Host) -> None:
    """Its agent was killed, so nothing knows of the call. A program that stayed locked would answer no request."""
    target, handle = host.instances.start("bert-1", MIB)
    host.nvidia.control.fault("lock", "HANG")
    earlier = host.freezer(HASTY)
    assert (await earlier.lock(handle)).reason == "DRIVER_OPERATION_LOST"
    earlier.forget(handle)
    freezer = host.freezer(HASTY)
    assert await freezer.condition(handle) is Condition.AWAKE
    host.nvidia.control.clear_faults()
    async with asyncio.timeout(10):
        assert await asyncio.to_thread(target.verify)
    freezer.forget(handle)


async def attempt(freezer: CudaFreezer, handle: Handle) -> FreezeResult:
    locked = await freezer.lock(handle)
    return locked if locked.outcome is not OK else await freezer.checkpoint(handle)


async def until_hung(host: Host, pid: int) -> list[str]:
    async with asyncio.timeout(10):
        while True:
            for process in host.nvidia.control.processes():
                if process.pid == pid and process.hung:
                    return process.hung
            await asyncio.sleep(0.01)


async def test_restored_program_is_checkpointed_before_its_kill(host: Host) -> None:
    target, handle = host.instances.start("bert-1", MIB)
    freezer = host.freezer()
    await freeze(freezer, handle)
    assert (await freezer.wake(handle, {})).outcome is OK
    await freezer.prepare_kill(handle)
    assert [p.state for p in host.nvidia.control.processes() if p.pid == target.pid] == ["CHECKPOINTED"]
    freezer.forget(handle)


@pytest.mark.parametrize(("migrates", "outcome"), [(False, REFUSED), (True, BROKEN)])
async def test_lost_restore_is_not_retried_where_instances_migrate(
    host: Host, migrates: bool, outcome: Outcome
) -> None:
    """It may run at a later thaw: harmless on its own GPU, but a GPU of its map may be another instance's by then."""
    _, handle = host.instances.start("bert-1", SIZE)
    freezer = host.freezer(replace(HASTY, migrates=migrates))
    await freeze(freezer, handle)
    host.nvidia.control.fault("restore", "HANG")
    assert (await freezer.wake(handle, {})).outcome is outcome
    freezer.forget(handle)

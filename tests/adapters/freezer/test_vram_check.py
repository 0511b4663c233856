"""Tests the room on the GPU before a restore, and restores on other GPUs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from agent.core.types import GIB, MIB
from agent.ports import Condition, CudaCall, CudaOp, CudaState, FreezerState, Outcome
from tests.adapters.freezer.world import LIMITS, FreezerRig
from tests.fakes.checkpointer import Fault
from tests.fakes.gpus import gpu

FIRST, SECOND = gpu(0).uuid, gpu(1).uuid
SWAP = {FIRST: SECOND, SECOND: FIRST}
IMAGE = 16 * MIB


def leave_free(world: FreezerRig, bytes_: int) -> None:
    """Leave this much free on every GPU, of 16 GiB."""
    world.gpus.reserved_bytes = 16 * GIB - bytes_


async def test_restore_without_room_changes_nothing(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.batches.clear()
    world.cgroups.calls.clear()
    leave_free(world, IMAGE - 1)
    result = await world.freezer.wake(world.handle, {})
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "GPU_MEMORY_SHORT")
    assert "has 15 MiB free, the restore needs 16 MiB" in result.message
    assert (world.cgroups.calls, world.driver.batches) == ([], [])
    leave_free(world, IMAGE)  # what NVML counted fits exactly: no margin
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_externally_thawed_instance_without_room_is_frozen_again(world: FreezerRig) -> None:
    await world.freeze()
    await world.cgroups.thaw(world.handle)
    leave_free(world, 0)
    assert (await world.freezer.wake(world.handle, {})).reason == "GPU_MEMORY_SHORT"
    assert world.cgroups.now is FreezerState.FROZEN


async def test_room_is_checked_on_the_target_gpu(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.processes[4711] = other = type(world.driver.processes[world.main])(vram_bytes=16 * GIB)
    other.gpu_uuid = SECOND
    assert (await world.freezer.wake(world.handle, SWAP)).reason == "GPU_MEMORY_SHORT"
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_image_of_unknown_size_is_restored_unchecked(world: FreezerRig) -> None:
    await world.freeze()
    leave_free(world, 0)
    again = world.restarted()
    assert (await again.wake(world.handle, {})).outcome is Outcome.OK
    assert "memory_free" not in world.gpus.calls
    again.forget(world.handle)


async def test_nvml_failure_does_not_delay_a_wake(world: FreezerRig) -> None:
    await world.freeze()
    world.gpus.unavailable = True
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_unresponsive_nvml_delays_one_wake_only(world: FreezerRig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def never() -> Mapping[str, int]:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(world.gpus, "memory_free", never)
    for _ in range(2):
        await world.freeze()
        async with asyncio.timeout(LIMITS.memory_query_s + 1):
            assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK
    assert asked == 1


async def test_gpu_missing_in_nvml_is_left_to_the_driver(world: FreezerRig) -> None:
    await world.freeze()
    world.gpus.gpus = [gpu(1)]
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.OK


async def test_tracked_memory_follows_a_migration(world: FreezerRig) -> None:
    await world.freeze()
    assert (await world.freezer.wake(world.handle, SWAP)).outcome is Outcome.OK
    assert world.driver.processes[world.main].gpu_uuid == SECOND
    world.driver.processes[world.main].state = CudaState.LOCKED
    world.driver.faults.append(Fault(CudaOp.UNLOCK, stuck=True))
    await world.freezer.unlock(world.handle)
    assert world.driver.stuck_gpus == [(SECOND,)]  # the GPU to be cordoned


async def test_incomplete_gpu_map_is_refused_and_leaves_it_frozen(world: FreezerRig) -> None:
    world.driver.gpu_uuids = (FIRST, SECOND)
    await world.freeze()
    result = await world.freezer.wake(world.handle, {FIRST: SECOND})
    assert (result.outcome, result.reason) == (Outcome.REFUSED, "CUDA_INVALID_VALUE")
    assert (world.states(), world.cgroups.now) == ({CudaState.CHECKPOINTED}, FreezerState.FROZEN)
    assert (await world.freezer.wake(world.handle, SWAP)).outcome is Outcome.OK


async def test_identity_gpu_map_counts_as_none(world: FreezerRig) -> None:
    await world.freeze()
    await world.freezer.wake(world.handle, {FIRST: FIRST, SECOND: SECOND})
    assert {call.gpu_map for batch in world.driver.batches for call in batch} == {()}


async def test_second_process_follows_a_migrated_one(world: FreezerRig) -> None:
    second = world.add_process()
    await world.freeze()
    world.driver.faults.append(Fault(CudaOp.RESTORE, 2, pid=max(world.main, second)))
    assert (await world.freezer.wake(world.handle, SWAP)).outcome is Outcome.OK
    assert world.states() == {CudaState.RUNNING}
    assert {process.gpu_uuid for process in world.driver.processes.values()} == {SECOND}


async def test_no_images_of_different_gpus(world: FreezerRig) -> None:
    second = max(world.main, world.add_process())
    await world.freeze()
    world.driver.batches.clear()
    world.driver.faults += [Fault(CudaOp.RESTORE, 2, pid=second)] * 9
    result = await world.freezer.wake(world.handle, SWAP)
    assert (result.outcome, result.reason) == (Outcome.BROKEN, "CUDA_UNSETTLED")
    assert world.driver.operations.count((CudaOp.RESTORE, second)) == 2  # once more, never a loop
    assert CudaOp.CHECKPOINT not in {op for op, _ in world.driver.operations}


async def test_late_restore_on_the_old_gpu_is_detected(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(CudaOp.RESTORE, later=True))
    assert (await world.freezer.wake(world.handle, {})).outcome is Outcome.REFUSED
    # The thaw of this wake lets the hung restore run before the new one.
    result = await world.freezer.wake(world.handle, SWAP)
    assert (result.outcome, result.reason) == (Outcome.BROKEN, "CUDA_ON_WRONG_GPU")


async def test_placement_after_a_hang_comes_from_nvml(world: FreezerRig) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(CudaOp.RESTORE, hang=True, executes=True))
    world.gpus.unavailable = True
    result = await world.freezer.wake(world.handle, SWAP)
    assert (result.outcome, result.reason) == (Outcome.BROKEN, "NVML_UNAVAILABLE")


async def test_placement_is_verified_after_the_reply(world: FreezerRig) -> None:
    await world.freeze()
    with capture_logs() as logs:
        assert (await world.freezer.wake(world.handle, SWAP)).outcome is Outcome.OK
        assert "processes" not in world.gpus.calls[-1:]  # the request does not wait for it
        world.driver.processes[world.main].gpu_uuid = FIRST  # the driver lied
        await others()
    assert [entry["event"] for entry in logs] == ["wake.on_wrong_gpu"]


async def test_placement_is_verified_after_a_restart(world: FreezerRig) -> None:
    """The image's size and GPUs are unknown then, but not the GPUs that the instance was given."""
    await world.freeze()
    again = world.restarted()
    with capture_logs() as logs:
        assert (await again.wake(world.handle, SWAP, (SECOND,))).outcome is Outcome.OK
        world.driver.processes[world.main].gpu_uuid = FIRST
        await others()
    again.forget(world.handle)
    assert [entry["event"] for entry in logs] == ["wake.on_wrong_gpu"]


@pytest.mark.parametrize("gpu_map", [{}, SWAP], ids=["same GPU", "other GPU"])
async def test_late_restore_is_detected_after_a_restart(world: FreezerRig, gpu_map: dict[str, str]) -> None:
    """A restore that the last agent lost runs at this thaw, by its own map."""
    await world.freeze()
    lost = CudaCall(CudaOp.RESTORE, world.main, gpu_map=() if gpu_map else tuple(SWAP.items()))
    world.driver.processes[world.main].stale_operations.append(lost)
    again = world.restarted()
    result = await again.wake(world.handle, gpu_map, (SECOND if gpu_map else FIRST,))
    again.forget(world.handle)
    assert (result.outcome, result.reason) == (Outcome.BROKEN, "CUDA_ON_WRONG_GPU")


@pytest.mark.parametrize("restarted", [False, True])
async def test_worker_stuck_in_a_restore_cordons_the_gpu_restored_to(world: FreezerRig, restarted: bool) -> None:
    await world.freeze()
    world.driver.faults.append(Fault(CudaOp.RESTORE, stuck=True))
    freezer = world.restarted() if restarted else world.freezer
    assert (await freezer.wake(world.handle, SWAP, (SECOND,))).outcome is Outcome.BROKEN
    freezer.forget(world.handle)
    assert world.driver.stuck_gpus == [(SECOND,)]


async def others() -> None:
    """Wait until every other task has ended."""
    with suppress(asyncio.CancelledError):
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))


@pytest.mark.parametrize(("migrates", "condition"), [(False, Condition.CHECKPOINTED), (True, Condition.BROKEN)])
async def test_mixed_states_are_finished_only_without_migration(
    world: FreezerRig, migrates: bool, condition: Condition
) -> None:
    world.add_process()
    world.driver.processes[world.main].state = CudaState.CHECKPOINTED
    assert await world.restarted(replace(LIMITS, migrates=migrates)).condition(world.handle) is condition


async def test_restarted_agent_recognises_an_instance_frozen_from_another_gpu(world: FreezerRig) -> None:
    await world.freeze()
    await world.freezer.wake(world.handle, SWAP)
    await world.freeze()
    assert await world.restarted().condition(world.handle) is Condition.FROZEN

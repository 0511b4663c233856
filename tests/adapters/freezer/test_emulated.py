"""Tests real freezes and wakes: CUDA programs with GPU memory, workers, cgroups, and NVML as proof."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent.core.types import MIB
from agent.ports import Condition, Outcome
from tests.adapters.freezer.host import SIZE, Host, freeze
from tests.fakes.driver_callers import worker_pids
from tests.fakes.emulated_driver import CudaTarget


async def test_memory_is_bit_identical_after_freeze_and_wake(host: Host) -> None:
    target, handle = host.instances.start("bert-1", SIZE)
    freezer = host.freezer()
    assert await freezer.vram_bytes(handle) >= SIZE
    assert await freeze(freezer, handle) >= SIZE
    assert await freezer.vram_bytes(handle) == 0
    assert await freezer.condition(handle) is Condition.FROZEN
    result = await freezer.wake(handle, {})
    assert (result.outcome, result.driver_ns > 0) == (Outcome.OK, True)
    assert target.verify()
    freezer.forget(handle)


async def test_byte_changed_while_frozen_is_detected_by_the_program(host: Host) -> None:
    target, handle = host.instances.start("bert-2", SIZE)
    freezer = host.freezer()
    await freeze(freezer, handle)
    host.nvidia.control.flip_byte(pid=target.pid, offset=SIZE // 2)
    await freezer.wake(handle, {})
    assert not target.verify()
    freezer.forget(handle)


async def test_frozen_program_is_idle_and_answers_after_the_wake(host: Host) -> None:
    target, handle = host.instances.start("bert-3", SIZE)
    freezer = host.freezer()
    await freeze(freezer, handle)
    target.tell("verify")
    assert host.cgroups.is_frozen(handle)
    assert not target.answered()
    await freezer.wake(handle, {})
    assert target.read() == "intact"
    freezer.forget(handle)


async def test_two_cuda_processes_of_one_instance_freeze_together(host: Host) -> None:
    server, handle = host.instances.start("tgi-1", SIZE)
    if not handle.cgroup:
        pytest.skip("a second program gets into the instance only through a writable cgroup v2")
    worker = CudaTarget(host.instances.environment, Path(handle.cgroup))
    host.instances.targets["tgi-1-worker"] = worker
    worker.fill(SIZE, seed=11)
    freezer = host.freezer()
    assert await freeze(freezer, handle) >= 2 * SIZE
    assert (await freezer.wake(handle, {})).outcome is Outcome.OK
    assert server.verify()
    assert worker.verify()
    freezer.forget(handle)


async def test_instance_without_cuda_freezes(host: Host) -> None:
    target, handle = host.instances.start("proxy-1", None)
    freezer = host.freezer()
    assert await freeze(freezer, handle) == 0
    target.tell("fill 0 1")
    assert not target.answered()
    assert (await freezer.wake(handle, {})).outcome is Outcome.OK
    assert target.read().startswith("filled")


async def test_cancelled_freeze_leaves_it_running(host: Host) -> None:
    target, handle = host.instances.start("bert-4", SIZE)
    freezer = host.freezer()
    assert (await freezer.lock(handle)).outcome is Outcome.OK
    target.tell("verify")
    assert (await freezer.unlock(handle)).outcome is Outcome.OK
    assert target.read() == "intact"


async def test_restarted_agent_wakes_frozen_instances(host: Host) -> None:
    target, handle = host.instances.start("bert-5", SIZE)
    before = host.freezer()
    await freeze(before, handle)
    after = host.freezer()
    assert await after.condition(handle) is Condition.FROZEN
    assert (await after.wake(handle, {})).outcome is Outcome.OK
    assert target.verify()
    before.forget(handle)
    after.forget(handle)


async def test_external_pause_is_recognised_and_undone(host: Host) -> None:
    target, handle = host.instances.start("bert-6", SIZE)
    await host.cgroups.freeze(handle)
    freezer = host.freezer()
    assert (await freezer.lock(handle)).reason == "EXTERNALLY_FROZEN"
    assert await freezer.condition(handle) is Condition.PAUSED_BY_OTHERS
    await freezer.thaw(handle)
    assert await freezer.condition(handle) is Condition.AWAKE
    assert target.verify()


async def test_freeze_interrupted_by_the_agents_death_is_continued(host: Host) -> None:
    target, handle = host.instances.start("bert-7", SIZE)
    died = host.freezer()
    await freeze(died, handle)
    await host.cgroups.thaw(handle)  # as if the agent had died before the cgroup freeze
    after = host.freezer()
    assert await after.condition(handle) is Condition.CHECKPOINTED
    assert (await after.finish_freeze(handle)).outcome is Outcome.OK
    assert (await after.wake(handle, {})).outcome is Outcome.OK
    assert target.verify()
    died.forget(handle)
    after.forget(handle)


async def test_instance_wakes_on_another_gpu(host: Host) -> None:
    target, handle = host.instances.start("bert-8", SIZE)
    first, second = [gpu.uuid for gpu in await host.gpus.list_gpus()]
    freezer = host.freezer()
    await freeze(freezer, handle)
    result = await freezer.wake(handle, {first: second, second: first})
    assert result.outcome is Outcome.OK, result
    assert target.verify()
    places = {entry.gpu_uuid for entry in await host.gpus.processes() if entry.pid == target.pid}
    assert places == {second}
    freezer.forget(handle)


async def test_externally_killed_workers_only_delay_a_wake(host: Host) -> None:
    target, handle = host.instances.start("bert-9", SIZE)
    freezer = host.freezer()
    await freeze(freezer, handle)
    kill_dead(worker_pids())
    assert (await freezer.wake(handle, {})).outcome is Outcome.OK
    assert target.verify()
    freezer.forget(handle)


def kill_dead(pids: Sequence[int]) -> None:
    """Kill child processes and wait until they are dead, without reaping them."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_several_instances_freeze_and_wake_concurrently(host: Host) -> None:
    pairs = [host.instances.start(f"many-{index}", MIB) for index in range(4)]
    freezer = host.freezer()
    for _ in range(3):
        await asyncio.gather(*(freeze(freezer, handle) for _, handle in pairs))
        woken = await asyncio.gather(*(freezer.wake(handle, {}) for _, handle in pairs))
        assert {result.outcome for result in woken} == {Outcome.OK}
    assert all(target.verify() for target, _ in pairs)
    for _, handle in pairs:
        freezer.forget(handle)

"""A process on a GPU that its instance does not hold is killed; everything else is left alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from agent.core.types import MIB, GpuProcess, Handle, InstanceState
from agent.host.gpus.gpu_isolation import GpuIsolation
from agent.host.instance.actor import Actor
from tests.host.rig import NodeRig, node_rig, until

STRAY = 5150


@dataclass
class Checked:
    rig: NodeRig
    isolation: GpuIsolation
    shown: list[GpuProcess] = field(default_factory=list)

    def uuid(self, index: int) -> str:
        return self.rig.gpus.gpus[index].uuid

    def show(self, index: int, pid: int, size: int = 64 * MIB) -> None:
        self.shown.append(GpuProcess(self.uuid(index), pid, size))

    def stray_of(self, actor: Actor, pid: int = STRAY) -> None:
        self.rig.runtime.containers[actor.uid].extra_pids.append(pid)

    def other(self, actor: Actor) -> int:
        """Index of the GPU that it does not hold."""
        return 1 if actor.gpu_uuids == (self.uuid(0),) else 0

    @property
    def kills(self) -> int:
        return sum(name == "kill_processes" for name, _ in self.rig.runtime.calls)


@asynccontextmanager
async def isolation_rig() -> AsyncIterator[Checked]:
    async with node_rig() as rig:
        isolation = GpuIsolation(rig.gpus, rig.runtime, rig.node.broker, rig.node.actors, rig.events)
        made = Checked(rig, isolation)
        rig.gpus.processes_now = lambda: made.shown
        yield made
        made.shown.clear()


async def test_process_on_a_foreign_gpu_is_killed_at_the_second_check() -> None:
    async with isolation_rig() as it:
        actor = await it.rig.running()
        it.stray_of(actor)
        it.show(it.other(actor), STRAY)
        await it.isolation.check()
        assert it.kills == 0
        await it.isolation.check()
        assert it.rig.runtime.containers[actor.uid].extra_pids == []
        assert actor.state is InstanceState.RUNNING
        (message,) = it.rig.messages("gpu.isolation_violated")
        assert all(word in message for word in (str(STRAY), actor.uid, it.uuid(it.other(actor))))
        await it.isolation.check()  # NVML still shows it for a moment
        assert (it.kills, len(it.rig.messages("gpu.isolation_violated"))) == (1, 1)


async def test_own_gpu_small_use_and_unknown_processes_are_left_alone() -> None:
    async with isolation_rig() as it:
        actor = await it.rig.running()
        it.stray_of(actor)
        it.show(1 - it.other(actor), STRAY)
        it.show(it.other(actor), STRAY, MIB - 1)
        it.show(it.other(actor), 4242)  # of no instance
        for _ in range(3):
            await it.isolation.check()
        assert (it.kills, it.rig.messages("gpu.isolation_violated")) == (0, [])


async def test_process_of_a_frozen_instance_on_a_gpu_is_killed() -> None:
    async with isolation_rig() as it:
        actor = await it.rig.frozen()
        it.stray_of(actor)
        it.show(0, STRAY)
        await it.isolation.check()
        await it.isolation.check()
        assert it.kills == 1


async def test_two_violations_that_are_not_in_a_row_do_not_kill() -> None:
    async with isolation_rig() as it:
        actor = await it.rig.running()
        it.stray_of(actor)
        for _ in range(3):
            it.show(it.other(actor), STRAY)
            await it.isolation.check()
            it.shown.clear()
            await it.isolation.check()
        assert it.kills == 0


async def test_pid_that_left_the_instance_is_not_killed() -> None:
    async with isolation_rig() as it:
        actor = await it.rig.running()
        it.stray_of(actor)
        it.show(it.other(actor), STRAY)
        await it.isolation.check()
        it.rig.runtime.containers[actor.uid].extra_pids.clear()  # its pid belongs to another process now
        for _ in range(3):
            await it.isolation.check()
        assert (it.kills, it.rig.messages("gpu.isolation_violated")) == (0, [])


async def test_pid_seen_before_its_container_was_known_is_looked_up_again() -> None:
    async with isolation_rig() as it:
        actor = await it.rig.running()
        it.stray_of(actor)
        it.show(it.other(actor), STRAY)
        handle, actor.handle_of_container = actor.handle_of_container, None
        await it.isolation.check()
        actor.handle_of_container = handle
        for _ in range(2):
            await it.isolation.check()
        assert it.kills == 1


async def test_pid_seen_while_its_container_was_unreadable_is_looked_up_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with isolation_rig() as it:
        actor = await it.rig.running()
        it.stray_of(actor)
        it.show(it.other(actor), STRAY)

        async def refuse(handle: Handle) -> Collection[int]:
            raise OSError("no file descriptors left")

        with monkeypatch.context() as patch:
            patch.setattr(it.rig.runtime, "pids", refuse)
            await it.isolation.check()
        for _ in range(2):
            await it.isolation.check()
        assert it.kills == 1


async def test_ended_instance_is_ignored() -> None:
    async with isolation_rig() as it:
        actor = await it.rig.running()
        handle = actor.handle_of_container
        assert handle is not None
        it.show(it.other(actor), handle.process.pid)
        await it.isolation.check()
        await it.rig.runtime.kill(handle)
        await until(actor, InstanceState.FAILED)
        await it.isolation.check()
        assert it.kills == 0


async def test_check_sums_the_gpu_memory_of_every_instance() -> None:
    async with isolation_rig() as it:
        actor = await it.rig.running()
        it.stray_of(actor)
        handle = actor.handle_of_container
        assert handle is not None
        mine = 0 if actor.gpu_uuids == (it.uuid(0),) else 1
        it.show(mine, handle.process.pid, 64 * MIB)
        it.show(mine, STRAY, 32 * MIB)
        it.show(mine, 4711, 16 * MIB)  # of no instance
        await it.isolation.check()
        assert it.isolation.vram_bytes == {actor.uid: 96 * MIB}
        it.shown.clear()
        it.rig.gpus.errors[it.uuid(mine)] = "GPU is lost"
        await it.isolation.check()
        assert it.isolation.vram_bytes == {actor.uid: 96 * MIB}, "a GPU that does not answer keeps its last value"

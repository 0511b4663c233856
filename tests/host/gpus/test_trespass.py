"""A process on a GPU that its instance does not hold is killed; everything else is left alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from agent.core.types import MIB, GpuProcess, Handle, InstanceState
from agent.host.gpus.trespass import GpuIsolation
from agent.host.instance.actor import Actor
from tests.host.rig import World, a_world, until

STRAY = 5150


@dataclass
class Patrol:
    world: World
    trespass: GpuIsolation
    shown: list[GpuProcess] = field(default_factory=list)

    def uuid(self, index: int) -> str:
        return self.world.gpus.gpus[index].uuid

    def show(self, index: int, pid: int, size: int = 64 * MIB) -> None:
        self.shown.append(GpuProcess(self.uuid(index), pid, size))

    def stray_of(self, actor: Actor, pid: int = STRAY) -> None:
        self.world.runtime.containers[actor.uid].extra_pids.append(pid)

    def other(self, actor: Actor) -> int:
        """Index of the GPU that it does not hold."""
        return 1 if actor.gpu_uuids == (self.uuid(0),) else 0

    @property
    def kills(self) -> int:
        return sum(name == "kill_processes" for name, _ in self.world.runtime.calls)


@asynccontextmanager
async def patrol() -> AsyncIterator[Patrol]:
    async with a_world() as world:
        trespass = GpuIsolation(world.gpus, world.runtime, world.node.desk, world.node.actors, world.events)
        made = Patrol(world, trespass)
        world.gpus.processes_now = lambda: made.shown
        yield made
        made.shown.clear()


async def test_a_trespasser_is_killed_at_the_second_look_and_told_of_once() -> None:
    async with patrol() as it:
        actor = await it.world.running()
        it.stray_of(actor)
        it.show(it.other(actor), STRAY)
        await it.trespass.look()
        assert it.kills == 0
        await it.trespass.look()
        assert it.world.runtime.containers[actor.uid].extra_pids == []
        assert actor.state is InstanceState.RUNNING
        (message,) = it.world.messages("GPU_TRESPASS")
        assert all(word in message for word in (str(STRAY), actor.uid, it.uuid(it.other(actor))))
        await it.trespass.look()  # NVML still shows it for a moment
        assert (it.kills, len(it.world.messages("GPU_TRESPASS"))) == (1, 1)


async def test_what_is_on_its_own_gpu_or_small_or_a_stranger_is_left_alone() -> None:
    async with patrol() as it:
        actor = await it.world.running()
        it.stray_of(actor)
        it.show(1 - it.other(actor), STRAY)
        it.show(it.other(actor), STRAY, MIB - 1)
        it.show(it.other(actor), 4242)  # somebody else's
        for _ in range(3):
            await it.trespass.look()
        assert (it.kills, it.world.messages("GPU_TRESPASS")) == (0, [])


async def test_a_frozen_instance_holds_nothing() -> None:
    async with patrol() as it:
        actor = await it.world.frozen()
        it.stray_of(actor)
        it.show(0, STRAY)
        await it.trespass.look()
        await it.trespass.look()
        assert it.kills == 1


async def test_two_looks_that_are_not_in_a_row_do_not_count() -> None:
    async with patrol() as it:
        actor = await it.world.running()
        it.stray_of(actor)
        for _ in range(3):
            it.show(it.other(actor), STRAY)
            await it.trespass.look()
            it.shown.clear()
            await it.trespass.look()
        assert it.kills == 0


async def test_a_pid_that_is_not_the_instance_s_any_more_is_not_touched() -> None:
    async with patrol() as it:
        actor = await it.world.running()
        it.stray_of(actor)
        it.show(it.other(actor), STRAY)
        await it.trespass.look()
        it.world.runtime.containers[actor.uid].extra_pids.clear()  # its number is somebody else's now
        for _ in range(3):
            await it.trespass.look()
        assert (it.kills, it.world.messages("GPU_TRESPASS")) == (0, [])


async def test_who_was_seen_before_its_container_was_known_is_no_stranger_for_ever() -> None:
    async with patrol() as it:
        actor = await it.world.running()
        it.stray_of(actor)
        it.show(it.other(actor), STRAY)
        handle, actor.handle_of_container = actor.handle_of_container, None
        await it.trespass.look()
        actor.handle_of_container = handle
        for _ in range(2):
            await it.trespass.look()
        assert it.kills == 1


async def test_who_was_seen_while_its_container_could_not_be_asked_is_no_stranger_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with patrol() as it:
        actor = await it.world.running()
        it.stray_of(actor)
        it.show(it.other(actor), STRAY)

        async def refuse(handle: Handle) -> Collection[int]:
            raise OSError("no file descriptors left")

        with monkeypatch.context() as patch:
            patch.setattr(it.world.runtime, "pids", refuse)
            await it.trespass.look()
        for _ in range(2):
            await it.trespass.look()
        assert it.kills == 1


async def test_an_instance_that_has_ended_is_not_our_business() -> None:
    async with patrol() as it:
        actor = await it.world.running()
        handle = actor.handle_of_container
        assert handle is not None
        it.show(it.other(actor), handle.process.pid)
        await it.trespass.look()
        await it.world.runtime.kill(handle)
        await until(actor, InstanceState.FAILED)
        await it.trespass.look()
        assert it.kills == 0


async def test_a_look_tells_the_gpu_memory_of_every_instance() -> None:
    async with patrol() as it:
        actor = await it.world.running()
        it.stray_of(actor)
        handle = actor.handle_of_container
        assert handle is not None
        mine = 0 if actor.gpu_uuids == (it.uuid(0),) else 1
        it.show(mine, handle.process.pid, 64 * MIB)
        it.show(mine, STRAY, 32 * MIB)
        it.show(mine, 4711, 16 * MIB)  # a stranger's
        await it.trespass.look()
        assert it.trespass.vram_bytes == {actor.uid: 96 * MIB}
        it.shown.clear()
        it.world.gpus.errors[it.uuid(mine)] = "GPU is lost"
        await it.trespass.look()
        assert it.trespass.vram_bytes == {actor.uid: 96 * MIB}, "what NVML does not show is not gone"

"""One contract, held by the fake and by the real runtime, so that the fake can't drift."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import AsyncIterator

import pytest

from agent.adapters import cgroup
from agent.core.errors import ConflictError, InstanceError, InvalidArgumentError, PreconditionError
from agent.core.types import FunctionSpec, InstanceSpec
from agent.ports import StartSpec
from tests.contract.runtime_worlds import FakeWorld, ProcessWorld, World

WORLDS = ["fake", "process in a cgroup", "process tree", "process of another user"]


@pytest.fixture(params=WORLDS)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made = _make_world(request.param)
    yield made
    await made.close()


def _make_world(kind: str) -> World:
    if kind == "fake":
        return FakeWorld()
    if kind == "process tree":
        return ProcessWorld(fenced=False)
    if cgroup.open_slice(str(uuid.uuid4())) is None:
        pytest.skip("this user can't write a v2 cgroup here")
    if kind == "process in a cgroup":
        return ProcessWorld(fenced=True)
    if os.geteuid() != 0:
        pytest.skip("only root can start a process as another user")
    return ProcessWorld(fenced=True, user="nobody")


async def test_a_started_instance_is_alive_listed_and_leaves_nothing(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    assert handle.uid == "resize-a"
    assert handle.host == "127.0.0.1"
    assert 0 < handle.port < 65536
    assert await world.runtime.alive(handle)
    assert list(await world.runtime.list_handles()) == [handle]
    assert handle.process.pid in await world.runtime.pids(handle)

    await world.runtime.kill(handle)
    assert not await world.runtime.alive(handle)
    assert list(await world.runtime.list_handles()) == [handle]
    await world.runtime.destroy(handle)
    assert list(await world.runtime.list_handles()) == []
    assert world.traces("resize-a") == []


async def test_wait_tells_the_exit_code_to_everyone_who_waits(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    first, second = asyncio.create_task(world.runtime.wait(handle)), asyncio.create_task(world.runtime.wait(handle))
    await world.exit_now(handle, 3)
    for exit_ in await asyncio.gather(first, second):
        assert (exit_.code, exit_.signal, exit_.oom_killed) == (3, 0, False)
        assert exit_.message == "exited with code 3"
    assert (await world.runtime.wait(handle)).code == 3


async def test_a_cancelled_wait_harms_nobody(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    impatient, patient = (asyncio.create_task(world.runtime.wait(handle)) for _ in range(2))
    await asyncio.sleep(0)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    await world.exit_now(handle, 0)
    assert (await patient).code == 0


async def test_terminate_is_a_sigterm(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    await world.runtime.terminate(handle)
    exit_ = await world.runtime.wait(handle)
    assert (exit_.signal, exit_.oom_killed) == (15, False)
    await world.runtime.terminate(handle)  # gone: a no-op


async def test_who_ignores_sigterm_is_killed(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a", stubborn=True))
    await world.settled(handle, stubborn=True)
    await world.runtime.terminate(handle)
    assert await world.runtime.alive(handle)
    await world.runtime.kill(handle)
    exit_ = await world.runtime.wait(handle)
    assert (exit_.signal, exit_.oom_killed) == (9, False)


async def test_a_stray_child_is_found_and_killed_with_the_rest(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    await world.fork_stray(handle)
    assert len(await world.runtime.pids(handle)) > 1
    await world.exit_now(handle, 0)
    await world.runtime.wait(handle)
    assert not await world.runtime.alive(handle)
    assert await world.runtime.pids(handle), "the stray outlives its parent"
    await world.runtime.kill(handle)
    assert list(await world.runtime.pids(handle)) == []


async def test_single_processes_are_killed_and_strangers_are_not(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    neighbour = await world.runtime.start(world.spec("resize-b"))
    await world.settled(neighbour)
    await world.fork_stray(handle)
    strays = [pid for pid in await world.runtime.pids(handle) if pid != handle.process.pid]
    assert strays

    await world.runtime.kill_processes(handle, [*strays, neighbour.process.pid, os.getpid(), 2**22 + 1])
    for _look in range(1000):  # they are listed until the kernel has buried them
        if not set(await world.runtime.pids(handle)) & set(strays):
            break
        await asyncio.sleep(0.01)
    assert list(await world.runtime.pids(handle)) == [handle.process.pid]
    assert await world.runtime.alive(handle)
    assert await world.runtime.alive(neighbour)

    await world.runtime.kill_processes(handle, [handle.process.pid])
    exit_ = await world.runtime.wait(handle)
    assert (exit_.signal, exit_.oom_killed) == (9, False)
    assert await world.runtime.alive(neighbour)


async def test_a_failed_start_says_why_and_leaves_nothing(world: World) -> None:
    with pytest.raises(InstanceError, match="No such file or directory") as raised:
        await world.runtime.start(world.breakable("resize-a"))
    assert raised.value.reason == "START_FAILED"
    assert list(await world.runtime.list_handles()) == []
    assert world.traces("resize-a") == []


async def test_the_same_uid_again_replaces_what_was_left(world: World) -> None:
    first = await world.runtime.start(world.spec("resize-a"))
    await world.settled(first)
    second = await world.runtime.start(world.spec("resize-a"))
    await world.settled(second)
    assert second.process != first.process
    assert not await world.runtime.alive(first)
    assert await world.runtime.alive(second)
    assert list(await world.runtime.list_handles()) == [second]

    await world.runtime.terminate(first)
    await world.runtime.kill(first)
    await world.runtime.destroy(first)
    assert list(await world.runtime.pids(first)) == []
    assert await world.runtime.alive(second), "a stale handle harms nobody"
    ending = asyncio.create_task(world.runtime.wait(second))
    assert (await world.runtime.wait(first)).code == -1
    await world.exit_now(second, 5)
    assert (await ending).code == 5


async def test_two_starts_of_one_uid_at_once_are_refused(world: World) -> None:
    both = await asyncio.gather(
        world.runtime.start(world.spec("resize-a")), world.runtime.start(world.spec("resize-a")), return_exceptions=True
    )
    refused = [answer for answer in both if isinstance(answer, ConflictError)]
    # The fake starts at once, so that its two starts do not overlap: the second replaces the first.
    assert len(refused) == (0 if isinstance(world, FakeWorld) else 1)
    assert len(await world.runtime.list_handles()) == 1


async def test_destroy_twice_and_kill_afterwards_are_harmless(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.runtime.destroy(handle)
    await world.runtime.destroy(handle)
    await world.runtime.kill(handle)
    assert not await world.runtime.alive(handle)
    assert world.traces("resize-a") == []


async def test_the_log_is_read_from_its_end_and_outlives_the_instance(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    await world.speak(handle, "resized 17 pictures")
    assert (await world.runtime.read_log(handle, 65536)).startswith(b"hello from")
    assert await world.runtime.read_log(handle, 9) == b"pictures\n"
    assert await world.runtime.read_log(handle, 0) == b""
    await world.runtime.destroy(handle)
    assert await world.runtime.read_log(handle, 9) == b"pictures\n"


async def test_containers_outlive_the_agent(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    world.restart_agent()
    assert list(await world.runtime.list_handles()) == [handle]
    assert await world.runtime.alive(handle)
    waiting = asyncio.create_task(world.runtime.wait(handle))
    await world.exit_now(handle, 0)
    await waiting
    assert not await world.runtime.alive(handle)


async def test_instances_have_ports_of_their_own(world: World) -> None:
    handles = await asyncio.gather(*(world.runtime.start(world.spec(f"resize-{letter}")) for letter in "abc"))
    assert len({handle.port for handle in handles}) == 3
    assert [handle.uid for handle in await world.runtime.list_handles()] == ["resize-a", "resize-b", "resize-c"]


async def test_what_can_not_run_here_is_refused(world: World) -> None:
    with pytest.raises(PreconditionError) as raised:
        await world.runtime.start(world.spec("resize-a", image="registry.example/resize:1"))
    assert raised.value.reason == "IMAGE_RUNTIME_UNAVAILABLE"
    nothing = StartSpec(InstanceSpec("resize-a", "resize/1/0", FunctionSpec(name="resize")), {}, ())
    with pytest.raises(InvalidArgumentError) as empty:
        await world.runtime.start(nothing)
    assert empty.value.reason == "COMMAND_MISSING"
    assert world.traces("resize-a") == []

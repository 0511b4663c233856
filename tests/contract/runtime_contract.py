"""The contract of every runtime: it runs on the fake, on processes of the host, and on containers of Docker and Podman.
A test file imports these tests beside a fixture `world`.
"""

from __future__ import annotations

import asyncio
import os

import pytest

from agent.core.errors import ConflictError, InstanceError, PreconditionError
from agent.core.types import Handle
from agent.ports import ExecSpec
from tests.contract.runtime_worlds import FakeWorld, World


async def test_a_started_instance_is_alive_listed_and_leaves_nothing(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    assert handle.uid == "resize-a"
    assert world.reachable_at(handle)
    assert await world.runtime.alive(handle)
    assert list(await world.runtime.list_handles()) == [handle]
    assert handle.process.pid in await world.runtime.pids(handle)

    await world.runtime.kill(handle)
    assert not await world.runtime.alive(handle)
    assert list(await world.runtime.list_handles()) == [handle]
    await world.runtime.destroy(handle)
    assert list(await world.runtime.list_handles()) == []
    assert world.traces("resize-a") == []


async def test_wait_gives_the_exit_code_to_every_waiter(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    first, second = asyncio.create_task(world.runtime.wait(handle)), asyncio.create_task(world.runtime.wait(handle))
    await world.exit_now(handle, 3)
    for exit_ in await asyncio.gather(first, second):
        assert (exit_.code, exit_.signal, exit_.oom_killed) == (3, 0, False)
        assert exit_.message == "exited with code 3"
    assert (await world.runtime.wait(handle)).code == 3


async def test_a_cancelled_wait_disturbs_no_other(world: World) -> None:
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
    # The main process of a container is its init: without a handler it ignores the signal, so it has one and exits.
    assert (exit_.code, exit_.signal, exit_.oom_killed) in {(-1, 15, False), (143, 0, False)}
    await world.runtime.terminate(handle)  # gone: a no-op


async def test_process_that_ignores_sigterm_is_killed(world: World) -> None:
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
    if world.strays_outlive:
        assert await world.runtime.pids(handle), "the stray outlives its parent"
    await world.runtime.kill(handle)
    assert list(await world.runtime.pids(handle)) == []


async def test_single_processes_are_killed_and_foreign_ones_are_not(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    neighbour = await world.runtime.start(world.spec("resize-b"))
    await world.settled(neighbour)
    await world.fork_stray(handle)
    strays = [pid for pid in await world.runtime.pids(handle) if pid != handle.process.pid]
    assert strays

    await world.runtime.kill_processes(handle, [*strays, neighbour.process.pid, os.getpid(), 2**22 + 1])
    for _look in range(1000):  # they are listed until the kernel has reaped them
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
    with pytest.raises(InstanceError, match=r"(?i)no such file or directory") as raised:
        await world.runtime.start(world.breakable("resize-a"))
    assert raised.value.reason == world.breakable_reason
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
    await world.restart_agent()
    assert list(await world.runtime.list_handles()) == [handle]
    assert await world.runtime.alive(handle)
    waiting = asyncio.create_task(world.runtime.wait(handle))
    await world.exit_now(handle, 0)
    await waiting
    assert not await world.runtime.alive(handle)


async def test_instances_have_addresses_of_their_own(world: World) -> None:
    handles = await asyncio.gather(*(world.runtime.start(world.spec(f"resize-{letter}")) for letter in "abc"))
    assert len({(handle.host, handle.port) for handle in handles}) == 3
    assert [handle.uid for handle in await world.runtime.list_handles()] == ["resize-a", "resize-b", "resize-c"]


async def test_unsupported_function_is_refused(world: World) -> None:
    with pytest.raises(PreconditionError) as raised:
        world.runtime.accepts(world.spec("resize-a", image=world.foreign_image).instance.function)
    assert raised.value.reason == world.foreign_reason


async def test_present_image_is_prepared_at_once(world: World) -> None:
    said: list[str] = []
    function = world.spec("resize-a").instance.function
    await asyncio.gather(*(world.runtime.prepare(function, said.append) for _ in range(3)))
    assert said == []


# ---- its memory --------------------------------------------------------------------------------------------------


async def test_out_of_memory_kill_is_recognized(world: World) -> None:
    if not world.limits_memory:
        pytest.skip("processes of the host have no memory limit (adapters/process/runtime.py says why)")
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    await world.run_out_of_memory(handle)
    exit_ = await world.runtime.wait(handle)
    assert exit_.oom_killed
    assert "memory" in exit_.message


async def test_own_kill_and_same_exit_code_are_not_out_of_memory(world: World) -> None:
    killed, ended = [await world.runtime.start(world.spec(f"resize-{letter}")) for letter in "ab"]
    await world.settled(killed)
    await world.settled(ended)
    await world.runtime.kill(killed)
    assert not (await world.runtime.wait(killed)).oom_killed
    await world.exit_now(ended, 137)
    exit_ = await world.runtime.wait(ended)
    # Engines report 137 for a kill and for an exit with that code; only out of memory can be told from both.
    assert (exit_.code, exit_.signal, exit_.oom_killed) in {(137, 0, False), (-1, 9, False)}


# ---- followed logs and commands inside ----------------------------------------------------------------------------


async def test_a_followed_log_ends_with_its_container(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    await world.speak(handle, "before")
    read = bytearray()
    seen = {name: asyncio.Event() for name in ("before", "while you look")}

    async def follow() -> None:
        async for chunk in world.runtime.follow_log(handle, 65536):
            assert 0 < len(chunk) <= 65536
            read.extend(chunk)
            for name, event in seen.items():
                if name.encode() in read:
                    event.set()

    async with asyncio.timeout(30), asyncio.TaskGroup() as both:
        both.create_task(follow())
        await seen["before"].wait()
        await world.speak(handle, "while you look")
        await seen["while you look"].wait()
        await world.exit_now(handle, 0)
    assert read.startswith(b"hello from")
    assert read.endswith(b"before\nwhile you look\n")
    assert read.count(b"before") == 1


async def test_closed_log_follower_leaves_nothing(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    before = world.open_files()
    for _ in range(3):
        read = asyncio.Event()
        following = asyncio.create_task(_follow(world, handle, read))
        await asyncio.wait_for(read.wait(), 20)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    assert world.open_files() <= before
    await world.speak(handle, "still here")


async def _follow(world: World, handle: Handle, read: asyncio.Event) -> None:
    async for _chunk in world.runtime.follow_log(handle, 65536):
        read.set()


async def test_log_of_an_ended_instance_is_followed_to_its_end(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    await world.speak(handle, "resized 17 pictures")
    await world.exit_now(handle, 0)
    await world.runtime.wait(handle)
    for tail_bytes in (65536, 9):  # an engine counts in lines: more may come than requested
        read = b"".join([chunk async for chunk in world.runtime.follow_log(handle, tail_bytes)])
        assert read.endswith(b"pictures\n")


async def test_a_command_inside_is_run_or_refused(world: World) -> None:
    handle = await world.runtime.start(world.spec("resize-a"))
    await world.settled(handle)
    command = ExecSpec(("/bin/sh", "-c", "read line; echo $line inside; echo trouble >&2; exit 7"))
    if not world.executes:
        with pytest.raises(PreconditionError) as raised:
            await world.runtime.exec(handle, command)
        assert raised.value.reason == "EXEC_UNAVAILABLE"
        return
    session = await world.runtime.exec(handle, command)
    try:
        await session.write(b"I am\n")
        await session.close_input()
        said: dict[bool, bytes] = {False: b"", True: b""}
        async with asyncio.timeout(20):
            while (output := await session.read()) is not None:
                said[output.is_error] += output.data
            assert await session.exit_code() == 7
    finally:
        await session.close()
    assert said == {False: b"I am inside\n", True: b"trouble\n"}
    assert await world.runtime.alive(handle)

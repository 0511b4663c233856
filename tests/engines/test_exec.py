"""Commands inside containers of real engines: by the adapter, and by `hibernode exec` at a whole agent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.adapters.kernel import process_table
from agent.core.errors import InstanceError
from agent.core.types import Handle
from agent.ports import ExecSession, ExecSpec
from tests.e2e.stack import until
from tests.engines.engines import Engine
from tests.engines.world import EngineWorld

PATIENCE_S = 30.0


@pytest.fixture
async def world(engine: Engine) -> AsyncIterator[EngineWorld]:
    made = EngineWorld(engine)
    yield made
    await made.close()


@pytest.fixture
async def handle(world: EngineWorld) -> Handle:
    """A container that runs."""
    started = await world.runtime.start(world.spec("i-exec"))
    await world.settled(started)
    return started


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: bytes
    err: bytes


async def rest_of(session: ExecSession) -> Ran:
    """All that it says from now on, and how it ends."""
    said: dict[bool, bytes] = {False: b"", True: b""}
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (output := await session.read()) is not None:
                assert len(output.data) <= 65_536
                said[output.is_error] += output.data
            return Ran(await session.exit_code(), said[False], said[True])
    finally:
        await session.close()


async def run(world: EngineWorld, handle: Handle, *command: str, given: bytes = b"", user: str = "") -> Ran:
    """Reads while it writes, as the servicer does: who did one after the other could wait for ever."""
    session = await world.runtime.exec(handle, ExecSpec(command, user=user))

    async def feed() -> None:
        for start in range(0, len(given), 65_536):
            await session.write(given[start : start + 65_536])
        await session.close_input()

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as both:
        both.create_task(feed())
        said = both.create_task(rest_of(session))
    return said.result()


async def heard(session: ExecSession, text: bytes) -> bytes:
    """What it says until `text` is in it."""
    said = b""
    async with asyncio.timeout(PATIENCE_S):
        while text not in said:
            output = await session.read()
            assert output is not None, said
            said += output.data
    return said


async def inside(world: EngineWorld, handle: Handle) -> set[int]:
    return set(await world.runtime.pids(handle))


def file_of(handle: Handle, name: str) -> Path:
    """What the kernel shows of its main process."""
    return Path(f"/proc/{handle.process.pid}") / name


def command_line(pid: int) -> bytes:
    """b"" for a process that has just gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ---- what comes out, what goes in -----------------------------------------------------------------------------------


async def test_output_error_and_exit_code_are_told_apart(world: EngineWorld, handle: Handle) -> None:
    ran = await run(world, handle, "/bin/sh", "-c", "echo out; echo err >&2; exit 42")
    assert ran == Ran(42, b"out\n", b"err\n")
    assert await run(world, handle, "true") == Ran(0, b"", b"")
    killed = await run(world, handle, "/bin/sh", "-c", "kill -9 $$")
    assert killed.code == 137


async def test_a_megabyte_goes_in_and_comes_out(world: EngineWorld, handle: Handle) -> None:
    given = os.urandom(1 << 20)
    assert await run(world, handle, "cat", given=given) == Ran(0, given, b"")


async def test_input_that_nobody_reads_is_no_failure(world: EngineWorld, handle: Handle) -> None:
    ran = await run(world, handle, "/bin/sh", "-c", "read line; echo got $line; exit 3", given=b"one\n" * 100_000)
    assert (ran.code, ran.out) == (3, b"got one\n")


async def test_who_is_slow_to_read_holds_the_command_up_and_loses_nothing(world: EngineWorld, handle: Handle) -> None:
    session = await world.runtime.exec(handle, ExecSpec(("/bin/sh", "-c", "seq 1 300000; echo all said >/tmp/said")))
    await heard(session, b"1\n")
    await asyncio.sleep(0.5)  # as a slow reader does
    assert not file_of(handle, "root/tmp/said").exists(), "two megabytes fit into no buffer on the way"
    ran = await rest_of(session)
    assert (ran.code, ran.out[-14:]) == (0, b"299999\n300000\n")


async def test_what_the_image_does_not_have_is_126_or_127(world: EngineWorld, handle: Handle) -> None:
    ran = await run(world, handle, "no-such-program")
    assert ran.code in (126, 127)
    assert b"no-such-program" in ran.out + ran.err
    assert (await run(world, handle, "/etc")).code in (126, 127)


async def test_a_user_that_the_image_does_not_have(world: EngineWorld, handle: Handle) -> None:
    if world.engine.kind == "docker":  # runs it and lets it fail
        ran = await run(world, handle, "id", user="ghost")
        assert ran.code == 126
        assert b"ghost" in ran.out
    else:
        with pytest.raises(InstanceError, match=r"EXEC_FAILED.*ghost"):
            await run(world, handle, "id", user="ghost")


def bound_of(status: str) -> int:
    """Capabilities that it could ever have."""
    (line,) = (line for line in status.splitlines() if line.startswith("CapBnd"))
    return int(line.split()[1], 16)


async def test_as_another_user_and_with_no_more_rights_than_the_container(world: EngineWorld, handle: Handle) -> None:
    assert b"uid=1234" in (await run(world, handle, "id", user="1234")).out
    status = (await run(world, handle, "cat", "/proc/self/status")).out.decode()
    assert "NoNewPrivs:\t1" in status
    bounds = [bound_of(text) for text in (status, file_of(handle, "status").read_text())]
    assert bounds[0] & ~bounds[1] == 0


# ---- on a terminal --------------------------------------------------------------------------------------------------


TALK = """\
trap 'echo interrupted' INT
echo ready; read -r line; stty size
until [ "$(stty size)" = "25 80" ]; do sleep 0.1; done
echo asleep; sleep 86399
echo $(tty) at the end; exit 9
"""


async def test_a_terminal_has_a_size_and_a_ctrl_c(world: EngineWorld, handle: Handle) -> None:
    session = await world.runtime.exec(handle, ExecSpec(("/bin/sh", "-c", TALK), terminal=True, columns=132, rows=43))
    await heard(session, b"ready\r\n")
    await session.write(b"\n")
    await heard(session, b"43 132\r\n")
    await session.resize(80, 25)
    await heard(session, b"asleep\r\n")

    async def sleeps() -> bool:
        return b"sleep\x0086399\0" in [command_line(pid) for pid in await inside(world, handle)]

    await until("it sleeps, not only its shell's fork that is to be it", sleeps, PATIENCE_S)
    await session.write(b"\x03")
    ran = await rest_of(session)
    assert ran.code == 9
    assert b"interrupted" in ran.out
    assert b"/dev/pts/" in ran.out


# ---- its end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True], ids=["pipes", "terminal"])
async def test_who_leaves_ends_the_command_and_all_of_its_session(
    world: EngineWorld, handle: Handle, terminal: bool
) -> None:
    before, files = await inside(world, handle), world.open_files()
    script = "trap '' HUP TERM; sleep 86397 & sleep 86398 & echo up; sleep 86399"
    session = await world.runtime.exec(handle, ExecSpec(("/bin/sh", "-c", script), terminal=terminal))
    await heard(session, b"up")
    assert len(await inside(world, handle) - before) >= 3
    await session.close()

    async def gone() -> bool:
        return await inside(world, handle) == before

    await until("nothing of the command is left", gone, PATIENCE_S)
    assert await world.runtime.alive(handle), "and nothing else was hit"

    async def closed() -> bool:
        return world.open_files() <= files

    await until("the connection is closed", closed, PATIENCE_S)


async def test_a_command_ends_with_its_container(world: EngineWorld, handle: Handle) -> None:
    session = await world.runtime.exec(handle, ExecSpec(("/bin/sh", "-c", "echo up; sleep 86399")))
    await heard(session, b"up")
    await world.runtime.kill(handle)
    assert (await rest_of(session)).code == 137
    assert not process_table.is_alive(handle.process, process_table.boot_id())


async def test_an_engine_that_is_away_runs_nothing(world: EngineWorld, handle: Handle) -> None:
    world.engine.kill()
    with pytest.raises(Exception, match="ENGINE_UNAVAILABLE"):
        await world.runtime.exec(handle, ExecSpec(("true",)))
    world.engine.start()
    assert (await run(world, handle, "true")).code == 0

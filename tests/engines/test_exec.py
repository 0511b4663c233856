"""Commands in containers of real engines, through the adapter and through `hibernode exec`."""

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
    """A running container."""
    started = await world.runtime.start(world.spec("i-exec"))
    await world.settled(started)
    return started


@dataclass(frozen=True, slots=True)
class CommandResult:
    code: int
    out: bytes
    err: bytes


async def rest_of(session: ExecSession) -> CommandResult:
    """Its remaining output and its exit code."""
    said: dict[bool, bytes] = {False: b"", True: b""}
    try:
        async with asyncio.timeout(PATIENCE_S):
            while (output := await session.read()) is not None:
                assert len(output.data) <= 65_536
                said[output.is_error] += output.data
            return CommandResult(await session.exit_code(), said[False], said[True])
    finally:
        await session.close()


async def run(world: EngineWorld, handle: Handle, *command: str, given: bytes = b"", user: str = "") -> CommandResult:
    """Read while writing, as the servicer does; one after the other could deadlock."""
    session = await world.runtime.exec(handle, ExecSpec(command, user=user))

    async def feed() -> None:
        for start in range(0, len(given), 65_536):
            await session.write(given[start : start + 65_536])
        await session.close_input()

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as both:
        both.create_task(feed())
        said = both.create_task(rest_of(session))
    return said.result()


async def read_until(session: ExecSession, text: bytes) -> bytes:
    """Read output until it contains `text`."""
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
    """A /proc file of its main process."""
    return Path(f"/proc/{handle.process.pid}") / name


def command_line(pid: int) -> bytes:
    """b"" for a process that has just ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ---- output and input -----------------------------------------------------------------------------------------------


async def test_output_errors_and_exit_code_are_separate(world: EngineWorld, handle: Handle) -> None:
    ran = await run(world, handle, "/bin/sh", "-c", "echo out; echo err >&2; exit 42")
    assert ran == CommandResult(42, b"out\n", b"err\n")
    assert await run(world, handle, "true") == CommandResult(0, b"", b"")
    killed = await run(world, handle, "/bin/sh", "-c", "kill -9 $$")
    assert killed.code == 137


async def test_megabyte_of_input_and_output(world: EngineWorld, handle: Handle) -> None:
    given = os.urandom(1 << 20)
    assert await run(world, handle, "cat", given=given) == CommandResult(0, given, b"")


async def test_unread_input_is_no_failure(world: EngineWorld, handle: Handle) -> None:
    ran = await run(world, handle, "/bin/sh", "-c", "read line; echo got $line; exit 3", given=b"one\n" * 100_000)
    assert (ran.code, ran.out) == (3, b"got one\n")


async def test_slow_reader_delays_the_command_and_loses_nothing(world: EngineWorld, handle: Handle) -> None:
    session = await world.runtime.exec(handle, ExecSpec(("/bin/sh", "-c", "seq 1 300000; echo all said >/tmp/said")))
    await read_until(session, b"1\n")
    await asyncio.sleep(0.5)  # a slow reader
    assert not file_of(handle, "root/tmp/said").exists(), "two megabytes fit into no buffer on the way"
    ran = await rest_of(session)
    assert (ran.code, ran.out[-14:]) == (0, b"299999\n300000\n")


async def test_missing_program_exits_with_126_or_127(world: EngineWorld, handle: Handle) -> None:
    ran = await run(world, handle, "no-such-program")
    assert ran.code in (126, 127)
    assert b"no-such-program" in ran.out + ran.err
    assert (await run(world, handle, "/etc")).code in (126, 127)


async def test_missing_user(world: EngineWorld, handle: Handle) -> None:
    if world.engine.kind == "docker":  # Docker runs it and lets it fail
        ran = await run(world, handle, "id", user="ghost")
        assert ran.code == 126
        assert b"ghost" in ran.out
    else:
        with pytest.raises(InstanceError, match=r"EXEC_FAILED.*ghost"):
            await run(world, handle, "id", user="ghost")


def bound_of(status: str) -> int:
    """The capability bounding set."""
    (line,) = (line for line in status.splitlines() if line.startswith("CapBnd"))
    return int(line.split()[1], 16)


async def test_other_user_has_no_more_rights_than_the_container(world: EngineWorld, handle: Handle) -> None:
    assert b"uid=1234" in (await run(world, handle, "id", user="1234")).out
    status = (await run(world, handle, "cat", "/proc/self/status")).out.decode()
    assert "NoNewPrivs:\t1" in status
    bounds = [bound_of(text) for text in (status, file_of(handle, "status").read_text())]
    assert bounds[0] & ~bounds[1] == 0


# ---- terminal -------------------------------------------------------------------------------------------------------


TALK = """\
trap 'echo interrupted' INT
echo ready; read -r line; stty size
until [ "$(stty size)" = "25 80" ]; do sleep 0.1; done
echo asleep; sleep 86399
echo $(tty) at the end; exit 9
"""


async def test_terminal_has_a_size_and_ctrl_c(world: EngineWorld, handle: Handle) -> None:
    session = await world.runtime.exec(handle, ExecSpec(("/bin/sh", "-c", TALK), terminal=True, columns=132, rows=43))
    await read_until(session, b"ready\r\n")
    await session.write(b"\n")
    await read_until(session, b"43 132\r\n")
    await session.resize(80, 25)
    await read_until(session, b"asleep\r\n")

    async def sleeps() -> bool:
        return b"sleep\x0086399\0" in [command_line(pid) for pid in await inside(world, handle)]

    await until("it sleeps, not only its shell's fork that is to be it", sleeps, PATIENCE_S)
    await session.write(b"\x03")
    ran = await rest_of(session)
    assert ran.code == 9
    assert b"interrupted" in ran.out
    assert b"/dev/pts/" in ran.out


# ---- end ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True], ids=["pipes", "terminal"])
async def test_leaving_ends_the_command_and_its_session(world: EngineWorld, handle: Handle, terminal: bool) -> None:
    before, files = await inside(world, handle), world.open_files()
    script = "trap '' HUP TERM; sleep 86397 & sleep 86398 & echo up; sleep 86399"
    session = await world.runtime.exec(handle, ExecSpec(("/bin/sh", "-c", script), terminal=terminal))
    await read_until(session, b"up")
    assert len(await inside(world, handle) - before) >= 3
    await session.close()

    async def gone() -> bool:
        return await inside(world, handle) == before

    await until("nothing of the command is left", gone, PATIENCE_S)
    assert await world.runtime.alive(handle), "and nothing else was hit"

    async def closed() -> bool:
        return world.open_files() <= files

    await until("the connection is closed", closed, PATIENCE_S)


async def test_command_ends_with_its_container(world: EngineWorld, handle: Handle) -> None:
    session = await world.runtime.exec(handle, ExecSpec(("/bin/sh", "-c", "echo up; sleep 86399")))
    await read_until(session, b"up")
    await world.runtime.kill(handle)
    assert (await rest_of(session)).code == 137
    assert not process_table.is_alive(handle.process, process_table.boot_id())


async def test_exec_fails_without_the_engine(world: EngineWorld, handle: Handle) -> None:
    world.engine.kill()
    with pytest.raises(Exception, match="ENGINE_UNAVAILABLE"):
        await world.runtime.exec(handle, ExecSpec(("true",)))
    world.engine.start()
    assert (await run(world, handle, "true")).code == 0

"""`hibernode exec` and `logs -f` on a whole agent with real engines, also for frozen instances."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from agent.adapters.kernel import process_table
from agent.core.types import IdlePolicy
from agent.v1 import instance_service_pb2 as instances_pb
from agent.v1 import types_pb2
from tests.e2e.bad_world import HIBERNODE
from tests.e2e.stack import CALL_S, Stack, running_stack, until
from tests.engines import images
from tests.engines.engines import Engine
from tests.engines.functions import bad, busybox

LOG_LIMIT = 256 << 10
FROZEN = types_pb2.Instance.STATE_FROZEN


@dataclass(frozen=True, slots=True)
class CommandResult:
    code: int
    out: str
    err: str
    took_s: float


def command_of(stack: Stack, *arguments: str) -> list[str]:
    return [str(HIBERNODE), "--home", str(stack.folder), *arguments]


async def hibernode(stack: Stack, *arguments: str, given: str = "") -> CommandResult:
    began = time.monotonic()
    done = await asyncio.to_thread(
        subprocess.run,
        command_of(stack, *arguments),
        env=stack.environment,
        input=given,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return CommandResult(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def on_a_pipe(stack: Stack, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command_of(stack, *arguments), env=stack.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )


def on_terminal(stack: Stack, tty: int, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command_of(stack, *arguments),
        env=stack.environment,
        stdin=tty,
        stdout=tty,
        stderr=tty,
        start_new_session=True,
    )


@asynccontextmanager
async def an_agent(engine: Engine) -> AsyncIterator[Stack]:
    limited = {"runtime": {"log_limit": f"{LOG_LIMIT}B"}}
    async with running_stack(engine_socket=engine.socket, agent_settings=limited) as stack:
        yield stack
        state_uuid = (stack.folder / "agent" / "uuid").read_text().strip()
    left = await asyncio.to_thread(engine.leftovers, state_uuid)
    assert not left, left


async def remove(stack: Stack, uid: str, name: str) -> None:
    """Remove the only instance of a function for good."""
    await stack.remove_functions([name])
    assert uid not in {one.uid for one in await stack.instances()}


async def the_sleeper(stack: Stack) -> types_pb2.Instance:
    await stack.wait_for_state(FROZEN, 1)
    (instance,) = await stack.instances()
    return instance


async def events(stack: Stack, name: str) -> list[types_pb2.Event]:
    async with stack.channel("agent") as channel:
        request = instances_pb.ListEventsRequest(page_size=1000)
        answer = await channel.call(channel.instances.ListEvents, request, CALL_S)
    return [event for event in answer.events if event.name == name]


async def test_exec_leaves_an_instance_frozen_or_wakes_it_until_the_end(engine: Engine) -> None:
    async with an_agent(engine) as stack:
        await stack.deploy(replace(busybox("pages"), idle=IdlePolicy(freeze_after_ns=0)), target=1)
        uid = (await the_sleeper(stack)).uid
        refused = await hibernode(stack, "exec", uid, "--", "true")
        assert (refused.code, refused.out) == (4, "")
        assert "add --wake" in refused.err
        assert "INSTANCE_FROZEN" in refused.err
        assert refused.took_s < 10, "refused, not waited for"
        assert (await the_sleeper(stack)).wake_count == 0

        script = "read line; echo $line inside; sleep 1; echo trouble >&2; exit 7"
        ran = await hibernode(stack, "exec", "-i", "--wake", uid, "--", "/bin/sh", "-c", script, given="I was\n")
        assert (ran.code, ran.out, ran.err) == (7, "I was inside\n", "trouble\n")
        again = await the_sleeper(stack)
        assert (again.uid, again.wake_count, again.freeze_count) == (uid, 1, 2), "awake for all of it, and only for it"

        (began,), (ended,) = await events(stack, "instance.exec"), await events(stack, "instance.exec_ended")
        assert (began.attributes["program"], began.attributes["arguments"]) == ("/bin/sh", "2")
        assert ended.attributes["exit_code"] == "7"
        assert int(ended.attributes["duration_ms"]) >= 1000
        assert "trouble" not in stack.log_of("agent"), "a command's input is not logged"
        missing = await hibernode(stack, "exec", "--wake", uid, "no-such-program")
        assert missing.code in (126, 127)
        await remove(stack, uid, "pages")


TALK = """\
echo ready; read -r line; stty size
until [ "$(stty size)" = "25 80" ]; do sleep 0.1; done
echo resized; read -r line; echo "$line inside"; exit 5
"""


async def test_interactive_terminal(engine: Engine) -> None:
    async with an_agent(engine) as stack:
        await stack.deploy(busybox("pages"), target=1)
        sleeper = await the_sleeper(stack)
        ours, theirs = pty.openpty()
        set_size(theirs, columns=132, rows=43)
        before = termios.tcgetattr(theirs)
        process = on_terminal(stack, theirs, "exec", "-it", "--wake", sleeper.uid, "--", "/bin/sh", "-c", TALK)
        try:
            await asyncio.to_thread(read_until, ours, b"ready\r\n")
            os.write(ours, b"\r")
            await asyncio.to_thread(read_until, ours, b"43 132\r\n")
            set_size(theirs, columns=80, rows=25)
            process.send_signal(signal.SIGWINCH)
            await asyncio.to_thread(read_until, ours, b"resized\r\n")
            os.write(ours, b"olga\r")
            await asyncio.to_thread(read_until, ours, b"olga inside\r\n")
            assert await asyncio.to_thread(process.wait, 30) == 5
            assert termios.tcgetattr(theirs) == before
        finally:
            process.kill()
            process.wait()
            os.close(ours)
            os.close(theirs)
        await remove(stack, sleeper.uid, "pages")


def set_size(descriptor: int, *, columns: int, rows: int) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def read_until(descriptor: int, text: bytes, deadline_s: float = 30.0) -> bytes:
    """Read a terminal until it shows `text`."""
    seen, ends = b"", time.monotonic() + deadline_s
    while text not in seen:
        assert select.select([descriptor], [], [], max(0.0, ends - time.monotonic()))[0], seen
        seen += os.read(descriptor, 65536)
    return seen


async def test_killed_client_leaves_no_command(engine: Engine) -> None:
    async with an_agent(engine) as stack:
        await stack.deploy(busybox("pages"), target=1)
        sleeper = await the_sleeper(stack)
        script = "sleep 4711 & echo up; sleep 4712"
        process = on_a_pipe(stack, "exec", "--wake", sleeper.uid, "--", "/bin/sh", "-c", script)
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"up\n"

        async def both() -> bool:
            return len(sleeping(sleeper.pid)) == 2

        await until("the command and its child sleep", both, 20)
        process.kill()
        process.communicate()

        async def gone() -> bool:
            return not sleeping(sleeper.pid)

        await until("nothing of the command is left", gone, 20)
        assert (await the_sleeper(stack)).pid == sleeper.pid, "and it sleeps again"
        await remove(stack, sleeper.uid, "pages")


async def test_agent_stop_ends_commands_but_not_their_instance(engine: Engine) -> None:
    async with an_agent(engine) as stack:
        await stack.deploy(busybox("pages"), target=1)
        sleeper = await the_sleeper(stack)
        process = on_a_pipe(stack, "exec", "--wake", sleeper.uid, "--", "/bin/sh", "-c", "echo up; sleep 4711")
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == b"up\n"
        assert await asyncio.to_thread(stack.terminate, "agent") == 0
        await asyncio.to_thread(process.communicate, timeout=20)
        assert process.returncode == 5
        assert not sleeping(sleeper.pid)
        (stack.folder / "agent" / "endpoints.json").unlink(missing_ok=True)
        await stack.start_agent()
        assert (await the_sleeper(stack)).pid == sleeper.pid
        await remove(stack, sleeper.uid, "pages")


def sleeping(pid: int) -> list[int]:
    """Our commands in the pid namespace of this process."""
    inside = os.readlink(f"/proc/{pid}/ns/pid")
    found = []
    for stat in process_table.processes():
        with suppress(OSError):
            words = Path(f"/proc/{stat.pid}/cmdline").read_bytes().split(b"\0")
            ours = words[:1] == [b"sleep"] and words[1] in (b"4711", b"4712")
            if ours and not stat.dead and os.readlink(f"/proc/{stat.pid}/ns/pid") == inside:
                found.append(stat.pid)
    return found


# ---- logs -----------------------------------------------------------------------------------------------------------


async def test_log_is_followed_through_a_freeze_and_kept_after_the_end(engine: Engine) -> None:
    async with an_agent(engine) as stack:
        await stack.deploy(busybox("pages"), target=1)
        sleeper = await the_sleeper(stack)
        follower = on_a_pipe(stack, "logs", "-f", sleeper.uid)
        assert follower.stdout is not None
        for text in ("first", "second"):  # frozen in between
            say = f"echo {text} words >/proc/1/fd/1"
            assert (await hibernode(stack, "exec", "--wake", sleeper.uid, "--", "/bin/sh", "-c", say)).code == 0
            assert await asyncio.to_thread(follower.stdout.readline) == f"{text} words\n".encode()
            await the_sleeper(stack)
        await remove(stack, sleeper.uid, "pages")
        rest, _ = await asyncio.to_thread(follower.communicate, timeout=30)
        assert (rest, follower.returncode) == (b"", 0), "ends with its instance"
        kept = await hibernode(stack, "logs", sleeper.uid)
        assert kept.out == "first words\nsecond words\n"
        assert (await hibernode(stack, "logs", sleeper.uid, "--tail", "13B")).out == "second words\n"


async def test_log_flood_is_bounded_on_disk_and_its_end_kept(engine: Engine) -> None:
    async with an_agent(engine) as stack:
        images.load(engine, images.BAD)
        await stack.deploy(bad("flood", "floods-log"), target=1)
        (instance,) = [one for one in await stack.instances() if one.function == "flood"]
        for _ in range(5):
            assert await asyncio.to_thread(log_bytes, engine, instance.container_id) <= 1.5 * LOG_LIMIT
            await asyncio.sleep(0.3)

        async def shown() -> bool:  # Podman truncates a full log, so it is sometimes short
            ran = await hibernode(stack, "logs", instance.uid, "--tail", "64KiB")
            assert len(ran.out) <= 64 << 10
            return ran.out.count("a line of the flood\n") > 100

        await until("the flood is shown", shown)
        await remove(stack, instance.uid, "flood")
        kept = stack.folder / "agent" / "logs" / f"{instance.uid}.log"
        assert 0 < kept.stat().st_size <= 1 << 20
        assert "a line of the flood" in (await hibernode(stack, "logs", instance.uid, "--tail", "1KiB")).out


def log_bytes(engine: Engine, container: str) -> int:
    """Size of its log on the engine's disk."""
    path = Path(engine.must("GET", f"/containers/{container}/json")["LogPath"] or "")
    files = list(path.parent.glob(f"{path.name}*")) if path.name else []
    if not files:  # Podman does not report the path
        files = [file for file in engine.folder.rglob("*ctr.log*") if container in str(file)]
    assert files
    return sum(file.stat().st_size for file in files)

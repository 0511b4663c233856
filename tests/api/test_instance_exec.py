"""ExecInstance and followed logs over a real server: sessions, departing callers, refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.api import instance_exec
from agent.api.instance_exec import MAX_INPUT_BYTES, exec_spec
from agent.api.instance_logs import InstanceLogs
from agent.api.instance_servicer import InstanceServicer
from agent.core.errors import HibernodeError, InvalidArgumentError
from agent.core.types import Exit, InstanceState
from agent.host.instance.actor import Actor
from agent.host.node.exec_sessions import ExecSessions
from agent.ports import ExecSpec
from agent.v1 import instance_service_pb2 as pb
from agent.wire.clients import DaemonChannel, ExecStream
from agent.wire.server import GrpcServer, Services
from agent.wire.tokens import TokenTable
from tests.api.test_instance_servicer import observer_of
from tests.fakes.exec_session import FakeExecSession
from tests.host.rig import PATIENCE_S, NodeRig, node_rig, until

Step = pb.ExecInstanceRequest
SHELL = ("sh", "-i")


@dataclass
class Site:
    """An agent's API on a socket, and a channel to it."""

    world: NodeRig
    execs: ExecSessions
    logs: InstanceLogs
    channel: DaemonChannel

    async def begun(self, actor: Actor, **how: object) -> tuple[ExecStream, FakeExecSession]:
        """Starts a command inside an instance."""
        stream = self.channel.exec_instance()
        await stream.send(Step(start=Step.Start(uid=actor.uid, command=SHELL, **how)))  # type: ignore[arg-type]
        assert await received(stream) == pb.ExecInstanceResponse(output=b"")
        return stream, self.world.runtime.sessions[-1]

    async def follow(self, uid: str, tail_bytes: int = 0, tail_lines: int | None = None) -> AsyncIterator[bytes]:
        request = pb.GetInstanceLogsRequest(uid=uid, tail_bytes=tail_bytes, tail_lines=tail_lines, follow=True)
        async for chunk in self.channel.stream(self.channel.instances.GetInstanceLogs, request, PATIENCE_S):
            yield chunk.data


@asynccontextmanager
async def a_site(folder: Path, **limits: int) -> AsyncIterator[Site]:
    async with node_rig() as world:
        world.runtime.executes = True
        observer = observer_of(world)
        execs = ExecSessions(world.node, world.runtime, world.events, world.clock)
        logs = InstanceLogs(world.runtime, **limits)
        servicer = InstanceServicer(world.node, observer, world.events, world.clock, logs=logs, execs=execs)
        server = GrpcServer(Services(instances=servicer), TokenTable([]))
        server.bind_unix(str(folder / "agent.sock"))
        await server.start()
        try:
            async with DaemonChannel(f"unix:{folder / 'agent.sock'}") as channel:
                yield Site(world, execs, logs, channel)
        finally:
            await asyncio.gather(execs.close(), logs.close())
            await server.stop(0)


async def received(stream: ExecStream) -> pb.ExecInstanceResponse | None:
    return await asyncio.wait_for(stream.receive(), PATIENCE_S)


async def refusal(stream: ExecStream) -> str:
    try:
        while await received(stream) is not None:
            pass
    except HibernodeError as error:
        return error.reason
    raise AssertionError("it ended in order")


async def happened(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), PATIENCE_S)


# ---- a session ------------------------------------------------------------------------------------------------------


async def test_a_whole_session(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.running()
        stream, session = await site.begun(actor, terminal=Step.TerminalSize(columns=132, rows=43), user="app")
        assert session.spec == ExecSpec(SHELL, terminal=True, columns=132, rows=43, user="app")
        await stream.send(Step(input=b"whoami\n"))
        await stream.send(Step(resize=Step.TerminalSize(columns=80, rows=25)))
        await stream.send(Step(end_of_input=True))
        await happened(session.input_ended)
        assert (bytes(session.given), session.sizes) == (b"whoami\n", [(132, 43), (80, 25)])
        session.say(b"app\n")
        session.say(b"bye\n", is_error=True)
        session.end(7)
        answers = [await received(stream) for _ in range(3)]
        assert answers == [
            pb.ExecInstanceResponse(output=b"app\n"),
            pb.ExecInstanceResponse(error_output=b"bye\n"),
            pb.ExecInstanceResponse(exit_code=7),
        ]
        assert session.closed.is_set()
        (began,) = [event for event in site.world.events.read() if event.name == "instance.exec"]
        assert began.attributes["caller"] == "unix-socket"


async def test_manual_freeze_names_the_open_exec(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.running()
        _, session = await site.begun(actor)
        freeze = pb.FreezeInstanceRequest(uid=actor.uid)
        with pytest.raises(HibernodeError, match=r"NOT_IDLE.*a command runs inside"):
            await site.channel.call(site.channel.instances.FreezeInstance, freeze, PATIENCE_S)
        session.end(0)
        await happened(session.closed)
        answer = await site.channel.call(site.channel.instances.FreezeInstance, freeze, PATIENCE_S)
        assert answer.instance.freeze_count == 1


async def test_departing_caller_ends_the_command(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.running()
        stream, session = await site.begun(actor)
        stream.close()
        await happened(session.closed)
        assert not actor.instance.exec_active


async def test_end_of_the_callers_stream_closes_the_input(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.running()
        call = site.channel.instances.ExecInstance(iter([Step(start=Step.Start(uid=actor.uid, command=SHELL))]))
        await call.read()
        await happened(site.world.runtime.sessions[0].input_ended)
        site.world.runtime.sessions[0].end(0)
        assert (await call.read()) == pb.ExecInstanceResponse(exit_code=0)


async def test_command_that_does_not_read_blocks_its_caller(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        stream, session = await site.begun(await site.world.running())
        session.writes = asyncio.Semaphore(0)
        sent: list[int] = []

        async def send_all() -> None:
            for number in range(1000):
                await stream.send(Step(input=b"x" * MAX_INPUT_BYTES))
                sent.append(number)

        sending = asyncio.create_task(send_all())
        await asyncio.wait([sending], timeout=1.0)  # a cancel would end the whole call in gRPC
        assert len(sent) < 200, "what is on its way is bounded (by the connection's own buffers)"
        session.end(0)
        assert await received(stream) == pb.ExecInstanceResponse(exit_code=0), "its end is told all the same"
        stream.close()
        await asyncio.gather(sending, return_exceptions=True)


async def test_agent_stop_ends_an_exec_with_an_error(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        stream, session = await site.begun(await site.world.running())
        await site.execs.close()
        assert session.closed.is_set()
        assert await refusal(stream) == "AGENT_STOPPING"


# ---- what is refused ------------------------------------------------------------------------------------------------


async def test_exec_in_a_frozen_instance_is_refused_at_once(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.frozen()
        stream = site.channel.exec_instance()
        await stream.send(Step(start=Step.Start(uid=actor.uid, command=SHELL)))
        assert await refusal(stream) == "INSTANCE_FROZEN"
        _, session = await site.begun(actor, wake=True)
        assert actor.state is InstanceState.RUNNING
        session.end(0)


async def test_exec_without_start_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance_exec.exec_instance, "__defaults__", (0.05,))
    async with a_site(tmp_path) as site:
        assert await refusal(site.channel.exec_instance()) == "EXEC_NOT_STARTED"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (Step(input=b"x" * (MAX_INPUT_BYTES + 1)), "INPUT_TOO_LARGE"),
        (Step(start=Step.Start(uid="i-1", command=SHELL)), "EXEC_STEP_UNKNOWN"),
        (Step(), "EXEC_STEP_UNKNOWN"),
        (Step(resize=Step.TerminalSize(columns=-1, rows=1)), "TERMINAL_INVALID"),
    ],
    ids=["input too large", "a second start", "nothing", "no size"],
)
async def test_invalid_step_ends_the_command(tmp_path: Path, step: pb.ExecInstanceRequest, reason: str) -> None:
    async with a_site(tmp_path) as site:
        stream, session = await site.begun(await site.world.running())
        await stream.send(step)
        assert await refusal(stream) == reason
        assert session.closed.is_set()


@pytest.mark.parametrize("step", [Step(input=b"ls"), Step(end_of_input=True), Step()], ids=["input", "end", "nothing"])
async def test_first_step_must_be_start(tmp_path: Path, step: pb.ExecInstanceRequest) -> None:
    async with a_site(tmp_path) as site:
        stream = site.channel.exec_instance()
        await stream.send(step)
        assert await refusal(stream) == "EXEC_NOT_STARTED"


@pytest.mark.parametrize(
    "start",
    [
        Step.Start(),
        Step.Start(command=[""]),
        Step.Start(command=["x"] * 1001),
        Step.Start(command=["echo", "x" * 65_536]),
        Step.Start(command=["echo", "a\0b"]),
        Step.Start(command=["id"], user="a" * 101),
        Step.Start(command=["id"], user="root\n"),
        Step.Start(command=["id"], terminal=Step.TerminalSize(columns=10_001, rows=1)),
    ],
    ids=["no command", "empty word", "many words", "long", "NUL", "long user", "odd user", "wide"],
)
def test_invalid_commands_are_refused(start: pb.ExecInstanceRequest.Start) -> None:
    with pytest.raises(InvalidArgumentError):
        exec_spec(start)


def test_terminal_of_unknown_size_gets_the_default() -> None:
    assert exec_spec(Step.Start(command=["id"], terminal=Step.TerminalSize())) == ExecSpec(("id",), terminal=True)


# ---- followed logs --------------------------------------------------------------------------------------------------


async def test_followed_log_ends_with_its_instance(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.running()
        site.world.runtime.print(actor.uid, b"old\nloading\n")
        chunks = site.follow(actor.uid, tail_bytes=8)
        assert await asyncio.wait_for(anext(chunks), PATIENCE_S) == b"loading\n"
        site.world.runtime.print(actor.uid, b"ready\n")
        assert await asyncio.wait_for(anext(chunks), PATIENCE_S) == b"ready\n"
        site.world.runtime.exit(actor.uid, Exit(code=0))
        assert [chunk async for chunk in chunks] == []
        await until(actor, InstanceState.FAILED)


@pytest.mark.parametrize(
    ("written", "lines", "shown"),
    [
        (b"a\nbc\ndef\n", 2, b"bc\ndef\n"),
        (b"a\nbc\nde", 2, b"bc\nde"),
        (b"a\n\n\n", 2, b"\n\n"),
        (b"a\nb\n", 5, b"a\nb\n"),
        (b"a\nb\n", 0, b""),
        (b"", 3, b""),
    ],
)
async def test_followed_log_begins_with_its_last_lines(
    tmp_path: Path, written: bytes, lines: int, shown: bytes
) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.running()
        site.world.runtime.print(actor.uid, written)
        if shown:
            chunks = site.follow(actor.uid, tail_lines=lines)
            assert await asyncio.wait_for(anext(chunks), PATIENCE_S) == shown
            site.world.runtime.print(actor.uid, b"ready\n")
            assert await asyncio.wait_for(anext(chunks), PATIENCE_S) == b"ready\n"
            shown = b"".join((written + b"ready\n").splitlines(keepends=True)[-lines:])
        site.world.runtime.exit(actor.uid, Exit(code=0))
        assert b"".join([chunk async for chunk in site.follow(actor.uid, tail_lines=lines)]) == shown


async def test_log_of_a_frozen_instance_is_followed_without_a_wake(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.frozen()
        site.world.runtime.print(actor.uid, b"good night\n")
        chunks = site.follow(actor.uid)
        assert await asyncio.wait_for(anext(chunks), PATIENCE_S) == b"good night\n"
        assert actor.state is InstanceState.FROZEN


async def test_log_is_followed_from_its_first_line_during_a_pull(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        site.world.runtime.prepare_gate = asyncio.Event()
        actor = await site.world.create()
        first = asyncio.ensure_future(anext(site.follow(actor.uid)))
        site.world.runtime.print(actor.uid, b"first words\n")
        site.world.runtime.prepare_gate.set()
        assert await asyncio.wait_for(first, PATIENCE_S) == b"first words\n"


async def test_followers_are_limited_and_their_places_freed(tmp_path: Path) -> None:
    async with a_site(tmp_path, max_followers=2) as site:
        actor = await site.world.running()
        site.world.runtime.print(actor.uid, b"hello\n")
        followers = [site.follow(actor.uid) for _ in range(2)]
        for one in followers:
            await asyncio.wait_for(anext(one), PATIENCE_S)
        with pytest.raises(HibernodeError, match="TOO_MANY_CALLS"):
            await anext(site.follow(actor.uid))
        await followers[0].aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(PATIENCE_S):
            while site.logs.followers > 1:  # noqa: ASYNC110 - the server hears of it in its own time
                await asyncio.sleep(0.01)
        assert await asyncio.wait_for(anext(site.follow(actor.uid)), PATIENCE_S) == b"hello\n"


async def test_agent_stop_ends_followers(tmp_path: Path) -> None:
    async with a_site(tmp_path) as site:
        actor = await site.world.running()
        site.world.runtime.print(actor.uid, b"hello\n")
        chunks = site.follow(actor.uid)
        await asyncio.wait_for(anext(chunks), PATIENCE_S)
        await site.logs.close()
        with pytest.raises(HibernodeError, match="AGENT_STOPPING"):
            await anext(chunks)

"""Commands inside instances: admission, keeping the instance awake, and events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest

from agent.core.errors import DeadlineError, ExhaustedError, HibernodeError, InstanceError, UnavailableError
from agent.core.lifecycle import events as ev
from agent.core.types import SECOND_NS, IdlePolicy, InstanceState
from agent.host.instance.actor import Actor
from agent.host.node.exec_sessions import ExecSessions
from agent.ports import ExecSpec
from tests.host.rig import OCR, PATIENCE_S, NodeRig, enter, node_rig, until

S = InstanceState
LS = ExecSpec(("ls", "-l", "--token=hunter2"))


@asynccontextmanager
async def exec_rig(**knobs: object) -> AsyncIterator[tuple[NodeRig, ExecSessions]]:
    limits = {key: knobs.pop(key) for key in ("most", "longest_s") if key in knobs}
    async with node_rig(**knobs) as rig:
        rig.runtime.executes = True
        yield rig, ExecSessions(rig.node, rig.runtime, rig.events, rig.clock, **limits)  # type: ignore[arg-type]


async def reason_of(sessions: ExecSessions, uid: str, *, wake: bool = False) -> str:
    with pytest.raises(HibernodeError) as caught:
        async with asyncio.timeout(PATIENCE_S), sessions.open(uid, LS, wake=wake, caller="olga"):
            pass
    return caught.value.reason


def events_of(rig: NodeRig, name: str) -> list[dict[str, str]]:
    return [dict(event.attributes) for event in rig.events.read() if event.name == name]


# ---- admission ----------------------------------------------------------------------------------------------------


async def test_frozen_instance_is_refused_at_once_and_stays_frozen() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.frozen()
        with pytest.raises(HibernodeError, match="--wake") as caught:
            async with sessions.open(actor.uid, LS, wake=False, caller="olga"):
                pass
        assert caught.value.reason == "INSTANCE_FROZEN"
        assert (actor.state, actor.instance.exec_active) == (S.FROZEN, False)
        assert ("exec", actor.uid) not in rig.runtime.calls


@pytest.mark.parametrize("freeze_after_ns", [0, 10 * SECOND_NS])
async def test_with_wake_it_is_awake_until_the_command_has_ended(freeze_after_ns: int) -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.frozen(replace(OCR, idle=IdlePolicy(freeze_after_ns=freeze_after_ns)))
        async with asyncio.timeout(PATIENCE_S), sessions.open(actor.uid, LS, wake=True, caller="olga") as running:
            assert running.session is rig.runtime.sessions[0]
            rig.clock.advance(3600 * SECOND_NS)
            await asyncio.sleep(0)
            assert actor.state is S.RUNNING
        rig.clock.advance(freeze_after_ns)
        await until(actor, S.FROZEN)


async def test_freezing_instance_counts_as_frozen() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        rig.freezer.hold("checkpoint")
        actor.handle(ev.FreezeAsked())
        await rig.freezer.entered("checkpoint")
        assert await reason_of(sessions, actor.uid) == "INSTANCE_FROZEN"
        rig.freezer.release("checkpoint")
        await until(actor, S.FROZEN)


async def test_draining_instance_counts_as_frozen_and_comes_back_with_wake() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        await enter(actor)
        actor.handle(ev.DrainOrdered())
        assert await reason_of(sessions, actor.uid) == "INSTANCE_FROZEN"

        async def run() -> InstanceState:
            async with sessions.open(actor.uid, LS, wake=True, caller="olga"):
                return actor.state

        running = asyncio.create_task(run())
        await asyncio.sleep(0)
        actor.gate.leave()
        assert await asyncio.wait_for(running, PATIENCE_S) is S.RUNNING
        assert (actor.figures.freezes, actor.figures.wakes) == (1, 1), "frozen in between, as the GPU allocator ordered"


async def test_paused_starting_and_ended_instances_are_refused() -> None:
    async with exec_rig() as (rig, sessions):
        rig.runtime.start_gate = asyncio.Event()
        actor = await rig.create()
        assert await reason_of(sessions, actor.uid, wake=True) == "NOT_RUNNING"
        rig.runtime.start_gate.set()
        await until(actor, S.RUNNING)
        actor.handle(ev.Paused(paused=True))
        assert await reason_of(sessions, actor.uid, wake=True) == "EXTERNALLY_FROZEN"
        actor.handle(ev.Paused(paused=False))
        actor.handle(ev.StopAsked(SECOND_NS))
        assert await reason_of(sessions, actor.uid, wake=True) == "NOT_RUNNING"
        await until(actor, S.STOPPED)
        assert await reason_of(sessions, actor.uid, wake=True) == "NOT_RUNNING"
        assert await reason_of(sessions, "i-nobody") == "INSTANCE_NOT_FOUND"


async def test_host_process_refuses_commands_and_is_not_woken() -> None:
    async with exec_rig() as (rig, sessions):
        rig.runtime.executes = False
        actor = await rig.frozen()
        assert await reason_of(sessions, actor.uid, wake=True) == "EXEC_UNAVAILABLE"
        assert (actor.state, actor.instance.exec_active) == (S.FROZEN, False)


async def test_failed_command_leaves_only_its_events() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        rig.runtime.exec_error = InstanceError("EXEC_FAILED", "unable to find user nobody-here")
        assert await reason_of(sessions, actor.uid) == "EXEC_FAILED"
        assert not actor.instance.exec_active
        assert len(events_of(rig, "instance.exec")) == 1
        assert rig.messages("instance.exec_ended") == ["EXEC_FAILED"]


# ---- meanwhile ------------------------------------------------------------------------------------------------------


async def _started(rig: NodeRig, sessions: ExecSessions, actor: Actor) -> asyncio.Task[None]:
    inside = asyncio.Event()

    async def run() -> None:
        async with sessions.open(actor.uid, LS, wake=False, caller="olga"):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await asyncio.wait_for(inside.wait(), PATIENCE_S)
    return task


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_instance_freezes_after_the_last_of_two_commands() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        first, second = await _started(rig, sessions, actor), await _started(rig, sessions, actor)
        await _cancelled(first)
        rig.clock.advance(60 * SECOND_NS)
        await asyncio.sleep(0)
        assert actor.state is S.RUNNING
        await _cancelled(second)
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)


async def test_requests_are_served_during_a_command_which_is_not_metered() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        command = await _started(rig, sessions, actor)
        await enter(actor)
        actor.gate.leave()
        rig.clock.advance(20 * SECOND_NS)
        assert rig.billing.totals(actor.uid)[0] == 0
        assert actor.state is S.RUNNING
        await _cancelled(command)


async def test_waiting_instance_gets_the_gpu_after_the_command() -> None:
    async with exec_rig(per_gpu=2) as (rig, sessions):
        holders = [await rig.running() for _ in rig.gpus.gpus]
        commands = [await _started(rig, sessions, actor) for actor in holders]
        waiting = await rig.create()
        for _ in range(30):
            rig.clock.advance(SECOND_NS)
            await asyncio.sleep(0)
        assert waiting.state is S.STARTING
        assert {actor.state for actor in holders} == {S.RUNNING}
        for command in commands:
            await _cancelled(command)
        for _ in range(3):
            rig.clock.advance(SECOND_NS)
            await asyncio.sleep(0)
        await until(waiting, S.RUNNING)


async def test_a_stop_does_not_wait_for_a_command() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        command = await _started(rig, sessions, actor)
        actor.handle(ev.StopAsked(3600 * SECOND_NS))
        await until(actor, S.STOPPED)
        await _cancelled(command)


# ---- bounds ---------------------------------------------------------------------------------------------------------


async def test_number_of_commands_is_bounded() -> None:
    async with exec_rig(most=2) as (rig, sessions):
        actor = await rig.running()
        commands = [await _started(rig, sessions, actor) for _ in range(2)]
        with pytest.raises(ExhaustedError, match="TOO_MANY_CALLS"):
            await _run_until_ended(sessions, actor)
        await _cancelled(commands.pop())
        commands.append(await _started(rig, sessions, actor))
        for command in commands:
            await _cancelled(command)


async def _run_until_ended(sessions: ExecSessions, actor: Actor) -> None:
    async with asyncio.timeout(PATIENCE_S), sessions.open(actor.uid, LS, wake=False, caller="olga"):
        await asyncio.Event().wait()


async def test_duration_of_a_command_is_bounded() -> None:
    async with exec_rig(longest_s=0.02) as (rig, sessions):
        actor = await rig.running()
        with pytest.raises(DeadlineError, match="CALL_TOO_LONG"):
            await _run_until_ended(sessions, actor)
        assert rig.runtime.sessions[0].closed.is_set()
        assert rig.messages("instance.exec_ended") == ["ended by the agent"]


async def test_close_ends_commands_and_waits_for_their_clean_up() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        running = await _started(rig, sessions, actor)
        await asyncio.wait_for(sessions.close(), PATIENCE_S)
        assert rig.runtime.sessions[0].closed.is_set()
        assert not actor.instance.exec_active
        with pytest.raises(UnavailableError, match="AGENT_STOPPING"):
            await running
        assert await reason_of(sessions, actor.uid) == "AGENT_STOPPING"


# ---- events ---------------------------------------------------------------------------------------------------


async def test_events_name_caller_and_program_and_never_the_arguments() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        async with sessions.open(actor.uid, replace(LS, user="root"), wake=False, caller="olga") as running:
            rig.clock.advance(1500 * SECOND_NS // 1000)
            running.exit_code = 3
        (began,), (ended,) = events_of(rig, "instance.exec"), events_of(rig, "instance.exec_ended")
        assert began == {"program": "ls", "arguments": "2", "terminal": "no", "caller": "olga", "user": "root"}
        assert ended == {"exit_code": "3", "duration_ms": "1500", "caller": "olga"}
        assert "hunter2" not in str(rig.events.read())


async def test_events_say_that_the_caller_disconnected() -> None:
    async with exec_rig() as (rig, sessions):
        actor = await rig.running()
        await _cancelled(await _started(rig, sessions, actor))
        assert rig.messages("instance.exec_ended") == ["the caller disconnected"]
        assert "exit_code" not in events_of(rig, "instance.exec_ended")[0]
        assert rig.runtime.sessions[0].closed.is_set()

"""The end of an instance, whatever was under way, and of an agent. Nothing is left behind."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from agent.core.lifecycle import events as ev
from agent.core.types import (
    SECOND_NS,
    Exit,
    HealthCheck,
    Hook,
    Hooks,
    InstanceState,
)
from agent.host.instance.actor import Actor
from tests.host.rig import OCR, PATIENCE_S, NodeRig, enter, eventually, hangs, node_rig, until

S = InstanceState
HOOKED = replace(OCR, hooks=Hooks(pre_freeze=Hook(), pre_stop=Hook()))


async def gone(rig: NodeRig, actor: Actor) -> None:
    """It ended, and everything of it with it."""
    await until(actor, S.STOPPED, S.FAILED)
    await eventually(lambda: actor.uid in rig.node.ended)
    assert rig.runtime.containers == {}
    assert not rig.node.broker.allocator.assigned
    assert await rig.store.load_instances() == []
    assert not rig.node.memory.ledger.reservations
    assert not rig.billing.open_windows()


async def test_stop_terminates_before_it_kills() -> None:
    async with node_rig() as rig:
        actor = await rig.running(HOOKED)
        actor.handle(ev.StopAsked(SECOND_NS))
        await gone(rig, actor)
        assert "/pre-stop" in rig.app.paths()
        assert [call for call, _ in rig.runtime.calls] == ["prepare", "start", "terminate", "kill", "destroy"]
        assert actor.state is S.STOPPED


async def test_one_that_ignores_term_is_killed() -> None:
    async with node_rig(stop_timeout_s=0.02) as rig:
        actor = await rig.running()
        rig.runtime.containers[actor.uid].heeds_term = False
        actor.handle(ev.StopAsked(SECOND_NS))
        await gone(rig, actor)
        assert actor.state is S.STOPPED


async def test_force_does_not_wait_for_a_polite_stop_that_hangs() -> None:
    async with node_rig(stop_timeout_s=600.0) as rig:
        actor = await rig.running()
        rig.runtime.containers[actor.uid].heeds_term = False
        actor.handle(ev.StopAsked(SECOND_NS))
        await eventually(lambda: ("terminate", actor.uid) in rig.runtime.calls)
        actor.handle(ev.StopAsked(0, force=True))
        await gone(rig, actor)


async def test_a_frozen_instance_is_killed_without_waking_it() -> None:
    async with node_rig() as rig:
        actor = await rig.frozen(HOOKED)
        actor.handle(ev.StopAsked(SECOND_NS))
        await gone(rig, actor)
        assert "wake" not in [op for op, _ in rig.freezer.calls]
        assert "instance.pre_stop_skipped" in rig.names()


async def test_a_stop_cuts_a_start_short() -> None:
    function = replace(OCR, hooks=Hooks(initializer=Hook(timeout_ns=300 * SECOND_NS)))
    async with node_rig() as rig:
        rig.app.answers["/initialize"] = hangs
        actor = await rig.create(function)
        await rig.app.until_asked("/initialize")
        actor.handle(ev.StopAsked(SECOND_NS))
        await gone(rig, actor)
        assert actor.state is S.STOPPED


@pytest.mark.parametrize("operation", ["lock", "checkpoint", "wake"])
async def test_a_stop_during_an_operation_comes_after_it(operation: str) -> None:
    async with node_rig() as rig:
        actor = await (rig.frozen() if operation == "wake" else rig.running())
        rig.freezer.hold(operation)
        if operation == "wake":
            actor.wake(0, rig.clock.monotonic_ns() + SECOND_NS)
        else:
            rig.clock.advance(10 * SECOND_NS)
        await rig.freezer.entered(operation)
        actor.handle(ev.StopAsked(SECOND_NS))
        await asyncio.sleep(0)
        assert not actor.instance.state.value.startswith("STOP")
        rig.freezer.release(operation)
        await gone(rig, actor)
        assert actor.state is S.STOPPED


@pytest.mark.parametrize("operation", ["lock", "checkpoint", "wake"])
async def test_an_exit_during_an_operation_kills_what_is_left_at_once(operation: str) -> None:
    async with node_rig() as rig:
        actor = await (rig.frozen() if operation == "wake" else rig.running())
        rig.freezer.hold(operation)
        if operation == "wake":
            actor.wake(0, rig.clock.monotonic_ns() + SECOND_NS)
        else:
            rig.clock.advance(10 * SECOND_NS)
        await rig.freezer.entered(operation)
        rig.runtime.exit(actor.uid, Exit(code=139, signal=11))
        await until(actor, S.FAILED)
        await eventually(lambda: ("kill", actor.uid) in rig.runtime.calls)
        assert rig.holder() == (actor.uid), "still its: the operation may yet touch it"
        rig.freezer.release(operation)
        await gone(rig, actor)
        assert actor.instance.reason == "INSTANCE_CRASHED"


async def test_an_exit_while_frozen_or_waiting_is_noticed() -> None:
    async with node_rig() as rig:
        actor = await rig.frozen()
        rig.runtime.exit(actor.uid, Exit(code=0, oom_killed=True))
        await gone(rig, actor)
        assert actor.instance.reason == "OUT_OF_MEMORY"


async def test_instance_that_survives_every_kill_is_reported_and_forgotten() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.runtime.kill_hangs = True
        actor.handle(ev.StopAsked(0, force=True))
        await eventually(lambda: actor.uid in rig.node.ended)
        assert "instance.kill_failed" in rig.names()
        rig.runtime.kill_hangs = False


async def test_unexpected_error_does_not_prevent_the_end() -> None:
    async with node_rig() as rig:
        actor = await rig.running()

        async def broken(handle: object) -> None:
            raise OSError(28, "No space left on device")

        rig.runtime.destroy = broken  # type: ignore[method-assign]
        actor.handle(ev.StopAsked(0, force=True))
        await eventually(lambda: actor.uid in rig.node.ended)
        assert "No space left on device" in rig.messages("instance.kill_failed")[0]


async def test_broken_exit_watch_ends_the_instance() -> None:
    async with node_rig() as rig:

        async def broken(handle: object) -> Exit:
            raise RuntimeError("pidfd went away")

        rig.runtime.wait = broken  # type: ignore[method-assign]
        actor = await rig.create()
        await until(actor, S.FAILED)
        assert "RuntimeError" in actor.instance.message


async def test_stopping_agent_refuses_waiters_and_leaves_instances_alone() -> None:
    async with node_rig(per_gpu=2) as rig:
        rig.gpus.gpus = rig.gpus.gpus[:1]
        await rig.boot()
        sleeper, busy = await rig.frozen(), await rig.running()
        await enter(busy)
        entering = asyncio.create_task(enter(sleeper))
        await eventually(lambda: sleeper.gate.waiting == 1)
        await asyncio.wait_for(rig.node.close(), PATIENCE_S)
        (answer,) = await asyncio.gather(entering, return_exceptions=True)
        assert getattr(answer, "reason", "") == "AGENT_STOPPING"
        assert len(rig.runtime.running()) == 2
        assert rig.clock.next_timer_ns is None, "no timer is left that would freeze anything"


async def test_an_operation_under_way_ends_before_the_agent_leaves() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.freezer.hold("checkpoint")
        rig.clock.advance(10 * SECOND_NS)
        await rig.freezer.entered("checkpoint")
        closing = asyncio.create_task(rig.node.close())
        await asyncio.sleep(0)
        assert not closing.done()
        rig.freezer.release("checkpoint")
        await asyncio.wait_for(closing, PATIENCE_S)
        assert actor.state is S.FROZEN


async def test_a_start_under_way_does_not_hold_up_the_agents_leaving() -> None:
    function = replace(OCR, hooks=Hooks(initializer=Hook(timeout_ns=300 * SECOND_NS)))
    async with node_rig(stop_timeout_s=600.0) as rig:
        rig.app.answers["/initialize"] = hangs
        await rig.create(function)
        await rig.app.until_asked("/initialize")
        await asyncio.wait_for(rig.node.close(), PATIENCE_S)


async def test_an_operation_that_hangs_is_abandoned_after_the_stop_timeout() -> None:
    async with node_rig(stop_timeout_s=0.02) as rig:
        await rig.running()
        rig.freezer.hold("lock")
        rig.clock.advance(10 * SECOND_NS)
        await rig.freezer.entered("lock")
        await asyncio.wait_for(rig.node.close(), PATIENCE_S)


async def test_freeze_past_its_lock_ends_before_the_agent_stops() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.freezer.hold("lock")
        rig.clock.advance(10 * SECOND_NS)
        await rig.freezer.entered("lock")
        closing = asyncio.create_task(rig.node.close())
        await asyncio.sleep(0)
        rig.freezer.release("lock")
        await asyncio.wait_for(closing, PATIENCE_S)
        assert actor.state is S.FROZEN, "not left locked for the next agent to find"


async def test_nothing_begins_once_the_agent_stops() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        await enter(actor)
        actor.close()
        actor.gate.leave()
        assert rig.clock.next_timer_ns is None


async def test_an_exit_during_a_start_does_not_wait_for_what_the_start_waits_for() -> None:
    check = HealthCheck("/healthz", initial_delay_ns=120 * SECOND_NS)
    async with node_rig() as rig:
        actor = await rig.create(replace(OCR, health_check=check))
        await eventually(lambda: actor.pool is not None)
        rig.runtime.exit(actor.uid, Exit(code=1))
        await gone(rig, actor)


async def test_agent_can_stop_all_its_instances() -> None:
    """`on_stop: stop`: instances are asked to end in time, and killed otherwise."""
    async with node_rig(per_gpu=2, stop_timeout_s=600.0) as rig:
        sleeper = await rig.frozen(HOOKED)
        polite = await rig.running(replace(HOOKED, name="polite"))
        deaf = await rig.running(replace(OCR, name="deaf"))
        rig.runtime.containers[deaf.uid].heeds_term = False
        async with asyncio.timeout(PATIENCE_S):
            await rig.node.stop_all(SECOND_NS, 0.2)
        await eventually(lambda: {sleeper.uid, polite.uid, deaf.uid} == set(rig.node.ended))
        await gone(rig, deaf)
        assert rig.app.paths().count("/pre-stop") == 1
        assert rig.messages("instance.stopped") == ["the agent stops, and on_stop says stop"] * 3


async def test_dead_container_that_cannot_be_removed_is_no_failed_kill() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.runtime.engine_away = True
        actor.handle(ev.StopAsked(0, force=True))
        await asyncio.wait_for(actor.ended.wait(), 5)
        assert rig.runtime.running() == []
        assert rig.names(actor.uid).count("instance.removal_postponed") == 1
        assert "instance.kill_failed" not in rig.names(actor.uid)

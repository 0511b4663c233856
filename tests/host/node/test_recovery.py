"""Recovery: every state in which a new agent can find an instance."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from agent.core.errors import InstanceError, UnavailableError
from agent.core.lifecycle import events as ev
from agent.core.types import SECOND_NS, Exit, Hook, Hooks, InstanceState
from agent.host.instance.actor import Actor
from agent.ports import Condition, FreezeResult, Outcome
from tests.host.rig import OCR, World, a_world, enter, eventually, hangs, until

S = InstanceState


async def found(world: World, condition: Condition) -> Actor | None:
    """A running instance that the next agent finds like this; None if it did not keep it."""
    actor = await world.running()
    world.freezer.states[actor.uid] = condition
    await world.restart()
    return world.node.actors.get(actor.uid)


async def test_running_instance_runs_on_with_its_gpu() -> None:
    async with a_world() as world:
        actor = await found(world, Condition.AWAKE)
        assert actor is not None
        assert (actor.state, actor.instance.gate_open, world.holder()) == (S.RUNNING, True, actor.uid)
        assert world.runtime.calls.count(("start", actor.uid)) == 1
        await enter(actor)
        actor.gate.leave()
        world.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)


async def test_frozen_instance_is_recovered_without_a_driver_call_and_wakes() -> None:
    async with a_world(per_gpu=2) as world:
        uid = (await world.frozen()).uid
        world.freezer.calls.clear()
        await world.restart()
        assert {op for op, _ in world.freezer.calls} == {"condition"}
        actor = world.node.actors[uid]
        assert (actor.state, world.holder()) == (S.FROZEN, "")
        assert world.node.memory.ledger.reservations[uid].floor_bytes == OCR.gpu.memory_bytes, "its pledge is kept"
        await enter(actor)
        assert actor.gate.in_flight == 1


async def test_external_pause_is_undone() -> None:
    async with a_world() as world:
        actor = await found(world, Condition.PAUSED_BY_OTHERS)
        assert actor is not None
        assert actor.state is S.RUNNING
        assert ("thaw", actor.uid) in world.freezer.calls


async def test_locked_instance_is_unlocked() -> None:
    async with a_world() as world:
        actor = await found(world, Condition.LOCKED)
        assert actor is not None
        assert world.freezer.states[actor.uid] is Condition.AWAKE
        assert actor.state is S.RUNNING


async def test_a_half_done_freeze_is_finished() -> None:
    async with a_world() as world:
        actor = await found(world, Condition.CHECKPOINTED)
        assert actor is not None
        assert (actor.state, world.holder()) == (S.FROZEN, "")
        assert world.freezer.states[actor.uid] is Condition.FROZEN


async def test_a_freeze_that_cannot_be_finished_but_was_undone_runs_on() -> None:
    async with a_world() as world:
        world.freezer.results["finish_freeze"].append(FreezeResult(Outcome.REFUSED, "CGROUP", "no"))
        actor = await found(world, Condition.CHECKPOINTED)
        assert actor is not None
        assert actor.state is S.RUNNING


@pytest.mark.parametrize("condition", [Condition.BROKEN, Condition.LOCKED, Condition.CHECKPOINTED])
async def test_unrecoverable_instance_is_killed_and_forgotten(condition: Condition) -> None:
    async with a_world() as world:
        for operation in ("unlock", "finish_freeze"):
            world.freezer.results[operation].append(FreezeResult(Outcome.BROKEN, "CUDA_999", "no"))
        assert await found(world, condition) is None
        assert world.runtime.containers == {}
        assert await world.store.load_instances() == []
        assert "instance.killed_at_recovery" in world.names()


async def test_instance_that_misses_the_deadline_is_killed() -> None:
    async with a_world() as world:
        await world.running()

        async def never(handle: object) -> Condition:
            await asyncio.Event().wait()
            raise AssertionError

        await world.kill_agent()
        world.freezer.condition = never  # type: ignore[method-assign]
        await world.boot()
        result = await world.recover(deadline_s=0.02)
        assert (result.killed, world.runtime.containers) == (1, {})


async def test_driver_silent_for_a_moment_costs_no_instance() -> None:
    async with a_world() as world:
        uid = (await world.running()).uid
        asked = 0
        real = world.freezer.condition

        async def moody(handle: Any) -> Condition:
            nonlocal asked
            asked += 1
            if asked < 4:
                raise UnavailableError("NVML_UNAVAILABLE", "the driver does not answer")
            return await real(handle)

        world.freezer.condition = moody  # type: ignore[method-assign]
        await world.restart()
        assert world.node.actors[uid].state is S.RUNNING


async def test_agent_does_not_start_if_no_gpu_is_seen() -> None:
    async with a_world() as world:
        uid = (await world.running()).uid
        await world.kill_agent()
        world.gpus.gpus = []
        await world.boot()
        with pytest.raises(UnavailableError) as caught:
            await world.recover()
        assert caught.value.reason == "GPUS_UNKNOWN"
        assert world.runtime.running() == [uid]


async def test_instance_whose_gpu_was_removed_is_killed() -> None:
    async with a_world() as world:
        first, second = await world.running(), await world.running()
        await world.kill_agent()
        world.gpus.gpus = world.gpus.gpus[1:]
        await world.boot()
        await world.recover()
        assert list(world.node.actors) == [second.uid]
        assert first.uid not in world.runtime.containers


async def test_instance_found_in_its_start_is_started_anew() -> None:
    function = replace(OCR, hooks=Hooks(initializer=Hook(timeout_ns=300 * SECOND_NS)))
    async with a_world() as world:
        world.app.answers["/initialize"] = hangs
        uid = (await world.create(function, request_id="fn/1/0/0")).uid
        await world.app.until_asked("/initialize")
        world.clock.advance(7 * SECOND_NS)
        before = world.runtime.containers[uid].handle.process.pid
        world.app.answers["/initialize"] = 200
        result = await world.restart()
        actor = world.node.actors[uid]
        assert result.restarted == 1
        await until(actor, S.RUNNING)
        assert world.runtime.containers[uid].handle.process.pid != before
        assert await world.create(function, request_id="fn/1/0/0") is actor, "the create is still idempotent"


async def test_gap_before_a_new_start_is_unbilled_and_the_ledger_has_no_hole() -> None:
    function = replace(OCR, hooks=Hooks(initializer=Hook(timeout_ns=300 * SECOND_NS)))
    async with a_world() as world:
        world.app.answers["/initialize"] = hangs
        uid = (await world.create(function)).uid
        await world.app.until_asked("/initialize")
        world.clock.advance(3 * SECOND_NS)
        await world.billing.flush()
        await world.kill_agent()
        world.clock.advance(7 * SECOND_NS)
        await world.boot()
        await world.recover()
        await world.billing.flush()
        windows = sorted((w for w in await world.store.read_windows(uid)), key=lambda w: w.seq)
        assert all(a.end_mono_ns == b.start_mono_ns for a, b in pairwise(windows))
        assert sum(w.idle_ns for w in windows) == 3 * SECOND_NS, "what was worked before the kill"
        assert sum(w.unbilled_ns for w in windows) == 7 * SECOND_NS


async def test_gap_of_a_surviving_instance_is_idle_and_estimated() -> None:
    async with a_world() as world:
        uid = (await world.running()).uid
        await world.billing.flush()
        await world.kill_agent()
        world.clock.advance(7 * SECOND_NS)
        await world.boot()
        await world.recover()
        await world.billing.flush()
        (gap,) = [w for w in await world.store.read_windows(uid) if w.estimated]
        assert (gap.idle_ns, gap.unbilled_ns) == (7 * SECOND_NS, 0)


async def test_instance_that_ended_meanwhile_is_gone() -> None:
    async with a_world() as world:
        actor = await world.running()
        await world.kill_agent()
        world.runtime.exit(actor.uid, Exit(code=1))
        await world.boot()
        result = await world.recover()
        assert (result.gone, world.node.actors, await world.store.load_instances()) == (1, {}, [])
        assert world.runtime.containers == {}


async def test_after_a_reboot_all_are_gone() -> None:
    async with a_world(per_gpu=2) as world:
        await world.running()
        await world.frozen()
        await world.kill_agent()
        world.runtime.reboot("b007ed00-0000-4000-8000-000000000000")
        await world.boot()
        result = await world.recover()
        assert (result.gone, world.node.actors) == (2, {})


async def test_instance_found_stopping_is_stopped() -> None:
    async with a_world() as world:
        actor = await world.running()
        world.runtime.containers[actor.uid].heeds_term = False
        actor.handle(ev.StopAsked(SECOND_NS))
        await eventually(lambda: ("terminate", actor.uid) in world.runtime.calls)
        await world.restart()
        assert (world.node.actors, world.runtime.containers) == ({}, {})


async def test_a_container_of_ours_without_a_record_is_destroyed_and_reported() -> None:
    async with a_world() as world:
        actor = await world.running()
        await world.store.delete_instance(actor.uid)
        result = await world.restart()
        assert (result.orphans, world.runtime.containers) == (1, {})
        assert "instance.orphan_destroyed" in world.names()


async def test_instance_that_survives_a_kill_keeps_record_and_cordon() -> None:
    async with a_world() as world:
        actor = await world.running()
        world.freezer.states[actor.uid] = Condition.BROKEN
        world.runtime.kill_hangs = True
        await world.restart()
        assert [record.spec.uid for record in await world.store.load_instances()] == [actor.uid]
        assert world.node.broker.allocator.devices[actor.gpu_uuids[0]].cordoned.startswith("KILL_FAILED")
        world.runtime.kill_hangs = False
        result = await world.restart()
        assert (result.killed, world.runtime.containers) == (1, {})
        assert world.node.broker.allocator.devices[actor.gpu_uuids[0]].cordoned == ""


async def test_a_dead_container_that_is_busy_takes_no_gpu_out_of_use() -> None:
    async with a_world() as world:
        actor = await world.running()
        world.freezer.states[actor.uid] = Condition.BROKEN
        real = world.runtime.destroy

        async def destroy(handle: Any) -> None:
            raise InstanceError("REMOVE_FAILED", "unable to remove filesystem: device or resource busy")

        world.runtime.destroy = destroy  # type: ignore[method-assign]
        result = await world.restart()
        assert result.killed == 1
        assert world.node.broker.allocator.devices[actor.gpu_uuids[0]].cordoned == ""
        assert "instance.removal_postponed" in world.names()
        world.runtime.destroy = real  # type: ignore[method-assign]


async def test_an_orphan_that_survives_does_not_keep_the_agent_from_starting() -> None:
    async with a_world() as world:
        orphan = await world.running()
        other = await world.running()
        await world.store.delete_instance(orphan.uid)
        real = world.runtime.kill

        async def kill(handle: Any, deadline_s: float = 10.0) -> None:
            if handle.uid == orphan.uid:
                raise UnavailableError("KILL_TIMEOUT", "it survives")
            await real(handle)

        world.runtime.kill = kill  # type: ignore[method-assign]
        await world.restart()
        assert list(world.node.actors) == [other.uid]
        assert "instance.kill_failed" in world.names()


async def test_second_awake_instance_on_a_gpu_is_killed() -> None:
    async with a_world(per_gpu=2) as world:
        world.gpus.gpus = world.gpus.gpus[:1]
        await world.boot()
        first = await world.frozen()
        second = await world.running()
        world.freezer.states[first.uid] = Condition.AWAKE  # another program thawed and restored it
        await world.restart()
        assert len(world.node.actors) == 1
        assert world.holder() in (first.uid, second.uid)


async def test_unexpected_error_costs_one_instance_not_the_agent() -> None:
    async with a_world() as world:
        bad, good = await world.running(), await world.running()
        real = world.freezer.condition

        async def condition(handle: Any) -> Condition:
            if handle.uid == bad.uid:
                raise ValueError("a state nobody knows")
            return await real(handle)

        world.freezer.condition = condition  # type: ignore[method-assign]
        await world.restart()
        assert list(world.node.actors) == [good.uid]


async def test_if_the_records_cannot_be_read_the_agent_does_not_start() -> None:
    async with a_world() as world:
        uid = (await world.running()).uid
        await world.kill_agent()
        await world.boot()
        world.store.failing = True
        with pytest.raises(UnavailableError, match="STORE_FAILED"):
            await world.recover()
        assert world.runtime.running() == [uid]
        world.store.failing = False


async def test_dead_container_that_cannot_be_removed_cordons_no_gpu() -> None:
    """Its engine is down while the next agent starts: the processes are killed by the kernel."""
    async with a_world() as world:
        actor = await world.running()
        world.freezer.states[actor.uid] = Condition.BROKEN
        world.runtime.engine_away = True
        await world.restart()
        assert world.runtime.running() == []
        assert world.node.broker.allocator.devices[actor.gpu_uuids[0]].cordoned == ""
        assert await world.store.load_instances() == []
        assert "instance.removal_postponed" in world.names(actor.uid)


async def test_ended_instance_is_forgotten_while_its_engine_is_down() -> None:
    async with a_world() as world:
        actor = await world.running()
        world.runtime.exit(actor.uid, Exit(code=1))
        world.runtime.engine_away = True
        await world.restart()
        assert await world.store.load_instances() == []
        assert "instance.gone" in world.names(actor.uid)

"""GPUs are lent: idle holders freeze, busy ones drain, and a GPU is granted after proof of its release."""

from __future__ import annotations

import asyncio

import pytest

from agent.core.lifecycle import events as ev
from agent.core.types import (
    SECOND_NS,
    GpuProcess,
    InstanceState,
)
from agent.host.gpus import broker
from agent.host.node.pauses import check_pauses
from agent.ports import Condition
from tests.host.rig import a_world, enter, eventually, released, until

S = InstanceState


async def test_an_idle_holder_gives_its_gpu_to_a_start() -> None:
    async with a_world(per_gpu=2) as world:
        first, second = await world.running(), await world.running()
        third = await world.running()
        assert [first.state, second.state, third.state].count(S.FROZEN) == 1
        assert {world.holder(0), world.holder(1)} == {a.uid for a in (first, second, third) if a.state is S.RUNNING}


async def test_new_request_does_not_cancel_an_ordered_freeze_but_is_served_next() -> None:
    async with a_world(per_gpu=2) as world:
        world.gpus.gpus = world.gpus.gpus[:1]
        await world.boot()
        victim = await world.running()
        world.freezer.hold("lock")
        other = await world.create()
        await world.freezer.entered("lock")
        entering = asyncio.create_task(enter(victim))
        await asyncio.sleep(0)
        world.freezer.release("lock")
        await entering
        assert (victim.state, other.state) == (S.RUNNING, S.FROZEN)
        assert [event.instance_uid for event in world.events.read() if event.name == "instance.running"] == [
            victim.uid, other.uid, victim.uid,
        ], "the other ran in between"  # fmt: skip
        victim.gate.leave()


async def test_a_busy_holder_is_drained_after_max_hold() -> None:
    async with a_world(per_gpu=2) as world:
        world.gpus.gpus = world.gpus.gpus[:1]
        await world.boot()
        busy = await world.running()
        await enter(busy)
        other = await world.create()
        await eventually(lambda: other.instance.in_gpu_queue)
        world.clock.advance(10 * SECOND_NS)
        assert busy.instance.draining
        assert other.state is S.STARTING
        busy.gate.leave()
        await until(other, S.RUNNING)
        assert busy.state is S.FROZEN


async def test_a_gpu_is_not_handed_on_while_nvml_shows_the_old_holder() -> None:
    async with a_world(per_gpu=2) as world:
        world.gpus.gpus = world.gpus.gpus[:1]
        await world.boot()
        first = await world.running()
        assert first.handle_of_container is not None
        pid = first.handle_of_container.process.pid
        world.gpus.processes_now = [GpuProcess(world.gpus.gpus[0].uuid, pid, 1 << 20)]
        second = await world.create()
        await until(first, S.FROZEN)
        asked = len(world.gpus.calls)
        await eventually(lambda: len(world.gpus.calls) > asked + 2)
        assert (world.holder(), second.state) == (first.uid, S.STARTING)
        world.gpus.unavailable = True  # one failed answer does not end the proof
        await eventually(lambda: len(world.gpus.calls) > asked + 5)
        world.gpus.unavailable, world.gpus.processes_now = False, ()
        await until(second, S.RUNNING)


async def test_gpu_without_proof_of_release_is_cordoned() -> None:
    async with a_world(per_gpu=2, release_timeout_ns=20_000_000) as world:
        world.gpus.gpus = world.gpus.gpus[:1]
        await world.boot()
        first = await world.running()
        assert first.handle_of_container is not None
        pid = first.handle_of_container.process.pid
        world.gpus.processes_now = [GpuProcess(world.gpus.gpus[0].uuid, pid, 1 << 20)]
        second = await world.create()
        await released(world, first)
        await eventually(lambda: "gpu.cordoned" in world.names())
        device = world.node.broker.allocator.devices[world.gpus.gpus[0].uuid]
        assert device.cordoned.startswith("RELEASE_NOT_PROVEN")
        assert (device.holder, second.state) == ("", S.STARTING)


async def test_process_that_survives_its_instance_keeps_the_gpu_cordoned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(broker, "LATE_PROOF_PAUSE_S", 0.005)
    async with a_world(release_timeout_ns=20_000_000) as world:
        ended = await world.running()
        assert ended.handle_of_container is not None
        gpu, pid = ended.gpu_uuids[0], ended.handle_of_container.process.pid
        world.gpus.processes_now = [GpuProcess(gpu, pid, 1 << 20)]
        world.runtime.kill_hangs = True
        ended.handle(ev.StopAsked(0, force=True))
        await eventually(lambda: ended.uid in world.node.ended)
        asked = len(world.gpus.calls)
        await eventually(lambda: len(world.gpus.calls) > asked + 3 or "gpu.uncordoned" in world.names())
        assert world.node.broker.allocator.devices[gpu].cordoned.startswith("RELEASE_NOT_PROVEN")
        world.gpus.processes_now = ()
        await eventually(lambda: not world.node.broker.allocator.devices[gpu].cordoned)


async def test_paused_holder_does_not_keep_the_allocator_from_draining_another() -> None:
    async with a_world(migrate=True, per_gpu=2) as world:
        holders = [await world.running(), await world.running()]
        for holder in holders:
            await enter(holder)
        waiter = await world.create()
        await eventually(lambda: waiter.instance.in_gpu_queue)
        world.clock.advance(10 * SECOND_NS)
        drained, other = sorted(holders, key=lambda holder: not holder.instance.draining)
        assert (drained.instance.draining, other.instance.draining) == (True, False)
        world.freezer.states[drained.uid] = Condition.PAUSED_BY_OTHERS
        check_pauses(world.node, world.freezer)
        other.gate.leave()
        await until(waiter, S.RUNNING)
        assert other.state is S.FROZEN


async def test_gpu_request_is_withdrawn_when_all_callers_have_left() -> None:
    async with a_world(per_gpu=2) as world:
        world.gpus.gpus = world.gpus.gpus[:1]
        await world.boot()
        sleeper = await world.frozen()
        busy = await world.running()
        await enter(busy)
        entering = asyncio.create_task(enter(sleeper))
        await eventually(lambda: bool(world.node.broker.allocator.queue))
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        assert sleeper.state is S.FROZEN
        assert world.node.broker.allocator.queue == ()


async def test_two_api_wakes_last_as_long_as_the_longer() -> None:
    async with a_world(per_gpu=2) as world:
        world.gpus.gpus = world.gpus.gpus[:1]
        await world.boot()
        sleeper = await world.frozen()
        busy = await world.running()
        await enter(busy)
        now = world.clock.monotonic_ns()
        sleeper.wake(0, now + 5 * SECOND_NS)
        sleeper.wake(0, now + 2 * SECOND_NS)
        world.clock.advance(2 * SECOND_NS)
        assert "instance.waiting_gpu" in world.names(sleeper.uid)
        world.clock.advance(3 * SECOND_NS)
        assert sleeper.state is S.FROZEN
        assert world.node.broker.allocator.queue == ()

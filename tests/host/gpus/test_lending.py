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
from tests.host.rig import enter, eventually, node_rig, released, until

S = InstanceState


async def test_an_idle_holder_gives_its_gpu_to_a_start() -> None:
    async with node_rig(per_gpu=2) as rig:
        first, second = await rig.running(), await rig.running()
        third = await rig.running()
        assert [first.state, second.state, third.state].count(S.FROZEN) == 1
        assert {rig.holder(0), rig.holder(1)} == {a.uid for a in (first, second, third) if a.state is S.RUNNING}


async def test_new_request_does_not_cancel_an_ordered_freeze_but_is_served_next() -> None:
    async with node_rig(per_gpu=2) as rig:
        rig.gpus.gpus = rig.gpus.gpus[:1]
        await rig.boot()
        victim = await rig.running()
        rig.freezer.hold("lock")
        other = await rig.create()
        await rig.freezer.entered("lock")
        entering = asyncio.create_task(enter(victim))
        await asyncio.sleep(0)
        rig.freezer.release("lock")
        await entering
        assert (victim.state, other.state) == (S.RUNNING, S.FROZEN)
        assert [event.instance_uid for event in rig.events.read() if event.name == "instance.running"] == [
            victim.uid, other.uid, victim.uid,
        ], "the other ran in between"  # fmt: skip
        victim.gate.leave()


async def test_a_busy_holder_is_drained_after_max_hold() -> None:
    async with node_rig(per_gpu=2) as rig:
        rig.gpus.gpus = rig.gpus.gpus[:1]
        await rig.boot()
        busy = await rig.running()
        await enter(busy)
        other = await rig.create()
        await eventually(lambda: other.instance.in_gpu_queue)
        rig.clock.advance(10 * SECOND_NS)
        assert busy.instance.draining
        assert other.state is S.STARTING
        busy.gate.leave()
        await until(other, S.RUNNING)
        assert busy.state is S.FROZEN


async def test_a_gpu_is_not_handed_on_while_nvml_shows_the_old_holder() -> None:
    async with node_rig(per_gpu=2) as rig:
        rig.gpus.gpus = rig.gpus.gpus[:1]
        await rig.boot()
        first = await rig.running()
        assert first.handle_of_container is not None
        pid = first.handle_of_container.process.pid
        rig.gpus.processes_now = [GpuProcess(rig.gpus.gpus[0].uuid, pid, 1 << 20)]
        second = await rig.create()
        await until(first, S.FROZEN)
        asked = len(rig.gpus.calls)
        await eventually(lambda: len(rig.gpus.calls) > asked + 2)
        assert (rig.holder(), second.state) == (first.uid, S.STARTING)
        rig.gpus.unavailable = True  # one failed answer does not end the proof
        await eventually(lambda: len(rig.gpus.calls) > asked + 5)
        rig.gpus.unavailable, rig.gpus.processes_now = False, ()
        await until(second, S.RUNNING)


async def test_gpu_without_proof_of_release_is_cordoned() -> None:
    async with node_rig(per_gpu=2, release_timeout_ns=20_000_000) as rig:
        rig.gpus.gpus = rig.gpus.gpus[:1]
        await rig.boot()
        first = await rig.running()
        assert first.handle_of_container is not None
        pid = first.handle_of_container.process.pid
        rig.gpus.processes_now = [GpuProcess(rig.gpus.gpus[0].uuid, pid, 1 << 20)]
        second = await rig.create()
        await released(rig, first)
        await eventually(lambda: "gpu.cordoned" in rig.names())
        device = rig.node.broker.allocator.devices[rig.gpus.gpus[0].uuid]
        assert device.cordoned.startswith("RELEASE_NOT_PROVEN")
        assert (device.holder, second.state) == ("", S.STARTING)


async def test_process_that_survives_its_instance_keeps_the_gpu_cordoned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(broker, "LATE_PROOF_PAUSE_S", 0.005)
    async with node_rig(release_timeout_ns=20_000_000) as rig:
        ended = await rig.running()
        assert ended.handle_of_container is not None
        gpu, pid = ended.gpu_uuids[0], ended.handle_of_container.process.pid
        rig.gpus.processes_now = [GpuProcess(gpu, pid, 1 << 20)]
        rig.runtime.kill_hangs = True
        ended.handle(ev.StopAsked(0, force=True))
        await eventually(lambda: ended.uid in rig.node.ended)
        asked = len(rig.gpus.calls)
        await eventually(lambda: len(rig.gpus.calls) > asked + 3 or "gpu.uncordoned" in rig.names())
        assert rig.node.broker.allocator.devices[gpu].cordoned.startswith("RELEASE_NOT_PROVEN")
        rig.gpus.processes_now = ()
        await eventually(lambda: not rig.node.broker.allocator.devices[gpu].cordoned)


async def test_paused_holder_does_not_keep_the_allocator_from_draining_another() -> None:
    async with node_rig(migrate=True, per_gpu=2) as rig:
        holders = [await rig.running(), await rig.running()]
        for holder in holders:
            await enter(holder)
        waiter = await rig.create()
        await eventually(lambda: waiter.instance.in_gpu_queue)
        rig.clock.advance(10 * SECOND_NS)
        drained, other = sorted(holders, key=lambda holder: not holder.instance.draining)
        assert (drained.instance.draining, other.instance.draining) == (True, False)
        rig.freezer.states[drained.uid] = Condition.PAUSED_BY_OTHERS
        check_pauses(rig.node, rig.freezer)
        other.gate.leave()
        await until(waiter, S.RUNNING)
        assert other.state is S.FROZEN


async def test_gpu_request_is_withdrawn_when_all_callers_have_left() -> None:
    async with node_rig(per_gpu=2) as rig:
        rig.gpus.gpus = rig.gpus.gpus[:1]
        await rig.boot()
        sleeper = await rig.frozen()
        busy = await rig.running()
        await enter(busy)
        entering = asyncio.create_task(enter(sleeper))
        await eventually(lambda: bool(rig.node.broker.allocator.queue))
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)
        assert sleeper.state is S.FROZEN
        assert rig.node.broker.allocator.queue == ()


async def test_two_api_wakes_last_as_long_as_the_longer() -> None:
    async with node_rig(per_gpu=2) as rig:
        rig.gpus.gpus = rig.gpus.gpus[:1]
        await rig.boot()
        sleeper = await rig.frozen()
        busy = await rig.running()
        await enter(busy)
        now = rig.clock.monotonic_ns()
        sleeper.wake(0, now + 5 * SECOND_NS)
        sleeper.wake(0, now + 2 * SECOND_NS)
        rig.clock.advance(2 * SECOND_NS)
        assert "instance.waiting_gpu" in rig.names(sleeper.uid)
        rig.clock.advance(3 * SECOND_NS)
        assert sleeper.state is S.FROZEN
        assert rig.node.broker.allocator.queue == ()

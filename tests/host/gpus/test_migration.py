"""Instances that may wake on another GPU: placement, driver calls, and recovery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from agent.core.lifecycle import events as ev
from agent.core.types import MIB, GpuProcess, Handle, InstanceState
from agent.host.instance.actor import Actor
from agent.host.node.pauses import check_pauses
from agent.ports import Condition, FreezeResult, Outcome
from tests.host.rig import OCR, NodeRig, enter, eventually, node_rig, released, until

NOT_NOW = FreezeResult(Outcome.REFUSED, "GPU_MEMORY_SHORT", "an outsider took the memory")


@pytest.fixture
async def rig() -> AsyncIterator[NodeRig]:
    async with node_rig(migrate=True, per_gpu=2) as it:
        yield it


def gpus(rig: NodeRig) -> tuple[str, str]:
    first, second = (gpu.uuid for gpu in rig.gpus.gpus)
    return first, second


async def recorded(rig: NodeRig, uid: str) -> tuple[str, ...]:
    """The GPUs that the disk knows."""
    return next(record.gpu_uuids for record in await rig.store.load_instances() if record.spec.uid == uid)


async def awake_on_the_second(rig: NodeRig) -> Actor:
    """One that was frozen on the first GPU and is busy on the other now, where NVML shows it; not on disk yet."""
    first, second = gpus(rig)
    mover = await rig.frozen()
    rig.node.broker.cordon("", [first], "NVML_ERROR", source="test", lasting=False)
    await enter(mover)
    handle = mover.handle_of_container
    assert handle is not None
    rig.gpus.processes_now = [GpuProcess(second, pid, 16 * MIB) for pid in await rig.runtime.pids(handle)]
    return mover


async def test_it_wakes_on_a_free_gpu_when_its_own_is_taken(rig: NodeRig) -> None:
    first, second = gpus(rig)
    mover = await rig.frozen()
    neighbour = await rig.running()
    third = await rig.running(replace(OCR, name="third"))
    assert {neighbour.gpu_uuids, third.gpu_uuids} == {(first,), (second,)}
    away = neighbour if neighbour.gpu_uuids == (second,) else third
    away.handle(ev.StopAsked(0, force=True))
    await away.ended.wait()
    await enter(mover)
    assert mover.gpu_uuids == (second,)


async def test_the_driver_gets_a_map_of_all_gpus_and_the_move_is_remembered(rig: NodeRig) -> None:
    first, second = gpus(rig)
    mover = await rig.frozen()
    assert mover.gpu_uuids == (first,)
    rig.node.broker.cordon("", [first], "NVML_ERROR", source="test", lasting=False)
    await enter(mover)
    assert rig.freezer.maps[-1] == {first: second, second: first}
    assert mover.gpu_uuids == (second,)
    assert rig.holder(1) == mover.uid
    assert "instance.moved" in rig.names(mover.uid)


async def test_wake_on_the_same_gpu_needs_no_map(rig: NodeRig) -> None:
    mover = await rig.frozen()
    await enter(mover)
    assert rig.freezer.maps[-1] == {}
    assert "instance.moved" not in rig.names(mover.uid)


async def test_every_gpu_is_visible_inside_but_its_own_is_the_one_it_uses(rig: NodeRig) -> None:
    first, _ = gpus(rig)
    mover = await rig.running()
    spec = rig.runtime.containers[mover.uid].spec
    assert (spec.all_gpus, spec.gpu_uuids) == (True, (first,))


async def test_restore_that_fails_on_one_gpu_is_tried_on_the_other(rig: NodeRig) -> None:
    first, second = gpus(rig)
    mover = await rig.frozen()
    rig.freezer.results["wake"].append(NOT_NOW)
    await enter(mover)
    assert mover.state is InstanceState.RUNNING
    assert rig.freezer.maps == [{}, {first: second, second: first}]
    assert "instance.restore_retried" in rig.names(mover.uid)
    await eventually(lambda: rig.holder(0) == "")


async def test_a_restore_that_fails_everywhere_ends_the_instance_and_frees_both(rig: NodeRig) -> None:
    mover = await rig.frozen()
    rig.freezer.results["wake"].extend([NOT_NOW, NOT_NOW])
    mover.wake(0, rig.clock.monotonic_ns() + 10**9)
    await until(mover, InstanceState.FAILED)
    await mover.ended.wait()
    await eventually(lambda: not rig.holder(0) and not rig.holder(1))
    assert mover.instance.reason == "GPU_MEMORY_SHORT"


async def test_a_frozen_instance_of_a_lost_gpu_moves(rig: NodeRig) -> None:
    first, second = gpus(rig)
    mover = await rig.frozen()
    rig.node.broker.cordon("", [first], "XID 79", source="xid", lasting=True)
    await enter(mover)
    assert mover.gpu_uuids == (second,)


async def test_start_is_told_the_numbers_of_its_gpus(rig: NodeRig) -> None:
    first, _ = gpus(rig)
    rig.node.broker.cordon("", [first], "NVML_ERROR", source="test", lasting=False)
    actor = await rig.running()
    spec = rig.runtime.containers[actor.uid].spec
    assert (spec.gpu_numbers, spec.all_gpus) == ((1,), True)


async def test_placement_is_on_disk_before_the_freeze(rig: NodeRig) -> None:
    first, second = gpus(rig)
    mover = await rig.frozen()
    rig.node.broker.cordon("", [first], "NVML_ERROR", source="test", lasting=False)
    mover.wake(0, rig.clock.monotonic_ns() + 10**9)
    await until(mover, InstanceState.RUNNING)
    assert (await recorded(rig, mover.uid)) == (first,), "a wake waits for no disk"
    rig.clock.advance(10**9)  # the wake's own deadline
    rig.clock.advance(OCR.idle.freeze_after_ns)
    await until(mover, InstanceState.FROZEN)
    await released(rig, mover)
    assert (await recorded(rig, mover.uid)) == (second,)
    await rig.restart()
    again = rig.node.actors[mover.uid]
    assert (again.state, again.gpu_uuids) == (InstanceState.FROZEN, (second,))


async def test_new_agent_finds_the_gpu_of_an_awake_instance_by_nvml(rig: NodeRig) -> None:
    _, second = gpus(rig)
    mover = await awake_on_the_second(rig)
    rig.freezer.states[mover.uid] = Condition.AWAKE
    await rig.restart()
    again = rig.node.actors[mover.uid]
    assert (again.state, again.gpu_uuids) == (InstanceState.RUNNING, (second,))
    assert rig.holder(1) == mover.uid


async def test_move_found_by_nvml_is_on_disk_before_the_next_freeze(rig: NodeRig) -> None:
    _, second = gpus(rig)
    mover = await awake_on_the_second(rig)
    await rig.restart()
    again = rig.node.actors[mover.uid]
    rig.gpus.processes_now = ()
    rig.clock.advance(OCR.idle.freeze_after_ns)
    await until(again, InstanceState.FROZEN)
    assert (await recorded(rig, mover.uid)) == (second,)
    await rig.restart()
    assert rig.node.actors[mover.uid].gpu_uuids == (second,), "its image is of that GPU"


async def test_moved_instance_that_survives_a_kill_cordons_its_present_gpu(
    rig: NodeRig,
) -> None:
    _, second = gpus(rig)
    mover = await awake_on_the_second(rig)
    rig.freezer.states[mover.uid] = Condition.BROKEN
    rig.runtime.kill_hangs = True
    await rig.restart()
    assert rig.node.broker.allocator.devices[second].cordoned.startswith("KILL_FAILED")


async def test_recovery_waits_for_nvml_to_place_an_awake_instance(
    rig: NodeRig,
) -> None:
    _, second = gpus(rig)
    mover = await awake_on_the_second(rig)
    rig.gpus.errors[second] = "silent"
    rig.freezer.states[mover.uid] = Condition.AWAKE
    await rig.billing.flush()
    await rig.kill_agent()
    await rig.boot()
    recovering = asyncio.create_task(rig.recover())
    asked = rig.gpus.calls.count("processes")
    await eventually(lambda: rig.gpus.calls.count("processes") > asked + 1)
    assert rig.holder(0) == "", "the GPU on which it was last frozen is not believed"
    rig.gpus.errors.clear()
    await recovering
    assert (rig.holder(0), rig.holder(1)) == ("", mover.uid)


async def test_without_migration_a_wake_on_a_lost_gpu_fails_the_instance() -> None:
    async with node_rig() as rig:
        asleep = await rig.frozen()
        rig.node.broker.cordon("", asleep.gpu_uuids, "XID 79", source="xid", lasting=True)
        assert asleep.state is InstanceState.FROZEN, "nobody asks for it"
        asleep.wake(0, rig.clock.monotonic_ns() + 10**9)
        await until(asleep, InstanceState.FAILED)
        assert asleep.instance.reason == "GPU_LOST"


async def test_external_pause_closes_the_gate_until_it_ends(rig: NodeRig) -> None:
    actor = await rig.running()
    rig.freezer.states[actor.uid] = Condition.PAUSED_BY_OTHERS
    check_pauses(rig.node, rig.freezer)
    assert not actor.instance.gate_open
    assert "instance.externally_frozen" in rig.names(actor.uid)
    rig.clock.advance(OCR.idle.freeze_after_ns + 1)
    assert actor.state is InstanceState.RUNNING, "the driver is not asked"
    rig.freezer.states[actor.uid] = Condition.AWAKE
    check_pauses(rig.node, rig.freezer)
    await enter(actor)
    assert actor.gate.in_flight == 1


async def test_unreadable_instance_does_not_end_the_pause_watch(rig: NodeRig) -> None:
    """The watch is one of the daemon's services: if it ends, the daemon ends."""
    blind, seen = await rig.running(), await rig.running(replace(OCR, name="seen"))
    rig.freezer.states[seen.uid] = Condition.PAUSED_BY_OTHERS

    def look(handle: Handle) -> bool:
        if handle.uid == blind.uid:
            raise OSError(24, "Too many open files")
        return True

    rig.freezer.paused = look  # type: ignore[method-assign]
    check_pauses(rig.node, rig.freezer)
    assert (blind.instance.paused, seen.instance.paused) == (False, True)


async def test_container_that_sees_only_its_own_gpu_never_moves(rig: NodeRig) -> None:
    sleeper = await rig.frozen()
    (record,) = [one for one in await rig.store.load_instances() if one.spec.uid == sleeper.uid]
    assert record.handle is not None
    container = rig.runtime.containers[sleeper.uid]
    container.handle = replace(container.handle, sees_all_gpus=False)
    await rig.store.put_instance(replace(record, handle=container.handle))
    await rig.restart()
    again = rig.node.actors[sleeper.uid]
    assert (again.state, again.instance.movable) == (InstanceState.FROZEN, False)

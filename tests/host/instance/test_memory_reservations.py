"""Memory limits, notes and pledges of a node, and which operations wait for a disk."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from agent.core.errors import PreconditionError
from agent.core.types import GIB, MIB, SECOND_NS, Exit, GpuNeed, Handle, InstanceState, ProcessId
from agent.host.instance.memory_reservations import ImageSize, MemoryReservations
from agent.ports import Condition
from tests.fakes.host_memory import FakeHostMemory
from tests.host.rig import OCR, NodeRig, enter, eventually, node_rig, until

S = InstanceState
HANDLE = Handle("ocr-1", ProcessId("boot-1", 4711, 9988), "127.0.0.1", 9000)
UNDECLARED = replace(OCR, gpu=GpuNeed())


def reason(rig: NodeRig, uid: str) -> str:
    return rig.node.get(uid).instance.reason


# ---- limits ---------------------------------------------------------------------------------------------------------


async def test_tight_limit_is_raised_for_the_freeze_and_lowered_after_the_wake() -> None:
    async with node_rig() as rig:
        rig.memory.raise_refusal = ""
        actor = await rig.running()
        rig.memory.headroom[actor.uid] = 32 * MIB
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)
        assert rig.memory.raised == {actor.uid: actor.figures.vram_bytes}
        await enter(actor)
        actor.gate.leave()
        await eventually(lambda: not rig.memory.raised)


async def test_limit_that_cannot_be_raised_keeps_it_awake_with_a_fix() -> None:
    async with node_rig() as rig:
        rig.memory.raise_refusal = "its memory limit is shared with other processes; raise that limit"
        actor = await rig.running()
        rig.memory.headroom[actor.uid] = 32 * MIB
        rig.clock.advance(10 * SECOND_NS)
        await eventually(lambda: bool(rig.messages("instance.freeze_refused")))
        (message,) = rig.messages("instance.freeze_refused")
        assert message.startswith("HOST_MEMORY_SHORT")
        assert "raise that limit" in message
        assert actor.state is S.RUNNING
        assert rig.node.memory.ledger.reserved_bytes == 0


async def test_a_freeze_without_a_tight_limit_and_its_wake_write_no_limit() -> None:
    async with node_rig() as rig:
        actor = await rig.frozen()
        await enter(actor)
        actor.gate.leave()
        assert {operation for operation, _ in rig.memory.writes} <= {"note_image", "recover"}


async def test_limit_left_raised_by_one_wake_is_lowered_by_the_next() -> None:
    async with node_rig() as rig:
        rig.memory.raise_refusal = ""
        actor = await rig.running()
        rig.memory.headroom[actor.uid] = 32 * MIB
        rig.memory.in_use.add(actor.uid)
        for _ in range(2):
            rig.clock.advance(10 * SECOND_NS)
            await until(actor, S.FROZEN)
            await enter(actor)
            actor.gate.leave()
            await eventually(lambda: rig.memory.writes[-1] == ("lower_limit", actor.uid))
            rig.memory.in_use.clear()
        assert not rig.memory.raised


async def test_after_a_restart_only_the_frozen_keep_a_raised_limit() -> None:
    async with node_rig() as rig:
        awake, frozen = await rig.running(), await rig.frozen()
        await enter(awake)  # its own idle time has passed as well
        rig.memory.raised = {awake.uid: 1, frozen.uid: 1, "i-of-long-ago": 1}
        await rig.restart()
        assert set(rig.memory.raised) == {frozen.uid}
        again = rig.node.actors[frozen.uid]
        await enter(again)
        again.gate.leave()
        await eventually(lambda: not rig.memory.raised)


async def test_a_disk_that_is_stuck_blocks_neither_the_loop_nor_the_others() -> None:
    memory, stuck = FakeHostMemory(), threading.Event()
    memory.raise_refusal = ""
    memory.headroom["ocr-1"] = 0
    memory.on_disk = lambda operation: stuck.wait(10)
    desk = MemoryReservations(memory, limit_bytes=0, reserve_bytes=0, disk_deadline_s=0.05)
    try:
        with pytest.raises(PreconditionError) as caught:
            await desk.reserve(HANDLE, GIB)
        assert caught.value.reason == "HOST_MEMORY_SHORT"
        assert "state_dir" in caught.value.message
        assert desk.ledger.reserved_bytes == 0
        desk.restored("ocr-1")  # queued behind the raise under way
    finally:
        stuck.set()
    await eventually(lambda: memory.writes == [("raise_limit", "ocr-1"), ("lower_limit", "ocr-1")])
    await eventually(lambda: not memory.raised)
    desk.close()


async def test_the_next_freeze_waits_until_the_limit_of_the_last_one_is_lowered() -> None:
    memory, lowering, go_on = FakeHostMemory(), threading.Event(), threading.Event()
    memory.raise_refusal = ""
    memory.headroom["ocr-1"] = 0

    def hold(operation: str) -> None:
        if operation == "lower_limit" and not lowering.is_set():
            lowering.set()
            go_on.wait(10)

    memory.on_disk = hold
    desk = MemoryReservations(memory, limit_bytes=0, reserve_bytes=0)
    await desk.reserve(HANDLE, GIB)
    desk.restored("ocr-1")
    await eventually(lowering.is_set)
    again = asyncio.create_task(desk.reserve(HANDLE, GIB))
    await asyncio.sleep(0)
    assert not again.done()
    go_on.set()
    await again
    assert [operation for operation, _ in memory.writes if operation.endswith("limit")] == [
        "raise_limit", "lower_limit", "raise_limit",
    ]  # fmt: skip
    assert memory.raised
    desk.close()


# ---- images of an earlier agent -------------------------------------------------------------------------------------


async def test_a_restart_knows_the_size_of_a_frozen_image() -> None:
    async with node_rig() as rig:
        actor = await rig.frozen()
        size = actor.figures.image_bytes
        await eventually(lambda: rig.memory.noted == {actor.uid: size})
        await rig.restart()
        again = rig.node.actors[actor.uid]
        assert again.figures.image_bytes == size > 0
        ledger = rig.node.memory.ledger
        assert (ledger.reserved_bytes, ledger.outstanding_bytes) == (size, 0)


async def test_without_a_note_it_is_no_more_than_its_processes_hold() -> None:
    async with node_rig(per_gpu=2) as rig:
        actor = await rig.frozen()
        await eventually(lambda: bool(rig.memory.noted))
        rig.memory.noted.clear()
        rig.memory.resident = 3 * GIB
        await rig.restart()
        ledger = rig.node.memory.ledger
        assert ledger.reserved_bytes == 3 * GIB
        assert ledger.outstanding_bytes == OCR.gpu.memory_bytes, "nobody knows how much of the pledge is used up"
        assert rig.node.actors[actor.uid].figures.image_bytes == 3 * GIB


async def test_ended_instance_leaves_no_note() -> None:
    async with node_rig() as rig:
        actor = await rig.frozen()
        await eventually(lambda: bool(rig.memory.noted))
        rig.runtime.exit(actor.uid, Exit(code=-9, signal=9))
        await until(actor, S.FAILED)
        await eventually(lambda: not rig.memory.noted)


# ---- sharers that declare nothing -----------------------------------------------------------------------------------


async def test_sharer_without_declared_size_is_pledged_its_measured_size() -> None:
    async with node_rig(per_gpu=2) as rig:
        actor = await rig.running(UNDECLARED)
        assert rig.node.memory.ledger.reservations[actor.uid].floor_bytes == rig.freezer.image_bytes
        assert rig.node.memory.ledger.outstanding_bytes == rig.freezer.image_bytes


async def test_sharer_that_could_never_be_frozen_does_not_start() -> None:
    async with node_rig(per_gpu=2) as rig:
        first = await rig.running(UNDECLARED)
        rig.memory.available = rig.freezer.image_bytes + 65 * MIB
        second = await rig.create(UNDECLARED)
        await until(second, S.FAILED)
        assert reason(rig, second.uid) == "HOST_MEMORY_SHORT"
        assert "gpuMemorySize" in second.instance.message
        await eventually(lambda: set(rig.node.memory.ledger.reservations) == {first.uid})


async def test_its_pledge_follows_what_is_measured_and_outlives_the_agent() -> None:
    async with node_rig(per_gpu=2) as rig:
        actor = await rig.running(UNDECLARED)
        rig.freezer.image_bytes *= 2
        rig.freezer.states[actor.uid] = Condition.AWAKE
        await rig.restart()
        floor = rig.node.memory.ledger.reservations[actor.uid].floor_bytes
        assert floor == rig.freezer.image_bytes


async def test_sharer_that_declared_too_little_is_admitted_at_each_freeze() -> None:
    memory = FakeHostMemory(available=2 * GIB)
    desk = MemoryReservations(memory, limit_bytes=0, reserve_bytes=0)
    desk.pledge("ocr-1", GIB)
    desk.measured("ocr-1", GIB + 512 * MIB)
    assert desk.ledger.outstanding_bytes == GIB + 512 * MIB, "there is room for it"
    desk.measured("ocr-1", 4 * GIB)
    assert desk.ledger.outstanding_bytes == GIB + 512 * MIB
    with pytest.raises(PreconditionError):
        await desk.reserve(HANDLE, 4 * GIB)
    desk.forget("ocr-1")
    desk.measured("ocr-1", GIB)
    assert not desk.ledger.reservations, "no sharer: nothing is pledged"
    desk.recovered("ocr-1", None, ImageSize(GIB), frozen=True)
    assert (desk.ledger.reserved_bytes, desk.ledger.outstanding_bytes) == (GIB, 0)
    desk.close()

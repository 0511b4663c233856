"""Recovery: every state in which a new agent can find an instance."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from agent.core.errors import InstanceError, UnavailableError
from agent.core.instance_record import UnreadableRecord
from agent.core.lifecycle import events as ev
from agent.core.types import SECOND_NS, Exit, Handle, Hook, Hooks, InstanceState
from agent.host.instance.actor import Actor
from agent.ports import Condition, FreezeResult, Outcome
from tests.host.rig import OCR, NodeRig, enter, eventually, hangs, node_rig, until

S = InstanceState


async def found(rig: NodeRig, condition: Condition) -> Actor | None:
    """A running instance that the next agent finds like this; None if it did not keep it."""
    actor = await rig.running()
    rig.freezer.states[actor.uid] = condition
    await rig.restart()
    return rig.node.actors.get(actor.uid)


async def test_running_instance_runs_on_with_its_gpu() -> None:
    async with node_rig() as rig:
        actor = await found(rig, Condition.AWAKE)
        assert actor is not None
        assert (actor.state, actor.instance.gate_open, rig.holder()) == (S.RUNNING, True, actor.uid)
        assert rig.runtime.calls.count(("start", actor.uid)) == 1
        await enter(actor)
        actor.gate.leave()
        rig.clock.advance(10 * SECOND_NS)
        await until(actor, S.FROZEN)


async def test_frozen_instance_is_recovered_without_a_driver_call_and_wakes() -> None:
    async with node_rig(per_gpu=2) as rig:
        uid = (await rig.frozen()).uid
        rig.freezer.calls.clear()
        await rig.restart()
        assert {op for op, _ in rig.freezer.calls} == {"condition"}
        actor = rig.node.actors[uid]
        assert (actor.state, rig.holder()) == (S.FROZEN, "")
        assert rig.node.memory.ledger.reservations[uid].floor_bytes == OCR.gpu.memory_bytes, "its pledge is kept"
        await enter(actor)
        assert actor.gate.in_flight == 1


async def test_external_pause_is_undone() -> None:
    async with node_rig() as rig:
        actor = await found(rig, Condition.PAUSED_BY_OTHERS)
        assert actor is not None
        assert actor.state is S.RUNNING
        assert ("thaw", actor.uid) in rig.freezer.calls


async def test_locked_instance_is_unlocked() -> None:
    async with node_rig() as rig:
        actor = await found(rig, Condition.LOCKED)
        assert actor is not None
        assert rig.freezer.states[actor.uid] is Condition.AWAKE
        assert actor.state is S.RUNNING


async def test_a_half_done_freeze_is_finished() -> None:
    async with node_rig() as rig:
        actor = await found(rig, Condition.CHECKPOINTED)
        assert actor is not None
        assert (actor.state, rig.holder()) == (S.FROZEN, "")
        assert rig.freezer.states[actor.uid] is Condition.FROZEN


async def test_a_freeze_that_cannot_be_finished_but_was_undone_runs_on() -> None:
    async with node_rig() as rig:
        rig.freezer.results["finish_freeze"].append(FreezeResult(Outcome.REFUSED, "CGROUP", "no"))
        actor = await found(rig, Condition.CHECKPOINTED)
        assert actor is not None
        assert actor.state is S.RUNNING


@pytest.mark.parametrize("condition", [Condition.BROKEN, Condition.LOCKED, Condition.CHECKPOINTED])
async def test_unrecoverable_instance_is_killed_and_forgotten(condition: Condition) -> None:
    async with node_rig() as rig:
        for operation in ("unlock", "finish_freeze"):
            rig.freezer.results[operation].append(FreezeResult(Outcome.BROKEN, "CUDA_999", "no"))
        assert await found(rig, condition) is None
        assert rig.runtime.containers == {}
        assert await rig.store.load_instances() == []
        assert "instance.killed_at_recovery" in rig.names()


async def test_instance_that_misses_the_deadline_is_killed() -> None:
    async with node_rig() as rig:
        await rig.running()

        async def never(handle: object) -> Condition:
            await asyncio.Event().wait()
            raise AssertionError

        await rig.kill_agent()
        rig.freezer.condition = never  # type: ignore[method-assign]
        await rig.boot()
        result = await rig.recover(deadline_s=0.02)
        assert (result.killed, rig.runtime.containers) == (1, {})


async def test_driver_silent_for_a_moment_costs_no_instance() -> None:
    async with node_rig() as rig:
        uid = (await rig.running()).uid
        asked = 0
        real = rig.freezer.condition

        async def moody(handle: Any) -> Condition:
            nonlocal asked
            asked += 1
            if asked < 4:
                raise UnavailableError("NVML_UNAVAILABLE", "the driver does not answer")
            return await real(handle)

        rig.freezer.condition = moody  # type: ignore[method-assign]
        await rig.restart()
        assert rig.node.actors[uid].state is S.RUNNING


async def test_agent_does_not_start_if_no_gpu_is_seen() -> None:
    async with node_rig() as rig:
        uid = (await rig.running()).uid
        await rig.kill_agent()
        rig.gpus.gpus = []
        await rig.boot()
        with pytest.raises(UnavailableError) as caught:
            await rig.recover()
        assert caught.value.reason == "GPUS_UNKNOWN"
        assert rig.runtime.running() == [uid]


async def test_instance_whose_gpu_was_removed_is_killed() -> None:
    async with node_rig() as rig:
        first, second = await rig.running(), await rig.running()
        await rig.kill_agent()
        rig.gpus.gpus = rig.gpus.gpus[1:]
        await rig.boot()
        await rig.recover()
        assert list(rig.node.actors) == [second.uid]
        assert first.uid not in rig.runtime.containers


async def test_instance_found_in_its_start_is_started_anew() -> None:
    function = replace(OCR, hooks=Hooks(initializer=Hook(timeout_ns=300 * SECOND_NS)))
    async with node_rig() as rig:
        rig.app.answers["/initialize"] = hangs
        uid = (await rig.create(function, request_id="fn/1/0/0")).uid
        await rig.app.until_asked("/initialize")
        rig.clock.advance(7 * SECOND_NS)
        before = rig.runtime.containers[uid].handle.process.pid
        rig.app.answers["/initialize"] = 200
        result = await rig.restart()
        actor = rig.node.actors[uid]
        assert result.restarted == 1
        await until(actor, S.RUNNING)
        assert rig.runtime.containers[uid].handle.process.pid != before
        assert await rig.create(function, request_id="fn/1/0/0") is actor, "the create is still idempotent"


async def test_gap_before_a_new_start_is_unbilled_and_the_ledger_has_no_hole() -> None:
    function = replace(OCR, hooks=Hooks(initializer=Hook(timeout_ns=300 * SECOND_NS)))
    async with node_rig() as rig:
        rig.app.answers["/initialize"] = hangs
        uid = (await rig.create(function)).uid
        await rig.app.until_asked("/initialize")
        rig.clock.advance(3 * SECOND_NS)
        await rig.billing.flush()
        await rig.kill_agent()
        rig.clock.advance(7 * SECOND_NS)
        await rig.boot()
        await rig.recover()
        await rig.billing.flush()
        windows = sorted((w for w in await rig.store.read_windows(uid)), key=lambda w: w.seq)
        assert all(a.end_mono_ns == b.start_mono_ns for a, b in pairwise(windows))
        assert sum(w.idle_ns for w in windows) == 3 * SECOND_NS, "what was worked before the kill"
        assert sum(w.unbilled_ns for w in windows) == 7 * SECOND_NS


async def test_gap_of_a_surviving_instance_is_idle_and_estimated() -> None:
    async with node_rig() as rig:
        uid = (await rig.running()).uid
        await rig.billing.flush()
        await rig.kill_agent()
        rig.clock.advance(7 * SECOND_NS)
        await rig.boot()
        await rig.recover()
        await rig.billing.flush()
        (gap,) = [w for w in await rig.store.read_windows(uid) if w.estimated]
        assert (gap.idle_ns, gap.unbilled_ns) == (7 * SECOND_NS, 0)


async def test_instance_that_ended_meanwhile_is_gone() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        await rig.kill_agent()
        rig.runtime.exit(actor.uid, Exit(code=1))
        await rig.boot()
        result = await rig.recover()
        assert (result.gone, rig.node.actors, await rig.store.load_instances()) == (1, {}, [])
        assert rig.runtime.containers == {}


async def test_after_a_reboot_all_are_gone() -> None:
    async with node_rig(per_gpu=2) as rig:
        await rig.running()
        await rig.frozen()
        await rig.kill_agent()
        rig.runtime.reboot("b007ed00-0000-4000-8000-000000000000")
        await rig.boot()
        result = await rig.recover()
        assert (result.gone, rig.node.actors) == (2, {})


async def test_instance_found_stopping_is_stopped() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.runtime.containers[actor.uid].heeds_term = False
        actor.handle(ev.StopAsked(SECOND_NS))
        await eventually(lambda: ("terminate", actor.uid) in rig.runtime.calls)
        await rig.restart()
        assert (rig.node.actors, rig.runtime.containers) == ({}, {})


async def test_a_container_of_ours_without_a_record_is_destroyed_and_reported() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        await rig.store.delete_instance(actor.uid)
        result = await rig.restart()
        assert (result.orphans, rig.runtime.containers) == (1, {})
        assert "instance.orphan_destroyed" in rig.names()


async def test_instance_that_survives_a_kill_keeps_record_and_cordon() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.freezer.states[actor.uid] = Condition.BROKEN
        rig.runtime.kill_hangs = True
        await rig.restart()
        assert [record.spec.uid for record in await rig.store.load_instances()] == [actor.uid]
        assert rig.node.broker.allocator.devices[actor.gpu_uuids[0]].cordoned.startswith("KILL_FAILED")
        rig.runtime.kill_hangs = False
        result = await rig.restart()
        assert (result.killed, rig.runtime.containers) == (1, {})
        assert rig.node.broker.allocator.devices[actor.gpu_uuids[0]].cordoned == ""


async def test_a_dead_container_that_is_busy_takes_no_gpu_out_of_use() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.freezer.states[actor.uid] = Condition.BROKEN
        real = rig.runtime.destroy

        async def destroy(handle: Any) -> None:
            raise InstanceError("REMOVE_FAILED", "unable to remove filesystem: device or resource busy")

        rig.runtime.destroy = destroy  # type: ignore[method-assign]
        result = await rig.restart()
        assert result.killed == 1
        assert rig.node.broker.allocator.devices[actor.gpu_uuids[0]].cordoned == ""
        assert "instance.removal_postponed" in rig.names()
        rig.runtime.destroy = real  # type: ignore[method-assign]


async def test_an_orphan_that_survives_does_not_keep_the_agent_from_starting() -> None:
    async with node_rig() as rig:
        orphan = await rig.running()
        other = await rig.running()
        await rig.store.delete_instance(orphan.uid)
        real = rig.runtime.kill

        async def kill(handle: Any, deadline_s: float = 10.0) -> None:
            if handle.uid == orphan.uid:
                raise UnavailableError("KILL_TIMEOUT", "it survives")
            await real(handle)

        rig.runtime.kill = kill  # type: ignore[method-assign]
        await rig.restart()
        assert list(rig.node.actors) == [other.uid]
        assert "instance.kill_failed" in rig.names()


async def test_second_awake_instance_on_a_gpu_is_killed() -> None:
    async with node_rig(per_gpu=2) as rig:
        rig.gpus.gpus = rig.gpus.gpus[:1]
        await rig.boot()
        first = await rig.frozen()
        second = await rig.running()
        rig.freezer.states[first.uid] = Condition.AWAKE  # another program thawed and restored it
        await rig.restart()
        assert len(rig.node.actors) == 1
        assert rig.holder() in (first.uid, second.uid)


async def test_unexpected_error_costs_one_instance_not_the_agent() -> None:
    async with node_rig() as rig:
        bad, good = await rig.running(), await rig.running()
        real = rig.freezer.condition

        async def condition(handle: Any) -> Condition:
            if handle.uid == bad.uid:
                raise ValueError("a state nobody knows")
            return await real(handle)

        rig.freezer.condition = condition  # type: ignore[method-assign]
        await rig.restart()
        assert list(rig.node.actors) == [good.uid]


async def test_if_the_records_cannot_be_read_the_agent_does_not_start() -> None:
    async with node_rig() as rig:
        uid = (await rig.running()).uid
        await rig.kill_agent()
        await rig.boot()
        rig.store.failing = True
        with pytest.raises(UnavailableError, match="STORE_FAILED"):
            await rig.recover()
        assert rig.runtime.running() == [uid]
        rig.store.failing = False


async def test_dead_container_that_cannot_be_removed_cordons_no_gpu() -> None:
    """Its engine is down while the next agent starts: the processes are killed by the kernel."""
    async with node_rig() as rig:
        actor = await rig.running()
        rig.freezer.states[actor.uid] = Condition.BROKEN
        rig.runtime.engine_away = True
        await rig.restart()
        assert rig.runtime.running() == []
        assert rig.node.broker.allocator.devices[actor.gpu_uuids[0]].cordoned == ""
        assert await rig.store.load_instances() == []
        assert "instance.removal_postponed" in rig.names(actor.uid)


async def test_ended_instance_is_forgotten_while_its_engine_is_down() -> None:
    async with node_rig() as rig:
        actor = await rig.running()
        rig.runtime.exit(actor.uid, Exit(code=1))
        rig.runtime.engine_away = True
        await rig.restart()
        assert await rig.store.load_instances() == []
        assert "instance.gone" in rig.names(actor.uid)


async def lose_record(rig: NodeRig, uid: str, handle: Handle | None = None) -> None:
    """The next agent can't read the instance's record, but for its `handle`."""
    await rig.billing.flush()
    await rig.kill_agent()
    gone = rig.store._records.pop(uid)
    rig.store.unreadable[uid] = UnreadableRecord(uid, gone.gpu_uuids, "Invalid enum value 'DREAM'", handle)
    await rig.boot()


@pytest.mark.parametrize("nvml_answers", [True, False])
async def test_an_instance_whose_record_cannot_be_read_is_left_alone(nvml_answers: bool) -> None:
    """Neither killed nor used, its GPU kept from others; the rest of the node works."""
    async with node_rig() as rig:
        lost, other = await rig.running(), await rig.running()
        gpu = lost.gpu_uuids[0]
        pid = rig.runtime.containers[lost.uid].handle.process.pid
        await lose_record(rig, lost.uid)

        async def gpus_of(pids: set[int]) -> list[str] | None:
            return ([gpu] if pid in pids else []) if nvml_answers else None

        rig.node.broker.gpus_of = gpus_of  # type: ignore[method-assign]
        found = await rig.recover()
        assert (found.unreadable, found.killed, found.orphans) == (1, 0, 0)
        assert lost.uid in rig.runtime.containers
        assert not rig.runtime.containers[lost.uid].ended.done()
        assert set(rig.node.actors) == {other.uid}
        assert "install the version" in rig.messages("instance.record_unreadable")[0]
        cordoned = {uuid for uuid, device in rig.node.broker.allocator.devices.items() if device.cordons}
        assert cordoned == {gpu}
        assert list(await rig.store.unreadable_instances()), "the record stays, for the version that wrote it"
        rig.clock.advance(60 * SECOND_NS)
        await rig.billing.flush()
        windows = await rig.store.read_windows(lost.uid)
        assert sum(one.idle_ns + one.active_ns for one in windows if one.estimated) == 0, "nothing is billed meanwhile"


async def test_an_instance_whose_bundle_cannot_be_read_either_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer version wrote both. Its process is still known by what the record tells."""
    async with node_rig() as rig:
        lost = await rig.running()
        await lose_record(rig, lost.uid, rig.runtime.containers[lost.uid].handle)

        async def none() -> list[Handle]:
            return []

        monkeypatch.setattr(rig.runtime, "list_handles", none)
        found = await rig.recover()
        assert (found.unreadable, found.gone) == (1, 0)
        assert list(await rig.store.unreadable_instances()), "the record stays"


async def test_a_frozen_instance_that_is_left_alone_keeps_its_raised_limit_and_the_size_of_its_image() -> None:
    """The version that can read its record wakes it."""
    async with node_rig() as rig:
        uid = (await rig.frozen()).uid
        rig.memory.raised[uid] = 1 << 30
        image = rig.memory.noted_image(uid)
        await lose_record(rig, uid)
        found = await rig.recover()
        assert found.unreadable == 1
        assert rig.memory.limit_raised(uid)
        assert rig.memory.noted_image(uid) == image is not None


async def test_a_record_that_cannot_be_read_goes_with_its_processes() -> None:
    async with node_rig() as rig:
        lost = await rig.running()
        rig.runtime.containers[lost.uid].ended.set_result(Exit(code=0))
        await lose_record(rig, lost.uid)
        found = await rig.recover()
        assert (found.gone, found.unreadable) == (1, 0)
        assert list(await rig.store.unreadable_instances()) == []


@pytest.mark.parametrize("error", [UnavailableError("ENGINE_FAILED", "device busy"), OSError("no space"), None])
async def test_a_record_that_cannot_be_read_and_whose_remains_cannot_be_removed_ends_no_recovery(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an error, or no answer within the deadline."""
    async with node_rig() as rig:
        lost, other = await rig.running(), await rig.running()
        await lose_record(rig, lost.uid)
        rig.runtime.containers[lost.uid].ended.set_result(Exit(code=0))

        async def destroy(_: object) -> None:
            if error is not None:
                raise error
            await asyncio.Event().wait()

        monkeypatch.setattr(rig.runtime, "destroy", destroy)
        found = await rig.recover(deadline_s=0.05)
        assert (found.gone, found.unreadable) == (0, 1)
        assert set(rig.node.actors) == {other.uid}
        cordoned = {uuid for uuid, device in rig.node.broker.allocator.devices.items() if device.cordons}
        assert cordoned == set(lost.gpu_uuids)
        assert list(await rig.store.unreadable_instances()), "the next start tries again"

"""The agent dies at every step of a life and of a recovery; the next one finds one instance or none, never two."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from agent.core.errors import HibernodeError
from agent.core.lifecycle import events as ev
from agent.core.types import SECOND_NS, InstanceState
from agent.ports import Condition
from tests.host.rig import PATIENCE_S, NodeRig, enter, eventually, node_rig, until

S = InstanceState


class Fuse:
    """Wraps ports: at the `limit`th call the agent dies, `before` it has an effect or after. The dead call no more."""

    def __init__(self, limit: int, *, before: bool) -> None:
        self.limit = limit
        self.before = before
        self.calls: list[str] = []
        self.blown = asyncio.Event()

    def wrap(self, port: object) -> Any:
        return _Fused(self, port)

    async def call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.blown.is_set():
            await asyncio.Event().wait()
        self.calls.append(name)
        last = len(self.calls) == self.limit
        if last and self.before:
            self.blown.set()
            await asyncio.Event().wait()
        result = await method(*args, **kwargs)
        if last:
            self.blown.set()
            await asyncio.Event().wait()
        return result


class _Fused:
    WATCHED = (
        "put_instance", "delete_instance", "load_instances", "start", "kill", "destroy", "terminate", "list_handles",
        "lock", "unlock", "checkpoint", "wake", "condition", "thaw", "finish_freeze", "alive",
    )  # fmt: skip

    def __init__(self, fuse: Fuse, port: object) -> None:
        self._fuse = fuse
        self._port = port

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if name not in self.WATCHED:
            return found
        return lambda *args, **kwargs: self._fuse.call(name, found, *args, **kwargs)


async def all_is_well(rig: NodeRig) -> None:
    """Exactly one container per instance, one record, GPUs held by exactly those awake, every one serves."""
    for actor in list(rig.node.actors.values()):
        await until(actor, S.RUNNING, S.FROZEN)
    assert sorted(rig.node.actors) == rig.runtime.running() == sorted(rig.runtime.containers)
    assert sorted(record.spec.uid for record in await rig.store.load_instances()) == sorted(rig.node.actors)
    awake = {actor.uid for actor in rig.node.actors.values() if actor.state is S.RUNNING}
    assert {device.holder for device in rig.node.broker.allocator.devices.values()} - {""} == awake
    for actor in list(rig.node.actors.values()):
        await asyncio.wait_for(enter(actor), PATIENCE_S)
        actor.gate.leave()


async def a_whole_life(rig: NodeRig) -> None:
    """Create, freeze, wake, stop: everything that writes."""
    actor = await rig.create(request_id="fn/1/0/0")
    await until(actor, S.RUNNING)
    rig.clock.advance(10 * SECOND_NS)
    await until(actor, S.FROZEN)
    await enter(actor)
    actor.gate.leave()
    actor.handle(ev.StopAsked(SECOND_NS))
    await eventually(lambda: actor.uid in rig.node.ended)
    await asyncio.gather(*rig.node._endings)


async def blow(fuse: Fuse, story: Any) -> bool:
    """Run the story until the fuse blows; False if it ended before."""
    task, blown = asyncio.ensure_future(story), asyncio.ensure_future(fuse.blown.wait())
    await asyncio.wait([task, blown], return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE_S)
    died = fuse.blown.is_set()
    for each in (task, blown):
        each.cancel()
    results = await asyncio.gather(task, blown, return_exceptions=True)
    assert died or not isinstance(results[0], (HibernodeError, AssertionError)), results[0]
    return died


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
async def test_a_sigkill_at_any_step_of_a_life_leaves_one_instance_or_none(before: bool) -> None:
    limit, died, fuse = 1, True, Fuse(0, before=before)
    while died:
        fuse = Fuse(limit, before=before)
        async with node_rig(wrap=fuse.wrap) as rig:
            died = await blow(fuse, a_whole_life(rig))
            rig.wrap = lambda port: port
            await rig.restart()
            assert len(rig.node.actors) <= 1, fuse.calls
            await all_is_well(rig)
        limit += 1
    assert limit > 10, fuse.calls


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
async def test_a_sigkill_at_any_step_of_a_recovery_is_recovered_from(before: bool) -> None:
    limit, died, fuse = 1, True, Fuse(0, before=before)
    while died:
        async with node_rig(per_gpu=2) as rig:
            running, frozen, locked, half = [await rig.running() for _ in range(4)]
            for actor in (running, frozen, locked, half):
                rig.freezer.states[actor.uid] = Condition.FROZEN
            awake = [a for a in (running, frozen, locked, half) if a.state is S.RUNNING]
            rig.freezer.states[awake[0].uid] = Condition.LOCKED
            rig.freezer.states[awake[1].uid] = Condition.CHECKPOINTED
            kept = sorted(rig.node.actors)
            await rig.kill_agent()
            fuse = Fuse(limit, before=before)
            rig.wrap = fuse.wrap
            await rig.boot()
            died = await blow(fuse, rig.recover())
            rig.wrap = lambda port: port
            await rig.restart()
            assert sorted(rig.node.actors) == kept, fuse.calls
            await all_is_well(rig)
        limit += 1
    assert limit > 8, fuse.calls

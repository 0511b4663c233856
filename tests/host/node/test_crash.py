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
from tests.host.rig import PATIENCE_S, World, a_world, enter, eventually, until

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


async def all_is_well(world: World) -> None:
    """Exactly one container per instance, one record, GPUs held by exactly those awake, every one serves."""
    for actor in list(world.node.actors.values()):
        await until(actor, S.RUNNING, S.FROZEN)
    assert sorted(world.node.actors) == world.runtime.running() == sorted(world.runtime.containers)
    assert sorted(record.spec.uid for record in await world.store.load_instances()) == sorted(world.node.actors)
    awake = {actor.uid for actor in world.node.actors.values() if actor.state is S.RUNNING}
    assert {device.holder for device in world.node.broker.allocator.devices.values()} - {""} == awake
    for actor in list(world.node.actors.values()):
        await asyncio.wait_for(enter(actor), PATIENCE_S)
        actor.gate.leave()


async def a_whole_life(world: World) -> None:
    """Create, freeze, wake, stop: everything that writes."""
    actor = await world.create(request_id="fn/1/0/0")
    await until(actor, S.RUNNING)
    world.clock.advance(10 * SECOND_NS)
    await until(actor, S.FROZEN)
    await enter(actor)
    actor.gate.leave()
    actor.handle(ev.StopAsked(SECOND_NS))
    await eventually(lambda: actor.uid in world.node.ended)
    await asyncio.gather(*world.node._endings)


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
        async with a_world(wrap=fuse.wrap) as world:
            died = await blow(fuse, a_whole_life(world))
            world.wrap = lambda port: port
            await world.restart()
            assert len(world.node.actors) <= 1, fuse.calls
            await all_is_well(world)
        limit += 1
    assert limit > 10, fuse.calls


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
async def test_a_sigkill_at_any_step_of_a_recovery_is_recovered_from(before: bool) -> None:
    limit, died, fuse = 1, True, Fuse(0, before=before)
    while died:
        async with a_world(per_gpu=2) as world:
            running, frozen, locked, half = [await world.running() for _ in range(4)]
            for actor in (running, frozen, locked, half):
                world.freezer.states[actor.uid] = Condition.FROZEN
            awake = [a for a in (running, frozen, locked, half) if a.state is S.RUNNING]
            world.freezer.states[awake[0].uid] = Condition.LOCKED
            world.freezer.states[awake[1].uid] = Condition.CHECKPOINTED
            kept = sorted(world.node.actors)
            await world.kill_agent()
            fuse = Fuse(limit, before=before)
            world.wrap = fuse.wrap
            await world.boot()
            died = await blow(fuse, world.recover())
            world.wrap = lambda port: port
            await world.restart()
            assert sorted(world.node.actors) == kept, fuse.calls
            await all_is_well(world)
        limit += 1
    assert limit > 8, fuse.calls

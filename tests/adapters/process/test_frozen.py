"""Tests that single processes of a frozen instance are killed without waking it."""

from __future__ import annotations

import asyncio

import pytest

from agent.adapters.kernel.cgroup_freezer import choose_freezer
from agent.adapters.kernel.process_table import boot_id
from agent.ports import FreezerState
from tests.contract.runtime_worlds import ProcessWorld

LISTED_DEADLINE_S = 10.0


@pytest.mark.parametrize("fenced", [True, False])
async def test_frozen_stray_dies_and_the_rest_stays_frozen(fenced: bool) -> None:
    world = ProcessWorld(fenced=fenced)
    try:
        if fenced and world.slice is None:
            pytest.skip("needs a writable cgroup v2")
        handle = await world.runtime.start(world.spec("resize-a"))
        await world.settled(handle)
        await world.fork_stray(handle)
        strays = [pid for pid in await world.runtime.pids(handle) if pid != handle.process.pid]
        assert strays
        freezer = choose_freezer(world.slice, world.state_uuid, boot_id())
        await freezer.freeze(handle)
        await world.runtime.kill_processes(handle, strays)
        async with asyncio.timeout(LISTED_DEADLINE_S):
            while set(await world.runtime.pids(handle)) & set(strays):  # noqa: ASYNC110 - burials have no event
                await asyncio.sleep(0.01)
        assert freezer.is_frozen(handle)
        assert await world.runtime.alive(handle)
        await world.runtime.kill_processes(handle, [handle.process.pid])
        exit_ = await asyncio.wait_for(world.runtime.wait(handle), LISTED_DEADLINE_S)
        assert (exit_.signal, exit_.oom_killed) == (9, False)
    finally:
        await world.close()


async def test_cgroup_freeze_is_seen_by_an_agent_without_cgroups() -> None:
    world = ProcessWorld(fenced=True)
    try:
        if world.slice is None:
            pytest.skip("needs a writable cgroup v2")
        handle = await world.runtime.start(world.spec("resize-a"))
        await world.settled(handle)
        await choose_freezer(world.slice, world.state_uuid, boot_id()).freeze(handle)
        later = choose_freezer(None, world.state_uuid, boot_id())
        assert (later.name, later.state(handle)) == ("signal", FreezerState.FROZEN), "the driver must not be asked"
    finally:
        await world.close()


async def test_instance_without_cgroup_is_frozen_by_signals_by_a_later_agent() -> None:
    fenced, world = ProcessWorld(fenced=True), ProcessWorld(fenced=False)
    try:
        if fenced.slice is None:
            pytest.skip("needs a writable cgroup v2")
        handle = await world.runtime.start(world.spec("resize-a"))
        await world.settled(handle)
        freezer = choose_freezer(fenced.slice, world.state_uuid, boot_id())
        await freezer.freeze(handle)
        assert (freezer.name, freezer.state(handle)) == ("cgroup", FreezerState.FROZEN)
        await freezer.thaw(handle)
        assert freezer.state(handle) is FreezerState.THAWED
    finally:
        await world.close()
        await fenced.close()

"""SIGKILLs the agent at every step of a start: the next agent finds a recorded container, or nothing runs.

Must never happen: a workload that runs without a record, or a trace that can't be cleaned up.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.adapters.kernel import cgroup
from agent.core.types import Handle
from tests.adapters.process.victim import POINTS
from tests.contract.runtime_worlds import ProcessWorld

ROOT = Path(__file__).parents[3]
UID = "resize-crash"


@pytest.fixture(params=["fenced", "unfenced"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[ProcessWorld]:
    made = ProcessWorld(fenced=request.param == "fenced")
    if request.param == "fenced" and made.slice is None:
        await made.close()
        pytest.skip("this user can't write a v2 cgroup here")
    yield made
    await made.close()


def victim(world: ProcessWorld, point: str) -> subprocess.Popen[bytes]:
    state_dir = world.folder / "state"
    state_dir.mkdir(exist_ok=True)
    fenced = "fenced" if world.slice else "unfenced"
    module = "tests.adapters.process.victim"
    return subprocess.Popen(
        [sys.executable, "-m", module, str(state_dir), world.state_uuid, fenced, UID, point],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )


async def next_agent_cleans_up(world: ProcessWorld) -> list[Handle]:
    """Recover: list, judge, destroy. Returns what was found; asserts that nothing stays."""
    handles = list(await world.runtime.list_handles())
    if not handles:
        # A launcher without a plan ends by itself, after a moment.
        assert await cgroup.poll_until(lambda: world.traces(UID) == [], 10.0), world.traces(UID)
        assert not (world.folder / "state/ran").exists(), "it ran without a record"
    for handle in handles:
        assert handle.uid == UID
        await world.runtime.destroy(handle)
    assert await cgroup.poll_until(lambda: world.traces(UID) == [], 10.0), world.traces(UID)
    assert list(await world.runtime.list_handles()) == []
    if world.slice:
        assert not world.slice.path.exists()
    return handles


RECORDED = {"after record", "after replace", "before release", "half a plan", "whole plan", "after release"}


@pytest.mark.parametrize("point", POINTS)
async def test_agent_killed_at_a_step(world: ProcessWorld, point: str) -> None:
    if world.slice is None and point.endswith("cgroup"):
        point = "after bundle"  # there is no cgroup step without cgroups
    process = victim(world, point)
    assert process.stdout
    with process.stdout:
        assert process.wait(30) == -signal.SIGKILL
    found = await next_agent_cleans_up(world)
    assert bool(found) == (point in RECORDED)


async def test_agent_killed_at_any_moment(world: ProcessWorld) -> None:
    """Ten deaths at random moments around the start, which takes about 25 ms after 200 ms of imports."""
    seeded = random.Random(20231107)
    for _ in range(10):
        process = victim(world, "never")
        assert process.stdout
        with process.stdout:
            state = world.folder / "state/instances"
            assert await cgroup.poll_until(state.exists, 30.0)
            await asyncio.sleep(seeded.uniform(0, 0.04))  # the moment of death itself, not a synchronisation
            process.kill()
            assert process.wait(10) == -signal.SIGKILL
        await next_agent_cleans_up(world)
        (world.folder / "state/ran").unlink(missing_ok=True)
        state.rmdir()


async def test_container_started_before_the_death_is_adopted(world: ProcessWorld) -> None:
    process = victim(world, "never")
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == b"started\n"
        process.kill()
        process.wait(10)
    [handle] = await world.runtime.list_handles()
    assert await world.runtime.alive(handle)
    os.kill(handle.process.pid, signal.SIGTERM)
    exit_ = await world.runtime.wait(handle)
    assert exit_.code == -1
    assert exit_.message == "exit status unknown: started by an earlier agent"
    assert [found.uid for found in await next_agent_cleans_up(world)] == [UID]


@pytest.mark.parametrize("world", ["fenced"], indirect=True)
async def test_unknown_cgroup_is_removed(world: ProcessWorld) -> None:
    assert world.slice
    stray = subprocess.Popen(["sleep", "86391"])  # noqa: ASYNC220
    path = world.slice.create("resize-unknown")
    (path / "cgroup.procs").write_text(str(stray.pid))
    assert list(await world.runtime.list_handles()) == []
    assert stray.wait(10) == -signal.SIGKILL
    assert not path.exists()

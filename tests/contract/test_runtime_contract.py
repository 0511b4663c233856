"""The runtime contract on the fake, and on processes of the host with and without cgroups.

tests/engines/test_runtime_contract.py runs it on containers.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator

import pytest

from agent.adapters.kernel import cgroup
from agent.core.errors import InvalidArgumentError
from agent.core.types import FunctionSpec, InstanceSpec
from agent.ports import StartSpec
from tests.contract.runtime_contract import *  # noqa: F403
from tests.contract.runtime_worlds import FakeWorld, ProcessWorld, World

WORLDS = ["fake", "process in a cgroup", "process tree", "process of another user"]


@pytest.fixture(params=WORLDS)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    made = _make_world(request.param)
    yield made
    await made.close()


def _make_world(kind: str) -> World:
    if kind == "fake":
        return FakeWorld()
    if kind == "process tree":
        return ProcessWorld(fenced=False)
    if cgroup.open_slice(str(uuid.uuid4())) is None:
        pytest.skip("this user can't write a v2 cgroup here")
    if kind == "process in a cgroup":
        return ProcessWorld(fenced=True)
    if os.geteuid() != 0:
        pytest.skip("only root can start a process as another user")
    return ProcessWorld(fenced=True, user="nobody")


async def test_a_process_needs_something_to_run(world: World) -> None:
    nothing = StartSpec(InstanceSpec("resize-a", "resize/1/0", FunctionSpec(name="resize")), {}, ())
    with pytest.raises(InvalidArgumentError) as empty:
        await world.runtime.start(nothing)
    assert empty.value.reason == "COMMAND_MISSING"
    assert world.traces("resize-a") == []

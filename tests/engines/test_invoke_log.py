"""x-fc-log-result of real containers: lines may still be in a pipe or the engine when the answer arrives."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

import pytest

from agent.host.ingress.invoke_log import END_WAIT_S, log_result
from tests.engines.engines import Engine
from tests.engines.world import EngineWorld

ID = "1-67a59f35-150c1267-f381ba1c085c"
LINES = f"FC Invoke Start RequestId: {ID}", "page 1", f"FC Invoke End RequestId: {ID}"


@pytest.fixture
async def world(engine: Engine) -> AsyncIterator[EngineWorld]:
    made = EngineWorld(engine)
    yield made
    await made.close()


async def test_log_of_a_request_arrives_in_time(world: EngineWorld) -> None:
    handle = await world.engine_runtime.start(world.spec("i-log"))
    await world.settled(handle)
    world.tell(handle, "for n in $(seq 1 3000); do echo chatter of an earlier request, number $n; done")
    await world.until_said(handle, b"number 3000")
    for line in LINES:
        world.tell(handle, f"echo '{line}'")
    value = await log_result(world.engine_runtime, handle, ID, END_WAIT_S)
    assert base64.b64decode(value).decode().splitlines() == list(LINES)

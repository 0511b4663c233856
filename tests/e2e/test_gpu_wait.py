"""A busy instance that holds the GPU longer than another's request may wait (agent/docs/operations.md)."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace

import pytest

from agent.core.types import SECOND_NS
from agent.v1 import types_pb2
from tests.e2e.stack import echo, running_stack

HELD_MS, QUEUE_S = 12_000, 4


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_the_busy_holder_goes_on_and_the_waiter_learns_who_it_is() -> None:
    async with running_stack("--gpus", "1", gpu_settings={"max_hold": "1s"}) as stack:
        await stack.deploy(echo("busy"), target=1)
        await stack.deploy(replace(echo("waiting"), queue_timeout_ns=QUEUE_S * SECOND_NS), target=1)
        await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 2)
        inside = asyncio.create_task(stack.ask("busy", f"/sleep?ms={HELD_MS}"))
        await stack.wait_for_state(types_pb2.Instance.STATE_RUNNING, 1)

        asked = asyncio.create_task(stack.ask("waiting", "/answer?n=1"))
        await stack.wait_for_state(types_pb2.Instance.STATE_WAITING_GPU, 1)
        (holder,) = (one for one in await stack.instances() if one.function == "busy")
        assert f"its GPU is held by {holder.uid} of busy, RUNNING for" in await ps(str(stack.folder))
        refused = await asked
        assert (refused.status, json.loads(refused.body)["Code"]) == (504, "QueueTimeout")
        assert f"its GPU is held by {holder.uid} of busy, RUNNING for" in refused.body.decode()

        later = asyncio.create_task(stack.ask("busy", "/answer?n=2"))
        assert (await inside).status == 200, "what was inside has ended, well after max_hold"
        assert (await later).status == 200, "what came for the holder meanwhile waited in its turn"
        await stack.ask_correctly("waiting", 3)


async def ps(home: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agent.cli.main", "ps", "--home", home), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    return out.decode()

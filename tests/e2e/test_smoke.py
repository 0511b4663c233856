"""The main job, once: a request to a frozen instance wakes it, gets the right answer, and it sleeps again."""

from __future__ import annotations

from agent.v1 import types_pb2
from tests.e2e.stack import echo, running_stack


async def test_a_request_wakes_a_frozen_instance_and_it_sleeps_again() -> None:
    async with running_stack() as stack:
        await stack.deploy(echo("ocr"), target=3)
        for number in range(3):
            await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 3)
            await stack.ask_rightly("ocr", number)
        await stack.remove_functions(["ocr"])
        assert not stack.leftovers()

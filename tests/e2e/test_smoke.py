"""The main purpose, once: a request wakes a frozen instance, gets the right answer, and the instance freezes again."""

from __future__ import annotations

from agent.v1 import types_pb2
from tests.e2e.stack import echo, running_stack


async def test_request_wakes_a_frozen_instance_that_freezes_again() -> None:
    async with running_stack() as stack:
        await stack.deploy(echo("ocr"), target=3)
        for number in range(3):
            await stack.wait_for_state(types_pb2.Instance.STATE_FROZEN, 3)
            await stack.ask_correctly("ocr", number)
        await stack.remove_functions(["ocr"])
        assert not stack.leftovers()
